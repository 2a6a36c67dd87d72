"""Distinct experts of a few tokens: a panel a layer, measured and put together in three other ways."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from moescope.measures import schema
from moescope.measures.claims import first_middle_last
from moescope.reporting.colours import INK, MUTED, domain_colours
from moescope.reporting.figures import style

MOST_PANELS = 4
"""Layers beyond which the first, the middle and the last are drawn."""


def draw_distinct(distinct: xr.Dataset, layers: Sequence[int]) -> Figure:
    """The panels of some layers of a `moescope.distinct`, all domains together."""
    layers = list(layers) if len(layers) <= MOST_PANELS else list(first_middle_last(layers))
    lines = {
        "distinct_uniform": ("uniform routing", style.UNIFORM),
        "distinct_apart": ("tokens of as many sequences", _look(INK, "^")),
        "distinct_null": ("tokens of a document in any order", _look(MUTED, "s")),
        "distinct": ("consecutive tokens", _look(domain_colours(1)[0], "o") | {"linewidth": 1.4, "markersize": 3.2}),
    }
    with style.style():
        handles = [style.line_handle(label, **look) for label, look in reversed(lines.values())]
        figure, panels = style.panels_in_row(len(layers), handles, columns=4, height=1.9)
        for axes, layer in zip(panels, layers, strict=True):
            data = schema.total(distinct).sel(layer=layer)
            for name, (label, look) in lines.items():
                axes.plot(data["length"].values, data[name].values, label=label, **look)
            low, high = (data[f"distinct_{end}"].values for end in ("low", "high"))
            style.add_verticals(axes, data["length"].values, low, high, edgecolor=domain_colours(1)[0], linewidth=0.9)
            style.panel_title(axes, f"Layer {layer}")
            _scale(axes, data["length"].values, int(data["num_experts"]))
        panels[0].set_ylabel("Distinct experts")
    return figure


def _look(colour: str, marker: str) -> dict[str, object]:
    return {"color": colour, "marker": marker, "linewidth": 1.2, "markersize": 2.8, "markeredgewidth": 0}


def _scale(axes: Axes, lengths: np.ndarray, num_experts: int) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel("Tokens", labelpad=2)
    axes.set_ylim(0, num_experts * 1.04)
    axes.grid(axis="y")
