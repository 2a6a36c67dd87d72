"""Pairs that go together more or less often than independence makes them: which are listed, and how they are marked."""

from __future__ import annotations

import numpy as np
import xarray as xr

from moescope.reporting import figures

MOST_LISTED = 5
"""Pairs at either end that a table lists; the frame has all."""


def extremes(lift: np.ndarray, differs: np.ndarray) -> list[tuple[int, int]]:
    """Of the pairs that differ those with the largest lifts, then those with the smallest, each once."""
    pairs = [(int(i), int(j)) for i, j in np.argwhere(differs & np.isfinite(lift))]
    pairs.sort(key=lambda pair: -float(lift[pair]))
    if len(pairs) <= 2 * MOST_LISTED:
        return pairs
    return [*pairs[:MOST_LISTED], *pairs[-MOST_LISTED:]]


def about_map(result: xr.Dataset) -> str:
    """How a map of pairs marks what differs significantly."""
    few = int(result["num_ids"].max()) <= figures.joint.MOST_WITH_NUMBERS
    return "; bold: significantly different from 1 (false discovery rate 5 %)" if few else ", experts clustered"
