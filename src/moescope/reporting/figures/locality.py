"""Locality: the excess over each null by layer, and repeats by distance, a line a layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from moescope.measures.locality import ALL_DOMAINS
from moescope.reporting.colours import INK
from moescope.reporting.figures import style
from moescope.reporting.figures.style import FULL_WIDTH
from moescope.reporting.wording import describe_any

NULL_NAMES = {
    "uniform": "uniform routing",
    "popularity": "popularity in the domain",
    "document": "document in any order",
    "words": "same words elsewhere",
}


def draw_excess(locality: xr.Dataset, domain: str = ALL_DOMAINS) -> Figure:
    """Points by which neighbours repeat more often than each null predicts, by layer.

    Args:
        locality: Of `moescope.locality`.
        domain: A domain, or the whole trace.
    """
    data = locality.sel(domain=domain, pairs="all")
    nulls = [null for null in NULL_NAMES if data["excess"].sel(null=null).notnull().any()]
    marks = style.domain_marks([NULL_NAMES[null] for null in NULL_NAMES])
    marks = [mark for mark, null in zip(marks, NULL_NAMES, strict=True) if null in nulls]
    layers = data["layer"].values
    with style.style():
        figure, panels = _panels(data, len(nulls), 4)
        for axes, kind in zip(panels, _kinds(data), strict=True):
            for null, mark in zip(nulls, marks, strict=True):
                at = data.sel(null=null, kind=kind)
                value, low, high = (100 * at[name].values for name in ("excess", "excess_low", "excess_high"))
                axes.fill_between(layers, low, high, color=mark.colour, alpha=0.18, linewidth=0)
                axes.plot(
                    layers,
                    value,
                    color=mark.colour,
                    linestyle=mark.line,
                    linewidth=1.2,
                    marker=mark.marker,
                    markersize=3.2,
                    markeredgewidth=0,
                    label=mark.name,
                )
            axes.axhline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.set_xlabel("Layer", labelpad=2)
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        panels[0].set_ylabel("Repeats above the null (points)")
        style.legend_above(figure, style.line_handles(marks), [mark.name for mark in marks], columns=4)
    return figure


def draw_lags(locality: xr.Dataset, layers: Sequence[int], domain: str = ALL_DOMAINS) -> Figure:
    """Repeats by distance, a line a layer; dashed in its colour what the document in any order gives.

    Args:
        locality: Of `moescope.locality`.
        layers: Layers to show.
        domain: A domain, or the whole trace.
    """
    data = locality.sel(domain=domain, layer=list(layers))
    marks = style.domain_marks([f"layer {layer}" for layer in layers])
    lags = data["lag"].values
    with style.style():
        figure, panels = _panels(data, len(layers) + 1, 4)
        for axes, kind in zip(panels, _kinds(data), strict=True):
            for layer, mark in zip(layers, marks, strict=True):
                at = data.sel(layer=layer, kind=kind)
                value, low, high, expected = (
                    100 * at[f"lag_{name}"].values for name in ("rate", "low", "high", "expected")
                )
                axes.fill_between(lags, low, high, color=mark.colour, alpha=0.18, linewidth=0)
                axes.plot(lags, expected, color=mark.colour, linewidth=0.9, linestyle=(0, (2, 2)))
                axes.plot(
                    lags,
                    value,
                    color=mark.colour,
                    linewidth=1.2,
                    marker=mark.marker,
                    markersize=3.2,
                    markeredgewidth=0,
                    label=mark.name,
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(lags, [str(lag) for lag in lags])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("Tokens apart", labelpad=2)
        panels[0].set_ylabel("Repeats (%)")
        handles = [*style.line_handles(marks), Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (2, 2)))]
        style.legend_above(figure, handles, [*(mark.name for mark in marks), "document in any order"], columns=4)
    return figure


def _kinds(data: xr.Dataset) -> list[str]:
    kinds = [kind for kind in data["kind"].values.tolist() if data["rate"].sel(kind=kind).notnull().any()]
    return kinds[:1] if int(data["top_k"].values.max()) == 1 else kinds or ["any"]


def _panels(data: xr.Dataset, entries: int, columns: int) -> tuple[Figure, list[Axes]]:
    kinds = _kinds(data)
    top = style.legend_rows(entries, columns) + 0.3
    figure = style.new_figure(FULL_WIDTH if len(kinds) == 2 else FULL_WIDTH * 0.62, top + 0.42 + 2.2)
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    style.place(figure, left=0.5, right=0.1, top=top, bottom=0.42, between=0, rows=1)
    figure.subplots_adjust(wspace=0.16)
    for axes, kind in zip(panels, kinds, strict=True):
        name = "first choice" if kind == "first" else describe_any(int(data["top_k"].values.max()))
        style.panel_title(axes, name[0].upper() + name[1:])
        axes.grid(axis="y")
    return figure, list(np.asarray(panels))
