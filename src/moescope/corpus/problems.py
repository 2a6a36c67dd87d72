"""The records that could not be read: counted, the first few told of, or, if strict, the first one raised."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from moescope.errors import CorpusMalformed

TOLD = 5
"""Problems told of one by one; the others are only counted."""


@dataclass
class Problems:
    """What could not be read in the latest pass over a corpus.

    Each problem is warned of once, however often the corpus is read.

    Attributes:
        strict: Raise the first problem.
        count: Records left out, in the whole corpus once a pass is through.
        first: The first few, such as ``val.jsonl, line 3: field 'text' is missing``.
    """

    strict: bool = False
    count: int = 0
    first: list[str] = field(default_factory=list)
    _warned: int = field(default=0, repr=False)

    def begin(self) -> None:
        """Count from zero: a new pass begins."""
        self.count = 0
        self.first.clear()

    def report(self, place: str, problem: str) -> None:
        """Take note of a record that is left out.

        Args:
            place: The file and the line in it.
            problem: What is wrong there.
        Raises:
            CorpusMalformed: The corpus is read strictly.
        """
        if self.strict:
            raise CorpusMalformed(place, problem, "without strict reading this record is left out and counted")
        self.count += 1
        if self.count <= TOLD:
            self.first.append(f"{place}: {problem}")
            self._warn(self.count, f"{self.first[-1]}; left out")

    def end(self) -> None:
        """Sum up: the pass has reached the end of the corpus."""
        if self.count > TOLD:
            self._warn(self.count, f"{self.count - TOLD} more records could not be read; left out")

    def _warn(self, number: int, message: str) -> None:
        if number > self._warned:
            self._warned = number
            warnings.warn(message, stacklevel=2)
