"""Where words and indentation occur in a trace, as spans of tokens with their first choices.

The unit is the occurrence: a match of a pattern in the text of a document, and every token that overlaps it. The text
is rebuilt from the vocabulary's bytes, so no tokenizer is needed and any way of cutting words into tokens works.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace import Part, Trace

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
class TokenChoices:
    """First choices of every token whose id occurs in some pattern, counted by document.

    Attributes:
        token_ids: The ids, ascending, shape (id,).
        keys: Place in `token_ids` and document, packed as ``place << 32 | document``, ascending, shape (pair,).
        counts: First choices of the tokens with that id in that document, shape (layer, pair, expert).
    """

    token_ids: NDArray[np.int64]
    keys: NDArray[np.int64]
    counts: NDArray[np.int32]

    def elsewhere(
        self, layer_index: int, token_id: NDArray[np.int64], document: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """How tokens with these ids choose in all other documents, so that no occurrence predicts itself.

        Args:
            layer_index: Place of the layer in `counts`.
            token_id: Ids among `token_ids`, shape (token,).
            document: Document to leave out for each, shape (token,).
        Returns:
            Share of each first choice, shape (token, expert); NaN where no other document holds the id.
        """
        place = np.searchsorted(self.token_ids, token_id)
        counts = self.counts[layer_index]
        total = np.zeros((len(self.token_ids), counts.shape[1]))
        np.add.at(total, self.keys >> 32, counts)
        others = total[place] - counts[np.searchsorted(self.keys, _key(place, document))]
        made = others.sum(axis=1, keepdims=True)
        return np.divide(others, made, out=np.full(others.shape, np.nan), where=made > 0)


def word_pattern(word: str) -> re.Pattern[bytes]:
    """Matches a word in UTF-8 bytes where no word character stands beside it.

    Raises:
        ValueError: The word is empty.
    """
    if not word.strip():
        raise ValueError("a word must hold something besides spaces")
    letter = rb"[0-9A-Za-z_\x80-\xff]"  # a byte of a non-ASCII character counts as a letter
    return re.compile(rb"(?<!" + letter + rb")" + re.escape(word.strip().encode()) + rb"(?!" + letter + rb")")


INDENTATION_PATTERN = re.compile(rb"(?:^|(?<=\n))[ \t]+(?=[^ \t\r\n])")


def find_occurrences(
    trace: Trace, words: Sequence[str], *, indentation: bool = False, layers: Iterable[int] | None = None
) -> tuple[list[Occurrences], TokenChoices]:
    """Find words, and indentation, in a trace; two passes over its tokens, a part at a time.

    Args:
        trace: The trace.
        words: Words to find, matched as whole words and with their case.
        indentation: Find the indentation of lines, too.
        layers: Layers to read, or None for all.
    Returns:
        The occurrences, a pattern each in the order given, and the choices of all tokens with the ids that occur.
    Raises:
        ValueError: A word is empty.
        NoSuchLayer: A layer was not recorded.
        NotRecorded: The trace has no token ids, or does not say which choice is the first.
    """
    trace.need_text(layers)
    patterns = [(word, word_pattern(word)) for word in words]
    patterns += [(INDENTATION, INDENTATION_PATTERN)] if indentation else []
    chosen = tuple(layer.layer for layer in trace.select_layers(layers))
    found: list[list[Occurrences]] = [[] for _ in patterns]
    piece = trace.vocabulary.piece
    for part in trace.iter_parts(chosen):
        for start, end in pairwise(part.document_starts().tolist()):
            pieces = [piece(token_id) for token_id in part.token_id[start:end].tolist()]
            ends = np.cumsum([len(p) for p in pieces])
            text = b"".join(pieces)
            for into, (name, pattern) in zip(found, patterns, strict=True):
                spans = [match.span() for match in pattern.finditer(text)]
                if spans:
                    into.append(_span_tokens(name, chosen, part, start, ends, np.array(spans)))
    occurrences = [_joined(name, chosen, pieces_) for (name, _), pieces_ in zip(patterns, found, strict=True)]
    return occurrences, _count_choices(trace, chosen, occurrences)


def _span_tokens(
    name: str,
    layers: tuple[int, ...],
    part: Part,
    start: int,
    ends: NDArray[np.int64],
    spans: NDArray[np.int64],
) -> Occurrences:
    """The tokens of a document that overlap the byte spans; a token belongs to the first span it overlaps."""
    first = np.searchsorted(ends, spans[:, 0], side="right")
    last = np.searchsorted(ends, spans[:, 1], side="left")
    first[1:] = np.maximum(first[1:], last[:-1] + 1)
    rows = np.concatenate([np.arange(a, b + 1) for a, b in zip(first.tolist(), last.tolist(), strict=True)])
    occurrence = np.repeat(np.arange(len(spans)), np.maximum(last - first + 1, 0))
    rows += start
    choices = np.stack([part.expert_ids[layer][rows, 0] for layer in layers]).astype(np.int32)
    return Occurrences(
        name, layers, occurrence, part.document[rows].astype(np.int64), part.token_id[rows].astype(np.int64), choices
    )


def _joined(name: str, layers: tuple[int, ...], pieces: list[Occurrences]) -> Occurrences:
    if not pieces:
        none = np.zeros(0, np.int64)
        return Occurrences(name, layers, none, none, none, np.zeros((len(layers), 0), np.int32))
    offset, numbers = 0, []
    for piece in pieces:
        _, within = np.unique(piece.occurrence, return_inverse=True)
        numbers.append(within + offset)
        offset += int(within.max(initial=-1)) + 1
    return Occurrences(
        name,
        layers,
        np.concatenate(numbers),
        np.concatenate([piece.document for piece in pieces]),
        np.concatenate([piece.token_id for piece in pieces]),
        np.concatenate([piece.first_choice for piece in pieces], axis=1),
    )


def _count_choices(trace: Trace, layers: tuple[int, ...], occurrences: list[Occurrences]) -> TokenChoices:
    token_ids = np.unique(np.concatenate([np.zeros(0, np.int64), *(o.token_id for o in occurrences)]))
    num_ids = max(layer.num_ids for layer in trace.select_layers(layers))
    keys, counts = [np.zeros(0, np.int64)], [np.zeros((len(layers), 0, num_ids), np.int32)]
    for part in trace.iter_parts(layers):
        kept = np.flatnonzero(np.isin(part.token_id, token_ids))
        place = np.searchsorted(token_ids, part.token_id[kept])
        key, inverse = np.unique(_key(place, part.document[kept]), return_inverse=True)
        count = np.zeros((len(layers), len(key), num_ids), np.int32)
        for at, layer in enumerate(layers):
            choice = part.expert_ids[layer][kept, 0].astype(np.int64)
            made = choice >= 0
            cells = np.bincount(inverse[made] * num_ids + choice[made], minlength=count[at].size)
            count[at] = cells.reshape(count[at].shape)
        keys.append(key)
        counts.append(count)
    merged = np.concatenate(keys)
    order = np.argsort(merged, kind="stable")
    return TokenChoices(token_ids, merged[order], np.concatenate(counts, axis=1)[:, order])


def _key(place: NDArray[np.int64], document: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    return (place.astype(np.int64) << 32) | document.astype(np.int64)
