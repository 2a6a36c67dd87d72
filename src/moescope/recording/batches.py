"""Documents to parts, parts to windows, windows to batches.

A part is the unit of work and of resuming: consecutive documents until it holds enough tokens. A window is what the
model reads in one go; a document longer than the window becomes several, each an independent sequence. Batches are
formed within a part, so a part comes out the same whether or not the same process recorded those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.corpus import Document

Encode = Callable[[str], NDArray[np.uint32]]
Batching = Literal["padded", "equal", "alone"]


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
        row: Row of the first token in the part.
        sequence: Place of the window in its document, from 0.
        token_ids: Their ids, without those the tokenizer adds, shape (token,).
    """

    row: int
    sequence: int
    token_ids: NDArray[np.uint32]


@dataclass(frozen=True)
class Batch:
    """Windows that go through the model together, padded on the right to the longest.

    Attributes:
        input_ids: Added tokens, tokens and padding, shape (sequence, token).
        attention_mask: 0 for padding, shape (sequence, token); None if there is no padding.
        places: Places of the tokens to record in the flattened `input_ids`, shape (token,).
        rows: Their rows in the part, shape (token,).
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64] | None
    places: NDArray[np.int64]
    rows: NDArray[np.int64]


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
    found: list[Window] = []
    row = 0
    for _, token_ids in portion.documents:
        for sequence, start in enumerate(range(0, len(token_ids), length)):
            found.append(Window(row + start, sequence, token_ids[start : start + length]))
        row += len(token_ids)
    return found


def batches(
    windows: Sequence[Window], added_ids: Sequence[int], batch_tokens: int, batching: Batching = "padded"
) -> Iterator[Batch]:
    """Group windows of similar length into batches, the longest first.

    Args:
        windows: Windows of one part.
        added_ids: Ids to put in front of each window.
        batch_tokens: Most tokens of a batch, padding included; a single longer window is a batch of its own.
        batching: Which windows may go together without a change of a choice: any, ``padded`` to one length; those of
            ``equal`` length; or none, each ``alone``.
    """
    if batching == "equal":
        lengths: dict[int, list[Window]] = {}
        for window in windows:
            lengths.setdefault(len(window.token_ids), []).append(window)
        for same in lengths.values():
            yield from batches(same, added_ids, batch_tokens)
        return
    batch_tokens = 1 if batching == "alone" else batch_tokens
    ordered = sorted(windows, key=lambda window: -len(window.token_ids))  # stable: equal lengths stay in corpus order
    start = 0
    while start < len(ordered):
        length = len(added_ids) + len(ordered[start].token_ids)
        end = start + max(1, batch_tokens // length)
        yield _pad(ordered[start:end], added_ids, length)
        start = end


def _pad(windows: Sequence[Window], added_ids: Sequence[int], length: int) -> Batch:
    num_added = len(added_ids)
    input_ids = np.zeros((len(windows), length), np.int64)
    input_ids[:, :num_added] = added_ids
    ends = np.array([num_added + len(window.token_ids) for window in windows])
    for index, window in enumerate(windows):
        input_ids[index, num_added : ends[index]] = window.token_ids
    columns = np.arange(length)
    recorded = (columns >= num_added) & (columns < ends[:, None])
    rows = np.array([window.row for window in windows])[:, None] + columns - num_added
    mask = (columns < ends[:, None]).astype(np.int64) if ends.min() < length else None
    return Batch(input_ids, mask, np.flatnonzero(recorded), rows[recorded])
