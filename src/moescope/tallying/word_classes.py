"""Word classes that show syntax, decided from the text, and the experts their tokens choose.

The unit is the token. Its text is the bytes of its piece, its neighbours those of the document; so byte-fallback pieces
and the spaces that tokenizers put in front need no care of their own. A part of a character counts as a letter (as in
`occurrences`). A token may be of several classes: a piece that holds a line break and the spaces of the next line is
`newline` and `indentation`.
"""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moescope.errors import NotRecorded
from moescope.tallying import word_class_kernels as kernels
from moescope.tallying.counter import Array, Counter, CountOptions, Facts, Result, need_choice, summed
from moescope.tallying.document_groups import NUM_GROUPS, document_groups
from moescope.tallying.text import UNKNOWN, Pieces
from moescope.trace import Layer, Part, Trace, Vocabulary

CLASSES = {
    "indentation": "nothing but white space, of which some stands at the start of a line that holds something else",
    "newline": "a line break, and nothing but white space beside it",
    "digits": "digits, with or without a space in front",
    "punctuation": "punctuation and symbols, with or without a space in front",
    "capitalised": "begins a word, with a capital letter",
    "keyword": "overlaps a keyword of Python, other than those that are small words of English",
    "command": "overlaps a command of LaTeX: a backslash and two letters or more",
    "continuation": "begins with a letter in the middle of a word",
}
"""The classes: what a token of each is."""

ENGLISH = frozenset({"and", "as", "for", "from", "if", "in", "is", "not", "or", "while", "with"})
"""Keywords of Python that are small words of English, and so say nothing of Python."""

KEYWORDS = tuple(sorted(set(keyword.kwlist) - ENGLISH))

_BIT = {name: np.uint16(1 << bit) for bit, name in enumerate(CLASSES)}
_NUMBERS = np.array([int.from_bytes(word.encode()) for word in KEYWORDS], np.uint64)
_BY_PLACE = ("indentation", "keyword", "command")


@dataclass(frozen=True)
class Described:
    """What each piece of a vocabulary is by itself.

    Attributes:
        pieces: The pieces, of which the unknown one is of no class.
        bits: Classes that the piece alone decides, shape (piece,).
        blank: Whether it is white space, shape (piece,).
        letter: Whether it begins with a letter, shape (piece,).
        ends: Whether it ends with one, shape (piece,).
        capital: Whether its first character but for spaces is a capital letter, shape (piece,).
        spaced: Whether a space stands before that, shape (piece,).
    """

    pieces: Pieces
    bits: NDArray[np.uint16]
    blank: NDArray[np.bool_]
    letter: NDArray[np.bool_]
    ends: NDArray[np.bool_]
    capital: NDArray[np.bool_]
    spaced: NDArray[np.bool_]

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Described:
        """What the pieces of a vocabulary are."""
        pieces = Pieces.of(vocabulary)
        texts = [*(vocabulary.pieces[token_id] for token_id in pieces.ids.tolist()), UNKNOWN]
        bits, *flags = (np.array(column) for column in zip(*map(_describe, texts), strict=True))
        return cls(pieces, bits.astype(np.uint16), *flags)


def _describe(piece: bytes) -> tuple[int, bool, bool, bool, bool, bool]:
    """Bits, blank, letter, ends, capital and spaced of a piece; see `Described`."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:  # a part of a character, perhaps with more around it: bytes are all there is
        return 0, False, _is_letter(piece[0]), _is_letter(piece[-1]), False, False
    bare = text.lstrip(" ")
    bits = 0
    if text and not text.strip():
        bits |= int(_BIT["newline"]) if any(c in "\n\r" for c in text) else 0
    elif bare.isdigit():
        bits |= int(_BIT["digits"])
    elif bare and all(unicodedata.category(c)[0] in "PS" for c in bare):
        bits |= int(_BIT["punctuation"])
    blank = bool(text) and not text.strip()
    return bits, blank, text[:1].isalpha(), text[-1:].isalpha(), _is_capital(bare[:1]), bare != text


def _is_letter(byte: int) -> bool:
    return byte >= 0x80 or chr(byte).isalpha()


def _is_capital(character: str) -> bool:
    return character.isalpha() and unicodedata.category(character) in ("Lu", "Lt")


def token_classes(
    described: Described, token_id: NDArray[np.integer[Any]], document_starts: NDArray[np.int64]
) -> NDArray[np.uint16]:
    """Classes of the tokens of whole documents, bit c for the c-th of `CLASSES`.

    Args:
        described: The pieces of the vocabulary.
        token_id: Vocabulary ids, shape (token,).
        document_starts: First token of each document, with the number of tokens at the end.
    Returns:
        Shape (token,).

    Example:
        >>> words = [b"def", b" Mo", b"del", b":", b"\\n", b"  ", b"return", b" 42"]
        >>> bits = token_classes(Described.of(Vocabulary.from_pieces(words)), np.arange(8), np.array([0, 8]))
        >>> for word, of_word in zip(words, bits.tolist()):
        ...     print(word, [name for at, name in enumerate(CLASSES) if of_word >> at & 1])
        b'def' ['keyword']
        b' Mo' ['capitalised']
        b'del' ['continuation']
        b':' ['punctuation']
        b'\\n' ['newline']
        b'  ' ['indentation']
        b'return' ['keyword']
        b' 42' ['digits']
    """
    place = described.pieces.places(token_id)
    text_B, first_T = described.pieces.join(place, document_starts)
    bits = np.empty(len(place), np.uint16)
    kernels.pieces_in_place(
        place,
        document_starts,
        (described.bits, described.blank, described.letter, described.ends, described.capital, described.spaced),
        (int(_BIT["indentation"]), int(_BIT["continuation"]), int(_BIT["capitalised"])),
        kernels.scan_text(text_B, first_T, _NUMBERS, *(int(_BIT[name]) for name in _BY_PLACE)),
        bits,
    )
    return bits


@dataclass(frozen=True)
class ClassCounts(Result):
    """Choices of the tokens of each class. L layers, X groups of documents, C classes, E expert ids.

    Memory: 16 bytes x L x X x C x E; 60 layers of 256 experts take 63 MB, a copy a thread.

    Attributes:
        layers: Layers counted.
        tokens_C: Tokens of each class, and last of all tokens.
        documents_C: Documents with such a token, and last all documents.
        counts_LXCE: Choices of the tokens of the class, in documents that have other tokens, too.
        expected_LXCE: What they would be, shared out as the other tokens of the same documents, in units of 2^-20.
        totals_LCE: Choices of the tokens of the class in all documents, and last of all tokens.
        choice: "first", first choices were counted; "all", all of them.
    """

    layers: tuple[Layer, ...]
    tokens_C: NDArray[np.int64]
    documents_C: NDArray[np.int64]
    counts_LXCE: NDArray[np.int64]
    expected_LXCE: NDArray[np.int64]
    totals_LCE: NDArray[np.int64]
    choice: str

    facts = ("choice",)

    @classmethod
    def declared(cls, layers: Sequence[Layer], domains: Sequence[str], facts: Facts) -> dict[str, Array]:
        """The sums; `expected_LXCE` is rounded, and a class has one more place for all tokens where it says so."""
        if facts["choice"] not in ("first", "all"):
            raise ValueError(f"choice is {facts['choice']!r}, expected 'first' or 'all'")
        sizes = {
            "layer": len(layers),
            "documents": NUM_GROUPS,
            "class": len(CLASSES),
            "class-or-all": len(CLASSES) + 1,
            "expert": max(layer.num_ids for layer in layers),
        }
        return summed(
            sizes,
            tokens_C="class-or-all",
            documents_C="class-or-all",
            counts_LXCE="layer documents class expert",
            expected_LXCE="layer documents class expert",
            totals_LCE="layer class-or-all expert",
        )


@dataclass
class ClassCounter(Counter[ClassCounts]):
    """The counter that fills `ClassCounts`.

    Attributes:
        described: The pieces of the trace's vocabulary.
        kind: Kind of each token of the part at hand: those of a kind are of the same classes.
        bits: Classes of each kind.
    """

    name, result_type, reads_tokens = "word_classes", ClassCounts, True

    counts: ClassCounts
    described: Described
    kind: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    bits: NDArray[np.uint16] = field(default_factory=lambda: np.zeros(0, np.uint16))

    @classmethod
    def need(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> None:
        """Refuse a trace without token ids, or without the order of the choices if the first are to be counted."""
        trace.need_tokens()
        if not trace.header.token_ids:
            raise NotRecorded(trace.path, "has no token ids, so its text is not known")
        need_choice(trace.path, layers, options.choice)

    @classmethod
    def prepare(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> Callable[[], Self]:
        """What makes empty counters."""
        described, choice = Described.of(trace.vocabulary), options.choice or "first"
        return lambda: cls(ClassCounts.empty(layers, choice=choice), described)

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count the layers of `group` in a part."""
        counts = self.counts
        starts_D = part.document_starts()
        group_D = document_groups(part.document[starts_D[:-1]])
        if group[0] == counts.layers[0]:
            bits = token_classes(self.described, part.token_id, starts_D)
            used = np.bincount(bits, minlength=1 << len(CLASSES)) > 0
            self.bits = np.flatnonzero(used).astype(np.uint16)
            self.kind = (np.cumsum(used) - 1).astype(np.uint8)[bits]
            for c in range(len(CLASSES)):
                of_class = bits >> c & 1
                counts.tokens_C[c] += int(np.count_nonzero(of_class))
                counts.documents_C[c] += int(np.count_nonzero(np.maximum.reduceat(of_class, starts_D[:-1])))
            counts.tokens_C[-1] += part.num_tokens
            counts.documents_C[-1] += len(group_D)
        ranks = 1 if counts.choice == "first" else None
        for layer in group:
            place, size = counts.layers.index(layer), layer.num_ids
            kernels.count_classes(
                part.expert_ids[layer.layer].T[:ranks],
                self.kind,
                self.bits,
                starts_D,
                group_D,
                counts.counts_LXCE[place][:, :, :size],
                counts.expected_LXCE[place][:, :, :size],
                counts.totals_LCE[place][:, :size],
            )
