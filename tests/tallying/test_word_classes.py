"""Word classes by hand, against a slow reading of the rules, and their counts against a slow loop."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_counts, make_part, make_trace, result_of

from moescope.errors import NotRecorded
from moescope.tallying.document_groups import document_groups
from moescope.tallying.word_class_kernels import FIXED
from moescope.tallying.word_classes import (
    CLASSES,
    KEYWORDS,
    ClassCounter,
    Described,
    token_classes,
)
from moescope.trace import Header, Layer, TraceWriter, Vocabulary, open_trace


def classes_of(*documents: list[bytes]) -> list[list[str]]:
    """Classes of each token of some documents, given as pieces; some ids are far from others."""
    tokens = [piece for document in documents for piece in document]
    vocabulary = Vocabulary({3 * at + 1: piece for at, piece in enumerate(tokens)})
    starts = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
    bits = token_classes(Described.of(vocabulary), 3 * np.arange(len(tokens)) + 1, starts)
    return [[name for at, name in enumerate(CLASSES) if of >> at & 1] for of in bits.tolist()]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"x", b"\n", b"    ", b"y"], [[], ["newline"], ["indentation"], []]),
        ([b"\n    ", b"y"], [["indentation", "newline"], []]),
        ([b"\n", b"   ", b" y"], [["newline"], ["indentation"], []]),  # " y" is more than white space
        ([b"x", b"   ", b"y"], [[], [], []]),  # spaces, but not at the start of a line
        ([b"    ", b"\n", b"y"], [[], ["newline"], []]),  # an empty line has no indentation
        ([b"    ", b"y"], [["indentation"], []]),  # the first line of a document
        ([b"1", b" 23", b"x", b"4"], [["digits"], ["digits"], [], ["digits"]]),
        ([b"x1"], [[]]),
        ([b"):", b" =", "—".encode(), b"a."], [["punctuation"], ["punctuation"], ["punctuation"], []]),
        ([b" "], [[]]),
        ([b"The", b" Cat", b"s"], [["capitalised"], ["capitalised"], ["continuation"]]),
        ([b"Mc", b"Donald"], [["capitalised"], ["continuation"]]),  # within a word
        (["“".encode(), b"He", b"llo"], [["punctuation"], ["capitalised"], ["continuation"]]),
        ([b"caf", b"\xc3", b"\xa9", b"s"], [[], *[["continuation"]] * 3]),  # half a character counts as a letter
        (["É".encode(), "té".encode()], [["capitalised"], ["continuation"]]),
        ([b"def", b" x"], [["keyword"], []]),
        ([b" re", b"turn", b"("], [["keyword"], ["keyword", "continuation"], ["punctuation"]]),
        ([b"un", b"def"], [[], ["continuation"]]),  # only whole words
        ([b"_", b"def"], [["punctuation"], []]),
        ([b"def", b"_"], [[], ["punctuation"]]),
        ([b"\\", b"frac", b"{", b"x"], [["punctuation", "command"], ["command"], ["punctuation"], []]),
        ([b"\\", b"n"], [["punctuation"], []]),  # one letter is more often an escape than a command
        ([b"", b"x"], [[], []]),
    ],
)
def test_what_a_token_is_follows_from_its_text_and_its_neighbours(
    pieces: list[bytes], expected: list[list[str]]
) -> None:
    assert classes_of(pieces) == expected


def test_documents_do_not_touch() -> None:
    assert classes_of([b"re"], [b"turn"]) == [[], []]
    assert classes_of([b"caf"], [b"es"]) == [[], []]
    assert classes_of([b"\\"], [b"frac"]) == [["punctuation"], []]
    assert classes_of([b"x"], [b"  ", b"y"]) == [[], ["indentation"], []]


def test_small_words_of_english_are_no_keywords() -> None:
    assert classes_of([b"for", b" in", b" is"]) == [[], [], []]
    assert {"def", "return", "None"} < set(KEYWORDS)


def test_an_id_that_the_vocabulary_lacks_is_of_no_class() -> None:
    for vocabulary in (Vocabulary.from_pieces([b"def"]), Vocabulary({7: b"def"}), Vocabulary({})):
        bits = token_classes(Described.of(vocabulary), np.array([5, 2**32 - 1]), np.array([0, 2]))
        assert bits.tolist() == [0, 0]


def slow_classes(pieces: list[bytes]) -> list[set[str]]:
    """The rules read out one by one, for pieces that are whole characters."""
    texts = [piece.decode() for piece in pieces]
    whole = "".join(texts)
    found = []
    at = 0
    for number, text in enumerate(texts):
        of: set[str] = set()
        end = at + len(text)
        blank = text != "" and text.strip() == ""
        if blank and ("\n" in text or "\r" in text):
            of.add("newline")
        for a in range(len(whole)):  # runs of spaces and tabs at the start of a line that holds something else
            if a == 0 or whole[a - 1] == "\n":
                b = a
                while b < len(whole) and whole[b] in " \t":
                    b += 1
                if blank and a < b < len(whole) and whole[b] not in "\r\n" and max(a, at) < min(b, end):
                    of.add("indentation")
        bare = text.lstrip(" ")
        if bare.isdigit():
            of.add("digits")
        if bare and not blank and all(unicodedata.category(c)[0] in "PS" for c in bare):
            of.add("punctuation")
        before = texts[number - 1][-1:] if number else ""
        if text[:1].isalpha() and before.isalpha():
            of.add("continuation")
        if bare[:1].isupper() and (text != bare or not before.isalpha()):
            of.add("capitalised")
        for word in KEYWORDS:
            for a in range(len(whole) - len(word) + 1):
                b = a + len(word)
                alone = not (a and (whole[a - 1].isalnum() or whole[a - 1] == "_"))
                alone &= not (b < len(whole) and (whole[b].isalnum() or whole[b] == "_"))
                if whole[a:b] == word and alone and max(a, at) < min(b, end):
                    of.add("keyword")
        for a in range(len(whole)):
            b = a + 1
            while b < len(whole) and whole[b].isascii() and whole[b].isalpha():
                b += 1
            if whole[a] == "\\" and b - a > 2 and max(a, at) < min(b, end):
                of.add("command")
        found.append(of)
        at = end
    return found


PIECES = [
    "def",
    " return",
    "re",
    "turn",
    "\n",
    "  ",
    "\t",
    "\\",
    "frac",
    "Aa",
    " B",
    "c",
    "1",
    "_",
    ".",
    "(",
    "\n ",
    "\r\n",
    "x y",
    "",
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=12))
def test_classes_equal_a_slow_reading_of_the_rules(texts: list[str]) -> None:
    pieces = [text.encode() for text in texts]
    assert [set(of) for of in classes_of(pieces)] == slow_classes(pieces)


LAYERS = (Layer(0, 8, 2), Layer(3, 20, 4, num_null_experts=2))


@pytest.mark.parametrize("choice", ["first", "all"])
@pytest.mark.parametrize("threads", [1, 2])
def test_counts_equal_a_slow_loop(tmp_path: Path, choice: str, threads: int) -> None:
    rng = np.random.default_rng(0)
    parts = [
        make_part(rng, LAYERS, [30, 1, 17], dropped=0.2),
        make_part(rng, LAYERS, [50, 4], first_document=3, dropped=0.2),
    ]
    pieces = [b"def", b" the", b"\n", b"    ", b"Foo", b"bar", b" 12", b".", b"\\", b"alpha"] * 5
    header = Header(tuple(Layer(**{**vars(layer), "drops": True}) for layer in LAYERS))
    vocabulary = Vocabulary.from_pieces(pieces)
    with TraceWriter(tmp_path / "t.moe", header, vocabulary) as writer:
        for part in parts:
            writer.write(part, {})
        writer.finish({})
    trace = open_trace(tmp_path / "t.moe")
    counts = result_of(ClassCounter, trace, choice=choice, threads=threads)
    expected = np.zeros(counts.expected_LXCE.shape)
    exact, totals = np.zeros_like(counts.counts_LXCE), np.zeros_like(counts.totals_LCE)
    tokens, documents = np.zeros(9, int), np.zeros(9, int)
    for part in parts:
        for document in np.unique(part.document):
            rows = np.flatnonzero(part.document == document)
            of = slow_classes([pieces[i] for i in part.token_id[rows]])
            group = int(document_groups(np.array([document]))[0])
            tokens[8] += len(rows)
            documents[8] += 1
            for c, name in enumerate(CLASSES):
                inside = np.array([name in classes for classes in of])
                tokens[c] += inside.sum()
                documents[c] += inside.any()
                for at, layer in enumerate(LAYERS):
                    ids = part.expert_ids[layer.layer][rows][:, : 1 if choice == "first" else None]
                    own, other = (ids[where][ids[where] >= 0] for where in (inside, ~inside))
                    y = np.bincount(own, minlength=totals.shape[2])
                    totals[at, c] += y
                    if len(own) and len(other):
                        exact[at, group, c] += y
                        expected[at, group, c] += len(own) * np.bincount(other, minlength=len(y)) / len(other)
            for at, layer in enumerate(LAYERS):
                ids = part.expert_ids[layer.layer][rows][:, : 1 if choice == "first" else None]
                totals[at, 8] += np.bincount(ids[ids >= 0], minlength=totals.shape[2])
    np.testing.assert_array_equal(counts.counts_LXCE, exact)
    np.testing.assert_allclose(counts.expected_LXCE / FIXED, expected, atol=1e-4)
    np.testing.assert_array_equal(counts.totals_LCE, totals)
    np.testing.assert_array_equal(counts.tokens_C, tokens)
    np.testing.assert_array_equal(counts.documents_C, documents)


def test_what_has_no_text_or_no_first_choice_is_refused(tmp_path: Path) -> None:
    part = make_part(np.random.default_rng(0), LAYERS, [20])
    with pytest.raises(NotRecorded, match="token ids"):
        result_of(ClassCounter, make_trace(tmp_path / "a.moe", [part], LAYERS, token_ids=False))
    unranked = tuple(
        Layer(layer.layer, layer.num_experts, layer.top_k, ranked=False, num_null_experts=2) for layer in LAYERS
    )
    trace = make_trace(tmp_path / "b.moe", [part], unranked)
    with pytest.raises(NotRecorded, match="the first"):
        result_of(ClassCounter, trace)
    assert result_of(ClassCounter, trace, choice="all").totals_LCE[0, -1].sum() == 40
    with pytest.raises(NotRecorded, match="no token"):
        result_of(ClassCounter, make_counts(tmp_path / "c.moe", {0: {0: {1: 5}}}))
    with pytest.raises(ValueError, match="'second'"):
        result_of(ClassCounter, trace, choice="second")
