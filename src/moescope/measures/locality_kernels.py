"""The loops over pairs of tokens at any distance, compiled by numba; the unit is the pair of tokens of one sequence.

Shape suffixes: T tokens, K choices, W words of 64 bits, G documents, Q sequences, A lags, R draws, N lengths of runs,
S 2 kinds (FIRST: the same first choice; ANY: the sets share an expert), I 2 classes of pairs (0: of different token
ids, 1: of equal ones).

order_T are the tokens sorted by group or id, then place, bounds_V where each of those starts, with T at the end;
starts_G and starts_Q likewise the first rows of documents and sequences.

A null is a rule that draws stand-ins for the two tokens of a pair; what they share is what the pair would share anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.measures.explain_kernels import draw_below
from moescope.tallying.jit import kernel

Ids = NDArray[np.integer[Any]]
Sums = NDArray[np.int64]
Rows = NDArray[np.int32]
Masks = NDArray[np.uint64]
State = NDArray[np.uint64]

FIRST, ANY = 0, 1


@kernel()
def set_masks(ids_KT: Ids, num_ids: int, mask_TW: Masks) -> None:
    """Set the bit of each chosen expert; a dropped assignment has none."""
    for k in range(ids_KT.shape[0]):
        for t in range(ids_KT.shape[1]):
            e = np.int64(ids_KT[k, t])
            if 0 <= e < num_ids:
                mask_TW[t, e >> 6] |= np.uint64(1) << np.uint64(e & 63)


@kernel()
def count_lags(
    first_T: Rows, mask_TW: Masks, starts_Q: Sums, document_Q: Sums, lag_A: Sums, repeat_GAS: Sums, pair_GA: Sums
) -> None:
    """Add, for each document and lag, the pairs of tokens so far apart and those that repeat."""
    for q in range(document_Q.size):
        g, start, end = document_Q[q], starts_Q[q], starts_Q[q + 1]
        for a in range(lag_A.size):
            lag = lag_A[a]
            if lag >= end - start:
                continue
            first = shared = 0
            for t in range(start, end - lag):
                first += first_T[t] == first_T[t + lag] and first_T[t] >= 0
                shared += _share(mask_TW, t, t + lag)
            repeat_GAS[g, a, FIRST] += first
            repeat_GAS[g, a, ANY] += shared
            pair_GA[g, a] += end - start - lag


@kernel()
def count_neighbours(
    first_T: Rows, mask_TW: Masks, value_T: Rows, starts_Q: Sums, document_Q: Sums, repeat_GIS: Sums, pair_GI: Sums
) -> None:
    """Add, for each document, its pairs of neighbours and those that repeat, by whether their token ids are equal."""
    for q in range(document_Q.size):
        g = document_Q[q]
        for t in range(starts_Q[q], starts_Q[q + 1] - 1):
            equal = np.int64(value_T[t] == value_T[t + 1])
            pair_GI[g, equal] += 1
            repeat_GIS[g, equal, FIRST] += first_T[t] == first_T[t + 1] and first_T[t] >= 0
            repeat_GIS[g, equal, ANY] += _share(mask_TW, t, t + 1)


@kernel()
def count_stand_ins(
    first_T: Rows, mask_TW: Masks, left_RT: Rows, right_RT: Rows, document_T: Rows, value_T: Rows, repeat_GIS: Sums
) -> None:
    """Add, for each document, the draws in which the stand-ins of a pair of neighbours repeat.

    Args:
        left_RT: Stand-in of each token as the earlier of a pair; -1 where it begins none.
        right_RT: Stand-in of the token after it.
    """
    for r in range(left_RT.shape[0]):
        for t in range(first_T.size - 1):
            a, b = left_RT[r, t], right_RT[r, t]
            if a >= 0:
                g, equal = document_T[t], np.int64(value_T[t] == value_T[t + 1])
                repeat_GIS[g, equal, FIRST] += first_T[a] == first_T[b] and first_T[a] >= 0
                repeat_GIS[g, equal, ANY] += _share(mask_TW, a, b)


@kernel()
def count_sharing(mask_TW: Masks, other_RT: Rows, document_T: Rows, sharing_G: Sums) -> None:
    """Add, for each document, the draws in which a token shares an expert with the token drawn for it."""
    for r in range(other_RT.shape[0]):
        for t in range(document_T.size):
            if other_RT[r, t] >= 0:
                sharing_G[document_T[t]] += _share(mask_TW, t, other_RT[r, t])


@kernel()
def count_equal_firsts(first_T: Rows, starts_G: Sums, num_ids: int, equal_G: Sums) -> None:
    """Add, for each document, its ordered pairs of different tokens with one first choice, at any distance."""
    load_E = np.zeros(num_ids, np.int64)
    for g in range(starts_G.size - 1):
        for t in range(starts_G[g], starts_G[g + 1]):
            if first_T[t] >= 0:
                equal_G[g] += 2 * load_E[first_T[t]]
                load_E[first_T[t]] += 1
        for t in range(starts_G[g], starts_G[g + 1]):
            if first_T[t] >= 0:
                load_E[first_T[t]] = 0


@kernel()
def draw_others(group_T: Rows, order_T: Rows, bounds_V: Sums, state: State, other_RT: Rows) -> None:
    """Draw for each token another token of its group; -1 where there is none."""
    place_T = np.empty(order_T.size, np.int64)
    for place in range(order_T.size):
        place_T[order_T[place]] = place
    for r in range(other_RT.shape[0]):
        for t in range(group_T.size):
            start, end = bounds_V[group_T[t]], bounds_V[group_T[t] + 1]
            if end - start < 2:
                other_RT[r, t] = -1
                continue
            place = start + draw_below(state, end - start - 1)
            other_RT[r, t] = order_T[place + (place >= place_T[t])]


@kernel()
def draw_same_ids(
    value_T: Rows,
    document_T: Rows,
    order_T: Rows,
    bounds_V: Sums,
    starts_Q: Sums,
    state: State,
    left_RT: Rows,
    right_RT: Rows,
) -> int:
    """Draw for the two tokens of each pair of neighbours tokens with the same ids in other documents.

    Two equal ids get two different tokens. An id that no other document holds gets any token of the others: what is not
    known of a word is what is known of all.

    Args:
        value_T: Id of each token, from 0.
        left_RT: Set to the stand-in of the earlier token, -1 where a token begins no pair.
        right_RT: Set to that of the later one.
    Returns:
        Number of pairs of which both ids occur elsewhere.
    """
    num_tokens = value_T.size
    # Where, in `order_T`, the tokens with this token's id in its own document begin and end.
    own_start_T, own_end_T = np.empty(num_tokens, np.int64), np.empty(num_tokens, np.int64)
    start = 0
    while start < num_tokens:
        end = start + 1
        t = order_T[start]
        while end < num_tokens and value_T[order_T[end]] == value_T[t] and document_T[order_T[end]] == document_T[t]:
            end += 1
        for i in range(start, end):
            own_start_T[order_T[i]], own_end_T[order_T[i]] = start, end
        start = end
    document_start = np.zeros(document_T[num_tokens - 1] + 2, np.int64)
    for t in range(num_tokens):
        document_start[document_T[t] + 1] = t + 1
    known = np.int64(0)
    left_RT[:] = -1
    right_RT[:] = -1
    for q in range(starts_Q.size - 1):
        for t in range(starts_Q[q], starts_Q[q + 1] - 1):
            equal = value_T[t] == value_T[t + 1]
            elsewhere = [np.int64(0), np.int64(0)]
            for i in range(2):
                x = value_T[t + i]
                elsewhere[i] = bounds_V[x + 1] - bounds_V[x] - (own_end_T[t + i] - own_start_T[t + i])
            needed = 2 if equal else 1
            known += elsewhere[0] >= needed and elsewhere[1] >= needed
            g = document_T[t]
            others = num_tokens - (document_start[g + 1] - document_start[g])
            if others < 2:
                continue
            for r in range(left_RT.shape[0]):
                taken = np.int64(-1)
                for i in range(2):
                    x = value_T[t + i]
                    if elsewhere[i] >= needed:
                        exclude = taken >= 0 and equal
                        u = draw_below(state, elsewhere[i] - exclude)
                        u += exclude and u >= taken
                        place = bounds_V[x] + u
                        if place >= own_start_T[t + i]:
                            place += own_end_T[t + i] - own_start_T[t + i]
                        row = np.int64(order_T[place])
                    else:
                        exclude = taken >= 0 and elsewhere[0] < needed
                        u = draw_below(state, others - exclude)
                        u += exclude and u >= taken
                        row = u
                        if row >= document_start[g]:
                            row += document_start[g + 1] - document_start[g]
                    if i == 0:
                        taken = u
                        left_RT[r, t] = row
                    else:
                        right_RT[r, t] = row
    return int(known)


@kernel()
def count_runs(first_T: Rows, starts_Q: Sums, document_Q: Sums, run_N: Sums, runs_G: Sums, tokens_G: Sums) -> None:
    """Add the runs of equal first choices by length (the last: or longer) and by document, and their tokens."""
    for q in range(document_Q.size):
        g, length = document_Q[q], 0
        for t in range(starts_Q[q], starts_Q[q + 1]):
            if first_T[t] < 0:
                length = 0
                continue
            length += 1
            tokens_G[g] += 1
            if t + 1 == starts_Q[q + 1] or first_T[t + 1] != first_T[t]:
                run_N[min(length, run_N.size) - 1] += 1
                runs_G[g] += 1
                length = 0


@kernel(inline="always")
def _share(mask_TW: Masks, a: int, b: int) -> bool:
    shared = np.uint64(0)
    for w in range(mask_TW.shape[1]):
        shared |= mask_TW[a, w] & mask_TW[b, w]
    return shared != 0
