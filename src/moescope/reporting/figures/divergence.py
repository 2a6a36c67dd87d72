"""Maps of divergence: of domains and of word classes from the others by layer, and of any two domains."""

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

from moescope.reporting.colours import PAPER
from moescope.reporting.figures import style
from moescope.reporting.figures.style import FULL_WIDTH
from moescope.reporting.numbers import bits
from moescope.reporting.tables import SIGNIFICANT

MOST_LAYERS_WITH_NUMBERS = 10
DARK = 0.45
"""Part of the largest value from which a square is so dark that what stands on it is white."""

LEGEND_WIDTH = 3.85
"""Inches that the scale and its words need."""

FROM_NOTHING = LinearSegmentedColormap.from_list(
    "from_nothing", [PAPER, "#d5e3f3", "#8fb4dc", "#4a7ebb", "#1d4a85", "#0c2750"]
).with_extremes(bad="#e9eaec")


def draw_divergence(divergence: xr.Dataset) -> Figure:
    """The map of all layers of a `moescope.divergence`."""
    value = divergence["jsd_rest"].transpose("domain", "layer").values
    differs = divergence["jsd_rest_q"].transpose("domain", "layer").values < SIGNIFICANT
    names = [mark.name for mark in style.domain_marks(divergence["domain"].values.tolist())]
    return _draw_map(names, divergence["layer"].values, value, differs)


def draw_word_classes(syntax: xr.Dataset) -> Figure:
    """The map of all layers of a `moescope.syntax`; classes without a token are left out."""
    data = syntax.transpose("word_class", "layer").sel(word_class=syntax["tokens"].values > 0)
    differs = data["jsd_q"].values < SIGNIFICANT
    return _draw_map(data["word_class"].values.tolist(), data["layer"].values, data["jsd"].values, differs)


def _draw_map(
    names: Sequence[str], layers: NDArray[np.int64], value: NDArray[np.float64], differs: NDArray[np.bool_]
) -> Figure:
    """A row a name, a column a layer, with the bits where there is space; a dot stands where they differ."""
    numbers = len(layers) <= MOST_LAYERS_WITH_NUMBERS
    with style.style():
        left, top, bottom, right = style.beside_names(names), 0.12, 0.72, 0.12
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
        mesh = _draw_squares(axes, value, largest)
        dark = value > DARK * largest
        if not numbers:
            _draw_dots(axes, differs, dark, 1.8)
        for colour, shade in (("#ffffff", dark), ("#000000", ~dark)):
            for row, column in np.argwhere(shade & np.isfinite(value) & numbers):
                text = bits(float(value[row, column])) + (" •" if differs[row, column] else "")
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6.5, color=colour)
        axes.set_yticks(np.arange(len(names)) + 0.5, names)
        style.map_of_layers_axis(axes, layers, None if numbers else 10, shift=0.5)
        _add_scale(figure, mesh, left)
    return figure


def draw_domain_pairs(divergence: xr.Dataset, layers: Sequence[int]) -> Figure:
    """The divergence between any two domains of a `moescope.divergence`, a panel a layer, at most three."""
    shown = list(layers)[:3]
    names = [mark.name for mark in style.domain_marks(divergence["domain"].values.tolist())]
    values = [divergence["jsd"].sel(layer=layer).values for layer in shown]
    largest = max(float(np.nanmax(value, initial=1e-6)) for value in values)
    with style.style():
        left, top, between = style.beside_names(names), 0.28, 0.1
        side = min((FULL_WIDTH - left - 0.1 - between * (len(shown) - 1)) / len(shown), 0.45 * len(names))
        bottom = left + 0.5
        width = max(left + 0.1 + (side + between) * len(shown), left + LEGEND_WIDTH)
        height = top + side + bottom
        figure = style.new_figure(width, height)
        for place, (layer, value) in enumerate(zip(shown, values, strict=True)):
            corner = ((left + place * (side + between)) / width, bottom / height)
            axes = figure.add_axes((*corner, side / width, side / height))
            mesh = _draw_squares(axes, np.where(np.eye(len(names), dtype=bool), np.nan, value), largest)
            differs = divergence["jsd_q"].sel(layer=layer).values < SIGNIFICANT
            _draw_dots(axes, differs & np.isfinite(value), value > DARK * largest, 1.6)
            axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=90)
            axes.set_yticks(np.arange(len(names)) + 0.5, names if place == 0 else [])
            style.panel_title(axes, f"Layer {layer}")
        _add_scale(figure, mesh, left)
    return figure


def _draw_squares(axes: Axes, value: NDArray[np.float64], largest: float) -> QuadMesh:
    return style.add_map(axes, value, cmap=FROM_NOTHING, vmin=0, vmax=largest, edgecolors=PAPER, linewidth=0.5)


def _draw_dots(axes: Axes, differs: NDArray[np.bool_], dark: NDArray[np.bool_], size: float) -> None:
    for colour, shade in (("#ffffff", dark), ("#000000", ~dark)):
        rows, columns = np.nonzero(shade & differs)
        axes.plot(columns + 0.5, rows + 0.5, "o", markersize=size, color=colour, markeredgewidth=0)


def _add_scale(figure: Figure, mesh: QuadMesh, left: float) -> None:
    words = "bits; • not explained by sampling documents"
    bar = style.add_scale(figure, mesh, words, left=left, bottom=0.24, length=1.4, gap=0.15)
    bar.ax.xaxis.set_major_locator(MaxNLocator(3))
