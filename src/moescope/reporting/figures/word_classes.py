"""Divergence of each word class from the other tokens of its documents, a map of class by layer."""

from __future__ import annotations

import xarray as xr
from matplotlib.figure import Figure

from moescope.reporting.figures.divergence import draw_map
from moescope.reporting.tables import SIGNIFICANT


def draw_word_classes(syntax: xr.Dataset) -> Figure:
    """The map of all layers of a `moescope.syntax`; classes without a token are left out."""
    data = syntax.transpose("word_class", "layer").sel(word_class=syntax["tokens"].values > 0)
    differs = data["jsd_q"].values < SIGNIFICANT
    return draw_map(data["word_class"].values.tolist(), data["layer"].values, data["jsd"].values, differs)
