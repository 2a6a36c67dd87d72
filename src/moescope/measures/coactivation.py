"""Co-activation: which experts share a token, against sets of the same size in which popularity alone decides.

The unit is the token; counted are all pairs of its set (28 for k = 8). Tokens of which an assignment was dropped are
left out, so that all sets have the same size.

The null is the conditional Bernoulli distribution. A router that picks k different experts a token cannot pick them
independently: with k = 2 of 8 equal experts a pair has the probability 1/28, not 1/16. The weakest assumption that
keeps each expert's popularity and the size of sets is the distribution of largest entropy: P(set) ∝ Π w_e over its
members. (It is Poisson sampling given the size, and the limit of permuting choices between tokens with both margins
kept.)
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moescope.measures import statistics
from moescope.measures.lifts import TABLES, definitions, lifts, padded
from moescope.measures.schema import FRACTION, labelled, layer_coordinates
from moescope.measures.statistics import Numbers
from moescope.tallying import Source
from moescope.tallying.counted import counted
from moescope.tallying.jit import kernel
from moescope.tallying.joint import CoactivationCounter

OLMOE = "OLMoE (arXiv 2409.02060), co-activation"

TOLERANCE = 1e-11
"""Relative error of the inclusion probabilities at which the fit ends."""

MOST_ROUNDS = 20_000  # so that a fit ends where rounding keeps it from the tolerance


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
        * `joint_null`: the same, if sets of k had nothing but the popularity of each expert (conditional Bernoulli);
        * `lift`: joint / joint_null; `lift_low`, `lift_high`: its 95 % interval over documents, on the scale of
          logarithms, NaN where less than one token is expected to have both, or fewer than ten to have only one or
          neither;
        * `lift_p`: that the lift is 1, NaN where fewer than ten tokens are expected to have both, or only one, or
          neither; `lift_q`, the same with the false discovery rate controlled over pairs and layers.

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
    num_ids = max(layer.num_ids for layer in counts.layers)
    rows = [_of_layer(counts.pairs[layer.layer], layer.top_k) for layer in counts.layers]
    tables = {name: padded([row[name] for row in rows]) for name in rows[0]}
    tables["lift_q"] = _false_discovery_rate(tables["lift_p"])
    dims, by_layer = ("layer", "expert", "other"), {name: tables.pop(name) for name in ("inclusion", *_OF_LAYER)}
    by_layer["tokens"] = by_layer["tokens"].astype(np.int64)
    return xr.Dataset(
        labelled(tables, dims, _OF_PAIR)
        | labelled({"inclusion": by_layer.pop("inclusion")}, dims[:2], _OF_EXPERT)
        | labelled(by_layer, dims[:1], _OF_LAYER),
        layer_coordinates(counts.layers) | {"expert": np.arange(num_ids), "other": np.arange(num_ids)},
    )


_OF_PAIR = {
    "conditional": ("tokens with both over tokens with one", FRACTION, OLMOE),
    **definitions("sets by popularity alone (Chen, Dempster and Liu 1994)"),
}
_OF_EXPERT = {"inclusion": ("tokens with the expert over tokens", FRACTION)}
_OF_LAYER = {
    "tokens": ("tokens without a dropped assignment", "tokens"),
    "deviation": ("part of the pairs in excess of their expectation", FRACTION),
    "deviation_null": ("the same from sampling documents alone", FRACTION),
}


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
        unknown = np.full(ranked_GEE.shape[1:], np.nan)
        tables = dict.fromkeys(("conditional", *TABLES), unknown) | {"inclusion": unknown[0]}
        return tables | {"tokens": np.zeros(()), "deviation": unknown[0, 0], "deviation_null": unknown[0, 0]}
    inclusion = members_GE.sum(axis=0) / tokens
    null = pair_probabilities(inclusion, top_k)
    own, other = _slopes(inclusion, null)
    popular_GE = members_GE - inclusion * tokens_G[:, None]
    by_popularity_GEE = own * popular_GE[:, :, None] + other * popular_GE[:, None, :]
    tables, error = lifts(pairs_GEE, tokens_G, inclusion, inclusion, null, by_popularity_GEE)
    with np.errstate(invalid="ignore", divide="ignore"):
        tables["conditional"] = np.where(inclusion[:, None] > 0, tables["joint"] / inclusion[:, None], np.nan)
    apart = ~np.eye(len(inclusion), dtype=bool)
    noise = np.sqrt(2 / np.pi) * np.nan_to_num(error)[apart].sum() if num_groups > 1 else np.nan
    of_all = 2 * tables["joint"][apart].sum()
    deviation = np.abs(tables["joint"] - null)[apart].sum() / of_all
    for table in tables.values():
        np.fill_diagonal(table, np.nan)
    return tables | {
        "inclusion": inclusion,
        "tokens": np.rint(tokens),
        "deviation": deviation,
        "deviation_null": np.asarray(noise / of_all),
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
    """Weights w of P(set) ∝ Π w_e with which sets of `size` hold each expert as often as given, between 0 and 1."""
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


@kernel()
def _symmetric(w: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Elementary symmetric polynomials of degree 0 .. size."""
    r = np.zeros(size + 1)
    r[0] = 1.0
    for e in range(w.size):
        for degree in range(size, 0, -1):
            r[degree] += w[e] * r[degree - 1]
    return r


@kernel()
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


@kernel()
def _without_each(
    w: NDArray[np.float64], p: NDArray[np.float64], r: NDArray[np.float64], size: int
) -> NDArray[np.float64]:
    """Polynomial of degree size - 1 without each expert."""
    rest = np.zeros(w.size)
    for i in range(w.size):
        rest[i] = _remove(r, w, p, i, -1)[size - 1]
    return rest


@kernel()
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
