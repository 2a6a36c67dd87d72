"""Which experts are chosen together: in the set of one token, and at one layer and the next.

The unit is the token. Counts are kept by random groups of documents (`document_groups`), as many as fit in 256 MB a
table: 32 for 8 experts, 17 for 256 experts and 60 layers, 8 for 512 (495 MB). One pass; nothing grows with tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.errors import NotRecorded
from moescope.tallying import joint_kernels as kernels
from moescope.tallying.document_groups import affordable_groups, document_groups
from moescope.tallying.one_pass import one_pass
from moescope.tallying.token_sample import token_hashes
from moescope.trace import Layer, Part, Trace

PATH_TOKENS = 2**19
"""Tokens, at most, of which the path through all layers is kept."""

Choice = Literal["first", "any"]


@dataclass(frozen=True)
class Coactivation:
    """Tokens by pairs of experts in their set; the counter and its result.

    Attributes:
        layers: Layers counted, all with at least two choices.
        pairs: For each layer the tokens by (group of documents, expert of the lower rank, of the higher rank), without
            tokens of which an assignment was dropped.
    """

    layers: tuple[Layer, ...]
    pairs: dict[int, NDArray[np.uint32]]

    @classmethod
    def empty(cls, layers: Sequence[Layer]) -> Coactivation:
        """Counts of nothing."""
        num_groups = affordable_groups(sum(layer.num_ids**2 for layer in layers))
        shape = {layer.layer: (num_groups, layer.num_ids, layer.num_ids) for layer in layers}
        return cls(tuple(layers), {number: np.zeros(size, np.uint32) for number, size in shape.items()})

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count the layers of `group` in a part."""
        starts_D, group_D = _groups(part, self.pairs)
        for layer in group:
            if layer.layer not in self.pairs:
                continue
            ids_KT = part.expert_ids[layer.layer].T
            few = layer.top_k == 2 and layer.num_ids <= 16 and ids_KT.dtype.kind == "u"
            count = kernels.count_set_pairs_of_two if few else kernels.count_set_pairs
            count(ids_KT, starts_D, group_D, self.pairs[layer.layer])

    def merge(self, other: Coactivation) -> None:
        """Add the counts of other documents, in place."""
        for layer, pairs in self.pairs.items():
            pairs += other.pairs[layer]


@dataclass
class Transitions:
    """Tokens by expert at one layer and at the next, and a sample of paths; the counter and its result.

    Attributes:
        layers: Layers counted.
        choice: "first": the first choices; "any": all pairs of an assignment here and one there.
        moves: For each layer but the first the pairs by (group of documents, expert at the layer before, expert).
        tokens: Tokens of the trace.
        hashes: Hashes of the tokens whose paths are kept: the smallest ones. Empty for the choice "any".
        paths: Hash of the sequence of first choices of each over all layers.
    """

    layers: tuple[Layer, ...]
    choice: Choice
    moves: dict[int, NDArray[np.uint32]]
    tokens: int = 0
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    paths: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    _limit: int = 2**64 - 1
    _rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    _fresh: tuple[NDArray[np.uint64], NDArray[np.uint64]] | None = None
    _waiting: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]] = field(default_factory=list)

    @classmethod
    def empty(cls, layers: Sequence[Layer], choice: Choice = "first") -> Transitions:
        """Counts of nothing."""
        before = dict(zip([layer.layer for layer in layers[1:]], layers, strict=False))
        num_groups = affordable_groups(sum(before[layer.layer].num_ids * layer.num_ids for layer in layers[1:]))
        moves = {
            layer.layer: np.zeros((num_groups, before[layer.layer].num_ids, layer.num_ids), np.uint32)
            for layer in layers[1:]
        }
        return cls(tuple(layers), choice, moves)

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count the layers of `group` in a part, each with the layer before it."""
        starts_D, group_D = _groups(part, self.moves)
        used = slice(None) if self.choice == "any" else slice(1)
        numbers = [layer.layer for layer in self.layers]
        if group[0].layer == numbers[0]:
            self.tokens += part.num_tokens
            if self.choice == "first":
                self._begin_paths(part, starts_D)
        for layer in group:
            after_KT = part.expert_ids[layer.layer].T[used]
            if self._fresh is not None:
                kernels.extend_paths(self._fresh[1], self._rows, part.expert_ids[layer.layer].T[0])
            if layer.layer == numbers[0]:
                continue
            before_KT = part.expert_ids[numbers[numbers.index(layer.layer) - 1]].T[used]
            table = self.moves[layer.layer]
            few = max(table.shape[1:]) <= 16 and before_KT.dtype.kind == after_KT.dtype.kind == "u"
            count = kernels.count_moves_of_few if few else kernels.count_moves
            count(before_KT, after_KT, starts_D, group_D, table)
        if group[-1].layer == numbers[-1] and self._fresh is not None:
            self._waiting.append(self._fresh)
            self._fresh = None
            if sum(len(hashes) for hashes, _ in self._waiting) > PATH_TOKENS:
                self._settle()

    def merge(self, other: Transitions) -> None:
        """Add the counts of other documents, in place."""
        for layer, moves in self.moves.items():
            moves += other.moves[layer]
        self.tokens += other.tokens
        other._settle()
        self._waiting.append((other.hashes, other.paths))
        self._settle()

    def _begin_paths(self, part: Part, starts_D: NDArray[np.int64]) -> None:
        offset = np.arange(part.num_tokens) - np.repeat(starts_D[:-1], np.diff(starts_D))
        hashes = token_hashes(part.document, offset)
        self._rows = np.flatnonzero(hashes <= np.uint64(self._limit))
        self._fresh = hashes[self._rows], np.zeros(len(self._rows), np.uint64)

    def _settle(self) -> None:
        """Keep the tokens with the smallest hashes of those kept and those waiting."""
        hashes, paths = (np.concatenate(both) for both in zip((self.hashes, self.paths), *self._waiting, strict=True))
        self._waiting.clear()
        if len(hashes) > PATH_TOKENS:
            kept = np.argpartition(hashes, PATH_TOKENS - 1)[:PATH_TOKENS]
            hashes, paths = hashes[kept], paths[kept]
            self._limit = int(hashes.max())
        self.hashes, self.paths = hashes, paths


def count_coactivation(
    trace: Trace, layers: Iterable[int] | None = None, *, threads: int | None = None
) -> Coactivation:
    """Count the tokens by pairs of experts in their set, in one pass.

    Args:
        trace: The trace.
        layers: Layers to count, or None for all; those with one choice a token have no pairs and are left out.
        threads: Parts counted at a time; None for the number of processors.
    Raises:
        NoSuchLayer: A layer was not recorded.
        NotRecorded: The trace holds counts only, or no layer asked for has two choices a token.
        TraceDamaged: A page fails its checksum.
    """
    chosen = [layer for layer in trace.select_layers(layers) if layer.top_k > 1]
    trace.need_tokens()
    if not chosen:
        raise NotRecorded(trace.path, "has one expert a token in these layers, so none is chosen beside another")
    (total,) = one_pass(trace, chosen, lambda: [Coactivation.empty(chosen)], threads=threads)
    return total


def count_transitions(
    trace: Trace, layers: Iterable[int] | None = None, *, choice: Choice = "first", threads: int | None = None
) -> Transitions:
    """Count the tokens by expert at one recorded layer and at the next, in one pass.

    Args:
        trace: The trace.
        layers: Layers to count, or None for all; each is paired with the one before it among them.
        choice: "first", the first choices; "any", all pairs of an assignment here and one there.
        threads: Parts counted at a time; None for the number of processors.
    Raises:
        NoSuchLayer: A layer was not recorded.
        NotRecorded: The trace holds counts only, has fewer than two of the layers, or does not say which choice is the
            first and `choice` asks for it.
        TraceDamaged: A page fails its checksum.
    """
    chosen = trace.select_layers(layers)
    trace.need_tokens()
    need_order(trace, chosen, choice)
    (total,) = one_pass(trace, chosen, lambda: [Transitions.empty(chosen, choice)], threads=threads)
    return total


def need_order(trace: Trace, layers: Sequence[Layer], choice: Choice) -> None:
    """Refuse layers between which there is no transition of that choice.

    Raises:
        NotRecorded: There are fewer than two, or nobody knows which choice is the first.
    """
    if len(layers) < 2:
        raise NotRecorded(trace.path, "transitions need two layers, found one", "ask for more with --layers")
    if choice == "first" and not all(layer.ranked for layer in layers):
        hint = "ask for all assignments instead: --choice any"
        raise NotRecorded(trace.path, "does not say which of a token's choices is the first", hint)


def _groups(part: Part, tables: dict[int, NDArray[np.uint32]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First row of each document, and its group."""
    starts = part.document_starts()
    num_groups = next(iter(tables.values())).shape[0]
    return starts, document_groups(part.document[starts[:-1]], num_groups)
