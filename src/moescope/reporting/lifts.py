"""Pairs that go together more or less often than independence makes them: which are listed, and how they are marked."""

from __future__ import annotations

import numpy as np

MOST_LISTED = 5
"""Pairs at either end that a table lists; the frame has all."""


def extremes(lift: np.ndarray, found: np.ndarray) -> list[tuple[int, int]]:
    """The found cells with the largest lifts, then those with the smallest, each once."""
    cells = [(int(i), int(j)) for i, j in np.argwhere(found & np.isfinite(lift))]
    cells.sort(key=lambda cell: -float(lift[cell]))
    if len(cells) <= 2 * MOST_LISTED:
        return cells
    return [*cells[:MOST_LISTED], *cells[-MOST_LISTED:]]


def about_map(experts: int, most_with_numbers: int) -> str:
    """How a map of pairs marks what is sure."""
    return "; bold: surely not 1 (false discovery rate 5 %)" if experts <= most_with_numbers else ", experts clustered"
