"""Expert parallelism: what the routing of a trace costs on devices that share the experts of a layer.

The load of a device is the assignments of its experts. All devices wait for the most loaded one, so what counts is the
largest load of a batch over the mean; what drops is what exceeds an expert's capacity; what travels is a token's hidden
state, once to each device that holds one of its experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moescope.measures import groups, schema, statistics
from moescope.measures.schema import FRACTION
from moescope.measures.statistics import Numbers
from moescope.simulation.batch_counts import (
    NULL_TOKENS,
    POSITION_BINS,
    BatchCounter,
    BatchCounts,
    Setting,
    count_shuffled,
    count_uniform,
)
from moescope.simulation.batches import BatchKind, tokens_together
from moescope.simulation.parallel_kernels import BINS_PER_E
from moescope.simulation.placements import ALGORITHMS, DECODE_TOKENS, FITTED, PREFILL_TOKENS, Cluster, Placement, place
from moescope.simulation.profile import NUM_CELLS, NUM_FOLDS, Cells, Profile, profile
from moescope.tallying import Source
from moescope.tallying.counted import playable
from moescope.tallying.one_pass import one_pass
from moescope.trace import Trace

FACTORS = tuple(1 + n / 4 for n in range(13))
"""Capacity factors, 1 to 4."""

FEW_DROPS = 0.001
"""Share of dropped assignments that a capacity factor must stay below to be called sufficient."""

QUANTILES = (0.05, 0.5, 0.95)
FOREIGN = ("eplb", "eplb-replicated")
"""Placements that are also fitted on one domain and judged on another."""

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


def parallel(
    trace: Source,
    *,
    devices: int,
    nodes: int = 1,
    prefill: int | Sequence[int] = PREFILL_TOKENS,
    decode: int | Sequence[int] = DECODE_TOKENS,
    placements: Sequence[str] = tuple(ALGORITHMS),
    redundant_experts: int | None = None,
    expert_groups: int = 1,
    hidden_size: int | None = None,
    bytes_per_value: int | None = None,
    layers: Iterable[int] | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> xr.Dataset:
    """Replay a trace on devices that share the experts of each layer.

    Documents fall into two folds; batches hold documents of one fold, and placements are fitted on the other.

    Args:
        trace: The trace or its folder, read in two passes; or what was counted of it (`moescope.count`), if that holds
            all documents.
        devices: Devices that share the experts of each layer.
        nodes: Nodes, of as many devices each.
        prefill: Tokens of a prefill batch, one number or several: consecutive tokens, one prompt after the other.
        decode: Tokens of a decode batch, one number or several: one token of each of so many running sequences.
        placements: Some of "linear", "random", "eplb", "eplb-replicated", "affinity".
        redundant_experts: Slots beyond one an expert, for eplb-replicated; None for one a device, or as many as fill
            the devices evenly where they do not divide the experts.
        expert_groups: Groups of experts among which the router chooses first (DeepSeek's n_group), for EPLB.
        hidden_size: Values of a hidden state; None for what the trace says, if it does.
        bytes_per_value: Of a hidden state as it travels; None for what the trace says of the model's dtype.
        layers: Layers of the trace to replay, or None for all.
        seed: Of the random placement and of the nulls.
        threads: Parts counted at a time; None for the number of processors.
    Returns:
        By (placement, batch, layer), `batch` being "prefill 4096" and the like:

        * `over_subscription`: Σ over batches of the largest load of a device / Σ of the mean load; `_low`, `_high`: 95
          % interval over documents; `_quantile` (…, quantile): over batches; `_own`: fitted on the documents it is
          judged on; `_null`, `_uniform`: of batches without locality, and of uniform routing; `_null_quantile`;
        * `devices_reached`, `nodes_reached`: distinct devices and nodes of the experts of a token, mean; `_low`,
          `_high`, and `_uniform`;
        * `bytes_within_nodes`, `bytes_between_nodes`: of a token's hidden state on its way to its experts, where the
          hidden size is known.

        By (placement, batch): `slowest`: the same over all layers, Σ of the largest / Σ of the mean, with `_low`,
        `_high`, `_quantile`, `_own`, `_null`, `_uniform`; `batches` (batch). By (placement, against, batch):
        `slowest_difference`: `slowest` less that of another placement in the same batches, `_low`, `_high`.

        By (batch, domain, layer, capacity_factor), all domains together first: `dropped`, the share of the assignments
        that exceed ⌈factor · tokens · top-k / experts⌉ of an expert in a batch, `_low`, `_high`; by (batch,
        position, layer, capacity_factor) `dropped_by_position`, `position` being the first of the bin; by (batch,
        layer, capacity_factor) `dropped_null`, `dropped_uniform`; by (batch, layer) `sufficient_factor`, the smallest
        factor that drops less than 0.1 %, and `sufficient_factor_null`.

        By (placement, fitted_on, domain), all domains together first: `foreign`: Σ over layers of the largest / Σ of
        the mean load, of all the domain's assignments together, `_low`, `_high`. Only of eplb and eplb-replicated.
    Raises:
        ValueError: Experts cannot be shared out evenly, or there is no such placement; it says what to try.
        NoSuchLayer: A layer was not recorded.
        NotRecorded: The trace holds counts only.
        TraceDamaged: A page fails its checksum.
    Warns:
        The trace has one document, so nothing can be fitted; fitted placements are NaN.
    Source:
        Over-subscription and capacity factor: GShard (arXiv 2006.16668), Switch Transformers (arXiv 2101.03961); EPLB:
        github.com/deepseek-ai/EPLB; locality: Mixtral of Experts (arXiv 2401.04088), section 5. Affinity is ours.
    """
    trace = playable(trace, layers)
    trace.need_tokens()
    chosen = trace.select_layers(layers)
    cluster = Cluster(devices, nodes, redundant_experts, expert_groups)
    names = tuple(dict.fromkeys(placements))
    cluster.check(chosen, names)
    kinds = (*_kinds("prefill", prefill), *_kinds("decode", decode))
    if not kinds:
        raise ValueError("name at least one size of prefill or decode batches")
    width = _hidden_bytes(trace, hidden_size, bytes_per_value)
    cells = Cells(trace)
    counted = profile(trace, chosen, kinds[0], cells, pairs="affinity" in names, threads=threads)
    judged = _placed(names, cluster, counted, seed)
    setting = Setting(chosen, trace.domains, kinds, cluster, judged, FACTORS)
    (counter,) = one_pass(
        trace,
        chosen,
        lambda: [BatchCounter(setting, cells, BatchCounts.empty(setting, domains=len(trace.domains)))],
        threads=threads,
        tokens=trace.header.phases,
        together=tokens_together(trace, kinds),
    )
    rng = np.random.default_rng(seed)
    null_setting = replace(setting, placements=tuple(of_fold[: len(names)] for of_fold in judged))
    # What no batch fills has a null only while that is cheap to draw.
    wanted = (counter.counts.batches_S > 0) | (np.array([kind.tokens for kind in kinds]) <= NULL_TOKENS)
    shuffled, uniform = count_shuffled(null_setting, counted, rng, wanted), count_uniform(null_setting, seed, wanted)
    documents_X = counted.documents_XG.sum(axis=1)
    by_domain = schema.total_coordinates(trace.domains, documents_X)
    variables = {
        **_loads(setting, names, counter.counts, shuffled, uniform),
        **_reached(setting, len(names), counter.counts, uniform, width),
        **_drops(setting, counter.counts, shuffled, uniform, documents_X),
        **_foreign(counted, cluster, [name for name in FOREIGN if name in names]),
    }
    result = xr.Dataset(
        variables,
        {
            "placement": list(names),
            "against": list(names),
            "batch": [kind.label for kind in kinds],
            "phase": ("batch", [kind.phase for kind in kinds]),
            "batch_tokens": ("batch", [kind.tokens for kind in kinds]),
            **schema.layer_coordinates(chosen),
            "quantile": list(QUANTILES),
            **by_domain,
            "fitted_on": by_domain["domain"],
            "position": 2 ** np.arange(POSITION_BINS) - 1,
            "capacity_factor": list(FACTORS),
        },
        {"devices": devices, "nodes": nodes, "expert_groups": expert_groups, "hidden_bytes": width or 0},
    )
    fitted = [name for name in names if name in FITTED]
    if fitted and not all(counted.documents_XG[:, fold::NUM_FOLDS].any() for fold in range(NUM_FOLDS)):
        warnings.warn(
            f"{trace.path} has one document: there is none to fit {', '.join(fitted)} on; they are left out",
            stacklevel=2,
        )
        for variable in result.data_vars.values():
            for dim in {"placement", "against"} & set(variable.dims):
                variable.loc[{dim: fitted}] = np.nan
    return result


def _kinds(phase: Literal["prefill", "decode"], sizes: int | Sequence[int]) -> list[BatchKind]:
    given = [sizes] if isinstance(sizes, int) else list(dict.fromkeys(sizes))
    if any(size < 1 for size in given):
        raise ValueError(f"a {phase} batch holds at least one token, not {min(given)}")
    return [BatchKind(phase, size) for size in given]


def _hidden_bytes(trace: Trace, hidden_size: int | None, bytes_per_value: int | None) -> int | None:
    """Bytes of a hidden state; None where neither the caller nor the trace says."""
    for name, value in (("hidden_size", hidden_size), ("bytes_per_value", bytes_per_value)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    size = hidden_size if hidden_size is not None else trace.header.model.get("hidden_size")
    width = bytes_per_value if bytes_per_value is not None else _BYTES.get(str(trace.header.model.get("dtype")))
    if width is None or not isinstance(size, int) or isinstance(size, bool) or size < 1:
        return None
    return size * width


def _placed(names: Sequence[str], cluster: Cluster, counted: Profile, seed: int) -> tuple[tuple[Placement, ...], ...]:
    """For each fold the placements fitted on the other, then those of them that are fitted on itself."""
    fits = [counted.fits([fold]) for fold in range(NUM_FOLDS)]
    of_fold = [
        {name: place(name, cluster, counted.layers, fits[fold], seed=seed) for name in names}
        for fold in range(NUM_FOLDS)
    ]
    own = [name for name in names if name in FITTED]
    return tuple(
        (*(of_fold[1 - fold][name] for name in names), *(of_fold[fold][name] for name in own))
        for fold in range(NUM_FOLDS)
    )


def _loads(
    setting: Setting, names: tuple[str, ...], counts: BatchCounts, shuffled: BatchCounts, uniform: BatchCounts
) -> dict[str, Any]:
    """What batches wait for, by layer and over all layers."""
    devices, asked = setting.cluster.devices, len(names)
    by_layer, over_all = ("placement", "batch", "layer"), ("placement", "batch")
    fitted = [name for name in names if name in FITTED]
    own = [asked + fitted.index(name) if name in fitted else p for p, name in enumerate(names)]

    def by_layers(of: BatchCounts) -> Numbers:
        largest_PSL = np.moveaxis(of.largest_SLPG.sum(axis=3), 2, 0)
        return devices * statistics.ratio(largest_PSL, of.made_SLG.sum(axis=2))

    def all_layers(of: BatchCounts) -> Numbers:
        largest_PS = of.largest_SLPG.sum(axis=(1, 3)).T
        return devices * statistics.ratio(largest_PS, of.made_SLG.sum(axis=(1, 2)))

    value, all_value = by_layers(counts), all_layers(counts)
    ends = np.full((2, asked, *value.shape[1:]), np.nan)
    all_ends = np.full((2, asked, len(setting.kinds)), np.nan)
    difference = np.full((3, asked, asked, len(setting.kinds)), np.nan)
    for s in range(len(setting.kinds)):
        for layer in range(len(setting.layers)):
            ends[:, :, s, layer] = _interval(counts.largest_SLPG[s, layer, :asked], counts.made_SLG[s, layer], devices)
        largest_PG, made_G = counts.largest_SLPG[s, :, :asked].sum(axis=0), counts.made_SLG[s].sum(axis=0)
        all_ends[:, :, s] = _interval(largest_PG, made_G, devices)
        for against in range(asked):
            difference[0, :, against, s] = all_value[:asked, s] - all_value[against, s]
            difference[1:, :, against, s] = _interval(largest_PG - largest_PG[against], made_G, devices, -np.inf)
    endings = ("", "_low", "_high", "_own", "_null", "_uniform")
    quantiles = {
        "over_subscription_quantile": _quantiles(counts.histogram_SLPB[:, :, :asked]),
        "over_subscription_null_quantile": _quantiles(shuffled.histogram_SLPB),
    }
    over_subscription = value[:asked], *ends, value[own], by_layers(shuffled), by_layers(uniform)
    slowest = all_value[:asked], *all_ends, all_value[own], all_layers(shuffled), all_layers(uniform)
    loads, all_loads = (
        {f"{name}{ending}": table for ending, table in zip(endings, tables, strict=True)}
        for name, tables in (("over_subscription", over_subscription), ("slowest", slowest))
    )
    slowest_quantile = {"slowest_quantile": _quantiles(counts.slowest_SPB[:, None, :asked])[:, :, 0]}
    differences = {f"slowest_difference{end}": difference[n] for n, end in enumerate(("", "_low", "_high"))}
    return (
        schema.labelled(loads, by_layer, _OF_LOADS)
        | schema.labelled(quantiles, (*by_layer, "quantile"), _OF_LOADS)
        | schema.labelled(all_loads, over_all, _OF_LOADS)
        | schema.labelled(slowest_quantile, (*over_all, "quantile"), _OF_LOADS)
        | schema.labelled(differences, ("placement", "against", "batch"), _OF_LOADS)
        | schema.labelled({"batches": counts.batches_S}, ("batch",), _OF_LOADS)
    )


_BESIDE = {
    "quantile": "its quantile over batches",
    "own": "the same, fitted on the documents it is judged on",
    "null": "of the same tokens in any order",
    "null_quantile": "quantile of the same tokens in any order over batches",
    "uniform": "of uniform routing",
}
_OF_LOADS: dict[str, tuple[str, ...]] = {
    **{f"{name}_{end}": (words, "1") for name in ("over_subscription", "slowest") for end, words in _BESIDE.items()},
    "over_subscription": ("largest load of a device over the mean, over batches", "1", "GShard (arXiv 2006.16668)"),
    "slowest": ("Σ over layers of the largest load over Σ of the mean", "1"),
    "slowest_difference": ("the same less that of another placement", "1"),
    "batches": ("batches", "batches"),
}


def _interval(
    y_PG: NDArray[np.int64], n_G: NDArray[np.int64], scale: float, least: float = 1.0
) -> tuple[Numbers, Numbers]:
    """95 % interval of `scale` Σy / Σn over cells of documents, not below `least`."""
    ratio, error = groups.ratio_errors(y_PG.T, n_G)
    half = groups.student(int((n_G > 0).sum())) * error
    return np.maximum(scale * (ratio - half), least), scale * (ratio + half)


def _quantiles(histogram_SLPB: NDArray[np.int64]) -> Numbers:
    """Quantiles from histograms, shape (placement, kind, layer, quantile), in bins of half a per cent."""
    edges = np.exp(np.arange(histogram_SLPB.shape[3] + 1) / BINS_PER_E)
    quantiles = np.full((*np.moveaxis(histogram_SLPB, 2, 0).shape[:3], len(QUANTILES)), np.nan)
    for s, layer, p in np.ndindex(histogram_SLPB.shape[:3]):
        quantiles[p, s, layer] = statistics.histogram_quantiles(histogram_SLPB[s, layer, p], edges, QUANTILES)
    return quantiles


def _reached(
    setting: Setting, asked: int, counts: BatchCounts, uniform: BatchCounts, width: int | None
) -> dict[str, Any]:
    """Devices and nodes that a token reaches, and the bytes that go there."""
    dims = ("placement", "batch", "layer")
    cluster = setting.cluster
    variables: dict[str, Any] = {}
    mean = []
    for n, name in enumerate(("devices", "nodes")):

        def means(of: BatchCounts, n: int = n) -> Numbers:
            reached_PSL = np.moveaxis(of.reached_SLPG2[..., n].sum(axis=3), 2, 0)
            return statistics.ratio(reached_PSL, of.tokens_SLG.sum(axis=2))

        value = means(counts)[:asked]
        low, high = np.full((2, *value.shape), np.nan)
        for s, layer in np.ndindex(counts.tokens_SLG.shape[:2]):
            reached_PG = counts.reached_SLPG2[s, layer, :asked, :, n]
            low[:, s, layer], high[:, s, layer] = _interval(reached_PG, counts.tokens_SLG[s, layer], 1.0, 0.0)
        what = f"distinct {name} of the experts of a token, mean"
        variables |= schema.estimate(f"{name}_reached", dims, what, name, value=value, low=low, high=high)
        variables[f"{name}_reached_uniform"] = schema.described(means(uniform), dims, "of uniform routing", name)
        mean.append(value)
    if width is not None:
        a_node = cluster.devices // cluster.nodes
        within, between = mean[0] * (1 - 1 / a_node), mean[1] * (1 - 1 / cluster.nodes)
        for name, copies in (("within", within), ("between", between)):
            what = f"of a token's hidden state, {name} nodes, on the way to its experts"
            variables[f"bytes_{name}_nodes"] = schema.described(copies * width, dims, what, "bytes a token and layer")
    return variables


def _drops(
    setting: Setting, counts: BatchCounts, shuffled: BatchCounts, uniform: BatchCounts, documents_X: NDArray[np.int64]
) -> dict[str, Any]:
    """Dropped assignments by capacity factor."""
    num_kinds, num_layers, num_domains = counts.dropped_SLXGJ.shape[:3]
    shape = num_kinds, num_domains + 1, num_layers, len(setting.factors)
    value, low, high = np.full((3, *shape), np.nan)
    documents = schema.add_total(documents_X)
    for s, x, layer in np.ndindex(shape[:3]):
        of_GJ = schema.add_total(counts.dropped_SLXGJ[s, layer])[x]
        made_G = of_GJ.sum(axis=1)
        p, error = groups.ratio_errors(_at_least(of_GJ), made_G)
        value[s, x, layer] = p
        low[s, x, layer], high_F = statistics.proportion_interval(p, error, int((made_G > 0).sum()))
        _, rare = statistics.proportion_interval(0.0, 0.0, documents[x])
        high[s, x, layer] = np.where(p == 0, rare, high_F)  # no document has any: they count, not the cells
    position_SLQJ = counts.dropped_SLQGJ.sum(axis=3)
    by_position = statistics.ratio(_at_least(position_SLQJ), position_SLQJ.sum(axis=3, keepdims=True))

    def without_order(of: BatchCounts) -> Numbers:
        of_SLJ = of.dropped_SLXGJ.sum(axis=(2, 3))
        return statistics.ratio(_at_least(of_SLJ), of_SLJ.sum(axis=2, keepdims=True))

    sufficient = {
        "sufficient_factor": _sufficient(setting, counts),
        "sufficient_factor_null": _sufficient(setting, shuffled),
    }
    nulls = {"dropped_null": without_order(shuffled), "dropped_uniform": without_order(uniform)}
    dropped = {"dropped": value, "dropped_low": low, "dropped_high": high}
    dims = ("batch", "layer", "capacity_factor")
    return (
        schema.labelled(dropped, ("batch", "domain", *dims[1:]), _OF_DROPS)
        | schema.labelled(
            {"dropped_by_position": np.moveaxis(by_position, 2, 1)}, ("batch", "position", *dims[1:]), _OF_DROPS
        )
        | schema.labelled(nulls, dims, _OF_DROPS)
        | schema.labelled(sufficient, dims[:2], _OF_DROPS)
    )


_OF_DROPS: dict[str, tuple[str, ...]] = {
    "dropped": (
        "share of the assignments dropped",
        FRACTION,
        "Switch Transformers (arXiv 2101.03961), expert capacity",
    ),
    "dropped_by_position": ("share of the assignments dropped, by position in the sequence", FRACTION),
    "dropped_null": (_BESIDE["null"], FRACTION),
    "dropped_uniform": (_BESIDE["uniform"], FRACTION),
    "sufficient_factor": ("smallest factor that drops less than 0.1 %", "1"),
    "sufficient_factor_null": (_BESIDE["null"], "1"),
}


def _at_least(dropped_J: NDArray[np.int64]) -> NDArray[np.int64]:
    """Along the last axis, from how many factors drop an assignment to what each factor drops."""
    return np.flip(np.cumsum(np.flip(dropped_J, axis=-1), axis=-1), axis=-1)[..., 1:]


def _sufficient(setting: Setting, counts: BatchCounts) -> Numbers:
    """The smallest capacity that drops less than 0.1 %, as a factor, shape (kind, layer)."""
    factor = np.full((len(setting.kinds), len(setting.layers)), np.nan)
    for s, number in np.ndindex(factor.shape):
        kind, layer, loads_I = setting.kinds[s], setting.layers[number], counts.loads[s][number]
        more = np.cumsum(loads_I[::-1])[::-1]  # experts of batches with a load of at least i
        dropped = np.append(np.cumsum(more[::-1])[::-1][1:], 0)  # at capacity i: Σ over loads > i of load - i
        made = (loads_I * np.arange(len(loads_I))).sum()
        if made:
            capacity = int(np.argmax(dropped < FEW_DROPS * made))
            factor[s, number] = capacity * layer.num_experts / (kind.tokens * layer.top_k)
    return factor


def _foreign(counted: Profile, cluster: Cluster, names: Sequence[str]) -> dict[str, Any]:
    """Placements fitted on one domain's documents of a fold, judged on another's of the other fold."""
    if not names:
        return {}
    scopes: list[int | None] = [None, *range(len(counted.domains))]
    shape = len(names), len(scopes), len(scopes)
    y, n = np.zeros((2, *shape, NUM_CELLS), np.int64)
    for i, fitted_on in enumerate(scopes):
        for fold in range(NUM_FOLDS):
            fits = counted.fits([1 - fold], fitted_on)
            if not all(fit.loads.sum() for fit in fits.values()):
                continue
            for p, name in enumerate(names):
                placed = place(name, cluster, counted.layers, fits)
                for all_XGE, layer in zip(counted.loads_LXGE, counted.layers, strict=True):
                    loads_XGE = all_XGE[:, fold::NUM_FOLDS, : layer.num_experts]
                    loads_XGD = schema.add_total(loads_XGE) @ _device_shares(placed, layer.layer)
                    busiest_X = loads_XGD.sum(axis=1).argmax(axis=1)
                    for j, busiest in enumerate(busiest_X):
                        y[p, i, j, fold::NUM_FOLDS] += np.rint(loads_XGD[j, :, busiest] * _PARTS).astype(np.int64)
                        n[p, i, j, fold::NUM_FOLDS] += np.rint(loads_XGD[j].sum(axis=1) * _PARTS).astype(np.int64)
    value, low, high = np.full((3, *shape), np.nan)
    for cell in np.ndindex(shape):
        if n[cell].any():
            value[cell] = cluster.devices * y[cell].sum() / n[cell].sum()
            (low[cell],), (high[cell],) = _interval(y[cell][None], n[cell], cluster.devices)
    dims = ("foreign_placement", "fitted_on", "domain")
    what = "Σ over layers of the largest load of a device over Σ of the mean, all assignments of the domain together"
    return {
        **schema.estimate("foreign", dims, what, "1", value=value, low=low, high=high),
        "foreign_placement": ("foreign_placement", list(names)),
    }


_PARTS = 2**10
"""Loads of replicas are fractions; they are summed in so many parts of an assignment."""


def _device_shares(placed: Placement, layer: int) -> Numbers:
    """Part of each expert's assignments that goes to each device, shape (expert, device)."""
    device_EC, count_E = placed.devices(layer), placed.num_replicas(layer)
    share_ED = np.zeros((len(count_E), placed.cluster.devices))
    e, c = np.nonzero(device_EC >= 0)
    np.add.at(share_ED, (e, device_EC[e, c]), 1 / count_E[e])
    return share_ED
