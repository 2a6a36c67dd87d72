"""The loops over tokens of two traces at once, compiled by numba; suffixes as in `kernels`, A and B the two traces."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.jit import kernel

Ids = NDArray[np.integer[Any]]
Sums = NDArray[np.int64]

BLOCK = 2048
"""Tokens handled together: short loops of one comparison each run in SIMD lanes, and the block stays in the cache."""


@kernel()
def count_shared(a_KT: Ids, b_KT: Ids, shared_T: NDArray[np.uint8]) -> None:
    """Count the experts that each token was sent to in both traces.

    Args:
        a_KT: Choices in the first trace; negative = dropped.
        b_KT: Choices in the second trace.
        shared_T: Set to the size of the intersection of the two sets of choices.
    """
    found = np.zeros(BLOCK, np.uint8)
    for start in range(0, shared_T.size, BLOCK):
        size = min(BLOCK, shared_T.size - start)
        shared = shared_T[start : start + size]
        shared[:] = 0
        for j in range(b_KT.shape[0]):
            b = b_KT[j, start : start + size]
            found[:size] = 0
            for i in range(a_KT.shape[0]):
                a = a_KT[i, start : start + size]
                for t in range(size):
                    found[t] |= np.uint8(a[t] == b[t])
            for i in range(j):  # an expert named twice is one expert
                earlier = b_KT[i, start : start + size]
                for t in range(size):
                    found[t] &= np.uint8(earlier[t] != b[t])
            for t in range(size):
                shared[t] += found[t] & np.uint8(b[t] >= 0)


@kernel()
def count_changes(a_KT: Ids, b_KT: Ids, starts_G: Sums, domain_G: Sums, sums_6DE: Sums) -> None:
    """Count the loads in both traces and the moments of their difference by document.

    Args:
        a_KT: Choices in the first trace; ids outside 0 .. E - 1 are dropped.
        b_KT: Choices in the second trace.
        starts_G: First row of each document, with the number of rows at the end, shape (G + 1,).
        domain_G: Domain code of each document.
        sums_6DE: Added to: tokens by the choice of rank 0 in the first trace; in the second; assignments of all ranks
            in the first; in the second; Σ over documents of (load in the second - load in the first)²; and of that
            difference times the tokens of the document.
    """
    num_ids = sums_6DE.shape[2]
    load_2E = np.zeros((2, num_ids), np.int64)
    for g in range(domain_G.size):
        start, end, d = starts_G[g], starts_G[g + 1], domain_G[g]
        load_2E[:] = 0
        _count_side(a_KT, start, end, load_2E[0], sums_6DE[0, d])
        _count_side(b_KT, start, end, load_2E[1], sums_6DE[1, d])
        for expert in range(num_ids):
            change = load_2E[1, expert] - load_2E[0, expert]
            sums_6DE[2, d, expert] += load_2E[0, expert]
            sums_6DE[3, d, expert] += load_2E[1, expert]
            sums_6DE[4, d, expert] += change * change
            sums_6DE[5, d, expert] += change * (end - start)


@kernel()
def _count_side(ids_KT: Ids, start: int, end: int, load_E: Sums, first_E: Sums) -> None:
    """Add the choices of a document to the loads, and those of rank 0 to the first choices."""
    for k in range(ids_KT.shape[0]):
        for t in range(start, end):
            e = np.int64(ids_KT[k, t])
            if 0 <= e < load_E.size:
                load_E[e] += 1
        if k == 0:
            first_E += load_E


@kernel()
def weigh_shared(
    a_KT: Ids, b_KT: Ids, weights_KT: NDArray[np.float32], kept_T: NDArray[np.float64], margin_T: NDArray[np.float64]
) -> None:
    """Weigh what each token shares by the gate weights of the first trace.

    Args:
        a_KT: Choices in the first trace.
        b_KT: Choices in the second trace.
        weights_KT: Gate weights in the first trace.
        kept_T: Set to the part of the token's gate weight that lies on experts of the second trace, too; NaN where the
            weights do not add up to a positive number.
        margin_T: Set to (w0 - w1) / (w0 + w1) of the first two; NaN where there are none.
    """
    num_choices = a_KT.shape[0]
    for t in range(kept_T.size):
        total = shared = 0.0
        for i in range(num_choices):
            e = a_KT[i, t]
            if e >= 0:
                weight = np.float64(weights_KT[i, t])
                total += weight
                for j in range(b_KT.shape[0]):
                    if b_KT[j, t] == e:
                        shared += weight
                        break
        kept_T[t] = shared / total if 0 < total < np.inf else np.nan
        margin_T[t] = np.nan
        if num_choices > 1 and a_KT[0, t] >= 0 and a_KT[1, t] >= 0:
            first, second = np.float64(weights_KT[0, t]), np.float64(weights_KT[1, t])
            if 0 < first + second < np.inf:
                margin_T[t] = (first - second) / (first + second)
