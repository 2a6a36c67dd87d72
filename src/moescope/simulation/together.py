"""Several jobs that each go through a trace, part by part, on one decoding of it a pass.

A job runs in a thread of its own on a view of the trace. What its n-th pass reads of a part is decoded once for the
n-th passes of all jobs and kept until the last of them has taken it. Memory is that of `WINDOW` parts: who is ahead
waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from moescope.trace import Layer, Part, PartFile, Trace

WINDOW = 4
"""Parts held, all their layers: two that are being simulated, and as many that a job is ahead."""


@dataclass(frozen=True)
class Job:
    """What goes through a trace.

    Attributes:
        call: Given the view of the trace.
        layers: Layers that each of its passes reads of a part; None for all.
        parts: Parts that it reads; None for all.
    """

    call: Callable[[Trace], Any]
    layers: frozenset[int] | None = None
    parts: frozenset[int] | None = None


def run_together(trace: Trace, jobs: Sequence[Job]) -> list[Any]:
    """What each job gave; they run at the same time, and each reads the parts in ascending order on every pass.

    Raises:
        Exception: What a job raised, the first of them; the others have come to their end.
    """
    if not jobs:
        return []
    shared = _Shared(trace, jobs)

    def run(number: int) -> Any:
        try:
            parts = tuple(_SharedPart(shared, number, index) for index in range(len(trace.parts)))
            return jobs[number].call(trace.with_parts(parts))
        finally:
            shared.leave(number)

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [done.result() for done in [pool.submit(run, number) for number in range(len(jobs))]]


class _Shared:
    """The parts that are held, by pass and index, and who has yet to take them."""

    def __init__(self, trace: Trace, jobs: Sequence[Job]) -> None:
        everything = frozenset(layer.layer for layer in trace.layers)
        self.trace, self.jobs = trace, jobs
        self._wanted = [everything if job.layers is None else job.layers for job in jobs]
        self._changed = threading.Condition()
        self._held: dict[tuple[int, int], Part | None] = {}  # None while it is decoded
        self._here = set(range(len(jobs)))
        self._taken: dict[tuple[int, int], set[int]] = {}
        self._pass_of: dict[tuple[int, int], int] = {}
        self._seen: dict[tuple[int, int], set[int]] = {}

    def take(self, number: int, index: int, layers: set[int]) -> Part:
        """A part for a job that reads some layers of it; layers that it reads again are those of its next pass."""
        with self._changed:
            place = number, index
            seen = self._seen.setdefault(place, set())
            if seen & layers:
                self._pass_of[place] = self._pass_of.get(place, 0) + 1
                seen.clear()
            seen |= layers
            key = self._pass_of.get(place, 0), index
            # Only who has taken all that is held waits, so whoever is waited for never does, and nobody waits for ever.
            self._changed.wait_for(lambda: key in self._held or len(self._held) < WINDOW or self._is_behind(number))
            mine = key not in self._held
            if mine:
                self._held[key] = None
        if mine:
            try:
                # A first pass learns and the later ones simulate, so predictions are looked at from the second on.
                part = self.trace.parts[index].read(
                    self.trace.layers, tokens=self.trace.header.phases, predictions=key[0] > 0
                )
            except BaseException:
                with self._changed:
                    del self._held[key]
                    self._changed.notify_all()
                raise
            with self._changed:
                self._held[key] = part
                self._changed.notify_all()
        with self._changed:
            self._changed.wait_for(lambda: key not in self._held or self._held[key] is not None)
            held = self._held.get(key)
            if seen >= self._wanted[number]:
                self._taken.setdefault(key, set()).add(number)
                self._release()
        return held if held is not None else self.trace.parts[index].read(self.trace.layers)

    def _is_behind(self, number: int) -> bool:
        """Whether something that is held waits for this job."""
        return any(number in self._waiting(key) for key in self._held)

    def _waiting(self, key: tuple[int, int]) -> set[int]:
        """The jobs that have yet to take what is held."""
        wanting = {n for n in self._here if (parts := self.jobs[n].parts) is None or key[1] in parts}
        return wanting - self._taken.get(key, set())

    def leave(self, number: int) -> None:
        """A job is over, and takes nothing more."""
        with self._changed:
            self._here.discard(number)
            self._release()

    def _release(self) -> None:
        for key in [key for key, part in self._held.items() if part is not None]:
            if not self._waiting(key):
                del self._held[key]
        self._changed.notify_all()


class _SharedPart(PartFile):
    """A part as one of the jobs sees it."""

    def __init__(self, shared: _Shared, job: int, index: int) -> None:
        file = shared.trace.parts[index]
        super().__init__(file.path, shared.trace.header, file.contents)
        self._shared, self._job, self._index, self._file = shared, job, index, file

    def read(
        self,
        layers: Iterable[Layer],
        *,
        weights: bool = False,
        tokens: bool = True,
        predictions: bool = False,
        choices: bool = True,
        scores: bool = False,
    ) -> Part:
        """The rows, as `PartFile.read` gives them."""
        layers = tuple(layers)
        if not layers or not choices or scores:
            return self._file.read(
                layers, weights=weights, tokens=tokens, predictions=predictions, choices=choices, scores=scores
            )
        numbers = {layer.layer for layer in layers}
        part = self._shared.take(self._job, self._index, numbers)
        if weights or (tokens and self._shared.trace.header.token_ids):
            beside = self._file.read(layers, weights=weights, tokens=tokens, choices=False)
        else:
            beside = part
        return replace(
            beside,
            expert_ids={number: part.expert_ids[number] for number in numbers},
            predictions={key: ids for key, ids in part.predictions.items() if predictions and key[0] in numbers},
        )
