"""Figure 10: how often consecutive tokens repeat an expert, by layer, a line a domain.

Two panels as in the paper, first choice and any choice. Beside the paper's dashed uniform rate there is a grey band:
the rates that the popularity of the experts alone predicts, from the lowest to the highest domain.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from moescope.reporting.colours import INK, MUTED
from moescope.reporting.figures import style
from moescope.reporting.figures.style import FULL_WIDTH, MOST_LAYERS_WITH_MARKERS, Mark
from moescope.reporting.wording import describe_any


def draw_repeats(repeats: xr.Dataset) -> Figure:
    """Figure 10 of all layers there are.

    Args:
        repeats: Of `moescope.repeats`.
    """
    marks = style.domain_marks(repeats["domain"].values.tolist())
    top_k = int(repeats["top_k"].values.max())
    kinds = [kind for kind in ("first", "any") if kind in repeats["kind"].values]
    kinds = kinds[:1] if top_k == 1 else kinds
    with style.style():
        handles = [
            *style.line_handles(marks),
            Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (4, 3))),
            Patch(facecolor=MUTED, alpha=0.25, linewidth=0),
        ]
        labels = [*(mark.name for mark in marks), "uniform routing", "popularity of the experts alone"]
        columns = 5 if len(marks) <= 8 else 4
        top = style.legend_rows(len(labels), columns) + 0.3
        figure = style.new_figure(FULL_WIDTH if len(kinds) == 2 else FULL_WIDTH * 0.62, top + 0.42 + 2.2)
        panels = figure.subplots(1, len(kinds), squeeze=False)[0]
        style.place(figure, left=0.5, right=0.1, top=top, bottom=0.42, between=0, rows=1)
        figure.subplots_adjust(wspace=0.16)
        for axes, kind in zip(panels, kinds, strict=True):
            _draw_lines(axes, repeats.sel(kind=kind), marks)
            title = "first choice" if kind == "first" else describe_any(top_k)
            style.panel_title(axes, title[0].upper() + title[1:])
            axes.set_xlabel("Layer", labelpad=2)
        panels[0].set_ylabel("Repeated consecutive assignments (%)")
        style.legend_above(figure, handles, labels, columns=columns)
    return figure


def _draw_lines(axes: Axes, data: xr.Dataset, marks: list[Mark]) -> None:
    layers = data["layer"].values
    few = len(layers) <= MOST_LAYERS_WITH_MARKERS
    # Side by side, so that the intervals at one layer do not cover each other, and within the margins.
    apart = min([0.05 * (layers[-1] - layers[0]) + 0.15, *(0.24 * np.diff(layers))])
    popularity = 100 * data["rate_null"].values
    if np.isfinite(popularity).any():
        known = np.isfinite(popularity).any(axis=0)
        x, lowest, highest = _widened(
            layers[known], np.nanmin(popularity[:, known], axis=0), np.nanmax(popularity[:, known], axis=0)
        )
        axes.fill_between(
            x,
            lowest,
            highest,
            color=MUTED,
            alpha=0.25,
            linewidth=0,
            label="popularity of the experts alone",
        )
    x, uniform = _widened(layers, 100 * data["rate_uniform"].values)
    axes.plot(x, uniform, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label="uniform")
    for number, mark in enumerate(marks):
        at = data.isel(domain=number)
        low, high, rate = (100 * at[name].values for name in ("rate_low", "rate_high", "rate"))
        if few:
            shift = apart * ((number + 0.5) / len(marks) - 0.5)
            style.add_verticals(axes, layers + shift, low, high, edgecolor=mark.colour, linewidth=0.9, alpha=0.8)
        else:
            shift = 0.0
            axes.fill_between(layers, low, high, color=mark.colour, alpha=0.13, linewidth=0)
        axes.plot(
            layers + shift,
            rate,
            color=mark.colour,
            linestyle=mark.line,
            linewidth=1.2,
            marker=mark.marker,
            markersize=3.4 if few else 3.0,
            markevery=1 if few else (number % 4, 4),
            markeredgewidth=0,
            label=mark.name,
        )
    style.layer_axis(axes, layers)
    axes.set_ylim(bottom=0 if np.nanmin(100 * data["rate"].values, initial=100) < 40 else None)


def _widened(layers: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Values by layer, carried on to both sides so that the ends, and a single layer, can be seen."""
    reach = style.beside(layers) if len(layers) else 0
    x = np.concatenate([layers[:1] - reach, layers, layers[-1:] + reach])
    return x, *(np.concatenate([v[:1], v, v[-1:]]) for v in values)
