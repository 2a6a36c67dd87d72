"""Layer by layer: the same trace as in memory, each byte of a checkpoint read once, and no family guessed at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moescope.recording import record

from .conftest import byte_level_tokenizer, some_documents
from .families import FAMILIES, tiny_model


def save(model: Any, folder: Path, tokenizer: Any | None = None, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    (tokenizer or byte_level_tokenizer(bos=True)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_trace_is_that_of_the_road_in_memory_to_the_byte(family: str, tmp_path: Path) -> None:
    folder = save(tiny_model(family), tmp_path / "model", max_shard_size="100KB")
    documents = some_documents()
    options: Any = {"window": 40, "part_tokens": 100, "batch_tokens": 90, "weights": True}
    whole = record(folder, documents, tmp_path / "whole.moe", stream=False, **options)
    streamed = record(folder, documents, tmp_path / "streamed.moe", stream=True, **options)
    assert streamed.header.run.pop("road") == "stream"
    assert streamed.header == whole.header
    assert len(whole.parts) > 1
    for left, right in zip(whole.parts, streamed.parts, strict=True):
        assert left.path.read_bytes() == right.path.read_bytes()
    assert streamed.summary == whole.summary
    assert streamed.verify() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "streamed.moe", "whole.moe"]
