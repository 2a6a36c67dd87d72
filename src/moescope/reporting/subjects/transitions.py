"""How the choice of experts goes on from layer to layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures.claims import first_middle_last
from moescope.measures.groups import FEWEST_EXPECTED
from moescope.measures.transitions import transitions
from moescope.reporting import figures as drawn
from moescope.reporting.cells import BY_DOCUMENT, FDR, cell
from moescope.reporting.chapters import STRUCTURE
from moescope.reporting.frames import kinds, only, tidy
from moescope.reporting.layers import among, shown_layers
from moescope.reporting.lifts import MOST_LISTED, about_map, extremes
from moescope.reporting.numbers import MISSING, count, percent
from moescope.reporting.options import figures_option, layers_option, one_of, trace_argument
from moescope.reporting.subject import Drawing, PageFigure, PageSection, PageTable, Results, Subject
from moescope.reporting.tables import SIGNIFICANT, Cell, Row, Section, Table
from moescope.reporting.wording import first_or_all
from moescope.trace import Trace

SECTION = PageSection(
    STRUCTURE,
    "transitions",
    "Does one layer predict the next?",
    "Transitions",
    "Numbers of experts mean nothing across layers, but tokens may still stay together: those of one "
    "expert here may share an expert there.",
)
_FOLDED = {
    "information_between_layers": "Information from layer to layer",
    "transitions": "The transitions most and least frequent",
    "paths": "Paths through all layers",
}


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """Maps of some layers, the information of all, and the tables."""
    layers = among(results.layers, result["layer"].values.tolist())
    first = str(result["choice"].values) == "first"
    goes = "a token's first choice goes" if first else "the assignments of a token go"
    yield PageFigure(
        name="transitions",
        file="transitions",
        draw=lambda: drawn.joint.draw_transitions(result, layers),
        label="Transitions",
        title="From layer to layer",
        caption=(
            f"How many times as often {goes} from one expert to another as in independent layers"
            f"{about_map(result)}. Below: the bits that one layer's choice "
            "holds of the next one's, bias removed, with 95 % intervals by document; dashed: what sampling alone would "
            "give. Grey: "
            "independent layers would give fewer than 10 tokens; experts of which nothing can be told are left out."
        ),
        how=(
            "Bold rows of orange and blue are a path through the layers: knowing a token's expert, the next one's can "
            "be fetched early. White maps are layers that choose anew."
        ),
        cannot=(
            "It does not tell whether the choice at one layer matters to the next, or whether the identity of the "
            "token fixes both."
        ),
        frame=transitions_frame(result, layers),
    )
    yield from PageTable.each(transitions_tables(result, layers), _FOLDED)


@trace_argument
@layers_option
@one_of("--choice", ["first", "all"], "First choices, or all pairs of an assignment at one layer and one at the next.")
@figures_option
def command(
    trace: Trace, layers: tuple[int, ...] | None, choice: Literal["first", "all"], figures: Path | None
) -> Iterator[Table | Drawing]:
    """Show how the choice of experts goes on from layer to layer.

    How much the expert at one layer says about that at the next, in bits; which transitions are more and less frequent
    than independent layers make them; and how many paths through all the layers carry half of the tokens, beside a
    Markov chain and independent layers. CSV and JSON hold all of it in one table.

    \b
    Example:
      moescope transitions pile.moe --layers 0,1,2,3
    """
    if not trace.header.counts_only:
        shown_layers(trace, layers)  # refuses a trace without a document
    result = transitions(trace, layers, choice=choice)
    yield from transitions_tables(result)
    yield Drawing(file="transitions", draw=lambda: drawn.joint.draw_transitions(result))


def transitions_tables(transitions: xr.Dataset, layers: Sequence[int] | None = None) -> Iterator[Table]:
    """The information from layer to layer, the strongest transitions, and, if counted, the paths.

    The frame of the first table holds everything. Transitions to `layers` are listed, here and in the frames; None
    lists those to the first, the middle and the last, and all in the frames.
    """
    known = transitions["layer"].values.tolist()
    shown = layers if layers is not None else first_middle_last(known)
    name_of = {layer: f"{int(transitions['layer_before'].sel(layer=layer))} to {layer}" for layer in known}
    what = "first choices" if str(transitions["choice"].values) == "first" else "all assignments"
    information = []
    for layer in known:
        of_layer = transitions.sel(layer=layer)
        q = of_layer["lift_q"].values
        cells = (
            cell(of_layer, "information"),
            Cell(percent(float(of_layer["information"]) / max(float(of_layer["entropy"]), 1e-12))),
            *(cell(of_layer, name) for name in ("plug_in", "miller_madow", "information_null")),
            Cell(f"{count(int((q < SIGNIFICANT).sum()))} of {count(int(np.isfinite(q).sum()))}"),
        )
        information.append(Row(name_of[layer], cells))
    yield Table(
        "information_between_layers",
        f"Information that the expert of a token at one layer holds of the next layer's, {what}, bits",
        "layers",
        ("bias removed", "% of the entropy", "as counted", "Miller-Madow", "sampling alone", "transitions differ"),
        (Section("", tuple(information)),),
        notes=(f"sampling alone: what would be counted if the layers were independent. {BY_DOCUMENT}",),
        frame=transitions_frame(transitions, layers),
    )
    sections = []
    for layer in shown:
        of_layer = transitions.sel(layer=layer)
        differs = of_layer["lift_q"].values < SIGNIFICANT
        of_layer = of_layer.drop_vars("lift_q")  # all that are listed differ: no mark
        rows = [
            Row(f"{before} to {after}", tuple(cell(of_layer.sel(expert=before, next=after), name) for name in _COLUMNS))
            for before, after in extremes(of_layer["lift"].values, differs)
        ]
        sections.append(Section(f"layer {name_of[layer]}", tuple(rows)))
    yield Table(
        "transitions",
        f"Transitions from layer to layer, {what}, %",
        "experts",
        tuple(_COLUMNS.values()),
        tuple(sections),
        notes=(
            f"Of the transitions that differ, the {MOST_LISTED} most and the {MOST_LISTED} least frequent for the "
            f"popularity of the experts ({FDR}).",
            *_untested(transitions.sel(layer=list(shown))),
        ),
        frame=_moves_frame(transitions, layers),
    )
    if "half" in transitions:
        of_paths = []
        number = int(transitions["path_tokens"])
        for routing in transitions["routing"].values.tolist():
            of_routing = transitions.sel(routing=routing)
            sizes = [float(of_routing[name]) for name in ("distinct", "half", "effective")]
            counts = [Cell(MISSING if not np.isfinite(size) else count(round(size))) for size in sizes]
            if sizes[-1] > number:
                counts[-1] = Cell(f">{count(number)}")  # rests on a few pairs of tokens
            of_paths.append(Row(routing, (*counts, Cell(percent(float(of_routing["once"]))))))
        yield Table(
            "paths",
            f"Paths (first choices at all {len(known) + 1} layers) of {count(number)} tokens",
            "",
            ("different", "carry half of the tokens", "effective", "% of tokens alone on theirs"),
            (Section("", tuple(of_paths)),),
            notes=(
                "markov chain, independent layers: as many tokens drawn with these transitions, and with these "
                "popularities only. effective: one over the probability that two tokens share a path.",
            ),
            frame=tidy(transitions, "routing"),
        )


_COLUMNS = {
    "joint": "of the tokens",
    "joint_null": "independent layers",
    "lift": "lift",
    "probability": "of those from the first",
}


def _untested(transitions: xr.Dataset) -> list[str]:
    """How many of the transitions shown have too few tokens, if any do."""
    of_all = int((transitions["num_before"] * transitions["num_ids"]).sum())
    tested = int(transitions["lift_p"].notnull().sum())
    if tested == of_all:
        return []
    return [
        f"{count(of_all - tested)} of these {count(of_all)} transitions are not tested, and grey in the figure: "
        f"independent layers would give them fewer than {FEWEST_EXPECTED} tokens, or leave fewer to other experts, and "
        "too few tell nothing. A longer trace tests more, and so do all assignments instead of first choices (--choice "
        "all)."
    ]


def transitions_frame(transitions: xr.Dataset, layers: Iterable[int] | None = None) -> pd.DataFrame:
    """A row a pair of layers, then a row a transition to one of the layers (None: all), then a row a kind of paths."""
    frames = {"information": tidy(only(transitions, "layer"), "layer"), "transition": _moves_frame(transitions, layers)}
    return kinds(frames | ({"paths": tidy(transitions, "routing")} if "half" in transitions else {}))


def _moves_frame(transitions: xr.Dataset, layers: Iterable[int] | None) -> pd.DataFrame:
    moves = only(transitions, "layer", "expert", "next")
    return tidy(moves if layers is None else moves.sel(layer=list(layers)), "layer", "expert", "next")


subject = Subject(
    measure=lambda counted, _: transitions(counted, choice=first_or_all(counted)),
    blocks=blocks,
    section=SECTION,
    command=command,
)
