"""Where words and indentation occur in a trace, as spans of tokens with their first choices.

The unit is the occurrence: a match of a pattern in the text of a document, and every token that overlaps it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.counter import Array, Arrays, Counter, CountOptions, Facts, Places, Result
from moescope.tallying.document_sample import DocumentSample
from moescope.tallying.text import Pieces
from moescope.trace import Layer, Part, Trace

WORDS = ("self", "Question")
"""The words that section 5 of the paper speaks of; indentation is the third."""

INDENTATION = "<indentation>"
"""Name of the pattern that matches the spaces and tabs at the start of a line that holds something else."""


@dataclass(frozen=True)
class Occurrences:
    """Occurrences of one pattern, and what is needed to judge them.

    Attributes:
        name: The word, or ``<indentation>``.
        layers: Layers of the choices.
        occurrence: Occurrence that a token belongs to, from 0, ascending, shape (token,).
        document: Document of each token, shape (token,).
        token_id: Vocabulary id of each token, shape (token,).
        first_choice: First choice of each token, shape (layer, token); -1 = dropped.
    """

    name: str
    layers: tuple[int, ...]
    occurrence: NDArray[np.int64]
    document: NDArray[np.int64]
    token_id: NDArray[np.int64]
    first_choice: NDArray[np.int32]


@dataclass(frozen=True)
class WordOccurrences(Result):
    """The occurrences of some words.

    Memory grows with the occurrences, not with the tokens: 24 bytes and 4 a layer for each token of one.

    Attributes:
        layers: Layers of the choices.
        of_word: By word, in the order in which they were asked for; the occurrences in the order of their documents.
    """

    layers: tuple[Layer, ...]
    of_word: Mapping[str, Occurrences]

    facts = ("words",)

    @property
    def words(self) -> tuple[str, ...]:
        """The words."""
        return tuple(self.of_word)

    @classmethod
    def declared(cls, layers: Sequence[Layer], domains: Sequence[str], facts: Facts) -> dict[str, Array]:
        """The columns of the n-th word as ``n/occurrence`` and so on."""
        if not all(isinstance(word, str) for word in facts["words"]):
            raise ValueError(f"words are {facts['words']}, expected a list of words")
        column = {
            "occurrence": Array(("token",), (None,)),
            "document": Array(("token",), (None,), most=2**32 - 1),
            "token_id": Array(("token",), (None,), most=2**32 - 1),
            "first_choice": Array(("layer", "token"), (len(layers), None), (np.int32,), least=-1),
        }
        return {
            f"{n}/{name}": array._replace(axes=(*array.axes[:-1], f"token of word {n}"))
            for n in range(len(facts["words"]))
            for name, array in column.items()
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays by the names under which they are declared."""
        return {f"{n}/{name}": getattr(word, name) for n, word in enumerate(self.of_word.values()) for name in _COLUMNS}

    @classmethod
    def of_arrays(cls, layers: Sequence[Layer], domains: Sequence[str], facts: Facts, arrays: Arrays) -> Self:
        """The occurrences that have these columns.

        Raises:
            ValueError: They count up wrongly, or name an expert that a layer does not have.
        """
        of_word, numbers = {}, tuple(layer.layer for layer in layers)
        for n, name in enumerate(facts["words"]):
            word = Occurrences(name, numbers, *(arrays[f"{n}/{column}"] for column in _COLUMNS))
            if not np.isin(np.diff(word.occurrence, prepend=-1), (0, 1)).all():
                raise ValueError(f"{n}/occurrence does not count up from 0")
            for layer, choice in zip(layers, word.first_choice, strict=True):
                if choice.max(initial=-1) >= layer.num_ids:
                    raise ValueError(f"{n}/first_choice holds {choice.max()}, expected below {layer.num_ids}")
            of_word[name] = word
        return cls(tuple(layers), of_word)

    def added(self, other: Self, domains: Sequence[str], places: Mapping[str, Places]) -> Self:
        """The occurrences of both, in the order of their documents."""
        return replace(
            self,
            of_word={
                name: _in_order(_joined(name, mine.layers, [mine, other.of_word[name]]))
                for name, mine in self.of_word.items()
            },
        )


_COLUMNS = ("occurrence", "document", "token_id", "first_choice")


@dataclass(frozen=True)
class TokenChoices:
    """First choices of every token whose id occurs in some pattern, counted by document, of a sample of documents.

    Attributes:
        token_ids: The ids, ascending, shape (id,).
        keys: Place in `token_ids` and document, packed as ``place << 32 | document``, ascending, shape (pair,).
        counts: First choices of the tokens with that id in that document, shape (layer, pair, expert).
    """

    token_ids: NDArray[np.int64]
    keys: NDArray[np.int64]
    counts: NDArray[np.int32]

    @classmethod
    def of(cls, sample: DocumentSample, occurrences: Sequence[Occurrences]) -> TokenChoices:
        """How the ids of some occurrences choose in the documents of a sample, which has token ids."""
        assert sample.token_id is not None
        token_ids = np.unique(np.concatenate([np.zeros(0, np.int64), *(word.token_id for word in occurrences)]))
        num_ids = max(layer.num_ids for layer in sample.layers)
        id_T = sample.token_id.astype(np.uint32).astype(np.int64)
        kept = np.flatnonzero(np.isin(id_T, token_ids))
        place = np.searchsorted(token_ids, id_T[kept])
        keys, pair = np.unique(_key(place, sample.document[sample.document_of_token()[kept]]), return_inverse=True)
        counts = np.zeros((len(sample.layers), len(keys), num_ids), np.int32)
        for count, layer in zip(counts, sample.layers, strict=True):
            choice = sample.expert_ids[layer.layer][0, kept].astype(np.int64)
            made = choice >= 0
            count[:] = np.bincount(pair[made] * num_ids + choice[made], minlength=count.size).reshape(count.shape)
        return cls(token_ids, keys, counts)

    def elsewhere(
        self, layer_index: int, token_id: NDArray[np.int64], document: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """How tokens with these ids choose in all other documents, so that no occurrence predicts itself.

        Args:
            layer_index: Place of the layer in `counts`.
            token_id: Ids, shape (token,).
            document: Document to leave out for each, shape (token,).
        Returns:
            Share of each first choice, shape (token, expert); NaN where no other document holds the id.
        """
        place = np.searchsorted(self.token_ids, token_id)
        counts = self.counts[layer_index]
        total = np.zeros((len(self.token_ids), counts.shape[1]))
        np.add.at(total, self.keys >> 32, counts)
        key = _key(place, document)
        pair = np.minimum(np.searchsorted(self.keys, key), max(0, len(self.keys) - 1))
        own = counts[pair] * (self.keys[pair] == key)[:, None] if len(self.keys) else 0  # a document that is not kept
        others = total[place] - own
        made = others.sum(axis=1, keepdims=True)
        return np.divide(others, made, out=np.full(others.shape, np.nan), where=made > 0)


def word_pattern(word: str) -> re.Pattern[bytes]:
    """Matches a word in UTF-8 bytes where no word character stands beside it.

    What stands before it is looked at last: a pattern that begins with its letters is found several times as fast.

    Raises:
        ValueError: The word is empty.
    """
    if not word.strip():
        raise ValueError("a word must hold something besides spaces")
    letter = rb"[0-9A-Za-z_\x80-\xff]"  # a byte of a non-ASCII character counts as a letter
    text = re.escape(word.strip().encode())
    return re.compile(text + rb"(?<!" + letter + text + rb")(?!" + letter + rb")")


INDENTATION_PATTERN = re.compile(rb"\n([ \t]+)(?=[^ \t\r\n])")
"""Its group is the indentation; a line break stands before each document, too."""


@dataclass
class WordCounter(Counter[WordOccurrences]):
    """The counter that finds words, by their patterns, and the choices of their tokens.

    Attributes:
        found: For each part, by its first document, the occurrences of each word.
    """

    name, result_type, reads_tokens = "words", WordOccurrences, True

    patterns: Mapping[str, re.Pattern[bytes]]
    layers: tuple[Layer, ...]
    pieces: Pieces
    found: dict[int, list[Occurrences]] = field(default_factory=dict)
    _rows: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=list)
    _choices: list[list[NDArray[np.int32]]] = field(default_factory=list)

    @classmethod
    def need(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> None:
        """Refuse a trace without text, or without the order of the choices; and an empty word."""
        for word in options.words or ():
            word_pattern(word)
        trace.need_text(layer.layer for layer in layers)

    @classmethod
    def prepare(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> Callable[[], Self]:
        """What makes empty counters."""
        words = (*WORDS, INDENTATION) if options.words is None else options.words
        patterns = {word: INDENTATION_PATTERN if word == INDENTATION else word_pattern(word) for word in words}
        pieces = Pieces.of(trace.vocabulary)
        return lambda: cls(patterns, tuple(layers), pieces)

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Find the words in a part, and take the choices of the layers of `group`."""
        if group[0] == self.layers[0]:
            self._find(part)
        for (rows, _), choices in zip(self._rows, self._choices, strict=True):
            choices += [part.expert_ids[layer.layer][rows, 0].astype(np.int32) for layer in group]
        if group[-1] == self.layers[-1]:
            layers = tuple(layer.layer for layer in self.layers)
            self.found[int(part.document[0])] = [
                Occurrences(
                    word, layers, occurrence, part.document[rows].astype(np.int64),
                    part.token_id[rows].astype(np.int64), np.stack(choices),
                )
                for word, (rows, occurrence), choices in zip(self.patterns, self._rows, self._choices, strict=True)
            ]  # fmt: skip

    def _find(self, part: Part) -> None:
        """The rows of each word's tokens in a part, and the occurrence of each."""
        starts_D = part.document_starts()
        text_B, first_T = self.pieces.join(self.pieces.places(part.token_id), starts_D)
        text, ends_T = text_B.tobytes(), first_T[1:]
        bounds = [*(first_T[starts_D[:-1]] - 1).tolist(), len(text)]
        self._rows = []
        for pattern in self.patterns.values():
            spans = [match.span(pattern.groups) for a, b in pairwise(bounds) for match in pattern.finditer(text, a, b)]
            self._rows.append(_span_tokens(ends_T, np.array(spans, np.int64).reshape(-1, 2)))
        self._choices = [[] for _ in self.patterns]

    def merge(self, other: Self) -> None:
        """Add what was found in other parts, in place."""
        self.found |= other.found

    def result(self) -> WordOccurrences:
        """What was found, in the order of the documents whatever the order of the parts."""
        layers = tuple(layer.layer for layer in self.layers)
        parts = [self.found[document] for document in sorted(self.found)]
        return WordOccurrences(
            self.layers,
            {word: _joined(word, layers, [part[n] for part in parts]) for n, word in enumerate(self.patterns)},
        )


def _span_tokens(ends: NDArray[np.int64], spans: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tokens that overlap the byte spans, and the span of each: the first that it overlaps."""
    first = np.searchsorted(ends, spans[:, 0], side="right")
    last = np.searchsorted(ends, spans[:, 1], side="left")
    first[1:] = np.maximum(first[1:], last[:-1] + 1)
    lengths = np.maximum(last - first + 1, 0)
    number = np.repeat(np.arange(len(spans)), lengths)
    rows = np.arange(len(number)) + np.repeat(first - (np.cumsum(lengths) - lengths), lengths)
    return rows, np.unique(number, return_inverse=True)[1].astype(np.int64)


def _joined(name: str, layers: tuple[int, ...], pieces: Sequence[Occurrences]) -> Occurrences:
    """The occurrences of several parts, one after the other."""
    before = np.cumsum([0, *(int(piece.occurrence.max(initial=-1)) + 1 for piece in pieces)])
    none = np.zeros(0, np.int64)
    return Occurrences(
        name,
        layers,
        np.concatenate([none, *(piece.occurrence + first for piece, first in zip(pieces, before, strict=False))]),
        np.concatenate([none, *(piece.document for piece in pieces)]),
        np.concatenate([none, *(piece.token_id for piece in pieces)]),
        np.concatenate([np.zeros((len(layers), 0), np.int32), *(piece.first_choice for piece in pieces)], axis=1),
    )


def _in_order(word: Occurrences) -> Occurrences:
    """The same by document, so that it does not matter which of two was added to which."""
    order = np.argsort(word.document, kind="stable")
    occurrence = np.cumsum(np.diff(word.occurrence[order], prepend=-1) != 0) - 1
    return Occurrences(
        word.name, word.layers, occurrence, word.document[order], word.token_id[order], word.first_choice[:, order]
    )


def _key(place: NDArray[np.int64], document: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    return (place.astype(np.int64) << 32) | document.astype(np.int64)
