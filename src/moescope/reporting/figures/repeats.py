"""Figure 10: repeated experts of consecutive tokens by layer, a line a domain; first choice left, any choice right."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moescope.reporting.figures import style
from moescope.reporting.figures.style import MOST_LAYERS_WITH_MARKERS, Mark


def draw_repeats(repeats: xr.Dataset) -> Figure:
    """Figure 10 of all layers of a `moescope.repeats`."""
    marks = style.domain_marks(repeats["domain"].values.tolist())
    kinds = [kind for kind in ("first", "any") if kind in repeats["kind"].values]
    kinds = kinds[:1] if int(repeats["top_k"].values.max()) == 1 else kinds
    with style.style():
        handles = [
            *style.line_handles(marks),
            style.line_handle("uniform routing", **style.UNIFORM),
            style.band_handle("popularity of the experts alone"),
        ]
        figure, panels = style.panels_of_kinds(kinds, repeats, handles, columns=5 if len(marks) <= 8 else 4)
        for axes, kind in zip(panels, kinds, strict=True):
            _draw_lines(axes, repeats.sel(kind=kind), marks)
        panels[0].set_ylabel("Repeated consecutive assignments (%)")
    return figure


def _draw_lines(axes: Axes, data: xr.Dataset, marks: list[Mark]) -> None:
    layers = data["layer"].values
    few = len(layers) <= MOST_LAYERS_WITH_MARKERS
    # Side by side, so that the intervals at one layer do not cover each other, and within the margins.
    apart = min([0.05 * (layers[-1] - layers[0]) + 0.15, *(0.24 * np.diff(layers))])
    style.add_band(axes, layers, 100 * data["rate_null"].values, "popularity of the experts alone")
    axes.plot(*style.widened(layers, 100 * data["rate_uniform"].values), **style.UNIFORM, label="uniform")
    for number, mark in enumerate(marks):
        low, high, rate = (100 * data[name].values[number] for name in ("rate_low", "rate_high", "rate"))
        shift = apart * ((number + 0.5) / len(marks) - 0.5) if few else 0.0
        style.add_spread(axes, layers + shift, low, high, mark.colour, 0.13, alpha=0.8)
        style.add_domain(axes, layers + shift, rate, mark, number, markersize=3.4 if few else 3.0)
    style.layer_axis(axes, layers)
    axes.set_ylim(bottom=0 if np.nanmin(100 * data["rate"].values, initial=100) < 40 else None)
