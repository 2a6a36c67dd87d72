"""Divergence of each domain from the others, a map of domain by layer; not in the paper.

Its claim that only DM Mathematics stands out, most at the first and the last layer, can be read from it. A dot marks
what sampling documents alone does not explain.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from moescope.reporting.colours import MUTED, PAPER
from moescope.reporting.figures import style
from moescope.reporting.figures.style import FULL_WIDTH
from moescope.reporting.numbers import bits
from moescope.reporting.tables import SIGNIFICANT

MOST_LAYERS_WITH_NUMBERS = 10
LEGEND_WIDTH = 3.85
"""Inches that the scale and its words need."""

FROM_NOTHING = LinearSegmentedColormap.from_list(
    "from_nothing", [PAPER, "#d5e3f3", "#8fb4dc", "#4a7ebb", "#1d4a85", "#0c2750"]
).with_extremes(bad="#e9eaec")


def draw_divergence(divergence: xr.Dataset) -> Figure:
    """The map of all layers there are.

    Args:
        divergence: Of `moescope.divergence`.
    """
    value = divergence["jsd_rest"].transpose("domain", "layer").values
    found = divergence["jsd_rest_q"].transpose("domain", "layer").values < SIGNIFICANT
    names = [mark.name for mark in style.domain_marks(divergence["domain"].values.tolist())]
    return draw_map(names, divergence["layer"].values, value, found)


def draw_map(
    names: Sequence[str], layers: NDArray[np.int64], value: NDArray[np.float64], found: NDArray[np.bool_]
) -> Figure:
    """A map of divergences, a row a name and a column a layer.

    Args:
        names: Of the rows.
        layers: Of the columns.
        value: Bits, shape (name, layer).
        found: Where a dot stands, same shape.
    """
    numbers = len(layers) <= MOST_LAYERS_WITH_NUMBERS
    with style.style():
        left, top, bottom, right = 0.15 + 0.053 * max(map(len, names)), 0.12, 0.72, 0.12
        cell = min((FULL_WIDTH - left - right) / len(layers), 0.62)
        figure = style.new_figure(
            max(left + right + cell * len(layers), left + LEGEND_WIDTH),
            top + bottom + (0.22 if numbers else 0.17) * len(names),
        )
        axes = figure.subplots()
        width = figure.get_size_inches()[0]
        style.place(
            figure, left=left, right=width - left - cell * len(layers), top=top, bottom=bottom, between=0, rows=1
        )
        largest = float(np.nanmax(value, initial=1e-6))
        mesh = axes.pcolormesh(value, cmap=FROM_NOTHING, vmin=0, vmax=largest, edgecolors=PAPER, linewidth=0.5)
        axes.invert_yaxis()
        dark = value > 0.45 * largest
        for colour, here in (("#ffffff", dark), ("#000000", ~dark)):
            if numbers:
                for row, column in np.argwhere(here & np.isfinite(value)):
                    text = bits(float(value[row, column])) + (" •" if found[row, column] else "")
                    axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6.5, color=colour)
            else:
                rows, columns = np.nonzero(here & found)
                axes.plot(columns + 0.5, rows + 0.5, "o", markersize=1.8, color=colour, markeredgewidth=0)
        axes.set_yticks(np.arange(len(names)) + 0.5, names)
        if numbers:
            axes.set_xticks(np.arange(len(layers)) + 0.5, [str(layer) for layer in layers])
        else:
            shown = [
                int(at) for at in MaxNLocator(10, integer=True).tick_values(0, len(layers) - 1) if at < len(layers)
            ]
            axes.set_xticks(np.array(shown) + 0.5, [str(layers[at]) for at in shown])
        axes.set_xlabel("Layer", labelpad=2)
        _without_frame(axes)
        _add_scale(figure, mesh, left)
    return figure


def draw_domain_pairs(divergence: xr.Dataset, layers: Sequence[int]) -> Figure:
    """The divergence between any two domains, a panel a layer, at most three.

    Args:
        divergence: Of `moescope.divergence`.
        layers: Layers to show.
    """
    shown = list(layers)[:3]
    names = [mark.name for mark in style.domain_marks(divergence["domain"].values.tolist())]
    values = [divergence["jsd"].sel(layer=layer).values for layer in shown]
    largest = max(float(np.nanmax(value, initial=1e-6)) for value in values)
    with style.style():
        left, top, between = 0.15 + 0.053 * max(map(len, names)), 0.28, 0.1
        side = min((FULL_WIDTH - left - 0.1 - between * (len(shown) - 1)) / len(shown), 0.45 * len(names))
        bottom = left + 0.5
        width = max(left + 0.1 + (side + between) * len(shown), left + LEGEND_WIDTH)
        height = top + side + bottom
        figure = style.new_figure(width, height)
        for at, (layer, value) in enumerate(zip(shown, values, strict=True)):
            axes = figure.add_axes(
                ((left + at * (side + between)) / width, bottom / height, side / width, side / height)
            )
            known = np.where(np.eye(len(names), dtype=bool), np.nan, value)
            mesh = axes.pcolormesh(known, cmap=FROM_NOTHING, vmin=0, vmax=largest, edgecolors=PAPER, linewidth=0.5)
            axes.invert_yaxis()
            found = divergence["jsd_q"].sel(layer=layer).values < SIGNIFICANT
            for colour, here in (("#ffffff", value > 0.45 * largest), ("#000000", value <= 0.45 * largest)):
                rows, columns = np.nonzero(here & found)
                axes.plot(columns + 0.5, rows + 0.5, "o", markersize=1.6, color=colour, markeredgewidth=0)
            axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=90)
            axes.set_yticks(np.arange(len(names)) + 0.5, names if at == 0 else [])
            style.panel_title(axes, f"Layer {layer}")
            _without_frame(axes)
        _add_scale(figure, mesh, left)
    return figure


def _without_frame(axes: Axes) -> None:
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _add_scale(figure: Figure, mesh: QuadMesh, left: float) -> None:
    """The scale of colours with its words, at the bottom."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 0.24 / height, 1.4 / width, 0.07 / height))
    bar = figure.colorbar(mesh, cax=axes, orientation="horizontal")
    bar.outline.set_linewidth(0)
    bar.ax.xaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(length=2, pad=2)
    words = "bits; • not explained by sampling documents"
    figure.text((left + 1.55) / width, 0.24 / height, words, fontsize=7, color=MUTED, va="bottom")
