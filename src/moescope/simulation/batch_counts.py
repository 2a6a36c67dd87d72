"""Loads of devices by batch, drops and the devices that tokens reach, counted over a trace and over its nulls.

Units: the assignment, the batch and the token. Batches hold documents of one fold; placements that are fitted are
fitted on the other one. S kinds of batches, L layers, P placements, X domains, G cells of documents, Q bins of
positions, J capacity factors and one more, B bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product
from math import ceil
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moescope.simulation import parallel_kernels as kernels
from moescope.simulation.batches import BatchKind, batch_rows
from moescope.simulation.placements import Cluster, Placement
from moescope.simulation.profile import NOTE, NUM_CELLS, NUM_FOLDS, Cells, Profile
from moescope.trace import Layer, Part
from moescope.trace.columns import PHASES

POSITION_BINS = 21
"""Positions by the power of two: 0, 1-2, 3-6, 7-14 …, the last from 2^20 - 1."""

NULL_TOKENS = 65_536
"""Tokens of each fold in the batches of a null, but at least eight batches and at most 1024."""


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes:
        kinds: How batches are formed.
        placements: For each fold of documents judged, the placements in one order.
        factors: Capacity factors, ascending.
    """

    layers: tuple[Layer, ...]
    domains: tuple[str, ...]
    kinds: tuple[BatchKind, ...]
    cluster: Cluster
    placements: tuple[tuple[Placement, ...], ...]
    factors: tuple[float, ...]

    def drops(self, layer: Layer, kind: BatchKind) -> NDArray[np.int64]:
        """Factors that drop an assignment before which i went to the same expert, shape (i,), i to a batch's tokens."""
        mean_load = Fraction(kind.tokens * layer.top_k, layer.num_experts)
        capacity_F = [ceil(Fraction(factor) * mean_load) for factor in self.factors]
        return np.searchsorted(capacity_F, np.arange(kind.tokens + 1), side="right")

    def tables(self, layer: Layer, fold: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Device of each replica, shape (placement, expert, replica), and replicas, shape (placement, expert)."""
        of_fold = self.placements[fold]
        counts = np.array([placement.num_replicas(layer.layer) for placement in of_fold], np.int32)
        width = int(counts.max(initial=1))
        devices = [placement.devices(layer.layer, width) for placement in of_fold]
        return np.array(devices, np.int32).reshape(len(of_fold), layer.num_experts, width), counts


@dataclass(frozen=True)
class BatchCounts:
    """Sums over batches.

    Memory: 8 bytes x S x L x (X + Q) x G x J, 20 MB for two kinds, 60 layers, 22 domains and 13 factors; a copy a
        thread.

    Attributes:
        batches_S: Batches.
        histogram_SLPB: Batches by ⌊200 ln(largest load / mean load of the devices)⌋.
        slowest_SPB: The same of Σ over layers of the largest / Σ of the mean.
        largest_SLPG: Assignments on the most loaded device of their batch.
        made_SLG: Assignments to routed experts.
        reached_SLPG2: Distinct devices, and distinct nodes, of the experts of a token.
        tokens_SLG: Tokens.
        dropped_SLXGJ: Assignments by how many capacity factors drop them.
        dropped_SLQGJ: The same by position.
        loads: For each kind the experts of batches by their load, shape (layer, load); the last bin holds larger ones.
    """

    batches_S: NDArray[np.int64]
    histogram_SLPB: NDArray[np.int64]
    slowest_SPB: NDArray[np.int64]
    largest_SLPG: NDArray[np.int64]
    made_SLG: NDArray[np.int64]
    reached_SLPG2: NDArray[np.int64]
    tokens_SLG: NDArray[np.int64]
    dropped_SLXGJ: NDArray[np.int64]
    dropped_SLQGJ: NDArray[np.int64]
    loads: tuple[NDArray[np.int64], ...]

    @classmethod
    def empty(cls, setting: Setting, *, domains: int) -> BatchCounts:
        """Counts of nothing."""
        sizes = len(setting.kinds), len(setting.layers), len(setting.placements[0])
        bins = int(kernels.BINS_PER_E * np.log(setting.cluster.devices)) + 2
        cells = NUM_CELLS, len(setting.factors) + 1

        def zeros(*shape: int) -> NDArray[np.int64]:
            return np.zeros(shape, np.int64)

        return cls(
            zeros(sizes[0]),
            zeros(*sizes, bins),
            zeros(sizes[0], sizes[2], bins),
            zeros(*sizes, NUM_CELLS),
            zeros(*sizes[:2], NUM_CELLS),
            zeros(*sizes, NUM_CELLS, 2),
            zeros(*sizes[:2], NUM_CELLS),
            zeros(*sizes[:2], domains, *cells),
            zeros(*sizes[:2], POSITION_BINS, *cells),
            tuple(zeros(sizes[1], kind.tokens + 1) for kind in setting.kinds),
        )

    def merge(self, other: BatchCounts) -> None:
        """Add other counts, in place."""
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            pairs = zip(mine, theirs, strict=True) if isinstance(mine, tuple) else [(mine, theirs)]
            for a, b in pairs:
                a += b


@dataclass(frozen=True)
class BatchRows:
    """Rows of the tokens of a fold in the order of batches of the s-th kind, with what is known of each row.

    Attributes:
        order: Of the fold's rows, shape (row in order,).
        cells: Where every row is counted.
        largest: Largest load of each batch, summed over layers, shape (placement, batch).
        made: Assignments of each batch, summed over layers, shape (batch,).
    """

    s: int
    fold: int
    order: NDArray[np.int64]
    cells: kernels.TokenCells
    largest: NDArray[np.int64]
    made: NDArray[np.int64]

    @classmethod
    def of(cls, setting: Setting, s: int, fold: int, order: NDArray[np.int64], cells: kernels.TokenCells) -> BatchRows:
        """Rows, with empty sums over layers."""
        batches = len(order) // setting.kinds[s].tokens
        largest = np.zeros((len(setting.placements[0]), batches), np.int64)
        return cls(s, fold, order, cells, largest, np.zeros(batches, np.int64))

    def count_layer(self, setting: Setting, counts: BatchCounts, number: int, ids_KT: NDArray[np.int32]) -> None:
        """Count the layer of this number."""
        s, layer, kind, cluster = self.s, setting.layers[number], setting.kinds[self.s], setting.cluster
        device_PEC, replicas_PE = setting.tables(layer, self.fold)
        kernels.count_batches(
            ids_KT, self.order, kind.tokens, layer.num_experts, self.cells,
            device_PEC, replicas_PE, cluster.devices, cluster.devices // cluster.nodes, setting.drops(layer, kind),
            kernels.LayerSums(
                counts.histogram_SLPB[s, number], counts.largest_SLPG[s, number], counts.made_SLG[s, number],
                counts.reached_SLPG2[s, number], counts.tokens_SLG[s, number], counts.dropped_SLXGJ[s, number],
                counts.dropped_SLQGJ[s, number], counts.loads[s][number], self.largest, self.made,
            ),
        )  # fmt: skip

    def finish(self, setting: Setting, counts: BatchCounts) -> None:
        """Note, once all layers are counted, what batches wait for over all of them."""
        counts.batches_S[self.s] += len(self.made)
        full = self.made > 0
        value_PN = self.largest[:, full] * setting.cluster.devices / self.made[full]
        last = counts.slowest_SPB.shape[2] - 1
        bins_PN = np.minimum((np.log(value_PN) * kernels.BINS_PER_E).astype(np.int64), last)
        for p, bins_N in enumerate(bins_PN):
            np.add.at(counts.slowest_SPB[self.s, p], bins_N, 1)


@dataclass
class BatchCounter:
    """The counter that fills `BatchCounts` from a trace."""

    setting: Setting
    cells: Cells
    counts: BatchCounts
    _rows: list[BatchRows] = field(default_factory=list)

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count some layers of a part."""
        if group[0] == self.setting.layers[0]:
            cell_T, starts = self.cells.of_rows(part), part.sequence_starts()
            cells = kernels.TokenCells(cell_T, part.domain.astype(np.int64), position_bins(part.position))
            self._rows = [
                BatchRows.of(
                    self.setting, s, fold, batch_rows(kind, starts, cell_T % NUM_FOLDS == fold, part.phase), cells
                )
                for s, kind in enumerate(self.setting.kinds)
                for fold in range(NUM_FOLDS)
            ]
        for layer in group:
            ids_KT = _as_ids(part.expert_ids[layer.layer].T)
            for rows in self._rows:
                rows.count_layer(self.setting, self.counts, self.setting.layers.index(layer), ids_KT)
        if group[-1] == self.setting.layers[-1]:
            for rows in self._rows:
                rows.finish(self.setting, self.counts)

    def merge(self, other: BatchCounter) -> None:
        """Add the counts of other documents, in place."""
        self.counts.merge(other.counts)


class NullTokens(NamedTuple):
    """Tokens in the order of the batches of a null, the cell of each, and at a layer their choices (choice, token)."""

    order: NDArray[np.int64]
    cell: NDArray[np.int64]
    ids: Callable[[Layer], NDArray[np.integer[Any]]]


def count_shuffled(
    setting: Setting, profile: Profile, rng: np.random.Generator, wanted: NDArray[np.bool_]
) -> BatchCounts:
    """The batches that the same tokens would form in any order: the tokens sampled of each fold, permuted again and
    again.

    Each keeps its choices at all layers. A permutation is cut into batches, its rest is left out; if it is shorter than
    a batch, batches go on in the next one. Kinds of batches that are not `wanted` have none.
    """

    def shuffled(s: int, fold: int) -> NullTokens:
        kind, notes = setting.kinds[s], profile.tokens.kept(fold, NOTE)[:, 0].astype(np.int64)
        phase = notes % 3 - 1
        tokens = np.flatnonzero((phase < 0) | (phase == PHASES.index(kind.phase)))
        order = _permutations(tokens, kind, rng)
        return NullTokens(order, notes // 3, lambda layer: profile.tokens.kept(fold, layer.layer).T)

    return _count_null(setting, wanted, shuffled)


def count_uniform(setting: Setting, seed: int, wanted: NDArray[np.bool_]) -> BatchCounts:
    """Batches of tokens that choose uniformly, each layer on its own; of the kinds `wanted`."""

    def uniform(s: int, fold: int) -> NullTokens:
        number = _null_tokens(setting.kinds[s])

        def draw(layer: Layer) -> NDArray[np.integer[Any]]:
            rng = np.random.default_rng([seed, s, fold, layer.layer])
            return kernels.draw_uniform(number, layer.top_k, layer.num_ids, rng)

        return NullTokens(np.arange(number), np.full(number, fold), draw)

    return _count_null(setting, wanted, uniform)


def _count_null(
    setting: Setting, wanted: NDArray[np.bool_], tokens_of: Callable[[int, int], NullTokens]
) -> BatchCounts:
    """The batches of the tokens that a null gives for a kind and a fold."""
    counts = BatchCounts.empty(setting, domains=1)
    for s, fold in product(np.flatnonzero(wanted).tolist(), range(NUM_FOLDS)):
        tokens = tokens_of(s, fold)
        zeros = np.zeros(len(tokens.cell), np.int64)
        rows = BatchRows.of(setting, s, fold, tokens.order, kernels.TokenCells(tokens.cell, zeros, zeros))
        for number, layer in enumerate(setting.layers):
            rows.count_layer(setting, counts, number, _as_ids(tokens.ids(layer)))
        rows.finish(setting, counts)
    return counts


def _as_ids(ids_KT: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    """In one type and order, so that the kernel is compiled once."""
    return np.ascontiguousarray(ids_KT, np.int32)


def _null_tokens(kind: BatchKind) -> int:
    return min(max(NULL_TOKENS // kind.tokens, 8), 1024) * kind.tokens


def _permutations(tokens: NDArray[np.int64], kind: BatchKind, rng: np.random.Generator) -> NDArray[np.int64]:
    """Permutations of the tokens, as whole batches."""
    if not len(tokens):
        return tokens
    used = len(tokens) // kind.tokens * kind.tokens or len(tokens)
    wanted = _null_tokens(kind)
    drawn = np.concatenate([rng.permutation(tokens)[:used] for _ in range(-(-wanted // used))])
    return drawn[:wanted]


def position_bins(position: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Bin of each position, ⌊log2(position + 1)⌋.

    Example:
        >>> position_bins(np.array([0, 1, 2, 3, 6, 7])).tolist()
        [0, 1, 1, 2, 2, 3]
    """
    _, exponent = np.frexp(position.astype(np.float64) + 1)
    return np.minimum(exponent.astype(np.int64) - 1, POSITION_BINS - 1)
