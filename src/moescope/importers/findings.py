"""What was unusual in a recording: imported, reported on stderr, and stored in the trace for later readers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from moescope.errors import ImportIncomplete
from moescope.trace.header import ranges

REPORTED = 50
"""Warnings reported individually; more than this have a common cause, and are only counted."""


@dataclass
class Findings:
    """Warnings, each once, in order of occurrence."""

    _messages: dict[str, None] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _layers: dict[str, list[int]] = field(default_factory=dict)
    _omitted: int = 0

    def warn(self, message: str) -> None:
        """Add a warning; repeating it has no effect."""
        if message in self._messages:
            return
        if len(self._messages) >= REPORTED:
            self._omitted += 1
            return
        self._messages[message] = None

    def count(self, what: str, number: int = 1) -> None:
        """Add to a number that is reported once, at the end, as ``number what``."""
        if number:
            self._counts[what] = self._counts.get(what, 0) + number

    def warn_of_layer(self, layer: int, message: str) -> None:
        """Add a warning of a layer; those of several that say the same become one."""
        self._layers.setdefault(message, []).append(layer)

    def messages(self) -> list[str]:
        """All warnings, for the summary of the trace."""
        more = [f"{self._omitted:,} more warnings like these"] if self._omitted else []
        of_layers = [
            f"layer{'s' * (len(layers) > 1)} {ranges(layers)}: {message}"
            for message, layers in ((message, sorted(set(layers))) for message, layers in self._layers.items())
        ]
        return [*self._messages, *more, *of_layers, *(f"{number:,} {what}" for what, number in self._counts.items())]

    def emit(self) -> None:
        """Issue all warnings."""
        for message in self.messages():
            warnings.warn(message, stacklevel=3)


@dataclass(frozen=True)
class Options:
    """What the user supplies because the file lacks it; `import_trace` says what each means."""

    num_experts: int | None = None
    top_k: int | None = None
    num_layers: int | None = None
    layers: tuple[int, ...] | None = None
    domain: str | None = None
    model: str | None = None
    ranked: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    restarts: bool = False
    document_tokens: int | None = None
    bos: int | None = None

    def need(self, name: str, place: object) -> int:
        """The number given for ``top_k`` or ``num_layers``.

        Raises:
            ImportIncomplete: It was not given.
        """
        number: int | None = getattr(self, name)
        if number is None:
            raise not_stated(name, place)
        return number


def not_stated(name: str, place: object) -> ImportIncomplete:
    """The error of a number that neither the file nor the user states."""
    what, hint = _NEEDED[name]
    return ImportIncomplete(place, f"does not state the number of {what}", f"give it with {hint}")


_NEEDED = {
    "top_k": ("experts per token", "--top-k K"),
    "num_layers": ("layers", "--num-layers N, dense layers included"),
}
