"""Which experts are chosen together: in the set of one token, and at one layer and the next.

The unit is the token. Counts are kept by random groups of documents (`document_groups`), as many as fit in 256 MB a
table: 32 for 8 experts, 17 for 256 experts and 60 layers, 8 for 512 (495 MB). One pass; nothing grows with tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from moescope.errors import NotRecorded
from moescope.tallying import joint_kernels as kernels
from moescope.tallying.counter import Counter, Options, Result, Stored, added_counts
from moescope.tallying.document_groups import affordable_groups, document_groups
from moescope.tallying.token_sample import token_hashes
from moescope.trace import Layer, Part, Trace

PATH_TOKENS = 2**19
"""Tokens, at most, of which the path through all layers is kept."""

Choice = Literal["first", "all"]

_WIDTHS = [np.uint32, np.uint64]


@dataclass(frozen=True)
class Coactivation(Result):
    """Tokens by pairs of experts in their set.

    Attributes:
        layers: Layers counted, all with at least two choices.
        pairs: For each layer the tokens by (group of documents, expert of the lower rank, of the higher rank), without
            tokens of which an assignment was dropped.
    """

    layers: tuple[Layer, ...]
    pairs: dict[int, NDArray[np.uint32]]

    @classmethod
    def empty(cls, layers: Sequence[Layer]) -> Self:
        """Counts of nothing."""
        return cls(tuple(layers), {number: np.zeros(shape, np.uint32) for number, shape in cls._shapes(layers).items()})

    @staticmethod
    def _shapes(layers: Sequence[Layer]) -> dict[int, tuple[int, int, int]]:
        num_groups = affordable_groups(sum(layer.num_ids**2 for layer in layers))
        return {layer.layer: (num_groups, layer.num_ids, layer.num_ids) for layer in layers}

    def __add__(self, other: Coactivation) -> Coactivation:
        """The counts of both."""
        if self.layers != other.layers:
            raise ValueError("co-activations of different layers cannot be added")
        return Coactivation(
            self.layers, {layer: added_counts(pairs, other.pairs[layer]) for layer, pairs in self.pairs.items()}
        )

    def stored(self) -> dict[str, NDArray[Any]]:
        """The pairs of each layer as ``pairs/LAYER``."""
        return {f"pairs/{layer}": pairs for layer, pairs in self.pairs.items()}

    @classmethod
    def restored(cls, stored: Stored) -> Self:
        """The counts of the arrays of `stored`."""
        layers = [layer for layer in stored.layers if layer.top_k > 1]
        shapes = cls._shapes(layers)
        return cls(
            tuple(layers),
            {number: stored.take(f"pairs/{number}", _WIDTHS, shape) for number, shape in shapes.items()},
        )


@dataclass(frozen=True)
class CoactivationCounter(Counter[Coactivation]):
    """The counter that fills `Coactivation`."""

    name, result_type = "coactivation", Coactivation

    counts: Coactivation

    @classmethod
    def need(cls, trace: Trace, layers: Sequence[Layer], options: Options) -> None:
        """Refuse a trace of which no layer has two choices a token."""
        trace.need_tokens()
        if all(layer.top_k < 2 for layer in layers):
            raise NotRecorded(trace.path, "has one expert a token in these layers, so none is chosen beside another")

    @classmethod
    def prepare(cls, trace: Trace, layers: Sequence[Layer], options: Options) -> Callable[[], Self]:
        """What makes empty counters, of the layers with two choices."""
        return lambda: cls(Coactivation.empty([layer for layer in layers if layer.top_k > 1]))

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count the layers of `group` in a part."""
        pairs = self.counts.pairs
        starts_D, group_D = _groups(part, pairs)
        for layer in group:
            if layer.layer not in pairs:
                continue
            ids_KT = part.expert_ids[layer.layer].T
            few = layer.top_k == 2 and layer.num_ids <= 16 and ids_KT.dtype.kind == "u"
            count = kernels.count_set_pairs_of_two if few else kernels.count_set_pairs
            count(ids_KT, starts_D, group_D, pairs[layer.layer])

    def merge(self, other: Self) -> None:
        """Add the counts of other documents, in place."""
        for layer, pairs in self.counts.pairs.items():
            pairs += other.counts.pairs[layer]

    def result(self) -> Coactivation:
        """What was counted."""
        return self.counts


@dataclass(frozen=True)
class Transitions(Result):
    """Tokens by expert at one layer and at the next, and a sample of paths.

    Attributes:
        layers: Layers counted.
        choice: "first": the first choices; "all": all pairs of an assignment here and one there.
        moves: For each layer but the first the pairs by (group of documents, expert at the layer before, expert).
        tokens: Tokens of the trace.
        hashes: Hashes of the tokens whose paths are kept, ascending: the smallest ones. Empty for the choice "all".
        paths: A hash of the first choices of each at all layers.
    """

    layers: tuple[Layer, ...]
    choice: Choice
    moves: dict[int, NDArray[np.uint32]]
    tokens: int = 0
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    paths: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))

    @staticmethod
    def _shapes(layers: Sequence[Layer]) -> dict[int, tuple[int, int, int]]:
        steps = list(pairwise(layers))
        num_groups = affordable_groups(sum(before.num_ids * layer.num_ids for before, layer in steps))
        return {layer.layer: (num_groups, before.num_ids, layer.num_ids) for before, layer in steps}

    def __add__(self, other: Transitions) -> Transitions:
        """The counts of both."""
        for name in ("layers", "choice"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"transitions of different {name} cannot be added")
        moves = {layer: added_counts(mine, other.moves[layer]) for layer, mine in self.moves.items()}
        paths = _smallest([(self.hashes, self.paths), (other.hashes, other.paths)])
        return Transitions(self.layers, self.choice, moves, self.tokens + other.tokens, *paths)

    def stored(self) -> dict[str, NDArray[Any]]:
        """The moves to each layer as ``moves/LAYER``, and the sample."""
        return {
            **{f"moves/{layer}": moves for layer, moves in self.moves.items()},
            "first": np.array([self.choice == "first"], np.int64),
            "tokens": np.array([self.tokens], np.int64),
            "hashes": self.hashes,
            "paths": self.paths,
        }

    @classmethod
    def restored(cls, stored: Stored) -> Self:
        """The counts of the arrays of `stored`."""
        hashes = stored.take("hashes", np.uint64, (None,))
        return cls(
            stored.layers,
            "first" if stored.number("first", most=1) else "all",
            {
                number: stored.take(f"moves/{number}", _WIDTHS, shape)
                for number, shape in cls._shapes(stored.layers).items()
            },
            stored.number("tokens"),
            hashes,
            stored.take("paths", np.uint64, hashes.shape),
        )


@dataclass
class TransitionCounter(Counter[Transitions]):
    """The counter that fills `Transitions`."""

    name, result_type = "transitions", Transitions

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
    def need(cls, trace: Trace, layers: Sequence[Layer], options: Options) -> None:
        """Refuse layers between which there is no transition of that choice."""
        trace.need_tokens()
        if len(layers) < 2:
            raise NotRecorded(trace.path, "transitions need two layers, found one", "ask for more with --layers")
        if options.choice == "first" and not all(layer.ranked for layer in layers):
            hint = "ask for all assignments instead: --choice all"
            raise NotRecorded(trace.path, "does not say which of a token's choices is the first", hint)

    @classmethod
    def prepare(cls, trace: Trace, layers: Sequence[Layer], options: Options) -> Callable[[], Self]:
        """What makes empty counters, of the first choices where they are known unless all are asked for."""
        first = options.choice != "all" and all(layer.ranked for layer in layers)
        return lambda: cls(
            tuple(layers),
            "first" if first else "all",
            {number: np.zeros(shape, np.uint32) for number, shape in Transitions._shapes(layers).items()},
        )

    def result(self) -> Transitions:
        """What was counted."""
        self._settle()
        paths = _smallest([(self.hashes, self.paths)])
        return Transitions(self.layers, self.choice, self.moves, self.tokens, *paths)

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count the layers of `group` in a part, each with the layer before it."""
        starts_D, group_D = _groups(part, self.moves)
        used = slice(None) if self.choice == "all" else slice(1)
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

    def merge(self, other: Self) -> None:
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


def _smallest(samples: Sequence[tuple[NDArray[np.uint64], NDArray[np.uint64]]]) -> tuple[NDArray[np.uint64], ...]:
    """The tokens of all samples that have the smallest hashes, ascending: their hashes and paths."""
    hashes, paths = (np.concatenate(columns) for columns in zip(*samples, strict=True))
    kept = np.argsort(hashes, kind="stable")[:PATH_TOKENS]
    return hashes[kept], paths[kept]


def _groups(part: Part, tables: dict[int, NDArray[np.uint32]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First row of each document, and its group."""
    starts = part.document_starts()
    num_groups = next(iter(tables.values())).shape[0]
    return starts, document_groups(part.document[starts[:-1]], num_groups)
