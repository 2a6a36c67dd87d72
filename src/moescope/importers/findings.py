"""What was odd about a recording: imported, said on stderr, and kept in the trace for whoever reads it later."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from moescope.errors import ImportIncomplete

TOLD = 50
"""Findings told one by one; a file that has more has one cause, and is told so."""


@dataclass
class Findings:
    """Warnings, each once, in the order found."""

    _messages: dict[str, None] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _untold: int = 0

    def warn(self, message: str) -> None:
        """Take note of something odd; the same words again change nothing."""
        if message in self._messages:
            return
        if len(self._messages) >= TOLD:
            self._untold += 1
            return
        self._messages[message] = None

    def count(self, what: str, number: int = 1) -> None:
        """Add to a number that is told once, at the end, as ``number what``."""
        if number:
            self._counts[what] = self._counts.get(what, 0) + number

    def messages(self) -> list[str]:
        """All of it, for the summary of the trace."""
        more = [f"{self._untold:,} more warnings like these"] if self._untold else []
        return [*self._messages, *more, *(f"{number:,} {what}" for what, number in self._counts.items())]

    def tell(self) -> None:
        """Warn of all of it."""
        for message in self.messages():
            warnings.warn(message, stacklevel=3)


@dataclass(frozen=True)
class Options:
    """What a user says that a file does not.

    Attributes:
        num_experts: Routed experts of a layer.
        top_k: Experts chosen a token.
        num_layers: Layers of the model, dense ones included.
        layers: Layers with routed experts, counted over the whole model.
        domain: Label of all documents.
        model: Name of the model.
        ranked: Whether choices stand in order of gate weight although no weights say so.
        fields: Columns by the name of what they hold, for files with named columns.
    """

    num_experts: int | None = None
    top_k: int | None = None
    num_layers: int | None = None
    layers: tuple[int, ...] | None = None
    domain: str | None = None
    model: str | None = None
    ranked: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)

    def need_top_k(self, place: object) -> int:
        """The ``top_k`` given.

        Raises:
            ImportIncomplete: It was not.
        """
        if self.top_k is None:
            raise ImportIncomplete(place, "does not say how many experts a token has", "--top-k K says it")
        return self.top_k

    def need_num_layers(self, place: object) -> int:
        """The ``num_layers`` given.

        Raises:
            ImportIncomplete: It was not.
        """
        if self.num_layers is None:
            raise ImportIncomplete(
                place, "does not say how many layers the model has", "--num-layers N says it, dense layers included"
            )
        return self.num_layers
