"""A document with its domain: what every corpus yields."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text with its domain.

    Attributes:
        number: Index of the record in the corpus, from 0; in JSON lines, the index of the line.
        domain: Label of the corpus, such as the Pile's ``pile_set_name``.
        text: The whole text.
        max_tokens: Keep only this many of its tokens (the last document of a quota); None keeps all.
    """

    number: int
    domain: str
    text: str
    max_tokens: int | None = None
