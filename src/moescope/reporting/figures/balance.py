"""Balance: the largest load over the mean by layer; beside it the gate weights or, without them, the entropy."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moescope.measures.schema import total
from moescope.reporting.colours import INK, MUTED, domain_colours
from moescope.reporting.figures import style
from moescope.reporting.figures.style import MOST_LAYERS_WITH_MARKERS
from moescope.reporting.subjects.balance import batch_sizes

_MARKERS = "oD^vPX"


def draw_balance(balance: xr.Dataset) -> Figure:
    """Imbalance of all layers of a `moescope.balance`; beside it the gate weights, or the entropy without them."""
    whole = total(balance)
    sizes = batch_sizes(balance)
    colours = domain_colours(len(sizes) + 1)
    with style.style():
        handles = [
            style.line_handle("the whole trace", color=INK, linewidth=1.4, marker="s", markersize=3.4),
            *(
                style.line_handle(_batch(size), color=colour, marker=marker, markersize=3.2, linewidth=1.2)
                for size, colour, marker in zip(sizes, colours[1:], _MARKERS, strict=False)
            ),
            style.line_handle("the same, tokens drawn at random", color=MUTED, linewidth=1.0, linestyle=style.DASHED),
        ]
        figure, (left, right) = style.panels_in_row(2, handles, columns=5, width_ratios=[1.5, 1])
        figure.subplots_adjust(wspace=0.24)
        _draw_imbalance(left, balance, whole, sizes, colours)
        if "weight" in balance:
            _draw_weights(right, balance)
        else:
            _draw_entropy(right, whole)
        for axes in (left, right):
            style.layer_axis(axes, balance["layer"].values)
    return figure


def _draw_imbalance(
    axes: Axes, balance: xr.Dataset, whole: xr.Dataset, sizes: list[int], colours: tuple[str, ...]
) -> None:
    layers = balance["layer"].values
    few = len(layers) <= MOST_LAYERS_WITH_MARKERS
    apart = 0.1 if len(layers) > 1 else 0.02
    for number, (size, colour) in enumerate(zip(sizes, colours[1:], strict=True)):
        data = balance.sel(batch=size)
        x = layers + apart * (number - (len(sizes) - 1) / 2) if few else layers
        band = data["batch_imbalance_quantile"].values
        axes.fill_between(layers, band[:, 0], band[:, -1], color=colour, alpha=0.12, linewidth=0)
        values, null = (data[name].values for name in ("batch_imbalance", "batch_imbalance_null"))
        style.add_marked(axes, x, values, colour, _MARKERS[number], label=_batch(size))
        drawn = f"{_batch(size)}, drawn"
        axes.plot(layers, null, color=colour, linewidth=1.0, linestyle=style.DASHED, label=drawn)
    style.add_intervals(axes, whole, "imbalance")
    values = whole["imbalance"].values
    style.add_marked(axes, layers, values, INK, "s", markersize=3.4, linewidth=1.4, label="the whole trace")
    if float(np.nanmax([np.asarray(line.get_ydata(), float) for line in axes.lines], initial=1)) > 12:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=1)
    axes.set_ylabel("Largest load over mean load")
    style.panel_title(axes, "Imbalance")


def _draw_weights(axes: Axes, balance: xr.Dataset) -> None:
    layers, colours = balance["layer"].values, domain_colours(8)
    names = (("first", "the largest", colours[4]), ("margin", "its lead over the second", colours[6]))
    for (name, label, colour), marker in zip(names, _MARKERS, strict=False):
        data = balance.sel(statistic=name)
        band = data["weight_quantile"].values
        axes.fill_between(layers, band[:, 0], band[:, -1], color=colour, alpha=0.13, linewidth=0)
        style.add_marked(axes, layers, total(data)["weight"].values, colour, marker, label=label)
    axes.set_ylim(0, 1)
    axes.legend(loc="best", handlelength=1.2)
    axes.set_ylabel("Part of a token's gate weight")
    style.panel_title(axes, "Gate weights")


def _draw_entropy(axes: Axes, whole: xr.Dataset) -> None:
    layers = whole["layer"].values.astype(float)
    style.add_intervals(axes, whole, "entropy")
    axes.plot(layers, whole["entropy"].values, color=INK, marker="s", markersize=3.2, linewidth=1.2, label="entropy")
    axes.set_ylim(top=1)
    axes.set_ylabel("H / log E of the loads")
    style.panel_title(axes, "Evenness")


def _batch(size: int) -> str:
    return "one sequence" if size == 1 else f"{size} sequences"
