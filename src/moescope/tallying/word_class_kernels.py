"""The loops of word classes, compiled by numba; the unit counted is the assignment.

Shape suffixes: B bytes of text; V bytes of all pieces of the vocabulary, one after another; I pieces; T tokens; K
choices a token; D documents; X groups of documents; C word classes; E expert ids. A token's classes are the bits of one
number, bit c for class c; a token may be of several.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer[Any]]
Sums = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Bits = NDArray[np.uint16]

FIXED = 2**20
"""Expected counts are whole numbers of this fraction, so that the order of adding changes nothing."""


@numba.njit(cache=True, nogil=True)
def join_pieces(
    piece_T: NDArray[np.int32], bytes_V: Bytes, starts_I: Sums, document_starts_D: Sums, separator: int
) -> tuple[Bytes, Sums]:
    """The text of documents, and the first byte of each token with the number of bytes at the end.

    Args:
        piece_T: Place of each token's piece.
        bytes_V: The pieces.
        starts_I: First byte of each piece, with the number of bytes at the end.
        document_starts_D: First token of each document, with the number of tokens at the end.
        separator: A byte that is put before each document.
    """
    size = document_starts_D.size - 1
    for t in range(piece_T.size):
        size += starts_I[piece_T[t] + 1] - starts_I[piece_T[t]]
    text_B = np.empty(size, np.uint8)
    first_T = np.empty(piece_T.size + 1, np.int64)
    at = 0
    for d in range(document_starts_D.size - 1):
        text_B[at] = separator
        at += 1
        for t in range(document_starts_D[d], document_starts_D[d + 1]):
            first_T[t] = at
            for v in range(starts_I[piece_T[t]], starts_I[piece_T[t] + 1]):
                text_B[at] = bytes_V[v]
                at += 1
    first_T[piece_T.size] = at
    return text_B, first_T


@numba.njit(cache=True, nogil=True)
def count_classes(
    ids_KT: Ids,
    bits_T: Bits,
    starts_D: Sums,
    group_D: Sums,
    counts_XCE: Sums,
    expected_XCE: Sums,
    totals_CE: Sums,
) -> None:
    """Count the choices of each class, and those of as many other tokens of the same documents.

    A document whose tokens are all of a class, or none, says nothing about that class and is left out of it.

    Args:
        ids_KT: Choices; -1 is none.
        bits_T: Classes of each token.
        starts_D: First token of each document, with the number of tokens at the end.
        group_D: Group of each document.
        counts_XCE: Added to: choices of the tokens of a class.
        expected_XCE: Added to, in units of 1 / FIXED: what they would be if they were shared out as the choices of the
            other tokens of the document are.
        totals_CE: Added to: all choices of the class, whatever the document; and in one more row those of all tokens.
    """
    num_classes, num_ids = counts_XCE.shape[1:]
    own_CE = np.zeros((num_classes, num_ids), np.int64)
    own_C = np.zeros(num_classes, np.int64)
    all_E = np.zeros(num_ids, np.int64)
    for d in range(group_D.size):
        own_CE[:] = 0
        own_C[:] = 0
        all_E[:] = 0
        total = 0
        for t in range(starts_D[d], starts_D[d + 1]):
            bits = bits_T[t]
            for k in range(ids_KT.shape[0]):
                e = np.int64(ids_KT[k, t])
                if e < 0:
                    continue
                all_E[e] += 1
                total += 1
                if bits:
                    for c in range(num_classes):
                        if bits >> c & 1:
                            own_CE[c, e] += 1
                            own_C[c] += 1
        x = group_D[d]
        for i in range(num_ids):
            totals_CE[num_classes, i] += all_E[i]
        for c in range(num_classes):
            if own_C[c] == 0:
                continue
            others = total - own_C[c]
            for i in range(num_ids):
                totals_CE[c, i] += own_CE[c, i]
                if others:
                    counts_XCE[x, c, i] += own_CE[c, i]
                    share = (all_E[i] - own_CE[c, i]) / others
                    expected_XCE[x, c, i] += np.int64(np.rint(own_C[c] * share * FIXED))
