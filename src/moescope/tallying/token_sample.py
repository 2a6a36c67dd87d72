"""A sample of tokens with all their choices, for what sums over experts cannot tell: how often two sets would meet.

Of each group of tokens those with the smallest hash of (document, place in it) are kept, so the sample depends neither
on the order of the parts nor on threads, and samples merge exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace import Part

NO_HASH = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class HashSample:
    """Tokens, or other things, kept by group (a domain, a fold of documents).

    A part is sampled in three steps: `begin` chooses, `take` says what each layer holds of the chosen, `settle` keeps
    those that are still among the smallest.

    Attributes:
        hashes: Hash of each kept thing, ascending; the largest 64-bit number where there is none, shape (group, thing).
        rows: By layer what was recorded of each, shape (group, thing, value); -1 where there is none.
    """

    hashes: NDArray[np.uint64]
    rows: dict[int, NDArray[np.int32]]
    _chosen: list[tuple[int, NDArray[np.int64], NDArray[np.uint64]]] = field(default_factory=list)
    _fresh: dict[int, list[NDArray[Any]]] = field(default_factory=dict)

    @classmethod
    def empty(cls, num_groups: int, size: int, widths: Mapping[int, int]) -> HashSample:
        """A sample of nothing, of `size` things a group; a row of each layer has the length in `widths`."""
        rows = {layer: np.full((num_groups, size, width), -1, np.int32) for layer, width in widths.items()}
        return cls(np.full((num_groups, size), NO_HASH), rows)

    def kept(self, group: int, layer: int) -> NDArray[np.int32]:
        """What is kept of a group at a layer, shape (thing, value)."""
        known: NDArray[np.bool_] = self.hashes[group] != NO_HASH
        rows: NDArray[np.int32] = self.rows[layer][group, known]
        return rows

    def begin(self, hash_T: NDArray[np.uint64], group_T: NDArray[np.integer[Any]]) -> None:
        """Choose what may be kept of the things with these hashes, each of a group."""
        self._chosen.clear()
        self._fresh.clear()
        for group in np.unique(group_T).tolist():
            near = np.flatnonzero((group_T == group) & (hash_T < self.hashes[group, -1]))
            near = near[np.argsort(hash_T[near], kind="stable")[: self.hashes.shape[1]]]
            self._chosen.append((group, near, hash_T[near]))

    def take(self, layer: int, rows_of: Callable[[NDArray[np.int64]], NDArray[Any]]) -> None:
        """Take what a layer holds of the chosen things, given their places, shape (thing, value)."""
        self._fresh[layer] = [rows_of(places) for _, places, _ in self._chosen]

    def settle(self) -> None:
        """Keep those of the chosen that have the smallest hashes, once all layers have been taken."""
        for number, (group, _, hashes) in enumerate(self._chosen):
            self._absorb(group, hashes, {layer: fresh[number] for layer, fresh in self._fresh.items()})

    def merge(self, other: HashSample) -> None:
        """Add another sample of the same groups and layers, in place."""
        for group in range(len(self.hashes)):
            self._absorb(group, other.hashes[group], {layer: rows[group] for layer, rows in other.rows.items()})

    def spread(self, place_G: NDArray[np.int64], num_groups: int) -> HashSample:
        """The same over more groups."""
        size = self.hashes.shape[1]
        wide = HashSample.empty(num_groups, size, {layer: rows.shape[2] for layer, rows in self.rows.items()})
        wide.hashes[place_G] = self.hashes
        for layer, rows in self.rows.items():
            wide.rows[layer][place_G] = rows
        return wide

    def _absorb(self, group: int, hashes: NDArray[np.uint64], rows: Mapping[int, NDArray[Any]]) -> None:
        if not len(hashes) or hashes[0] >= self.hashes[group, -1]:  # both ascend
            return
        both = np.concatenate([self.hashes[group], hashes])
        smallest = np.argsort(both, kind="stable")[: self.hashes.shape[1]]
        self.hashes[group] = both[smallest]
        for layer, mine in self.rows.items():
            mine[group] = np.concatenate([mine[group], rows[layer]])[smallest]


def token_hashes(document: NDArray[np.integer[Any]], offset: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A hash of (document, offset within it): the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (document.astype(np.uint64) << np.uint64(32)) | offset.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def part_hashes(part: Part) -> NDArray[np.uint64]:
    """The hash of each token of a part."""
    starts = part.document_starts()
    return token_hashes(part.document, np.arange(part.num_tokens) - np.repeat(starts[:-1], np.diff(starts)))
