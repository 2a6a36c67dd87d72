"""Co-activation: which experts share a token, against sets of the same size in which popularity alone decides.

The unit is the token; counted are all pairs of its set (28 for k = 8). Tokens of which an assignment was dropped are
left out, so that all sets have the same size.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from moescope.measures import groups, statistics
from moescope.measures.conditional_bernoulli import pair_probabilities
from moescope.measures.schema import described
from moescope.measures.statistics import Numbers
from moescope.tallying import Source
from moescope.tallying.counted import counted
from moescope.tallying.joint import CoactivationCounter

OLMOE = "OLMoE (arXiv 2409.02060), co-activation"


def coactivation(trace: Source, layers: Iterable[int] | None = None, *, threads: int | None = None) -> xr.Dataset:
    """How often two experts are in the set of the same token.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`).
        layers: Layers of the trace to measure, or None for all with two choices a token or more; counts have theirs.
        threads: Parts counted at a time; None for the number of processors.
    Returns:
        By (layer, expert, other), NaN on the diagonal and for experts that the layer lacks:

        * `conditional`: tokens with both over tokens with `expert`, N_ij / N_i;
        * `joint`: tokens with both over tokens, the same for both orders, as all that follow;
        * `expected`: of `joint`, if sets of k had nothing but the popularity of each expert (conditional Bernoulli);
        * `lift`: joint / expected; `low`, `high`: its 95 % interval over documents, on the scale of logarithms, NaN
          where less than one token is expected to have both, or fewer than ten to have only one or neither;
        * `p_value` that the lift is 1, NaN where fewer than ten tokens are expected to have both, or only one, or
          neither; `q_value`, the same with the false discovery rate controlled over pairs and layers.

        By (layer, expert): `inclusion`, tokens with the expert over tokens. By (layer): `tokens`; `deviation`, the part
        of the pairs that would have to be others for all lifts to be 1, and `deviation_null`, what sampling documents
        alone would give. Takes 8 float64 numbers a pair: 250 MB for 256 experts and 60 layers.
    Raises:
        NoSuchLayer: A layer was not recorded.
        NotRecorded: The trace holds counts only, or no layer has two choices a token.
    Source:
        OLMoE (arXiv 2409.02060); the null: Chen, Dempster and Liu 1994; intervals and tests are ours.
    """
    counts = counted(trace, CoactivationCounter, layers=layers, threads=threads)[CoactivationCounter]
    num_layers, num_ids = len(counts.layers), max(layer.num_ids for layer in counts.layers)
    names = ("conditional", "joint", "expected", "lift", "low", "high", "p_value")
    tables = {name: np.full((num_layers, num_ids, num_ids), np.nan) for name in names}
    inclusion = np.full((num_layers, num_ids), np.nan)
    tokens = np.zeros(num_layers, np.int64)
    deviation, deviation_null = np.full(num_layers, np.nan), np.full(num_layers, np.nan)
    for at, layer in enumerate(counts.layers):
        found = _of_layer(counts.pairs[layer.layer], layer.top_k)
        for name in names:
            tables[name][at, : layer.num_ids, : layer.num_ids] = found[name]
        inclusion[at, : layer.num_ids] = found["inclusion"]
        tokens[at] = found["tokens"]
        deviation[at], deviation_null[at] = found["deviation"], found["deviation_null"]
    dims = ("layer", "expert", "other")
    q_value = _false_discovery_rate(tables["p_value"])
    return xr.Dataset(
        {
            "conditional": described(tables["conditional"], dims, "tokens with both over tokens with one", "1", OLMOE),
            "joint": described(tables["joint"], dims, "tokens with both over tokens", "1"),
            "expected": described(
                tables["expected"], dims, "the same of sets by popularity alone", "1", "Chen, Dempster and Liu 1994"
            ),
            "lift": described(tables["lift"], dims, "joint over expected", "1"),
            "low": described(tables["low"], dims, "95 % interval of the lift, low end", "1"),
            "high": described(tables["high"], dims, "95 % interval of the lift, high end", "1"),
            "p_value": described(tables["p_value"], dims, "p-value of a lift of 1", "1"),
            "q_value": described(
                q_value, dims, "p-value adjusted over pairs and layers", "1", "Benjamini and Hochberg 1995"
            ),
            "inclusion": described(inclusion, ("layer", "expert"), "tokens with the expert over tokens", "1"),
            "tokens": described(tokens, ("layer",), "tokens without a dropped assignment", "tokens"),
            "deviation": described(deviation, ("layer",), "part of the pairs in excess of their expectation", "1"),
            "deviation_null": described(deviation_null, ("layer",), "the same from sampling documents alone", "1"),
        },
        {
            "layer": [layer.layer for layer in counts.layers],
            "expert": np.arange(num_ids),
            "other": np.arange(num_ids),
            "num_experts": ("layer", [layer.num_experts for layer in counts.layers]),
            "num_ids": ("layer", [layer.num_ids for layer in counts.layers]),
            "top_k": ("layer", [layer.top_k for layer in counts.layers]),
        },
    )


def _of_layer(ranked_GEE: NDArray[np.uint32], top_k: int) -> dict[str, Numbers]:
    """Everything about one layer; pairs come by rank and leave without order."""
    num_pairs = top_k * (top_k - 1) // 2
    pairs_GEE = (ranked_GEE + ranked_GEE.swapaxes(1, 2)).astype(float)
    np.einsum("gee->ge", pairs_GEE)[:] = 0
    tokens_G = pairs_GEE.sum(axis=(1, 2)) / 2 / num_pairs
    used = tokens_G > 0
    pairs_GEE, tokens_G = pairs_GEE[used], tokens_G[used]
    members_GE = pairs_GEE.sum(axis=2) / (top_k - 1)
    tokens, num_groups = tokens_G.sum(), len(tokens_G)
    if not num_groups:
        nothing = np.full(ranked_GEE.shape[1:], np.nan)
        names = ("conditional", "joint", "expected", "lift", "low", "high", "p_value")
        scalars = {"tokens": np.float64(0), "deviation": np.float64("nan"), "deviation_null": np.float64("nan")}
        return dict.fromkeys(names, nothing) | {"inclusion": nothing[0]} | scalars
    inclusion, joint = members_GE.sum(axis=0) / tokens, pairs_GEE.sum(axis=0) / tokens
    expected = pair_probabilities(inclusion, top_k)
    own, other = _slopes(inclusion, expected)
    # Linearised: a group's pairs in excess, given how often it has each of the two experts.
    excess_GEE = pairs_GEE - joint * tokens_G[:, None, None]
    popular_GE = members_GE - inclusion * tokens_G[:, None]
    by_popularity_GEE = own * popular_GE[:, :, None] + other * popular_GE[:, None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        lift = np.where(expected > 0, joint / expected, np.nan)
        error = groups.sum_error(excess_GEE - by_popularity_GEE) / tokens
        half = groups.student(num_groups) * groups.sum_error(excess_GEE - lift * by_popularity_GEE) / tokens / expected
        under_null = groups.error_under_null(error, joint, expected, tokens)
        p_value = 2 * stats.t.sf(np.abs(joint - expected) / under_null, max(num_groups - 1, 1))
        conditional = np.where(inclusion[:, None] > 0, joint / inclusion[:, None], np.nan)
    shares = inclusion[:, None], inclusion, expected, tokens
    half[~groups.enough(*shares, groups.FEWEST_FOR_INTERVAL)] = np.nan
    low, high = groups.lift_interval(lift, half)
    p_value[~groups.enough(*shares) | (num_groups < 2)] = np.nan
    values = {
        "conditional": conditional,
        "joint": joint,
        "expected": expected,
        "lift": lift,
        "low": low,
        "high": high,
        "p_value": p_value,
    }
    apart = ~np.eye(len(inclusion), dtype=bool)
    noise = np.sqrt(2 / np.pi) * np.nan_to_num(error)[apart].sum() if num_groups > 1 else np.nan
    total = 2 * joint[apart].sum()
    for table in values.values():
        np.fill_diagonal(table, np.nan)
    return values | {
        "inclusion": inclusion,
        "tokens": np.rint(tokens),
        "deviation": np.abs(joint - expected)[apart].sum() / total,
        "deviation_null": noise / total,
    }


def _slopes(inclusion: Numbers, pair: Numbers) -> tuple[Numbers, Numbers]:
    """Regression of a pair's presence on that of its two experts under the null, shape (expert, other) each.

    With them the null's dependence on the estimated popularity is accounted for: the others enter through the fixed
    size of the sets, so that these two are all there is where the others are alike.
    """
    variance = inclusion * (1 - inclusion)
    covariance = pair - inclusion[:, None] * inclusion
    with_own, with_other = pair * (1 - inclusion[:, None]), pair * (1 - inclusion)
    determinant = variance[:, None] * variance - covariance**2
    sound = determinant > 1e-12
    with np.errstate(invalid="ignore", divide="ignore"):
        own = (with_own * variance - with_other * covariance) / determinant
        other = (with_other * variance[:, None] - with_own * covariance) / determinant
    return np.where(sound, own, 0.0), np.where(sound, other, 0.0)


def _false_discovery_rate(p_value: Numbers) -> Numbers:
    """Adjusted over layers and pairs, each pair once."""
    upper = np.triu(np.ones(p_value.shape[1:], bool), 1)
    adjusted = statistics.false_discovery_rate(np.where(upper, p_value, np.nan))
    return np.where(upper, adjusted, adjusted.swapaxes(1, 2))
