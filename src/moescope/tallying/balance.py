"""Loads by groups of documents and by batches of sequences, and the gate weights: what load balance is told from.

The unit is the assignment. A batch is a run of consecutive sequences of the trace, counted from its first; the last
batch is left out if it is not full. One pass; nothing grows with tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moescope.tallying import balance_kernels as kernels
from moescope.tallying.counter import Array, Counter, CountOptions, Facts, Result, sampled, summed
from moescope.tallying.document_groups import NUM_GROUPS, document_groups
from moescope.tallying.token_sample import HashSample, part_hashes
from moescope.trace import Layer, Part, Trace

BATCH_SIZES = (1, 16, 256)
"""Sequences a batch."""

WEIGHT_STATISTICS = ("first", "margin", "entropy")
"""Of a token's gate weights, normalised to sum 1: the largest, its lead over the second, and the entropy of all."""

SAMPLED_TOKENS = 4096
"""Tokens kept with all their choices, from which batches without order are drawn."""

_TOKEN_BINS = 32 * 40  # 32 for a factor of e, up to e^40 tokens, which no batch has


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
        sample: Tokens with their choices, one group; -1 = dropped.
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
    sample: HashSample
    has_weights: bool

    facts = ("batch_sizes", "has_weights")

    @classmethod
    def declared(cls, layers: Sequence[Layer], domains: Sequence[str], facts: Facts) -> dict[str, Array]:
        """The sums, and the sample. A batch never holds sequences of two counts, so batches add up, too."""
        check_batches(facts["batch_sizes"])
        sizes = {
            "domain": len(domains),
            "layer": len(layers),
            "documents": NUM_GROUPS,
            "expert": max(layer.num_ids for layer in layers),
            "size": len(facts["batch_sizes"]),
            "imbalance": int(kernels.BINS_PER_E * np.log(max(layer.num_experts for layer in layers))) + 2,
            "tokens": _TOKEN_BINS,
            "statistic": len(WEIGHT_STATISTICS) if facts["has_weights"] else 0,
            "weight": kernels.WEIGHT_BINS,
        }
        return summed(
            sizes,
            documents_DG="domain documents",
            tokens_DG="domain documents",
            loads_LDGE="layer domain documents expert",
            imbalances_LSB="layer size imbalance",
            imbalance_LS="layer size",
            imbalance_squared_LS="layer size",
            tokens_SB="size tokens",
            token_sums_SB="size tokens",
            weights_LDGW="layer domain documents statistic",
            weighed_LDG="layer domain documents",
            weight_histogram_LWB="layer statistic weight",
        ) | sampled("sample", layers, "all", 1, SAMPLED_TOKENS)

    def tokens(self, layer: int) -> NDArray[np.int32]:
        """Choices of the sampled tokens at a layer, shape (token, choice)."""
        return self.sample.kept(0, layer)


def check_batches(sizes: Sequence[int]) -> None:
    """Refuse impossible batches.

    Raises:
        ValueError: One holds no sequence, or there are many.
    """
    # 64 sizes, as every size takes 8 bytes x layers x bins and a file may ask for any number of them.
    if len(sizes) > 64 or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(f"a batch holds at least one sequence, and there are at most 64 sizes, not {tuple(sizes)}")


@dataclass
class BalanceCounter(Counter[BalanceCounts]):
    """The counter that fills `BalanceCounts`; those of a pass share the batches that cross from part to part."""

    name, result_type, reads_weights = "balance", BalanceCounts, True

    counts: BalanceCounts
    first_sequence: dict[int, int]
    open_batches: _OpenBatches

    @classmethod
    def need(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> None:
        """Refuse impossible batches; every trace has loads."""
        check_batches(options.batch_sizes or ())

    @classmethod
    def prepare(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> Callable[[], Self]:
        """What makes empty counters, which know how many sequences precede each part."""
        sizes = BATCH_SIZES if options.batch_sizes is None else options.batch_sizes
        open_batches, first_sequence, total = _OpenBatches(), dict[int, int](), 0
        for file in trace.parts:
            first_sequence[file.contents.first_document] = total
            total += file.contents.sequences
        facts: dict[str, Any] = {"batch_sizes": sizes, "has_weights": trace.header.weights}
        return lambda: cls(BalanceCounts.empty(layers, trace.domains, **facts), first_sequence, open_batches)

    @classmethod
    def of_counts(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> BalanceCounts:
        """The loads of a trace of counts."""
        total = BalanceCounts.empty(layers, trace.domains, batch_sizes=(), has_weights=False)
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

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count the layers of `group` in a part."""
        counts = self.counts
        starts_G, starts_Q = part.document_starts(), part.sequence_starts()
        groups = document_groups(part.document[starts_G[:-1]])
        domains = part.domain[starts_G[:-1]].astype(np.int64)
        in_document = np.searchsorted(starts_G, starts_Q[:-1], side="right") - 1
        group_Q = (domains * NUM_GROUPS + groups)[in_document]
        if group[0] == counts.layers[0]:
            np.add.at(counts.documents_DG, (domains, groups), 1)
            np.add.at(counts.tokens_DG, (domains, groups), np.diff(starts_G))
            counts.sample.begin(part_hashes(part), np.zeros(part.num_tokens, np.int64))
        first = self.first_sequence[int(part.document[0])]
        sizes_S = np.array(counts.batch_sizes, np.int64)
        for layer in group:
            place = counts.layers.index(layer)
            ids_KT = part.expert_ids[layer.layer].T
            counts.sample.take(layer.layer, part.expert_ids[layer.layer].__getitem__)
            by_group = counts.loads_LDGE[place].reshape(-1, counts.loads_LDGE.shape[3])[:, : layer.num_ids]
            edges_S2E = np.zeros((len(sizes_S), 2, layer.num_ids + 1), np.int64)
            edge_sequences_S2 = np.zeros((len(sizes_S), 2), np.int64)
            sums = self._batch_sums(place)
            kernels.count_sequences(
                ids_KT, starts_Q, group_Q, first, sizes_S, layer.num_experts, by_group,
                sums, edges_S2E, edge_sequences_S2,
            )  # fmt: skip
            for s, size in enumerate(counts.batch_sizes):
                last = first + len(group_Q) - 1
                for side, batch in ((0, first // size), (1, last // size)):
                    if edge_sequences_S2[s, side]:
                        key = (layer.layer, size, batch)
                        sequences = int(edge_sequences_S2[s, side])
                        whole = self.open_batches.add(key, sequences, edges_S2E[s, side])
                        if whole is not None:
                            kernels.finish_batch(whole, layer.num_experts, s, sums)
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
        if group[-1] == counts.layers[-1]:
            counts.sample.settle()

    def _batch_sums(self, place: int) -> kernels.BatchSums:
        """The sums of batches of a layer; their tokens are counted with the first layer."""
        counts = self.counts
        none = np.zeros((len(counts.batch_sizes), 0), np.int64)
        tokens = (none, none) if place else (counts.tokens_SB, counts.token_sums_SB)
        imbalances = counts.imbalances_LSB[place], counts.imbalance_LS[place], counts.imbalance_squared_LS[place]
        return kernels.BatchSums(*imbalances, *tokens)


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
