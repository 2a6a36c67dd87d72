"""Loads by groups of documents and by batches of sequences, and the gate weights: what load balance is told from.

The unit is the assignment. A batch is a run of consecutive sequences of the trace, counted from its first; the last
batch is left out if it is not full. One pass; nothing grows with tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.tallying import balance_kernels as kernels
from moescope.tallying.document_groups import NUM_GROUPS, document_groups
from moescope.tallying.one_pass import one_pass
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
class BalanceCounts:
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
    ) -> BalanceCounts:
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


@dataclass
class BalanceCounter:
    """The counter that fills `BalanceCounts`; make it with `balance_counters`."""

    counts: BalanceCounts
    first_sequence: dict[int, int]
    open_batches: _OpenBatches
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    fresh_hashes: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    fresh: dict[int, NDArray[np.int32]] = field(default_factory=dict)

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
        place = {layer.layer: at for at, layer in enumerate(counts.layers)}
        for layer in group:
            at = place[layer.layer]
            ids_KT = part.expert_ids[layer.layer].T
            self.fresh[layer.layer] = part.expert_ids[layer.layer][self.rows].astype(np.int32)
            by_group = counts.loads_LDGE[at].reshape(-1, counts.loads_LDGE.shape[3])[:, : layer.num_ids]
            edges_S2E = np.zeros((len(sizes_S), 2, layer.num_ids + 1), np.int64)
            edge_sequences_S2 = np.zeros((len(sizes_S), 2), np.int64)
            noted = self._batch_sums(at)
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
                    counts.weights_LDGW[at].reshape(-1, len(WEIGHT_STATISTICS)),
                    counts.weighed_LDG[at].reshape(-1),
                    counts.weight_histogram_LWB[at],
                )
        if group[-1] == counts.layers[-1] and len(self.rows):
            counts.absorb(self.fresh_hashes, self.fresh)

    def merge(self, other: BalanceCounter) -> None:
        """Add the counts of other documents, in place."""
        self.counts.merge(other.counts)

    def _batch_sums(self, at: int) -> tuple[NDArray[np.int64], ...]:
        """The sums of batches of a layer; their tokens are counted with the first layer."""
        counts = self.counts
        none = np.zeros((len(counts.batch_sizes), 0), np.int64)
        tokens = (none, none) if at else (counts.tokens_SB, counts.token_sums_SB)
        return counts.imbalances_LSB[at], counts.imbalance_LS[at], counts.imbalance_squared_LS[at], *tokens

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


class BalanceCounters:
    """Makes the counters of one pass, which share the batches that cross from part to part.

    Args:
        trace: The trace; its rows are looked through once for where sequences begin.
        layers: Layers to count.
        batch_sizes: Sequences a batch.
    """

    def __init__(self, trace: Trace, layers: Sequence[Layer], batch_sizes: Sequence[int] = BATCH_SIZES) -> None:
        self.layers, self.domains = tuple(layers), trace.domains
        self.batch_sizes, self.weights = tuple(batch_sizes), trace.header.weights
        self._open = _OpenBatches()
        self._first_sequence: dict[int, int] = {}
        total = 0
        for file in trace.parts:
            part = file.read((), tokens=False)
            self._first_sequence[int(part.document[0])] = total
            total += int(np.count_nonzero(part.position == 0))

    def __call__(self) -> BalanceCounter:
        """An empty counter."""
        empty = BalanceCounts.empty(self.layers, self.domains, self.batch_sizes, weights=self.weights)
        return BalanceCounter(empty, self._first_sequence, self._open)


def count_balance(
    trace: Trace,
    layers: Iterable[int] | None = None,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    threads: int | None = None,
) -> BalanceCounts:
    """Count what load balance is told from, in one pass.

    Args:
        trace: The trace; one of counts gives loads only.
        layers: Layers to count, or None for all.
        batch_sizes: Sequences a batch.
        threads: Parts counted at a time; None for the number of processors.
    Raises:
        NoSuchLayer: A layer was not recorded.
        TraceDamaged: A page fails its checksum.
        ValueError: `threads` or a batch size is not positive.
    """
    chosen = trace.select_layers(layers)
    if any(size < 1 for size in batch_sizes):
        raise ValueError(f"a batch holds at least one sequence, not {min(batch_sizes)}")
    if trace.header.counts_only:
        return _of_counts(trace, chosen)
    make = BalanceCounters(trace, chosen, batch_sizes)
    (total,) = one_pass(trace, chosen, lambda: [make()], threads=threads, weights=trace.header.weights)
    return total.counts


def _of_counts(trace: Trace, layers: Sequence[Layer]) -> BalanceCounts:
    total = BalanceCounts.empty(layers, trace.domains, (), weights=False)
    place: dict[int, int] = {layer.layer: at for at, layer in enumerate(layers)}
    code_of: dict[str, int] = {name: code for code, name in enumerate(trace.domains)}
    for counts in trace.iter_counts():
        starts = counts.document_starts()[:-1]
        codes: NDArray[Any] = np.array([code_of[name] for name in counts.domain_names])
        np.add.at(total.documents_DG, (codes[counts.domain[starts]], document_groups(counts.document[starts])), 1)
        asked = np.isin(counts.layer, list(place))
        at = np.array([place[layer] for layer in counts.layer[asked].tolist()], np.int64)
        where = codes[counts.domain[asked]], document_groups(counts.document[asked]), counts.expert[asked]
        np.add.at(total.loads_LDGE, (at, *where), counts.count[asked])
    return total
