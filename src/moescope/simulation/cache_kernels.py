"""The loops over requests of expert caches, compiled by numba.

Legend of shape suffixes: T tokens, S steps of the decoder, L layers, K choices, N objects (experts that share a cache),
G request groups, R requests, C cells that requests are counted in, B bins of the size of a cache, V tables of values.

A request group is what is probed together: the distinct experts that a step needs in a layer. Its hits are judged
against the cache as it was before; then all of it is in the cache, and none of it may be evicted for another of it. A
group larger than the cache passes through it, and leaves there those of its experts that the policy ranks highest.
Under this rule any order of eviction that does not depend on the size gives a stack (Mattson et al. 1970): a cache of
c holds the first c of one list, whatever c is, so one pass counts the hits of all sizes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.jit import kernel

Ids = NDArray[np.integer[Any]]
Sums = NDArray[np.int64]

NEVER = 2**62
"""The group of the next use of an expert that is not used again."""

LFU, AGED, TABLE, NEXT = 0, 1, 2, 3
"""What ranks the experts: the number of uses; that, halved now and then; given tables; the next use."""


class Requests(NamedTuple):
    """The request groups of steps.

    Attributes:
        object_R: Objects requested.
        cell_R: Cell of each request, ``cell_T * L + layer``.
        starts_G: First request of each group (step, layer), with the number of requests at the end.
        fresh_G: Whether the cache is emptied before each group.
    """

    object_R: Ids
    cell_R: Sums
    starts_G: Sums
    fresh_G: NDArray[np.bool_]


@kernel()
def request_groups(ids_LKT: Ids, offset_L: Sums, starts_S: Sums, fresh_S: NDArray[np.bool_], cell_T: Sums) -> Requests:
    """The request groups of steps: for each step and layer the distinct experts, each where it is first named.

    Args:
        ids_LKT: Chosen experts of tokens in the order they are served; below 0 is none.
        offset_L: Object that is expert 0 of each layer, with the number of objects at the end.
        starts_S: First token of each step, with the number of tokens at the end.
        fresh_S: Whether the cache is emptied before each step.
        cell_T: Cell that each token's requests are counted in, before the layer is added.
    """
    num_layers, num_choices = ids_LKT.shape[0], ids_LKT.shape[1]
    object_R, cell_R = np.empty(ids_LKT.size, np.int32), np.empty(ids_LKT.size, np.int64)
    starts_G = np.empty(fresh_S.size * num_layers + 1, np.int64)
    fresh_G = np.zeros(fresh_S.size * num_layers, np.bool_)
    fresh_G[::num_layers] = fresh_S
    last_N = np.full(offset_L[-1], -1, np.int64)  # the last group that named each object
    r = g = 0
    for s in range(fresh_S.size):
        for layer in range(num_layers):
            starts_G[g] = r
            for t in range(starts_S[s], starts_S[s + 1]):
                for k in range(num_choices):
                    e = np.int64(ids_LKT[layer, k, t])
                    if e < 0:
                        continue
                    e += offset_L[layer]
                    if last_N[e] != g:
                        last_N[e] = g
                        object_R[r] = e
                        cell_R[r] = cell_T[t] * num_layers + layer
                        r += 1
            g += 1
    starts_G[g] = r
    return Requests(object_R[:r], cell_R[:r], starts_G, fresh_G)


@kernel()
def first_uses(requests: Requests, base: int, first_N: Sums) -> None:
    """Lower `first_N` to the group, counted from `base`, that first uses each object."""
    object_R, _, starts_G, _ = requests
    for g in range(starts_G.size - 1):
        for r in range(starts_G[g], starts_G[g + 1]):
            if first_N[object_R[r]] > base + g:
                first_N[object_R[r]] = base + g


@kernel()
def next_uses(requests: Requests, base: int, after_N: Sums) -> Sums:
    """The group that next uses the object of each request; `after_N` holds what follows these groups, and is changed
    to the first uses from their start on.
    """
    object_R, _, starts_G, _ = requests
    next_R = np.empty(object_R.size, np.int64)
    for g in range(starts_G.size - 2, -1, -1):
        for r in range(starts_G[g], starts_G[g + 1]):
            next_R[r] = after_N[object_R[r]]
        for r in range(starts_G[g], starts_G[g + 1]):
            after_N[object_R[r]] = base + g
    return next_R


class LruStack(NamedTuple):
    """A cache as a stack of its objects, the one that is evicted last at the top; all changed.

    Attributes:
        state: Time, objects on the stack, steps since the last halving, table in use (-1: none).
        last_N: When each object was last used; for `lru_distances` from 1, 0 for never.
        value_N: By what objects are ranked.
        order_N: The stack.
        place_N: Place of each object on it, -1 for none.
        counts_CB: Added to: bin b for a cache of (b + 1) * L objects, the last for objects that were never there.
    """

    state: Sums
    last_N: Sums
    value_N: Sums
    order_N: Sums
    place_N: Sums
    counts_CB: Sums

    @classmethod
    def empty(cls, num_objects: int, rows: int, num_bins: int) -> LruStack:
        """A stack that holds nothing."""
        last_N, value_N, order_N = np.zeros((3, num_objects), np.int64)
        place_N = np.full(num_objects, -1, np.int64)
        state = np.array([0, 0, 0, -1], np.int64)
        return cls(state, last_N, value_N, order_N, place_N, np.zeros((rows, num_bins), np.int64))


@kernel()
def lru_distances(requests: Requests, layers: int, stack: LruStack) -> None:
    """Count requests by the size at which an LRU cache would just hold them.

    The distance of an object is the number of objects used after it; comparing all times of last use takes one sweep
    that the processor does several at a time, and needs no list to be kept in order.

    Args:
        layers: Layers that share the cache: groups a step, and objects a bin.
        stack: Changed: the time, the times of last use, and the counts.
    """
    object_R, cell_R, starts_G, fresh_G = requests
    last_N, counts_CB = stack.last_N, stack.counts_CB
    num_objects, never = last_N.size, counts_CB.shape[1] - 1
    now = max(1, stack.state[0])
    for g in range(starts_G.size - 1):
        if fresh_G[g]:
            last_N[:] = 0
        start, end = starts_G[g], starts_G[g + 1]
        for r in range(start, end):
            time = last_N[object_R[r]]
            if time == 0:
                counts_CB[cell_R[r], never] += 1
            else:
                distance = 0
                for n in range(num_objects):
                    distance += last_N[n] > time
                if layers > 1:
                    distance //= layers
                counts_CB[cell_R[r], distance] += 1
        for r in range(start, end):
            last_N[object_R[r]] = now + end - 1 - r  # the first choice is the last to go
        now += end - start
    stack.state[0] = now


class Tables(NamedTuple):
    """What `TABLE` ranks by.

    Attributes:
        value_VN: Values of the objects, by table.
        row_T: Table that goes with each token; the values of a step are the sum over its tokens.
        starts_S: First token of each step, with the number of tokens at the end.
    """

    value_VN: Sums
    row_T: Sums
    starts_S: Sums


@kernel()
def stack_distances(
    kind: int, requests: Requests, layers: int, next_R: Sums, tables: Tables, ageing: int, stack: LruStack
) -> None:
    """Count requests by the size at which a cache that ranks its experts by `kind` would just hold them.

    Evicted is, of the experts that are not being served, the one of the smallest value; of equals, the one used longer
    ago. With `NEXT`, whose value is the next group that uses the expert, negated, this is Belady's rule for groups:
    optimal, as the group of the next use is when the expert must be there again.

    Args:
        kind: LFU, AGED, TABLE or NEXT.
        layers: As of `lru_distances`.
        next_R: For NEXT: group of the next use.
        tables: For TABLE.
        ageing: For AGED: steps after which all counts are halved, rounded down.
    """
    object_R, cell_R, starts_G, fresh_G = requests
    state, last_N, value_N, order_N, place_N, counts_CB = stack
    table_VN, row_T, tokens_S = tables
    num_objects, never = last_N.size, counts_CB.shape[1] - 1
    inside_N = np.zeros(num_objects, np.bool_)
    spare = np.empty(num_objects + 1, np.int64)
    now, length, steps, row = state[0], state[1], state[2], state[3]
    for g in range(starts_G.size - 1):
        if fresh_G[g]:
            place_N[:] = -1
            length = 0
            if kind != TABLE:
                value_N[:] = 0
        if kind == TABLE and g % layers == 0:
            s = g // layers
            first, end_T = tokens_S[s], tokens_S[s + 1]
            if end_T - first > 1:
                value_N[:] = 0
                for t in range(first, end_T):
                    value_N += table_VN[row_T[t]]
                row = -1
            elif row_T[first] != row:
                row = row_T[first]
                value_N[:] = table_VN[row]
        start, end = starts_G[g], starts_G[g + 1]
        size = end - start
        unseen = 0
        for r in range(start, end):
            e = object_R[r]
            place = place_N[e]
            inside_N[e] = True
            if place < 0:
                unseen += 1
                counts_CB[cell_R[r], never] += 1
            else:
                counts_CB[cell_R[r], place // layers] += 1
        for r in range(start, end):
            e = object_R[r]
            last_N[e] = now + end - 1 - r
            if kind in (LFU, AGED):
                value_N[e] += 1
            elif kind == NEXT:
                value_N[e] = -next_R[r]
        now += size
        num_spare = 0
        for p in range(min(size, length)):
            e = order_N[p]
            if not inside_N[e]:
                spare[num_spare] = e
                num_spare += 1
        for i in range(size):  # the group, sorted, at the top
            e = object_R[start + i]
            p = i
            while p > 0 and _before(e, order_N[p - 1], value_N, last_N):
                order_N[p] = order_N[p - 1]
                p -= 1
            order_N[p] = e
        for p in range(size):
            place_N[order_N[p]] = p
        p = size
        while num_spare > 0:
            if p < length:
                e = order_N[p]
                if not inside_N[e]:
                    spare[num_spare] = e
                    num_spare += 1
            best = 0
            for i in range(1, num_spare):
                if _before(spare[i], spare[best], value_N, last_N):
                    best = i
            order_N[p] = spare[best]
            place_N[spare[best]] = p
            num_spare -= 1
            spare[best] = spare[num_spare]
            p += 1
        length += unseen
        for r in range(start, end):
            inside_N[object_R[r]] = False
        if kind == AGED and g % layers == layers - 1:
            steps += 1
            if steps == ageing:
                steps = 0
                for n in range(num_objects):
                    value_N[n] >>= 1
    state[0], state[1], state[2], state[3] = now, length, steps, row


@kernel()
def _before(a: int, b: int, value_N: Sums, last_N: Sums) -> bool:
    """Whether object a is kept rather than b."""
    return value_N[a] > value_N[b] or (value_N[a] == value_N[b] and last_N[a] > last_N[b])


class FifoQueues(NamedTuple):
    """An S3-FIFO cache of one size; all but the capacity changed.

    Attributes:
        capacity: Objects the cache holds. The small queue's share is a tenth of it, rounded down, but at least 1.
        state: Lengths of the small, the main and the ghost queue.
        where_N: 0 nowhere, 1 small, 2 main, 3 ghost.
        uses_N: Hits since the object came, up to 3.
        small_N: The queue, its tail first; as the two that follow.
    """

    capacity: int
    state: Sums
    where_N: Sums
    uses_N: Sums
    small_N: Sums
    main_N: Sums
    ghost_N: Sums
    hits_C: Sums

    @classmethod
    def empty(cls, capacity: int, num_objects: int, rows: int) -> FifoQueues:
        """A cache that holds nothing."""
        where_N, uses_N = np.zeros((2, num_objects), np.int64)
        state, hits_C = np.zeros(3, np.int64), np.zeros(rows, np.int64)
        small_N, main_N, ghost_N = np.zeros((3, capacity + 1), np.int64)
        return cls(capacity, state, where_N, uses_N, small_N, main_N, ghost_N, hits_C)


@kernel()
def s3_fifo_hits(requests: Requests, queues: FifoQueues) -> None:
    """Count the hits of an S3-FIFO cache of one size.

    A new expert enters the small queue, or the main one if it is a ghost. Before that the small queue gives way if it
    holds its share or more, else the main one. An expert that leaves the small queue goes on to the main one, its uses
    forgotten, if it was hit more than once since it came, else it is evicted and a ghost; one that leaves the main
    queue is put back at its head with one use fewer as long as it has one. An expert being served is put back as it is.
    Ghosts are the last evicted from the small queue, as many as the main queue's share.

    Source:
        Yang et al. 2023, FIFO queues are all you need for cache eviction, algorithm 1; what is served stays, and the
        least small queue, are ours.
    """
    object_R, cell_R, starts_G, fresh_G = requests
    capacity, state, where_N, uses_N, small_N, main_N, ghost_N, hits_C = queues
    share = max(1, capacity // 10)
    most_ghosts = max(1, capacity - share)
    num_small, num_main, num_ghosts = state[0], state[1], state[2]
    served_N = np.zeros(where_N.size, np.bool_)
    for g in range(starts_G.size - 1):
        if fresh_G[g]:
            where_N[:] = 0
            num_small = num_main = num_ghosts = 0
        start, end = starts_G[g], starts_G[g + 1]
        kept = served_small = served_main = 0
        for r in range(start, end):
            e = object_R[r]
            if where_N[e] == 1 or where_N[e] == 2:
                hits_C[cell_R[r]] += 1
                uses_N[e] = min(3, uses_N[e] + 1)
                served_N[e] = True
                kept += 1
                if where_N[e] == 1:
                    served_small += 1
                else:
                    served_main += 1
        for r in range(start, end):
            e = object_R[r]
            if served_N[e] or kept == capacity:
                continue
            kept += 1
            while num_small + num_main == capacity:
                others_small, others_main = num_small - served_small, num_main - served_main
                if others_main == 0 or (others_small > 0 and num_small >= share):
                    x = _take(small_N, 0, num_small)
                    num_small -= 1
                    if served_N[x]:
                        small_N[num_small] = x
                        num_small += 1
                    elif uses_N[x] > 1:
                        where_N[x], uses_N[x] = 2, 0
                        main_N[num_main] = x
                        num_main += 1
                    else:
                        if num_ghosts == most_ghosts:
                            where_N[_take(ghost_N, 0, num_ghosts)] = 0
                            num_ghosts -= 1
                        ghost_N[num_ghosts] = x
                        num_ghosts += 1
                        where_N[x] = 3
                else:
                    x = _take(main_N, 0, num_main)
                    num_main -= 1
                    if served_N[x] or uses_N[x] > 0:
                        if not served_N[x]:
                            uses_N[x] -= 1
                        main_N[num_main] = x
                        num_main += 1
                    else:
                        where_N[x] = 0
            if where_N[e] == 3:
                place = 0
                while ghost_N[place] != e:
                    place += 1
                _take(ghost_N, place, num_ghosts)
                num_ghosts -= 1
                main_N[num_main] = e
                num_main += 1
                where_N[e] = 2
                served_main += 1
            else:
                small_N[num_small] = e
                num_small += 1
                where_N[e] = 1
                served_small += 1
            uses_N[e] = 0
            served_N[e] = True
        for r in range(start, end):
            served_N[object_R[r]] = False
    state[0], state[1], state[2] = num_small, num_main, num_ghosts


@kernel()
def _take(queue_N: Sums, place: int, length: int) -> int:
    """Take an object out of a queue of so many; those after it move up."""
    taken = queue_N[place]
    for i in range(place, length - 1):
        queue_N[i] = queue_N[i + 1]
    return taken


class Library(NamedTuple):
    """Activation matrices of some documents of each fold, F folds of M documents over N objects.

    Attributes:
        unit_FNM: Loads scaled to unit length, in units of 2**-20.
        found_F: Documents there are.
        value_VN: Tables of values: for each fold M documents' loads and then those of the whole fold.
    """

    unit_FNM: Sums
    found_F: Sums
    value_VN: Sums


@kernel()
def match_sequences(ids_LKT: Ids, offset_L: Sums, starts_Q: Sums, fold_Q: Sums, library: Library) -> Sums:
    """For each token which of the matrices of other documents is the most like its sequence so far.

    Likeness is the cosine of the loads by layer and expert, of the tokens before this one against a document's.

    Args:
        ids_LKT: As of `request_groups`, as `offset_L`.
        starts_Q: First token of each sequence, with the number of tokens at the end.
        fold_Q: Fold of the corpus whose documents each sequence is matched with.
        library: Those documents.
    Returns:
        ``fold * (M + 1) + document`` of each token; M for none, before there is anything to match.
    """
    library_FNM, found_F = library.unit_FNM, library.found_F
    row_T = np.empty(ids_LKT.shape[2], np.int64)
    num_layers, num_choices = ids_LKT.shape[0], ids_LKT.shape[1]
    most = library_FNM.shape[2]
    likeness_M = np.zeros(most, np.int64)
    for q in range(fold_Q.size):
        likeness_M[:] = 0
        fold = fold_Q[q]
        seen = False
        for t in range(starts_Q[q], starts_Q[q + 1]):
            best = most
            if seen and found_F[fold]:
                best = 0
                for m in range(1, found_F[fold]):
                    if likeness_M[m] > likeness_M[best]:
                        best = m
            row_T[t] = fold * (most + 1) + best
            for layer in range(num_layers):
                for k in range(num_choices):
                    e = np.int64(ids_LKT[layer, k, t])
                    if e >= 0:
                        likeness_M += library_FNM[fold, e + offset_L[layer]]
                        seen = True
    return row_T
