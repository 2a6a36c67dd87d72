"""Locality: the excess over each null by layer, and repeats by distance, a line a layer."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from moescope.measures import schema
from moescope.reporting.colours import INK
from moescope.reporting.figures import style
from moescope.reporting.wording import known_kinds

NULL_NAMES = {
    "uniform": "uniform routing",
    "popularity": "popularity in the domain",
    "document": "document in any order",
    "words": "same words elsewhere",
}

DOTTED = (0, (2, 2))


def draw_excess(locality: xr.Dataset) -> Figure:
    """Points by which neighbours repeat more often than each null of a `moescope.locality`, all domains together."""
    data = schema.total(locality).sel(pairs="all")
    marks = dict(zip(NULL_NAMES, style.domain_marks(list(NULL_NAMES.values())), strict=True))
    marks = {null: mark for null, mark in marks.items() if data["excess"].sel(null=null).notnull().any()}
    layers = data["layer"].values
    with style.style():
        handles = style.line_handles(list(marks.values()))
        figure, panels = style.panels_of_kinds(known_kinds(data), data, handles, columns=4)
        for axes, kind in zip(panels, known_kinds(data), strict=True):
            for null, mark in marks.items():
                of_null = data.sel(null=null, kind=kind)
                value, low, high = (100 * of_null[f"excess{end}"].values for end in ("", "_low", "_high"))
                style.add_line(axes, layers, value, low, high, mark)
            axes.axhline(0, **style.UNIFORM)
            style.layer_ticks(axes)
        panels[0].set_ylabel("Repeats above the null (points)")
    return figure


def draw_lags(locality: xr.Dataset, layers: Sequence[int]) -> Figure:
    """Repeats by distance, a line a layer, all domains together; dotted what the document in any order gives."""
    data = schema.total(locality).sel(layer=list(layers))
    marks = style.domain_marks([f"layer {layer}" for layer in layers])
    lags = data["lag"].values
    with style.style():
        any_order = style.line_handle("document in any order", color=INK, linewidth=0.9, linestyle=DOTTED)
        handles = [*style.line_handles(marks), any_order]
        figure, panels = style.panels_of_kinds(known_kinds(data), data, handles, columns=4)
        for axes, kind in zip(panels, known_kinds(data), strict=True):
            for layer, mark in zip(layers, marks, strict=True):
                one = data.sel(layer=layer, kind=kind)
                value, low, high, null = (100 * one[f"lag_rate{end}"].values for end in ("", "_low", "_high", "_null"))
                axes.plot(lags, null, color=mark.colour, linewidth=0.9, linestyle=DOTTED)
                style.add_line(axes, lags, value, low, high, mark)
            axes.set_xscale("log", base=2)
            axes.set_xticks(lags, [str(lag) for lag in lags])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("Tokens apart", labelpad=2)
            axes.grid(axis="y")
        panels[0].set_ylabel("Repeats (%)")
    return figure
