"""Caches of experts as they are simulated: what must be known before, and the caches themselves.

`Plan` is what a first pass over a trace finds; `Caches` serve steps and count hits, for every policy and size at once.
Suffixes as in `cache_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moescope.measures.statistics import Numbers
from moescope.simulation import cache_kernels as kernels
from moescope.simulation.serving import Server, Settings, Steps, document_folds, object_offsets
from moescope.tallying.token_sample import token_hashes
from moescope.trace import Part, Trace

AGEING = 64
"""Steps after which aged LFU halves its counts."""

LIBRARY = 64
"""Documents that `matching` compares a sequence with, of each half of the corpus."""

LIBRARY_TOKENS = 32
"""Tokens that such a document has at least."""

_KINDS = {
    "lfu": kernels.LFU,
    "aged-lfu": kernels.AGED,
    "hot": kernels.TABLE,
    "matching": kernels.TABLE,
    "belady": kernels.NEXT,
}


class Plan:
    """What a first pass over the trace finds: loads for policies that are fitted, first uses for the one that foresees.

    A chunk's first uses and those after it give the next use of every request, exactly, with one chunk in memory.
    """

    def __init__(self, settings: Settings, seeds: Sequence[int | None]) -> None:
        self.settings = settings
        self.offset_L = object_offsets(settings.layers)
        self.loads_FN = np.zeros((2, self.offset_L[-1]), np.int64)
        self.chosen: list[list[tuple[int, int, NDArray[np.int64]]]] = [[], []]
        self.first: list[list[NDArray[np.int64]]] = [[] for _ in seeds]

    @classmethod
    def of(cls, trace: Trace, settings: Settings, seeds: Sequence[int | None], ready: Callable[[], None]) -> Plan:
        """What a pass finds, for the trace with each of the seeds of a permutation; `ready` is called after a part."""
        plan = cls(settings, seeds)
        if not settings.fitted and not settings.foresees:
            return plan
        servers = [Server(settings, seed=seed) for seed in seeds]
        for part_file in trace.parts:
            part = part_file.read(settings.layers, tokens=False)
            if settings.fitted:
                plan._fit(part)
            if settings.foresees:
                for first, server in zip(plan.first, servers, strict=True):
                    first += [plan._first(steps) for steps in server.steps(part)]
            ready()
        if settings.foresees:
            for first, server in zip(plan.first, servers, strict=True):
                first += [plan._first(steps) for steps in server.rest()]
                for chunk in range(len(first) - 2, -1, -1):  # now from each chunk's start to the end
                    np.minimum(first[chunk], first[chunk + 1], out=first[chunk])
        return plan

    def after(self, run: int, chunk: int) -> NDArray[np.int64]:
        """Group that uses each object first after a chunk, with the seed of this number."""
        first = self.first[run]
        return first[chunk + 1] if chunk + 1 < len(first) else np.full(self.offset_L[-1], kernels.NEVER, np.int64)

    def _first(self, steps: Steps) -> NDArray[np.int64]:
        first_N = np.full(self.offset_L[-1], kernels.NEVER, np.int64)
        for layers in self.settings.sharing:
            offset_L = self.offset_L[layers.start : layers.stop + 1]
            requests = steps.requests(layers, offset_L - offset_L[0])
            kernels.first_uses(requests, steps.base * (len(offset_L) - 1), first_N[offset_L[0] : offset_L[-1]])
        return first_N

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
                self.chosen[fold].sort(key=lambda document: document[:2])
                del self.chosen[fold][LIBRARY:]
            self.loads_FN[fold] += self._loads(part, fold_T == fold)

    def _loads(self, part: Part, rows: slice | NDArray[np.bool_]) -> NDArray[np.int64]:
        loads = []
        for layer in self.settings.layers:
            ids = part.expert_ids[layer.layer].T[:, rows].ravel()
            ids = ids[(ids >= 0) & (ids < layer.num_experts)]
            loads.append(np.bincount(ids, minlength=layer.num_experts))
        return np.concatenate(loads)

    @cached_property
    def library(self) -> kernels.Library:
        """The documents that `matching` compares a sequence with, and the values that fitted policies rank by."""
        num_objects = int(self.offset_L[-1])
        unit_FNM = np.zeros((2, num_objects, LIBRARY), np.int64)
        value_VN = np.zeros((2 * (LIBRARY + 1), num_objects), np.int64)
        layer_N = np.repeat(np.arange(len(self.settings.layers)), np.diff(self.offset_L))
        for fold, documents in enumerate(self.chosen):
            for m, (_, _, loads_N) in enumerate(documents):
                length = max(1.0, np.sqrt((loads_N.astype(float) ** 2).sum()))  # all may have been dropped
                unit_FNM[fold, :, m] = np.rint(loads_N / length * 2**20)
                value_VN[fold * (LIBRARY + 1) + m] = _in_fixed_point(loads_N, layer_N)
            value_VN[fold * (LIBRARY + 1) + LIBRARY] = _in_fixed_point(self.loads_FN[fold], layer_N)
        return kernels.Library(unit_FNM, np.array([len(documents) for documents in self.chosen]), value_VN)


def _in_fixed_point(loads_N: NDArray[np.int64], layer_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Shares of a layer's load, in units of 2**-40."""
    return np.rint(2**40 * loads_N / np.maximum(np.bincount(layer_N, loads_N), 1)[layer_N]).astype(np.int64)


class Caches:
    """The caches of all policies and sizes that serve the layers which share them, and what they counted.

    The bin of a cache of c experts a layer is c - 1; the last bin is of requests that no cache held.
    """

    def __init__(self, settings: Settings, layers: slice, num_cells: int, library: kernels.Library) -> None:
        self.settings, self.layers = settings, layers
        self.num_layers = layers.stop - layers.start
        offset_L = object_offsets(settings.layers)[layers.start : layers.stop + 1]
        self.objects = slice(offset_L[0], offset_L[-1])
        self.offset_L = offset_L - offset_L[0]
        num_objects, rows = int(self.offset_L[-1]), num_cells * self.num_layers
        num_bins = -(-num_objects // self.num_layers) + 1
        self.stacks = {
            name: kernels.LruStack.empty(num_objects, rows, num_bins) for name in settings.policies if name != "s3-fifo"
        }
        self.queues = {
            size: kernels.FifoQueues.empty(min(size * self.num_layers, num_objects), num_objects, rows)
            for size in (settings.s3_sizes if "s3-fifo" in settings.policies else ())
        }
        self.value_VN = np.ascontiguousarray(library.value_VN[:, self.objects])
        self.requests_C = np.zeros(rows, np.int64)

    def serve(self, steps: Steps, after_N: NDArray[np.int64]) -> None:
        """Serve some steps; `after_N` is the group that first uses each object after them."""
        requests = steps.requests(self.layers, self.offset_L)
        self.requests_C += np.bincount(requests.cell_R, minlength=len(self.requests_C))
        for name, stack in self.stacks.items():
            if name == "lru":
                kernels.lru_distances(requests, self.num_layers, stack)
                continue
            next_R = row_T = np.zeros(0, np.int64)
            if name == "belady":
                next_R = kernels.next_uses(requests, steps.base * self.num_layers, after_N[self.objects].copy())
            if name in ("hot", "matching"):
                row_T = steps.row_T if name == "matching" else (2 - steps.fold_T) * (LIBRARY + 1) - 1
            tables = kernels.Tables(self.value_VN, row_T, steps.starts_S)
            kernels.stack_distances(_KINDS[name], requests, self.num_layers, next_R, tables, AGEING, stack)
        for queues in self.queues.values():
            kernels.s3_fifo_hits(requests, queues)

    def requests(self) -> NDArray[np.int64]:
        """Requests by cell and layer."""
        return self.requests_C.reshape(-1, self.num_layers)

    def hits(self, name: str) -> Numbers:
        """Hits by cell, layer and size, shape (cell, layer, size); NaN for sizes that were not simulated."""
        sizes = self.settings.sizes
        if name == "s3-fifo":
            hits_CZ = np.full((len(self.requests_C), len(sizes)), np.nan)
            for size, queues in self.queues.items():
                hits_CZ[:, sizes.index(size)] = queues.hits_C
        else:
            below_CB = np.cumsum(self.stacks[name].counts_CB[:, :-1], axis=1)
            hits_CZ = below_CB[:, np.minimum(np.array(sizes), below_CB.shape[1]) - 1].astype(float)
        return hits_CZ.reshape(-1, self.num_layers, len(sizes))
