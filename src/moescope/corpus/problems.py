"""The records that could not be read: counted, the first few reported, or, if strict, the first one raised."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from moescope.errors import CorpusMalformed

REPORTED = 5
"""Problems reported individually, enough to see their kind; the others are only counted."""


@dataclass
class Problems:
    """What could not be read in the latest pass over a corpus.

    Each problem causes one warning, however often the corpus is read.

    Attributes:
        strict: Raise the first problem.
        count: Records left out; of the whole corpus once a pass is complete.
        first: The first few, such as ``val.jsonl, line 3: field 'text' is missing``.
    """

    strict: bool = False
    count: int = 0
    first: list[str] = field(default_factory=list)
    _warned: int = field(default=0, repr=False)
    _noted: set[str] = field(default_factory=set, repr=False)

    def begin(self) -> None:
        """Count from zero: a new pass begins."""
        self.count = 0
        self.first.clear()

    def report(self, place: str, problem: str) -> None:
        """Register a record that is left out, with its file and line and what is wrong there.

        Raises:
            CorpusMalformed: The corpus is read strictly.
        """
        if self.strict:
            raise CorpusMalformed(place, problem, "without --strict this record is left out and counted")
        self.count += 1
        if self.count <= REPORTED:
            self.first.append(f"{place}: {problem}")
            self._warn(self.count, f"{self.first[-1]}; left out")

    def end(self) -> None:
        """Report the total: the pass has reached the end of the corpus."""
        if self.count > REPORTED:
            self._warn(self.count, f"{self.count - REPORTED} more records could not be read; left out")

    def note(self, message: str) -> None:
        """Warn of something about the corpus, once, however often it is read."""
        if message not in self._noted:
            self._noted.add(message)
            warnings.warn(message, stacklevel=2)

    def _warn(self, number: int, message: str) -> None:
        if number > self._warned:
            self._warned = number
            warnings.warn(message, stacklevel=2)
