"""Intervals and tests with the document as the sampling unit.

Tokens of one document are not independent, so treating them as independent makes every interval too narrow. All
variances here are linearised (Taylor) variances of a ratio of document totals, and all intervals are 95 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

CONFIDENCE = 0.95

Numbers = NDArray[np.float64]


def ratio(y: ArrayLike, n: ArrayLike) -> Numbers:
    """Σy / Σn; NaN where Σn is zero."""
    y, n = np.asarray(y, float), np.asarray(n, float)
    y, n = np.broadcast_arrays(y, n)
    return np.divide(y, n, out=np.full(y.shape, np.nan), where=n > 0)


def ratio_standard_error(
    y: ArrayLike, n: ArrayLike, yy: ArrayLike, yn: ArrayLike, nn: ArrayLike, documents: ArrayLike
) -> Numbers:
    """Standard error of the ratio Σy / Σn, clustered by document.

    Args:
        y: Σ over documents of what was counted.
        n: Σ of what could have been counted.
        yy: Σ of y².
        yn: Σ of y·n.
        nn: Σ of n².
        documents: Number of documents D.
    Returns:
        √( D/(D-1) · Σ(y - p·n)² / (Σn)² ); NaN for fewer than two documents.
    Source:
        Cochran 1977, Sampling Techniques, section 6.3; Wolter 2007, chapter 6.

    Example:
        Two documents of 10 tokens, with 1 and 3 of what is counted: p = 0.2, residuals -1 and +1.

        >>> round(float(ratio_standard_error(4, 20, 10, 40, 200, 2)), 12)
        0.1
    """
    p = ratio(y, n)
    d = np.asarray(documents, float)
    residuals = np.asarray(yy, float) - 2 * p * np.asarray(yn, float) + p**2 * np.asarray(nn, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.where(d > 1, d / (d - 1), np.nan) * np.maximum(residuals, 0.0) / np.asarray(n, float) ** 2
    return np.sqrt(variance)


def proportion_interval(
    p: ArrayLike, standard_error: ArrayLike, documents: ArrayLike, *, together: int = 1
) -> tuple[Numbers, Numbers]:
    """95 % interval of a proportion: Student's t with D - 1 degrees of freedom on the logit scale.

    Where every document has none of what is counted (or nothing else), the standard error is zero and says nothing;
    there the far end is that of an exact binomial interval over documents, 1 - 0.025^(1/D).

    Args:
        p: Proportions.
        standard_error: Their standard errors.
        documents: Number of documents D.
        together: So many such intervals are to hold at once (Bonferroni).
    Returns:
        The low and the high end; NaN for fewer than two documents.
    Source:
        Korn and Graubard 1999, Analysis of Health Surveys, section 3.2 (logit); Clopper and Pearson 1934 (zero counts).
    """
    p, standard_error = np.asarray(p, float), np.asarray(standard_error, float)
    d = np.broadcast_to(np.asarray(documents, float), p.shape)
    tail = (1 - CONFIDENCE) / 2 / together
    t = np.where(d > 1, stats.t.ppf(1 - tail, np.maximum(d - 1, 1)), np.nan)
    inside = (p > 0) & (p < 1) & (standard_error > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        logit = np.log(p) - np.log1p(-p)
        half = t * standard_error / (p * (1 - p))
        low, high = (1 / (1 + np.exp(-(logit + sign * half))) for sign in (-1, 1))
        rare = 1 - tail ** (1 / d)
    low = np.where(inside, low, np.where(p == 1, 1 - rare, np.where(p == 0, 0.0, p)))
    high = np.where(inside, high, np.where(p == 0, rare, np.where(p == 1, 1.0, p)))
    unknown = np.isnan(p) | (d < 2)
    return np.where(unknown, np.nan, low), np.where(unknown, np.nan, high)


class Proportion(TypedDict):
    """Proportions with their standard errors and 95 % intervals, as `schema.estimate` takes them."""

    value: Numbers
    error: Numbers
    low: Numbers
    high: Numbers


def proportion(
    y: ArrayLike,
    n: ArrayLike,
    yy: ArrayLike,
    yn: ArrayLike,
    nn: ArrayLike,
    documents: ArrayLike,
    *,
    most: ArrayLike = 1,
    exists: ArrayLike = True,
) -> Proportion:
    """The proportion Σy / (`most` · Σn) of sums over documents, with its error and interval, clustered by document.

    Args:
        y: As the following five, of `ratio_standard_error`; of n, what could have been counted over `most`.
        most: What `y` can be at most where `n` is 1.
        exists: Where there is such a proportion at all; NaN elsewhere.
    """
    y, n, most = (np.asarray(values, float) for values in (y, n, most))
    value = ratio(y, n * most)
    error = ratio_standard_error(y, n, yy, yn, nn, documents) / most
    low, high = proportion_interval(value, error, documents)
    value, error, low, high = (np.where(exists, values, np.nan) for values in (value, error, low, high))
    return {"value": value, "error": error, "low": low, "high": high}


def student_t(documents: ArrayLike) -> Numbers:
    """Two-sided 95 % quantile of Student's t with D - 1 degrees of freedom; NaN for fewer than two documents."""
    d = np.asarray(documents, float)
    return np.where(d > 1, stats.t.ppf((1 + CONFIDENCE) / 2, np.maximum(d - 1, 1)), np.nan)


def noncentral_interval(statistic: float, df: float, df_error: float) -> tuple[float, float]:
    """95 % interval of the noncentrality λ of an F-like statistic, from 0.

    Args:
        statistic: F, the statistic over its expectation under the null (about 1 if the null holds).
        df: Degrees of freedom of the numerator.
        df_error: Degrees of freedom of the denominator.
    Returns:
        The λ at which the observed statistic is the 97.5 % and the 2.5 % quantile; 0 where no λ is small enough.
    Source:
        Steiger and Fouladi 1997 (inversion of the noncentral distribution).
    """

    def end(quantile: float) -> float:
        def excess(noncentrality: float) -> float:
            return float(special.ncfdtr(df, df_error, noncentrality, statistic)) - quantile

        if not excess(0.0) > 0:
            return 0.0
        upper = max(1.0, df * statistic)
        while excess(upper) > 0:
            upper *= 2
        return float(optimize.brentq(excess, 0.0, upper, xtol=1e-6 * upper))

    tail = (1 - CONFIDENCE) / 2
    return end(1 - tail), end(tail)


def false_discovery_rate(p_values: ArrayLike) -> Numbers:
    """Benjamini-Hochberg adjusted p-values over all finite entries; the shape is kept.

    Source:
        Benjamini and Hochberg 1995.

    Example:
        >>> false_discovery_rate([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.04, 0.04]
    """
    p = np.asarray(p_values, float)
    adjusted = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    if known.any():
        adjusted[known] = stats.false_discovery_control(p[known])
    return adjusted


def histogram_quantiles(histogram_B: NDArray[np.int64], edges: Numbers, quantiles: Sequence[float]) -> Numbers:
    """Quantiles of what a histogram counts, linear within a bin; NaN where it counts nothing.

    Args:
        histogram_B: Counts, shape (bin,).
        edges: Edges of the bins, ascending, shape (bin + 1,).
        quantiles: Parts of the distribution below.

    Example:
        >>> histogram_quantiles(np.array([0, 2, 2]), np.array([0.0, 1.0, 2.0, 4.0]), (0.25, 0.75)).tolist()
        [1.5, 3.0]
    """
    counted = histogram_B.sum()
    if not counted:
        return np.full(len(quantiles), np.nan)
    below = np.concatenate([[0], np.cumsum(histogram_B)]) / counted
    kept = np.concatenate([[True], np.diff(below) > 0])
    kept[:-1] |= kept[1:]  # the lower edge of a bin that holds something
    return np.interp(quantiles, below[kept], edges[kept])
