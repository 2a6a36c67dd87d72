"""What a trace on disk says, against what an independent spy saw reach the experts, and against which experts ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model
from tiny import byte_level_tokenizer, some_documents

from moescope.recording import record

WINDOW = 40
SPIED = (
    "mixtral",
    "dbrx",
    "deepseek_v2",
    "deepseek_v4",
    "flex_olmo",
    "gpt_oss",
    "jamba",
    "longcat_flash",
    "nemotron_h",
)
SPIED += ("olmoe", "openai_privacy_filter", "phimoe", "qwen3_5_moe", "qwen3_next")
"""Families whose experts are called with ids and weights; `test_families` has all, and the truth of each."""


@contextmanager
def spied(model: torch.nn.Module) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Replace ``forward`` of what is called ``experts`` by one that notes the two matrices it is given; no hooks."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    blocks = {name: module for name, module in model.named_modules() if name.split(".")[-1] == "experts"}
    for name, module in blocks.items():
        layer = next(int(piece) for piece in name.split(".") if piece.isdecimal())

        def forward(*args: Any, _layer: int = layer, _own: Any = module.forward, **kwargs: Any) -> Any:
            tensors = [*args, *kwargs.values()]
            ids = next(each for each in tensors if each.dtype == torch.int64)
            weights = next(each for each in tensors if each.is_floating_point() and each.shape == ids.shape)
            assert _layer not in seen
            seen[_layer] = ids.clone(), weights.clone()
            return _own(*args, **kwargs)

        module.forward = forward
    try:
        yield seen
    finally:
        for module in blocks.values():
            del module.forward


def what_ran(model: Any, tokenizer: Any, text: str, added: list[int]) -> Iterator[dict[int, list[Any]]]:
    """For each window of a text, run alone: layer -> for each token of the text, its (weight, id) by falling weight."""
    token_ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    size = WINDOW - len(added)
    for start in range(0, len(token_ids), size):
        with spied(model) as seen, torch.no_grad():
            model(input_ids=torch.tensor([added + token_ids[start : start + size]]))
        yield {
            layer: [
                sorted(zip(row_weights, row_ids, strict=True), key=lambda pair: -pair[0])
                for row_ids, row_weights in list(zip(ids.tolist(), weights.tolist(), strict=True))[len(added) :]
            ]
            for layer, (ids, weights) in seen.items()
        }


@pytest.mark.parametrize("family", SPIED)
def test_every_recorded_id_and_weight_is_what_reached_the_experts(family: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(family), byte_level_tokenizer(bos=True)
    model.config._experts_implementation = "eager"
    documents = some_documents([150, 0, 30, 1])
    one_by_one = record((model, tokenizer), documents, tmp_path / "1", window=WINDOW, weights=True, batch_tokens=1)
    together = record((model, tokenizer), documents, tmp_path / "2", window=WINDOW, weights=True)
    num_windows = 0
    for document in documents:
        for sequence, layers in enumerate(what_ran(model, tokenizer, document.text, [0])):
            num_windows += 1
            assert {layer.layer for layer in one_by_one.layers} == set(layers)
            for trace, tolerance in ((one_by_one, 0), (together, 1e-5)):
                part = trace.document(document.number, weights=True)
                rows = part.sequence == sequence
                for layer, pairs in layers.items():
                    truth = np.array(pairs)
                    np.testing.assert_array_equal(part.expert_ids[layer][rows], truth[:, :, 1])
                    np.testing.assert_allclose(part.gate_weights[layer][rows], truth[:, :, 0], rtol=tolerance, atol=0)
    assert num_windows >= 4
    largest = max(part.expert_ids[layer.layer].max() for part in together.iter_parts() for layer in together.layers)
    assert largest >= together.layers[0].num_experts - 3  # the choices are varied enough to prove something


def test_null_experts_keep_ids_after_the_routed_ones(tmp_path: Path) -> None:
    model = tiny_model("longcat_flash")
    trace = record((model, byte_level_tokenizer()), some_documents(), tmp_path / "null.moe")
    ids = np.concatenate([part.expert_ids[0] for part in trace.iter_parts()])
    assert (trace.layers[0].num_experts, trace.layers[0].num_null_experts) == (8, 3)
    assert ids.max() in (8, 9, 10)


@pytest.mark.parametrize(
    ("family", "shared"), [("mixtral", 0), ("deepseek_v2", 2), ("qwen2_moe", 1), ("ernie4_5_moe", 2), ("gpt_oss", 0)]
)
def test_shared_experts_are_counted_and_never_in_the_ids(family: str, shared: int, tmp_path: Path) -> None:
    trace = record((tiny_model(family), byte_level_tokenizer()), some_documents([20]), tmp_path / "shared.moe")
    assert {layer.num_shared_experts for layer in trace.layers} == {shared}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "ernie4_5_moe", "qwen3_next"])
def test_the_recorded_experts_are_those_whose_loss_changes_the_output(family: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(family), byte_level_tokenizer()
    model.config._experts_implementation = "eager"
    documents = some_documents([150])
    trace = record((model, tokenizer), documents, tmp_path / "knocked.moe")
    recorded = trace.document(0)
    token_ids = torch.tensor([tokenizer(documents[0].text, split_special_tokens=True)["input_ids"]])
    for layer in trace.layers:
        experts = model.get_submodule(layer.module)
        block = model.get_submodule(layer.module.rpartition(".")[0])
        kept: list[tuple[Any, Any]] = []
        handle = block.register_forward_pre_hook(
            lambda _, args, kwargs, kept=kept: kept.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            model(input_ids=token_ids)
            handle.remove()
            ((args, kwargs),) = kept
            before = _output(block(*args, **kwargs))
            for expert in range(layer.num_experts):
                saved = {
                    name: p[expert].clone() for name, p in experts.named_parameters() if name.startswith("down_proj")
                }
                for name in saved:
                    experts.get_parameter(name)[expert] = 0
                changed = (_output(block(*args, **kwargs)) != before).any(dim=-1).flatten().numpy()
                for name, value in saved.items():
                    experts.get_parameter(name)[expert] = value
                np.testing.assert_array_equal(changed, (recorded.expert_ids[layer.layer] == expert).any(axis=1))


def _output(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value
