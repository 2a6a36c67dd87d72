"""Where the bits come from: what each source explains of a layer's choice, a panel a layer; by layer, a line each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moescope.reporting.colours import INK, MUTED
from moescope.reporting.figures import style
from moescope.reporting.figures.style import FULL_WIDTH, Mark
from moescope.reporting.subjects.explain import known_sources

COLUMNS = 3
ROW_HEIGHT = 1.35


def draw_explained(explained: xr.Dataset, layers: Sequence[int]) -> Figure:
    """Bits by source of a `moescope.explain`, a panel a layer."""
    sources = known_sources(explained.sel(layer=list(layers)))
    columns = min(COLUMNS, len(layers))
    rows = -(-len(layers) // columns)
    most = float(np.nanmax(explained["entropy"].sel(layer=list(layers)).values, initial=0.0)) or 1.0
    with style.style():
        height = 0.42 + rows * ROW_HEIGHT + (rows - 1) * 0.36 + 0.42
        figure = style.new_figure(FULL_WIDTH if columns == COLUMNS else FULL_WIDTH * 0.66, height)
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        style.place(figure, left=0.95, right=0.12, top=0.42, bottom=0.42, between=0.36, rows=rows)
        figure.subplots_adjust(wspace=0.12)
        for axes, layer in zip(panels.flat, layers, strict=False):
            of_layer = explained.sel(layer=layer)
            _draw_bars(axes, of_layer.sel(source=sources), _marks(explained, sources))
            axes.axvline(float(of_layer["entropy"]), **style.UNIFORM)
            style.panel_title(axes, f"Layer {layer}")
            axes.set_xlim(0, most * 1.04)
        for axes in panels.flat[len(layers) :]:
            axes.set_visible(False)
        for axes in panels[-1]:
            axes.set_xlabel("Bits", labelpad=2)
        handles = [
            style.line_handle("all bits of the choice", **style.UNIFORM),
            style.band_handle("bounds"),
            style.line_handle("permuted routing", color=INK, linewidth=1.4, marker="|", markersize=7, linestyle="none"),
        ]
        style.legend_above(figure, handles, columns=3)
    return figure


def draw_explained_by_layer(explained: xr.Dataset) -> Figure:
    """Share of the choice that each source of a `moescope.explain` explains, by layer, a line a source."""
    sources = known_sources(explained)
    layers = explained["layer"].values
    with style.style():
        marks = _marks(explained, sources)
        legend = style.line_handles(marks)
        figure, (axes,) = style.panels_in_row(1, legend, columns=3, titles=0.2, width=style.NARROW)
        for source, mark in zip(sources, marks, strict=True):
            data = explained.sel(source=source)
            with np.errstate(invalid="ignore", divide="ignore"):
                low, high = (
                    100 * (data[f"bits_{end}"] / data["bits"] * data["share"]).values for end in ("low", "high")
                )
            share = 100 * data["share"].values
            low, high = np.nan_to_num(low, nan=0.0), np.where(np.isnan(high), share, high)
            style.add_line(axes, layers, share, low, high, mark, 0.15)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("Share of the choice explained (%)")
        style.layer_ticks(axes)
    return figure


def _draw_bars(axes: Axes, of_layer: xr.Dataset, marks: Sequence[Mark]) -> None:
    y = np.arange(len(marks), dtype=float)
    value, low, high, held_out, plug_in, null = (
        of_layer[name].values for name in ("bits", "bits_low", "bits_high", "held_out", "plug_in", "bits_null")
    )
    known = np.isfinite(value)
    bounds = np.stack([np.maximum(held_out, 0), y - 0.42, plug_in, y + 0.42], axis=1)[known]
    style.add_rectangles(axes, bounds, facecolor=MUTED, alpha=0.25, linewidth=0, label="bounds")
    for middle, end, mark in zip(y, value, marks, strict=True):
        if np.isfinite(end):
            bar = np.array([[0.0, middle - 0.28, end, middle + 0.28]])
            style.add_rectangles(axes, bar, facecolor=mark.colour, linewidth=0, label=mark.name)
    interval = known & np.isfinite(low) & np.isfinite(high)
    axes.hlines(y[interval], low[interval], high[interval], color=INK, linewidth=0.9, label="95 % interval")
    axes.vlines(null[known], y[known] - 0.4, y[known] + 0.4, color=INK, linewidth=1.4, label="permuted routing")
    for middle in y[~known]:
        axes.text(0, middle, " none", va="center", color=MUTED, fontsize=6.5)
    axes.set_yticks(y, [mark.name for mark in marks])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(marks) - 0.4, -0.6)
    axes.grid(axis="x")


def _marks(explained: xr.Dataset, sources: Sequence[str]) -> list[Mark]:
    """The same mark for a source whichever others are drawn."""
    every = explained["source"].values.tolist()
    marks = style.domain_marks(every)
    return [marks[every.index(source)] for source in sources]
