"""A document and the domain it carries: what every corpus yields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Document:
    """One text with its domain.

    Attributes:
        number: Index of the record in the corpus, from 0; in JSON lines, the index of the line.
        domain: Label of the corpus, such as the Pile's ``pile_set_name``.
        text: The whole text.
        max_tokens: Keep only this many tokens of it (the last document of a quota); None keeps all.
    """

    number: int
    domain: str
    text: str
    max_tokens: int | None = None


class Documents(Protocol):
    """What reads like a corpus: a ``Corpus``, a ``Sample``, or a caller's own documents."""

    def __iter__(self) -> Iterator[Document]:
        """The documents, again and again in the same order."""
        ...

    def description(self) -> dict[str, Any]:
        """What identifies them in a trace; JSON-able."""
        ...
