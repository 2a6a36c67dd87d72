"""Which experts are chosen for the same token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures.coactivation import coactivation
from moescope.reporting import figures as drawn
from moescope.reporting.cells import BY_DOCUMENT, number_cell, percent_cell
from moescope.reporting.chapters import STRUCTURE
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


def blocks(found: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """A map a layer, and the pairs that stand out."""
    layers = among(results.layers, found["layer"].values.tolist())
    shown = found.sel(layer=list(layers))
    most_with_numbers = drawn.joint.MOST_WITH_NUMBERS
    yield PageFigure(
        name="coactivation",
        file="coactivation",
        draw=lambda: drawn.joint.draw_coactivation(found, layers),
        label="Co-activation",
        title="Experts that share a token",
        caption=(
            "How many times as often two experts are chosen for the same token as popularity alone makes them"
            f"{about_map(int(found['num_ids'].max()), most_with_numbers)}. Under each map: the part of the pairs that "
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
    found = coactivation(trace, shown)
    yield coactivation_table(found, shown)
    yield Drawing(file="coactivation", draw=lambda: drawn.joint.draw_coactivation(found))


def coactivation_table(coactivation: xr.Dataset, layers: Sequence[int]) -> Table:
    """Co-activation: a section a layer, a row a pair; those most and least often together among those that differ."""
    data = coactivation.sel(layer=[layer for layer in layers if layer in coactivation["layer"].values])
    sections = []
    for layer in data["layer"].values.tolist():
        at = data.sel(layer=layer)
        size = int(at["num_ids"])
        upper = np.triu(np.ones((size, size), bool), 1)
        lift = np.where(upper, at["lift"].values[:size, :size], np.nan)
        found = np.where(upper, at["q_value"].values[:size, :size], np.nan) < SIGNIFICANT
        tested = int((np.isfinite(at["p_value"].values[:size, :size]) & upper).sum())
        rows = tuple(
            Row(
                f"{i} and {j}",
                (
                    *(percent_cell(at.sel(expert=i, other=j), name) for name in ("joint", "expected")),
                    number_cell(at.sel(expert=i, other=j), "lift", 2, "low", "high"),
                    percent_cell(at.sel(expert=i, other=j), "conditional"),
                    percent_cell(at.sel(expert=j, other=i), "conditional"),
                ),
            )
            for i, j in extremes(lift, found)
        )
        excess, chance = (percent(float(at[name])) for name in ("deviation", "deviation_null"))
        title = (
            f"layer {layer}: {count(int(found.sum()))} of {count(tested)} pairs differ from popularity alone; "
            f"{excess} % of the pairs in excess, {chance} by chance"
        )
        sections.append(Section(title, rows))
    return Table(
        "coactivation",
        "Experts chosen for the same token, % of the tokens",
        "experts",
        ("together", "popularity alone", "lift", "second given first", "first given second"),
        tuple(sections),
        notes=(
            f"Of the pairs that differ, the {MOST_LISTED} most and the {MOST_LISTED} least often together (false "
            f"discovery rate {percent(SIGNIFICANT, 0)} % over pairs and layers).",
            "popularity alone: sets of the same size in which nothing but the popularity of each expert counts.",
            BY_DOCUMENT,
        ),
        frame=coactivation_frame(data),
    )


def coactivation_frame(coactivation: xr.Dataset) -> pd.DataFrame:
    """A row a (layer, pair of experts); `other_given_expert` is N_ij / N_i."""
    names = ["joint", "expected", "lift", "low", "high", "p_value", "q_value"]
    upper = np.triu(np.ones((coactivation.sizes["expert"],) * 2, bool), 1)
    parts = []
    for layer in coactivation["layer"].values.tolist():
        at = coactivation.sel(layer=layer)
        expert, other = np.nonzero(upper & np.isfinite(at["joint"].values))
        columns = {"layer": layer, "expert": expert, "other": other}
        columns |= {name: at[name].values[expert, other] for name in names[:2]}
        columns["other_given_expert"] = at["conditional"].values[expert, other]
        columns["expert_given_other"] = at["conditional"].values[other, expert]
        columns |= {name: at[name].values[expert, other] for name in names[2:]}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


subject = Subject(
    measure=lambda counted, _: coactivation(counted),
    blocks=blocks,
    section=SECTION,
    command=command,
)
