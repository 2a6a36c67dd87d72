"""Effective number of experts: how many equally loaded experts would be as concentrated as these are.

The unit is the assignment; a domain's loads are its own, and the total is over all assignments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moescope.measures import groups, schema
from moescope.reporting.cells import BY_DOCUMENT, grid_of
from moescope.reporting.chapters import STRUCTURE
from moescope.reporting.frames import tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.options import figures_option, shown_layers_option, trace_argument
from moescope.reporting.subject import Drawing, PageFigure, PageSection, PageTable, Results, Subject
from moescope.reporting.tables import Section, Table
from moescope.tallying import Source
from moescope.tallying.balance import BalanceCounter
from moescope.tallying.counted import counted
from moescope.trace import Trace

HILL = "Hill 1973, Diversity and evenness, Ecology 54 (order 2)"


def effective(trace: Source, layers: Iterable[int] | None = None) -> xr.Dataset:
    """One over the sum of the squared shares, by domain and layer.

    Args:
        trace: The trace, its folder, or what was counted of it.
        layers: Layers to measure, or None for all.
    Returns:
        `effective` (domain, layer), in experts, from 1 to E, with `effective_low` and `effective_high`, its 95 %
        interval by document, and `effective_null`, E, of equal loads.
    Source:
        Hill 1973; interval: `moescope.measures.groups.jackknife`.

    Example:
        Three experts with shares 1/2, 1/4 and 1/4 are as concentrated as 2.67 equal ones.

        >>> round(float(inverse_simpson(np.array([2.0, 1.0, 1.0]))[0]), 2)
        2.67
    """
    counts = counted(trace, BalanceCounter, layers=layers)[BalanceCounter]
    shape = len(counts.domains) + 1, len(counts.layers)
    value, low, high = (np.full(shape, np.nan) for _ in range(3))
    for index, layer in enumerate(counts.layers):
        by_domain = counts.loads_LDGE[index, :, :, : layer.num_experts]
        for domain, loads_GE in enumerate(schema.add_total(by_domain)):
            if loads_GE.any():
                value[domain, index] = inverse_simpson(loads_GE.sum(axis=0))[0]
                middle, error, used = groups.jackknife(inverse_simpson, loads_GE)
                half = groups.student(used) * error[0]
                low[domain, index] = max(middle[0] - half, 1)
                high[domain, index] = min(middle[0] + half, layer.num_experts)
    equal = np.broadcast_to([layer.num_experts for layer in counts.layers], shape).astype(float)
    return xr.Dataset(
        schema.estimate(
            "effective",
            ("domain", "layer"),
            "effective number of experts",
            "experts",
            HILL,
            meanings={"null": "the same of equal loads"},
            value=value,
            low=np.fmin(low, value),
            high=np.fmax(high, value),
            null=equal,
        ),
        schema.layer_coordinates(counts.layers)
        | schema.total_coordinates(counts.domains, counts.documents_DG.sum(axis=1)),
    )


def inverse_simpson(loads: NDArray[Any]) -> NDArray[np.float64]:
    """One over the sum of the squared shares along the last axis, which stays with length 1."""
    shares = loads / loads.sum(axis=-1, keepdims=True)
    return 1 / (shares**2).sum(axis=-1, keepdims=True)


SECTION = PageSection(
    STRUCTURE,
    "effective",
    "How many experts carry the load?",
    "Effective experts",
    "A layer of 8 experts of which 2 do all the work is, for its load, a layer of 2.",
)


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """By layer, then the table by domain."""
    yield PageFigure(
        name="effective",
        file="effective-experts",
        draw=lambda: draw(result),
        label="Effective experts",
        title="Equally loaded experts that would be as concentrated",
        caption="One over the sum of squared shares, all domains together. Bars: 95 % intervals, by document.",
        how="The nearer to the number of experts, the more evenly the layer spreads its load.",
        cannot="It does not say which experts carry the load, nor whether the same ones do in every domain.",
        frame=tidy(result, "domain", "layer"),
    )
    yield PageTable(table(result, results.layers), folded="By domain, as a table")


def table(result: xr.Dataset, layers: Sequence[int]) -> Table:
    """A row a domain, a column a layer."""
    shown = result.sel(layer=list(layers))
    return Table(
        "effective",
        "Effective number of experts",
        "domain",
        tuple(f"layer {layer}" for layer in layers),
        (Section("", grid_of(shown, "domain", "layer", "effective")),),
        notes=(BY_DOCUMENT,),
        frame=tidy(shown, "domain", "layer"),
    )


def draw(result: xr.Dataset) -> Any:
    """A point a layer, with its interval; matplotlib is imported here, for it may be missing."""
    from moescope.reporting.figures import style

    whole = schema.total(result)
    value, low, high = (whole[name].values for name in ("effective", "effective_low", "effective_high"))
    with style.style():
        figure = style.new_figure(style.FULL_WIDTH, 2.2)
        axes = figure.add_subplot()
        axes.errorbar(whole["layer"].values, value, [value - low, high - value], fmt="o", markersize=3.2, linewidth=0.9)
        style.layer_axis(axes, whole["layer"].values)
        axes.set_ylabel("Experts")
        axes.set_ylim(bottom=0)
        figure.subplots_adjust(left=0.08, right=0.98, top=0.95, bottom=0.2)
    return figure


@trace_argument
@shown_layers_option
@click.option("--least", type=click.FloatRange(1), help="Fail if a layer has fewer effective experts, all domains.")
@figures_option
def command(
    trace: Trace, layers: tuple[int, ...] | None, least: float | None, figures: Path | None
) -> Iterator[Table | Drawing]:
    """Show how many equally loaded experts would be as concentrated.

    \b
    Example:
      moescope effective pile.moe --layers 0,15,31
    """
    shown = shown_layers(trace, layers)
    result = effective(trace)
    yield table(result, shown)
    yield Drawing(file="effective", draw=lambda: draw(result))
    smallest = float(schema.total(result)["effective"].min())
    if least is not None and smallest < least:
        raise click.ClickException(f"a layer has {smallest:.2f} effective experts, fewer than {least:g}")


subject = Subject(
    measure=lambda counts, _: effective(counts),
    blocks=blocks,
    section=SECTION,
    command=command,
)
