"""Divergence between domains: how differently they use the experts, in bits, and which domain stands out.

The unit is the assignment (all ranks together). Compared are the shares of Figure 7, domain with domain and each domain
with the mean of the others, by the Jensen-Shannon divergence with logarithm to base 2: 0 for equal shares, 1 bit for
shares without a common expert. (`scipy.spatial.distance.jensenshannon` returns its square root, in other units.)
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import special, stats

from moescope.measures import statistics
from moescope.measures.schema import described, estimate
from moescope.measures.shares import shares
from moescope.measures.statistics import Numbers
from moescope.tallying import Source

MEANINGS = {
    "null": "divergence expected from sampling alone",
    "low": "95 % interval of the true divergence, low end",
    "high": "95 % interval of the true divergence, high end",
    "p": "p-value of equal shares (Rao and Scott 1984)",
    "q": "p-value adjusted over all that are compared",
}
"""What stands beside a divergence."""

LIN = "Lin 1991, Divergence measures based on the Shannon entropy"


def divergence(trace: Source, layers: Iterable[int] | None = None, *, threads: int | None = None) -> xr.Dataset:
    """Jensen-Shannon divergence between the shares of domains, with its null.

    Sampling a few documents makes equal domains look different: `jsd_rest_null` is the divergence to expect from that
    alone, computed from the variance of the shares between documents. The test compares the two; the interval is of the
    divergence that remains.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`, `moescope.tally`).
        layers: Layers of the trace to measure, or None for all; counts have theirs.
        threads: Parts counted at a time; None for the number of processors.
    Returns:
        * `jsd_rest` (domain, layer): between a domain and the mean of the others' shares, bits; `jsd_rest_null`, its
          expectation if they were equal; `jsd_rest_low`, `jsd_rest_high`, 95 % interval of the true divergence;
          `jsd_rest_p`, p-value of equality; `jsd_rest_q`, the same with the false discovery rate controlled over layers
          and domains;
        * `jsd` (domain, other, layer): between two domains, bits; `jsd_null`, `jsd_low`, `jsd_high`, `jsd_p` likewise,
          and `jsd_q`, with the false discovery rate controlled over layers and pairs;
        * `information` (layer): I(domain; expert) with domains of equal weight, bits; `information_null`, its
          expectation if they were equal;
        * `leader` (layer): the domain furthest from the others, empty if there is one; `leader_significant`, whether
          its interval lies above those of all other domains.

        NaN where a domain has fewer than two documents or there is one domain.
    Source:
        Lin 1991; the test is a first-order Rao and Scott (1984) correction of the chi-square statistic of homogeneity
        to clustered counts, with Satterthwaite degrees of freedom; the interval inverts the noncentral distribution.
    """
    data = shares(trace, layers, threads=threads).sel(choice="all")
    p_DLE = np.nan_to_num(data["share"].values)
    variance_DLE = data["share_error"].values ** 2
    num_domains = len(p_DLE)
    documents_D = data["documents"].values
    others_DD = (np.ones((num_domains, num_domains)) - np.eye(num_domains)) / max(num_domains - 1, 1)
    rest_DLE = np.einsum("do,ole->dle", others_DD, p_DLE)
    rest_variance_DLE = np.einsum("do,ole->dle", others_DD**2, variance_DLE)
    known_DL = np.tile((data["tokens"].values > 0)[:, None] & (num_domains > 1), p_DLE.shape[1])
    rest_documents_D = documents_D.sum() - documents_D - num_domains + 2
    rest = _judged(
        (p_DLE, rest_DLE),
        (variance_DLE, rest_variance_DLE),
        (documents_D[:, None], rest_documents_D[:, None]),
        known_DL,
    )
    seen_D = documents_D > 0
    upper_DD = np.triu(seen_D[:, None] & seen_D, 1)
    pairs = _judged(
        (p_DLE[:, None], p_DLE),
        (variance_DLE[:, None], variance_DLE),
        (documents_D[:, None, None], documents_D[:, None]),
        np.broadcast_to(upper_DD[:, :, None], (num_domains, *p_DLE.shape[:2])),
    )
    of_pairs = {name: np.where(upper_DD[:, :, None], of, of.swapaxes(0, 1)) for name, of in pairs.items()}
    of_pairs["value"] = pairs["value"]
    jsd_rest = {name: np.where(known_DL, of, np.nan) for name, of in rest.items()}
    information, information_null = _information(p_DLE[seen_D], variance_DLE[seen_D])
    leader, significant = _leader(jsd_rest["value"], jsd_rest["low"], jsd_rest["high"])
    names = np.array([*data["domain"].values.tolist(), ""])
    dims = ("domain", "layer")
    long_name = "divergence from the mean of the others"
    return xr.Dataset(
        estimate("jsd_rest", dims, long_name, "bits", LIN, meanings=MEANINGS, **jsd_rest)
        | estimate(
            "jsd", ("domain", "other", "layer"), "Jensen-Shannon divergence", "bits", LIN, meanings=MEANINGS, **of_pairs
        )
        | estimate(
            "information",
            ("layer",),
            "I(domain; expert), domains alike",
            "bits",
            LIN,
            value=information,
            null=information_null,
        )
        | {
            "leader": described(names[leader], ("layer",), "domain furthest from the others", "domain"),
            "leader_significant": described(significant, ("layer",), "whether its interval lies above all others", "1"),
        },
        {"other": data["domain"].values}
        | {name: data[name] for name in ("domain", "layer", "documents", "num_experts", "num_ids", "top_k")},
    )


def _judged(
    shares: tuple[Numbers, Numbers],
    variances: tuple[Numbers, Numbers],
    documents: tuple[NDArray[np.int64], NDArray[np.int64]],
    known: NDArray[np.bool_],
) -> dict[str, Numbers]:
    """Divergences of two sides, with what `divergence_of_samples` says of each, where it is known.

    Shares and their variances have the shape (..., expert), documents the same without that dim, `known` with the
    leading dims to which they broadcast.
    """
    p, q, variance_p, variance_q = (np.broadcast_to(x, (*known.shape, x.shape[-1])) for x in (*shares, *variances))
    degrees_p, degrees_q = (np.broadcast_to(number, known.shape) - 1.0 for number in documents)
    value = js_divergence(*shares)
    judged = {name: np.full(known.shape, np.nan) for name in ("null", "p", "low", "high")}
    for place in map(tuple, np.argwhere(known & np.isfinite(value)).tolist()):
        numbers = divergence_of_samples(
            float(value[place]),
            (p[place] + q[place]) / 2,
            np.stack([variance_p[place], variance_q[place]]),
            np.array([degrees_p[place], degrees_q[place]]),
        )
        for table, number in zip(judged.values(), numbers, strict=True):
            table[place] = number
    return {"value": value, **judged, "q": statistics.false_discovery_rate(judged["p"])}


def js_divergence(p: Numbers, q: Numbers) -> Numbers:
    """Jensen-Shannon divergence of distributions along the last axis, bits.

    Example:
        >>> float(js_divergence(np.array([1.0, 0.0]), np.array([0.0, 1.0])))
        1.0
    """
    mean = (p + q) / 2
    nats = (special.rel_entr(p, mean) + special.rel_entr(q, mean)).sum(axis=-1) / 2
    return np.maximum(nats / np.log(2), 0.0)


def _information(p_DLE: Numbers, variance_DLE: Numbers) -> tuple[Numbers, ...]:
    """I(domain; expert) by layer, and its expectation if all domains had the mean's shares.

    For close shares it is Σ (p_d - m)² / m / (2 ln 2), mean over domains; a domain's own part of the mean m takes 1/D
    of the variance away.
    """
    num_domains = len(p_DLE)
    if num_domains < 2:
        return (np.full(p_DLE.shape[1], np.nan),) * 2
    mean_LE = p_DLE.mean(axis=0)
    information = special.rel_entr(p_DLE, mean_LE).sum(axis=-1).mean(axis=0) / np.log(2)
    used = mean_LE > 0
    noise = np.divide(variance_DLE.mean(axis=0), mean_LE, out=np.zeros_like(mean_LE), where=used).sum(axis=-1)
    return np.maximum(information, 0.0), noise * (1 - 1 / num_domains) / (2 * np.log(2))


def _leader(value_DL: Numbers, low_DL: Numbers, high_DL: Numbers) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Index of the domain with the largest value by layer, -1 if there is none, and whether significantly."""
    num_domains, num_layers = value_DL.shape
    leader, significant = np.full(num_layers, -1), np.zeros(num_layers, bool)
    for layer in range(num_layers):
        if np.isfinite(value_DL[:, layer]).any():
            first = leader[layer] = int(np.nanargmax(value_DL[:, layer]))
            others = np.delete(high_DL[:, layer], first)
            significant[layer] = num_domains > 1 and np.isfinite(others).all() and low_DL[first, layer] > others.max()
    return leader, significant


def divergence_of_samples(
    observed: float, mean_E: Numbers, variance_2E: Numbers, degrees_2: Numbers
) -> tuple[float, float, float, float]:
    """Judge the divergence of two estimated distributions.

    Args:
        observed: Their divergence, bits.
        mean_E: The mean of the two.
        variance_2E: The variance of each share of each.
        degrees_2: Degrees of freedom of each.
    Returns:
        Expectation under equality, p-value of equality, and the interval of the true divergence.

    For close p and q, JSD ≈ Σ (p - q)² / m / (8 ln 2), and under equality (p - q)² has the expectation v_p + v_q.
    """
    used = mean_E > 0
    weights_2E = variance_2E[:, used] / mean_E[used] / (8 * np.log(2))
    expected = float(weights_2E.sum())
    if not (used.sum() > 1 and np.isfinite(expected) and expected > 0):
        return expected if used.sum() > 1 else 0.0, float("nan"), float("nan"), float("nan")
    by_expert, by_side = weights_2E.sum(axis=0), weights_2E.sum(axis=1)
    num_used = int(used.sum())
    df = max(1.0, expected**2 / float((by_expert**2).sum()) * (num_used - 1) / num_used)
    df_error = max(1.0, expected**2 / float((by_side**2 / np.maximum(degrees_2, 1)).sum()))
    statistic = observed / expected
    low, high = statistics.noncentral_interval(statistic, df, df_error)
    return expected, float(stats.f.sf(statistic, df, df_error)), low / df * expected, high / df * expected
