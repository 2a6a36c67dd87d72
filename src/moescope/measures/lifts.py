"""Lift: how many times as often two experts go together as a null hypothesis gives, with its interval and its test.

The unit is the token, or the pair of assignments, with both; documents are the unit of sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from moescope.measures import groups
from moescope.measures.schema import FRACTION
from moescope.measures.statistics import Numbers

TABLES = ("joint", "joint_null", "lift", "lift_low", "lift_high", "lift_p")
"""Tables by pair of experts that `lifts` makes."""


class Lifts(NamedTuple):
    """What is known of all pairs of experts of a layer, or of two.

    Attributes:
        tables: By name of `TABLES`, shape (one expert, the other).
        error: Standard error of the joint share, given the popularity of both experts.
    """

    tables: dict[str, Numbers]
    error: Numbers


def lifts(
    together_GEF: Numbers, tokens_G: Numbers, one_E: Numbers, other_F: Numbers, null: Numbers, by_popularity: Numbers
) -> Lifts:
    """The lift of each pair, its 95 % interval over groups of documents, and the p-value that it is 1.

    Args:
        together_GEF: Tokens with both experts, by group of documents.
        tokens_G: Tokens of each group, none 0.
        one_E: Share of the tokens with each expert.
        other_F: The same of the other expert of a pair.
        null: Share of the tokens that the null hypothesis gives both, shape (one expert, the other).
        by_popularity: What a group's own use of the two experts adds to its tokens with both under the null,
            linearised, shape (group, one expert, the other).
    """
    tokens, num_groups = tokens_G.sum(), len(tokens_G)
    joint = together_GEF.sum(axis=0) / tokens
    excess_GEF = together_GEF - joint * tokens_G[:, None, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        lift = np.where(null > 0, joint / null, np.nan)
        error = groups.sum_error(excess_GEF - by_popularity) / tokens
        half = groups.student(num_groups) * groups.sum_error(excess_GEF - lift * by_popularity) / tokens / null
        under_null = groups.error_under_null(error, joint, null, tokens)
        p = 2 * stats.t.sf(np.abs(joint - null) / under_null, max(num_groups - 1, 1))
    shares = one_E[:, None], other_F, null, tokens
    half[~groups.enough(*shares, groups.FEWEST_FOR_INTERVAL)] = np.nan
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        spread = np.exp(half / lift)  # on the scale of logarithms a ratio of small counts is less skewed
        low, high = lift / spread, lift * spread
    p[~groups.enough(*shares) | (num_groups < 2)] = np.nan
    return Lifts(dict(zip(TABLES, (joint, null, lift, low, high, p), strict=True)), error)


def padded(tables: Sequence[Numbers]) -> Numbers:
    """Tables of several layers as one, NaN for experts that a layer lacks."""
    stacked = np.full((len(tables), *np.max([table.shape for table in tables], axis=0)), np.nan)
    for layer, table in enumerate(tables):
        stacked[layer, ...][tuple(slice(size) for size in table.shape)] = table
    return stacked


def definitions(null: str) -> dict[str, tuple[str, ...]]:
    """Of the variables of the lifts of a result.

    Args:
        null: The null hypothesis, in words.
    """
    return {
        "joint": ("tokens with both over tokens", FRACTION),
        "joint_null": (f"the same of {null}", FRACTION),
        "lift": ("joint over its null", "1"),
        "lift_p": ("p-value of a lift of 1", "1"),
        "lift_q": ("p-value adjusted over pairs and layers", "1", "Benjamini and Hochberg 1995"),
    }
