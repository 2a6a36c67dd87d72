"""Vocabulary specialization: by layer above, by expert below; by the token itself left, by the next token right.

Above, the mean over ids with its 95 % interval, and dashed the same of choices that do not see the token; dotted, the
most popular expert. Below, each layer's experts from the most to the least specialized.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from moescope.reporting.colours import INK, MUTED, PAPER, domain_colours
from moescope.reporting.figures import style
from moescope.reporting.figures.divergence import FROM_NOTHING
from moescope.reporting.figures.style import FULL_WIDTH

TITLES = {"input": "By the token", "next": "By the next token"}
MOST_NUMBERED = 16
"""Layers and experts up to which the map gives each expert's number, and lines have markers."""


def draw_vocabulary(vocabulary: xr.Dataset) -> Figure:
    """All layers there are.

    Args:
        vocabulary: Of `moescope.vocabulary`.
    """
    num_ids = vocabulary.sizes["expert"]
    colours = dict(zip(TITLES, (domain_colours(4)[0], domain_colours(4)[3]), strict=True))
    map_height = min(max(0.16 * num_ids, 0.6), 1.9)
    top, lines_height, between, bottom = 0.5, 1.45, 0.26, 0.8
    with style.style():
        height = top + lines_height + between + map_height + bottom
        figure = style.new_figure(FULL_WIDTH, height)
        panels = figure.subplots(2, 2, squeeze=False, sharex="col", height_ratios=[lines_height, map_height])
        figure.subplots_adjust(
            left=0.5 / FULL_WIDTH,
            right=1 - 0.1 / FULL_WIDTH,
            top=1 - top / height,
            bottom=bottom / height,
            hspace=between / ((lines_height + map_height) / 2),
            wspace=0.12,
        )
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
        width = FULL_WIDTH
        bar_axes = figure.add_axes((0.5 / width, 0.27 / height, 1.4 / width, 0.07 / height))
        scale = ScalarMappable(Normalize(0, largest), FROM_NOTHING)
        bar = figure.colorbar(scale, cax=bar_axes, orientation="horizontal")
        bar.outline.set_linewidth(0)
        bar.ax.xaxis.set_major_locator(MaxNLocator(4))
        bar_axes.tick_params(length=2, pad=2)
        words = "% of an id's tokens, mean over the ids of an expert; grey: no id"
        figure.text(2.05 / width, 0.27 / height, words, fontsize=7, color=MUTED, va="bottom")
        handles = [
            Line2D([], [], color=INK, linewidth=1.4, marker="o", markersize=3.2),
            Line2D([], [], color=INK, linewidth=1.0, linestyle=(0, (4, 2))),
            Line2D([], [], color=MUTED, linewidth=1.0, linestyle=(0, (1, 1.5))),
        ]
        labels = ["all ids", "choices that do not see the token", "most popular expert"]
        style.legend_above(figure, handles, labels, columns=3)
    return figure


def _draw_lines(axes: Axes, data: xr.Dataset, colour: str) -> None:
    place = np.arange(data.sizes["layer"])
    few = len(place) <= MOST_NUMBERED
    value, low, high, null, popular = (
        100 * data[name].values
        for name in (*(f"specialization{end}" for end in ("", "_low", "_high", "_null")), "popularity")
    )
    if few:
        style.add_verticals(axes, place.astype(float), low, high, edgecolor=colour, linewidth=1.0)
    else:
        axes.fill_between(place, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(place, popular, color=MUTED, linewidth=1.0, linestyle=(0, (1, 1.5)), label="popularity")
    axes.plot(place, null, color=colour, linewidth=1.0, linestyle=(0, (4, 2)), label="null")
    axes.plot(
        place, value, color=colour, linewidth=1.4, marker="o" if few else None, markersize=3.2,
        markeredgewidth=0, label="specialization",
    )  # fmt: skip
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
    axes.pcolormesh(x, y, ordered, cmap=FROM_NOTHING, vmin=0, vmax=largest, edgecolors=look, linewidth=0.5)
    axes.invert_yaxis()
    if few:
        for (row, column), expert in np.ndenumerate(order):
            if np.isfinite(ordered[row, column]):
                dark = ordered[row, column] > 0.45 * largest
                axes.text(
                    column, row, str(expert), ha="center", va="center", fontsize=6,
                    color="#ffffff" if dark else "#000000",
                )  # fmt: skip
        axes.set_xticks(np.arange(len(layers)), [str(layer) for layer in layers])
    else:
        ticks = MaxNLocator(8, integer=True).tick_values(0, len(layers) - 1)
        shown = [int(at) for at in ticks if 0 <= at < len(layers)]
        axes.set_xticks(shown, [str(layers[at]) for at in shown])
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.set_xlabel("Layer", labelpad=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
