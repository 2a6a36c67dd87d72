"""Parts, windows and batches: every token exactly once, in its row."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moescope.corpus import Document
from moescope.engines.transformers.batches import batches
from moescope.recording.portions import num_characters, portions, summed, windows


def encode(text: str) -> np.ndarray:
    """A character a token; NUL yields none."""
    return np.array([ord(character) for character in text if character != "\0"], np.uint32)


def documents(texts: list[str], max_tokens: int | None = None) -> list[Document]:
    return [Document(number, "a domain", text, max_tokens) for number, text in enumerate(texts)]


@given(
    st.lists(st.text(st.characters(max_codepoint=127), max_size=40), max_size=12),
    st.integers(1, 60),
    st.integers(1, 12),
    st.integers(0, 2),
    st.integers(1, 50),
)
def test_every_token_is_fed_once_and_lands_in_its_row(
    texts: list[str], part_tokens: int, length: int, num_added: int, batch_tokens: int
) -> None:
    added_ids = [1000 + place for place in range(num_added)]
    read = 0
    for portion in portions(documents(texts), encode, part_tokens):
        read += portion.num_read
        flat = np.concatenate([encode(""), *(token_ids for _, token_ids in portion.documents)])
        assert portion.num_tokens == len(flat)
        found = np.zeros(len(flat), int)
        sequences = [window.token_ids for window in windows(portion, length)]
        for batch in batches(sequences, added_ids, batch_tokens):
            np.testing.assert_array_equal(batch.input_ids.ravel()[batch.places], flat[batch.rows])
            assert (batch.input_ids[:, :num_added] == added_ids).all()
            found[batch.rows] += 1
            real = np.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
            assert real.sum() == len(batch.rows) + num_added * len(batch.input_ids)
            assert (np.diff(real, axis=1) <= 0).all()  # padding is on the right only
            assert batch.input_ids.size <= max(batch_tokens, length + num_added)
        assert (found == 1).all()
    assert read == len(texts)


def test_a_part_ends_with_the_document_that_fills_it() -> None:
    sizes = [
        [len(ids) for _, ids in part.documents]
        for part in portions(documents(["a" * 3, "b" * 4, "c" * 9, "d"]), encode, 5)
    ]
    assert sizes == [[3, 4], [9], [1]]


def test_empty_documents_are_counted_in_the_part_they_come_before() -> None:
    found = [
        (part.num_read, len(part.documents)) for part in portions(documents(["", "abc", "\0", "", "d", ""]), encode, 3)
    ]
    assert found == [(2, 1), (4, 1)]


def test_only_the_last_portion_can_be_without_a_token_and_notes_add_up() -> None:
    parts = list(portions(documents(["", "abc", "d", "efg", ""]), encode, 3))
    assert [len(part.documents) for part in parts] == [1, 2, 0]
    notes = [part.note() for part in parts]
    assert summed(notes) == {"documents_read": 5, "documents_empty": 2, "tokens": 7, "characters": 7}
    assert summed([]) == dict.fromkeys(notes[0], 0)


def test_a_long_document_becomes_consecutive_windows() -> None:
    (portion,) = portions(documents(["ab", "abcdefg"]), encode, 100)
    cut = [(window.sequence, bytes(window.token_ids.tolist())) for window in windows(portion, 3)]
    assert cut == [(0, b"ab"), (0, b"abc"), (1, b"def"), (2, b"g")]


def test_windows_of_equal_length_are_not_padded_and_need_no_mask() -> None:
    (portion,) = portions(documents(["abcd", "efgh", "ij"]), encode, 100)
    first, second = batches([window.token_ids for window in windows(portion, 4)], [], 8)
    assert first.attention_mask is None
    assert first.input_ids.shape == (2, 4)
    assert second.attention_mask is None


def test_a_document_with_a_limit_is_cut_there() -> None:
    (portion,) = portions(documents(["abcdefgh"], max_tokens=3), encode, 100)
    assert portion.documents[0][1].tolist() == list(b"abc")
    assert portion.num_characters == num_characters(documents(["abcdefgh"], max_tokens=3)[0], encode) == 3
