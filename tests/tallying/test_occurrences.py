"""Occurrences of words against a slow search of each document's text, byte by byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from synthetic import make_part

from moescope.tallying.occurrences import INDENTATION, INDENTATION_PATTERN, WordCounter, word_pattern
from moescope.tallying.text import Pieces
from moescope.trace import Layer, Vocabulary

PIECES = [b"a", b"b", b"ab", b" a", b"\n", b"\r", b"  ", b"\t", b"", b".", b"a\nb", b"\xc3", b"\xa9"]
WORDS = ["a", "ab", "aba", "a\nb", ".a", "\u00e9", "7"]


def slow_spans(text: bytes, name: str) -> list[tuple[int, int]]:
    """Bytes of each occurrence, from the left, none inside another."""
    if name == INDENTATION:
        spans, start = [], 0
        for line in text.split(b"\n"):
            length = len(line) - len(line.lstrip(b" \t"))
            if length and line[length : length + 1] not in (b"", b"\r"):
                spans.append((start, start + length))
            start += len(line) + 1
        return spans

    def is_letter(byte: bytes) -> bool:
        return byte != b"" and (byte.isalnum() or byte == b"_" or byte >= b"\x80")

    word, spans, start = name.encode(), [], 0
    while start < len(text):
        end = start + len(word)
        before = text[start - 1 : start] if start else b""
        if text[start:end] == word and not is_letter(before) and not is_letter(text[end : end + 1]):
            spans.append((start, end))
            start = end
        else:
            start += 1
    return spans


def slow_rows(documents: list[list[int]], name: str) -> list[tuple[int, int]]:
    """Each token of an occurrence with the number of the first that it overlaps, those without a token not counted."""
    rows, number, row = [], -1, 0
    for document in documents:
        pieces = [PIECES[token_id] if token_id < len(PIECES) else b"\0" for token_id in document]
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        taken: set[int] = set()
        for start, end in slow_spans(b"".join(pieces), name):
            tokens = [
                t for t, last in enumerate(ends) if t not in taken and last > start and last - len(pieces[t]) < end
            ]
            inside = list(range(min(tokens), max(tokens) + 1)) if tokens else []  # empty pieces within it, too
            number += bool(inside)
            rows += [(row + t, number) for t in inside]
            taken |= set(inside)
        row += len(document)
    return rows


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.lists(st.integers(0, len(PIECES)), min_size=1, max_size=12), min_size=1, max_size=5))
@example([[0], [10]])  # "a" and "a\nb": the break between documents is no part of a word
@example([[6, 0, 4, 6, 4, 7, 5, 4, 3], [7, 13, 0]])
@example([[0, 9, 0, 8, 8, 9], [8, 0]])
def test_words_are_found_as_by_a_slow_search(documents: list[list[int]]) -> None:
    token_id = np.concatenate([np.array(document) for document in documents])
    layer = Layer(0, num_experts=64, top_k=1)
    part = replace(
        make_part(np.random.default_rng(0), (layer,), [len(document) for document in documents]),
        token_id=token_id.astype(np.uint32),
        expert_ids={0: np.arange(len(token_id))[:, None]},
    )
    patterns = {word: word_pattern(word) for word in WORDS} | {INDENTATION: INDENTATION_PATTERN}
    counter = WordCounter(patterns, (layer,), Pieces.of(Vocabulary.from_pieces(PIECES)))
    counter.add(part, [layer])
    for name, word in counter.result().of_word.items():
        expected = slow_rows(documents, name)
        assert list(zip(word.first_choice[0].tolist(), word.occurrence.tolist(), strict=True)) == expected, name
