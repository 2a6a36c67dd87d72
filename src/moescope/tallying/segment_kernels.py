"""The loops over segments of tokens, compiled by numba; suffixes as in `kernels`.

A segment is any m consecutive tokens of one sequence, at every place. V counts activations of an expert in a segment,
0 .. m. Ids outside 0 .. E - 1 (dropped assignments, null experts) activate nothing.
"""

from __future__ import annotations

from math import exp
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer[Any]]
Sums = NDArray[np.int64]

NEGLIGIBLE = 1e-17


@numba.njit(cache=True, nogil=True)
def count_activations(ids_KT: Ids, num_ids: int, starts_Q: Sums, row_Q: Sums, length: int, at_least_RV: Sums) -> None:
    """Count the pairs of a segment and an expert by how often the expert is active in the segment.

    When the count of an expert rises from v - 1 to v as the segment moves to its place p of W, it holds for the W - p
    segments that are left until it falls again; so a token costs k additions and k subtractions, whatever E and m are.

    Args:
        ids_KT: Chosen experts.
        num_ids: E.
        starts_Q: First row of each sequence, with the number of rows at the end.
        row_Q: Row of the sums that each sequence adds to.
        length: m, tokens of a segment.
        at_least_RV: Added to: pairs with at least v activations, v from 1.
    """
    num_choices = ids_KT.shape[0]
    active_E = np.zeros(num_ids, np.int32)
    for q in range(row_Q.size):
        start, num_tokens = starts_Q[q], starts_Q[q + 1] - starts_Q[q]
        num_segments = num_tokens - length + 1
        if num_segments < 1:
            continue
        sums_V = at_least_RV[row_Q[q]]
        active_E[:] = 0
        for t in range(start, start + length):
            for k in range(num_choices):
                e = np.int64(ids_KT[k, t])
                if 0 <= e < num_ids:
                    v = active_E[e] + 1
                    active_E[e] = v
                    if v <= length:  # only a token that names an expert twice could pass it
                        sums_V[v] += num_segments
        left = num_segments
        for t in range(start + length, start + num_tokens):
            left -= 1
            for k in range(num_choices):
                e = np.int64(ids_KT[k, t - length])
                if 0 <= e < num_ids:
                    v = active_E[e]
                    active_E[e] = v - 1
                    if v <= length:
                        sums_V[v] -= left
            for k in range(num_choices):
                e = np.int64(ids_KT[k, t])
                if 0 <= e < num_ids:
                    v = active_E[e] + 1
                    active_E[e] = v
                    if v <= length:
                        sums_V[v] += left


@numba.njit(cache=True, nogil=True)
def expect_activations(
    ids_KT: Ids,
    num_ids: int,
    starts_G: Sums,
    row_G: Sums,
    segments_GM: Sums,
    lengths_M: Sums,
    offset_M: Sums,
    log_factorial: NDArray[np.float64],
    exactly_RV: NDArray[np.float64],
) -> None:
    """Expect the same, as numbers with exactly v activations, if the tokens of each document stood in random order.

    An expert that c of the N tokens chose is then active in a segment as often as a hypergeometric draw of m from N
    holds one of c, whatever the place of the segment: no permutation has to be drawn.

    Args:
        ids_KT: Chosen experts.
        num_ids: E.
        starts_G: First row of each document, with the number of rows at the end.
        row_G: Row of the sums that each document adds to.
        segments_GM: Segments of each length in each document.
        lengths_M: The lengths.
        offset_M: Where the counts of a length start in V.
        log_factorial: ln n! for n up to the longest document.
        exactly_RV: Added to: expected pairs with exactly v activations, v from 1.
    """
    count_E = np.zeros(num_ids, np.int64)
    for g in range(row_G.size):
        num_tokens = starts_G[g + 1] - starts_G[g]
        if not segments_GM[g].any():
            continue
        count_E[:] = 0
        for k in range(ids_KT.shape[0]):
            for t in range(starts_G[g], starts_G[g + 1]):
                e = np.int64(ids_KT[k, t])
                if 0 <= e < num_ids:
                    count_E[e] += 1
        for m in range(lengths_M.size):
            if segments_GM[g, m]:
                sums_V = exactly_RV[row_G[g], offset_M[m] :]
                for expert in range(num_ids):
                    chosen = min(count_E[expert], num_tokens)
                    if chosen:
                        _add_hypergeometric(num_tokens, chosen, lengths_M[m], segments_GM[g, m], log_factorial, sums_V)


@numba.njit(cache=True, nogil=True)
def _add_hypergeometric(
    total: int, chosen: int, drawn: int, times: int, log_factorial: NDArray[np.float64], sums_V: NDArray[np.float64]
) -> None:
    """Add `times` the probabilities of v of `chosen` among `drawn` of `total`, outwards from the most likely v."""
    others = total - chosen
    mode = min((drawn + 1) * (chosen + 1) // (total + 2), chosen, drawn)
    top = times * exp(
        log_factorial[chosen]
        - log_factorial[mode]
        - log_factorial[chosen - mode]
        + log_factorial[others]
        - log_factorial[drawn - mode]
        - log_factorial[others - drawn + mode]
        - log_factorial[total]
        + log_factorial[drawn]
        + log_factorial[total - drawn]
    )
    least = NEGLIGIBLE * times
    p, v = top, mode
    while p > least:
        sums_V[v] += p
        p *= (chosen - v) * (drawn - v) / ((v + 1) * (others - drawn + v + 1))
        v += 1
    p, v = top, mode
    while v > 0 and p > 0:
        p *= v * (others - drawn + v) / ((chosen - v + 1) * (drawn - v + 1))
        v -= 1
        if p <= least:
            break
        sums_V[v] += p
