"""The loops of expert parallelism, compiled by numba; the units are the assignment and the token.

Shape suffixes: T tokens of a part, R their rows in the order of batches, K choices a token, E routed experts, P
placements, C replicas of an expert, D devices, G cells of documents, X domains, Q bins of positions, J capacity factors
and one more, B bins of a histogram, N batches, M batches of a profile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.jit import kernel

Ids = NDArray[np.integer[Any]]
Sums = NDArray[np.int64]
Table = NDArray[np.int32]

BINS_PER_E = 200
"""Bins of the histograms of over-subscription: each half a per cent wide."""


class TokenCells(NamedTuple):
    """Where the rows of a part are counted.

    Attributes:
        group_T: Group of documents of each row.
        domain_T: Its domain.
        position_T: The bin of its position.
    """

    group_T: Ids
    domain_T: Ids
    position_T: Ids


class LayerSums(NamedTuple):
    """All added to: the sums of a layer of `batch_counts.BatchCounts`, then of `batch_counts.BatchRows`."""

    histogram_PB: Sums
    largest_PG: Sums
    made_G: Sums
    reached_PG2: Sums
    tokens_G: Sums
    dropped_XGJ: Sums
    dropped_QGJ: Sums
    loads_I: Sums
    largest_PN: Sums
    made_N: Sums


@kernel()
def count_batches(
    ids_KT: Ids,
    rows_R: Sums,
    size: int,
    num_experts: int,
    cells: TokenCells,
    device_PEC: Table,
    replicas_PE: Table,
    num_devices: int,
    devices_a_node: int,
    drops_I: Sums,
    sums: LayerSums,
) -> None:
    """Count one layer of the batches of a part.

    Args:
        ids_KT: Chosen experts; what is no routed expert (dropped, null) loads no device.
        rows_R: Rows in the order of batches.
        size: Tokens a batch.
        device_PEC: Device of each replica of each expert.
        replicas_PE: Replicas of each expert. Its assignments within a batch are dealt out to them in turn, in the order
            of tokens and, of a token, of rank.
        devices_a_node: Devices of a node; nodes hold consecutive ones.
        drops_I: Capacity factors that drop an assignment before which so many went to the same expert in the batch.
    """
    group_T, domain_T, position_T = cells
    histogram_PB, largest_PG, made_G, reached_PG2, tokens_G, dropped_XGJ, dropped_QGJ = sums[:7]
    loads_I, largest_PN, made_N = sums[7:]
    num_choices, num_placements = ids_KT.shape[0], replicas_PE.shape[0]
    expert_KS = np.empty((num_choices, size), np.int32)
    before_KS = np.empty((num_choices, size), np.int64)
    load_E = np.zeros(num_experts, np.int64)
    load_D = np.zeros(num_devices, np.int64)
    seen_D = np.full(num_devices, -1, np.int64)
    seen_node = np.full(num_devices // devices_a_node, -1, np.int64)
    stamp = 0
    last = drops_I.size - 1
    for n in range(rows_R.size // size):
        rows = rows_R[n * size : (n + 1) * size]
        load_E[:] = 0
        made = 0
        for s in range(size):
            t = rows[s]
            g, x, q = group_T[t], domain_T[t], position_T[t]
            tokens_G[g] += 1
            for k in range(num_choices):
                e = int(ids_KT[k, t])
                if not 0 <= e < num_experts:
                    expert_KS[k, s] = -1
                    continue
                expert_KS[k, s] = e
                before = load_E[e]
                before_KS[k, s] = before
                load_E[e] = before + 1
                made += 1
                made_G[g] += 1
                j = drops_I[min(before, last)]
                dropped_XGJ[x, g, j] += 1
                dropped_QGJ[q, g, j] += 1
        made_N[n] += made
        for e in range(num_experts):
            loads_I[min(load_E[e], loads_I.size - 1)] += 1
        if not made:
            continue
        for p in range(num_placements):
            load_D[:] = 0
            plain = True
            for e in range(num_experts):
                count = replicas_PE[p, e]
                if count == 1:
                    load_D[device_PEC[p, e, 0]] += load_E[e]
                else:
                    plain = False
                    for c in range(count):
                        load_D[device_PEC[p, e, c]] += (load_E[e] - c + count - 1) // count
            busiest = np.argmax(load_D)
            largest = load_D[busiest]
            largest_PN[p, n] += largest
            value = largest * num_devices / made
            histogram_PB[p, min(int(np.log(value) * BINS_PER_E), histogram_PB.shape[1] - 1)] += 1
            for s in range(size):
                g = group_T[rows[s]]
                stamp += 1
                devices = nodes = on_busiest = 0
                for k in range(num_choices):
                    e = expert_KS[k, s]
                    if e < 0:
                        continue
                    c = 0
                    if not plain:
                        count = replicas_PE[p, e]
                        if count > 1:
                            c = before_KS[k, s] % count
                    device = device_PEC[p, e, c]
                    on_busiest += device == busiest
                    if seen_D[device] != stamp:
                        seen_D[device] = stamp
                        devices += 1
                        node = device // devices_a_node
                        if seen_node[node] != stamp:
                            seen_node[node] = stamp
                            nodes += 1
                largest_PG[p, g] += on_busiest
                reached_PG2[p, g, 0] += devices
                reached_PG2[p, g, 1] += nodes


@kernel()
def count_loads(ids_KT: Ids, cell_T: Sums, loads_XE: Sums) -> None:
    """Add the loads of the routed experts, by cell."""
    for k in range(ids_KT.shape[0]):
        for t in range(ids_KT.shape[1]):
            e = np.int64(ids_KT[k, t])
            if 0 <= e < loads_XE.shape[1]:
                loads_XE[cell_T[t], e] += 1


@kernel()
def count_pairs(ids_KT: Ids, fold_T: Ids, pairs_2EE: NDArray[np.uint32]) -> None:
    """Add for each token each pair of its experts, in both orders."""
    num_experts = pairs_2EE.shape[1]
    for t in range(ids_KT.shape[1]):
        for k in range(ids_KT.shape[0]):
            i = np.int64(ids_KT[k, t])
            if 0 <= i < num_experts:
                for other in range(k):
                    j = np.int64(ids_KT[other, t])
                    if 0 <= j < num_experts:
                        pairs_2EE[fold_T[t], i, j] += 1
                        pairs_2EE[fold_T[t], j, i] += 1


@kernel()
def draw_uniform(num_tokens: int, top_k: int, num_ids: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Tokens with `top_k` distinct ids drawn uniformly, shape (K, T); of any order, by Floyd's algorithm.

    Source:
        Bentley and Floyd 1987, Programming pearls: a sample of brilliance.
    """
    ids_KT = np.empty((top_k, num_tokens), np.int32)
    for t in range(num_tokens):
        for k in range(top_k):
            largest = num_ids - top_k + k
            e = int(rng.random() * (largest + 1))
            for earlier in range(k):
                if ids_KT[earlier, t] == e:
                    e = largest
                    break
            ids_KT[k, t] = e
    return ids_KT


@kernel()
def bring_together(
    pairs_EE: NDArray[np.float64],
    load_E: NDArray[np.float64],
    loads_ME: NDArray[np.float64],
    device_E: Sums,
    near_DD: NDArray[np.float64],
    slack: float,
) -> None:
    """Swap experts between devices until no swap brings more co-activated pairs near each other.

    A swap is allowed if it raises neither Σ over batches of the largest load of a device above what it was at the
    start, nor the load of a device over all batches above the largest at the start, or above the mean and some slack.
    Experts are tried in turn, each with its best allowed partner; every swap gains, so it ends.

    Args:
        pairs_EE: Tokens with both experts.
        load_E: Loads over all batches.
        loads_ME: Loads of some batches.
        device_E: Device of each expert; changed.
        near_DD: What a pair on two devices saves: 2 if they are one, 1 on one node, else 0.
        slack: Part of the mean load.
    """
    num_experts, num_devices = device_E.size, near_DD.shape[0]
    num_batches = loads_ME.shape[0]
    saved_ED = np.zeros((num_experts, num_devices))  # what an expert saves on each device, others where they are
    for i in range(num_experts):
        for j in range(num_experts):
            if i != j:
                for d in range(num_devices):
                    saved_ED[i, d] += near_DD[d, device_E[j]] * pairs_EE[i, j]
    load_MD = np.zeros((num_batches, num_devices))
    for m in range(num_batches):
        for e in range(num_experts):
            load_MD[m, device_E[e]] += loads_ME[m, e]
    top_M3 = np.zeros((num_batches, 3), np.int64)  # the three most loaded devices
    bound = 0.0
    for m in range(num_batches):
        _find_top(load_MD[m], top_M3[m])
        bound += load_MD[m, top_M3[m, 0]]
    bound *= 1 + 1e-12  # sums of whole numbers; for the rounding of fractions
    load_D = np.zeros(num_devices)
    for e in range(num_experts):
        load_D[device_E[e]] += load_E[e]
    most = max(load_D.max(), load_D.mean() * (1 + slack))
    changed = True
    while changed:
        changed = False
        for i in range(num_experts):
            a = device_E[i]
            best, partner = 1e-9, -1
            for j in range(num_experts):
                b = device_E[j]
                if a == b:
                    continue
                moved = load_E[j] - load_E[i]
                if load_D[a] + moved > most or load_D[b] - moved > most:
                    continue
                gain = saved_ED[i, b] - saved_ED[i, a] + saved_ED[j, a] - saved_ED[j, b]
                gain -= pairs_EE[i, j] * (near_DD[a, a] + near_DD[b, b] - 2 * near_DD[a, b])
                if gain > best and _sum_of_largest(loads_ME, load_MD, top_M3, i, a, j, b, bound) <= bound:
                    best, partner = gain, j
            if partner < 0:
                continue
            b = device_E[partner]
            device_E[i], device_E[partner] = b, a
            for e in range(num_experts):
                for d in range(num_devices):
                    if e != i:
                        saved_ED[e, d] += (near_DD[d, b] - near_DD[d, a]) * pairs_EE[e, i]
                    if e != partner:
                        saved_ED[e, d] += (near_DD[d, a] - near_DD[d, b]) * pairs_EE[e, partner]
            load_D[a] += load_E[partner] - load_E[i]
            load_D[b] -= load_E[partner] - load_E[i]
            for m in range(num_batches):
                moved = loads_ME[m, partner] - loads_ME[m, i]
                load_MD[m, a] += moved
                load_MD[m, b] -= moved
                _find_top(load_MD[m], top_M3[m])
            changed = True


@kernel()
def _find_top(load_D: NDArray[np.float64], top_3: Sums) -> None:
    """The three most loaded devices, -1 where there are fewer."""
    top_3[:] = -1
    for d in range(load_D.size):
        at = 3
        while at > 0 and (top_3[at - 1] < 0 or load_D[d] > load_D[top_3[at - 1]]):
            at -= 1
        for later in range(2, at, -1):
            top_3[later] = top_3[later - 1]
        if at < 3:
            top_3[at] = d


@kernel()
def _sum_of_largest(
    loads_ME: NDArray[np.float64],
    load_MD: NDArray[np.float64],
    top_M3: Sums,
    i: int,
    a: int,
    j: int,
    b: int,
    bound: float,
) -> float:
    """Σ over batches of the largest load if experts i on device a and j on b were swapped; it stops above the bound."""
    total = 0.0
    for m in range(load_MD.shape[0]):
        moved = loads_ME[m, j] - loads_ME[m, i]
        largest = max(load_MD[m, a] + moved, load_MD[m, b] - moved)
        for at in range(3):
            d = top_M3[m, at]
            if d >= 0 and d != a and d != b:
                largest = max(largest, load_MD[m, d])
                break
        total += largest
        if total > bound:
            break
    return total
