"""Documents to parts, parts to windows.

A part is the unit of work and of resuming: consecutive documents until it holds enough tokens. A window is what the
model reads in one go; a document longer than the window becomes several, each an independent sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moescope.corpus import Document

Encode = Callable[[str], NDArray[np.uint32]]


@dataclass
class Portion:
    """The documents of one part, as tokens.

    Attributes:
        documents: Those with at least one token, with their token ids, each of shape (token,).
        num_read: Documents read for it, the empty ones included.
        num_tokens: Tokens of the documents.
        num_characters: Characters of the documents, as far as they are recorded.
    """

    documents: list[tuple[Document, NDArray[np.uint32]]] = field(default_factory=list)
    num_read: int = 0
    num_tokens: int = 0
    num_characters: int = 0

    def note(self) -> dict[str, int]:
        """What a trace notes of the part, so that a recording can go on after it."""
        return {
            "documents_read": self.num_read,
            "documents_empty": self.num_read - len(self.documents),
            "tokens": self.num_tokens,
            "characters": self.num_characters,
        }


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document that the model reads in one go.

    Attributes:
        sequence: Place of the window in its document, from 0.
        token_ids: Their ids, without those the tokenizer adds, shape (token,).
    """

    sequence: int
    token_ids: NDArray[np.uint32]


def portions(documents: Iterable[Document], encode: Encode, part_tokens: int) -> Iterator[Portion]:
    """Divide documents into parts; only the last holds fewer than `part_tokens` tokens, possibly none."""
    portion = Portion()
    for document in documents:
        token_ids = encode(document.text)
        portion.num_characters += _kept_characters(document, len(token_ids))
        token_ids = token_ids[: document.max_tokens]
        portion.num_read += 1
        if len(token_ids):
            portion.documents.append((document, token_ids))
            portion.num_tokens += len(token_ids)
        if portion.num_tokens >= part_tokens:
            yield portion
            portion = Portion()
    if portion.num_read:
        yield portion


def summed(notes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sums of what a trace notes of some portions, 0 each for none."""
    totals = dict.fromkeys(Portion().note(), 0)
    for note in notes:
        totals = {name: total + note[name] for name, total in totals.items()}
    return totals


def num_characters(document: Document, encode: Encode) -> int:
    """Characters of a document that are recorded; only one with a limit is tokenized for it."""
    return _kept_characters(document, 0 if document.max_tokens is None else len(encode(document.text)))


def _kept_characters(document: Document, num_tokens: int) -> int:
    """Characters, about, of the tokens of a document that its limit keeps, of `num_tokens`."""
    if document.max_tokens is None or num_tokens <= document.max_tokens:
        return len(document.text)
    return len(document.text) * document.max_tokens // num_tokens


def windows(portion: Portion, length: int) -> list[Window]:
    """Cut the documents of a part into windows of at most `length` tokens, in the order of the part's rows."""
    return [
        Window(sequence, token_ids[start : start + length])
        for _, token_ids in portion.documents
        for sequence, start in enumerate(range(0, len(token_ids), length))
    ]
