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
    """Counts what is recorded and tells the caller."""

    def __init__(
        self, report: Callable[[Progress], None], tokens: int, characters: int, total_characters: int | None
    ) -> None:
        self._report = report
        self._tokens_before, self._tokens = tokens, tokens
        self._characters_before, self._characters = characters, float(characters)
        self._total = total_characters
        self._start = time.monotonic()

    def add(self, tokens: int, characters: float) -> None:
        """Count tokens that were recorded, and the characters they stand for."""
        self._tokens += tokens
        self._characters += characters
        seconds = max(time.monotonic() - self._start, 1e-9)
        fraction = seconds_left = None
        if self._total:
            fraction = min(1.0, self._characters / self._total)
            left = max(0.0, self._total - self._characters)
            seconds_left = seconds * left / (self._characters - self._characters_before)
        speed = (self._tokens - self._tokens_before) / seconds
        self._report(Progress(self._tokens, fraction, speed, seconds_left))


class WholeCorpusMeter:
    """Tells the caller how far an engine is that reads the whole corpus before it gives the first part.

    Args:
        report: Called with each progress.
        tokens: Tokens of the corpus.
    """

    def __init__(self, report: Callable[[Progress], None], tokens: int) -> None:
        self._report, self._tokens = report, tokens
        self._before, self._start = 0.0, time.monotonic()

    def start(self, before: float) -> None:
        """Begin, with the share of the work that an earlier call had done."""
        self._before, self._start = before, time.monotonic()

    def advance(self, done: float) -> None:
        """Note the share of the work that is done."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        speed = self._tokens * (done - self._before) / seconds
        tokens = self._tokens * done
        self._report(Progress(int(tokens), done, speed, (self._tokens - tokens) / max(speed, 1e-9)))
