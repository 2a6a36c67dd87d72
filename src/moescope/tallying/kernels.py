"""The loops over tokens, compiled by numba; the unit counted is the assignment, the unit of sampling the document.

Shape suffixes: T tokens, K choices a token, E expert ids of the layer (null experts included), D domains, G documents
of the part, Q sequences of the part, M measures of repetition. C = K + 1 choices: 0 is all ranks together ("all"),
1 .. K are the ranks. Ids, rank 0 first, outside 0 .. E - 1 are dropped assignments: they add to no expert and repeat
nothing. starts_G and starts_Q are the first row of each document and sequence, with the number of rows at the end;
domain_G is the domain code of each document.

Every kernel adds to the sums it is given. The moments are sums over documents of y² and y·n, where y is what a document
counts and n what it could have counted; with Σy, Σn and Σn² they give the linearised variance of the ratio Σy / Σn.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.jit import kernel
from moescope.tallying.joint_kernels import count_two

Ids = NDArray[np.integer[Any]]
Sums = NDArray[np.int64]

FIRST, ANY, FIRST_IN_NEXT = 0, 1, 2


class LoadSums(NamedTuple):
    """Assignments that an expert received (y), Σy² and Σy·n; assignments made, that is not dropped (n), and Σn²."""

    loads_DCE: Sums
    loads_squared_DCE: Sums
    loads_by_made_DCE: Sums
    made_DC: Sums
    made_squared_DC: Sums


class RepeatSums(NamedTuple):
    """Pairs of consecutive tokens that repeat (y), Σy² and Σy·n, M as in `tally.REPEAT_KINDS`."""

    repeats_DM: Sums
    repeats_squared_DM: Sums
    repeats_by_pairs_DM: Sums


@kernel()
def count_loads(ids_KT: Ids, starts_G: Sums, domain_G: Sums, sums: LoadSums) -> None:
    """Count the assignments each expert received and the assignments made, with their document moments."""
    num_choices = ids_KT.shape[0]
    num_ids = sums.loads_DCE.shape[2]
    count_CE = np.zeros((num_choices + 1, num_ids), np.int64)
    for g in range(domain_G.size):
        count_CE[:] = 0
        for k in range(num_choices):
            for t in range(starts_G[g], starts_G[g + 1]):
                e = np.int64(ids_KT[k, t])
                if 0 <= e < num_ids:
                    count_CE[k + 1, e] += 1
        _add_document(count_CE, domain_G[g], sums)


@kernel()
def count_loads_and_pairs(ids_KT: Ids, starts_G: Sums, domain_G: Sums, sums: LoadSums, pair_DEE: Sums) -> None:
    """`count_loads` for two choices of few experts, none dropped: one increment a token in a table of pairs.

    The table, of tokens by first and second choice, has at most 16 experts.
    """
    num_ids = sums.loads_DCE.shape[2]
    count_CE = np.zeros((3, num_ids), np.int64)
    pair_EE = np.zeros((num_ids, num_ids), np.int64)
    for g in range(domain_G.size):
        start, end, d = starts_G[g], starts_G[g + 1], domain_G[g]
        pair_EE[:] = 0
        count_two(ids_KT[0, start:end], ids_KT[1, start:end], pair_EE)
        count_CE[0] = 0
        count_CE[1] = pair_EE.sum(axis=1)
        count_CE[2] = pair_EE.sum(axis=0)
        pair_DEE[d] += pair_EE
        _add_document(count_CE, d, sums)


@kernel()
def count_pairs(ids_KT: Ids, domain_T: Ids, pair_DEE: Sums) -> None:
    """Count tokens by first and second choice, any number of experts.

    A token with one dropped choice has the set {e} and is counted at (e, e); one with two is not counted.
    """
    num_ids = pair_DEE.shape[1]
    for t in range(domain_T.size):
        a, b = np.int64(ids_KT[0, t]), np.int64(ids_KT[1, t])
        if not 0 <= a < num_ids:
            a = b
        if not 0 <= b < num_ids:
            b = a
        if 0 <= a < num_ids:
            pair_DEE[domain_T[t], a, b] += 1


@kernel()
def _add_document(count_CE: Sums, d: int, sums: LoadSums) -> None:
    num_choices, num_ids = count_CE.shape
    for c in range(1, num_choices):
        for e in range(num_ids):
            count_CE[0, e] += count_CE[c, e]
    for c in range(num_choices):
        made = np.int64(0)
        for e in range(num_ids):
            made += count_CE[c, e]
        sums.made_DC[d, c] += made
        sums.made_squared_DC[d, c] += made * made
        for e in range(num_ids):
            y = count_CE[c, e]
            if y:
                sums.loads_DCE[d, c, e] += y
                sums.loads_squared_DCE[d, c, e] += y * y
                sums.loads_by_made_DCE[d, c, e] += y * made


@kernel()
def count_repeats(
    ids_KT: Ids, num_ids: int, starts_Q: Sums, document_Q: Sums, domain_G: Sums, pairs_G: Sums, sums: RepeatSums
) -> None:
    """Count the pairs of consecutive tokens of a sequence that repeat an expert, with their document moments.

    Args:
        document_Q: Document of the part that a sequence belongs to, ascending.
        pairs_G: Pairs of consecutive tokens in each document (n).
    """
    num_choices = ids_KT.shape[0]
    y_M = np.zeros(3, np.int64)
    last_E = np.full(num_ids, -2, np.int64)  # row at which an expert was last chosen
    for q in range(document_Q.size):
        for t in range(starts_Q[q], starts_Q[q + 1]):
            if t > starts_Q[q]:
                any_shared = False
                previous = np.int64(ids_KT[0, t - 1])
                first_in_next = False
                for k in range(num_choices):
                    e = np.int64(ids_KT[k, t])
                    if 0 <= e < num_ids:
                        any_shared |= last_E[e] == t - 1
                        first_in_next |= e == previous
                first = np.int64(ids_KT[0, t])
                y_M[FIRST] += first == previous and 0 <= first < num_ids
                y_M[ANY] += any_shared
                y_M[FIRST_IN_NEXT] += first_in_next
            for k in range(num_choices):
                e = np.int64(ids_KT[k, t])
                if 0 <= e < num_ids:
                    last_E[e] = t
        g = document_Q[q]
        if q + 1 == document_Q.size or document_Q[q + 1] != g:
            _add_repeats(y_M, domain_G[g], pairs_G[g], sums)


@kernel()
def count_repeats_of_two(
    ids_KT: Ids, starts_Q: Sums, document_Q: Sums, domain_G: Sums, pairs_G: Sums, sums: RepeatSums
) -> None:
    """`count_repeats` for two choices, none dropped: no branch and no table in the loop, so it runs in SIMD lanes."""
    y_M = np.zeros(3, np.int64)
    for q in range(document_Q.size):
        start, last = starts_Q[q], starts_Q[q + 1] - 1
        a, b, next_a, next_b = (
            ids_KT[0, start:last],
            ids_KT[1, start:last],
            ids_KT[0, start + 1 :],
            ids_KT[1, start + 1 :],
        )
        first = first_in_next = any_shared = np.uint32(0)  # 32 bits: twice the lanes, and a sequence is shorter
        for t in range(last - start):
            same = np.uint32(a[t] == next_a[t])
            in_next = same | np.uint32(a[t] == next_b[t])
            shared = in_next | np.uint32(b[t] == next_a[t]) | np.uint32(b[t] == next_b[t])
            first = np.uint32(first + same)
            first_in_next = np.uint32(first_in_next + in_next)
            any_shared = np.uint32(any_shared + shared)
        y_M[FIRST] += first
        y_M[ANY] += any_shared
        y_M[FIRST_IN_NEXT] += first_in_next
        g = document_Q[q]
        if q + 1 == document_Q.size or document_Q[q + 1] != g:
            _add_repeats(y_M, domain_G[g], pairs_G[g], sums)


@kernel()
def _add_repeats(y_M: Sums, d: int, pairs: int, sums: RepeatSums) -> None:
    for m in range(3):
        sums.repeats_DM[d, m] += y_M[m]
        sums.repeats_squared_DM[d, m] += y_M[m] * y_M[m]
        sums.repeats_by_pairs_DM[d, m] += y_M[m] * pairs
    y_M[:] = 0
