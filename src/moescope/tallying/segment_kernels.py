"""The loops over segments of tokens, compiled by numba; suffixes as in `kernels`.

A segment is any m consecutive tokens of one sequence, at every place. V counts activations of an expert in a segment,
0 .. m. Ids outside 0 .. E - 1 (dropped assignments, null experts) activate nothing.
"""

from __future__ import annotations

from math import exp
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from moescope.tallying.jit import kernel

Ids = NDArray[np.integer[Any]]
Sums = NDArray[np.int64]

NEGLIGIBLE = 1e-17  # of a probability: below what a sum near 1 can hold in 64 bits


@kernel()
def count_activations(ids_KT: Ids, num_ids: int, starts_Q: Sums, row_Q: Sums, length: int, at_least_RV: Sums) -> None:
    """Count the pairs of a segment and an expert by how often the expert is active in the segment.

    When the count of an expert rises from v - 1 to v as the segment moves to its place p of W, it holds for the W - p
    segments that are left until it falls again; so a token costs k additions and k subtractions, whatever E and m are.

    Args:
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


FEW_IDS, SIXTEEN = 8, 16
"""Experts, at most, and tokens of a segment for which there is a faster way: `count_activations_in_sixteen`."""


@intrinsic
def _ones(context: Any, word: Any) -> Any:
    """Set bits of a 64-bit word: one instruction, for which numba has no name."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@kernel()
def count_activations_in_sixteen(ids_KT: Ids, num_ids: int, starts_Q: Sums, row_Q: Sums, at_least_RV: Sums) -> None:
    """`count_activations` for at most 8 experts and segments of 16 tokens.

    64 places of an expert lie in the bits of a word, and a number of each place in the bits of several, its planes. The
    activations in the 2h tokens from a place on are those in h of them and in the h that follow: an addition for 64
    places at once, in the logic of an adder. A token that names an expert twice activates it once here.
    """
    longest = 0
    for q in range(row_Q.size):
        longest = max(longest, starts_Q[q + 1] - starts_Q[q])
    num_words = (longest >> 6) + 1
    chosen_T = np.zeros(num_words << 6, np.uint8)
    bits_EW = np.zeros((8, num_words), np.uint64)
    exactly_V = np.zeros(17, np.int64)
    for q in range(row_Q.size):
        start, num_tokens = starts_Q[q], starts_Q[q + 1] - starts_Q[q]
        if num_tokens < 16:
            continue
        words = (num_tokens + 63) >> 6
        chosen_T[: words << 6] = 0
        for k in range(ids_KT.shape[0]):
            for t in range(num_tokens):
                e = np.int64(ids_KT[k, start + t])
                chosen_T[t] |= np.uint8(1 << (e & 7) if 0 <= e < num_ids else 0)
        _turn(chosen_T, words, bits_EW)
        exactly_V[:] = 0
        for expert in range(num_ids):
            _count_sixteen(bits_EW[expert, :words], num_tokens - 15, exactly_V)
        reached = 0
        for v in range(16, 0, -1):
            reached += int(exactly_V[v])
            at_least_RV[row_Q[q], v] += reached


@kernel()
def _turn(chosen_T: NDArray[np.uint8], words: int, bits_EW: NDArray[np.uint64]) -> None:
    """From a bit an expert for each token to a bit a token for each expert, 8 by 8 bits at a time.

    Source:
        Warren 2012, Hacker's Delight, section 7-3 (transposing an 8 x 8 bit matrix).
    """
    bits_EB = bits_EW.view(np.uint8)  # byte b of an expert: its tokens 8b to 8b + 7
    chosen_B = chosen_T.view(np.uint64)
    for b in range(words << 3):
        x = chosen_B[b]
        y = (x ^ (x >> np.uint64(7))) & np.uint64(0x00AA00AA00AA00AA)
        x = x ^ y ^ (y << np.uint64(7))
        y = (x ^ (x >> np.uint64(14))) & np.uint64(0x0000CCCC0000CCCC)
        x = x ^ y ^ (y << np.uint64(14))
        y = (x ^ (x >> np.uint64(28))) & np.uint64(0x00000000F0F0F0F0)
        x = x ^ y ^ (y << np.uint64(28))
        for e in range(8):
            bits_EB[e, b] = np.uint8(x >> np.uint64(8 * e))


@kernel(inline="always")
def _behind(x: Any, after: Any, by: int) -> Any:
    """The bits of the places `by` further on."""
    return (x >> np.uint64(by)) | (after << np.uint64(64 - by))


@kernel()
def _count_sixteen(bits_W: NDArray[np.uint64], num_places: int, exactly_V: Sums) -> None:
    """Add the places by how many of the 16 bits from them on are set, from 1; `a` to `d` sum 2, 4, 8 and 16 of them."""
    zero = np.uint64(0)
    x_ = a0_ = a1_ = b0_ = b1_ = b2_ = c0_ = c1_ = c2_ = c3_ = zero  # those of the word after
    for w in range(bits_W.size - 1, -1, -1):
        x = bits_W[w]
        y0 = _behind(x, x_, 1)
        a0, a1 = x ^ y0, x & y0
        y0, y1 = _behind(a0, a0_, 2), _behind(a1, a1_, 2)
        b0, carry, either = a0 ^ y0, a0 & y0, a1 ^ y1
        b1, b2 = either ^ carry, (a1 & y1) | (carry & either)
        y0, y1, y2 = _behind(b0, b0_, 4), _behind(b1, b1_, 4), _behind(b2, b2_, 4)
        c0, carry, either = b0 ^ y0, b0 & y0, b1 ^ y1
        c1, carry = either ^ carry, (b1 & y1) | (carry & either)
        either = b2 ^ y2
        c2, c3 = either ^ carry, (b2 & y2) | (carry & either)
        y0, y1, y2, y3 = _behind(c0, c0_, 8), _behind(c1, c1_, 8), _behind(c2, c2_, 8), _behind(c3, c3_, 8)
        d0, carry, either = c0 ^ y0, c0 & y0, c1 ^ y1
        d1, carry = either ^ carry, (c1 & y1) | (carry & either)
        either = c2 ^ y2
        d2, carry = either ^ carry, (c2 & y2) | (carry & either)
        either = c3 ^ y3
        d3, d4 = either ^ carry, (c3 & y3) | (carry & either)
        x_, a0_, a1_, b0_, b1_, b2_, c0_, c1_, c2_, c3_ = x, a0, a1, b0, b1, b2, c0, c1, c2, c3
        left = num_places - (w << 6)
        if left <= 0:
            continue
        inside = ~zero if left >= 64 else (np.uint64(1) << np.uint64(left)) - np.uint64(1)
        exactly_V[16] += np.int64(_ones(d4 & inside))
        inside &= ~d4
        d0 &= inside
        d1 &= inside
        low1, low2, low3, low0 = d0 & ~d1, d1 & ~d0, d0 & d1, inside & ~(d0 | d1)
        for high in range(4):
            of_high = (d3 if high & 2 else ~d3) & (d2 if high & 1 else ~d2)
            if high:
                exactly_V[4 * high] += np.int64(_ones(of_high & low0))
            exactly_V[4 * high + 1] += np.int64(_ones(of_high & low1))
            exactly_V[4 * high + 2] += np.int64(_ones(of_high & low2))
            exactly_V[4 * high + 3] += np.int64(_ones(of_high & low3))


@kernel()
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


@kernel()
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
