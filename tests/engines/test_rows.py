"""Linear layers over filled rows are torch's own, bit for bit, or they are left to torch."""

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
from torch.nn.functional import linear as torch_linear

import moescope.engines.transformers.rows as rows
from moescope.engines.transformers.rows import FillRows
from moescope.recording import record


def tensors(num_rows: int, width: int = 96, out: int = 160) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(num_rows)
    return tuple(torch.randn(shape).bfloat16() for shape in ((num_rows, width), (out, width), (out,)))  # type: ignore[return-value]


@pytest.mark.parametrize("bias", [False, True])
def test_rows_filled_up_give_the_same_bits(bias: bool) -> None:
    with FillRows() as filling:
        for num_rows in (1, 63, 64, 65, 100, 127, 129, 200, 333, 500, 641, 1000):
            inputs, weight, shift = tensors(num_rows)
            arguments = (inputs, weight, shift) if bias else (inputs, weight)
            found = functional.linear(*arguments)
            assert torch.equal(found, torch_linear(*arguments))
            assert found.shape == (num_rows, 160)
        assert filling._checked.total() == rows.CHECKED
        assert not filling._differs


def test_a_shape_for_which_a_bit_differs_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "pad", lambda tensor, _: tensor + 1)
    inputs, weight, _ = tensors(100)
    with FillRows() as filling:
        for _ in range(rows.CHECKED + 2):
            assert torch.equal(functional.linear(inputs, weight), torch_linear(inputs, weight))
        assert filling._differs == {weight.shape}


def test_other_types_other_threads_and_later_calls_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "pad", lambda *_: pytest.fail("filled up"))
    inputs, weight, shift = tensors(100)
    failed: list[BaseException] = []

    def elsewhere() -> None:
        try:
            functional.linear(inputs, weight)
        except BaseException as error:
            failed.append(error)

    with FillRows():
        functional.linear(inputs.float(), weight.float())
        functional.linear(inputs[None], weight)
        functional.linear(inputs[:50], weight)
        functional.linear(inputs, weight, bias=shift)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    functional.linear(inputs, weight)
    assert functional.linear is torch_linear
    assert not failed


def test_a_bfloat16_model_makes_the_same_choices(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("mixtral", max_position_embeddings=2048).bfloat16()
    documents = some_documents([900, 500, 300])
    filled: list[int] = []
    pad = rows.pad
    monkeypatch.setattr(rows, "pad", lambda *args: filled.append(1) or pad(*args))
    faster = record((model, tokenizer), documents, tmp_path / "faster.moe", weights=True)
    assert filled
    monkeypatch.setattr(rows, "ROWS", 1)
    plain = record((model, tokenizer), documents, tmp_path / "plain.moe", weights=True)
    assert_same(faster, plain)
