"""The loops that measure how much a source says about a choice, compiled by numba; the unit is the (token, choice).

A source gives each row a value x, a choice an expert e; -1 in either leaves the row out. Shape suffixes: R rows, whole
documents one after another; G documents; X values of the source; E expert ids; A strengths of shrinkage.

A value's experts are predicted as (count(x, e) + a·p(e)) / (count(x) + a): what was seen with the value, shrunk to the
popularity p of the experts as if `a` more rows had been seen. starts_G is the first row of each document, with R at the
end; joint_XE counts all rows, value_X and load_E are its margins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.jit import kernel

FACTORS_A_LOGARITHM = 16
"""Factors multiplied before one logarithm is taken of them: each lies within 2^±36, a double within 2^±1022."""

Rows = NDArray[np.int32]
Counts = NDArray[np.int32]
Sums = NDArray[np.int64]
Numbers = NDArray[np.float64]


@kernel()
def count_joint(x_R: Rows, e_R: Rows, joint_XE: Counts) -> None:
    """Add the rows to a table of values by experts."""
    for r in range(x_R.size):
        if x_R[r] >= 0 and e_R[r] >= 0:
            joint_XE[x_R[r], e_R[r]] += 1


@kernel()
def information(x_R: Rows, e_R: Rows, xlogx: Numbers, joint_XE: Counts, value_X: Counts, load_E: Counts) -> float:
    """Plug-in mutual information of the rows, bits.

    Args:
        xlogx: c·log2(c) for c = 0 … R.
        joint_XE: Workspace, all zero before and after; so are the next two.
        value_X: Workspace.
        load_E: Workspace.
    """
    n = _count_own(x_R, e_R, 0, x_R.size, joint_XE, value_X, load_E)
    joint = value = load = 0.0
    for r in range(x_R.size):  # over the rows, not the tables, which may be far larger
        x, e = x_R[r], e_R[r]
        if x >= 0 and e >= 0 and joint_XE[x, e] > 0:
            joint += xlogx[joint_XE[x, e]]
            joint_XE[x, e] = 0
            value += xlogx[value_X[x]]
            value_X[x] = 0
            load += xlogx[load_E[e]]
            load_E[e] = 0
    return (joint - value - load + xlogx[n]) / n if n else 0.0


@kernel()
def bits_by_strength(
    x_R: Rows,
    e_R: Rows,
    starts_G: Sums,
    joint_XE: Counts,
    value_X: Sums,
    load_E: Sums,
    step: int,
    strength_A: Numbers,
    fitted_A: Numbers,
    held_out_A: Numbers,
) -> int:
    """Bits that each strength of shrinkage saves: predicted from all documents, and from all others.

    Args:
        step: Leave out each so-manieth document; the other documents are only counted.
        strength_A: Strengths to try.
        fitted_A: Added to: bits predicted from all documents.
        held_out_A: Added to: bits predicted from the others.
    Returns:
        Rows predicted.
    """
    own_XE, own_X, own_E = _workspace(joint_XE)
    fitted_product_A, held_out_product_A = np.ones(strength_A.size), np.ones(strength_A.size)
    total = load_E.sum()
    rows = 0
    for g in range(0, starts_G.size - 1, step):
        n = _count_own(x_R, e_R, starts_G[g], starts_G[g + 1], own_XE, own_X, own_E)
        for r in range(starts_G[g], starts_G[g + 1]):
            x, e = x_R[r], e_R[r]
            if x < 0 or e < 0 or n == total:
                continue
            p = _popularity(load_E[e] - own_E[e], total - n)
            rows += 1
            lift, seen = joint_XE[x, e] * (total / load_E[e]), value_X[x]
            lift_elsewhere, seen_elsewhere = (joint_XE[x, e] - own_XE[x, e]) / p, value_X[x] - own_X[x]
            for a in range(strength_A.size):
                fitted_product_A[a] *= (lift + strength_A[a]) / (seen + strength_A[a])
                held_out_product_A[a] *= (lift_elsewhere + strength_A[a]) / (seen_elsewhere + strength_A[a])
            if rows % FACTORS_A_LOGARITHM == 0:
                _take_logarithms(fitted_product_A, fitted_A)
                _take_logarithms(held_out_product_A, held_out_A)
        _clear_own(x_R, e_R, starts_G[g], starts_G[g + 1], own_XE, own_X, own_E)
    _take_logarithms(fitted_product_A, fitted_A)
    _take_logarithms(held_out_product_A, held_out_A)
    return rows


@kernel()
def bits_by_document(
    x_R: Rows,
    e_R: Rows,
    starts_G: Sums,
    joint_XE: Counts,
    value_X: Sums,
    load_E: Sums,
    strength: float,
    fitted_G: Numbers,
    held_out_G: Numbers,
    rows_G: Sums,
) -> None:
    """Bits that knowing the value saves in each document: predicted from all documents, and from all others.

    Args:
        fitted_G: Set to: the document's bits predicted from all documents, itself among them.
        held_out_G: Set to: the same predicted from the other documents.
        rows_G: Set to: rows of the document that count.
    """
    own_XE, own_X, own_E = _workspace(joint_XE)
    total = load_E.sum()
    for g in range(starts_G.size - 1):
        n = _count_own(x_R, e_R, starts_G[g], starts_G[g + 1], own_XE, own_X, own_E)
        fitted = held_out = 0.0
        fitted_product = held_out_product = 1.0
        factors = 0
        for r in range(starts_G[g], starts_G[g + 1]):
            x, e = x_R[r], e_R[r]
            if x < 0 or e < 0:
                continue
            with_e = joint_XE[x, e]
            fitted_product *= (with_e * (total / load_E[e]) + strength) / (value_X[x] + strength)
            if n < total:
                p = _popularity(load_E[e] - own_E[e], total - n)
                others = value_X[x] - own_X[x]
                held_out_product *= ((with_e - own_XE[x, e]) / p + strength) / (others + strength)
            factors += 1
            if factors % FACTORS_A_LOGARITHM == 0 or factors == n:
                fitted += np.log2(fitted_product)
                held_out += np.log2(held_out_product)
                fitted_product = held_out_product = 1.0
        fitted_G[g], held_out_G[g], rows_G[g] = fitted, held_out, n
        _clear_own(x_R, e_R, starts_G[g], starts_G[g + 1], own_XE, own_X, own_E)


@kernel()
def count_moments(e_R: Rows, starts_G: Sums, squared_E: Sums, by_made_E: Sums) -> int:
    """Add, over documents, the squares of how often each expert was chosen, and its products with all that was chosen.

    Returns:
        Σ of the squares of all that was chosen.
    """
    own_E = np.zeros(squared_E.size, np.int64)
    made_squared = 0
    for g in range(starts_G.size - 1):
        made = 0
        for r in range(starts_G[g], starts_G[g + 1]):
            if e_R[r] >= 0:
                own_E[e_R[r]] += 1
                made += 1
        made_squared += made * made
        for r in range(starts_G[g], starts_G[g + 1]):
            e = e_R[r]
            if e >= 0 and own_E[e] > 0:
                squared_E[e] += own_E[e] * own_E[e]
                by_made_E[e] += own_E[e] * made
                own_E[e] = 0
    return made_squared


@kernel()
def shuffle_within(starts_G: Sums, order_T: Rows, state: NDArray[np.uint64]) -> None:
    """Permute the rows of each document, in place (Fisher and Yates)."""
    for g in range(starts_G.size - 1):
        start = starts_G[g]
        for last in range(starts_G[g + 1] - start - 1, 0, -1):
            other = draw_below(state, last + 1)
            order_T[start + last], order_T[start + other] = order_T[start + other], order_T[start + last]


@kernel()
def rotate_within(starts_G: Sums, x_T: Rows, order_T: Rows, state: NDArray[np.uint64]) -> None:
    """Set the order to that of the text, each document rotated so that its ends meet at a random change of the value.

    There the value of neighbours differs anyway. Anywhere else the seam would cut a run of one value in two, which the
    text never does, and choices that last would look tied to the value. A document's first row counts as a change: as
    it stands it is one of its rotations.
    """
    for g in range(starts_G.size - 1):
        start, end = starts_G[g], starts_G[g + 1]
        changes = 1
        for t in range(start + 1, end):
            changes += x_T[t] != x_T[t - 1]
        seam, left = start, draw_below(state, changes)
        while left > 0:
            seam += 1
            left -= x_T[seam] != x_T[seam - 1]
        for t in range(start, end):
            order_T[t] = t + start - seam if t >= seam else t + end - seam


@kernel(inline="always")
def draw_below(state: NDArray[np.uint64], bound: int) -> int:
    """A random whole number from 0 to bound - 1 (splitmix64; its own state, so threads do not share one).

    The high 32 bits are scaled, so a bound far below 2**32 is hit without a bias that could be seen.
    """
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return int(((z >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@kernel()
def _take_logarithms(product_A: Numbers, sum_A: Numbers) -> None:
    """Add the logarithms of the products, and begin new ones."""
    for a in range(product_A.size):
        sum_A[a] += np.log2(product_A[a])
        product_A[a] = 1.0


@kernel(inline="always")
def _popularity(load: int, total: int) -> float:
    """Share of an expert; one never seen has that of half a row, so that nothing is impossible."""
    return load / total if load > 0 else 0.5 / total


@kernel()
def _workspace(joint_XE: Counts) -> tuple[Counts, Counts, Counts]:
    num_values, num_ids = joint_XE.shape
    return np.zeros((num_values, num_ids), np.int32), np.zeros(num_values, np.int32), np.zeros(num_ids, np.int32)


@kernel()
def _count_own(x_R: Rows, e_R: Rows, start: int, end: int, own_XE: Counts, own_X: Counts, own_E: Counts) -> int:
    n = 0
    for r in range(start, end):
        if x_R[r] >= 0 and e_R[r] >= 0:
            own_XE[x_R[r], e_R[r]] += 1
            own_X[x_R[r]] += 1
            own_E[e_R[r]] += 1
            n += 1
    return n


@kernel()
def _clear_own(x_R: Rows, e_R: Rows, start: int, end: int, own_XE: Counts, own_X: Counts, own_E: Counts) -> None:
    for r in range(start, end):
        if x_R[r] >= 0 and e_R[r] >= 0:
            own_XE[x_R[r], e_R[r]] = 0
            own_X[x_R[r]] = 0
            own_E[e_R[r]] = 0
