"""The loops of prefetching: what predictors learn, and at which place of their order the needed experts stand.

Shape suffixes: T tokens, K choices a token, M predicted experts a token, E routed experts of the layer, S those of the
source layer, U units (documents, or stretches of the only one), G groups of units, F folds of units, D domains, R rows
of a table of ranks, N places in a predictor's order, from 0; at them the needed experts are added to hits_GN. An id
outside 0 .. E - 1 is a dropped assignment or a null expert: nothing is loaded for it, and it predicts nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.jit import kernel

Ids = NDArray[np.int32]
Sums = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Units(NamedTuple):
    """The units of a part.

    Attributes:
        counted_T: Tokens to learn from and to predict.
        starts_U: First row of each unit, with the number of rows at the end.
        group_U: Group of each unit.
        fold_U: Fold of each unit.
    """

    counted_T: Mask
    starts_U: Sums
    group_U: Sums
    fold_U: Sums


@kernel()
def count_popularity(ids_KT: Ids, units: Units, row_U: Sums, count_RE: Sums) -> None:
    """Add the assignments that each expert received to the row of each unit."""
    counted_T, starts_U, _, _ = units
    for u in range(row_U.size):
        for k in range(ids_KT.shape[0]):
            for t in range(starts_U[u], starts_U[u + 1]):
                e = ids_KT[k, t]
                if counted_T[t] and 0 <= e < count_RE.shape[1]:
                    count_RE[row_U[u], e] += 1


@kernel()
def count_transitions(source_KT: Ids, ids_KT: Ids, units: Units, count_FSE: NDArray[np.uint32]) -> None:
    """Add, to the fold of each unit, the pairs of an expert at the source layer and one at this layer."""
    counted_T, starts_U, _, fold_U = units
    for u in range(fold_U.size):
        for t in range(starts_U[u], starts_U[u + 1]):
            if not counted_T[t]:
                continue
            for j in range(source_KT.shape[0]):
                s = source_KT[j, t]
                if not 0 <= s < count_FSE.shape[1]:
                    continue
                for k in range(ids_KT.shape[0]):
                    e = ids_KT[k, t]
                    if 0 <= e < count_FSE.shape[2]:
                        count_FSE[fold_U[u], s, e] += 1


@kernel()
def place_by_previous(ids_KT: Ids, first_T: Mask, units: Units, rank_FE: Sums, ranked: bool, hits_GN: Sums) -> None:
    """Place the needed experts in the order: those of the token before, then the others by popularity.

    Args:
        first_T: Tokens that none comes before in their sequence; they have popularity alone.
        ranked: Whether the choices of a token come in an order; else they are taken by popularity, too.
    """
    counted_T, starts_U, group_U, fold_U = units
    num_choices, num_experts = ids_KT.shape[0], rank_FE.shape[1]
    before_K = np.empty(num_choices, np.int64)
    for u in range(group_U.size):
        rank_E = rank_FE[fold_U[u]]
        for t in range(starts_U[u], starts_U[u + 1]):
            if not counted_T[t]:
                continue
            num_before = 0
            if not first_T[t]:
                for k in range(num_choices):
                    p = np.int64(ids_KT[k, t - 1])
                    known = not 0 <= p < num_experts
                    for j in range(num_before):
                        known = known or before_K[j] == p
                    if known:
                        continue
                    place = num_before
                    if not ranked:
                        while place > 0 and rank_E[before_K[place - 1]] > rank_E[p]:
                            before_K[place] = before_K[place - 1]
                            place -= 1
                    before_K[place] = p
                    num_before += 1
            for k in range(num_choices):
                e = np.int64(ids_KT[k, t])
                if not 0 <= e < num_experts:
                    continue
                place = num_before + rank_E[e]
                for j in range(num_before):
                    if before_K[j] == e:
                        place = j
                        break
                    if rank_E[before_K[j]] < rank_E[e]:
                        place -= 1
                hits_GN[group_U[u], place] += 1


@kernel()
def place_by_transitions(
    source_KT: Ids, ids_KT: Ids, units: Units, table_FSE: NDArray[np.float32], rank_FE: Sums, hits_GN: Sums
) -> None:
    """Place the needed experts by the sum of the source experts' rows of a table, the popular first among equals."""
    counted_T, starts_U, group_U, fold_U = units
    num_experts = rank_FE.shape[1]
    score_E = np.empty(num_experts, np.float32)
    for u in range(group_U.size):
        table_SE, rank_E = table_FSE[fold_U[u]], rank_FE[fold_U[u]]
        for t in range(starts_U[u], starts_U[u + 1]):
            if not counted_T[t]:
                continue
            score_E[:] = 0
            for j in range(source_KT.shape[0]):
                s = source_KT[j, t]
                if 0 <= s < table_SE.shape[0]:
                    for e in range(num_experts):
                        score_E[e] += table_SE[s, e]
            for k in range(ids_KT.shape[0]):
                needed = ids_KT[k, t]
                if not 0 <= needed < num_experts:
                    continue
                score, rank, place = score_E[needed], rank_E[needed], 0
                for e in range(num_experts):
                    place += (score_E[e] > score) | ((score_E[e] == score) & (rank_E[e] < rank))
                hits_GN[group_U[u], place] += 1


@kernel()
def place_by_prediction(predicted_MT: Ids, ids_KT: Ids, units: Units, num_experts: int, hits_GN: Sums) -> None:
    """Place the needed experts in the recorded lists, null experts left out; those not listed have no place."""
    counted_T, starts_U, group_U, _ = units
    for u in range(group_U.size):
        for t in range(starts_U[u], starts_U[u + 1]):
            if not counted_T[t]:
                continue
            for k in range(ids_KT.shape[0]):
                needed = ids_KT[k, t]
                if not 0 <= needed < num_experts:
                    continue
                place = 0
                for m in range(predicted_MT.shape[0]):
                    e = predicted_MT[m, t]
                    if e == needed:
                        hits_GN[group_U[u], place] += 1
                        break
                    place += e < num_experts
