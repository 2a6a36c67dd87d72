"""Expert caches: how many of the experts that a token needs would already be there, by policy and size of the cache.

The unit is the request: an expert that a step needs in a layer, once however many of its tokens need it; decoding one
sequence, that is the assignment. Caches start empty and fetch on demand; all experts of a step are probed together, and
while they are served none is evicted for another. A cache of c holds c experts of each layer, or with one budget for
all layers c times the number of layers in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moescope.measures import schema, statistics
from moescope.measures.schema import DIFFERENCE, ENDINGS, FRACTION
from moescope.measures.statistics import Numbers
from moescope.simulation.playing import Caches, Plan
from moescope.simulation.serving import POLICIES, Server, Settings, Steps, cache_sizes
from moescope.tallying import Source
from moescope.tallying.counted import playable
from moescope.tallying.document_groups import affordable_groups
from moescope.tallying.one_pass import threads_to_use
from moescope.trace import Trace

_ELISEEV = "LRU a layer: Eliseev and Mazur 2023, arXiv 2312.17238, section 3.1"


def cache(
    trace: Source,
    layers: Iterable[int] | None = None,
    *,
    policies: Sequence[str] = POLICIES,
    sizes: Iterable[int] | None = None,
    budget: Literal["layer", "global"] = "layer",
    batch: int = 1,
    prefill: int | None = None,
    cold_sequences: bool = False,
    null: bool = True,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Simulate caches of experts on a trace.

    Memory is that of a part, and 8 bytes an expert for every four million assignments of the trace.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`), if that holds all documents.
        layers: Layers, or None for all.
        policies: Of `POLICIES`.
        sizes: Experts a layer that the cache holds, from the largest top-k to the most experts a layer has; None for
            all of these, where S3-FIFO is simulated for a few.
        budget: ``layer``: a cache a layer. ``global``: one cache of `sizes` times the number of layers.
        batch: Sequences decoded at a time, each one token a step.
        prefill: Tokens of a chunk of prefill, served together; None to decode.
        cold_sequences: Empty the caches before each sequence; otherwise they go on through the whole trace.
        null: Also serve the tokens of each document in random order; without, the variables of that null are NaN.
        seed: Of that order.
        threads: Layers simulated at a time; None for the number of processors.
        progress: Called with the number of parts done and of all.
    Returns:
        The first "domain" is all of them together (`total` says so); `size` is in experts a layer.

        * `hit_ratio` (policy, domain, layer, size): hits over requests, with `_low` and `_high`, its 95 % interval over
          documents, and `_null`, the same with the tokens of each document in random order; `hit_ratio_uniform` (layer,
          size): c/E, what every cache hits under uniform independent routing;
        * `model_hit_ratio` and the same beside it (policy, domain, size; `_uniform`: domain, size): of all layers
          together;
        * `gain`, `gain_low`, `gain_high` (policy, domain, size): `model_hit_ratio` less its null, what order is worth;
        * `closed`, `closed_low`, `closed_high` (policy, domain, size): the part of the way from LRU to the optimum that
          the policy goes, of all layers together; NaN where the two are equal;
        * `requests` (domain, layer), `tokens` (domain); `loads` (policy, domain, size): misses a token, in experts.

        `hot` and `matching` are NaN where one half of the corpus has no document. The settings are attributes.
    Raises:
        NoSuchLayer: A layer was not recorded.
        NotRecorded: The trace holds counts only.
        ValueError: An argument is none that could be, such as a cache that is smaller than top-k.
    Source:
        Mattson et al. 1970 (all sizes in one pass); Belady 1966; Yang et al. 2023 (S3-FIFO); matching after the idea of
        MoE-Infinity, Xue et al. 2024, arXiv 2401.14361; a cache a layer, LRU: Eliseev and Mazur 2023, arXiv 2312.17238.
    """
    trace = playable(trace, layers)
    trace.need_tokens()
    chosen = trace.select_layers(layers)
    policies = (policies,) if isinstance(policies, str) else tuple(policies)
    settings = Settings(chosen, policies, *cache_sizes(chosen, sizes), budget, batch, prefill, cold_sequences)
    threads = threads_to_use(threads, len(settings.sharing))
    num_domains = len(trace.domains)
    widest = max(layer.num_experts for layer in chosen)
    groups = affordable_groups(num_domains * len(chosen) * (widest + 1) * len(settings.policies) * 4)
    seeds = [None, seed] if null else [None]
    passes = len(trace.parts) * (2 if settings.fitted or settings.foresees else 1)
    done = 0

    def ready() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, passes)

    plan = Plan.of(trace, settings, seeds, ready)
    library = plan.library if "matching" in settings.policies else None
    servers = [Server(settings, groups=groups, seed=order, library=library) for order in seeds]
    caches = [
        [Caches(settings, layers, num_domains * groups, plan.library) for layers in settings.sharing] for _ in seeds
    ]
    chunks = [0] * len(seeds)
    tokens_D = np.zeros(num_domains, np.int64)
    with ThreadPoolExecutor(threads) as pool:

        def serve(run: int, steps: Steps) -> None:
            if run == 0:
                tokens_D[:] += np.bincount(steps.cell_T // groups, minlength=num_domains)
            after_N = plan.after(run, chunks[run])
            chunks[run] += 1
            list(pool.map(lambda shared: shared.serve(steps, after_N), caches[run]))

        for part_file in trace.parts:
            part = trace.with_trace_domains(part_file.read(chosen, tokens=False))
            for run, server in enumerate(servers):
                for steps in server.steps(part):
                    serve(run, steps)
            ready()
        for run, server in enumerate(servers):
            for steps in server.rest():
                serve(run, steps)
    unfitted = {"hot", "matching"} if (plan.loads_FN.sum(axis=1) == 0).any() else set()
    counted = [_CacheCounts.of(settings, of_run, num_domains, groups, unfitted) for of_run in caches]
    return _labelled(trace, settings, counted, tokens_D, seed)


@dataclass(frozen=True)
class _CacheCounts:
    """What was counted. P policies, D domains, G groups of documents, L layers, Z sizes."""

    hits: dict[str, Numbers]
    requests_DGL: Numbers

    @classmethod
    def of(
        cls, settings: Settings, caches: Sequence[Caches], num_domains: int, groups: int, unknown: set[str]
    ) -> _CacheCounts:
        """What the caches of a run counted; the hits of some policies are not known."""
        shape = (num_domains, groups, len(settings.layers))
        hits = {}
        for name in settings.policies:
            hits_CLZ = np.concatenate([shared.hits(name) for shared in caches], axis=1)
            hits[name] = hits_CLZ.reshape(*shape, len(settings.sizes)) * (np.nan if name in unknown else 1)
        requests = np.concatenate([shared.requests() for shared in caches], axis=1)
        return cls(hits, requests.reshape(shape).astype(float))


def _labelled(
    trace: Trace, settings: Settings, counted: Sequence[_CacheCounts], tokens_D: NDArray[np.int64], seed: int
) -> xr.Dataset:
    observed, shuffled = counted[0], counted[1] if len(counted) > 1 else None
    dims = ("policy", "domain", "layer", "size")
    shape = (len(settings.policies), len(trace.domains) + 1, len(settings.layers), len(settings.sizes))
    by_layer = {name: np.full(shape, np.nan) for name in _BY_LAYER}
    model = {name: np.full((*shape[:2], shape[3]), np.nan) for name in _OF_MODEL}
    tokens = schema.add_total(tokens_D)

    def put(tables: dict[str, Numbers], name: str, estimate: tuple[Numbers, Numbers, Numbers]) -> None:
        for end, values in zip(("", "_low", "_high"), estimate, strict=True):
            tables[f"{name}{end}"][p, d] = values

    for (p, policy), d in product(enumerate(settings.policies), range(shape[1])):
        hits, requests = _of_domain(observed.hits[policy], d), _of_domain(observed.requests_DGL, d)
        together, all_requests = hits.sum(axis=1), requests.sum(axis=1)[:, None]
        put(by_layer, "hit_ratio", _proportion(hits, requests[..., None]))
        put(model, "model_hit_ratio", _proportion(together, all_requests))
        model["loads"][p, d] = statistics.ratio(all_requests.sum() - together.sum(axis=0), tokens[d])
        if shuffled is not None:
            null, null_requests = _of_domain(shuffled.hits[policy], d), _of_domain(shuffled.requests_DGL, d)
            by_layer["hit_ratio_null"][p, d] = statistics.ratio(null.sum(axis=0), null_requests.sum(axis=0)[:, None])
            pair = (null.sum(axis=1), null_requests.sum(axis=1)[:, None])
            model["model_hit_ratio_null"][p, d] = statistics.ratio(pair[0].sum(axis=0), pair[1].sum())
            put(model, "gain", _difference(together, all_requests, *pair))
        if "lru" in observed.hits and "belady" in observed.hits:
            lru, best = (_of_domain(observed.hits[name], d).sum(axis=1) for name in ("lru", "belady"))
            put(model, "closed", _quotient(together - lru, best - lru))
    num_experts = np.array([layer.num_experts for layer in settings.layers])
    uniform = np.minimum(1.0, np.array(settings.sizes) / num_experts[:, None])
    requests_DL = schema.add_total(observed.requests_DGL.sum(axis=1))
    uniform_DZ = statistics.ratio(requests_DL @ uniform, requests_DL.sum(axis=1)[:, None])
    documents = np.bincount(trace.document_domains, minlength=len(trace.domains))
    return xr.Dataset(
        schema.labelled(by_layer, dims, _BY_LAYER)
        | schema.labelled(model, (*dims[:2], dims[3]), _OF_MODEL)
        | {
            "hit_ratio_uniform": schema.described(uniform, dims[2:], _UNIFORM, FRACTION, _ELISEEV),
            "model_hit_ratio_uniform": schema.described(
                uniform_DZ, ("domain", "size"), f"{_UNIFORM}, all layers", FRACTION, _ELISEEV
            ),
            "requests": schema.described(requests_DL, dims[1:3], "requests", "requests"),
            "tokens": schema.described(tokens, ("domain",), "tokens served", "tokens"),
        },
        coords={
            "policy": list(settings.policies),
            **schema.total_coordinates(trace.domains, documents),
            **schema.layer_coordinates(settings.layers),
            "size": list(settings.sizes),
        },
        attrs={
            "budget": settings.budget,
            "batch": settings.batch,
            "prefill": settings.prefill or 0,
            "cold_sequences": int(settings.cold),
            "seed": seed,
        },
    )


_UNIFORM = "c/E, under uniform independent routing"
_BY_LAYER: dict[str, tuple[str, ...]] = {
    "hit_ratio": ("hits over requests", FRACTION, _ELISEEV),
    "hit_ratio_low": (ENDINGS["low"], FRACTION),
    "hit_ratio_high": (ENDINGS["high"], FRACTION),
    "hit_ratio_null": ("the same with the tokens of each document in random order", FRACTION),
}
_OF_MODEL: dict[str, tuple[str, ...]] = {
    **{f"model_{name}": (f"{words}, all layers", *unit) for name, (words, *unit) in _BY_LAYER.items()},
    "gain": ("hit ratio less that of tokens in random order", DIFFERENCE),
    "gain_low": (ENDINGS["low"], DIFFERENCE),
    "gain_high": (ENDINGS["high"], DIFFERENCE),
    "closed": ("part of the way from LRU to the optimum", FRACTION),
    "closed_low": (ENDINGS["low"], FRACTION),
    "closed_high": (ENDINGS["high"], FRACTION),
    "loads": ("experts to be loaded a token, all layers", "experts a token"),
}


def _of_domain(values: Numbers, d: int) -> Numbers:
    """The groups of all domains together for 0, else of domain d - 1, with the group first."""
    return values.reshape(-1, *values.shape[2:]) if d == 0 else values[d - 1]


def _proportion(hits_G: Numbers, requests_G: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Hits over requests with an interval over groups of documents, which are the first axis."""
    ratio, residual_G = _ratio(hits_G, requests_G)
    return ratio, *statistics.proportion_interval(ratio, *_error(residual_G, requests_G))


def _quotient(y_G: Numbers, n_G: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Σy / Σn, of any sign, with an interval; NaN where Σn is not positive, the interval also where nothing varies."""
    ratio, residual_G = _ratio(y_G, n_G)
    error, used = _error(residual_G, n_G)
    half = statistics.student_t(used) * np.where(error > 1e-12, error, np.nan)  # below is rounding
    return ratio, ratio - half, ratio + half


def _difference(
    hits_G: Numbers, requests_G: Numbers, null_G: Numbers, null_requests_G: Numbers
) -> tuple[Numbers, Numbers, Numbers]:
    """The difference of two ratios of the same groups, paired, with an interval."""
    ratio, residual_G = _ratio(hits_G, requests_G)
    null, null_residual_G = _ratio(null_G, null_requests_G)
    error, used = _error(residual_G - null_residual_G, requests_G)
    half = statistics.student_t(used) * error
    return ratio - null, ratio - null - half, ratio - null + half


def _ratio(y_G: Numbers, n_G: Numbers) -> tuple[Numbers, Numbers]:
    """Σy / Σn over groups, and the residual of each group, over Σn."""
    ratio = statistics.ratio(y_G.sum(axis=0), n_G.sum(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return ratio, (y_G - ratio * n_G) / n_G.sum(axis=0)


def _error(residual_G: Numbers, n_G: Numbers) -> tuple[Numbers, NDArray[Any]]:
    """Standard error from the residuals of groups, and the number of groups that hold something."""
    used = np.broadcast_to(np.count_nonzero(n_G, axis=0), residual_G.shape[1:])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(np.where(used > 1, used / (used - 1), np.nan) * (residual_G**2).sum(axis=0)), used
