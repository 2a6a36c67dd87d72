"""Text to ids and back to bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny import TEXT, byte_level_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from moescope.engines.transformers import tokenizer as ours
from moescope.errors import TokenizerMissing

BYTE_LEVEL = ours.Tokenizer(byte_level_tokenizer())
BYTE_LEVEL_VOCABULARY = BYTE_LEVEL.vocabulary()


def llama_like() -> Any:
    """A BPE with ``▁`` for spaces and a byte for what it does not know, as in Llama 2 and Mixtral."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "c",
        "▁a",
        "▁ab",
        "bc",
    ]
    merges = [("▁", "a"), ("▁a", "b"), ("b", "c")]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_pieces_of_a_byte_level_tokenizer_join_to_the_text(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    assert b"".join(BYTE_LEVEL_VOCABULARY.piece(token_id) for token_id in ids) == text.encode()


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), min_size=1))
def test_the_pieces_of_a_sentencepiece_tokenizer_join_to_the_text_after_its_space(text: str) -> None:
    tokenizer = ours.Tokenizer(llama_like())
    vocabulary = tokenizer.vocabulary()
    assert b"".join(vocabulary.piece(token_id) for token_id in tokenizer.encode(text)) == b" " + text.encode()


def test_pieces_without_a_known_decoder_are_what_the_tokenizer_decodes() -> None:
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "you": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = ours.Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert words.vocabulary().pieces == {0: b"hello", 1: b"you", 2: b"<unk>"}


def test_an_added_token_is_its_text_also_beyond_ascii() -> None:
    fast = byte_level_tokenizer()
    fast.add_tokens([AddedToken("Ġé€", normalized=False)])
    tokenizer = ours.Tokenizer(fast)
    assert tokenizer.vocabulary().text(tokenizer.encode("xĠé€")) == "xĠé€"


def test_special_tokens_in_a_text_are_only_text() -> None:
    ids = BYTE_LEVEL.encode("<s> and <s>")
    assert 0 not in ids
    assert BYTE_LEVEL_VOCABULARY.text(ids) == "<s> and <s>"


@pytest.mark.parametrize(("bos", "added"), [(False, ()), (True, (0,))])
def test_what_the_tokenizer_puts_in_front_is_found(bos: bool, added: tuple[int, ...]) -> None:
    tokenizer = ours.Tokenizer(byte_level_tokenizer(bos=bos))
    assert tokenizer.added_ids == added
    assert 0 not in tokenizer.encode(TEXT)


def test_a_lone_surrogate_is_read_as_the_replacement_character() -> None:
    assert BYTE_LEVEL_VOCABULARY.text(BYTE_LEVEL.encode("a\ud800b")) == "a\ufffdb"


def test_nul_and_control_characters_are_text() -> None:
    text = "a\0b\x1b[31m\u202e"
    assert BYTE_LEVEL_VOCABULARY.text(BYTE_LEVEL.encode(text)) == text


def test_the_fingerprint_ignores_how_the_tokenizer_was_used_and_knows_another_vocabulary() -> None:
    used, other = byte_level_tokenizer(), byte_level_tokenizer()
    used(["a b c"], max_length=2, truncation=True)  # leaves traces in the backend
    other.add_tokens(["new"])
    fingerprints = [ours.Tokenizer(each).description()["fingerprint"] for each in (byte_level_tokenizer(), used, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_a_user_can_go_on_with_the_tokenizer_as_before() -> None:
    fast = byte_level_tokenizer(bos=True)
    before = fast("<s> a")["input_ids"]
    ours.Tokenizer(fast).encode("<s> a")
    assert fast("<s> a")["input_ids"] == before


def test_a_folder_without_tokenizer_files_has_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerMissing, match="no tokenizer files"):
        ours.Tokenizer.load(tmp_path)


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerMissing, match="cannot be loaded"):
        ours.Tokenizer.load(tmp_path)
