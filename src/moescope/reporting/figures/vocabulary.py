"""Vocabulary specialization: by layer above, by expert below; by the token itself left, by the next token right."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moescope.reporting.colours import INK, MUTED, PAPER, domain_colours
from moescope.reporting.figures import style
from moescope.reporting.figures.divergence import DARK, FROM_NOTHING
from moescope.reporting.figures.style import FULL_WIDTH

TITLES = {"input": "By the token", "next": "By the next token"}
DOTTED = (0, (1, 1.5))
MOST_NUMBERED = 16
"""Layers and experts up to which the map gives each expert's number, and lines have markers."""


def draw_vocabulary(vocabulary: xr.Dataset) -> Figure:
    """All layers of a `moescope.vocabulary`."""
    num_ids = vocabulary.sizes["expert"]
    colours = dict(zip(TITLES, (domain_colours(4)[0], domain_colours(4)[3]), strict=True))
    map_height = min(max(0.16 * num_ids, 0.6), 1.9)
    top, lines_height, between, bottom = 0.5, 1.45, 0.26, 0.8
    with style.style():
        height = top + lines_height + between + map_height + bottom
        figure = style.new_figure(FULL_WIDTH, height)
        panels = figure.subplots(2, 2, squeeze=False, sharex="col", height_ratios=[lines_height, map_height])
        style.place(figure, left=0.5, right=0.1, top=top, bottom=bottom, between=between, rows=2)
        figure.subplots_adjust(wspace=0.12)
        largest = 100 * float(np.nanmax(vocabulary["expert_specialization"].values, initial=1e-4))
        for column, (by, title) in enumerate(TITLES.items()):
            lines, experts = panels[:, column]
            _draw_lines(lines, vocabulary.sel(by=by), colours[by])
            style.panel_title(lines, title)
            _draw_experts(experts, vocabulary.sel(by=by), largest)
            if column:
                lines.tick_params(labelleft=False)
            else:
                lines.set_ylabel("Specialization (%)")
                experts.set_ylabel("Experts, in order")
        limit = max(axes.get_ylim()[1] for axes in panels[0])
        for axes in panels[0]:
            axes.set_ylim(0, min(limit, 100))
        words = "% of an id's tokens, mean over the ids of an expert; grey: no id"
        scale = ScalarMappable(Normalize(0, largest), FROM_NOTHING)
        bar = style.add_scale(figure, scale, words, left=0.5, bottom=0.27, length=1.4, gap=0.15)
        bar.ax.xaxis.set_major_locator(MaxNLocator(4))
        handles = [
            style.line_handle("all ids", color=INK, linewidth=1.4, marker="o", markersize=3.2),
            style.line_handle("choices that do not see the token", color=INK, linewidth=1.0, linestyle=style.DASHED),
            style.line_handle("most popular expert", color=MUTED, linewidth=1.0, linestyle=DOTTED),
        ]
        style.legend_above(figure, handles, columns=3)
    return figure


def _draw_lines(axes: Axes, data: xr.Dataset, colour: str) -> None:
    place = np.arange(data.sizes["layer"])
    few = len(place) <= MOST_NUMBERED
    value, low, high, null, popular = (
        100 * data[name].values
        for name in (*(f"specialization{end}" for end in ("", "_low", "_high", "_null")), "popularity")
    )
    style.add_spread(axes, place, low, high, colour, 0.2, few=MOST_NUMBERED, linewidth=1.0)
    axes.plot(place, popular, color=MUTED, linewidth=1.0, linestyle=DOTTED, label="popularity")
    axes.plot(place, null, color=colour, linewidth=1.0, linestyle=style.DASHED, label="null")
    style.add_marked(axes, place, value, colour, "o" if few else "", linewidth=1.4, label="specialization")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.tick_params(labelbottom=False)


def _draw_experts(axes: Axes, data: xr.Dataset, largest: float) -> None:
    layers = data["layer"].values
    value = 100 * data["expert_specialization"].transpose("expert", "layer").values
    order = np.argsort(np.where(np.isfinite(value), -value, np.inf), axis=0, kind="stable")
    ordered = np.take_along_axis(value, order, axis=0)
    few = max(len(layers), len(value)) <= MOST_NUMBERED
    x, y = np.arange(len(layers) + 1) - 0.5, np.arange(len(value) + 1) - 0.5
    look = PAPER if few else "none"
    style.add_map(axes, x, y, ordered, cmap=FROM_NOTHING, vmin=0, vmax=largest, edgecolors=look, linewidth=0.5)
    if few:
        for (row, column), expert in np.ndenumerate(order):
            if np.isfinite(ordered[row, column]):
                colour = "#ffffff" if ordered[row, column] > DARK * largest else "#000000"
                axes.text(column, row, str(expert), ha="center", va="center", fontsize=6, color=colour)
    style.map_of_layers_axis(axes, layers, None if few else 8, shift=0)
    axes.set_yticks([])
