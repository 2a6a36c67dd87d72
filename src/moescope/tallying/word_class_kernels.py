"""The loops of word classes, compiled by numba; the unit counted is the assignment.

Shape suffixes: B bytes of text; V bytes of all pieces of the vocabulary, one after another; I pieces; T tokens; K
choices a token; D documents; X groups of documents; C word classes; M kinds of tokens; E expert ids. A token's classes
are the bits of one number, bit c for class c; a token may be of several.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.jit import kernel

Ids = NDArray[np.integer[Any]]
Sums = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Bits = NDArray[np.uint16]
Flags = NDArray[np.bool_]

FIXED = 2**20
"""Expected counts are whole numbers of this fraction, so that the order of adding changes nothing."""


@kernel()
def scan_text(
    text_B: Bytes, first_T: Sums, keywords: NDArray[np.uint64], indentation: int, keyword: int, command: int
) -> Bits:
    """Bits of the tokens that share a byte with the indentation of a line, a keyword, or a command.

    Args:
        text_B: Of `text.Pieces.join`, as `first_T`.
        keywords: The keywords, each as the number that its bytes, at most eight, make, the first the highest.
        indentation: Bit of the spaces and tabs at the start of a line that holds something else.
        keyword: Bit of words that are keywords; a word is a run of ASCII letters, digits, ``_`` and bytes above ASCII.
        command: Bit of backslashes with two ASCII letters or more behind them, with these.
    """
    bits_T = np.zeros(first_T.size - 1, np.uint16)
    size = text_B.size
    seen = np.zeros(256, np.bool_)  # by a hash of a keyword: most words are told from all of them by one look
    for i in range(keywords.size):
        seen[_hash(keywords[i])] = True
    t = 0
    b = 0
    while b < size:
        byte = text_B[b]
        end = b + 1
        bit = 0
        if byte == 10:
            start = b + 1
            while end < size and (text_B[end] == 32 or text_B[end] == 9):
                end += 1
            if start < end < size and text_B[end] != 10 and text_B[end] != 13:
                t = _mark(first_T, start, end, bits_T, indentation, t)
        elif byte == 92:
            last = end
            while last < size and _is_letter(text_B[last]):
                last += 1
            if last > b + 2:
                t = _mark(first_T, b, last, bits_T, command, t)
        elif _in_word(byte):
            value = np.uint64(byte)
            while end < size and _in_word(text_B[end]):
                value = value << np.uint64(8) | np.uint64(text_B[end])
                end += 1
            if end - b <= 8 and seen[_hash(value)]:
                for i in range(keywords.size):
                    if keywords[i] == value:
                        bit = keyword
            if bit:
                t = _mark(first_T, b, end, bits_T, bit, t)
        b = end
    return bits_T


@kernel()
def pieces_in_place(
    piece_T: NDArray[np.int32],
    document_starts_D: Sums,
    pieces: tuple[Bits, Flags, Flags, Flags, Flags, Flags],
    classes: tuple[int, int, int],
    scanned_T: Bits,
    bits_T: Bits,
) -> None:
    """Put what a token's piece, the piece before it and the text say of its classes together.

    Args:
        pieces: Of each piece: the classes it decides alone; whether it is blank, begins with a letter, ends with one,
            is capitalised, and begins with a space.
        classes: Bits of indentation, which only blanks are, continuations and capitalised words.
        scanned_T: Of `scan_text`.
        bits_T: Set to the classes.
    """
    bits_I, blank_I, letter_I, ends_I, capital_I, spaced_I = pieces
    indentation, continuation, capitalised = classes
    for d in range(document_starts_D.size - 1):
        after_letter = False
        for t in range(document_starts_D[d], document_starts_D[d + 1]):
            i = piece_T[t]
            bits = np.int64(scanned_T[t])
            if not blank_I[i]:
                bits &= ~indentation
            bits |= bits_I[i]
            if after_letter and letter_I[i]:
                bits |= continuation
            if capital_I[i] and (spaced_I[i] or not after_letter):
                bits |= capitalised
            bits_T[t] = bits
            after_letter = ends_I[i]


@kernel(inline="always")
def _mark(first_T: Sums, start: int, end: int, bits_T: Bits, bit: int, t: int) -> int:
    """Mark the tokens from `t` on that share a byte with a span; the first of them."""
    while first_T[t + 1] <= start:
        t += 1
    u = t
    while u < bits_T.size and first_T[u] < end:
        if first_T[u + 1] > first_T[u]:
            bits_T[u] |= np.uint16(bit)
        u += 1
    return t


@kernel(inline="always")
def _hash(word: np.uint64) -> np.uint64:
    return word * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(56)


@kernel(inline="always")
def _is_letter(byte: int) -> bool:
    return 65 <= byte <= 90 or 97 <= byte <= 122


@kernel(inline="always")
def _in_word(byte: int) -> bool:
    return _is_letter(byte) or 48 <= byte <= 57 or byte == 95 or byte >= 128


@kernel()
def count_classes(
    ids_KT: Ids,
    kind_T: NDArray[np.uint8],
    bits_M: Bits,
    starts_D: Sums,
    group_D: Sums,
    counts_XCE: Sums,
    expected_XCE: Sums,
    totals_CE: Sums,
) -> None:
    """Count the choices of each class, and those of as many other tokens of the same documents.

    A document whose tokens are all of a class, or none, says nothing about that class and is left out of it.

    Args:
        kind_T: Kind of each token: tokens of one kind are of the same classes.
        bits_M: Classes of each kind.
        counts_XCE: Added to: choices of the tokens of a class.
        expected_XCE: Added to, in units of 1 / FIXED: what they would be if they were shared out as the choices of the
            other tokens of the document are.
        totals_CE: Added to: all choices of the class, whatever the document; and in one more row those of all tokens.
    """
    num_classes, num_ids = counts_XCE.shape[1:]
    # Two tables by turns, because a count that was just written is slow to be counted on.
    own_2ME = np.zeros((2, bits_M.size, num_ids), np.int64)
    own_ME = own_2ME[0]
    places = own_2ME.reshape(-1)
    half = bits_M.size * num_ids
    own_E = np.zeros(num_ids, np.int64)
    all_E = np.zeros(num_ids, np.int64)
    for d in range(group_D.size):
        for k in range(ids_KT.shape[0]):
            ids_T = ids_KT[k]
            for t in range(starts_D[d], starts_D[d + 1]):
                e = np.int64(ids_T[t])
                if e >= 0:
                    places[np.uint64((t & 1) * half + np.int64(kind_T[t]) * num_ids + e)] += 1
        own_ME += own_2ME[1]
        all_E[:] = 0
        for m in range(bits_M.size):
            for i in range(num_ids):
                all_E[i] += own_ME[m, i]
        total = all_E.sum()
        x = group_D[d]
        for i in range(num_ids):
            totals_CE[num_classes, i] += all_E[i]
        for c in range(num_classes):
            own_E[:] = 0
            for m in range(bits_M.size):
                if bits_M[m] >> c & 1:
                    for i in range(num_ids):
                        own_E[i] += own_ME[m, i]
            own = own_E.sum()
            others = total - own
            if own == 0:
                continue
            for i in range(num_ids):
                totals_CE[c, i] += own_E[i]
                if others:
                    counts_XCE[x, c, i] += own_E[i]
                    share = (all_E[i] - own_E[i]) / others
                    expected_XCE[x, c, i] += np.int64(np.rint(own * share * FIXED))
        own_2ME[:] = 0
