"""The loops of load balance, compiled by numba; the unit counted is the assignment.

Shape suffixes: T tokens, K choices a token, E expert ids (routed, then null), Q sequences, S sizes of batches, X groups
of documents (all domains one after the other), B bins of a histogram, W statistics of the gate weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.jit import kernel

Ids = NDArray[np.integer[Any]]
Sums = NDArray[np.int64]

BINS_PER_E = 200
"""Bins of the histogram of imbalances: each half a per cent wide."""

FIXED = 2**20
"""Sums of imbalances are whole numbers of this fraction, so that the order of adding changes nothing."""

WEIGHT_FIXED = 2**30
WEIGHT_BINS = 200


class BatchSums(NamedTuple):
    """The sums of the batches of a layer, all added to, as in `balance.BalanceCounts`.

    Tables of tokens without bins count none: the tokens of a batch are the same at all layers.
    """

    imbalances_SB: Sums
    imbalance_S: Sums
    imbalance_squared_S: Sums
    tokens_SB: Sums
    token_sums_SB: Sums


@kernel()
def count_sequences(
    ids_KT: Ids,
    starts_Q: Sums,
    group_Q: Sums,
    first_sequence: int,
    sizes_S: Sums,
    num_experts: int,
    loads_XE: Sums,
    sums: BatchSums,
    edges_S2E: Sums,
    edge_sequences_S2: Sums,
) -> None:
    """Count loads by group of documents, and the imbalance of every batch that lies whole in the part.

    Args:
        starts_Q: First row of each sequence, with the number of rows at the end.
        group_Q: Group of each sequence.
        first_sequence: Number of the part's first sequence in the whole trace; batches are counted from there.
        sizes_S: Sequences a batch.
        num_experts: Routed experts; only they have a balance.
        loads_XE: Added to.
        sums: Added to.
        edges_S2E: Set: loads, with the tokens in the last column, of the batch that began in an earlier part, and of
            the one that goes on in the next.
        edge_sequences_S2: Set: sequences of the same; 0 if there is none.
    """
    num_ids = loads_XE.shape[1]
    num_sizes = sizes_S.size
    count_E = np.zeros(num_ids + 1, np.int64)
    open_SE = np.zeros((num_sizes, num_ids + 1), np.int64)
    held_S = np.zeros(num_sizes, np.int64)
    early_S = np.zeros(num_sizes, np.bool_)
    edges_S2E[:] = 0
    edge_sequences_S2[:] = 0
    for s in range(num_sizes):
        early_S[s] = first_sequence % sizes_S[s] != 0
    for q in range(group_Q.size):
        count_E[:] = 0
        for k in range(ids_KT.shape[0]):
            for t in range(starts_Q[q], starts_Q[q + 1]):
                e = np.int64(ids_KT[k, t])
                if 0 <= e < num_ids:
                    count_E[e] += 1
        count_E[num_ids] = starts_Q[q + 1] - starts_Q[q]
        x = group_Q[q]
        for i in range(num_ids):
            loads_XE[x, i] += count_E[i]
        for s in range(num_sizes):
            for i in range(num_ids + 1):
                open_SE[s, i] += count_E[i]
            held_S[s] += 1
            if (first_sequence + q + 1) % sizes_S[s] == 0:
                if early_S[s]:
                    edges_S2E[s, 0] = open_SE[s]
                    edge_sequences_S2[s, 0] = held_S[s]
                else:
                    finish_batch(open_SE[s], num_experts, s, sums)
                open_SE[s] = 0
                held_S[s] = 0
                early_S[s] = False
    for s in range(num_sizes):
        if held_S[s]:
            side = 0 if early_S[s] else 1
            edges_S2E[s, side] = open_SE[s]
            edge_sequences_S2[s, side] = held_S[s]


@kernel()
def finish_batch(loads_E: Sums, num_experts: int, s: int, sums: BatchSums) -> None:
    """Note the imbalance of a batch of the s-th size; one without assignment to a routed expert has none."""
    total = largest = 0
    for e in range(num_experts):
        total += int(loads_E[e])
        largest = max(largest, int(loads_E[e]))
    if sums.tokens_SB.size:
        tokens = loads_E[loads_E.size - 1]
        bin = min(int(np.log(max(tokens, 1)) * 32), sums.tokens_SB.shape[1] - 1)
        sums.tokens_SB[s, bin] += 1
        sums.token_sums_SB[s, bin] += tokens
    if total:
        value = largest * num_experts / total
        sums.imbalances_SB[s, min(int(np.log(value) * BINS_PER_E), sums.imbalances_SB.shape[1] - 1)] += 1
        sums.imbalance_S[s] += np.int64(np.rint(value * FIXED))
        sums.imbalance_squared_S[s] += np.int64(np.rint(value * value * FIXED))


@kernel()
def count_weights(
    ids_KT: Ids,
    weights_KT: NDArray[np.float32],
    num_ids: int,
    group_Q: Sums,
    starts_Q: Sums,
    sums_XW: Sums,
    tokens_X: Sums,
    histogram_WB: Sums,
) -> None:
    """Sum three statistics of the gate weights of each token, normalised to 1 over its choices that ran.

    They are the largest, the largest less the second largest, and the entropy in bits. A token of which nothing ran, or
    whose weights are negative, not finite or all zero, has none.

    Args:
        sums_XW: Added to, in units of 1 / WEIGHT_FIXED.
        tokens_X: Added to: tokens with statistics.
        histogram_WB: Added to: tokens by statistic; the last bin ends at 1, for the entropy at log2 of the choices.
    """
    num_choices = ids_KT.shape[0]
    most_bits = max(np.log2(num_choices), 1e-9)
    for q in range(group_Q.size):
        x = group_Q[q]
        for t in range(starts_Q[q], starts_Q[q + 1]):
            total = first = second = 0.0
            sound = True
            for k in range(num_choices):
                e = np.int64(ids_KT[k, t])
                if 0 <= e < num_ids:
                    w = np.float64(weights_KT[k, t])
                    if not 0.0 <= w < np.inf:
                        sound = False
                    total += w
                    if w > first:
                        second = first
                        first = w
                    elif w > second:
                        second = w
            if not (sound and total > 0.0):
                continue
            entropy = 0.0
            for k in range(num_choices):
                e = np.int64(ids_KT[k, t])
                if 0 <= e < num_ids and weights_KT[k, t] > 0:
                    p = np.float64(weights_KT[k, t]) / total
                    entropy -= p * np.log2(p)
            first /= total
            margin = first - second / total
            entropy = max(entropy, 0.0)
            sums_XW[x, 0] += np.int64(np.rint(first * WEIGHT_FIXED))
            sums_XW[x, 1] += np.int64(np.rint(margin * WEIGHT_FIXED))
            sums_XW[x, 2] += np.int64(np.rint(entropy * WEIGHT_FIXED))
            tokens_X[x] += 1
            last = WEIGHT_BINS - 1
            histogram_WB[0, min(int(first * WEIGHT_BINS), last)] += 1
            histogram_WB[1, min(int(margin * WEIGHT_BINS), last)] += 1
            histogram_WB[2, min(int(entropy / most_bits * WEIGHT_BINS), last)] += 1
