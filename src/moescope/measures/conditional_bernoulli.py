"""Sets of fixed size without further structure: the null of co-activation.

A router that picks k different experts a token cannot pick them independently: with k = 2 of 8 equal experts a pair has
the probability 1/28, not 1/16. The weakest assumption that keeps each expert's popularity and the size of sets is the
conditional Bernoulli distribution, that of largest entropy: P(set) ∝ Π w_e over its members. (It is Poisson sampling
given the size, and the limit of permuting choices between tokens with both margins kept.)
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from moescope.measures.statistics import Numbers

TOLERANCE = 1e-11
"""Relative error of the inclusion probabilities at which the fit ends."""

MOST_ROUNDS = 20_000  # so that a fit ends where rounding keeps it from the tolerance


def pair_probabilities(inclusion: Numbers, top_k: int) -> Numbers:
    """Probability that a token's set holds both experts, given how often it holds each.

    Args:
        inclusion: Probability that the set holds an expert, shape (expert,); sums to `top_k`.
        top_k: Size of the sets.
    Returns:
        Shape (expert, expert); on the diagonal the inclusion itself.
    Source:
        Chen, Dempster and Liu 1994, Weighted finite population sampling to maximize entropy, Biometrika 81.

    Example:
        >>> float(pair_probabilities(np.full(8, 0.25), 2)[0, 1] * 28)
        1.0
    """
    pair = np.zeros((len(inclusion), len(inclusion)))
    always = inclusion > 1 - 1e-9
    free = (inclusion > 0) & ~always
    size = top_k - int(always.sum())
    if size > 0 and free.sum() > size:
        p = inclusion[free] * (size / inclusion[free].sum())
        left_out = int(free.sum()) - size
        if size <= left_out:
            pair[np.ix_(free, free)] = _pairs(fit_weights(p, size), p, size)
        else:  # the experts left out are the smaller set, and follow the same distribution
            both_out = _pairs(fit_weights(1 - p, left_out), 1 - p, left_out)
            pair[np.ix_(free, free)] = p[:, None] + p - 1 + both_out
    pair[always] = inclusion
    pair[:, always] = inclusion[:, None]
    np.fill_diagonal(pair, inclusion)
    return pair


def fit_weights(inclusion: Numbers, size: int) -> Numbers:
    """Weights w of P(set) ∝ Π w_e with which sets of `size` hold each expert as often as given.

    Args:
        inclusion: Strictly between 0 and 1, shape (expert,); sums to `size`.
        size: Experts in a set.
    """
    weights: Numbers = inclusion / (1 - inclusion)
    weights /= np.exp(np.log(weights).mean())
    for _ in range(MOST_ROUNDS):
        symmetric = _symmetric(weights, size)
        rest = _without_each(weights, inclusion, symmetric, size)
        fitted = weights * rest / symmetric[size]
        weights = weights * (inclusion / fitted)
        if np.abs(fitted / inclusion - 1).max() < TOLERANCE:
            break
        weights /= np.exp(np.log(weights).mean())
    return weights


@numba.njit(cache=True)
def _symmetric(w: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Elementary symmetric polynomials of degree 0 .. size."""
    r = np.zeros(size + 1)
    r[0] = 1.0
    for e in range(w.size):
        for degree in range(size, 0, -1):
            r[degree] += w[e] * r[degree - 1]
    return r


@numba.njit(cache=True)
def _remove(
    r: NDArray[np.float64], w: NDArray[np.float64], p: NDArray[np.float64], i: int, j: int
) -> NDArray[np.float64]:
    """The polynomials without i (whose own r may be given) and, if j is not negative, without j.

    Division is stable for an expert that is rarely in a set; otherwise the sum is made anew.
    """
    last = j if j >= 0 else i
    size = r.size - 1
    out = np.zeros(size + 1)
    out[0] = 1.0
    if p[last] < 0.5:
        for degree in range(1, size + 1):
            out[degree] = r[degree] - w[last] * out[degree - 1]
    else:
        for e in range(w.size):
            if e != i and e != j:
                for degree in range(size, 0, -1):
                    out[degree] += w[e] * out[degree - 1]
    return out


@numba.njit(cache=True)
def _without_each(
    w: NDArray[np.float64], p: NDArray[np.float64], r: NDArray[np.float64], size: int
) -> NDArray[np.float64]:
    """Polynomial of degree size - 1 without each expert."""
    rest = np.zeros(w.size)
    for i in range(w.size):
        rest[i] = _remove(r, w, p, i, -1)[size - 1]
    return rest


@numba.njit(cache=True)
def _pairs(w: NDArray[np.float64], p: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    pair = np.zeros((w.size, w.size))
    if size < 2:
        return pair
    r = _symmetric(w, size)
    for i in range(w.size):
        without = _remove(r, w, p, i, -1)
        for j in range(i + 1, w.size):
            pair[i, j] = w[i] * w[j] * _remove(without, w, p, i, j)[size - 2] / r[size]
            pair[j, i] = pair[i, j]
    return pair
