"""Prefetching: recall against experts loaded, and recall by layer at as many experts as a token chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from moescope.reporting.colours import INK, domain_colours
from moescope.reporting.figures import style
from moescope.reporting.figures.style import MOST_LAYERS_WITH_MARKERS
from moescope.reporting.subjects.prefetch import as_many_as_chosen, predictor_names

MOST_EXPERTS_LINEAR = 16
"""From there on the number of experts loaded is on a logarithmic axis."""


_KINDS = {
    "lookahead": (0, "o"),
    "transitions": (1, "s"),
    "previous": (2, "D"),
    "domain": (6, "v"),
    "popularity": (4, ""),
}
"""Place of the colour of each kind, and its marker."""

_Look = tuple[str, str, Any]
"""Colour, marker and line style of a predictor."""

_LINES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1, 1.5)))
"""Of distances, the nearest first."""


def draw_prefetch(prefetch: xr.Dataset) -> Figure:
    """The layers of a `moescope.prefetch`, left together, right each by itself; bands are 95 % intervals."""
    names = predictor_names(prefetch)
    distances = sorted({distance for distance in prefetch["distance"].values.tolist() if distance})
    looks: list[_Look] = []
    for kind, distance in zip(prefetch["kind"].values.tolist(), prefetch["distance"].values.tolist(), strict=True):
        colour, marker = _KINDS[kind]
        line: Any = _LINES[distances.index(distance) % len(_LINES)] if distance else "-"
        looks.append((INK if kind == "popularity" else domain_colours(10)[colour], marker, line))
    columns = 4 if len(names) > 5 else 3
    with style.style():
        sizes: dict[str, Any] = {"markersize": 3.2, "linewidth": 1.3}
        handles = [  # without markers on dashes, which they would hide on so short a line
            style.line_handle(name, color=colour, linestyle=line, marker=marker if line == "-" else "", **sizes)
            for name, (colour, marker, line) in zip(names, looks, strict=True)
        ]
        handles.append(style.line_handle("at random", color=INK, linewidth=0.9, linestyle=(0, (1, 2))))
        figure, (left, right) = style.panels_in_row(2, handles, columns=columns, titles=0.34, height=2.3, sharey=True)
        figure.subplots_adjust(wspace=0.1)
        _draw_by_loaded(left, prefetch, looks)
        _draw_by_layer(right, prefetch, looks)
        left.set_ylim(0, 103)
        left.set_ylabel("Needed experts that are loaded (%)")
    return figure


def _draw_by_loaded(axes: Axes, prefetch: xr.Dataset, looks: list[_Look]) -> None:
    loaded = prefetch["loaded"].values
    wide = len(loaded) > MOST_EXPERTS_LINEAR
    _draw_lines(axes, prefetch, "loaded", "model_recall", looks, markers=not wide)
    top_k = int(prefetch["top_k"].max())
    axes.axvline(top_k, color=INK, linewidth=0.5, alpha=0.5)
    axes.annotate(
        f"k = {top_k}", (top_k, 0), xycoords=("data", "axes fraction"), xytext=(2, 3), textcoords="offset points",
        fontsize=7,
    )  # fmt: skip
    if wide:
        axes.set_xscale("log", base=2)
        ticks = [2**power for power in range(int(np.log2(loaded[-1])) + 1)]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xticks(loaded)
    pooled = prefetch.attrs["pooled_layers"]
    what = f"layers {pooled[0]} to {pooled[-1]}" if len(pooled) > 1 else f"layer {pooled[0]}" if pooled else "no layer"
    style.panel_title(axes, f"By experts loaded, {what}")
    axes.set_xlabel("Experts loaded", labelpad=2)
    axes.grid(axis="y")


def _draw_by_layer(axes: Axes, prefetch: xr.Dataset, looks: list[_Look]) -> None:
    layers = prefetch["layer"].values
    few = len(layers) <= MOST_LAYERS_WITH_MARKERS
    _draw_lines(axes, as_many_as_chosen(prefetch), "layer", "recall", looks, markers=few)
    style.panel_title(axes, "By layer, as many loaded as chosen (k)")
    style.layer_ticks(axes, 6)
    if few:
        axes.set_xticks(layers)


def _draw_lines(axes: Axes, data: xr.Dataset, dim: str, name: str, looks: list[_Look], *, markers: bool) -> None:
    """A line a predictor over the band of its intervals, and what loading at random gives."""
    x = data[dim].values
    axes.plot(x, 100 * data[f"{name}_uniform"].values, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    for p, (colour, marker, line) in enumerate(looks):
        of_predictor = data.isel(predictor=p)
        low, high = (100 * of_predictor[f"{name}_{end}"].values for end in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        look = {"linestyle": line, "linewidth": 1.3, "markersize": 3.0}
        style.add_marked(axes, x, 100 * of_predictor[name].values, colour, marker if markers else "", **look)
