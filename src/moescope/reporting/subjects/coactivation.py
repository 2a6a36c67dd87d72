"""Which experts are chosen for the same token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures.coactivation import coactivation
from moescope.reporting import figures as drawn
from moescope.reporting.cells import BY_DOCUMENT, FDR, cell
from moescope.reporting.chapters import STRUCTURE
from moescope.reporting.frames import only, tidy
from moescope.reporting.layers import among, shown_layers
from moescope.reporting.lifts import MOST_LISTED, about_map, extremes
from moescope.reporting.numbers import count, percent
from moescope.reporting.options import figures_option, shown_layers_option, trace_argument
from moescope.reporting.subject import Drawing, PageFigure, PageSection, PageTable, Results, Subject
from moescope.reporting.tables import SIGNIFICANT, Row, Section, Table
from moescope.trace import Trace

SECTION = PageSection(
    STRUCTURE,
    "coactivation",
    "Which experts work together?",
    "Co-activation",
    "A token has several experts. If popularity alone decided, any two would share a token as often as "
    "their loads say.",
)


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """A map a layer, and the pairs that stand out."""
    layers = among(results.layers, result["layer"].values.tolist())
    shown = result.sel(layer=list(layers))
    yield PageFigure(
        name="coactivation",
        file="coactivation",
        draw=lambda: drawn.joint.draw_coactivation(result, layers),
        label="Co-activation",
        title="Experts that share a token",
        caption=(
            "How many times as often two experts are chosen for the same token as popularity alone makes them"
            f"{about_map(result)}. Under each map: the part of the pairs that "
            "would have to be others for all to be 1, and what sampling alone would give. Intervals are in the CSV."
        ),
        how=(
            "Orange pairs are called together, blue ones avoid each other. Orange blocks are groups of experts that "
            "work together; placed on one device, they spare traffic."
        ),
        cannot=(
            "It does not tell whether two experts have a tie or merely like the same domains or words. Experts "
            "of different layers have nothing in common but their number."
        ),
        frame=coactivation_frame(shown),
    )
    yield PageTable(coactivation_table(shown, results.layers), folded="The pairs most and least often together")


@trace_argument
@shown_layers_option
@figures_option
def command(trace: Trace, layers: tuple[int, ...] | None, figures: Path | None) -> Iterator[Table | Drawing]:
    """Show which experts are chosen for the same token.

    All pairs of a token's set are counted and compared with sets of the same size in which only the popularity of each
    expert counts. The table lists the pairs that differ most; CSV and JSON hold all of them.

    \b
    Example:
      moescope coactivation pile.moe --layers 0,15,31
    """
    shown = shown_layers(trace, layers)
    result = coactivation(trace, shown)
    yield coactivation_table(result, shown)
    yield Drawing(file="coactivation", draw=lambda: drawn.joint.draw_coactivation(result))


def coactivation_table(coactivation: xr.Dataset, layers: Sequence[int]) -> Table:
    """Co-activation: a section a layer, a row a pair; those most and least often together among those that differ."""
    data = coactivation.sel(layer=[layer for layer in layers if layer in coactivation["layer"].values])
    sections = []
    for layer in data["layer"].values.tolist():
        of_layer = data.sel(layer=layer)
        upper = np.triu(np.ones_like(of_layer["lift"], bool), 1)
        lift, q = (np.where(upper, of_layer[name].values, np.nan) for name in ("lift", "lift_q"))
        differs, tested = q < SIGNIFICANT, int((of_layer["lift_p"].notnull().values & upper).sum())
        of_layer = of_layer.drop_vars("lift_q")  # all that are listed differ: no mark
        rows = []
        for one, other in extremes(lift, differs):
            cells = (cell(of_layer.sel(expert=one, other=other), name) for name in _COLUMNS)
            reversed_cell = cell(of_layer.sel(expert=other, other=one), "conditional")
            rows.append(Row(f"{one} and {other}", (*cells, reversed_cell)))
        excess, chance = (percent(float(of_layer[name])) for name in ("deviation", "deviation_null"))
        title = (
            f"layer {layer}: {count(int(differs.sum()))} of {count(tested)} pairs differ from popularity alone; "
            f"{excess} % of the pairs in excess, {chance} by chance"
        )
        sections.append(Section(title, tuple(rows)))
    return Table(
        "coactivation",
        "Experts chosen for the same token, % of the tokens",
        "experts",
        (*_COLUMNS.values(), "first given second"),
        tuple(sections),
        notes=(
            f"Of the pairs that differ, the {MOST_LISTED} most and the {MOST_LISTED} least often together ({FDR} over "
            "pairs and layers).",
            "popularity alone: sets of the same size in which nothing but the popularity of each expert counts.",
            BY_DOCUMENT,
        ),
        frame=coactivation_frame(data),
    )


_COLUMNS = {"joint": "together", "joint_null": "popularity alone", "lift": "lift", "conditional": "second given first"}


def coactivation_frame(coactivation: xr.Dataset) -> pd.DataFrame:
    """A row a (layer, pair of experts); `conditional` is N_ij / N_i, `conditional_reversed` N_ij / N_j."""
    pairs = only(coactivation, "layer", "expert", "other")
    pairs["conditional_reversed"] = pairs["conditional"].copy(data=pairs["conditional"].values.swapaxes(1, 2))
    return tidy(pairs.where(pairs["expert"] < pairs["other"]), "layer", "expert", "other")


subject = Subject(measure=lambda counted, _: coactivation(counted), blocks=blocks, section=SECTION, command=command)
