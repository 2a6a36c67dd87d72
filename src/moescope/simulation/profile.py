"""A profile: what placements are fitted on, and a sample of tokens from which batches without locality are drawn.

Documents fall into two folds, by turns within their domain, so that what is fitted on one can be judged on the other;
and into cells, 16 random groups of each fold, for intervals. Units: the assignment; pairs, the token. One pass; nothing
grows with tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.simulation import parallel_kernels as kernels
from moescope.simulation.batches import BatchKind, batch_rows, tokens_together
from moescope.simulation.placements import Fit
from moescope.tallying.document_groups import document_groups
from moescope.tallying.one_pass import one_pass
from moescope.tallying.token_sample import token_hashes
from moescope.trace import Layer, Part, Trace

NUM_FOLDS = 2
NUM_CELLS = 32
"""Cells of documents; the fold of cell c is c % 2."""

SAMPLED_TOKENS = 16_384
"""Tokens of each fold kept with all their choices."""

SAMPLED_BATCHES = 128
"""Batches of each fold whose loads are kept."""

NO_HASH = np.uint64(2**64 - 1)


class Cells:
    """The cell of each document of a trace.

    Args:
        trace: The trace.
    """

    def __init__(self, trace: Trace) -> None:
        numbers, domains = trace.document_numbers, trace.document_domains
        order = np.lexsort((np.arange(len(numbers)), domains))
        first = np.searchsorted(domains[order], domains)
        rank = np.empty(len(numbers), np.int64)
        rank[order] = np.arange(len(numbers))
        fold = (rank - first + domains) % NUM_FOLDS
        by_number = np.argsort(numbers, kind="stable")
        self._numbers = numbers[by_number]
        self._cells = (fold + NUM_FOLDS * document_groups(numbers, NUM_CELLS // NUM_FOLDS))[by_number]

    def __call__(self, numbers: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Cells of documents of the trace, given by their number."""
        return self._cells[np.searchsorted(self._numbers, numbers)]

    def of_rows(self, part: Part) -> NDArray[np.int64]:
        """Cells of the rows of a part."""
        starts = part.document_starts()
        return np.repeat(self(part.document[starts[:-1]]), np.diff(starts))


@dataclass(frozen=True)
class HashedSample:
    """Things kept with what each layer says of them: those of each fold that have the smallest hashes.

    Attributes:
        hashes: Ascending; the largest 64-bit number where there is none, shape (fold, thing).
        notes: What is noted of each, shape (fold, thing).
        values: For each layer an array of shape (fold, thing, …).
    """

    hashes: NDArray[np.uint64]
    notes: NDArray[np.int64]
    values: dict[int, NDArray[np.integer[Any]]]

    @classmethod
    def empty(cls, size: int, shapes: dict[int, tuple[int, type[np.integer[Any]]]]) -> HashedSample:
        """Room for `size` things a fold; a row of each layer has the length and type of `shapes`."""
        return cls(
            np.full((NUM_FOLDS, size), NO_HASH),
            np.zeros((NUM_FOLDS, size), np.int64),
            {layer: np.zeros((NUM_FOLDS, size, width), kind) for layer, (width, kind) in shapes.items()},
        )

    def number(self, fold: int) -> int:
        """Things kept of a fold."""
        return int((self.hashes[fold] != NO_HASH).sum())

    def absorb(
        self,
        fold: int,
        hashes: NDArray[np.uint64],
        notes: NDArray[np.int64],
        values: dict[int, NDArray[np.integer[Any]]],
    ) -> None:
        """Keep those of the things kept and of these that have the smallest hashes."""
        both = np.concatenate([self.hashes[fold], hashes])
        kept = np.argsort(both, kind="stable")[: self.hashes.shape[1]]
        self.hashes[fold] = both[kept]
        self.notes[fold] = np.concatenate([self.notes[fold], notes])[kept]
        for layer, mine in self.values.items():
            mine[fold] = np.concatenate([mine[fold], values[layer].astype(mine.dtype)])[kept]

    def merge(self, other: HashedSample) -> None:
        """Absorb another sample, in place."""
        for fold in range(NUM_FOLDS):
            of_fold = {layer: values[fold] for layer, values in other.values.items()}
            self.absorb(fold, other.hashes[fold], other.notes[fold], of_fold)


@dataclass
class Profile:
    """What one pass over a trace tells about loads; a counter. L layers, X domains, G cells, E experts.

    Memory, at most: 8 bytes x L x X x G x E, 8 bytes x L x E² if pairs are counted, and the samples, 2 bytes x tokens
    sampled x choices of all layers; a copy a thread.

    Attributes:
        layers: Layers counted.
        domains: Domains counted.
        kind: How the sampled batches are formed.
        loads_LXGE: Assignments.
        documents_XG: Documents.
        tokens_XG: Tokens.
        pairs: For each layer the tokens with two experts, shape (fold, expert, expert); empty if not counted.
        tokens: Sampled tokens with their choices; noted is 3 x cell + 1 + phase, the phase being -1 if not known.
        batches: Loads of sampled batches.
    """

    layers: tuple[Layer, ...]
    domains: tuple[str, ...]
    kind: BatchKind
    cells: Cells
    loads_LXGE: NDArray[np.int64]
    documents_XG: NDArray[np.int64]
    tokens_XG: NDArray[np.int64]
    pairs: dict[int, NDArray[np.uint32]]
    tokens: HashedSample
    batches: HashedSample
    _chosen: list[tuple[int, NDArray[np.int64], NDArray[np.uint64], NDArray[np.int64]]] = field(default_factory=list)
    _fresh: list[dict[int, NDArray[np.integer[Any]]]] = field(default_factory=list)
    _orders: list[NDArray[np.int64]] = field(default_factory=list)
    _loads: list[dict[int, NDArray[np.integer[Any]]]] = field(default_factory=list)

    @classmethod
    def empty(cls, trace: Trace, layers: Sequence[Layer], kind: BatchKind, cells: Cells, *, pairs: bool) -> Profile:
        """A profile of nothing."""
        experts = max(layer.num_experts for layer in layers)
        by_cell = (len(trace.domains), NUM_CELLS)
        return cls(
            tuple(layers),
            trace.domains,
            kind,
            cells,
            np.zeros((len(layers), *by_cell, experts), np.int64),
            np.zeros(by_cell, np.int64),
            np.zeros(by_cell, np.int64),
            {a.layer: np.zeros((NUM_FOLDS, a.num_experts, a.num_experts), np.uint32) for a in layers if pairs},
            HashedSample.empty(SAMPLED_TOKENS, {a.layer: (a.top_k, _id_type(a)) for a in layers}),
            HashedSample.empty(SAMPLED_BATCHES, {a.layer: (a.num_experts, np.int32) for a in layers}),
        )

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count some layers of a part."""
        cell_T = self.cells.of_rows(part)
        fold_T = (cell_T % NUM_FOLDS).astype(np.int8)
        if group[0] == self.layers[0]:
            self._begin(part, cell_T)
        at = {layer.layer: n for n, layer in enumerate(self.layers)}
        x_T = part.domain.astype(np.int64) * NUM_CELLS + cell_T
        for layer in group:
            ids_KT = np.ascontiguousarray(part.expert_ids[layer.layer].T, np.int32)
            loads_XE = self.loads_LXGE[at[layer.layer]].reshape(-1, self.loads_LXGE.shape[3])
            kernels.count_loads(ids_KT, x_T, loads_XE[:, : layer.num_experts])
            if self.pairs:
                kernels.count_pairs(ids_KT, fold_T, self.pairs[layer.layer])
            for fold in range(NUM_FOLDS):
                _, rows, _, _ = self._chosen[fold]
                self._fresh[fold][layer.layer] = ids_KT[:, rows].T
                batches_NR = self._orders[fold]
                loads_NE = np.zeros((len(batches_NR), layer.num_experts), np.int64)
                for n, rows in enumerate(batches_NR):
                    kernels.count_loads(
                        np.ascontiguousarray(ids_KT[:, rows]), np.zeros(len(rows), np.int64), loads_NE[n : n + 1]
                    )
                self._loads[fold][layer.layer] = loads_NE
        if group[-1] == self.layers[-1]:
            for fold in range(NUM_FOLDS):
                _, _, hashes, notes = self._chosen[fold]
                self.tokens.absorb(fold, hashes, notes, self._fresh[fold])
                first = self._orders[fold][:, 0]
                self.batches.absorb(fold, ~self._hashes[first], np.zeros(len(first), np.int64), self._loads[fold])

    def _begin(self, part: Part, cell_T: NDArray[np.int64]) -> None:
        """Choose the tokens and batches of a part that may be kept."""
        starts = part.document_starts()
        documents = starts[:-1]
        np.add.at(self.documents_XG, (part.domain[documents], cell_T[documents]), 1)
        np.add.at(self.tokens_XG, (part.domain[documents], cell_T[documents]), np.diff(starts))
        offset = np.arange(part.num_tokens) - np.repeat(documents, np.diff(starts))
        self._hashes = token_hashes(part.document, offset)
        phase_T = np.full(part.num_tokens, -1, np.int64) if part.phase is None else part.phase.astype(np.int64)
        note_T = 3 * cell_T + 1 + phase_T
        self._chosen, self._orders = [], []
        self._fresh, self._loads = [{} for _ in range(NUM_FOLDS)], [{} for _ in range(NUM_FOLDS)]
        for fold in range(NUM_FOLDS):
            kept_T = cell_T % NUM_FOLDS == fold
            near = np.flatnonzero(kept_T & (self._hashes < self.tokens.hashes[fold, -1]))
            rows = near[np.argsort(self._hashes[near], kind="stable")[:SAMPLED_TOKENS]]
            self._chosen.append((fold, rows, self._hashes[rows], note_T[rows]))
            order = batch_rows(self.kind, part.sequence_starts(), kept_T, part.phase).reshape(-1, self.kind.tokens)
            hashes = ~self._hashes[order[:, 0]]
            nearest = np.argsort(hashes, kind="stable")[:SAMPLED_BATCHES]
            self._orders.append(order[nearest[hashes[nearest] < self.batches.hashes[fold, -1]]])

    def merge(self, other: Profile) -> None:
        """Add the counts of other documents, in place."""
        self.loads_LXGE += other.loads_LXGE
        self.documents_XG += other.documents_XG
        self.tokens_XG += other.tokens_XG
        for layer, pairs in self.pairs.items():
            pairs += other.pairs[layer]
        self.tokens.merge(other.tokens)
        self.batches.merge(other.batches)

    def fits(self, folds: Sequence[int], domain: int | None = None) -> dict[int, Fit]:
        """For each layer what to fit a placement on: some folds, of one domain or of all."""
        found = {}
        for at, layer in enumerate(self.layers):
            loads_XGE = self.loads_LXGE[at, :, :, : layer.num_experts]
            loads_GE = loads_XGE.sum(axis=0) if domain is None else loads_XGE[domain]
            loads_E = sum(loads_GE[fold::NUM_FOLDS].sum(axis=0) for fold in folds)
            pairs_EE = sum(self.pairs[layer.layer][fold].astype(np.int64) for fold in folds) if self.pairs else None
            kept = [self.batches.values[layer.layer][fold, : self.batches.number(fold)] for fold in folds]
            found[layer.layer] = Fit(loads_E, pairs_EE, np.concatenate(kept))
        return found


def profile(
    trace: Trace, layers: Sequence[Layer], kind: BatchKind, cells: Cells, *, pairs: bool, threads: int | None = None
) -> Profile:
    """Count what placements are fitted on, in one pass.

    Args:
        trace: The trace.
        layers: Layers to count.
        kind: How the sampled batches are formed.
        cells: The cells of its documents.
        pairs: Count pairs of experts of a token, too.
        threads: Parts counted at a time; None for the number of processors.
    Raises:
        NotRecorded: The trace holds counts only.
        TraceDamaged: A page fails its checksum.
        ValueError: `threads` is not positive.
    """
    (total,) = one_pass(
        trace,
        layers,
        lambda: [Profile.empty(trace, layers, kind, cells, pairs=pairs)],
        threads=threads,
        tokens=trace.header.phases,
        together=tokens_together(trace, [kind]),
    )
    return total


def _id_type(layer: Layer) -> type[np.integer[Any]]:
    return np.int16 if layer.num_ids < 2**15 else np.int32
