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
from moescope.tallying.document_groups import document_groups
from moescope.tallying.one_pass import one_pass
from moescope.tallying.token_sample import HashSample, part_hashes
from moescope.trace import Layer, Part, Trace

NUM_FOLDS = 2
NUM_CELLS = 32
"""Cells of documents; the fold of cell c is c % 2."""

SAMPLED_TOKENS = 16_384
"""Tokens of each fold kept with all their choices."""

SAMPLED_BATCHES = 128
"""Batches of each fold whose loads are kept."""


@dataclass(frozen=True)
class Fit:
    """What a placement of one layer is fitted on.

    Attributes:
        loads: Assignments of each expert, shape (expert,).
        pairs: Tokens with both experts, shape (expert, expert); the diagonal is not read. Only for affinity.
        batches: Loads of some batches, shape (batch, expert). Only for affinity; if there is none, the loads serve.
    """

    loads: NDArray[np.int64]
    pairs: NDArray[np.integer] | None = None
    batches: NDArray[np.integer] | None = None


class Cells:
    """The cell of each document of a trace."""

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


NOTE = -1
"""The key of `HashSample.rows` under which a token's cell and phase are noted."""


@dataclass
class Profile:
    """What one pass over a trace counts of loads; a counter. L layers, X domains, G cells, E experts.

    Memory, at most: 8 bytes x L x X x G x E, 8 bytes x L x E² if pairs are counted, and the samples, 2 bytes x tokens
    sampled x choices of all layers; a copy a thread.

    Attributes:
        layers: Layers counted.
        domains: Domains counted.
        kind: How the sampled batches are formed.
        loads_LXGE: Assignments.
        documents_XG: Documents.
        pairs: For each layer the tokens with two experts, shape (fold, expert, expert); empty if not counted.
        tokens: Sampled tokens of each fold with their choices; `NOTE` is 3 x cell + 1 + phase, the phase being -1 if
            not known.
        batches: Loads of sampled batches of each fold.
    """

    layers: tuple[Layer, ...]
    domains: tuple[str, ...]
    kind: BatchKind
    cells: Cells
    loads_LXGE: NDArray[np.int64]
    documents_XG: NDArray[np.int64]
    pairs: dict[int, NDArray[np.uint32]]
    tokens: HashSample
    batches: HashSample
    _batch_rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 1), np.int64))

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
            {a.layer: np.zeros((NUM_FOLDS, a.num_experts, a.num_experts), np.uint32) for a in layers if pairs},
            HashSample.empty(NUM_FOLDS, SAMPLED_TOKENS, {NOTE: 1, **{a.layer: a.top_k for a in layers}}),
            HashSample.empty(NUM_FOLDS, SAMPLED_BATCHES, {a.layer: a.num_experts for a in layers}),
        )

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count some layers of a part."""
        cell_T = self.cells.of_rows(part)
        fold_T = (cell_T % NUM_FOLDS).astype(np.int8)
        if group[0] == self.layers[0]:
            self._begin(part, cell_T)
        number_of = {layer.layer: number for number, layer in enumerate(self.layers)}
        x_T = part.domain.astype(np.int64) * NUM_CELLS + cell_T
        for layer in group:
            ids_KT = np.ascontiguousarray(part.expert_ids[layer.layer].T, np.int32)
            loads_XE = self.loads_LXGE[number_of[layer.layer]].reshape(-1, self.loads_LXGE.shape[3])
            kernels.count_loads(ids_KT, x_T, loads_XE[:, : layer.num_experts])
            if self.pairs:
                kernels.count_pairs(ids_KT, fold_T, self.pairs[layer.layer])
            self.tokens.take(layer.layer, lambda rows, ids_KT=ids_KT: ids_KT[:, rows].T)  # type: ignore[misc]
            self.batches.take(layer.layer, lambda batches, a=layer, ids_KT=ids_KT: self._loads(ids_KT, batches, a))  # type: ignore[misc]
        if group[-1] == self.layers[-1]:
            self.tokens.settle()
            self.batches.settle()

    def _loads(self, ids_KT: NDArray[np.int32], batches: NDArray[np.int64], layer: Layer) -> NDArray[np.int64]:
        """Loads of some batches of the part at hand, shape (batch, expert)."""
        loads_NE = np.zeros((len(batches), layer.num_experts), np.int64)
        for loads_E, rows in zip(loads_NE, self._batch_rows[batches], strict=True):
            kernels.count_loads(np.ascontiguousarray(ids_KT[:, rows]), np.zeros(len(rows), np.int64), loads_E[None])
        return loads_NE

    def _begin(self, part: Part, cell_T: NDArray[np.int64]) -> None:
        """Choose the tokens and batches of a part that may be kept."""
        documents = part.document_starts()[:-1]
        np.add.at(self.documents_XG, (part.domain[documents], cell_T[documents]), 1)
        hash_T = part_hashes(part)
        phase_T = np.full(part.num_tokens, -1, np.int64) if part.phase is None else part.phase.astype(np.int64)
        note_T1 = (3 * cell_T + 1 + phase_T)[:, None]
        fold_T = cell_T % NUM_FOLDS
        self.tokens.begin(hash_T, fold_T)
        self.tokens.take(NOTE, note_T1.__getitem__)
        starts_Q = part.sequence_starts()
        self._batch_rows = np.concatenate(
            [
                batch_rows(self.kind, starts_Q, fold_T == fold, part.phase).reshape(-1, self.kind.tokens)
                for fold in range(NUM_FOLDS)
            ]
        )
        first_N = self._batch_rows[:, 0]
        # Of the complements, so that which batches are kept says nothing of which tokens are.
        self.batches.begin(~hash_T[first_N], fold_T[first_N])

    def merge(self, other: Profile) -> None:
        """Add the counts of other documents, in place."""
        self.loads_LXGE += other.loads_LXGE
        self.documents_XG += other.documents_XG
        for layer, pairs in self.pairs.items():
            pairs += other.pairs[layer]
        self.tokens.merge(other.tokens)
        self.batches.merge(other.batches)

    def fits(self, folds: Sequence[int], domain: int | None = None) -> dict[int, Fit]:
        """For each layer what to fit a placement on: some folds, of one domain or of all."""
        fits = {}
        for loads_XGE, layer in zip(self.loads_LXGE, self.layers, strict=True):
            loads_XGE = loads_XGE[:, :, : layer.num_experts]
            loads_GE = loads_XGE.sum(axis=0) if domain is None else loads_XGE[domain]
            loads_E = sum(loads_GE[fold::NUM_FOLDS].sum(axis=0) for fold in folds)
            pairs_EE = sum(self.pairs[layer.layer][fold].astype(np.int64) for fold in folds) if self.pairs else None
            kept = [self.batches.kept(fold, layer.layer) for fold in folds]
            fits[layer.layer] = Fit(loads_E, pairs_EE, np.concatenate(kept))
        return fits


def profile(
    trace: Trace, layers: Sequence[Layer], kind: BatchKind, cells: Cells, *, pairs: bool, threads: int | None = None
) -> Profile:
    """Count what placements are fitted on, in one pass: with `pairs`, those of the experts of a token, too."""
    (total,) = one_pass(
        trace,
        layers,
        lambda: [Profile.empty(trace, layers, kind, cells, pairs=pairs)],
        threads=threads,
        tokens=trace.header.phases,
        together=tokens_together(trace, [kind]),
    )
    return total
