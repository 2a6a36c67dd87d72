"""Expert parallelism: the most loaded device by layer, drops by capacity factor, and placements compared.

Above, over-subscription of one placement by layer, a panel a kind of batches: band, from the 5 % to the 95 % quantile
over batches; dashed, the same tokens in any order; dotted, uniform routing. Below, the share of the assignments that a
capacity factor drops; what a batch waits for over all layers, a row a placement; and the devices that a token reaches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moescope.measures.schema import total
from moescope.reporting.colours import INK, MUTED, domain_colours
from moescope.reporting.figures import style
from moescope.reporting.figures.style import FULL_WIDTH

MOST_KINDS = 3
_MARKERS = "oD^"
_DOTTED = (0, (1, 1.4))


def draw_parallel(parallel: xr.Dataset) -> Figure:
    """At most three kinds of batches of a `moescope.parallel`; by layer, those of the first placement."""
    kinds = [kind for kind in parallel["batch"].values.tolist() if int(parallel["batches"].sel(batch=kind))]
    kinds = kinds[:MOST_KINDS] or parallel["batch"].values.tolist()[:1]
    colours = domain_colours(len(kinds) + 1)[1:]
    with style.style():
        handles = [
            style.line_handle(kind, color=colour, marker=marker, markersize=3.4, linewidth=1.4)
            for kind, colour, marker in zip(kinds, colours, _MARKERS, strict=False)
        ]
        handles += [
            style.line_handle("the same tokens in any order", color=MUTED, linewidth=1.0, linestyle=style.DASHED),
            style.line_handle("uniform routing", color=MUTED, linewidth=1.0, linestyle=_DOTTED),
        ]
        top = style.legend_rows(len(handles), 5) + 0.3
        figure = style.new_figure(FULL_WIDTH, top + 1.7 + 0.85 + 1.7 + 0.42)
        grid = figure.add_gridspec(2, 60)
        style.place(figure, left=0.52, right=0.1, top=top, bottom=0.42, between=0.72, rows=2)
        figure.subplots_adjust(wspace=0)
        upper = _split(len(kinds), 60, 4)
        axes: Axes | None = None
        for at, (kind, (start, end)) in enumerate(zip(kinds, upper, strict=True)):
            axes = figure.add_subplot(grid[0, start:end], sharey=axes)
            _draw_layers(axes, parallel.sel(batch=kind).isel(placement=0), colours[at], _MARKERS[at])
            style.panel_title(axes, f"{kind}, {parallel['placement'].values[0]} placement")
            if at == 0:
                axes.set_ylabel("Largest load over mean")
            else:
                axes.tick_params(labelleft=False)
        assert axes is not None
        axes.set_ylim(1, None if axes.get_ylim()[1] > 1 else 2)  # without a full batch there is nothing to scale to
        drops = figure.add_subplot(grid[1, 0:19])
        _draw_drops(drops, parallel, kinds, colours)
        slowest = figure.add_subplot(grid[1, 30:45])
        _draw_rows(slowest, parallel, kinds, colours, "slowest")
        style.panel_title(slowest, "Slowest, all layers")
        reached = figure.add_subplot(grid[1, 47:60], sharey=slowest)
        _draw_rows(reached, parallel, kinds[:1], colours, "devices_reached")
        reached.tick_params(labelleft=False)
        style.panel_title(reached, "Devices a token")
        style.legend_above(figure, handles, columns=5)
    return figure


def _split(panels: int, width: int, gap: int) -> list[tuple[int, int]]:
    each = (width - gap * (panels - 1)) // panels
    return [(at * (each + gap), at * (each + gap) + each) for at in range(panels)]


def _draw_layers(axes: Axes, data: xr.Dataset, colour: str, marker: str) -> None:
    layers = data["layer"].values
    band = data["over_subscription_quantile"].values
    axes.fill_between(layers, band[:, 0], band[:, -1], color=colour, alpha=0.15, linewidth=0)
    for end, line in (("null", style.DASHED), ("uniform", _DOTTED)):
        value = data[f"over_subscription_{end}"].values
        axes.plot(layers, value, color=MUTED, linewidth=1.0, linestyle=line, label=end)
    style.add_intervals(axes, data, "over_subscription", colour, alpha=None)
    values = data["over_subscription"].values
    style.add_marked(axes, layers, values, colour, marker, markersize=3.4, linewidth=1.4, label="measured")
    style.layer_axis(axes, layers)


def _draw_drops(axes: Axes, parallel: xr.Dataset, kinds: list[str], colours: tuple[str, ...]) -> None:
    """The mean over layers, on a logarithmic axis, where zero is not drawn."""
    factors = parallel["capacity_factor"].values
    for at, kind in enumerate(kinds):
        data = total(parallel).sel(batch=kind)
        for name, line in (("dropped_uniform", _DOTTED), ("dropped_null", style.DASHED), ("dropped", "-")):
            mean = 100 * data[name].mean("layer").values
            above_zero = np.where(mean > 0, mean, np.nan)
            measured = line == "-"
            look: dict[str, Any] = {"linestyle": line, "linewidth": 1.4 if measured else 1.0, "markersize": 3}
            marker = _MARKERS[at] if measured else ""
            style.add_marked(axes, factors, above_zero, colours[at], marker, markevery=2, label=name, **look)
    axes.axhline(0.1, color=INK, linewidth=0.7)
    axes.set_ylim(0.01, 100)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(factors[0] - 0.08, factors[-1] + 0.08)
    axes.set_xlabel("Capacity factor", labelpad=2)
    axes.set_ylabel("Dropped (%)")
    axes.grid(axis="y")
    style.panel_title(axes, "Drops, mean of layers")


def _draw_rows(axes: Axes, parallel: xr.Dataset, kinds: list[str], colours: tuple[str, ...], name: str) -> None:
    names = parallel["placement"].values.tolist()
    for at, kind in enumerate(kinds):
        data = parallel.sel(batch=kind)
        y = np.arange(len(names)) + 0.2 * (at - (len(kinds) - 1) / 2)
        if name == "slowest":
            value, low, high = (data[f"{name}{end}"].values for end in ("", "_low", "_high"))
            null = data["slowest_null"].values
        else:
            value = data[name].mean("layer").values
            low = high = np.full(value.shape, np.nan)
            null = data[f"{name}_uniform"].mean("layer").values
        axes.plot(null, y, color=colours[at], alpha=0.7, marker="|", markersize=7, linestyle="", label="null")
        for row, left, right in zip(y, low, high, strict=True):
            axes.plot([left, right], [row, row], color=colours[at], linewidth=1.0)
        axes.plot(
            value, y, color=colours[at], marker=_MARKERS[at], markersize=4, linestyle="", markeredgewidth=0, label=kind
        )
    axes.set_yticks(np.arange(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.margins(x=0.12)
    axes.grid(axis="x")
    axes.set_xlabel("| any order" if name == "slowest" else "| uniform routing", labelpad=2, color=MUTED)
