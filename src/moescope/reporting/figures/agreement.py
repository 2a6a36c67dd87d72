"""How often two traces agree, by layer: a line a domain, a black one for all; below, popularity alone."""

from __future__ import annotations

from typing import Any

import xarray as xr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moescope.reporting.colours import INK
from moescope.reporting.figures import style
from moescope.reporting.wording import known_kinds

NEARLY_THE_SAME = 90.0
"""Per cent above which everything must lie for the axis not to start at zero."""
LEAST_RANGE = 2.0
"""Points that the axis spans at least, so that noise around 100 % does not look like a cliff."""


def draw_agreement(agreement: xr.Dataset) -> Figure:
    """The agreement of all layers there are; `agreement` is that of a `moescope.Comparison`."""
    domains = agreement["domain"].values.tolist()
    marks = style.domain_marks(domains[1:]) if len(domains) > 2 else []
    kinds = known_kinds(agreement, "agreement")
    lowest = 100 * float(agreement["agreement_low"].sel(kind=kinds).min())
    bottom = min(lowest - 0.5, 100 - LEAST_RANGE) if lowest > NEARLY_THE_SAME else 0.0
    with style.style():
        handles: list[Artist] = [style.line_handle("all domains", color=INK, linewidth=1.8), *style.line_handles(marks)]
        if bottom == 0:  # else popularity is below what is shown
            handles.append(style.band_handle("popularity of the experts alone"))
        look: dict[str, Any] = {"columns": 5 if len(marks) <= 8 else 4, "left": 0.5 if bottom == 0 else 0.6}
        figure, panels = style.panels_of_kinds(kinds, agreement, handles, **look, sharey=True)
        for axes, kind in zip(panels, kinds, strict=True):
            _draw_panel(axes, agreement.sel(kind=kind), marks)
        panels[0].set_ylim(bottom, 100)
        panels[0].set_ylabel("Chosen in both traces (%)")
    return figure


def _draw_panel(axes: Axes, data: xr.Dataset, marks: list[style.Mark]) -> None:
    layers = data["layer"].values
    value, low, high, null = (100 * data[f"agreement{end}"].values for end in ("", "_low", "_high", "_null"))
    style.add_band(axes, layers, null, "popularity")
    for number, mark in enumerate(marks, start=1):
        style.add_domain(axes, layers, value[number], mark, number, linewidth=0.9, markersize=2.8)
    axes.plot(layers, value[0], color=INK, linewidth=1.8, marker="o" if len(layers) == 1 else "", label="all domains")
    style.add_spread(axes, layers, low[0], high[0], INK, 0.15)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    style.layer_axis(axes, layers)
