"""The loops over the occurrences of token ids, compiled by numba; the unit is the token.

Shape suffixes: T tokens; K choices a token; R rows, the tokens of the ids in question in the order of (id, group of
documents, place in the text); X ids; G groups of documents; E expert ids; N places of a list; P pairs of an id and an
expert. A token chose an expert if it is among its K choices; -1 is no choice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.jit import kernel

Ids = NDArray[np.integer[Any]]
Rows = NDArray[np.int32]
Sums = NDArray[np.int64]
Numbers = NDArray[np.float64]

MOMENTS = 6
"""Over documents: tokens that chose the expert y, tokens with a choice n, y², y·n, n², documents."""


@kernel()
def sort_rows(x_T: Rows, group_T: Rows, num_values: int, num_groups: int) -> tuple[Sums, Rows]:
    """Rows in the order of (value, group, place).

    Args:
        x_T: Place of the token's id among those in question; -1 for none.
        group_T: Group of the token's document.
    Returns:
        First row of each (id, group), one id after the other, with R at the end; and the tokens.
    """
    starts = np.zeros(num_values * num_groups + 1, np.int64)
    for t in range(x_T.size):
        if x_T[t] >= 0:
            starts[x_T[t] * num_groups + group_T[t] + 1] += 1
    for i in range(1, starts.size):
        starts[i] += starts[i - 1]
    free = starts[:-1].copy()
    rows_R = np.empty(starts[-1], np.int32)
    for t in range(x_T.size):
        if x_T[t] >= 0:
            key = x_T[t] * num_groups + group_T[t]
            rows_R[free[key]] = t
            free[key] += 1
    return starts, rows_R


@kernel()
def gather(ids_KT: Ids, rows_R: Rows, ids_RK: Ids) -> None:
    """Set the choices of the rows, which are then read one after another."""
    for r in range(rows_R.size):
        for k in range(ids_KT.shape[0]):
            ids_RK[r, k] = ids_KT[k, rows_R[r]]


@kernel()
def count_ids(
    ids_RK: Ids,
    starts: Sums,
    num_groups: int,
    sums_E: Numbers,
    ids_E: Sums,
    delta_GE: Numbers,
    dropped_GE: Sums,
    best_EN: Rows,
    best_share_EN: Numbers,
    best_count_EN: Sums,
) -> tuple[float, int]:
    """For each id the expert that most of its tokens chose, the same without each group, and each expert's best ids.

    Of several such experts the one with the lowest number counts; of ids with equal shares in a list, the more
    frequent, then the earlier.

    Args:
        sums_E: Added to, at the expert that most tokens of an id chose: their share.
        ids_E: Added to, at the same: ids.
        delta_GE: Added to, at the same: what the share changes if the group is left out; less the share if nothing is
            left of the id.
        dropped_GE: Added to, at the same: ids of which nothing is left without the group.
        best_EN: Set: ids with the largest shares of each expert, -1 where there are no more.
        best_share_EN: Set: these shares.
        best_count_EN: Set: tokens of the id that chose the expert.
    Returns:
        Σ over ids of the share of its tokens that chose the expert which most of its tokens in the *other* groups did;
        and the number of ids that have such.
    """
    num_ids = sums_E.size
    count_E = np.zeros(num_ids, np.int64)
    own_GE = np.zeros((num_groups, num_ids), np.int64)
    own_G = np.zeros(num_groups, np.int64)
    best_EN[:] = -1
    best_share_EN[:] = 0.0
    best_count_EN[:] = 0
    held_out, num_held_out = 0.0, 0
    for x in range((starts.size - 1) // num_groups):
        starts_G = starts[x * num_groups : (x + 1) * num_groups + 1]
        n = 0
        for g in range(num_groups):
            own_G[g] = _count(ids_RK, starts_G[g], starts_G[g + 1], own_GE[g], count_E)
            n += own_G[g]
        if n == 0:
            continue
        top = int(np.argmax(count_E))
        for e in range(num_ids):
            if count_E[e] > 0:
                _place(best_EN[e], best_share_EN[e], best_count_EN[e], x, count_E[e] / n, count_E[e])
        share = count_E[top] / n
        sums_E[top] += share
        ids_E[top] += 1
        hits, judged = 0, 0
        for g in range(num_groups):
            own_E, own = own_GE[g], own_G[g]
            if own == n:
                delta_GE[g, top] -= share
                dropped_GE[g, top] += 1
            elif own:
                other = top
                if own_E[top]:  # otherwise the top stays the top
                    for e in range(num_ids):
                        lead = (count_E[e] - own_E[e]) - (count_E[other] - own_E[other])
                        if lead > 0 or (lead == 0 and e < other):
                            other = e
                delta_GE[g, top] += (count_E[other] - own_E[other]) / (n - own) - share
                hits += own_E[other]
                judged += own
            _clear(ids_RK, starts_G[g], starts_G[g + 1], own_E)
        if judged:
            held_out += hits / judged
            num_held_out += 1
        count_E[:] = 0
    return held_out, num_held_out


@kernel()
def top_shares(ids_RK: Ids, starts: Sums, num_groups: int, sums_E: Numbers, ids_E: Sums) -> None:
    """The part of `count_ids` that its null needs: Σ of the largest share of each id, at the expert that has it."""
    num_ids = sums_E.size
    count_E = np.zeros(num_ids, np.int64)
    unused_E = np.zeros(num_ids, np.int64)
    for x in range((starts.size - 1) // num_groups):
        n = _count(ids_RK, starts[x * num_groups], starts[(x + 1) * num_groups], unused_E, count_E)
        if n == 0:
            continue
        top = int(np.argmax(count_E))  # of several the first
        sums_E[top] += count_E[top] / n
        ids_E[top] += 1
        count_E[:] = 0


@kernel()
def pair_moments(
    ids_KT: Ids, rows_R: Rows, starts: Sums, num_groups: int, document_T: Rows, x_P: Sums, e_P: Sums, moments_P6: Sums
) -> None:
    """Set the moments over documents of how often the tokens of an id chose an expert; see `MOMENTS`."""
    moments_P6[:] = 0
    for p in range(x_P.size):
        y, n, document = 0, 0, -1
        for r in range(starts[x_P[p] * num_groups], starts[(x_P[p] + 1) * num_groups]):
            t = rows_R[r]
            if document_T[t] != document:
                _add_document(moments_P6[p], y, n)
                y, n, document = 0, 0, document_T[t]
            made = False
            for k in range(ids_KT.shape[0]):
                e = np.int64(ids_KT[k, t])
                if e >= 0:
                    made = True
                if e == e_P[p]:
                    y += 1
            n += made
        _add_document(moments_P6[p], y, n)


@kernel()
def count_choices(ids_KT: Ids, id_T: Sums, chosen_E: Sums) -> int:
    """Add up which experts the tokens with an id chose; the number of such tokens with a choice."""
    n = 0
    for t in range(id_T.size):
        if id_T[t] < 0:
            continue
        made = False
        for k in range(ids_KT.shape[0]):
            e = np.int64(ids_KT[k, t])
            if e >= 0:
                chosen_E[e] += 1
                made = True
        n += made
    return n


@kernel(inline="always")
def _count(ids_RK: Ids, first: int, end: int, one_E: Sums, other_E: Sums) -> int:
    """Add the choices of some rows to both counts; the number of tokens with a choice."""
    n = 0
    for r in range(first, end):
        made = False
        for k in range(ids_RK.shape[1]):
            e = np.int64(ids_RK[r, k])
            if e >= 0:
                one_E[e] += 1
                other_E[e] += 1
                made = True
        n += made
    return n


@kernel(inline="always")
def _clear(ids_RK: Ids, first: int, end: int, count_E: Sums) -> None:
    """Set to zero what some rows have counted."""
    if end - first > count_E.size:
        count_E[:] = 0
        return
    for r in range(first, end):
        for k in range(ids_RK.shape[1]):
            e = np.int64(ids_RK[r, k])
            if e >= 0:
                count_E[e] = 0


@kernel(inline="always")
def _add_document(moments: Sums, y: int, n: int) -> None:
    if n:
        moments[0] += y
        moments[1] += n
        moments[2] += y * y
        moments[3] += y * n
        moments[4] += n * n
        moments[5] += 1


@kernel()
def _place(best_N: Rows, share_N: Numbers, count_N: Sums, x: int, share: float, count: int) -> None:
    """Put an id into a list that is in order, if it is good enough."""
    last = best_N.size - 1
    if last < 0 or share < share_N[last] or (share == share_N[last] and count <= count_N[last]):
        return
    n = last
    while n > 0 and (share > share_N[n - 1] or (share == share_N[n - 1] and count > count_N[n - 1])):
        best_N[n], share_N[n], count_N[n] = best_N[n - 1], share_N[n - 1], count_N[n - 1]
        n -= 1
    best_N[n], share_N[n], count_N[n] = x, share, count
