"""Intervals from random groups of documents, for what is no ratio of document totals; all intervals are 95 %.

A group is a set of documents chosen by hash (`tallying.document_groups`), so groups are independent and the variation
between them carries whatever dependence there is within documents.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moescope.measures.statistics import CONFIDENCE, Numbers, ratio

Truths = NDArray[np.bool_]

FEWEST_EXPECTED = 10
"""Tokens that the null must expect in each cell of a two by two table for a test: with fewer, no normal approximation
holds."""
FEWEST_FOR_INTERVAL = 1
"""The same, with both of two things, for an interval of a lift: of rarer ones those that are seen, and have an error,
were seen too often."""


def ratio_errors(y_GE: NDArray[np.int64], n_G: NDArray[np.int64]) -> tuple[Numbers, Numbers]:
    """Ratios Σy / Σn over groups and their standard errors, linearised.

    Args:
        y_GE: What was counted, shape (group, thing).
        n_G: What could have been counted, shape (group,).
    Returns:
        Ratio and standard error, shape (thing,); NaN where nothing could have been counted, the error also where fewer
        than two groups could.
    """
    used = n_G > 0
    y, n = y_GE[used].astype(float), n_G[used].astype(float)
    groups, total = len(n), n.sum()
    share_E = ratio(y.sum(axis=0), total)
    if groups < 2:
        return share_E, np.full(y_GE.shape[1], np.nan)
    residual = y - share_E * n[:, None]
    return share_E, np.sqrt(groups / (groups - 1) * (residual**2).sum(axis=0)) / total


def sum_error(residual_G: Numbers) -> Numbers:
    """Standard error of a sum over groups from their residuals, which sum to 0, shape (group, ...).

    NaN for one group, and where nothing varies, which says nothing.
    """
    num_groups = len(residual_G)
    if num_groups < 2:
        return np.full(residual_G.shape[1:], np.nan)
    error = np.sqrt(num_groups / (num_groups - 1) * (residual_G**2).sum(axis=0))
    return np.where(error > 1e-9, error, np.nan)


def error_under_null(error: Numbers, joint: Numbers, expected: Numbers, tokens: float) -> Numbers:
    """Standard errors that shares would have if they were as large as expected, for testing whether they are.

    The variance of a count grows with the count: one that is low by chance has an error too small as well, and would be
    found below its expectation too often (a test at 5 % rejects in 6 to 9 % of 1,024 independent transitions of
    32 experts, and of those it rejects at 0.1 % all lie below). So the error is taken to the size that the expectation
    makes it. Where more was seen than expected, by half of that (on the scale of logarithms), as tokens that come in
    bursts raise both. A count of 0 has the error of so many tokens as alike within documents as the others.

    Args:
        error: Standard errors of the shares, from what was seen; NaN where that tells nothing.
        joint: The shares seen.
        expected: The shares under the null.
        tokens: What all are shares of.

    Example:
        >>> seen, expected = np.array([0.1, 0.2, 0.8, 0.0]), np.full(4, 0.2)
        >>> error_under_null(np.array([0.02, 0.02, 0.02, np.nan]), seen, expected, 500.0).round(4)
        array([0.0283, 0.02  , 0.0141, 0.02  ])
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = expected / joint
        scaled = error * np.where(ratio > 1, ratio**0.5, ratio**0.25)
        alike = error**2 * tokens / expected
    known = np.isfinite(alike) & (expected * tokens >= FEWEST_EXPECTED)
    independent: Numbers = np.sqrt(max(1.0, float(alike[known].mean()) if known.any() else 1.0) * expected / tokens)
    return np.where(joint > 0, scaled, np.fmax(error, independent))


def enough(one: Numbers, other: Numbers, both: Numbers, tokens: float, least: float = FEWEST_EXPECTED) -> Truths:
    """Whether so many tokens, of shares of all, are to be expected with both of two things, and ten with one alone, and
    with neither.

    Source:
        Cochran 1954, Some methods for strengthening the common χ² tests, Biometrics 10 (a least expectation a cell).
    """
    rest = np.minimum(np.minimum(one - both, other - both), 1 - one - other + both)
    return (both * tokens >= least) & (rest * tokens >= FEWEST_EXPECTED)


def student(groups: int, probability: float | Numbers = (1 + CONFIDENCE) / 2) -> float:
    """Quantile of Student's t with groups - 1 degrees of freedom; NaN for fewer than two groups."""
    return float(stats.t.ppf(probability, groups - 1)) if groups > 1 else float("nan")


def jackknife(measure: Callable[[Numbers], Numbers], y_GE: NDArray[np.int64]) -> tuple[Numbers, Numbers, int]:
    """Bias-corrected values and standard errors of a smooth function of sums, leaving out a group at a time.

    Args:
        measure: From sums, shape (..., thing), to values, shape (..., value).
        y_GE: The sums of each group, shape (group, thing).
    Returns:
        Value and standard error, shape (value,), and the number of groups that hold something.
    Source:
        Busing, Meijer and van der Leeden 1999, Delete-m jackknife for unequal m, Statistics and Computing 9.
    """
    y = y_GE[y_GE.any(axis=1)].astype(float)
    n_G = y.sum(axis=1)
    total = y.sum(axis=0)
    whole = measure(total[None])[0]
    if len(y) < 2:
        return whole, np.full(whole.shape, np.nan), len(y)
    return *leaving_out(whole, measure(total - y), n_G), len(y)


def leaving_out(whole: Numbers, without_G: Numbers, n_G: Numbers) -> tuple[Numbers, Numbers]:
    """The jackknife from its replicates.

    Args:
        whole: Values of all groups, shape (value,).
        without_G: Values without each group, shape (group, value); at least two groups.
        n_G: Size of each group, none 0, shape (group,).
    Returns:
        Bias-corrected value and standard error, shape (value,).
    """
    h = (n_G.sum() / n_G)[:, None]
    value = len(n_G) * whole - ((1 - 1 / h) * without_G).sum(axis=0)
    pseudo = h * whole - (h - 1) * without_G
    return value, np.sqrt(((pseudo - value) ** 2 / (h - 1)).mean(axis=0))


def interval_of_largest(p: Numbers, error: Numbers, groups: int) -> tuple[float, float]:
    """95 % interval of the largest of several true shares, of which the largest estimate is biased upwards.

    The upper end is the largest pointwise upper end: whichever share is truly the largest lies below its own. The lower
    end is the largest of the lower ends drawn for all contenders at once, so that it holds even if they are equal:
    shares that cannot be the largest are no contenders.

    Source:
        Chernozhukov, Lee and Rosen 2013, Intersection bounds: estimation and inference, Econometrica 81 (contenders
        by adaptive selection; here with Bonferroni's instead of simulated quantiles).
    """
    if groups < 2 or not np.isfinite(error).any():
        return float("nan"), float("nan")
    tail = (1 - CONFIDENCE) / 2
    high = float(np.max(p + student(groups, 1 - tail) * error))
    wide = student(groups, 1 - tail / len(p)) * error
    contenders = p + wide >= np.max(p - wide)
    low = float(np.max((p - student(groups, 1 - tail / contenders.sum()) * error)[contenders]))
    return low, high


def draws_around(centre_E: Numbers, y_GE: NDArray[np.int64], num_draws: int, rng: np.random.Generator) -> Numbers:
    """Shares that could be seen if the true ones were `centre_E` and documents varied as they do, shape (draw, thing).

    The residuals of the groups get random signs and sizes (Gaussian multipliers), which keeps their covariances.

    Source:
        Chernozhukov, Chetverikov and Kato 2013, Annals of Statistics 41 (multiplier bootstrap of maxima).
    """
    y = y_GE[y_GE.any(axis=1)].astype(float)
    n_G = y.sum(axis=1)
    total = n_G.sum()
    residual = (y - y.sum(axis=0) / total * n_G[:, None]) / total * np.sqrt(len(y) / max(len(y) - 1, 1))
    multipliers = rng.standard_normal((num_draws, len(y)))
    draws: Numbers = np.maximum(centre_E + multipliers @ residual, 0.0)
    return draws / draws.sum(axis=1, keepdims=True)
