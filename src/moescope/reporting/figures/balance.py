"""Load balance by layer: the busiest expert over the mean, for the whole trace and within batches.

Left, the whole trace with its interval, and batches: their mean, a band from the 5 % to the 95 % quantile, and dashed
what batches of as many tokens show by chance. Right, the gate weights of a token (band: 5 % to 95 % of the tokens) or,
where they were not recorded, the entropy of the loads.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moescope.measures.schema import total
from moescope.reporting.colours import INK, MUTED, domain_colours
from moescope.reporting.figures import style
from moescope.reporting.figures.style import FULL_WIDTH, MOST_LAYERS_WITH_MARKERS

_MARKERS = "oD^vPX"


def draw_balance(balance: xr.Dataset) -> Figure:
    """Imbalance of all layers there are, and beside it the entropy, or the gate weights if they were recorded.

    Args:
        balance: Of `moescope.balance`.
    """
    whole = total(balance)
    sizes = _sizes(balance)
    colours = domain_colours(len(sizes) + 1)
    with style.style():
        handles = [Line2D([], [], color=INK, linewidth=1.4, marker="s", markersize=3.4, label="the whole trace")]
        handles += [
            Line2D(
                [], [], color=colours[at + 1], marker=_MARKERS[at], markersize=3.2, linewidth=1.2, label=_batch(size)
            )
            for at, size in enumerate(sizes)
        ]
        handles.append(
            Line2D([], [], color=MUTED, linewidth=1.0, linestyle=(0, (4, 2)), label="the same, tokens drawn at random")
        )
        top = style.legend_rows(len(handles), 5) + 0.3
        figure = style.new_figure(FULL_WIDTH, top + 0.42 + 2.2)
        left, right = figure.subplots(1, 2, squeeze=False, width_ratios=[1.5, 1])[0]
        style.place(figure, left=0.5, right=0.1, top=top, bottom=0.42, between=0, rows=1)
        figure.subplots_adjust(wspace=0.24)
        _draw_imbalance(left, balance, whole, sizes, colours)
        if "weight" in balance:
            _draw_weights(right, balance)
        else:
            _draw_entropy(right, whole)
        for axes in (left, right):
            style.layer_axis(axes, balance["layer"].values)
            axes.set_xlabel("Layer", labelpad=2)
        labels = [str(handle.get_label()) for handle in handles]
        style.legend_above(figure, handles, labels, columns=5)
    return figure


def _draw_imbalance(
    axes: Axes, balance: xr.Dataset, whole: xr.Dataset, sizes: list[int], colours: tuple[str, ...]
) -> None:
    layers = balance["layer"].values
    few = len(layers) <= MOST_LAYERS_WITH_MARKERS
    apart = 0.1 if len(layers) > 1 else 0.02
    for at, size in enumerate(sizes):
        data, colour = balance.sel(batch=size), colours[at + 1]
        x = layers + apart * (at - (len(sizes) - 1) / 2) if few else layers
        band = data["batch_imbalance_quantile"].values
        axes.fill_between(layers, band[:, 0], band[:, -1], color=colour, alpha=0.12, linewidth=0)
        values = data["batch_imbalance"].values
        style.add_marked(axes, x, values, colour, _MARKERS[at], label=_batch(size))
        axes.plot(
            layers,
            data["batch_imbalance_null"].values,
            color=colour,
            linewidth=1.0,
            linestyle=(0, (4, 2)),
            label=f"{_batch(size)}, drawn",
        )
    style.add_intervals(axes, whole, "imbalance")
    values = whole["imbalance"].values
    style.add_marked(axes, layers, values, INK, "s", markersize=3.4, linewidth=1.4, label="the whole trace")
    if float(np.nanmax([np.asarray(line.get_ydata(), float) for line in axes.lines], initial=1)) > 12:
        axes.set_yscale("log")
        axes.set_ylim(bottom=1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(bottom=1)
    axes.set_ylabel("Largest load over mean load")
    style.panel_title(axes, "Imbalance")


def _draw_weights(axes: Axes, balance: xr.Dataset) -> None:
    layers, colours = balance["layer"].values, domain_colours(8)[4:]
    names = (("first", "the largest"), ("margin", "its lead over the second"))
    for at, (name, label) in enumerate(names):
        data = balance.sel(statistic=name)
        band = data["weight_quantile"].values
        axes.fill_between(layers, band[:, 0], band[:, -1], color=colours[2 * at], alpha=0.13, linewidth=0)
        values = total(data)["weight"].values
        style.add_marked(axes, layers, values, colours[2 * at], _MARKERS[at], label=label)
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


def _sizes(balance: xr.Dataset) -> list[int]:
    """Sizes of batches of which the trace holds one."""
    if "batch_imbalance" not in balance:
        return []
    return [size for size in balance["batch"].values.tolist() if int(balance["batches"].sel(batch=size))]


def _batch(size: int) -> str:
    return "one sequence" if size == 1 else f"{size} sequences"
