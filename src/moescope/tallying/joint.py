"""Which experts are chosen together: in the set of one token, and at one layer and the next.

The unit is the token. Counts are kept by random groups of documents (`document_groups`), as many as fit in 256 MB a
table: 32 for 8 experts, 17 for 256 experts and 60 layers, 8 for 512 (495 MB). One pass; nothing grows with tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from moescope.errors import NotRecorded
from moescope.tallying import joint_kernels as kernels
from moescope.tallying.counter import WIDENING, Array, Counter, CountOptions, Facts, Places, Result
from moescope.tallying.document_groups import affordable_groups, document_groups
from moescope.tallying.token_sample import part_hashes
from moescope.trace import Layer, Part, Trace

PATH_TOKENS = 2**19
"""Tokens, at most, of which the path through all layers is kept."""

Choice = Literal["first", "all"]

_NONE = np.zeros(0, np.uint64)


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
    def declared(cls, layers: Sequence[Layer], domains: Sequence[str], facts: Facts) -> dict[str, Array]:
        """The table of each layer."""
        num_groups = affordable_groups(sum(layer.num_ids**2 for layer in layers if layer.top_k > 1))
        axes = "documents", "lower", "higher"
        return {
            f"pairs/{a.layer}": Array(axes, (num_groups, a.num_ids, a.num_ids), WIDENING) for a in layers if a.top_k > 1
        }

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(layer for layer in self.layers if layer.top_k > 1))


@dataclass(frozen=True)
class CoactivationCounter(Counter[Coactivation]):
    """The counter that fills `Coactivation`."""

    name, result_type = "coactivation", Coactivation

    counts: Coactivation

    @classmethod
    def need(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> None:
        """Refuse a trace of which no layer has two choices a token."""
        trace.need_tokens()
        if all(layer.top_k < 2 for layer in layers):
            raise NotRecorded(trace.path, "has one expert a token in these layers, so none is chosen beside another")

    @classmethod
    def prepare(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> Callable[[], Self]:
        """What makes empty counters, of the layers with two choices."""
        return lambda: cls(Coactivation.empty(layers))

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count the layers of `group` in a part."""
        pairs = self.counts.pairs
        starts_D, group_D = _groups(part, pairs)
        for layer in group:
            if layer.layer not in pairs:
                continue
            ids_KT = part.expert_ids[layer.layer].T
            if layer.top_k == 2 and layer.num_ids <= 16 and ids_KT.dtype.kind == "u":
                kernels.count_moves_of_few(ids_KT[:1], ids_KT[1:], starts_D, group_D, pairs[layer.layer])
            else:
                kernels.count_set_pairs(ids_KT, starts_D, group_D, pairs[layer.layer])


@dataclass(frozen=True)
class Transitions(Result):
    """Tokens by expert at one layer and at the next, and a sample of paths.

    Attributes:
        layers: Layers counted.
        choice: "first": the first choices; "all": all pairs of an assignment here and one there.
        moves: For each layer but the first the pairs by (group of documents, expert at the layer before, expert).
        hashes: Hashes of the tokens whose paths are kept, ascending: the smallest ones. Empty for the choice "all".
        paths: A hash of the first choices of each at all layers.
    """

    layers: tuple[Layer, ...]
    choice: Choice
    moves: dict[int, NDArray[np.uint32]]
    hashes: NDArray[np.uint64] = field(default_factory=_NONE.copy)
    paths: NDArray[np.uint64] = field(default_factory=_NONE.copy)

    facts = ("choice",)

    @classmethod
    def declared(cls, layers: Sequence[Layer], domains: Sequence[str], facts: Facts) -> dict[str, Array]:
        """The table of each layer but the first, and the sample of paths."""
        if facts["choice"] not in ("first", "all"):
            raise ValueError(f"choice is {facts['choice']!r}, expected 'first' or 'all'")
        steps = list(pairwise(layers))
        num_groups = affordable_groups(sum(before.num_ids * layer.num_ids for before, layer in steps))
        axes = "documents", "before", "expert"
        path = Array(("path",), (None,), (np.uint64,))
        return {
            **{f"moves/{b.layer}": Array(axes, (num_groups, a.num_ids, b.num_ids), WIDENING) for a, b in steps},
            "hashes": path,
            "paths": path,
        }

    def added(self, other: Self, domains: Sequence[str], places: Mapping[str, Places]) -> Self:
        """The counts of both, and of their paths those with the smallest hashes."""
        hashes, paths = _smallest([(self.hashes, self.paths), (other.hashes, other.paths)])
        bare, none = (replace(a, hashes=_NONE, paths=_NONE) for a in (self, other))
        return replace(super(Transitions, bare).added(none, domains, places), hashes=hashes, paths=paths)


@dataclass
class TransitionCounter(Counter[Transitions]):
    """The counter that fills `Transitions`."""

    name, result_type = "transitions", Transitions

    counts: Transitions
    _limit: int = 2**64 - 1
    _rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    _kept: tuple[NDArray[np.uint64], NDArray[np.uint64]] = (_NONE, _NONE)
    _fresh: tuple[NDArray[np.uint64], NDArray[np.uint64]] | None = None
    _waiting: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]] = field(default_factory=list)

    @classmethod
    def need(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> None:
        """Refuse layers between which there is no transition of that choice."""
        trace.need_tokens()
        if len(layers) < 2:
            raise NotRecorded(trace.path, "transitions need two layers, found one", "ask for more with --layers")
        if options.choice == "first" and not all(layer.ranked for layer in layers):
            hint = "ask for all assignments instead: --choice all"
            raise NotRecorded(trace.path, "does not say which of a token's choices is the first", hint)

    @classmethod
    def prepare(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> Callable[[], Self]:
        """What makes empty counters, of the first choices where they are known unless all are asked for."""
        first = options.choice != "all" and all(layer.ranked for layer in layers)
        return lambda: cls(Transitions.empty(layers, choice="first" if first else "all"))

    def result(self) -> Transitions:
        """What was counted."""
        self._settle()
        hashes, paths = _smallest([self._kept])
        return replace(self.counts, hashes=hashes, paths=paths)

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count the layers of `group` in a part, each with the layer before it."""
        starts_D, group_D = _groups(part, self.counts.moves)
        used = slice(None) if self.counts.choice == "all" else slice(1)
        numbers = [layer.layer for layer in self.counts.layers]
        if group[0].layer == numbers[0] and self.counts.choice == "first":
            hashes = part_hashes(part)
            self._rows = np.flatnonzero(hashes <= np.uint64(self._limit))
            self._fresh = hashes[self._rows], np.zeros(len(self._rows), np.uint64)
        for layer in group:
            after_KT = part.expert_ids[layer.layer].T[used]
            if self._fresh is not None:
                kernels.extend_paths(self._fresh[1], self._rows, part.expert_ids[layer.layer].T[0])
            if layer.layer == numbers[0]:
                continue
            before_KT = part.expert_ids[numbers[numbers.index(layer.layer) - 1]].T[used]
            table = self.counts.moves[layer.layer]
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
        self.counts.merge(other.counts)
        other._settle()
        self._waiting.append(other._kept)
        self._settle()

    def _settle(self) -> None:
        """Keep the tokens with the smallest hashes of those kept and those waiting."""
        hashes, paths = (np.concatenate(both) for both in zip(self._kept, *self._waiting, strict=True))
        self._waiting.clear()
        if len(hashes) > PATH_TOKENS:
            kept = np.argpartition(hashes, PATH_TOKENS - 1)[:PATH_TOKENS]
            hashes, paths = hashes[kept], paths[kept]
            self._limit = int(hashes.max())
        self._kept = hashes, paths


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
