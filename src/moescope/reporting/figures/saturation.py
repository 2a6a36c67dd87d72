"""Saturation: how early each layer's router settles, a line a layer over the checkpoints of a training."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from moescope.measures.schema import total
from moescope.reporting.colours import INK, MUTED
from moescope.reporting.figures import style
from moescope.reporting.wording import known_kinds

MOST_LAYERS_BY_NAME = 8
"""Up to here each line carries its layer's number; beyond, the colour does."""

WIDE = 20
"""Ratio of the last step to the first from which the axis of steps is logarithmic."""

BY_DEPTH = LinearSegmentedColormap.from_list("by_depth", ["#e8b04a", "#c8663c", "#8a3a6b", "#3d2c78", "#12123d"])


def draw_saturation(saturation: xr.Dataset) -> Figure:
    """The curves of all layers of a `moescope.saturation`, all domains together."""
    data = total(saturation)
    kinds = known_kinds(data, "agreement")
    with style.style():
        figure, panels = style.panels_of_kinds(kinds, data, height=2.23, sharey=True)
        figure.subplots_adjust(right=1 - 0.62 / figure.get_size_inches()[0])  # for the names of layers
        for axes, kind in zip(panels, kinds, strict=True):
            _draw_lines(axes, data.sel(kind=kind), named=axes is panels[-1])
            axes.set_xlabel(f"Step; compared with {saturation.attrs['reference_step']:g}", labelpad=2)
        panels[0].set_ylim(0, 100)
        panels[0].set_ylabel("Chosen as at the end (%)")
        if data.sizes["layer"] > MOST_LAYERS_BY_NAME:
            _depth_scale(figure, data["layer"].values)
    return figure


def _draw_lines(axes: Axes, data: xr.Dataset, *, named: bool) -> None:
    steps, layers = data["step"].values.astype(float), data["layer"].values
    value, low, high, null = (
        100 * data[f"agreement{end}"].transpose("layer", "step").values for end in ("", "_low", "_high", "_null")
    )
    lowest, highest = null.min(axis=0), null.max(axis=0)
    axes.fill_between(steps, lowest, highest, color=MUTED, alpha=0.25, linewidth=0, label="popularity")
    axes.annotate(
        "popularity alone", (steps[-1], float(highest[-1])), xytext=(0, 2), textcoords="offset points",
        ha="right", fontsize=7, color=MUTED,
    )  # fmt: skip
    colours = [BY_DEPTH(place / max(1, len(layers) - 1)) for place in range(len(layers))]
    few = len(layers) <= MOST_LAYERS_BY_NAME
    look: dict[str, Any] = {"marker": "o", "markeredgewidth": 0}
    look |= {"linewidth": 1.3, "markersize": 2.6} if few else {"linewidth": 0.8, "markersize": 1.6}
    for place, (layer, colour) in enumerate(zip(layers, colours, strict=True)):
        axes.plot(steps, value[place], color=colour, label=f"layer {layer}", **look)
        if few:
            style.add_verticals(axes, steps, low[place], high[place], edgecolor=colour, linewidth=0.9, alpha=0.8)
    logarithmic = len(steps) > 1 and steps[0] > 0 and steps[-1] / steps[0] >= WIDE
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    if logarithmic or len(steps) <= 12:
        axes.set_xticks(steps, [f"{step:g}" for step in steps])
    axes.grid(axis="y")
    if few and named:
        for layer, y, colour in zip(layers, _apart(value[:, -1], 6.0), colours, strict=True):
            axes.annotate(
                f"layer {layer}", (1, y), xycoords=("axes fraction", "data"), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=7, color=colour, annotation_clip=False,
            )  # fmt: skip


def _apart(values: np.ndarray, least: float) -> np.ndarray:
    """The values moved as little as needed so that any two are at least so far apart, within 0 .. 100."""
    known = np.nan_to_num(values, nan=0.0).astype(float)
    order = np.argsort(known, kind="stable")
    placed = known[order]
    for place in range(1, len(placed)):
        placed[place] = max(placed[place], placed[place - 1] + least)
    placed -= max(0.0, (placed - known[order]).mean())
    placed -= max(0.0, placed[-1] - 100.0)
    result = np.empty_like(placed)
    result[order] = placed
    return result


def _depth_scale(figure: Figure, layers: np.ndarray) -> None:
    """A scale of colours for the depth, at the right."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((1 - 0.42 / width, 0.42 / height, 0.08 / width, (height - 0.72) / height))
    scale = ScalarMappable(Normalize(float(layers[0]), float(layers[-1])), BY_DEPTH)
    bar = figure.colorbar(scale, cax=axes)
    bar.outline.set_linewidth(0)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    bar.ax.invert_yaxis()
    axes.tick_params(length=2, pad=2, colors=INK)
    axes.set_title("layer", fontsize=7, pad=4)
