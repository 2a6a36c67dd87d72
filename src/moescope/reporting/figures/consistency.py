"""Local routing consistency by layer, a panel a segment length, beside random order and uniform routing."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from moescope.measures import schema
from moescope.reporting.colours import MUTED, domain_colours
from moescope.reporting.figures import style
from moescope.reporting.figures.style import MOST_LAYERS_WITH_MARKERS


def draw_consistency(consistency: xr.Dataset) -> Figure:
    """The panels of all lengths and layers of a `moescope.consistency`, all domains together."""
    data = schema.total(consistency)
    lengths = [length for length in data["length"].values.tolist() if np.isfinite(data["srp"].sel(length=length)).any()]
    lengths = lengths or data["length"].values.tolist()[:1]
    layers = data["layer"].values
    few = len(layers) <= MOST_LAYERS_WITH_MARKERS
    colour = domain_colours(1)[0]
    with style.style():
        handles = [
            style.line_handle("measured", color=colour, linewidth=1.4, marker="o", markersize=3.2),
            style.line_handle(
                "tokens of each document in random order", color=MUTED, linewidth=1.2, marker="s", markersize=2.8
            ),
            style.line_handle("uniform routing", **style.UNIFORM),
        ]
        figure, panels = style.panels_in_row(len(lengths), handles, columns=3, height=1.9, sharey=True)
        figure.subplots_adjust(wspace=0.12)
        for axes, length in zip(panels, lengths, strict=True):
            percent = 100 * data.sel(length=length)
            axes.plot(layers, percent["srp_uniform"].values, **style.UNIFORM, label="uniform")
            measured, null = percent["srp"].values, percent["srp_null"].values
            style.add_marked(axes, layers, null, MUTED, "s" if few else "", markersize=2.8, label="random order")
            style.add_marked(axes, layers, measured, colour, "o" if few else "", linewidth=1.4, label="measured")
            style.add_spread(axes, layers, percent["srp_low"].values, percent["srp_high"].values, colour, 0.18)
            style.panel_title(axes, f"{length} tokens")
            style.layer_ticks(axes, 6)
            axes.set_xlim(layers[0] - style.beside(layers), layers[-1] + style.beside(layers))
        panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel("Best F1 of a fixed set, SRP (%)")
    return figure
