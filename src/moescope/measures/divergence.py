"""Divergence between domains: how differently they use the experts, in bits, and which domain stands out.

The unit is the assignment (all ranks together). Compared are the shares of Figure 7, domain with domain and each domain
with the mean of the others, by the Jensen-Shannon divergence with logarithm to base 2: 0 for equal shares, 1 bit for
shares without a common expert. (`scipy.spatial.distance.jensenshannon` returns its square root, in other units.)
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import special, stats

from moescope.measures import statistics
from moescope.measures.shares import shares
from moescope.measures.statistics import described
from moescope.tallying import Tally

LIN = "Lin 1991, Divergence measures based on the Shannon entropy"


def divergence(tally: Tally) -> xr.Dataset:
    """Jensen-Shannon divergence between the shares of domains, with its null.

    Sampling a few documents makes equal domains look different: `jsd_rest_null` is the divergence to expect from that
    alone, computed from the variance of the shares between documents. The test compares the two; the interval is of the
    divergence that remains.

    Args:
        tally: The counts; at least two domains with tokens.
    Returns:
        * `jsd` (domain, other, layer): between two domains, bits;
        * `jsd_rest` (domain, layer): between a domain and the mean of the others' shares, bits; `jsd_rest_null`, its
          expectation if they were equal; `jsd_rest_low`, `jsd_rest_high`, 95 % interval of the true divergence;
          `p_value` of equality; `q_value`, the same with the false discovery rate controlled over layers and domains.

        NaN where a domain has fewer than two documents or there is one domain.
    Source:
        Lin 1991; the test is a first-order Rao and Scott (1984) correction of the chi-square statistic of homogeneity
        to clustered counts, with Satterthwaite degrees of freedom; the interval inverts the noncentral distribution.
    """
    data = shares(tally).sel(choice="either")
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
    empty = (data["tokens"].values == 0)[:, None] | (num_domains < 2)
    by_domain = ("domain", "layer")

    def masked(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(empty, np.nan, values)

    return xr.Dataset(
        {
            "jsd": described(pairs, ("domain", "other", "layer"), "Jensen-Shannon divergence", "bits", LIN),
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
