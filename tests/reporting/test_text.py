"""Text that is safe to show, and its layout in lines."""

from __future__ import annotations

import io
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from moescope.reporting.documents import (
    RoutedDocument,
    choose_documents,
    example_documents,
    read_chosen,
    read_document,
)
from moescope.reporting.layout import LINE_BREAK, lay_out
from moescope.reporting.numbers import percent
from moescope.reporting.terminal import print_document
from moescope.reporting.visible import decode_pieces, visible
from moescope.trace import Layer

DANGEROUS = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


@given(st.text())
def test_nothing_that_is_shown_can_be_obeyed_or_hide(text):
    assert not any(unicodedata.category(character) in DANGEROUS for character in visible(text))


@given(st.text(alphabet=st.characters(categories=("L", "N", "P", "S", "Zs"))))
def test_what_is_harmless_is_shown_as_it_is(text):
    assert visible(text) == text


@given(st.lists(st.binary(max_size=4), max_size=12))
def test_the_characters_of_the_pieces_join_to_the_text(pieces):
    assert "".join(decode_pieces(pieces)) == b"".join(pieces).decode(errors="replace")
    assert len(decode_pieces(pieces)) == len(pieces)


def test_a_character_cut_by_the_tokenizer_belongs_to_the_piece_with_its_last_byte():
    assert decode_pieces(["中".encode()[:1], "中".encode()[1:2], "中".encode()[2:] + b"!"]) == ["", "", "中!"]


@given(st.lists(st.text(max_size=12), max_size=20), st.integers(2, 30))
def test_lines_keep_to_their_width_and_show_every_token_in_order(texts, width):
    lines = lay_out(texts, width)
    assert all(sum(cell_len(segment.text) for segment in line) <= width for line in lines)
    tokens = [segment.token for line in lines for segment in line]
    assert tokens == sorted(tokens)
    assert set(tokens) == set(range(len(texts)))


@given(st.text(alphabet="ab \n", max_size=60), st.integers(2, 20))
def test_line_breaks_and_indentation_are_kept(text, width):
    lines = lay_out(list(text), width)
    shown = "".join(segment.text for line in lines for segment in line)
    assert shown.replace(LINE_BREAK, "\n") == text
    for line in lines[:-1]:
        ends = line[-1].text.endswith(LINE_BREAK)
        assert ends or sum(cell_len(segment.text) for segment in line) == width


@given(st.floats(0, 1))
def test_a_share_prints_as_zero_or_hundred_only_if_it_is(share):
    assert (percent(share) == "0") == (share == 0)
    assert (percent(share) == "100") == (share == 1)
    assert percent(share) not in ("0.0", "100.0")


@pytest.fixture
def document():
    pieces = [b"if", b" \x1b[31mx", b":\n", "\u202e    ".encode(), b"y\xe4"]
    ids = np.array([[0, 1], [1, 0], [-1, 2], [2, 0], [3, 1]])
    return RoutedDocument(7, "Py\x07", np.arange(5), pieces, {4: ids}, {}, 90)


def printed(document, layers, **options):
    out = io.StringIO()
    print_document(Console(file=out, width=60, **options), document, layers)
    return out.getvalue()


def test_without_colour_the_id_of_the_expert_stands_below_each_token(document):
    assert printed(document, [Layer(4, 3, 2, num_null_experts=1)]) == (
        "document 7, Py␇, 5 of its 90 tokens\n"
        "\n"
        "   if ␛[31mx:↵\n"
        "L4 0 1      –\n"
        "\n"
        "   ⟨U+202E⟩    y�\n"
        "L4 2           3∅\n"
        "\n"
    )


def test_with_colour_each_token_lies_on_the_colour_of_its_first_choice(document):
    out = printed(document, [Layer(4, 4, 2)], force_terminal=True, color_system="truecolor", legacy_windows=False)
    assert "48;2;143;214;252mif\x1b" in out
    assert "48;2;252;182;33m ␛[31mx\x1b" in out
    assert "48;2;241;241;241m:↵\x1b" in out  # dropped: no expert's colour


def test_no_escape_sequence_of_the_text_reaches_the_terminal(document):
    assert "\x1b" not in printed(document, [Layer(4, 4, 2)])
    coloured = printed(document, [Layer(4, 4, 2)], force_terminal=True, color_system="truecolor")
    assert "\x1b[31m" not in coloured
    assert "\u202e" not in coloured
    assert "\x07" not in coloured


def test_layers_stand_side_by_side_in_the_same_lines(mixtral):
    document = read_document(mixtral, 2, [0, 31]).tokens(slice(20))
    lines = printed(document, mixtral.select_layers([0, 31]), force_terminal=True, color_system="truecolor").split("\n")
    assert "layer 0" in lines[2]
    assert "layer 31" in lines[2]
    assert lines[3].count("class") == 2


def test_a_document_that_is_asked_for_is_whole(mixtral):
    document = read_document(mixtral, 5)
    rows = mixtral.document(5)
    assert "".join(document.texts) == mixtral.vocabulary.text(rows.token_id)
    assert set(document.expert_ids) == {layer.layer for layer in mixtral.layers}


def test_the_sample_has_documents_of_every_domain_and_prefers_those_with_the_words(mixtral):
    chosen = choose_documents(mixtral, per_domain=2, most_tokens=30, words=["self"])
    sample = read_chosen(mixtral, chosen, layers=[0], most_tokens=30)
    assert [document.domain for document in sample] == [name for name in mixtral.domains for _ in range(2)]
    assert all(len(document.token_ids) <= 30 for document in sample)
    assert list(sample[0].expert_ids) == [0]
    assert chosen == choose_documents(mixtral, per_domain=2, most_tokens=30, words=["self"])


def test_the_examples_are_one_a_word_and_of_different_domains(mixtral):
    sample = read_chosen(mixtral, choose_documents(mixtral, per_domain=1, words=["self", "Question"]))
    assert [document.domain for document in example_documents(sample, ["self", "Question"])] == [
        "Github",
        "DM Mathematics",
        "ArXiv",
    ]


def test_a_word_is_found_in_the_token_where_it_starts(document):
    assert document.find(["x", "nothing"]) == [1]
