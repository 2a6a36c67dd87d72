"""Local routing consistency by layer, a panel a segment length, beside random order and uniform routing."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from moescope.measures import schema
from moescope.reporting.colours import INK, MUTED, domain_colours
from moescope.reporting.figures import style
from moescope.reporting.figures.style import FULL_WIDTH, MOST_LAYERS_WITH_MARKERS


def draw_consistency(consistency: xr.Dataset) -> Figure:
    """The panels of all lengths and layers there are, all domains together.

    Args:
        consistency: Of `moescope.consistency`.
    """
    data = schema.total(consistency)
    lengths = [length for length in data["length"].values.tolist() if np.isfinite(data["srp"].sel(length=length)).any()]
    lengths = lengths or data["length"].values.tolist()[:1]
    layers = data["layer"].values
    few = len(layers) <= MOST_LAYERS_WITH_MARKERS
    colour = domain_colours(1)[0]
    with style.style():
        handles = [
            Line2D([], [], color=colour, linewidth=1.4, marker="o", markersize=3.2),
            Line2D([], [], color=MUTED, linewidth=1.2, marker="s", markersize=2.8),
            Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (4, 3))),
        ]
        labels = ["measured", "tokens of each document in random order", "uniform routing"]
        top = style.legend_rows(3, 3) + 0.3
        figure = style.new_figure(FULL_WIDTH, top + 0.42 + 1.9)
        panels = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
        style.place(figure, left=0.5, right=0.1, top=top, bottom=0.42, between=0, rows=1)
        figure.subplots_adjust(wspace=0.12)
        for axes, length in zip(panels, lengths, strict=True):
            here = data.sel(length=length)
            srp, low, high, null, uniform = (
                100 * here[name].values for name in ("srp", "srp_low", "srp_high", "srp_null", "srp_uniform")
            )
            axes.plot(layers, uniform, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label="uniform")
            axes.plot(
                layers, null, color=MUTED, linewidth=1.2, marker="s" if few else "", markersize=2.8,
                markeredgewidth=0, label="random order",
            )  # fmt: skip
            axes.plot(
                layers, srp, color=colour, linewidth=1.4, marker="o" if few else "", markersize=3.2,
                markeredgewidth=0, label="measured",
            )  # fmt: skip
            if few:
                style.add_verticals(axes, layers.astype(float), low, high, edgecolor=colour, linewidth=0.9)
            else:
                axes.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)
            style.panel_title(axes, f"{length} tokens")
            axes.set_xlabel("Layer", labelpad=2)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
            axes.set_xlim(layers[0] - style.beside(layers), layers[-1] + style.beside(layers))
            axes.grid(axis="y")
        panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel("Best F1 of a fixed set, SRP (%)")
        style.legend_above(figure, handles, labels, columns=3)
    return figure
