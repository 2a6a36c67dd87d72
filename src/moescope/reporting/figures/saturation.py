"""Saturation: how early each layer's router settles, a line a layer over the checkpoints of a training."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from moescope.measures.schema import total
from moescope.reporting.colours import INK, MUTED
from moescope.reporting.figures import style

MOST_LAYERS_BY_NAME = 8
"""Up to here each line carries its layer's number; beyond, the colour does."""

WIDE = 20
"""Ratio of the last step to the first from which the axis of steps is logarithmic."""

BY_DEPTH = LinearSegmentedColormap.from_list("by_depth", ["#e8b04a", "#c8663c", "#8a3a6b", "#3d2c78", "#12123d"])


def draw_saturation(saturation: xr.Dataset) -> Figure:
    """The curves of all layers there are, all domains together.

    Args:
        saturation: Of `moescope.saturation`.
    """
    data = total(saturation)
    kinds = [kind for kind in ("set", "first") if np.isfinite(data["agreement"].sel(kind=kind)).any()]
    top_k = int(data["top_k"].values.max())
    kinds = kinds[:1] if top_k == 1 else kinds
    with style.style():
        figure, panels = style.panels_of_kinds(kinds, top_k, top=0.3, height=2.95, right=0.62, alike=True)
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
    axes.fill_between(
        steps, null.min(axis=0), null.max(axis=0), color=MUTED, alpha=0.25, linewidth=0, label="popularity"
    )
    axes.annotate(
        "popularity alone", (steps[-1], float(null.max(axis=0)[-1])), xytext=(0, 2), textcoords="offset points",
        ha="right", fontsize=7, color=MUTED,
    )  # fmt: skip
    colours = [BY_DEPTH(at / max(1, len(layers) - 1)) for at in range(len(layers))]
    few = len(layers) <= MOST_LAYERS_BY_NAME
    for at, colour in enumerate(colours):
        axes.plot(
            steps,
            value[at],
            color=colour,
            linewidth=1.3 if few else 0.8,
            marker="o",
            markersize=2.6 if few else 1.6,
            markeredgewidth=0,
            label=f"layer {layers[at]}",
        )
        if few:
            style.add_verticals(axes, steps, low[at], high[at], edgecolor=colour, linewidth=0.9, alpha=0.8)
    wide = len(steps) > 1 and steps[0] > 0 and steps[-1] / steps[0] >= WIDE
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(steps.tolist()))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(steps, [f"{step:g}" for step in steps])
    elif len(steps) <= 12:
        axes.set_xticks(steps, [f"{step:g}" for step in steps])
    axes.grid(axis="y")
    if few and named:
        for at, (y, colour) in enumerate(zip(_apart(value[:, -1], 6.0), colours, strict=True)):
            axes.annotate(
                f"layer {layers[at]}", (1, y), xycoords=("axes fraction", "data"), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=7, color=colour, annotation_clip=False,
            )  # fmt: skip


def _apart(values: np.ndarray, least: float) -> np.ndarray:
    """The values moved as little as needed so that any two are at least so far apart, within 0 .. 100."""
    order = np.argsort(np.nan_to_num(values, nan=0.0), kind="stable")
    placed = np.nan_to_num(values, nan=0.0)[order].astype(float)
    for at in range(1, len(placed)):
        placed[at] = max(placed[at], placed[at - 1] + least)
    placed -= max(0.0, (placed - np.sort(np.nan_to_num(values, nan=0.0))).mean())
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
