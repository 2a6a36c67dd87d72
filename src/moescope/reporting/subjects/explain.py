"""What explains the choice: bits by source, and a sentence a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan
from pathlib import Path

import pandas as pd
import xarray as xr

from moescope.measures.explain import explain
from moescope.reporting import figures as drawn
from moescope.reporting.cells import BY_DOCUMENT, FDR, by_layer, cell, mark
from moescope.reporting.chapters import EXPLANATION
from moescope.reporting.frames import tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import bits, percent
from moescope.reporting.options import (
    choice_option,
    figures_option,
    permutations_option,
    shown_layers_option,
    trace_argument,
)
from moescope.reporting.printing import layer_progress
from moescope.reporting.subject import Drawing, PageFigure, PageSection, PageTable, Results, Subject
from moescope.reporting.tables import Cell, Row, Table
from moescope.reporting.wording import choice_of, first_or_all, listed
from moescope.trace import Trace

SECTION = PageSection(
    EXPLANATION,
    "bits",
    "Where do the bits come from?",
    "Bits of a choice",
    "A choice among experts holds so many bits. A source explains some of them if knowing it shortens the "
    "description of the choice; here, by layer, what each source explains by itself.",
)

TELLING = 0.05
"""Share of the entropy from which a source is named in the sentence of a layer."""

DIGITS = 3

_NAMES = {
    "domain": "the domain",
    "token": "the token",
    "previous token": "the token before",
    "previous expert": "the expert of the token before",
    "position": "the place in the sequence",
    "previous layer": "the token's expert in the layer before",
}


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """Bars a layer, lines over the layers if not all are shown, and the table."""
    what = "first choice" if result.attrs["choice"] == "first" else "choice"
    yield PageFigure(
        name="explained",
        file="explained",
        draw=lambda: drawn.explain.draw_explained(result, results.layers),
        label="Bits",
        title=f"Where the bits of the {what} come from",
        caption=(
            f"Bits of the {what} that each source alone explains; line: 95 % interval, by document. Dashed: all bits "
            "of the choice. Grey: between what is saved on documents left out and the plain count, which bound the "
            "truth but for sampling. Tick: the same of permuted routing."
        ),
        how=(
            "Compare a bar with the dashed line: that is how much of the choice one knows from the source. What goes "
            "beyond the tick is more than the document's own mix of experts. A router that looks words up has a long "
            "bar at the token and little beyond it elsewhere."
        ),
        cannot=(
            "Sources overlap, and their bits do not add up: a domain has its words, and the layer before has seen the "
            "same token. No bar says what causes the choice. A wide grey band says that the trace is too short for "
            "that source."
        ),
        frame=explain_frame(result.sel(layer=list(results.layers))),
    )
    if result.sizes["layer"] > len(results.layers):
        yield PageFigure(
            name="depth",
            file="explained-by-layer",
            draw=lambda: drawn.explain.draw_explained_by_layer(result),
            label="Bits by layer",
            title=f"Share of the {what} that each source explains, by layer",
            caption=f"Per cent of the bits of the {what}, H(E); bands: 95 % intervals, by document.",
            how=(
                "Lines that fall with depth are sources near the input, such as the token; lines that rise are what "
                "the layers before have made of the context."
            ),
            cannot=(
                "The lines overlap and do not add up to 100. What no line explains may be context, or chance of the "
                "training."
            ),
            frame=explain_frame(result),
        )
    yield PageTable(
        explain_table(result, results.layers), folded="The same as a table, with bounds, permuted routing and p-values"
    )


@trace_argument
@shown_layers_option
@choice_option
@permutations_option
@figures_option
def command(
    trace: Trace, layers: tuple[int, ...] | None, choice: str, permutations: int, figures: Path | None
) -> Iterator[Table | Drawing]:
    """Show how many bits of the choice domain, token, neighbours and place explain.

    For each layer: the entropy of the choice, and how much of it is told by the domain, the token, the token before,
    its expert, the place in the sequence, and the token's expert in the layer before; each with a 95 % interval by
    document, what permuted routing gives, and a p-value. Below, a sentence a layer.

    \b
    Example:
      moescope explain pile.moe --layers 0,15,31
    """
    trace.need_tokens()
    shown = shown_layers(trace, layers)
    with layer_progress("explaining") as progress:
        wanted = shown if figures is None else None
        result = explain(trace, wanted, choice=choice, permutations=permutations, progress=progress)
    yield explain_table(result, shown)
    yield Drawing(file="explained", draw=lambda: drawn.explain.draw_explained(result, shown))
    yield Drawing(file="explained_by_layer", draw=lambda: drawn.explain.draw_explained_by_layer(result))


def explain_table(explained: xr.Dataset, layers: Sequence[int]) -> Table:
    """Bits by source: a section a layer, a row a source, and below a sentence a layer."""
    data = explained.sel(layer=list(layers))
    sections = by_layer(
        data,
        lambda of_layer: tuple(Row(source, _cells(of_layer.sel(source=source))) for source in known_sources(of_layer)),
        lambda of_layer: f": {_bits(of_layer['entropy'].item())} bits in all",
    )
    return Table(
        "explain",
        f"Bits of the choice that each source explains, {choice_of(data)}",
        "source",
        ("explained", "of all, %", "held out", "plug-in", "permuted", "p"),
        sections,
        groups=(("", 2), ("bounds", 2), ("null", 2)),
        notes=(
            f"{BY_DOCUMENT} * more than by chance ({FDR}). Sources overlap: their bits do not add up.",
            *(explain_sentence(explained, layer) for layer in layers),
        ),
        frame=explain_frame(data),
    )


def explain_frame(explained: xr.Dataset) -> pd.DataFrame:
    """A row a (layer, source) of which something is known."""
    return tidy(explained, "layer", "source").dropna(subset="bits")


def explain_sentence(explained: xr.Dataset, layer: int) -> str:
    """One layer in plain words: what tells most, what tells something, what is not distinguishable from chance.

    Of what tells little, the upper end of the interval is said where that is not little.
    """
    of_layer = explained.sel(layer=layer)
    entropy = float(of_layer["entropy"])
    if isnan(entropy):
        return f"Layer {layer}: nothing was chosen."
    if entropy == 0:
        return f"Layer {layer}: every token makes the same choice; there is nothing to explain."
    by_source = {source: of_layer.sel(source=source) for source in known_sources(of_layer)}
    if not by_source:
        return f"Layer {layer}: nothing is known of what explains the choice; that takes two documents."
    share = {source: float(one["share"]) for source, one in by_source.items()}

    def with_size(source: str) -> str:
        return f"{_NAMES[source]} {_bits(float(by_source[source]['bits']))} ({percent(share[source], 0)} %)"

    def with_limit(source: str) -> str:
        most = float(by_source[source]["bits_high"]) / entropy
        return _NAMES[source] + (f" (up to {percent(most, 0)} %)" if most >= TELLING else "")

    descending = sorted(by_source, key=lambda source: -share[source])
    real = [source for source in descending if mark(by_source[source]["bits_q"])]
    strong = [with_size(source) for source in real if share[source] >= TELLING]
    weak = [with_limit(source) for source in real if not share[source] >= TELLING]
    none = [with_limit(source) for source in descending if source not in real]
    choice = "choice" if explained.attrs["choice"] == "all" else "first choice"
    return (
        f"Layer {layer}: the {choice} holds {_bits(entropy)} bits; "
        + (f"each by itself tells: {listed(strong)}." if strong else "no source tells much.")
        + (f" A little (under {percent(TELLING, 0)} %): {listed(weak)}." if weak else "")
        + (f" Not distinguishable from chance: {listed(none)}." if none else "")
    )


def _cells(place: xr.Dataset) -> tuple[Cell, ...]:
    """What one source explains of one layer."""
    bounds = (Cell(_bits(place[name].item())) for name in ("held_out", "plug_in", "bits_null"))
    return cell(place, "bits", DIGITS), cell(place, "share"), *bounds, cell(place, "bits_p", DIGITS)


def known_sources(explained: xr.Dataset) -> list[str]:
    """The sources of which it is known, in a layer at least, what they explain."""
    return [one for one in explained["source"].values.tolist() if explained["bits"].sel(source=one).notnull().any()]


def _bits(value: float) -> str:
    return bits(0.0 if value < 0 else value, DIGITS)


subject = Subject(
    measure=lambda counted, _: explain(counted, choice=first_or_all(counted)),
    blocks=blocks,
    section=SECTION,
    sentence=explain_sentence,
    command=command,
)
