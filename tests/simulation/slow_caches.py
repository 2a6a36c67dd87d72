"""Caches of experts as one would write them down: one size at a time, sets, lists and searches."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from moescope.trace import Header, Layer, Part, Trace

Key = tuple[int, int]
"""A layer's place and an expert."""


@dataclass(frozen=True)
class Sequenced:
    """A sequence: its document and the experts of its tokens, ``[token][layer][choice]``."""

    document: int
    tokens: list[list[list[int]]]


class InMemory(Trace):
    """A trace without a disk."""

    def __init__(self, parts: Sequence[Part], layers: Sequence[Layer]) -> None:
        readable = tuple(self._Readable(part) for part in parts)
        self.__dict__.update(path=Path("memory"), header=Header(tuple(layers)), parts=readable, summary=None)

    @property
    def domains(self) -> tuple[str, ...]:
        return self.parts[0].part.domain_names

    class _Readable:
        def __init__(self, part: Part) -> None:
            self.path, self.part, self.num_tokens = Path("memory"), part, part.num_tokens

        def read(self, layers: object, *, tokens: bool) -> Part:
            return self.part

    def with_trace_domains(self, part: Part) -> Part:
        return part


def sequences_of(parts: Sequence[Part], layers: Sequence[Layer]) -> list[Sequenced]:
    """The sequences with their real experts."""
    found: list[Sequenced] = []
    for part in parts:
        for row in range(part.num_tokens):
            if part.position[row] == 0:
                found.append(Sequenced(int(part.document[row]), []))
            found[-1].tokens.append(
                [[e for e in part.expert_ids[a.layer][row].tolist() if 0 <= e < a.num_experts] for a in layers]
            )
    return found


@dataclass(frozen=True)
class Step:
    """Tokens served together: for each its sequence and place in it."""

    tokens: list[tuple[int, int]]
    fresh: bool


def steps_of(sequences: Sequence[Sequenced], batch: int, prefill: int | None, cold: bool) -> list[Step]:
    """The steps of a decoder, or of prefill."""
    steps = []
    if batch > 1:
        waiting = deque(range(len(sequences)))
        slots: list[list[int] | None] = [None] * batch
        while True:
            for at in range(batch):
                if slots[at] is None and waiting:
                    slots[at] = [waiting.popleft(), 0]
            if not any(slots):
                return steps
            steps.append(Step([(slot[0], slot[1]) for slot in slots if slot], False))
            for at, slot in enumerate(slots):
                if slot:
                    slot[1] += 1
                    if slot[1] == len(sequences[slot[0]].tokens):
                        slots[at] = None
    for q, sequence in enumerate(sequences):
        places = [(q, t) for t in range(len(sequence.tokens))]
        chunk = prefill or 1
        for start in range(0, len(places), chunk):
            steps.append(Step(places[start : start + chunk], cold and start == 0))
    return steps


def groups_of(
    sequences: Sequence[Sequenced], steps: Sequence[Step], places: Sequence[int]
) -> Iterator[tuple[list[tuple[Key, int]], bool, Step, bool]]:
    """For each step and layer the distinct experts, each with the first sequence that needs it; whether the cache is
    emptied before; the step; and whether it is the last layer of the step.
    """
    for step in steps:
        for place in places:
            group: dict[Key, int] = {}
            for q, t in step.tokens:
                for expert in sequences[q].tokens[t][place]:
                    group.setdefault((place, expert), q)
            yield list(group.items()), step.fresh and place == places[0], step, place == places[-1]


class Ranked:
    """Keeps what `value` ranks highest; of equals, what was used last, earlier choices later."""

    def __init__(self, policy: str, capacity: int, ageing: int) -> None:
        self.policy, self.capacity, self.ageing = policy, capacity, ageing
        self.cache: set[Key] = set()
        self.last: dict[Key, int] = {}
        self.uses: Counter[Key] = Counter()
        self.now = self.steps = 0

    def empty(self) -> None:
        self.cache.clear()
        self.uses.clear()

    def serve(self, group: list[Key], worth: dict[Key, int], last_layer: bool) -> list[bool]:
        hits = [key in self.cache for key in group]
        for key in reversed(group):
            self.now += 1
            self.last[key] = self.now
            self.uses[key] += 1

        def rank(key: Key) -> tuple[int, int]:
            value = {"lru": 0, "lfu": self.uses[key], "aged-lfu": self.uses[key]}.get(self.policy, worth.get(key, 0))
            return value, self.last[key]

        if len(group) >= self.capacity:
            self.cache = set(sorted(group, key=rank)[-self.capacity :])
        else:
            self.cache |= set(group)
            while len(self.cache) > self.capacity:
                self.cache.remove(min(self.cache - set(group), key=rank))
        if last_layer:
            self.steps += 1
            if self.policy == "aged-lfu" and self.steps % self.ageing == 0:
                self.uses = Counter({key: uses // 2 for key, uses in self.uses.items()})
        return hits


class S3Fifo:
    """Three queues; the right end is the head."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.share = max(1, capacity // 10)
        self.ghosts_kept = max(1, capacity - self.share)
        self.empty()

    def empty(self) -> None:
        self.small: deque[Key] = deque()
        self.main: deque[Key] = deque()
        self.ghosts: deque[Key] = deque()
        self.uses: dict[Key, int] = {}

    def serve(self, group: list[Key], worth: dict[Key, int], last_layer: bool) -> list[bool]:
        hits = [key in self.small or key in self.main for key in group]
        served = {key for key, hit in zip(group, hits, strict=True) if hit}
        for key in served:
            self.uses[key] = min(3, self.uses[key] + 1)
        for key, hit in zip(group, hits, strict=True):
            if hit or len(served) == self.capacity:
                continue
            while len(self.small) + len(self.main) >= self.capacity:
                self.make_room(served)
            if key in self.ghosts:
                self.ghosts.remove(key)
                self.main.append(key)
            else:
                self.small.append(key)
            self.uses[key] = 0
            served.add(key)
        return hits

    def make_room(self, served: set[Key]) -> None:
        small_can, main_can = set(self.small) - served, set(self.main) - served
        if not main_can or (small_can and len(self.small) >= self.share):
            key = self.small.popleft()
            if key in served:
                self.small.append(key)
            elif self.uses[key] > 1:
                self.uses[key] = 0
                self.main.append(key)
            else:
                self.ghosts.append(key)
                while len(self.ghosts) > self.ghosts_kept:
                    self.ghosts.popleft()
        else:
            key = self.main.popleft()
            if key in served:
                self.main.append(key)
            elif self.uses[key] > 0:
                self.uses[key] -= 1
                self.main.append(key)


def most_hits(groups: Sequence[frozenset[int]], capacity: int) -> int:
    """The most hits that any choice of evictions gives, by trying all of them."""
    best = {frozenset[int](): 0}
    for group in groups:
        following: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            scored = hits + len(held & group)
            others = held - group
            if len(group) >= capacity:
                choices = [frozenset(kept) for kept in combinations(sorted(group), capacity)]
            else:
                room = min(len(others), capacity - len(group))
                choices = [group | set(kept) for n in range(room + 1) for kept in combinations(sorted(others), n)]
            for choice in choices:
                following[choice] = max(following.get(choice, 0), scored)
        best = following
    return max(best.values())


def unit(loads: np.ndarray) -> np.ndarray:
    """Loads scaled to unit length, as the product rounds them."""
    length = max(1.0, np.sqrt((loads.astype(float) ** 2).sum()))  # 1 where all was dropped
    return np.rint(loads / length * 2**20).astype(np.int64)
