"""Expert caches: how many of the experts that a token needs would already be there, by policy and size of the cache.

The unit is the request: an expert that a step needs in a layer, once however many of its tokens need it; decoding one
sequence, that is the assignment. Caches start empty and fetch on demand; all experts of a step are probed together, and
while they are served none is evicted for another. A cache of c holds c experts of each layer, or with one budget for
all layers c times the number of layers in all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moescope.measures import statistics
from moescope.measures.statistics import Numbers, described
from moescope.simulation import cache_kernels as kernels
from moescope.simulation.serving import Library, Server, Steps, document_folds, object_offsets
from moescope.tallying.document_groups import affordable_groups
from moescope.tallying.token_sample import token_hashes
from moescope.trace import Layer, Part, Trace

POLICIES = ("lru", "lfu", "aged-lfu", "s3-fifo", "hot", "matching", "belady")
"""Evict the expert used longest ago; used least often; the same with counts halved every `AGEING` steps; by three FIFO
queues; the coldest in other documents; the least used by the other document that this sequence resembles; the one used
again last, which is the optimum."""

AGEING = 64
"""Steps after which aged LFU halves its counts."""

LIBRARY = 64
"""Documents that `matching` compares a sequence with, of each half of the corpus."""

LIBRARY_TOKENS = 32
"""Tokens that such a document has at least."""

S3_SIZES = 8
"""Sizes, evenly spread, for which S3-FIFO is played through unless sizes are given: it needs a pass a size."""

ALL_DOMAINS = "(all)"
"""Name, among the domains, of the whole trace."""

_KINDS = {
    "lru": kernels.LRU,
    "lfu": kernels.LFU,
    "aged-lfu": kernels.AGED,
    "hot": kernels.TABLE,
    "matching": kernels.TABLE,
    "belady": kernels.NEXT,
}
_ELISEEV = "LRU a layer: Eliseev and Mazur 2023, arXiv 2312.17238, section 3.1"


def cache(
    trace: Trace,
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
    """Play a trace through caches of experts.

    Memory is that of a part, and 8 bytes an expert for every four million assignments of the trace.

    Args:
        trace: The trace.
        layers: Layers, or None for all.
        policies: Of `POLICIES`.
        sizes: Experts a layer that the cache holds, from the largest top-k to the most experts a layer has; None for
            all of these, where S3-FIFO is played through for a few.
        budget: ``layer``: a cache a layer. ``global``: one cache of `sizes` times the number of layers.
        batch: Sequences decoded at a time, each one token a step.
        prefill: Tokens of a chunk of prefill, served together; None to decode.
        cold_sequences: Empty the caches before each sequence; otherwise they go on through the whole trace.
        null: Also play the trace with the tokens of each document in random order; without, its variables are NaN.
        seed: Of that order.
        threads: Layers played at a time; None for the number of processors.
        progress: Called with the number of parts done and of all.
    Returns:
        `domain` holds "(all)" and the domains; `size` is in experts a layer.

        * `hit_ratio`, `low`, `high`, `null` (policy, domain, layer, size): hits over requests, with its 95 % interval
          over documents; the same with the tokens of each document in random order;
        * `overall`, `overall_low`, `overall_high`, `overall_null` (policy, domain, size): of all layers together;
        * `gain`, `gain_low`, `gain_high` (policy, domain, size): `overall` less `overall_null`, what order is worth;
        * `closed`, `closed_low`, `closed_high` (policy, domain, size): the part of the way from LRU to the optimum that
          the policy goes, of all layers together; NaN where the two are equal;
        * `uniform` (layer, size): c/E, what every cache hits under uniform independent routing;
        * `requests` (domain, layer), `tokens` (domain); `loads` (policy, domain, size): misses a token, in experts;
        * `num_experts`, `top_k` (layer).

        `hot` and `matching` are NaN where one half of the corpus has no document. The settings are attributes.
    Raises:
        NoSuchLayer: A layer was not recorded.
        NotRecorded: The trace holds counts only.
        ValueError: An argument is none that could be, such as a cache that is smaller than top-k.
    Source:
        Mattson et al. 1970 (all sizes in one pass); Belady 1966; Yang et al. 2023 (S3-FIFO); matching after the idea of
        MoE-Infinity, Xue et al. 2024, arXiv 2401.14361; a cache a layer, LRU: Eliseev and Mazur 2023, arXiv 2312.17238.
    """
    trace.need_tokens()
    chosen = trace.select_layers(layers)
    settings = _Settings.checked(chosen, policies, sizes, budget, batch, prefill, cold_sequences)
    threads = threads if threads is not None else os.cpu_count() or 1
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
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

    plan = _Plan.of(trace, settings, seeds, ready)
    servers = [
        Server(
            chosen,
            batch=batch,
            prefill=prefill,
            cold=cold_sequences,
            groups=groups,
            seed=each,
            library=plan.library if "matching" in settings.policies else None,
        )
        for each in seeds
    ]
    sets = [list(chosen)] if budget == "global" else [[layer] for layer in chosen]
    caches = [[_Caches(settings, of, num_domains * groups, plan.library) for of in sets] for _ in seeds]
    chunks = [0] * len(seeds)
    tokens_D = np.zeros(num_domains, np.int64)
    with ThreadPoolExecutor(threads) as pool:

        def play(at: int, steps: Steps) -> None:
            if at == 0:
                tokens_D[:] += np.bincount(steps.cell_T // groups, minlength=num_domains)
            after_N = plan.after(at, chunks[at])
            chunks[at] += 1
            list(pool.map(lambda place: caches[at][place].serve(steps, place, after_N), range(len(sets))))

        for index in range(len(trace.parts)):
            part = trace.with_trace_domains(trace.parts[index].read(chosen, tokens=False))
            for at, server in enumerate(servers):
                for steps in server.steps(part):
                    play(at, steps)
            ready()
        for at, server in enumerate(servers):
            for steps in server.rest():
                play(at, steps)
    unfitted = {"hot", "matching"} if (plan.loads_FN.sum(axis=1) == 0).any() else set()
    played = [_Played.of(settings, each, num_domains, groups).without(unfitted) for each in caches]
    return _labelled(trace, settings, played, tokens_D, seed)


@dataclass(frozen=True)
class _Settings:
    layers: tuple[Layer, ...]
    policies: tuple[str, ...]
    sizes: tuple[int, ...]
    s3_sizes: tuple[int, ...]
    budget: str
    batch: int
    prefill: int | None
    cold: bool

    @property
    def fitted(self) -> bool:
        return "hot" in self.policies or "matching" in self.policies

    @property
    def foresees(self) -> bool:
        return "belady" in self.policies

    @classmethod
    def checked(
        cls,
        layers: tuple[Layer, ...],
        policies: Sequence[str],
        sizes: Iterable[int] | None,
        budget: str,
        batch: int,
        prefill: int | None,
        cold: bool,
    ) -> _Settings:
        policies = (policies,) if isinstance(policies, str) else tuple(policies)
        if not policies or len(set(policies)) < len(policies) or not set(policies) <= set(POLICIES):
            raise ValueError(f"policies must be distinct and of {', '.join(POLICIES)}, not {policies}")
        if budget not in ("layer", "global"):
            raise ValueError(f"budget must be 'layer' or 'global', not {budget!r}")
        if batch < 1 or (prefill is not None and prefill < 1):
            raise ValueError(f"batch and prefill must be at least 1, not {batch} and {prefill}")
        if prefill is not None and batch > 1:
            raise ValueError("prefill serves one sequence at a time; choose a batch to decode or a chunk of prefill")
        if cold and batch > 1:
            raise ValueError("sequences decoded together share a cache, so it cannot start cold for each of them")
        most = max(layer.num_experts for layer in layers)
        widest = max(layers, key=lambda layer: layer.top_k)
        least = min(widest.top_k, most)
        every = tuple(range(least, most + 1))
        if sizes is None:
            places = np.unique(np.rint(np.linspace(0, len(every) - 1, min(S3_SIZES, len(every)))).astype(int))
            return cls(layers, policies, every, tuple(every[p] for p in places), budget, batch, prefill, cold)
        kept = tuple(sorted(set(sizes)))
        if not kept:
            raise ValueError("sizes must hold at least one")
        if kept[0] < least:
            raise ValueError(
                f"a cache of {kept[0]} cannot hold the {widest.top_k} experts that a token needs at once in layer "
                f"{widest.layer}; choose sizes from {least} to {most}"
            )
        if kept[-1] > most:
            raise ValueError(
                f"a cache of {kept[-1]} is larger than a layer's {most} experts; choose sizes up to {most}"
            )
        return cls(layers, policies, kept, kept, budget, batch, prefill, cold)


class _Plan:
    """What a first pass over the trace finds: loads for policies that are fitted, first uses for the one that foresees.

    A chunk's first uses and those after it give the next use of every request, exactly, with one chunk in memory.
    """

    def __init__(self, settings: _Settings, seeds: Sequence[int | None]) -> None:
        self.settings = settings
        self.offset_L = object_offsets(settings.layers)
        self.loads_FN = np.zeros((2, self.offset_L[-1]), np.int64)
        self.chosen: list[list[tuple[int, int, NDArray[np.int64]]]] = [[], []]
        self.first: list[list[NDArray[np.int64]]] = [[] for _ in seeds]
        self.library = self._library()

    @classmethod
    def of(cls, trace: Trace, settings: _Settings, seeds: Sequence[int | None], ready: Callable[[], None]) -> _Plan:
        plan = cls(settings, seeds)
        if not settings.fitted and not settings.foresees:
            return plan
        servers = [Server(settings.layers, batch=settings.batch, prefill=settings.prefill, seed=each) for each in seeds]
        for index in range(len(trace.parts)):
            part = trace.parts[index].read(settings.layers, tokens=False)
            if settings.fitted:
                plan._fit(part)
            if settings.foresees:
                for at, server in enumerate(servers):
                    plan.first[at] += [plan._first(steps) for steps in server.steps(part)]
            ready()
        if settings.foresees:
            for at, server in enumerate(servers):
                plan.first[at] += [plan._first(steps) for steps in server.rest()]
                for chunk in range(len(plan.first[at]) - 2, -1, -1):  # now from each chunk's start to the end
                    np.minimum(plan.first[at][chunk], plan.first[at][chunk + 1], out=plan.first[at][chunk])
        plan.library = plan._library()
        return plan

    def after(self, at: int, chunk: int) -> NDArray[np.int64]:
        """Group that uses each object first after a chunk."""
        firsts = self.first[at]
        if chunk + 1 < len(firsts):
            return firsts[chunk + 1]
        return np.full(self.offset_L[-1], kernels.NEVER, np.int64)

    def _first(self, steps: Steps) -> NDArray[np.int64]:
        first_N = np.full(self.offset_L[-1], kernels.NEVER, np.int64)
        together = self.settings.budget == "global"
        for places in (
            [range(len(self.settings.layers))] if together else [[at] for at in range(len(self.offset_L) - 1)]
        ):
            within = slice(places[0], places[-1] + 1)
            requests = _Requests.of(steps, within, self.offset_L[within] - self.offset_L[places[0]], self._size(within))
            objects = slice(self.offset_L[places[0]], self.offset_L[places[-1] + 1])
            kernels.first_uses(requests.object_R, requests.starts_G, steps.base * len(places), first_N[objects])
        return first_N

    def _size(self, within: slice) -> int:
        return int(self.offset_L[within.stop] - self.offset_L[within.start])

    def _fit(self, part: Part) -> None:
        starts = part.document_starts()
        document = part.document[starts[:-1]].astype(np.int64)
        fold_G = document_folds(document)
        fold_T = np.repeat(fold_G, np.diff(starts))
        hashes = token_hashes(document, np.full(len(document), 2**31))
        for fold in (0, 1):
            long_enough = np.flatnonzero((fold_G == fold) & (np.diff(starts) >= LIBRARY_TOKENS))
            for g in long_enough[np.argsort(hashes[long_enough], kind="stable")[:LIBRARY]].tolist():
                key = (int(hashes[g]), int(document[g]))
                if len(self.chosen[fold]) == LIBRARY and key > self.chosen[fold][-1][:2]:
                    break
                self.chosen[fold].append((*key, self._loads(part, slice(starts[g], starts[g + 1]))))
                self.chosen[fold].sort(key=lambda each: each[:2])
                del self.chosen[fold][LIBRARY:]
            self.loads_FN[fold] += self._loads(part, fold_T == fold)

    def _loads(self, part: Part, rows: slice | NDArray[np.bool_]) -> NDArray[np.int64]:
        loads = []
        for layer in self.settings.layers:
            ids = part.expert_ids[layer.layer].T[:, rows].ravel()
            ids = ids[(ids >= 0) & (ids < layer.num_experts)]
            loads.append(np.bincount(ids, minlength=layer.num_experts))
        return np.concatenate(loads)

    def _library(self) -> Library:
        num_objects = int(self.offset_L[-1])
        unit_FNM = np.zeros((2, num_objects, LIBRARY), np.int64)
        value_VN = np.zeros((2 * (LIBRARY + 1), num_objects), np.int64)
        layer_N = np.repeat(np.arange(len(self.settings.layers)), np.diff(self.offset_L))
        for fold, found in enumerate(self.chosen):
            for m, (_, _, loads_N) in enumerate(found):
                unit_FNM[fold, :, m] = np.rint(loads_N / np.sqrt((loads_N.astype(float) ** 2).sum()) * 2**20)
                value_VN[fold * (LIBRARY + 1) + m] = _in_fixed_point(loads_N, layer_N)
            value_VN[fold * (LIBRARY + 1) + LIBRARY] = _in_fixed_point(self.loads_FN[fold], layer_N)
        return Library(unit_FNM, np.array([len(found) for found in self.chosen]), value_VN)


def _in_fixed_point(loads_N: NDArray[np.int64], layer_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Shares of a layer's load, in units of 2**-40."""
    return np.rint(2**40 * loads_N / np.maximum(np.bincount(layer_N, loads_N), 1)[layer_N]).astype(np.int64)


@dataclass(frozen=True)
class _Requests:
    """The request groups of steps; suffixes as in `cache_kernels`."""

    object_R: NDArray[np.int32]
    cell_R: NDArray[np.int64]
    starts_G: NDArray[np.int64]

    @classmethod
    def of(cls, steps: Steps, within: slice, offset_L: NDArray[np.int64], num_objects: int) -> _Requests:
        ids_LKT = steps.ids_LKT[within]
        object_R, cell_R = np.empty(ids_LKT.size, np.int32), np.empty(ids_LKT.size, np.int64)
        starts_G = np.empty((len(steps.starts_S) - 1) * len(ids_LKT) + 1, np.int64)
        stamp_N = np.empty(num_objects, np.int64)
        number = kernels.request_groups(
            ids_LKT, offset_L, steps.starts_S, steps.cell_T, stamp_N, object_R, cell_R, starts_G
        )
        return cls(object_R[:number], cell_R[:number], starts_G)


class _Caches:
    """The caches of all policies and sizes that serve one layer, or all with one budget, and what they counted.

    The bin of a cache of c experts a layer is c - 1; the last bin is of requests that no cache held.
    """

    def __init__(self, settings: _Settings, layers: Sequence[Layer], num_cells: int, library: Library) -> None:
        offset_L = object_offsets(layers)
        self.settings, self.layers, self.num_objects = settings, layers, int(offset_L[-1])
        self.offset_L = offset_L[:-1]
        self.width = len(layers)
        num_bins = -(-self.num_objects // self.width) + 1
        self.rows = num_cells * len(layers)
        self.stacks = {
            name: _Stack(self.num_objects, self.rows, num_bins) for name in settings.policies if name in _KINDS
        }
        self.queues = (
            [
                _Queues(min(size * self.width, self.num_objects), self.num_objects, self.rows)
                for size in settings.s3_sizes
            ]
            if "s3-fifo" in settings.policies
            else []
        )
        whole = object_offsets(settings.layers)
        first = whole[list(settings.layers).index(layers[0])]
        self.objects = slice(first, first + self.num_objects)
        self.value_VN = np.ascontiguousarray(library.value_VN[:, self.objects])
        self.requests_C = np.zeros(self.rows, np.int64)

    def serve(self, steps: Steps, place: int, after_N: NDArray[np.int64]) -> None:
        """Serve some steps; `place` is that of the first layer among all."""
        requests = _Requests.of(steps, slice(place, place + len(self.layers)), self.offset_L, self.num_objects)
        of = (requests.object_R, requests.cell_R, requests.starts_G)
        fresh_G = np.zeros(len(requests.starts_G) - 1, np.bool_)
        fresh_G[:: len(self.layers)] = steps.fresh_S
        if not self.stacks:
            self.requests_C += np.bincount(requests.cell_R, minlength=self.rows)
        for name, stack in self.stacks.items():
            if name == "lru" and self.width == 1:
                stack.state[0] = kernels.lru_distances(
                    *of, fresh_G, max(1, stack.state[0]), stack.last_N, stack.counts_CB
                )
                continue
            next_R = row_T = np.zeros(0, np.int64)
            if name == "belady":
                next_R = np.empty(len(requests.object_R), np.int64)
                base = steps.base * len(self.layers)
                kernels.next_uses(requests.object_R, requests.starts_G, base, after_N[self.objects].copy(), next_R)
            if name in ("hot", "matching"):
                row_T = steps.row_T if name == "matching" else (2 - steps.fold_T) * (LIBRARY + 1) - 1
            kernels.stack_distances(
                _KINDS[name],
                *of,
                fresh_G,
                len(self.layers),
                next_R,
                self.value_VN,
                row_T,
                steps.starts_S,
                AGEING,
                self.width,
                stack.state,
                stack.last_N,
                stack.value_N,
                stack.order_N,
                stack.place_N,
                stack.counts_CB,
            )
        for queues in self.queues:
            kernels.s3_fifo_hits(
                queues.capacity,
                *of,
                fresh_G,
                queues.state,
                queues.where_N,
                queues.uses_N,
                queues.small_N,
                queues.main_N,
                queues.ghost_N,
                queues.hits_C,
            )

    def requests(self) -> NDArray[np.int64]:
        """Requests by cell and layer; every stack has counted all of them."""
        stack = next(iter(self.stacks.values()), None)
        of_rows = self.requests_C if stack is None else stack.counts_CB.sum(axis=1)
        return of_rows.reshape(-1, len(self.layers))

    def hits(self, name: str) -> Numbers:
        """Hits by cell, layer and size, shape (cell, layer, size); NaN for sizes that were not played."""
        sizes, num_layers = self.settings.sizes, len(self.layers)
        if name == "s3-fifo":
            found = np.full((self.rows, len(sizes)), np.nan)
            for queues, size in zip(self.queues, self.settings.s3_sizes, strict=True):
                found[:, sizes.index(size)] = queues.hits_C
        else:
            below_CB = np.cumsum(self.stacks[name].counts_CB[:, :-1], axis=1)
            found = below_CB[:, np.minimum(np.array(sizes), below_CB.shape[1]) - 1].astype(float)
        return found.reshape(-1, num_layers, len(sizes))


class _Stack:
    def __init__(self, num_objects: int, rows: int, num_bins: int) -> None:
        self.state = np.array([0, 0, 0, -1], np.int64)
        self.last_N, self.value_N, self.order_N = (np.zeros(num_objects, np.int64) for _ in range(3))
        self.place_N = np.full(num_objects, -1, np.int64)
        self.counts_CB = np.zeros((rows, num_bins), np.int64)


class _Queues:
    def __init__(self, capacity: int, num_objects: int, rows: int) -> None:
        self.capacity = capacity
        self.state = np.zeros(3, np.int64)
        self.where_N, self.uses_N = np.zeros(num_objects, np.int64), np.zeros(num_objects, np.int64)
        self.small_N, self.main_N, self.ghost_N = (np.zeros(capacity + 1, np.int64) for _ in range(3))
        self.hits_C = np.zeros(rows, np.int64)


@dataclass(frozen=True)
class _Played:
    """What was counted. P policies, D domains, G groups of documents, L layers, Z sizes."""

    hits: dict[str, Numbers]
    requests_DGL: Numbers

    @classmethod
    def of(cls, settings: _Settings, caches: Sequence[_Caches], num_domains: int, groups: int) -> _Played:
        shape = (num_domains, groups, len(settings.layers))
        hits = {
            name: np.concatenate([each.hits(name) for each in caches], axis=1).reshape(*shape, len(settings.sizes))
            for name in settings.policies
        }
        requests = np.concatenate([each.requests() for each in caches], axis=1)
        return cls(hits, requests.reshape(shape).astype(float))

    def without(self, policies: set[str]) -> _Played:
        """The same with the hits of some policies unknown."""
        return _Played({p: of * (np.nan if p in policies else 1) for p, of in self.hits.items()}, self.requests_DGL)


def _labelled(
    trace: Trace, settings: _Settings, played: Sequence[_Played], tokens_D: NDArray[np.int64], seed: int
) -> xr.Dataset:
    seen = played[0]
    shape = (len(settings.policies), len(trace.domains) + 1, len(settings.layers), len(settings.sizes))
    flat = (shape[0], shape[1], shape[3])
    by_layer = {name: np.full(shape, np.nan) for name in ("hit_ratio", "low", "high", "null")}
    of_all = {
        f"{what}{end}": np.full(flat, np.nan) for what in ("overall", "gain", "closed") for end in ("", "_low", "_high")
    }
    of_all["overall_null"], of_all["loads"] = np.full(flat, np.nan), np.full(flat, np.nan)
    tokens = np.concatenate([[tokens_D.sum()], tokens_D])
    for p, name in enumerate(settings.policies):
        for d in range(shape[1]):
            hits, requests = _of_domain(seen.hits[name], d), _of_domain(seen.requests_DGL, d)
            at = p, d
            by_layer["hit_ratio"][at], by_layer["low"][at], by_layer["high"][at] = _proportion(
                hits, requests[..., None]
            )
            together, all_requests = hits.sum(axis=1), requests.sum(axis=1)[:, None]
            ends = _proportion(together, all_requests)
            of_all["overall"][at], of_all["overall_low"][at], of_all["overall_high"][at] = ends
            of_all["loads"][at] = statistics.ratio(all_requests.sum() - together.sum(axis=0), tokens[d])
            if len(played) > 1:
                null = _of_domain(played[1].hits[name], d)
                null_requests = _of_domain(played[1].requests_DGL, d)
                by_layer["null"][at] = statistics.ratio(null.sum(axis=0), null_requests.sum(axis=0)[:, None])
                pair = (null.sum(axis=1), null_requests.sum(axis=1)[:, None])
                of_all["overall_null"][at] = statistics.ratio(pair[0].sum(axis=0), pair[1].sum())
                gain = _difference(together, all_requests, *pair)
                of_all["gain"][at], of_all["gain_low"][at], of_all["gain_high"][at] = gain
            if "lru" in seen.hits and "belady" in seen.hits:
                lru = _of_domain(seen.hits["lru"], d).sum(axis=1)
                best = _of_domain(seen.hits["belady"], d).sum(axis=1)
                closed = _quotient(together - lru, best - lru)
                of_all["closed"][at], of_all["closed_low"][at], of_all["closed_high"][at] = closed
    num_experts = np.array([layer.num_experts for layer in settings.layers])
    uniform = np.minimum(1.0, np.array(settings.sizes) / num_experts[:, None])
    requests_DL = seen.requests_DGL.sum(axis=1)
    dims, flat_dims = ("policy", "domain", "layer", "size"), ("policy", "domain", "size")
    low, high = "95 % interval, low end", "95 % interval, high end"
    shuffled = "the same with the tokens of each document in random order"
    return xr.Dataset(
        {
            "hit_ratio": described(by_layer["hit_ratio"], dims, "hits over requests", "1", _ELISEEV),
            "low": described(by_layer["low"], dims, low, "1"),
            "high": described(by_layer["high"], dims, high, "1"),
            "null": described(by_layer["null"], dims, shuffled, "1"),
            "overall": described(of_all["overall"], flat_dims, "hits over requests, all layers", "1"),
            "overall_low": described(of_all["overall_low"], flat_dims, low, "1"),
            "overall_high": described(of_all["overall_high"], flat_dims, high, "1"),
            "overall_null": described(of_all["overall_null"], flat_dims, shuffled, "1"),
            "gain": described(of_all["gain"], flat_dims, "hit ratio less that of tokens in random order", "1"),
            "gain_low": described(of_all["gain_low"], flat_dims, low, "1"),
            "gain_high": described(of_all["gain_high"], flat_dims, high, "1"),
            "closed": described(of_all["closed"], flat_dims, "part of the way from LRU to the optimum", "1"),
            "closed_low": described(of_all["closed_low"], flat_dims, low, "1"),
            "closed_high": described(of_all["closed_high"], flat_dims, high, "1"),
            "loads": described(
                of_all["loads"], flat_dims, "experts to be loaded a token, all layers", "experts a token"
            ),
            "uniform": described(uniform, ("layer", "size"), "c/E, under uniform independent routing", "1", _ELISEEV),
            "requests": described(
                np.concatenate([requests_DL.sum(axis=0)[None], requests_DL]),
                ("domain", "layer"),
                "requests",
                "requests",
            ),
            "tokens": described(tokens, ("domain",), "tokens served", "tokens"),
            "num_experts": described(num_experts, ("layer",), "routed experts", "experts"),
            "top_k": described(
                np.array([layer.top_k for layer in settings.layers]), ("layer",), "experts chosen a token", "experts"
            ),
        },
        coords={
            "policy": list(settings.policies),
            "domain": [ALL_DOMAINS, *(f"{d} (a domain)" if d == ALL_DOMAINS else d for d in trace.domains)],
            "layer": [layer.layer for layer in settings.layers],
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


def _of_domain(values: Numbers, d: int) -> Numbers:
    """The groups of all domains together for 0, else of domain d - 1, with the group first."""
    return values.reshape(-1, *values.shape[2:]) if d == 0 else values[d - 1]


def _proportion(hits_G: Numbers, requests_G: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Hits over requests with an interval over groups of documents, which are the first axis."""
    ratio, error, used = _ratio(hits_G, requests_G)
    low, high = statistics.proportion_interval(ratio, error, used)
    return ratio, np.where(np.isnan(ratio), np.nan, low), np.where(np.isnan(ratio), np.nan, high)


def _quotient(y_G: Numbers, n_G: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Σy / Σn, of any sign, with an interval; NaN where Σn is not positive."""
    ratio, error, used = _ratio(y_G, n_G)
    half = statistics.student_t(used) * error
    return ratio, ratio - half, ratio + half


def _difference(
    hits_G: Numbers, requests_G: Numbers, null_G: Numbers, null_requests_G: Numbers
) -> tuple[Numbers, Numbers, Numbers]:
    """The difference of two ratios of the same groups, paired, with an interval."""
    ratio = statistics.ratio(hits_G.sum(axis=0), requests_G.sum(axis=0))
    null = statistics.ratio(null_G.sum(axis=0), null_requests_G.sum(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        residual_G = (hits_G - ratio * requests_G) / requests_G.sum(axis=0)
        residual_G = residual_G - (null_G - null * null_requests_G) / null_requests_G.sum(axis=0)
    used = np.count_nonzero(requests_G, axis=0)
    half = statistics.student_t(used) * _error(residual_G, used)
    return ratio - null, ratio - null - half, ratio - null + half


def _ratio(y_G: Numbers, n_G: Numbers) -> tuple[Numbers, Numbers, NDArray[Any]]:
    ratio = statistics.ratio(y_G.sum(axis=0), n_G.sum(axis=0))
    used = np.broadcast_to(np.count_nonzero(n_G, axis=0), ratio.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        residual_G = (y_G - ratio * n_G) / n_G.sum(axis=0)
    return ratio, _error(residual_G, used), used


def _error(residual_G: Numbers, used: NDArray[Any]) -> Numbers:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(np.where(used > 1, used / (used - 1), np.nan) * (residual_G**2).sum(axis=0))
