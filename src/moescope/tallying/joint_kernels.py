"""The loops of co-activation, transitions from layer to layer and paths, compiled by numba; the unit is the token.

Shape suffixes: T tokens, K choices a token, E expert ids of the layer, F of the next one, D documents, G groups of
documents, L layers, N sampled tokens. Ids outside 0 .. E - 1 are dropped assignments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.jit import kernel

Ids = NDArray[np.integer[Any]]
Sums = NDArray[np.int64]
Table = NDArray[np.uint32]
Hashes = NDArray[np.uint64]


@kernel()
def count_set_pairs(ids_KT: Ids, starts_D: Sums, group_D: Sums, pairs_GEE: Table) -> None:
    """Count the tokens by each pair of their experts, at (expert of the lower rank, of the higher rank).

    A token of which an assignment was dropped is left out, so that all sets have the same size.
    """
    num_choices, num_ids = ids_KT.shape[0], pairs_GEE.shape[1]
    ids_K = np.zeros(num_choices, np.int64)
    for d in range(group_D.size):
        table_EE = pairs_GEE[group_D[d]]
        for t in range(starts_D[d], starts_D[d + 1]):
            whole = True
            for k in range(num_choices):
                ids_K[k] = ids_KT[k, t]
                whole = whole and 0 <= ids_K[k] < num_ids
            if whole:
                for k in range(num_choices - 1):
                    for j in range(k + 1, num_choices):
                        table_EE[ids_K[k], ids_K[j]] += np.uint32(1)


@kernel()
def count_moves(before_KT: Ids, after_KT: Ids, starts_D: Sums, group_D: Sums, moves_GEF: Table) -> None:
    """Count the pairs of an assignment of a token at one layer and one at the next; pass one choice for the first."""
    num_before, num_after = moves_GEF.shape[1:]
    for d in range(group_D.size):
        table_EF = moves_GEF[group_D[d]]
        for k in range(before_KT.shape[0]):
            for j in range(after_KT.shape[0]):
                for t in range(starts_D[d], starts_D[d + 1]):
                    a, b = np.int64(before_KT[k, t]), np.int64(after_KT[j, t])
                    if 0 <= a < num_before and 0 <= b < num_after:
                        table_EF[a, b] += np.uint32(1)


@kernel()
def count_moves_of_few(before_KT: Ids, after_KT: Ids, starts_D: Sums, group_D: Sums, moves_GEF: Table) -> None:
    """`count_moves` for at most 16 ids at both layers, none dropped."""
    for d in range(group_D.size):
        for k in range(before_KT.shape[0]):
            for j in range(after_KT.shape[0]):
                count_two(
                    before_KT[k, starts_D[d] : starts_D[d + 1]],
                    after_KT[j, starts_D[d] : starts_D[d + 1]],
                    moves_GEF[group_D[d]],
                )


@kernel()
def count_two(a_T: Ids, b_T: Ids, table_EF: NDArray[Any]) -> None:
    """Count pairs of ids below the sides of the table, which are at most 16."""
    # Two tables in turn, so that a run of equal pairs does not wait for its own last increment.
    even, odd = np.zeros(256, np.uint32), np.zeros(256, np.uint32)
    length = a_T.size
    for t in range(0, length - 1, 2):
        even[((a_T[t] & 15) << 4) | (b_T[t] & 15)] += np.uint32(1)
        odd[((a_T[t + 1] & 15) << 4) | (b_T[t + 1] & 15)] += np.uint32(1)
    if length % 2:
        even[((a_T[length - 1] & 15) << 4) | (b_T[length - 1] & 15)] += np.uint32(1)
    for a in range(table_EF.shape[0]):
        for b in range(table_EF.shape[1]):
            table_EF[a, b] += even[a << 4 | b] + odd[a << 4 | b]


@kernel()
def extend_paths(path_N: Hashes, rows_N: Sums, first_choice_T: Ids) -> None:
    """Carry the hashes of paths on by one layer; -1, a dropped choice, is a choice of its own."""
    for n in range(path_N.size):
        path_N[n] = _mix(path_N[n] ^ np.uint64(np.int64(first_choice_T[rows_N[n]]) + 2))


@kernel()
def draw_paths(cumulative_LEF: NDArray[np.float64], path_N: Hashes, seed: int) -> None:
    """Draw first choices layer by layer, each given the one before, and set the hashes of the paths.

    Args:
        cumulative_LEF: Cumulative probabilities of the choice (F) given that of the layer before (E); at the first
            layer those of expert 0 are used. Rows without any are never reached.
        path_N: Set.
        seed: Of the draws, which depend on nothing else.
    """
    for n in range(path_N.size):
        state = _mix(np.uint64(seed) ^ _mix(np.uint64(n)))
        path, chosen = np.uint64(0), 0
        for layer in range(cumulative_LEF.shape[0]):
            state = _mix(state + np.uint64(0x9E3779B97F4A7C15))
            u = np.float64(state >> np.uint64(11)) * 2.0**-53
            low, high = 0, cumulative_LEF.shape[2] - 1
            while low < high:  # the first id whose cumulative probability is above u
                middle = (low + high) >> 1
                if cumulative_LEF[layer, chosen, middle] > u:
                    high = middle
                else:
                    low = middle + 1
            chosen = low
            path = _mix(path ^ np.uint64(chosen + 2))
        path_N[n] = path


@kernel()
def _mix(x: Any) -> Any:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), of a shifted argument so that 0 is no fixed point."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
