"""The text of documents, from the vocabulary's bytes: no tokenizer is needed, and any way of cutting words works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.jit import kernel
from moescope.trace import Vocabulary

LINE_BREAK = 10
UNKNOWN = b"\0"
"""In the place of an unknown token: no letter, digit, symbol or space, so of no word and of no class."""


@dataclass(frozen=True)
class Pieces:
    """The pieces of a vocabulary and, last, the unknown one.

    Attributes:
        ids: Known ids, ascending, shape (known piece,).
        text: The pieces, one after another, shape (byte,).
        starts: First byte of each, with the number of bytes at the end, shape (piece + 1,).
    """

    ids: NDArray[np.int64]
    text: NDArray[np.uint8]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Pieces:
        """The pieces of a vocabulary."""
        known = sorted(vocabulary.pieces.items())
        pieces = [*(piece for _, piece in known), UNKNOWN]
        text = np.frombuffer(b"".join(pieces), np.uint8)
        starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
        return cls(np.array([token_id for token_id, _ in known], np.int64), text, starts)

    def places(self, token_id: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        """Place of each token's piece, shape (token,)."""
        ids = token_id.astype(np.int64)
        if not len(self.ids):
            return np.zeros(len(ids), np.int32)
        if self.ids[-1] == len(self.ids) - 1:  # as most vocabularies: all ids from 0
            return np.minimum(ids, len(self.ids)).astype(np.int32)
        place = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[place] == ids, place, len(self.ids)).astype(np.int32)

    def join(
        self, place: NDArray[np.int32], document_starts: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The text of documents, a line break before each, and the first byte of each token.

        Args:
            place: Of `places`.
            document_starts: First token of each document, with the number of tokens at the end.
        Returns:
            The text, shape (byte,), and first bytes with the number of bytes at the end, shape (token + 1,).
        """
        return _join(place, self.text, self.starts, document_starts)


@kernel()
def _join(
    place_T: NDArray[np.int32],
    bytes_V: NDArray[np.uint8],
    starts_I: NDArray[np.int64],
    document_starts_D: NDArray[np.int64],
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`Pieces.join`; V bytes of I pieces, T tokens of D documents, B bytes of text."""
    size = document_starts_D.size - 1
    for t in range(place_T.size):
        size += starts_I[place_T[t] + 1] - starts_I[place_T[t]]
    text_B = np.empty(size, np.uint8)
    first_T = np.empty(place_T.size + 1, np.int64)
    b = 0
    for d in range(document_starts_D.size - 1):
        text_B[b] = LINE_BREAK
        b += 1
        for t in range(document_starts_D[d], document_starts_D[d + 1]):
            first_T[t] = b
            for v in range(starts_I[place_T[t]], starts_I[place_T[t] + 1]):
                text_B[b] = bytes_V[v]
                b += 1
    first_T[place_T.size] = b
    return text_B, first_T
