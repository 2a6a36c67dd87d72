"""A tokenizer, documents, helpers and fixtures for the tests that run a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moescope.corpus import Document
from moescope.trace import Trace

transformers.utils.logging.set_verbosity_error()  # the fallbacks of tiny models are none of our news

TEXT = "def self(x): return self.x + 1\n    if the cat sat on the mat, then the answer is 42. Grüße, 東京! <s> "


def byte_level_tokenizer(*, bos: bool = False) -> Any:
    """A byte-level BPE of some 300 ids; with `bos`, it puts ``<s>`` in front as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def some_documents(lengths: list[int] | None = None) -> list[Document]:
    """Documents of different lengths in three domains; number 3 is empty, number 4 is one character."""
    lengths = [90, 400, 7, 0, 1, 230, 90, 33] if lengths is None else lengths
    return [
        Document(number, ("Github", "ArXiv", "DM Mathematics")[number % 3], (TEXT[number % 7 :] * 9)[:length])
        for number, length in enumerate(lengths)
    ]


def columns(trace: Trace) -> dict[str, np.ndarray]:
    """Every column of a trace, over its parts."""
    weights = trace.header.weights
    parts = list(trace.iter_parts(weights=weights))
    found = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("document", "domain", "sequence", "position", "token_id")
    }
    for layer in trace.layers:
        found[f"L{layer.layer}"] = np.concatenate([part.expert_ids[layer.layer] for part in parts])
        if weights:
            found[f"W{layer.layer}"] = np.concatenate([part.gate_weights[layer.layer] for part in parts])
    return found


def assert_same(left: Trace, right: Trace, rtol: float = 0) -> None:
    assert left.domains == right.domains
    found, expected = columns(left), columns(right)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=rtol if name[0] == "W" else 0, atol=0, err_msg=name)


@pytest.fixture
def tokenizer() -> Any:
    return byte_level_tokenizer()


@pytest.fixture
def bos_tokenizer() -> Any:
    return byte_level_tokenizer(bos=True)


@pytest.fixture
def documents() -> list[Document]:
    return some_documents()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Saves a model and a tokenizer as a checkpoint of transformers."""

    def save(model: Any, tokenizer: Any | None = None, name: str = "checkpoint") -> Path:
        folder = tmp_path / name
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    return save
