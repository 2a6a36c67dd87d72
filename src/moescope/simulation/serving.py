"""The steps in which a decoder serves the tokens of a trace; the unit is the step, a set of tokens served together.

Decoding serves one token of each of `batch` sequences a step; a slot whose sequence ends takes the next of the trace,
so only the last sequences leave slots empty. Prefill serves a chunk of consecutive tokens of one sequence a step. Steps
come in the order of the trace, a bounded number of tokens at a time.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.simulation import cache_kernels as kernels
from moescope.tallying.document_groups import document_groups
from moescope.tallying.one_pass import runs
from moescope.trace import Layer, Part

POLICIES = ("lru", "lfu", "aged-lfu", "s3-fifo", "hot", "matching", "belady")
"""Evict the expert used longest ago; used least often; the same with counts halved every `AGEING` steps; by three FIFO
queues; the coldest in other documents; the least used by the other document that this sequence resembles; the one used
again last, which is the optimum."""

S3_SIZES = 8
"""Sizes, evenly spread, for which S3-FIFO is simulated unless sizes are given: it needs a pass a size."""

BLOCK_ASSIGNMENTS = 2**22
"""Assignments gathered at a time; a sequence is never divided."""


@dataclass(frozen=True)
class Settings:
    """What is simulated, and how: the arguments of `moescope.cache`, of which each is checked.

    Attributes:
        sizes: Experts a layer that the caches hold, ascending.
        s3_sizes: Those for which S3-FIFO is simulated.
        cold: Whether each sequence starts with empty caches.
    """

    layers: tuple[Layer, ...]
    policies: tuple[str, ...]
    sizes: tuple[int, ...]
    s3_sizes: tuple[int, ...]
    budget: str
    batch: int
    prefill: int | None
    cold: bool

    def __post_init__(self) -> None:
        policies = self.policies
        if not policies or len(set(policies)) < len(policies) or not set(policies) <= set(POLICIES):
            raise ValueError(f"policies must be distinct and of {', '.join(POLICIES)}, not {policies}")
        if self.budget not in ("layer", "global"):
            raise ValueError(f"budget must be 'layer' or 'global', not {self.budget!r}")
        if self.batch < 1 or (self.prefill is not None and self.prefill < 1):
            raise ValueError(f"batch and prefill must be at least 1, not {self.batch} and {self.prefill}")
        if self.prefill is not None and self.batch > 1:
            raise ValueError("prefill serves one sequence at a time; choose a batch to decode or a chunk of prefill")
        if self.cold and self.batch > 1:
            raise ValueError(
                "sequences decoded together share a cache, so it cannot start cold for each of them; choose a batch or "
                "cold caches"
            )

    @property
    def fitted(self) -> bool:
        """Whether a policy needs the loads of other documents."""
        return "hot" in self.policies or "matching" in self.policies

    @property
    def foresees(self) -> bool:
        """Whether a policy needs the uses to come."""
        return "belady" in self.policies

    @property
    def sharing(self) -> list[slice]:
        """The layers that share a cache, as slices of `layers`."""
        num_layers = len(self.layers)
        return [slice(0, num_layers)] if self.budget == "global" else [slice(n, n + 1) for n in range(num_layers)]


def cache_sizes(layers: Sequence[Layer], sizes: Iterable[int] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes asked for, or all that could be; and those for which S3-FIFO is simulated.

    Raises:
        ValueError: There is none, or one is out of range.
    """
    most = max(layer.num_experts for layer in layers)
    widest = max(layers, key=lambda layer: layer.top_k)
    least = min(widest.top_k, most)
    if sizes is None:
        every = tuple(range(least, most + 1))
        places = np.unique(np.rint(np.linspace(0, len(every) - 1, min(S3_SIZES, len(every)))).astype(int))
        return every, tuple(every[p] for p in places)
    kept = tuple(sorted(set(sizes)))
    if not kept:
        raise ValueError("sizes must hold at least one")
    if kept[0] < least:
        raise ValueError(
            f"a cache of {kept[0]} cannot hold the {widest.top_k} experts that a token needs at once in layer "
            f"{widest.layer}; choose sizes from {least} to {most}"
        )
    if kept[-1] > most:
        raise ValueError(f"a cache of {kept[-1]} is larger than a layer's {most} experts; choose sizes up to {most}")
    return kept, kept


@dataclass(frozen=True)
class Steps:
    """Consecutive steps. T tokens, S steps, L layers, K choices.

    Attributes:
        ids_LKT: Chosen experts, -1 for none (dropped, null, or a layer of fewer choices).
        starts_S: First token of each step, with T at the end.
        fresh_S: Whether the caches are emptied before each step.
        cell_T: Cell, ``domain * groups + group of documents``, of each token.
        fold_T: Fold of each token's document.
        row_T: Best match of each token, of `cache_kernels.match_sequences`; the fold again if nothing is matched.
        base: Steps before these.
    """

    ids_LKT: NDArray[np.int32]
    starts_S: NDArray[np.int64]
    fresh_S: NDArray[np.bool_]
    cell_T: NDArray[np.int64]
    fold_T: NDArray[np.int64]
    row_T: NDArray[np.int64]
    base: int

    def requests(self, layers: slice, offset_L: NDArray[np.int64]) -> kernels.Requests:
        """The request groups of some of the layers; `offset_L` as of `cache_kernels.request_groups`."""
        return kernels.request_groups(self.ids_LKT[layers], offset_L, self.starts_S, self.fresh_S, self.cell_T)


class Server:
    """Turns parts into steps.

    Args:
        settings: What is simulated.
        groups: Groups of documents a domain.
        seed: Of the permutation of the tokens within each document; None leaves them as they are.
        library: What sequences are matched with, or None.
    """

    def __init__(
        self, settings: Settings, *, groups: int = 1, seed: int | None = None, library: kernels.Library | None = None
    ) -> None:
        self.settings, self.layers = settings, settings.layers
        self.groups, self.seed, self.library = groups, seed, library
        self.top_k = max(layer.top_k for layer in self.layers)
        self.offset_L = object_offsets(self.layers)
        self._served = 0
        self._free = [(0, slot) for slot in range(settings.batch)]
        self._waiting: dict[str, NDArray[Any]] = {}

    def steps(self, part: Part) -> Iterator[Steps]:
        """The steps that a part, with the domain codes of the trace, completes."""
        order_T = np.arange(part.num_tokens) if self.seed is None else _permuted(part, self.seed)
        starts_G = part.document_starts()
        document, lengths = part.document[starts_G[:-1]], np.diff(starts_G)
        cell_G = part.domain[starts_G[:-1]].astype(np.int64) * self.groups + document_groups(document, self.groups)
        cell_T, fold_T = np.repeat(cell_G, lengths), np.repeat(document_folds(document), lengths)
        starts_Q = part.sequence_starts()
        for run in runs(np.diff(starts_Q).tolist(), BLOCK_ASSIGNMENTS // (len(self.layers) * self.top_k)):
            starts = starts_Q[run.start : run.stop + 1] - starts_Q[run.start]
            block = slice(int(starts_Q[run.start]), int(starts_Q[run.stop]))
            ids_LKT = self._ids(part, order_T[block])  # of the same documents as the tokens that stood there
            fold = row = fold_T[block]
            if self.library is not None:
                other_Q = 1 - fold[starts[:-1]]
                row = kernels.match_sequences(ids_LKT, self.offset_L, starts, other_Q, self.library)
            tokens = {"ids": ids_LKT, "cell": cell_T[block], "fold": fold, "row": row}
            if self.settings.batch == 1:
                yield self._one_by_one(tokens, starts)
            else:
                yield from self._interleaved(tokens, starts)

    def rest(self) -> Iterator[Steps]:
        """The steps of the sequences still being served, once there are no more parts."""
        if self._waiting and len(self._waiting["step"]):
            yield self._emit(np.ones(len(self._waiting["step"]), np.bool_))

    def _ids(self, part: Part, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        ids_LKT = np.full((len(self.layers), self.top_k, len(rows)), -1, np.int32)
        whole = self.seed is None
        for of_layer_KT, layer in zip(ids_LKT, self.layers, strict=True):
            ids_KT = part.expert_ids[layer.layer].T
            of_layer_KT[: layer.top_k] = ids_KT[:, rows[0] : rows[-1] + 1] if whole else ids_KT[:, rows]
            if layer.num_null_experts:
                of_layer_KT[of_layer_KT >= layer.num_experts] = -1
        return ids_LKT

    def _one_by_one(self, tokens: dict[str, NDArray[Any]], starts_Q: NDArray[np.int64]) -> Steps:
        """The steps of a token each, or of a chunk of prefill."""
        num_tokens = int(starts_Q[-1])
        starts_S = np.arange(num_tokens + 1)
        if self.settings.prefill is not None:
            place_T = np.arange(num_tokens) - np.repeat(starts_Q[:-1], np.diff(starts_Q))
            starts_S = np.append(np.flatnonzero(place_T % self.settings.prefill == 0), num_tokens)
        fresh_S = np.zeros(len(starts_S) - 1, np.bool_)
        if self.settings.cold:
            fresh_S[np.searchsorted(starts_S, starts_Q[:-1])] = True
        return self._numbered(tokens, starts_S, fresh_S)

    def _interleaved(self, tokens: dict[str, NDArray[Any]], starts_Q: NDArray[np.int64]) -> Iterator[Steps]:
        """The steps that these sequences complete, of a token of each that runs."""
        lengths_Q = np.diff(starts_Q)
        begun, slots = [], []
        for length in lengths_Q.tolist():
            start, slot = heapq.heappop(self._free)
            begun.append(start)
            slots.append(slot)
            heapq.heappush(self._free, (start + length, slot))
        place_T = np.arange(starts_Q[-1]) - np.repeat(starts_Q[:-1], lengths_Q)
        new = tokens | {"step": np.repeat(begun, lengths_Q) + place_T, "slot": np.repeat(slots, lengths_Q)}
        old = self._waiting
        self._waiting = {k: np.concatenate([old[k], v], axis=-1) for k, v in new.items()} if old else new
        complete = self._waiting["step"] < self._free[0][0]  # no later sequence can start before a slot is free
        if complete.any():
            yield self._emit(complete)

    def _emit(self, complete: NDArray[np.bool_]) -> Steps:
        tokens = {name: values[..., complete] for name, values in self._waiting.items()}
        self._waiting = {name: values[..., ~complete] for name, values in self._waiting.items()}
        order = np.lexsort((tokens["slot"], tokens["step"]))
        tokens = {name: values[..., order] for name, values in tokens.items()}
        starts_S = np.append(np.flatnonzero(np.diff(tokens["step"], prepend=-1)), len(order))
        return self._numbered(tokens, starts_S, np.zeros(len(starts_S) - 1, np.bool_))

    def _numbered(
        self, tokens: dict[str, NDArray[Any]], starts_S: NDArray[np.int64], fresh_S: NDArray[np.bool_]
    ) -> Steps:
        """Steps, with the number of those before them."""
        base = self._served
        self._served += len(fresh_S)
        ids_LKT = np.ascontiguousarray(tokens["ids"])
        return Steps(ids_LKT, starts_S, fresh_S, tokens["cell"], tokens["fold"], tokens["row"], base)


def object_offsets(layers: Sequence[Layer]) -> NDArray[np.int64]:
    """Object that is expert 0 of each layer, with the number of objects at the end."""
    return np.concatenate([[0], np.cumsum([layer.num_experts for layer in layers])]).astype(np.int64)


def document_folds(document: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Which half of the corpus, 0 or 1, each document is in; what is fitted on one half is judged on the other."""
    return document_groups(document, 64) // 32


def _permuted(part: Part, seed: int) -> NDArray[np.int64]:
    """Rows with the tokens of each document in random order; it depends on the document's number only."""
    starts_G = part.document_starts()
    orders = [
        start + np.random.default_rng((seed, int(part.document[start]))).permutation(end - start)
        for start, end in pairwise(starts_G.tolist())
    ]
    return np.concatenate(orders)
