"""Loading a checkpoint, finding its experts, and refusing what cannot be recorded exactly."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import tiny_model

from moescope.engines.options import EngineOptions
from moescope.engines.transformers.hooks import RouterWatch
from moescope.engines.transformers.model import adopt_model, checkpoint_fingerprint, load_model, probe, ready_to_record
from moescope.engines.transformers.routers import find_experts, select_experts
from moescope.errors import (
    ModelDamaged,
    ModelNotFound,
    ModelNotMoE,
    ModelUnsupported,
    NoSuchLayer,
    RouterSilent,
    TokenizerMissing,
)

Save = Callable[..., Path]


def load(path: Path, layers: list[int] | None = None, dtype: str = "auto") -> Any:
    return load_model(path, EngineOptions(layers=layers, dtype=dtype, device="cpu"))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "jamba", "qwen3_next"])
def test_a_checkpoint_loads_without_its_head_and_with_its_weights(
    family: str, checkpoint: Save, tokenizer: Any
) -> None:
    causal = tiny_model(family, causal=True)
    loaded = load(checkpoint(causal, tokenizer))
    assert not hasattr(loaded.body, "lm_head")
    expected = causal.base_model.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in loaded.body.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    for name, tensor in loaded.body.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert loaded.description["family"] == family
    assert loaded.description["name"] == "checkpoint"


def test_the_dtype_is_that_of_the_checkpoint_unless_another_is_asked_for(checkpoint: Save, tokenizer: Any) -> None:
    folder = checkpoint(tiny_model("mixtral", causal=True).bfloat16(), tokenizer)
    assert load(folder).description["dtype"] == "bfloat16"
    assert load(folder, dtype="float32").description["dtype"] == "float32"


def test_a_dense_model_is_refused_before_its_weights_are_read(checkpoint: Save, tokenizer: Any) -> None:
    config = transformers.LlamaConfig(
        vocab_size=310, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    folder = checkpoint(transformers.LlamaForCausalLM(config), tokenizer)
    (folder / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelNotMoE, match="llama is not a mixture of experts"):
        load(folder)


def test_a_family_unknown_to_transformers_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hypermixtral"}))
    with pytest.raises(ModelUnsupported, match="'hypermixtral' is unknown to transformers"):
        load(tmp_path)


def test_there_may_be_nothing_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such folder") as error:
        load(tmp_path / "nothing")
    assert "never downloads" in str(error.value.hint)


def test_a_folder_without_a_configuration_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"without config\.json"):
        load(tmp_path)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match="is a file"):
        load(tmp_path / "model.gguf")


def test_a_configuration_that_is_no_json_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelDamaged, match=r"config\.json cannot be read"):
        load(tmp_path)


def test_a_checkpoint_without_a_tokenizer_says_so(checkpoint: Save) -> None:
    with pytest.raises(TokenizerMissing, match="no tokenizer files"):
        load(checkpoint(tiny_model("mixtral", causal=True)))


def test_missing_weights_are_an_error_instead_of_random_ones(checkpoint: Save, tokenizer: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = checkpoint(tiny_model("mixtral", causal=True), tokenizer)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.block_sparse_moe.gate.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelDamaged, match=r"1 tensors are missing or misshapen, such as layers\.2\.mlp\.gate"):
        load(folder)


def test_a_truncated_weight_file_is_damaged(checkpoint: Save, tokenizer: Any) -> None:
    folder = checkpoint(tiny_model("mixtral", causal=True), tokenizer)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelDamaged, match="weights cannot be loaded"):
        load(folder)


def test_a_checkpoint_without_weight_files_is_damaged(checkpoint: Save, tokenizer: Any) -> None:
    folder = checkpoint(tiny_model("mixtral", causal=True), tokenizer)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelDamaged, match="weights cannot be loaded"):
        load(folder)


def test_a_layer_that_does_not_exist_or_is_dense_is_named_with_those_that_can_be_recorded(
    checkpoint: Save, tokenizer: Any
) -> None:
    folder = checkpoint(tiny_model("deepseek_v3", causal=True), tokenizer)
    with pytest.raises(NoSuchLayer, match="layer 0 has no routed experts; the layers with routed experts are 1-3"):
        load(folder, [0, 1])
    with pytest.raises(NoSuchLayer, match="there is no layer 4"):
        load(folder, [4])


def test_the_fingerprint_knows_another_value_in_a_weight_also_in_a_large_file(
    checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tiny_model("mixtral", causal=True))
    path = folder / "model.safetensors"
    before = checkpoint_fingerprint(folder)
    assert checkpoint_fingerprint(folder) == before
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert checkpoint_fingerprint(folder) != before
    monkeypatch.setattr("moescope.engines.transformers.provenance.HASHED_WHOLE_BYTES", 0)
    by_blocks = checkpoint_fingerprint(folder)
    path.write_bytes(data)
    assert checkpoint_fingerprint(folder) not in (before, by_blocks)


def test_two_routed_blocks_in_a_layer_are_refused() -> None:
    model = tiny_model("mixtral")
    model.layers[2].second = copy.deepcopy(model.layers[1].mlp.experts)
    with pytest.raises(ModelUnsupported, match="layer 2 has two routed blocks"):
        find_experts(model, "m")


def test_experts_that_are_not_called_with_choices_are_refused() -> None:
    model = tiny_model("mixtral")
    model.layers[2].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    with pytest.raises(ModelUnsupported, match=r"layers\.2\.mlp\.experts holds experts"):
        find_experts(model, "m")


def test_a_configuration_that_counts_experts_where_none_are_found_is_not_called_dense() -> None:
    model = tiny_model("mixtral")
    for layer in model.layers:
        layer.mlp = torch.nn.Identity()
    with pytest.raises(ModelUnsupported, match="num_local_experts = 8, but no module"):
        find_experts(model, "m")


def test_a_share_of_the_experts_is_refused() -> None:
    model = tiny_model("mixtral")
    model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ModelUnsupported, match="only this process's share"):
        find_experts(model, "m")


def test_a_bypassed_experts_module_is_silent_and_named() -> None:
    model = tiny_model("mixtral")
    block = model.layers[2].mlp
    block.forward = lambda hidden: hidden
    with (
        RouterWatch(find_experts(model, "m")) as watch,
        pytest.raises(RouterSilent, match=r"layer 2: layers\.2\.mlp\.experts was called 0 times"),
    ):
        watch.run(model, {"input_ids": torch.ones(1, 5, dtype=torch.int64)})


def test_an_experts_module_that_sees_only_some_tokens_is_named() -> None:
    model = tiny_model("mixtral")
    block, experts = model.layers[1].mlp, model.layers[1].mlp.experts
    whole = block.forward
    block.forward = lambda hidden: whole(hidden[:, :2]).repeat(1, 3, 1)[:, : hidden.shape[1]]
    with RouterWatch(find_experts(model, "m")) as watch, pytest.raises(RouterSilent, match="once with 5"):
        watch.run(model, {"input_ids": torch.ones(1, 5, dtype=torch.int64)})
    assert not experts._forward_pre_hooks


@pytest.mark.parametrize(
    ("ids", "weights"),
    [
        (torch.zeros(5, 2), torch.zeros(5, 2)),  # scores instead of ids
        (torch.zeros(5, 8, dtype=torch.int64), torch.zeros(5, 2)),  # a mask
        (torch.zeros(5, 1, 2, dtype=torch.int64), torch.zeros(5, 1, 2)),
        (torch.zeros(5, 2, dtype=torch.int64), None),
    ],
)
def test_calls_that_are_not_ids_and_weights_are_refused(ids: Any, weights: Any) -> None:
    model = tiny_model("mixtral")
    experts = find_experts(model, "m")[0]
    with (
        RouterWatch([experts]),
        pytest.raises(ModelUnsupported, match=r"layer 0 is called with ids"),
    ):
        experts.module(torch.zeros(5, 32), ids, weights)


def test_an_id_that_no_expert_has_is_an_error() -> None:
    model = tiny_model("mixtral")
    gate = model.layers[1].mlp.gate
    whole = gate.forward

    def forward(hidden: torch.Tensor) -> Any:
        logits, weights, ids = whole(hidden)
        return logits, weights, ids + 1

    gate.forward = forward
    model.layers[1].mlp.experts.forward = lambda hidden, ids, weights: hidden
    with RouterWatch(find_experts(model, "m")) as watch, pytest.raises(ModelUnsupported, match=r"expected 0\.\.7"):
        watch.run(model, {"input_ids": torch.arange(50).unsqueeze(0)})


def test_the_pass_stops_before_the_last_experts_asked_for(tokenizer: Any) -> None:
    model = adopt_model(tiny_model("mixtral"), tokenizer, EngineOptions(layers=[0, 2]))
    layers, stop_at = probe(model)
    assert [layer.layer for layer in layers] == [0, 2]
    assert stop_at == 2
    ran: list[str] = []
    for name in ("layers.1.mlp.experts", "layers.2.mlp.experts", "layers.3.mlp.experts"):
        module = model.body.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with RouterWatch(model.experts, stop_at=stop_at) as watch:
        watch.run(model.body, {"input_ids": torch.ones(1, 5, dtype=torch.int64)})
    assert ran == ["layers.1.mlp.experts"]


def test_modes_and_implementations_are_as_before_also_after_an_error(tokenizer: Any) -> None:
    body = tiny_model("mixtral")
    body.train()
    body.layers[0].eval()
    body.set_experts_implementation("grouped_mm")
    modes = [module.training for module in body.modules()]
    with contextlib.suppress(KeyError), ready_to_record(adopt_model(body, tokenizer, EngineOptions())):
        assert not any(module.training for module in body.modules())
        assert body.config._experts_implementation == "eager"
        raise KeyError
    assert [module.training for module in body.modules()] == modes
    assert body.config._experts_implementation == "grouped_mm"


def test_selecting_no_layers_in_particular_selects_all() -> None:
    experts = find_experts(tiny_model("jamba"), "m")
    assert [each.layer for each in select_experts(experts, None, 4, "m")] == [1, 3]
    assert [each.layer for each in select_experts(experts, [3], 4, "m")] == [3]


class TableExperts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = torch.nn.Parameter(torch.zeros(4, 2, 2))

    def forward(self, hidden: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return hidden


class TableModel(torch.nn.Module):
    """A model whose routing is known: token t goes to experts t, t + 1, t + 2 mod 4 with weights 0.2, 0.6, 0.2."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
        self.layers[1].experts = TableExperts()

    def forward(self, input_ids: Any, use_cache: bool) -> None:
        ids = (input_ids.flatten()[:, None] + torch.arange(3)) % 4
        weights = torch.tensor([0.2, 0.6, 0.2]).expand(len(ids), 3)
        self.layers[1].experts(torch.zeros(len(ids), 2), top_k_weights=weights, top_k_index=ids)


def test_known_routing_is_read_by_keyword_and_ties_keep_the_order_of_the_router() -> None:
    model = TableModel()
    (experts,) = find_experts(model, "m")
    assert (experts.layer, experts.num_experts) == (1, 4)
    with RouterWatch([experts]) as watch:
        choices = watch.run(model, {"input_ids": torch.tensor([[0, 1], [2, 3]])})
    assert choices[1].expert_ids.tolist() == [[1, 0, 2], [2, 1, 3], [3, 2, 0], [0, 3, 1]]
    assert choices[1].gate_weights[0].tolist() == pytest.approx([0.6, 0.2, 0.2])
