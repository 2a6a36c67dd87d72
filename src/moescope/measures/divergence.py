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
from moescope.measures.schema import described
from moescope.measures.shares import shares
from moescope.tallying import Source

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
        * `jsd` (domain, other, layer): between two domains, bits; `jsd_null`, `jsd_low`, `jsd_high`, `pair_p_value` as
          below, and `pair_q_value`, with the false discovery rate controlled over layers and pairs;
        * `jsd_rest` (domain, layer): between a domain and the mean of the others' shares, bits; `jsd_rest_null`, its
          expectation if they were equal; `jsd_rest_low`, `jsd_rest_high`, 95 % interval of the true divergence;
          `p_value` of equality; `q_value`, the same with the false discovery rate controlled over layers and domains;
        * `information` (layer): I(domain; expert) with domains of equal weight, bits; `information_null`, its
          expectation if they were equal;
        * `leader` (layer): the domain furthest from the others, empty if there is one; `leads_surely`, whether its
          interval lies above those of all other domains.

        NaN where a domain has fewer than two documents or there is one domain.
    Source:
        Lin 1991; the test is a first-order Rao and Scott (1984) correction of the chi-square statistic of homogeneity
        to clustered counts, with Satterthwaite degrees of freedom; the interval inverts the noncentral distribution.
    """
    data = shares(trace, layers, threads=threads).sel(choice="either")
    p_DLE = np.nan_to_num(data["share"].values)
    variance_DLE = data["standard_error"].values ** 2
    num_domains = len(p_DLE)
    documents_D = data["documents"].values
    pairs = js_divergence(p_DLE[:, None], p_DLE[None, :])
    others = (np.ones((num_domains, num_domains)) - np.eye(num_domains)) / max(num_domains - 1, 1)
    rest_DLE = np.einsum("do,ole->dle", others, p_DLE)
    rest_variance_DLE = np.einsum("do,ole->dle", others**2, variance_DLE)
    to_rest = js_divergence(p_DLE, rest_DLE)
    null, p_value, low, high = (np.full(to_rest.shape, np.nan) for _ in range(4))
    for at in np.ndindex(to_rest.shape) if num_domains > 1 else ():
        degrees = np.append(documents_D[at[0]], documents_D.sum() - documents_D[at[0]] - num_domains + 2) - 1
        null[at], p_value[at], low[at], high[at] = divergence_of_samples(
            float(to_rest[at]),
            (p_DLE[at] + rest_DLE[at]) / 2,
            np.stack([variance_DLE[at], rest_variance_DLE[at]]),
            degrees.astype(float),
        )
    pair_null, pair_p, pair_low, pair_high = (np.full(pairs.shape, np.nan) for _ in range(4))
    for a, b, at_layer in np.argwhere(np.isfinite(pairs)):
        if a < b and documents_D[a] and documents_D[b]:
            both = divergence_of_samples(
                float(pairs[a, b, at_layer]),
                (p_DLE[a, at_layer] + p_DLE[b, at_layer]) / 2,
                variance_DLE[[a, b], at_layer],
                documents_D[[a, b]].astype(float) - 1,
            )
            for table, value in zip((pair_null, pair_p, pair_low, pair_high), both, strict=True):
                table[a, b, at_layer] = table[b, a, at_layer] = value
    upper = np.triu(np.ones((num_domains, num_domains), bool), 1)[:, :, None]
    pair_q = statistics.false_discovery_rate(np.where(upper, pair_p, np.nan))
    pair_q = np.where(upper, pair_q, pair_q.swapaxes(0, 1))
    empty = (data["tokens"].values == 0)[:, None] | (num_domains < 2)
    information, information_null = _information(p_DLE[documents_D > 0], variance_DLE[documents_D > 0])
    leader, surely = _leader(
        np.where(empty, np.nan, to_rest), np.where(empty, np.nan, low), np.where(empty, np.nan, high)
    )
    names = np.array([*data["domain"].values.tolist(), ""])
    by_domain, by_pair = ("domain", "layer"), ("domain", "other", "layer")

    def masked(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(empty, np.nan, values)

    return xr.Dataset(
        {
            "jsd": described(pairs, by_pair, "Jensen-Shannon divergence", "bits", LIN),
            "jsd_null": described(pair_null, by_pair, "divergence expected from sampling alone", "bits"),
            "jsd_low": described(pair_low, by_pair, "95 % interval, low end", "bits"),
            "jsd_high": described(pair_high, by_pair, "95 % interval, high end", "bits"),
            "pair_p_value": described(pair_p, by_pair, "p-value of equal shares", "1", "Rao and Scott 1984"),
            "pair_q_value": described(
                pair_q, by_pair, "p-value adjusted over layers and pairs", "1", "Benjamini and Hochberg 1995"
            ),
            "information": described(information, ("layer",), "I(domain; expert), domains alike", "bits", LIN),
            "information_null": described(information_null, ("layer",), "the same from sampling alone", "bits"),
            "leader": described(names[leader], ("layer",), "domain furthest from the others", ""),
            "leads_surely": described(surely, ("layer",), "whether its interval lies above all others", ""),
            "jsd_rest": described(masked(to_rest), by_domain, "divergence from the mean of the others", "bits", LIN),
            "jsd_rest_null": described(masked(null), by_domain, "divergence expected from sampling alone", "bits"),
            "jsd_rest_low": described(masked(low), by_domain, "95 % interval, low end", "bits"),
            "jsd_rest_high": described(masked(high), by_domain, "95 % interval, high end", "bits"),
            "p_value": described(masked(p_value), by_domain, "p-value of equal shares", "1", "Rao and Scott 1984"),
            "q_value": described(
                statistics.false_discovery_rate(masked(p_value)),
                by_domain,
                "p-value adjusted over layers and domains",
                "1",
                "Benjamini and Hochberg 1995",
            ),
        },
        {
            "domain": data["domain"],
            "other": data["domain"].values,
            "layer": data["layer"],
            "num_experts": data["num_experts"],
            "documents": data["documents"],
        },
    )


def js_divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Jensen-Shannon divergence of distributions along the last axis, bits.

    Example:
        >>> float(js_divergence(np.array([1.0, 0.0]), np.array([0.0, 1.0])))
        1.0
    """
    mean = (p + q) / 2
    nats = (special.rel_entr(p, mean) + special.rel_entr(q, mean)).sum(axis=-1) / 2
    return np.maximum(nats / np.log(2), 0.0)


def _information(p_DLE: NDArray[np.float64], variance_DLE: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
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


def _leader(
    value_DL: NDArray[np.float64], low_DL: NDArray[np.float64], high_DL: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Index of the domain with the largest value by layer, -1 if there is none, and whether it surely has it."""
    num_domains, num_layers = value_DL.shape
    leader, surely = np.full(num_layers, -1), np.zeros(num_layers, bool)
    for layer in range(num_layers):
        if np.isfinite(value_DL[:, layer]).any():
            first = leader[layer] = int(np.nanargmax(value_DL[:, layer]))
            others = np.delete(high_DL[:, layer], first)
            surely[layer] = num_domains > 1 and np.isfinite(others).all() and low_DL[first, layer] > others.max()
    return leader, surely


def divergence_of_samples(
    observed: float, mean_E: NDArray[np.float64], variance_2E: NDArray[np.float64], degrees_2: NDArray[np.float64]
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
