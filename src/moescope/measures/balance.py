"""Load balance: how evenly the assignments fall on the experts, over the whole trace and within batches.

The unit is the assignment, all ranks together, to a routed expert; null experts and dropped assignments are left out.
Imbalance is the largest load over the mean load, from 1 (the paper of auxiliary-loss-free balancing calls it less 1
MaxVio); the rest describes all experts, not only the busiest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moescope.measures import groups, schema, statistics
from moescope.measures.schema import EXPERT_ID
from moescope.measures.statistics import Numbers
from moescope.tallying import Source
from moescope.tallying.balance import WEIGHT_STATISTICS, BalanceCounter, BalanceCounts
from moescope.tallying.balance_kernels import BINS_PER_E, FIXED, WEIGHT_BINS, WEIGHT_FIXED
from moescope.tallying.counted import counted
from moescope.trace import Layer

NEARLY_IDLE = 0.1
"""Part of the uniform share below which an expert is nearly idle; one with no assignment at all is idle."""

NULL_DRAWS, DRAWS_OF_A_DOMAIN = 512, 128  # the error of their mean is 4 % and 9 % of their spread
QUANTILES = (0.05, 0.5, 0.95)

LOSS_FREE = "Wang et al. 2024 (arXiv 2408.15664)"
SUMMARIES: dict[str, tuple[str, ...]] = {
    "imbalance": ("largest load over mean load", "1", "Switch Transformers (arXiv 2101.03961), of f_i"),
    "cv": ("standard deviation of the loads over their mean", "1", "Shazeer et al. 2017 (arXiv 1701.06538)"),
    "gini": ("Gini coefficient of the loads", "1", "Gini 1912"),
    "entropy": ("entropy of the shares over that of equal ones, H / log E", "1", "Shannon 1948"),
}

_GINI = list(SUMMARIES).index("gini")
_ALL_NOISE = 1 / (np.sqrt(2) - 1)
"""Gini of equal experts over what drawing around it adds: noise on noise of the same size is √2 times as large."""


def balance(
    trace: Source,
    layers: Iterable[int] | None = None,
    *,
    threads: int | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """How evenly a trace loads its experts.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`).
        layers: Layers of the trace to measure, or None for all; counts have theirs.
        threads: Parts counted at a time; None for the number of processors.
        seed: Of the draws behind the nulls.
    Returns:
        By (domain, layer), the first "domain" being all of them together (`total` says so):

        * `imbalance`, `max_vio` (imbalance - 1), `cv`, `gini`, `entropy` (H / log E); with `_low` and `_high`, 95 %
          interval over documents, and `_null`, what perfectly balanced routing would show with documents that vary as
          these do;
        * `busiest`: the expert with the largest load;
        * `idle`: experts without an assignment; `nearly_idle`: others with less than a tenth of the uniform share;
          `nearly_idle_low`, `nearly_idle_high`: those significantly and those possibly below, by intervals of their
          shares.

        By (layer, batch), unless the trace holds counts; `batch` is the number of consecutive sequences:

        * `batch_imbalance`: mean over batches; `_low`, `_high`: 95 % interval of that mean; `_quantile` (layer, batch,
          quantile); `_null`, `_null_quantile`: the same of batches with as many tokens, drawn from the whole trace
          independently;
        * `batches` (batch), `batch_tokens` (batch).

        By (domain, layer, statistic), if gate weights were recorded: `weight`, `weight_low`, `weight_high`, and
        `weight_quantile` (layer, statistic, quantile), of the weights of a token normalised to sum 1: the largest
        ("first"), its lead over the second ("margin"), their entropy in bits ("entropy").
    Raises:
        NoSuchLayer: A layer was not recorded.
    Source:
        The definitions: see the variables; intervals: `measures.groups`.
    """
    counts = counted(trace, BalanceCounter, layers=layers, threads=threads)[BalanceCounter]
    rng = np.random.default_rng(seed)
    coordinates = schema.total_coordinates(counts.domains, counts.documents_DG.sum(axis=1))
    coordinates = schema.layer_coordinates(counts.layers) | coordinates
    rows = [
        _of_loads(loads_GE, layer, DRAWS_OF_A_DOMAIN if domain else NULL_DRAWS, rng)
        for domain in range(len(counts.domains) + 1)
        for layer, loads_GE in zip(counts.layers, _scoped(counts, domain), strict=True)
    ]
    shape = len(counts.domains) + 1, len(counts.layers)
    tables = {name: np.array([row[name] for row in rows]).reshape(shape) for name in rows[0]}
    variables: dict[str, Any] = schema.labelled(tables, ("domain", "layer"), _OF_LOADS)
    if counts.batch_sizes:
        variables |= _batches(counts, rng)
        coordinates |= {"batch": list(counts.batch_sizes), "quantile": list(QUANTILES)}
    if counts.has_weights:
        variables |= _weights(counts)
        coordinates |= {"statistic": list(WEIGHT_STATISTICS), "quantile": list(QUANTILES)}
    return xr.Dataset(variables, coordinates)


_OF_LOADS = SUMMARIES | {
    **{f"{name}_null": ("the same of perfect balance with such documents", "1") for name in SUMMARIES},
    "max_vio": ("MaxVio, imbalance - 1", "1", LOSS_FREE),
    "busiest": ("expert with the largest load", EXPERT_ID),
    "idle": ("experts without an assignment", "experts"),
    "nearly_idle": ("other experts below a tenth of the uniform share", "experts"),
    "nearly_idle_low": ("of them, those significantly below", "experts"),
    "nearly_idle_high": ("experts with an assignment that may be below", "experts"),
}


def summaries(loads: Numbers) -> Numbers:
    """Imbalance, squared coefficient of variation, Gini coefficient and 1 - H / log E of loads along the last axis.

    Args:
        loads: Loads or shares, shape (..., expert), not all zero.
    Returns:
        Shape (..., 4); for a single expert 1, 0, 0, 0.

    Example:
        >>> summaries(np.array([3.0, 1.0, 0.0, 0.0])).round(4).tolist()
        [3.0, 1.5, 0.625, 0.5944]
    """
    with np.errstate(invalid="ignore"):
        p = loads / loads.sum(axis=-1, keepdims=True)
    num_experts = p.shape[-1]
    squared_cv = num_experts * ((p - 1 / num_experts) ** 2).sum(axis=-1)
    weights = 2 * np.arange(1, num_experts + 1) - num_experts - 1
    gini = (np.sort(p, axis=-1) * weights).sum(axis=-1) / num_experts
    nats = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
    deficit = 1 - nats / np.log(num_experts) if num_experts > 1 else np.zeros(p.shape[:-1])
    return np.stack([num_experts * p.max(axis=-1), squared_cv, gini, deficit], axis=-1)


def _scoped(counts: BalanceCounts, domain: int) -> NDArray[np.int64]:
    """Loads by layer, group and expert of all domains (0) or of the one at `domain` - 1."""
    return counts.loads_LDGE.sum(axis=1) if domain == 0 else counts.loads_LDGE[:, domain - 1]


def _of_loads(loads_GE: NDArray[np.int64], layer: Layer, num_draws: int, rng: np.random.Generator) -> dict[str, float]:
    """Everything about one layer of one domain."""
    num_experts = layer.num_experts
    loads_GE = loads_GE[:, :num_experts]
    made_G = loads_GE.sum(axis=1)
    if not made_G.sum():
        unknown = [f"{name}{end}" for name in SUMMARIES for end in ("", "_low", "_high", "_null")]
        idle = {"idle": num_experts, "nearly_idle": 0, "nearly_idle_low": 0, "nearly_idle_high": 0}
        return dict.fromkeys([*unknown, "max_vio", "busiest"], float("nan")) | idle
    p, error = groups.ratio_errors(loads_GE, made_G)
    value, jack_error, used = groups.jackknife(summaries, loads_GE)
    seen = summaries(p)
    null = around = np.full((1, 4), np.nan)
    if used > 1:
        uniform = np.full(num_experts, 1 / num_experts)
        null = summaries(groups.draws_around(uniform, loads_GE, num_draws, rng))
        around = summaries(groups.draws_around(p, loads_GE, num_draws, rng))
    limit = np.quantile(null, 0.95, axis=0)
    half = groups.student(used) * jack_error
    low, high = value - half, value + half
    # Noise adds to differences between equal experts, which the jackknife does not see of Gini's absolute values.
    bias = around[:, _GINI].mean() - seen[_GINI]
    low[_GINI] = min(value[_GINI], seen[_GINI] - _ALL_NOISE * bias) - half[_GINI]
    high[_GINI] = max(value[_GINI], seen[_GINI] - bias) + half[_GINI]
    low[0], high[0] = (num_experts * end for end in groups.interval_of_largest(p, error, used))
    floor = np.array([1.0, 0, 0, 0])
    ceiling = np.array([num_experts, num_experts - 1, 1 - 1 / num_experts, 1.0])
    low = np.where(np.isfinite(low) & (seen <= limit), floor, low)  # perfect balance would show as much
    low, high = (np.clip(end, floor, ceiling) for end in (np.fmin(low, seen), np.fmax(high, seen)))
    low, high = (np.where(np.isfinite(half), end, np.nan) for end in (low, high))
    expected = null.mean(axis=0)
    # Square root of the squared coefficient of variation; H / log E is 1 less its deficit.
    row: dict[str, float] = {}
    for place, name in enumerate(SUMMARIES):
        values = {"": seen[place], "_low": low[place], "_high": high[place], "_null": expected[place]}
        if name == "cv":
            values = {end: np.sqrt(v) for end, v in values.items()} | {"_null": np.sqrt(null[:, place]).mean()}
        if name == "entropy":
            values = {"": 1 - seen[place], "_low": 1 - high[place], "_high": 1 - low[place]}
            values["_null"] = 1 - expected[place]
        row |= {f"{name}{end}": float(v) for end, v in values.items()}
    below, above = statistics.proportion_interval(p, error, used)
    threshold = NEARLY_IDLE / num_experts
    working = p > 0
    return row | {
        "max_vio": float(seen[0]) - 1,
        "busiest": float(p.argmax()),
        "idle": int((~working).sum()),
        "nearly_idle": int((working & (p < threshold)).sum()),
        "nearly_idle_low": int((working & (above < threshold)).sum()),
        "nearly_idle_high": int((working & ~(below >= threshold)).sum()),
    }


def _batches(counts: BalanceCounts, rng: np.random.Generator) -> dict[str, Any]:
    """The variables of batches."""
    number_LS = counts.imbalances_LSB.sum(axis=2)
    mean = statistics.ratio(counts.imbalance_LS / FIXED, number_LS)
    square = statistics.ratio(counts.imbalance_squared_LS / FIXED, number_LS)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(np.maximum(square - mean**2, 0) / (number_LS - 1))
    half = statistics.student_t(number_LS) * error
    sizes = range(len(counts.batch_sizes))
    edges = np.exp(np.arange(counts.imbalances_LSB.shape[2] + 1) / BINS_PER_E)  # bins of half a per cent
    seen = [
        [statistics.histogram_quantiles(histogram_B, edges, QUANTILES) for histogram_B in histogram_SB]
        for histogram_SB in counts.imbalances_LSB
    ]
    null_LSR = np.stack([_null_batches(counts, size, rng) for size in sizes], axis=1)
    dims = ("layer", "batch")
    null_quantiles = np.moveaxis(np.quantile(null_LSR, QUANTILES, axis=2), 0, 2)
    quantiles = {"batch_imbalance_quantile": np.array(seen), "batch_imbalance_null_quantile": null_quantiles}
    tokens_S = statistics.ratio(counts.token_sums_SB.sum(axis=1), counts.tokens_SB.sum(axis=1))
    return {
        **schema.estimate(
            "batch_imbalance",
            dims,
            "imbalance within a batch, mean over batches",
            "1",
            LOSS_FREE,
            meanings={"null": "the same of tokens drawn independently"},
            value=mean,
            low=np.maximum(mean - half, 1),
            high=mean + half,
            null=null_LSR.mean(axis=2),
        ),
        **schema.labelled(quantiles, (*dims, "quantile"), _OF_BATCHES),
        **schema.labelled({"batches": number_LS.max(axis=0), "batch_tokens": tokens_S}, dims[1:], _OF_BATCHES),
    }


_OF_BATCHES = {
    "batch_imbalance_quantile": ("imbalance within a batch, quantile", "1"),
    "batch_imbalance_null_quantile": ("quantile of tokens drawn independently", "1"),
    "batches": ("batches", "batches"),
    "batch_tokens": ("tokens of a batch, mean", "tokens"),
}


def _null_batches(counts: BalanceCounts, s: int, rng: np.random.Generator) -> Numbers:
    """Imbalance of batches of independent tokens, shape (layer, draw).

    Tokens are drawn with replacement from a sample of the trace, with all their choices; what the sample's loads differ
    from the whole trace's is added, so that the mean is exact. The same draws serve all layers.
    """
    bins = counts.tokens_SB[s]
    hashed = len(counts.tokens(counts.layers[0].layer))
    if not bins.sum() or not hashed:
        return np.full((len(counts.layers), NULL_DRAWS), np.nan)
    of_bin = statistics.ratio(counts.token_sums_SB[s], bins)
    tokens_R = np.rint(of_bin[rng.choice(len(bins), NULL_DRAWS, p=bins / bins.sum())]).astype(np.int64)
    drawn_RT = rng.multinomial(tokens_R, np.full(hashed, 1 / hashed)).astype(np.float32)
    results = []
    for place, layer in enumerate(counts.layers):
        ids = counts.tokens(layer.layer)
        chosen_TE = np.zeros((hashed, layer.num_experts), np.float32)
        rows, choices = np.nonzero((ids >= 0) & (ids < layer.num_experts))
        chosen_TE[rows, ids[rows, choices]] = 1
        load_E = counts.loads_LDGE[place, :, :, : layer.num_experts].sum(axis=(0, 1))
        shift_E = load_E / max(int(counts.tokens_DG.sum()), 1) - chosen_TE.mean(axis=0)
        loads_RE = np.maximum(drawn_RT @ chosen_TE + tokens_R[:, None] * shift_E, 0)
        total = loads_RE.sum(axis=1)
        results.append(statistics.ratio(loads_RE.max(axis=1) * layer.num_experts, total))
    return np.array(results)


def _weights(counts: BalanceCounts) -> dict[str, Any]:
    """The variables of gate weights."""
    num_layers, num_domains = counts.weighed_LDG.shape[:2]
    value, low, high = (np.full((num_domains + 1, num_layers, len(WEIGHT_STATISTICS)), np.nan) for _ in range(3))
    most_LW = np.array([[1.0, 1.0, np.log2(layer.top_k)] for layer in counts.layers])
    for layer in range(num_layers):
        sums_DGW, n_DG = schema.add_total(counts.weights_LDGW[layer]), schema.add_total(counts.weighed_LDG[layer])
        for domain, (y_GW, n_G) in enumerate(zip(sums_DGW, n_DG, strict=True)):
            mean, error = groups.ratio_errors(y_GW, n_G)
            half = groups.student(int((n_G > 0).sum())) * error
            value[domain, layer] = mean / WEIGHT_FIXED
            low[domain, layer] = np.clip((mean - half) / WEIGHT_FIXED, 0, most_LW[layer])
            high[domain, layer] = np.clip((mean + half) / WEIGHT_FIXED, 0, most_LW[layer])
    edges = np.linspace(0, 1, WEIGHT_BINS + 1)
    quantiles = [
        [statistics.histogram_quantiles(histogram_B, edges, QUANTILES) for histogram_B in of_layer]
        for of_layer in counts.weight_histogram_LWB
    ] * most_LW[:, :, None]
    dims, units = ("domain", "layer", "statistic"), "1; entropy: bits"
    what = "statistic of a token's gate weights"
    return schema.estimate("weight", dims, f"{what}, mean over tokens", units, value=value, low=low, high=high) | {
        "weight_quantile": schema.described(np.array(quantiles), (*dims[1:], "quantile"), f"{what}, quantile", units)
    }
