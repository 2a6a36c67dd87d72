"""Figures 7 and 9: the share of a domain's assignments that each expert receives.

Few experts are drawn as in the paper: bars grouped by expert, a bar a domain, the uniform share dashed. Many are drawn
as a map of domain by expert, coloured by the ratio to the uniform share; experts that got nothing at all are black
there, for dead and rare are different findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moescope.reporting.colours import INK, MUTED, PAPER
from moescope.reporting.figures import style
from moescope.reporting.figures.style import FULL_WIDTH, Mark
from moescope.reporting.wording import capital, describe_choice

MOST_EXPERTS_AS_BARS = 16
MOST_BARS = 210
GROUP_WIDTH = 0.86
"""Part of the distance between two experts that the bars of one take."""

BELOW_AND_ABOVE = LinearSegmentedColormap.from_list(
    "below_and_above", ["#3a68ad", "#a9c4e4", PAPER, "#f0ab62", "#8c350b"]
).with_extremes(under="#000000", bad="#e9eaec")


def draw_shares(shares: xr.Dataset, layers: Sequence[int], choice: str = "all") -> Figure:
    """Figure 7 of a `moescope.shares`: a panel a layer; the paper draws all choices together."""
    data = shares.sel(layer=list(layers), choice=choice)
    with style.style():
        if not as_bars(data):
            return _draw_maps([(f"Layer {layer}", data.sel(layer=layer)) for layer in layers])
        marks, columns = _legend(data)
        top = style.legend_rows(len(marks), columns) + 0.25
        figure = style.new_figure(FULL_WIDTH, top + 0.38 + 1.3 * len(layers) + 0.37 * (len(layers) - 1))
        panels = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
        style.place(figure, left=0.52, right=0.42, top=top, bottom=0.38, between=0.37, rows=len(layers))
        highest = _highest(data)
        for axes, layer in zip(panels, layers, strict=True):
            _draw_bars(axes, data.sel(layer=layer), marks, highest)
            style.panel_title(axes, f"Layer {layer}")
            _label_uniform(axes, float(data["share_null"].sel(layer=layer)))
        panels[len(layers) // 2].set_ylabel("Selection proportion")
        panels[-1].set_xlabel("Expert ID", labelpad=2)
        style.legend_above(figure, style.bar_handles(marks), columns=columns)
    return figure


def draw_choices(shares: xr.Dataset, layers: Sequence[int]) -> Figure:
    """Figure 9: the same for all choices together and for the first and the last one, a row each, a column a layer."""
    layers = list(layers)
    data = shares.sel(layer=layers)
    top_k = int(data["top_k"].values.max())
    names = data["choice"].values.tolist()
    choices = [names[0]] if top_k == 1 else [names[0], names[1], names[top_k]]
    with style.style():
        if not as_bars(data):
            titles = {choice: describe_choice(choice, top_k).lower() for choice in choices}
            places = [(layer, choice) for layer in layers for choice in choices]
            return _draw_maps(
                [(f"Layer {layer}: {titles[choice]}", data.sel(layer=layer, choice=choice)) for layer, choice in places]
            )
        marks, columns = _legend(data)
        top = style.legend_rows(len(marks), columns) + 0.26
        figure = style.new_figure(FULL_WIDTH, top + 0.38 + 1.25 * len(choices) + 0.18 * (len(choices) - 1))
        panels = figure.subplots(len(choices), len(layers), squeeze=False, sharex="col", sharey=True)
        style.place(figure, left=0.62, right=0.08, top=top, bottom=0.38, between=0.18, rows=len(choices))
        figure.subplots_adjust(wspace=0.07)
        highest = _highest(data.sel(choice=choices))
        for row, choice in zip(panels, choices, strict=True):
            for axes, layer in zip(row, layers, strict=True):
                _draw_bars(axes, data.sel(layer=layer, choice=choice), marks, highest)
            row[0].set_ylabel(capital(describe_choice(choice, top_k)).replace(" or ", " or\n"), labelpad=4)
        for axes, layer in zip(panels[0], layers, strict=True):
            style.panel_title(axes, f"Layer {layer}")
        for axes in panels[-1]:
            axes.set_xlabel("Expert ID", labelpad=2)
        style.legend_above(figure, style.bar_handles(marks), columns=columns)
    return figure


def as_bars(shares: xr.Dataset) -> bool:
    """Whether shares are drawn as bars, as in the paper, or as a map."""
    num_ids = int(shares["num_ids"].values.max())
    return num_ids <= MOST_EXPERTS_AS_BARS and num_ids * shares.sizes["domain"] <= MOST_BARS


def _legend(data: xr.Dataset) -> tuple[list[Mark], int]:
    """The marks of the domains, and how many stand side by side."""
    marks = style.domain_marks(data["domain"].values.tolist())
    return marks, min(len(marks), 8 if sum(len(mark.name) for mark in marks) < 80 else 4)


def _draw_bars(axes: Axes, data: xr.Dataset, marks: Sequence[Mark], highest: float) -> None:
    """The bars of one layer and choice, with their intervals and the uniform share."""
    num_ids = int(data["num_ids"])
    width = GROUP_WIDTH / len(marks)
    experts = np.arange(num_ids)
    centres = experts + (np.arange(len(marks))[:, None] - (len(marks) - 1) / 2) * width
    share, low, high = (
        data[name].transpose("domain", "expert").values[:, :num_ids] for name in ("share", "share_low", "share_high")
    )
    for mark, x, height in zip(marks, centres, share, strict=True):
        bars = np.stack([x - 0.46 * width, 0 * x, x + 0.46 * width, np.nan_to_num(height)], axis=1)
        style.add_rectangles(axes, bars, facecolor=mark.colour, hatch=mark.hatch, linewidth=0, label=mark.name)
    style.add_verticals(
        axes, centres.ravel(), low.ravel(), high.ravel(), edgecolor=INK, linewidth=0.5, label="95 % interval"
    )
    axes.axhline(float(data["share_null"]), color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label="uniform")
    axes.set_xlim(-0.5, num_ids - 0.5)
    axes.set_ylim(0, highest)
    num_experts = int(data["num_experts"])
    axes.set_xticks(experts, [str(e) if e < num_experts else f"{e} null" for e in experts], minor=False)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")
    axes.locator_params(axis="y", nbins=4)


def _label_uniform(axes: Axes, uniform: float) -> None:
    look: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7, "color": MUTED}
    axes.annotate("uniform", (1, uniform), (3, 0), xycoords=("axes fraction", "data"), **look)


def _highest(data: xr.Dataset) -> float:
    """Top of the vertical axis: over every interval, but not stretched by one absurdly wide."""
    share, high = data["share"].values, data["share_high"].values
    top = max(np.nanmax(share, initial=0), float(data["share_null"].values.max()), 1e-9)
    return float(1.05 * min(max(np.nanmax(high, initial=0), top), 1.6 * top))


def _draw_maps(panels: Sequence[tuple[str, xr.Dataset]]) -> Figure:
    """Maps of domain by expert, one under the other, experts ordered by their mean share."""
    domains = panels[0][1]["domain"].values.tolist()
    names = [mark.name for mark in style.domain_marks(domains)]
    ratios = [_ratios(data) for _, data in panels]
    largest = max(float(np.nanpercentile(ratio, 99.5)) for ratio in ratios)
    norm = TwoSlopeNorm(1, 1e-9, max(2.0, largest))
    height = max(0.5, 0.135 * len(domains))
    bottom, top, between = 0.62, 0.24, 0.42
    figure = style.new_figure(FULL_WIDTH, bottom + top + height * len(panels) + between * (len(panels) - 1))
    all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    left = style.beside_names(names)
    style.place(figure, left=left, right=0.12, top=top, bottom=bottom, between=between, rows=len(panels))
    for axes, (title, data), ratio in zip(all_axes, panels, ratios, strict=True):
        values = np.where(ratio == 0, -1.0, ratio)  # under the scale: black
        mesh = style.add_map(axes, values, cmap=BELOW_AND_ABOVE, norm=norm, edgecolors="none", linewidth=0)
        axes.set_xticks([])
        axes.set_yticks(np.arange(len(domains)) + 0.5, names)
        style.panel_title(axes, f"{title} ({int(data['num_experts'])} experts)")
    all_axes[-1].set_xlabel("Experts, the most used of each panel first", labelpad=3)
    words = "share over uniform; black: exactly none"
    bar = style.add_scale(figure, mesh, words, left=left, bottom=0.24, length=2.2, gap=0.2, extend="max")
    steps = [0.5, 1, *(value for value in (2, 4, 8, 16, 32) if value <= largest)]
    bar.set_ticks([1e-9, *steps], labels=["→ 0", *(f"{value:g}×" for value in steps)])
    return figure


def _ratios(data: xr.Dataset) -> NDArray[np.float64]:
    """Shares over the uniform share, shape (domain, expert), the experts of the largest mean share first."""
    share = data["share"].isel(expert=slice(int(data["num_ids"]))).transpose("domain", "expert").values
    means = np.nan_to_num(share).mean(axis=0)
    return share[:, np.argsort(-means, kind="stable")] / float(data["share_null"])
