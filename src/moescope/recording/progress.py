"""How far a recording is, reported to the caller after every forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a recording is.

    Attributes:
        tokens: Tokens recorded, those of a resumed trace included.
        fraction: Share of the corpus's text that is recorded, 0 to 1; None if the documents can be read only once.
        tokens_per_second: Speed of this call.
        seconds_left: Time to the end at this speed; None if it cannot be known.
    """

    tokens: int
    fraction: float | None
    tokens_per_second: float
    seconds_left: float | None


class Meter:
    """Reports how far a recording is.

    Args:
        report: Called with each progress.
        tokens: Tokens that an earlier call has recorded.
        done: How much of the text it has recorded, in the unit of `total`.
        total: All of the text; None if it cannot be known.
    """

    def __init__(self, report: Callable[[Progress], None], tokens: float, done: float, total: float | None) -> None:
        self._report, self._total = report, total
        self._tokens_before, self._done_before = self._tokens, self._done = tokens, done
        self._start = time.monotonic()

    def add(self, tokens: int, done: float) -> None:
        """Count tokens that were recorded, and the text they stand for."""
        self.reach(self._tokens + tokens, self._done + done)

    def reach(self, tokens: float, done: float) -> None:
        """Note what is recorded in all."""
        self._tokens, self._done = tokens, done
        seconds = max(time.monotonic() - self._start, 1e-9)
        fraction = seconds_left = None
        if self._total:
            fraction = min(1.0, done / self._total)
            seconds_left = seconds * max(0.0, self._total - done) / max(done - self._done_before, 1e-9)
        self._report(Progress(int(tokens), fraction, (tokens - self._tokens_before) / seconds, seconds_left))
