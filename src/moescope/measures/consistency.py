"""Local routing consistency (SRP): how well one fixed set of experts would serve a whole segment of tokens.

The unit is a pair of an expert and a segment of m consecutive tokens of a sequence, at every place. The best fixed set
takes the experts that are active at least so often in the segment; SRP is its F1 score against the experts the tokens
really chose.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from moescope.measures import schema, statistics
from moescope.measures.schema import DIFFERENCE, FRACTION
from moescope.tallying import Source
from moescope.tallying.counted import counted
from moescope.tallying.counter import CountOptions
from moescope.tallying.segments import FIXED, SegmentCounter

SOURCE = "arXiv 2505.16056, equation 6"


def consistency(
    trace: Source,
    layers: Iterable[int] | None = None,
    *,
    lengths: Sequence[int] | None = None,
    threads: int | None = None,
) -> xr.Dataset:
    """SRP by layer, domain and segment length, against random order within the document.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`).
        layers: Layers of the trace to measure, or None for all; counts have theirs.
        lengths: m, tokens of a segment; None for 4, 16, 64 and 256, or those that were counted.
        threads: Parts counted at a time; None for the number of processors.
    Returns:
        Dims (domain, layer, length), the first domain being all of them together; and, with `model_` before the name,
        (domain, length) of all layers together with one threshold, as the source publishes it:

        * `srp`, `srp_low`, `srp_high`: the F1 score of the best threshold; 95 %, jackknife over (groups of) documents;
        * `srp_null`: the SRP to expect if the tokens of each document stood in random order, exact;
        * `excess`, `excess_low`, `excess_high`: `srp` less `srp_null`, paired by document; `excess_p` that it is 0 and
          `excess_q` with the false discovery rate controlled over layers and lengths (and over domains, apart from all
          of them together);
        * `size_ratio`: experts in the best fixed set over experts that a token chooses;
        * `srp_uniform` (layer, length): SRP if each token drew k of E experts uniformly and without end.

        `documents` (domain, length), a coordinate, are those that hold a segment.
        NaN where no document is long enough. Null experts are no experts here; a dropped assignment activates none.
    Raises:
        NoSuchLayer: A layer was not recorded.
        NotRecorded: The trace holds counts only.
        TraceDamaged: A page fails its checksum.
        ValueError: A length is out of range, comes twice, or was not counted.
    Source:
        Liang et al., Not All Models Suit Expert Offloading (arXiv 2505.16056), equations 4 to 6: all places, segments
        within a sequence, all experts of the group with one threshold. Null, intervals and tests are ours.
    """
    options = CountOptions(lengths=None if lengths is None else tuple(lengths))
    total = counted(trace, SegmentCounter, layers=layers, options=options, threads=threads)
    counts = total[SegmentCounter].of_lengths(lengths)
    num_layers, num_domains, num_lengths = len(counts.layers), len(counts.domains) + 1, len(counts.lengths)
    table = np.full((len(_JUDGED), num_domains, num_layers + 1, num_lengths), np.nan)
    for m, length in enumerate(counts.lengths):
        for place in range(num_layers + 1):
            layers_here = slice(None) if place == num_layers else slice(place, place + 1)
            real = counts.at_least[length][layers_here].sum(axis=0).astype(float)
            null = counts.expected[length][layers_here].sum(axis=0) / FIXED
            for d in range(num_domains):
                rows = np.flatnonzero(counts.segments[:, m] > 0)
                rows = rows if d == 0 else rows[counts.domain_of_group[rows] == d - 1]
                if len(rows):
                    table[:, d, place, m] = _judge(real[rows], null[rows], counts.domain_of_group[rows], length)
    values = dict(zip(_JUDGED, table, strict=True))
    p = values["excess_p"]
    adjusted = (statistics.false_discovery_rate(p[some]) for some in (slice(0, 1), slice(1, None)))
    values["excess_q"] = np.concatenate(list(adjusted))
    by_layer = {name: array[:, :num_layers] for name, array in values.items()}
    by_model = {f"model_{name}": array[:, num_layers] for name, array in values.items()}
    whole = {f"model_{name}": (f"{words[0]}, all layers together", *words[1:]) for name, words in _MEANINGS.items()}
    uniform = [[uniform_srp(a.num_experts, a.top_k, length) for length in counts.lengths] for a in counts.layers]
    return xr.Dataset(
        {
            **schema.labelled(by_layer, ("domain", "layer", "length"), _MEANINGS),
            **schema.labelled(by_model, ("domain", "length"), whole),
            "srp_uniform": schema.described(
                uniform, ("layer", "length"), "SRP of uniform independent routing", FRACTION
            ),
        },
        {
            **schema.total_coordinates(counts.domains, np.zeros(num_domains - 1)),
            **schema.layer_coordinates(counts.layers),
            "length": list(counts.lengths),
            "documents": (("domain", "length"), schema.add_total(counts.documents), {"units": "documents"}),
        },
    )


_JUDGED = ("srp", "srp_low", "srp_high", "size_ratio", "srp_null", "excess", "excess_low", "excess_high", "excess_p")
"""What `_judge` gives."""

_MEANINGS = {
    "srp": ("F1 of the best fixed set of experts for a segment", FRACTION, SOURCE),
    "size_ratio": ("experts in the best fixed set over experts a token chooses", "1", SOURCE),
    "srp_null": ("SRP with the tokens of each document in random order", FRACTION),
    "excess": ("SRP less that of random order", DIFFERENCE),
    "excess_q": ("p-value adjusted over layers and lengths", "1", "Benjamini and Hochberg 1995"),
}


def uniform_srp(num_experts: int, top_k: int, length: int) -> float:
    """SRP of uniform independent routing: activations of an expert in a segment are binomial.

    Example:
        Two of eight over segments of two tokens: an expert is active twice in 1/16 of the segments and once in 6/16.
        Taking it where it is active at all gives 2 · 1/2 / (2 · 7/16 + 1/2).

        >>> round(uniform_srp(8, 2, 2), 4)
        0.7273
    """
    at_least = np.append(1.0, stats.binom.sf(np.arange(length), length, top_k / num_experts))
    return float(best_f1(at_least, length)[0])


def best_f1(at_least_V: NDArray[np.float64], length: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The best F1 score over thresholds a = 0 .. m, and that threshold.

    Args:
        at_least_V: Pairs of segment and expert with at least v activations, v = 0 .. m along the last axis.
        length: m.
    Returns:
        max over a of 2 Σ_{f>=a} f / (m · #(f >= a) + Σ f), and the a; NaN where nothing is active.
    """
    # Σ of f over f >= a is a times their number, and one more for each v > a that they reach.
    above = np.cumsum(at_least_V[..., ::-1], axis=-1)[..., ::-1]
    active = np.append(above[..., 1:], np.zeros((*above.shape[:-1], 1)), axis=-1)
    active += np.arange(length + 1) * at_least_V
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = 2 * active / (length * at_least_V + active[..., :1])
    threshold = np.argmax(np.nan_to_num(f1, nan=-1.0), axis=-1)
    return np.take_along_axis(f1, threshold[..., None], axis=-1)[..., 0], threshold


def _judge(
    real_RV: NDArray[np.float64], null_RV: NDArray[np.float64], domain_R: NDArray[np.int64], length: int
) -> tuple[float, ...]:
    """The values of `_JUDGED` for one cell; R groups of documents with a segment."""
    sides = np.stack([real_RV, null_RV])
    total = sides.sum(axis=1)
    (srp, shuffled), threshold = best_f1(total, length)
    taken = total[0, threshold[0]] * length
    activations = total[0, 1:].sum()
    size_ratio = taken / activations if activations else np.nan
    without = best_f1(total[:, None] - sides, length)[0]  # shape (side, group)
    error, df = _jackknife(without[0], domain_R)
    difference_error, difference_df = _jackknife(without[0] - without[1], domain_R)
    t, difference_t = (
        float(stats.t.ppf((1 + statistics.CONFIDENCE) / 2, d)) if d > 0 else np.nan for d in (df, difference_df)
    )
    beyond = srp - shuffled
    tested = difference_error > 0 and difference_df > 0
    p_value = 2 * stats.t.sf(abs(beyond) / difference_error, difference_df) if tested else np.nan
    return (
        srp,
        float(np.maximum(0.0, srp - t * error)),
        float(np.minimum(1.0, srp + t * error)),
        size_ratio,
        shuffled,
        beyond,
        beyond - difference_t * difference_error,
        beyond + difference_t * difference_error,
        p_value,
    )


def _jackknife(without_R: NDArray[np.float64], domain_R: NDArray[np.int64]) -> tuple[float, float]:
    """Standard error from values with one group left out, stratified by domain, and its degrees of freedom.

    Groups of few segments say little of the error: the degrees of freedom are those of a sum of squares that varies as
    these do, at most the number of groups less that of domains.

    Source:
        Wolter 2007, Introduction to Variance Estimation, section 4.5; degrees of freedom: Satterthwaite 1946.
    """
    squares = []
    for code in np.unique(domain_R):
        values = without_R[domain_R == code]
        squares.append((len(values) - 1) / len(values) * (values - values.mean()) ** 2)
    square_R = np.concatenate(squares)
    variance, groups = float(square_R.sum()), len(square_R)
    spread = float((square_R**2).sum()) - variance**2 / groups
    most = groups - len(squares)
    df = min(most, 2 * variance**2 / spread) if spread > 0 else most
    return float(np.sqrt(variance)), df
