"""Loads by groups of documents and by batches of sequences, and the gate weights: what load balance is told from.

The unit is the assignment. A batch is a run of consecutive sequences of the trace, counted from its first; the last
batch is left out if it is not full. One pass; nothing grows with tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moescope.tallying import balance_kernels as kernels
from moescope.tallying.counter import Counter, Options, Result, Stored, spread, united
from moescope.tallying.document_groups import NUM_GROUPS, document_groups
from moescope.tallying.token_sample import token_hashes
from moescope.trace import Layer, Part, Trace

BATCH_SIZES = (1, 16, 256)
"""Sequences a batch."""

WEIGHT_STATISTICS = ("first", "margin", "entropy")
"""Of a token's gate weights, normalised to sum 1: the largest, its lead over the second, and the entropy of all."""

SAMPLED_TOKENS = 4096
"""Tokens kept with all their choices, from which batches without order are drawn."""

_NO_HASH = np.uint64(2**64 - 1)
_TOKEN_BINS = 32 * 40


@dataclass(frozen=True)
class BalanceCounts(Result):
    """What load balance is told from. L layers, D domains, G groups of documents, E expert ids, S sizes of batches, B
    bins, W statistics of gate weights.

    Memory, at most: 8 bytes x L x D x G x E, so 87 MB for 60 layers, 22 domains and 256 experts, a copy a thread.

    Attributes:
        layers: Layers counted.
        domains: Domains counted.
        documents_DG: Documents.
        tokens_DG: Tokens; zero for a trace of counts.
        loads_LDGE: Assignments each expert received.
        batch_sizes: Sequences a batch; empty for a trace of counts, which has none.
        imbalances_LSB: Batches by ⌊200 ln imbalance⌋.
        imbalance_LS: Σ imbalance over batches, in units of 2^-20.
        imbalance_squared_LS: Σ of its square, in the same units.
        tokens_SB: Batches by ⌊32 ln tokens⌋.
        token_sums_SB: Tokens of the same.
        weights_LDGW: Σ over tokens of `WEIGHT_STATISTICS`, in units of 2^-30; all zero if weights were not counted.
        weighed_LDG: Tokens with such statistics.
        weight_histogram_LWB: Tokens by statistic, in 200 equal bins from 0 to 1, for entropy to log2 of top-k.
        hashes: Hashes of the sampled tokens, ascending; the largest 64-bit number where there is none.
        sampled: For each layer the choices of those tokens, shape (token, choice); -1 = dropped.
        has_weights: Whether gate weights were counted.
    """

    layers: tuple[Layer, ...]
    domains: tuple[str, ...]
    documents_DG: NDArray[np.int64]
    tokens_DG: NDArray[np.int64]
    loads_LDGE: NDArray[np.int64]
    batch_sizes: tuple[int, ...]
    imbalances_LSB: NDArray[np.int64]
    imbalance_LS: NDArray[np.int64]
    imbalance_squared_LS: NDArray[np.int64]
    tokens_SB: NDArray[np.int64]
    token_sums_SB: NDArray[np.int64]
    weights_LDGW: NDArray[np.int64]
    weighed_LDG: NDArray[np.int64]
    weight_histogram_LWB: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    sampled: dict[int, NDArray[np.int32]]
    has_weights: bool

    @classmethod
    def empty(
        cls, layers: Sequence[Layer], domains: Sequence[str], batch_sizes: Sequence[int], *, weights: bool
    ) -> Self:
        """Counts of nothing."""
        num_layers, num_domains, num_sizes = len(layers), len(domains), len(batch_sizes)
        bins = int(kernels.BINS_PER_E * np.log(max(layer.num_experts for layer in layers))) + 2
        by_group = (num_layers, num_domains, NUM_GROUPS)

        def zeros(*shape: int) -> NDArray[np.int64]:
            return np.zeros(shape, np.int64)

        statistics = len(WEIGHT_STATISTICS) if weights else 0
        return cls(
            layers=tuple(layers),
            domains=tuple(domains),
            documents_DG=zeros(num_domains, NUM_GROUPS),
            tokens_DG=zeros(num_domains, NUM_GROUPS),
            loads_LDGE=zeros(*by_group, max(layer.num_ids for layer in layers)),
            batch_sizes=tuple(batch_sizes),
            imbalances_LSB=zeros(num_layers, num_sizes, bins),
            imbalance_LS=zeros(num_layers, num_sizes),
            imbalance_squared_LS=zeros(num_layers, num_sizes),
            tokens_SB=zeros(num_sizes, _TOKEN_BINS),
            token_sums_SB=zeros(num_sizes, _TOKEN_BINS),
            weights_LDGW=zeros(*by_group, statistics),
            weighed_LDG=zeros(*by_group),
            weight_histogram_LWB=zeros(num_layers, statistics, kernels.WEIGHT_BINS),
            hashes=np.full(SAMPLED_TOKENS, _NO_HASH),
            sampled={layer.layer: np.full((SAMPLED_TOKENS, layer.top_k), -1, np.int32) for layer in layers},
            has_weights=weights,
        )

    def __add__(self, other: BalanceCounts) -> BalanceCounts:
        """The counts of both; a batch never holds sequences of either."""
        for name in ("layers", "batch_sizes", "has_weights"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"balances of different {name.replace('_', ' ')} cannot be added")
        domains, mine_D, theirs_D = united(self.domains, other.domains)
        both = []
        for counts, place_D in ((self, mine_D), (other, theirs_D)):
            arrays: dict[str, Any] = {
                name: array.copy() if axis is None else spread(array, place_D, len(domains), axis)
                for name, axis in _DOMAIN_AXIS.items()
                for array in [getattr(counts, name)]
            }
            sampled = {layer: ids.copy() for layer, ids in counts.sampled.items()}
            both.append(replace(counts, domains=domains, hashes=counts.hashes.copy(), sampled=sampled, **arrays))
        both[0].merge(both[1])
        return both[0]

    def stored(self) -> dict[str, NDArray[Any]]:
        """The sums by name, and the sample as ``hashes`` and ``sampled/LAYER``."""
        return {
            **{name: getattr(self, name) for name in (*_DOMAIN_AXIS, "hashes")},
            **{f"sampled/{layer}": ids for layer, ids in self.sampled.items()},
            "batch_sizes": np.array(self.batch_sizes, np.int64),
        }

    @classmethod
    def restored(cls, stored: Stored) -> Self:
        """The counts of the arrays of `stored`."""
        sizes = stored.take("batch_sizes", np.int64, (None,), least=1).tolist()
        num_layers, num_domains, num_ids = (
            len(stored.layers),
            len(stored.domains),
            max(a.num_ids for a in stored.layers),
        )
        stored.take("loads_LDGE", np.int64, (num_layers, num_domains, NUM_GROUPS, num_ids))  # before as much is taken
        weights = "weights_LDGW" in stored and stored.arrays["weights_LDGW"].shape[-1:] != (0,)
        empty = cls.empty(stored.layers, stored.domains, sizes[:64], weights=weights)
        arrays: dict[str, Any] = {
            name: stored.take(name, np.int64, getattr(empty, name).shape) for name in _DOMAIN_AXIS
        }
        sampled = {
            layer.layer: stored.take(
                f"sampled/{layer.layer}", np.int32, (SAMPLED_TOKENS, layer.top_k), least=-1, most=layer.num_ids - 1
            )
            for layer in stored.layers
        }
        hashes = stored.take("hashes", np.uint64, empty.hashes.shape)
        return replace(empty, hashes=hashes, sampled=sampled, **arrays)

    def tokens(self, layer: int) -> NDArray[np.int32]:
        """Choices of the sampled tokens at a layer, shape (token, choice)."""
        return self.sampled[layer][self.hashes != _NO_HASH]

    def merge(self, other: BalanceCounts) -> None:
        """Add the counts of other documents, in place."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, np.ndarray) and f.name != "hashes":
                mine += theirs
        self.absorb(other.hashes, other.sampled)

    def absorb(self, hashes: NDArray[np.uint64], sampled: dict[int, NDArray[np.int32]]) -> None:
        """Keep those of the sampled tokens and of these that have the smallest hashes."""
        both = np.concatenate([self.hashes, hashes])
        kept = np.argsort(both, kind="stable")[:SAMPLED_TOKENS]
        self.hashes[:] = both[kept]
        for layer, ids in self.sampled.items():
            ids[:] = np.concatenate([ids, sampled[layer]])[kept]


_DOMAIN_AXIS = {
    "documents_DG": 0,
    "tokens_DG": 0,
    "loads_LDGE": 1,
    "imbalances_LSB": None,
    "imbalance_LS": None,
    "imbalance_squared_LS": None,
    "tokens_SB": None,
    "token_sums_SB": None,
    "weights_LDGW": 1,
    "weighed_LDG": 1,
    "weight_histogram_LWB": None,
}
"""The sums, and the axis along which each goes by domain."""


@dataclass
class BalanceCounter(Counter[BalanceCounts]):
    """The counter that fills `BalanceCounts`; those of a pass share the batches that cross from part to part."""

    name, result_type, reads_weights = "balance", BalanceCounts, True

    counts: BalanceCounts
    first_sequence: dict[int, int]
    open_batches: _OpenBatches
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    fresh_hashes: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    fresh: dict[int, NDArray[np.int32]] = field(default_factory=dict)

    @classmethod
    def need(cls, trace: Trace, layers: Sequence[Layer], options: Options) -> None:
        """Refuse impossible batches; every trace has loads."""
        if any(size < 1 for size in options.batch_sizes or ()):
            raise ValueError(f"a batch holds at least one sequence, not {min(options.batch_sizes or ())}")

    @classmethod
    def prepare(cls, trace: Trace, layers: Sequence[Layer], options: Options) -> Callable[[], Self]:
        """What makes empty counters; the rows are looked through once for where sequences begin."""
        sizes = BATCH_SIZES if options.batch_sizes is None else options.batch_sizes
        open_batches, first_sequence, total = _OpenBatches(), dict[int, int](), 0
        for file in trace.parts:
            part = file.read((), tokens=False)
            first_sequence[int(part.document[0])] = total
            total += int(np.count_nonzero(part.position == 0))

        empty = partial(BalanceCounts.empty, layers, trace.domains, sizes, weights=trace.header.weights)
        return lambda: cls(empty(), first_sequence, open_batches)

    @classmethod
    def of_counts(cls, trace: Trace, layers: Sequence[Layer], options: Options) -> BalanceCounts:
        """The loads of a trace of counts."""
        return _of_counts(trace, layers)

    def result(self) -> BalanceCounts:
        """What was counted."""
        return self.counts

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count the layers of `group` in a part."""
        counts = self.counts
        starts_G, starts_Q = part.document_starts(), part.sequence_starts()
        groups = document_groups(part.document[starts_G[:-1]])
        domains = part.domain[starts_G[:-1]].astype(np.int64)
        in_document = np.searchsorted(starts_G, starts_Q[:-1], side="right") - 1
        group_Q = (domains * NUM_GROUPS + groups)[in_document]
        begins = group[0] == counts.layers[0]
        if begins:
            np.add.at(counts.documents_DG, (domains, groups), 1)
            np.add.at(counts.tokens_DG, (domains, groups), np.diff(starts_G))
            self._choose_tokens(part, starts_G)
        first = self.first_sequence[int(part.document[0])]
        sizes_S = np.array(counts.batch_sizes, np.int64)
        place_of = {layer.layer: place for place, layer in enumerate(counts.layers)}
        for layer in group:
            place = place_of[layer.layer]
            ids_KT = part.expert_ids[layer.layer].T
            self.fresh[layer.layer] = part.expert_ids[layer.layer][self.rows].astype(np.int32)
            by_group = counts.loads_LDGE[place].reshape(-1, counts.loads_LDGE.shape[3])[:, : layer.num_ids]
            edges_S2E = np.zeros((len(sizes_S), 2, layer.num_ids + 1), np.int64)
            edge_sequences_S2 = np.zeros((len(sizes_S), 2), np.int64)
            noted = self._batch_sums(place)
            kernels.count_sequences(
                ids_KT, starts_Q, group_Q, first, sizes_S, layer.num_experts, by_group,
                *noted[:3], edges_S2E, edge_sequences_S2, *noted[3:],
            )  # fmt: skip
            for s, size in enumerate(counts.batch_sizes):
                last = first + len(group_Q) - 1
                for side, batch in ((0, first // size), (1, last // size)):
                    if edge_sequences_S2[s, side]:
                        key = (layer.layer, size, batch)
                        sequences = int(edge_sequences_S2[s, side])
                        whole = self.open_batches.add(key, sequences, edges_S2E[s, side])
                        if whole is not None:
                            sums = (noted[0][s], noted[1][s : s + 1], noted[2][s : s + 1], noted[3][s], noted[4][s])
                            kernels.finish_batch(whole, layer.num_experts, *sums)
            if counts.has_weights:
                kernels.count_weights(
                    ids_KT,
                    part.gate_weights[layer.layer].T,
                    layer.num_ids,
                    group_Q,
                    starts_Q,
                    counts.weights_LDGW[place].reshape(-1, len(WEIGHT_STATISTICS)),
                    counts.weighed_LDG[place].reshape(-1),
                    counts.weight_histogram_LWB[place],
                )
        if group[-1] == counts.layers[-1] and len(self.rows):
            counts.absorb(self.fresh_hashes, self.fresh)

    def merge(self, other: Self) -> None:
        """Add the counts of other documents, in place."""
        self.counts.merge(other.counts)

    def _batch_sums(self, place: int) -> tuple[NDArray[np.int64], ...]:
        """The sums of batches of a layer; their tokens are counted with the first layer."""
        counts = self.counts
        none = np.zeros((len(counts.batch_sizes), 0), np.int64)
        tokens = (none, none) if place else (counts.tokens_SB, counts.token_sums_SB)
        return counts.imbalances_LSB[place], counts.imbalance_LS[place], counts.imbalance_squared_LS[place], *tokens

    def _choose_tokens(self, part: Part, starts_G: NDArray[np.int64]) -> None:
        offset = np.arange(part.num_tokens) - np.repeat(starts_G[:-1], np.diff(starts_G))
        hashes = token_hashes(part.document, offset)
        near = np.flatnonzero(hashes < self.counts.hashes[-1])
        self.rows = near[np.argsort(hashes[near], kind="stable")[:SAMPLED_TOKENS]]
        self.fresh_hashes = hashes[self.rows]


@dataclass
class _OpenBatches:
    """Batches of which a part of the trace holds only some sequences, until another thread or part brings the rest."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    held: dict[tuple[int, int, int], tuple[int, NDArray[np.int64]]] = field(default_factory=dict)

    def add(self, key: tuple[int, int, int], sequences: int, loads: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Add sequences to the batch (layer, size, number); its loads if it is now whole."""
        with self.lock:
            before, so_far = self.held.pop(key, (0, np.zeros_like(loads)))
            total = so_far + loads
            if before + sequences == key[1]:
                return total
            self.held[key] = before + sequences, total
            return None


def _of_counts(trace: Trace, layers: Sequence[Layer]) -> BalanceCounts:
    total = BalanceCounts.empty(layers, trace.domains, (), weights=False)
    place_of: dict[int, int] = {layer.layer: place for place, layer in enumerate(layers)}
    code_of: dict[str, int] = {name: code for code, name in enumerate(trace.domains)}
    for counts in trace.iter_counts():
        starts = counts.document_starts()[:-1]
        codes: NDArray[Any] = np.array([code_of[name] for name in counts.domain_names])
        np.add.at(total.documents_DG, (codes[counts.domain[starts]], document_groups(counts.document[starts])), 1)
        asked = np.isin(counts.layer, list(place_of))
        place = np.array([place_of[layer] for layer in counts.layer[asked].tolist()], np.int64)
        cell = codes[counts.domain[asked]], document_groups(counts.document[asked]), counts.expert[asked]
        np.add.at(total.loads_LDGE, (place, *cell), counts.count[asked])
    return total
