"""Word classes: whether indentation, punctuation, digits … go to experts of their own, and how far, in bits.

The unit is the assignment of a token. A class is compared with the *other tokens of the same documents*: indentation
occurs in code, so against all tokens it would differ by its domain alone. Divergence is that of Jensen and Shannon, to
base 2, as between domains.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moescope.errors import NotRecorded
from moescope.measures import groups, schema, statistics
from moescope.measures.divergence import LIN, divergence_of_samples, js_divergence
from moescope.measures.schema import EXPERT_ID, FRACTION
from moescope.tallying import Source
from moescope.tallying.counted import counted
from moescope.tallying.counter import CountOptions
from moescope.tallying.word_class_kernels import FIXED
from moescope.tallying.word_classes import CLASSES, ClassCounter, ClassCounts
from moescope.trace import Layer


def syntax(
    trace: Source,
    layers: Iterable[int] | None = None,
    *,
    choice: str = "first",
    threads: int | None = None,
) -> xr.Dataset:
    """How differently the tokens of each word class choose from the other tokens of their documents.

    The classes are those of `tallying.word_classes.CLASSES`; a token may be of several. One pass; 63 MB a thread for 60
    layers of 256 experts.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`).
        layers: Layers of the trace to measure, or None for all; counts have theirs.
        choice: "first", the first choice of a token; or "all", all of its choices alike.
        threads: Parts counted at a time; None for the number of processors.
    Returns:
        By (word_class, layer):

        * `jsd`: divergence, bits, between the choices of the class and what they would be if they were shared out as
          those of the other tokens of each document; `jsd_null`, its expectation from sampling documents alone;
          `jsd_low`, `jsd_high`, 95 % interval of the true one (jackknife over groups of documents where that stays
          above `jsd_null`, else by inversion of the test); `jsd_p` of equality, `jsd_q` with the false discovery rate
          controlled over classes and layers;
        * `jsd_all`: the same against all other tokens of the trace, whatever their documents;
        * `top_expert`: the expert whose share exceeds that among the others by most; `top_share`,
          `top_share_low`, `top_share_high`, its share of the class; `top_share_null`, of the others.

        `tokens` (word_class) and, a coordinate, `documents` with such a token; NaN where a class has no token beside
        others.
    Raises:
        NotRecorded: The trace has no token ids, holds counts, or does not say which choice is the first.
        NoSuchLayer: A layer was not recorded.
        ValueError: `choice` is neither.
    Source:
        Mixtral of Experts, section 5, speaks of "structured syntactic behavior"; classes and comparison are ours.
        Lin 1991 (divergence); Rao and Scott 1984 (test, see `measures.divergence`).
    """
    total = counted(trace, ClassCounter, layers=layers, options=CountOptions(choice=choice), threads=threads)
    counts = total[ClassCounter]
    if counts.choice != choice:
        raise NotRecorded(
            total.path, f"the counts hold word classes of {counts.choice} choices", "give the trace itself"
        )
    judged = [
        [_judge(counts, place, layer, c) for place, layer in enumerate(counts.layers)] for c in range(len(CLASSES))
    ]
    values = {name: np.array([[one[name] for one in by_layer] for by_layer in judged]) for name in _JUDGED}
    values["jsd_q"] = statistics.false_discovery_rate(values["jsd_p"])
    return xr.Dataset(
        {
            **schema.labelled(values, ("word_class", "layer"), _MEANINGS),
            "tokens": schema.described(counts.tokens_C[:-1], ("word_class",), "tokens of the class", "tokens"),
        },
        {
            **schema.layer_coordinates(counts.layers),
            "word_class": list(CLASSES),
            "documents": ("word_class", counts.documents_C[:-1], {"units": "documents"}),
        },
        {"choice": counts.choice, "tokens": int(counts.tokens_C[-1]), "documents": int(counts.documents_C[-1])},
    )


def _judge(counts: ClassCounts, place: int, layer: Layer, c: int) -> dict[str, float]:
    """The values of `_JUDGED` for a class and a layer."""
    size = layer.num_ids
    y_GE = counts.counts_LXCE[place, :, c, :size]
    expected_GE = counts.expected_LXCE[place, :, c, :size] / FIXED
    n_G = y_GE.sum(axis=1)
    against_all = _against_all(counts.totals_LCE[place, :, :size], c)
    if not n_G.sum():
        return dict.fromkeys(_JUDGED, float("nan")) | {"jsd_all": against_all}
    p_E, error_E = groups.ratio_errors(y_GE, n_G)
    q_E = expected_GE.sum(axis=0) / n_G.sum()
    used = n_G > 0
    num_groups = int(used.sum())
    jsd = float(js_divergence(p_E, q_E))
    null = p_value = low = high = float("nan")
    if num_groups > 1:
        difference_GE = (y_GE - expected_GE)[used]
        residual_GE = difference_GE - (p_E - q_E) * n_G[used, None]
        variance_E = num_groups / (num_groups - 1) * (residual_GE**2).sum(axis=0) / float(n_G.sum()) ** 2
        mean_E, degrees_2 = (p_E + q_E) / 2, np.full(2, num_groups - 1.0)
        variance_2E = np.stack([variance_E, np.zeros(size)])
        # The test is of the divergence's square form, to which experts without a token, where tokens are few, add no
        # more than the test expects; its ends are stretched to the divergence itself.
        square = float((statistics.ratio((p_E - q_E) ** 2, mean_E)[mean_E > 0]).sum()) / (8 * np.log(2))
        null, p_value, low, high = divergence_of_samples(square, mean_E, variance_2E, degrees_2)
        stretch = jsd / square if square > 0 else 1.0
        null, low, high = null * stretch, low * stretch, min(high * stretch, 1.0)
        both_GE = np.concatenate([y_GE * FIXED, counts.expected_LXCE[place, :, c, :size]], axis=1)
        value, error, _ = groups.jackknife(_divergence, both_GE)
        half = groups.student(num_groups) * float(error[0])
        if value[0] - half > null:  # well away from zero, where it is nearly normal
            low, high = float(value[0]) - half, min(float(value[0]) + half, 1.0)
    top = int(np.argmax(p_E - q_E))
    top_low, top_high = statistics.proportion_interval(p_E[top], error_E[top], num_groups)
    return {
        "jsd": jsd,
        "jsd_low": low,
        "jsd_high": high,
        "jsd_null": null,
        "jsd_p": p_value,
        "jsd_all": against_all,
        "top_expert": top,
        "top_share": float(p_E[top]),
        "top_share_low": float(top_low),
        "top_share_high": float(top_high),
        "top_share_null": float(q_E[top]),
    }


def _divergence(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divergence of two sets of counts that lie one after the other, shape (..., 2 x expert) to (..., 1)."""
    p, q = np.split(sums, 2, axis=-1)
    return js_divergence(p / p.sum(axis=-1, keepdims=True), q / q.sum(axis=-1, keepdims=True))[..., None]


def _against_all(totals_CE: NDArray[np.int64], c: int) -> float:
    own_E, others_E = totals_CE[c], totals_CE[-1] - totals_CE[c]
    if not (own_E.any() and others_E.any()):
        return float("nan")
    return float(js_divergence(own_E / own_E.sum(), others_E / others_E.sum()))


_MEANINGS = {
    "jsd": ("Jensen-Shannon divergence from the other tokens of the same documents", "bits", LIN),
    "jsd_null": ("divergence expected from sampling alone", "bits"),
    "jsd_p": ("p-value of no divergence", "1", "Rao and Scott 1984"),
    "jsd_q": ("p-value adjusted over classes and layers", "1", "Benjamini and Hochberg 1995"),
    "jsd_all": ("Jensen-Shannon divergence from all other tokens", "bits", LIN),
    "top_expert": ("expert that exceeds its share among the others by most", EXPERT_ID),
    "top_share": ("its share of the class", FRACTION),
    "top_share_null": ("its share of the other tokens of the same documents", FRACTION),
}

_JUDGED = (
    *("jsd", "jsd_low", "jsd_high", "jsd_null", "jsd_p", "jsd_all"),
    *("top_expert", "top_share", "top_share_low", "top_share_high", "top_share_null"),
)
"""What `_judge` gives of a class and a layer."""
