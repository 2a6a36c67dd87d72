"""Attention without the blocks that a mask excludes is torch's own, bit for bit, or it is left to torch."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from tiny import assert_same, some_documents
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as torch_attention

import moescope.engines.transformers.attention as attention
from moescope.engines.options import EngineOptions
from moescope.engines.transformers.attention import SkipMaskedBlocks, masked_spans
from moescope.engines.transformers.model import adopt_model
from moescope.recording import record


def window_mask(length: int, reach: int, sequences: int = 1) -> Tensor:
    """Query i sees the `reach` keys up to itself."""
    back = torch.arange(length)[:, None] - torch.arange(length)
    return ((back >= 0) & (back < reach)).expand(sequences, 1, length, length)


def chunk_mask(length: int, chunk: int) -> Tensor:
    place = torch.arange(length)
    return ((place[:, None] >= place) & (place[:, None] // chunk == place // chunk)).expand(1, 1, length, length)


def tensors(length: int, dtype: torch.dtype, sequences: int = 2, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    query = torch.randn(sequences, 4, length, dim).mul(3).to(dtype)
    key, value = (torch.randn(sequences, 2, length, dim).mul(3).to(dtype) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [513, 545, 600, 768, 1023, 1025, 1536])
@pytest.mark.parametrize("reach", [1, 37, 512])
def test_it_is_torch_s_attention_bit_for_bit(dtype: torch.dtype, length: int, reach: int) -> None:
    query, key, value = tensors(length, dtype)
    mask = window_mask(length, reach, sequences=2)
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    with SkipMaskedBlocks() as mode:
        for _ in range(2):  # the first call is the one that is checked
            found = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
            )
            assert torch.equal(found, expected)
        (same,) = mode._same.values()
        assert same or (dtype == torch.float32 and length % 512 < 64)


def test_chunks_and_gaps_are_masks_as_well() -> None:
    query, key, value = tensors(1500, torch.float32)
    gap = window_mask(1500, 1500).clone()
    gap[..., 1024:, 100:1000] = False
    for mask in (chunk_mask(1500, 512), chunk_mask(1500, 300), gap):
        expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        with SkipMaskedBlocks():
            for _ in range(2):
                found = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
                assert torch.equal(found, expected)


def test_the_spans_are_whole_blocks_that_hold_all_a_query_sees() -> None:
    assert masked_spans(window_mask(1400, 512)) == [(0, 512, 0, 512), (512, 1024, 0, 1024), (1024, 1400, 512, 1400)]
    assert masked_spans(window_mask(2048, 10, sequences=3)) == [
        (0, 512, 0, 512),
        (512, 1024, 0, 1024),
        (1024, 1536, 512, 1536),
        (1536, 2048, 1024, 2048),
    ]
    assert masked_spans(chunk_mask(1024, 512)) == [(0, 512, 0, 512), (512, 1024, 512, 1024)]


def test_what_cannot_be_left_out_is_left_to_torch() -> None:
    assert masked_spans(window_mask(512, 100)) is None  # one block
    assert masked_spans(torch.ones(1, 1, 1024, 1024, dtype=torch.bool)) is None  # sees everything
    assert masked_spans(window_mask(1024, 100)[0]) is None
    assert masked_spans(window_mask(1024, 100).float()) is None
    assert masked_spans(window_mask(1024, 100).repeat(2, 1, 1, 1)) is None  # each sequence might have its own
    blind = window_mask(1024, 100).clone()
    blind[..., 512:, :] = False
    assert masked_spans(blind) is None


def test_shapes_for_which_a_bit_differs_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "masked_spans", lambda mask: [(0, 600, 0, 599), (600, 700, 0, 700)])  # lacks a key
    query, key, value = tensors(700, torch.float32)
    mask = window_mask(700, 512)
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    with SkipMaskedBlocks() as mode:
        for _ in range(3):
            found = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
            assert torch.equal(found, expected)
        assert list(mode._same.values()) == [False]


def test_after_the_block_and_without_a_mask_torch_is_itself() -> None:
    query, key, value = tensors(700, torch.float32)
    with SkipMaskedBlocks() as mode:
        functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        functional.scaled_dot_product_attention(query, key, value, attn_mask=torch.zeros(700, 700), enable_gqa=True)
        assert not mode._same
    functional.scaled_dot_product_attention(query, key, value, attn_mask=window_mask(700, 9), enable_gqa=True)
    assert not mode._same
    assert functional.scaled_dot_product_attention is torch_attention


def test_blocks_may_be_nested_and_other_threads_are_left_alone() -> None:
    query, key, value = tensors(700, torch.float32)

    def attend() -> None:
        functional.scaled_dot_product_attention(query, key, value, attn_mask=window_mask(700, 9), enable_gqa=True)

    with SkipMaskedBlocks() as outer:
        other = threading.Thread(target=attend)
        other.start()
        other.join()
        assert not outer._same
        with SkipMaskedBlocks() as inner:
            attend()
        assert inner._same
        assert not outer._same
        attend()
        assert outer._same
    assert functional.scaled_dot_product_attention is torch_attention


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_model_with_a_sliding_window_makes_the_same_choices_in_less_attention(
    family: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, sliding_window=200, max_position_embeddings=2048, num_hidden_layers=2)
    documents = some_documents([2600, 1400])
    documents = [type(each)(each.number, each.domain, each.text * 3) for each in documents]
    computed: list[int] = []
    whole_spans = attention.masked_spans

    def spy(mask: Tensor) -> Any:
        spans = whole_spans(mask)
        computed.append(sum((end - start) * (high - low) for start, end, low, high in spans or []))
        return spans

    monkeypatch.setattr(attention, "masked_spans", spy)
    faster = record((model, tokenizer), documents, tmp_path / "faster.moe", weights=True)
    assert adopt_model(model, tokenizer, EngineOptions()).masks_blocks(2048) is bool(computed)
    monkeypatch.setattr("moescope.engines.transformers.model.Model.masks_blocks", lambda *_: False)
    plain = record((model, tokenizer), documents, tmp_path / "plain.moe", weights=True)
    assert_same(faster, plain)
    if family == "mixtral":
        assert any(computed)


@pytest.mark.parametrize(
    ("changes", "window", "masks"),
    [
        ({"sliding_window": 100}, 200, True),
        ({"sliding_window": 100}, 100, False),
        ({"sliding_window": None}, 200, False),
        ({"sliding_window": 100, "attn_implementation": "eager"}, 200, False),
    ],
)
def test_only_a_sliding_window_shorter_than_ours_is_worth_it(
    changes: dict[str, Any], window: int, masks: bool, tokenizer: Any
) -> None:
    model = tiny_model("mixtral", **changes)
    assert adopt_model(model, tokenizer, EngineOptions()).masks_blocks(window) is masks
