"""Models that moescope does not know: routers that a user names, and code that a checkpoint brings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from families import tiny_config, tiny_model
from safetensors.torch import save_file
from tiny import byte_level_tokenizer, some_documents
from torch import nn
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

import moescope
from moescope.cli import main
from moescope.engines.options import EngineOptions
from moescope.engines.transformers.hooks import RouterWatch
from moescope.engines.transformers.model import adopt_model, load_model
from moescope.engines.transformers.routers import find_experts, given_experts
from moescope.errors import ModelUnsupported


class Reusing(nn.Module):
    """A router that answers from one buffer, as kernels with a workspace do; `made` keeps what it chose."""

    buffer: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, made: list[torch.Tensor]) -> None:
        super().__init__()
        self.gate, self.made = nn.Linear(16, 8), made

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = self.gate(hidden).softmax(-1).topk(2)
        self.made.append(ids)
        if Reusing.buffer is None or Reusing.buffer[0].shape != ids.shape:
            Reusing.buffer = ids.clone(), weights.clone()
        for into, new in zip(Reusing.buffer, (ids, weights), strict=True):
            into.copy_(new)
        return Reusing.buffer


def test_a_router_that_answers_from_one_buffer_is_noted_layer_by_layer() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made: list[torch.Tensor] = []
            self.embed = nn.Embedding(400, 16)
            self.routers = nn.ModuleList(Reusing(self.made) for _ in range(3))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(input_ids).view(-1, 16)
            for router in self.routers:
                ids, weights = router(hidden)
                hidden = hidden + ids.float() @ weights.T.float() @ hidden / len(hidden)
            return hidden

    torch.manual_seed(0)
    body = Body()
    named = [moescope.Router(f"routers.{at}", lambda args, kwargs, output: output, num_experts=8) for at in range(3)]
    with RouterWatch(given_experts(body, named)) as watch:
        found = watch.run(body, {"input_ids": torch.arange(30)[None]})
    for at, ids in enumerate(body.made):
        assert (found[at].expert_ids == ids.numpy()).all()


HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "add-a-router.md"
Save = Callable[..., Path]


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL)


def the_model_of_the_page() -> tuple[Any, dict[str, Any]]:
    names: dict[str, Any] = {}
    exec(examples()[0], names)
    torch.manual_seed(0)
    return names["Model"](vocab_size=320), names


def test_the_example_of_the_page_records_the_experts_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, names = the_model_of_the_page()
    names.update(model=model, tokenizer=byte_level_tokenizer(bos=True), documents=some_documents([60, 45, 60, 300]))
    exec(examples()[1], names)
    trace = names["trace"]
    assert {(each.num_experts, each.top_k, each.num_shared_experts) for each in trace.layers} == {(4, 2, 1)}
    assert trace.header.model["family"] == "custom"
    seen = set()
    for document in names["documents"]:
        part = trace.document(document.number, weights=True)
        ids = torch.tensor([[0, *part.token_id.tolist()]])
        for layer in trace.layers:
            for expert in range(4):
                block, calls = model.blocks[layer.layer], []
                handle = block.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0]))
                with torch.no_grad():
                    model(input_ids=ids)
                    handle.remove()
                    before = block(calls[0])
                    kept = {name: value.clone() for name, value in block.experts[expert].state_dict().items()}
                    for value in block.experts[expert].parameters():
                        value.zero_()
                    changed = (block(calls[0]) != before).any(dim=-1)[0, 1:].numpy()
                    block.experts[expert].load_state_dict(kept)
                np.testing.assert_array_equal(changed, (part.expert_ids[layer.layer] == expert).any(axis=1))
                seen.add((expert, bool(changed.any())))
    assert len([expert for expert, served in seen if served]) == 4


def test_the_other_example_of_the_page_is_a_router() -> None:
    model, _ = the_model_of_the_page()
    router = eval(examples()[2])
    (experts,) = given_experts(model, [router])
    assert (experts.layer, experts.num_experts, experts.router) == (0, 4, None)
    assert experts.called is model.blocks[0].experts


def read_scores(args: Any, kwargs: Any, output: Any) -> Any:
    weights, ids = output.flatten(0, 1).softmax(dim=-1).topk(2)
    return ids, weights


@pytest.mark.parametrize(
    ("routers", "problem"),
    [
        ([moescope.Router("blocks.7.scorer", read_scores, 4)], "no module 'blocks.7.scorer'"),
        ([moescope.Router("embed", read_scores, 4)], "embed is in no numbered layer"),
        ([moescope.Router("blocks.1.scorer", read_scores, 4)] * 2, "layer 1 has two routers"),
        ([], "at least one router"),
    ],
)
def test_routers_that_are_not_in_the_model_are_a_wrong_argument(routers: Any, problem: str, tmp_path: Path) -> None:
    model, _ = the_model_of_the_page()
    with pytest.raises(ValueError, match=problem):
        moescope.record((model, byte_level_tokenizer()), some_documents([9]), tmp_path / "t", routers=routers)


def test_a_router_has_experts_and_known_words() -> None:
    with pytest.raises(ValueError, match="at least one expert"):
        moescope.Router("blocks.0.scorer", read_scores, 0)
    with pytest.raises(ValueError, match="at is 'output' or 'call'"):
        moescope.Router("blocks.0.scorer", read_scores, 4, at="input")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "read",
    [
        lambda args, kwargs, output: output[7],
        lambda args, kwargs, output: (output, output),
        lambda args, kwargs, output: None,
        lambda args, kwargs, output: (output.topk(2).indices, output.topk(2).values),  # not flattened
    ],
)
def test_a_reading_that_gives_no_choices_is_named_with_what_it_gave(read: Any, tmp_path: Path) -> None:
    model, _ = the_model_of_the_page()
    router = moescope.Router("blocks.2.scorer", read, 4)
    with pytest.raises(ModelUnsupported, match=r"blocks\.2\.scorer: layer 2 is called"):
        moescope.record((model, byte_level_tokenizer()), some_documents([9]), tmp_path / "t", routers=[router])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_user_s_layer_may_drop_and_choose_nothing(tmp_path: Path) -> None:
    model, _ = the_model_of_the_page()

    def read(args: Any, kwargs: Any, output: Any) -> Any:
        rows = len(output.flatten(0, 1))
        ids = torch.tensor([[4, -1, 2]]).repeat(rows, 1)
        return ids, torch.tensor([[0.5, 0.0, 0.7]]).repeat(rows, 1)

    router = moescope.Router("blocks.1.scorer", read, 4, layer=9, num_null_experts=1, drops=True)
    trace = moescope.record((model, byte_level_tokenizer()), some_documents([9]), tmp_path / "t", routers=[router])
    assert trace.document(0).expert_ids[9].tolist() == [[2, 4, -1]] * trace.num_tokens
    assert trace.layers[0].drops


def test_routers_are_for_a_loaded_model_and_blocks_have_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="that you loaded: pass"):
        moescope.record("x", some_documents([9]), tmp_path / "t", routers=[moescope.Router("a.0", read_scores, 4)])
    with pytest.raises(ValueError, match="block is 'mlp' or 'attention'"):
        moescope.record("x", some_documents([9]), tmp_path / "t", block="moe")


def test_a_model_without_routed_attention_says_so(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="mixtral routes no attention blocks, only mlp"):
        moescope.record((tiny_model("mixtral"), tokenizer), some_documents([9]), tmp_path / "t", block="attention")


CODE = """
from transformers import MixtralConfig, MixtralModel, MixtralForCausalLM

class MineConfig(MixtralConfig):
    model_type = "mine"

class MineModel(MixtralModel):
    config_class = MineConfig

class MineForCausalLM(MixtralForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def with_code(checkpoint: Save, tokenizer: Any) -> Path:
    model = tiny_model("mixtral", causal=True)
    folder = checkpoint(model, tokenizer)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})  # as the code names them
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "code.MineConfig", "AutoModelForCausalLM": "code.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE + "\nfrom pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    return folder


def test_code_of_a_checkpoint_is_not_run_unless_it_is_trusted(with_code: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["record", str(with_code), str(HOW_TO.parent), "-o", str(tmp_path / "t")])
    assert result.exit_code == 1
    assert "its family 'mine' is unknown" in result.stderr
    assert "only with --trust-remote-code" in result.stderr
    assert not (with_code / "ran").exists()


def test_code_that_is_trusted_runs_with_a_warning_and_is_recorded_like_any_other(
    with_code: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    documents = some_documents([60, 45])
    with pytest.warns(UserWarning, match=r"code of the checkpoint runs: code\.py"):
        trace = moescope.record(with_code, documents, tmp_path / "t", device="cpu", trust_remote_code=True)
    plain = moescope.record((tiny_model("mixtral", causal=True), tokenizer), documents, tmp_path / "u")
    assert trace.header.model["family"] == "mine"
    for layer in trace.layers:
        for left, right in zip(trace.iter_parts(), plain.iter_parts(), strict=True):
            np.testing.assert_array_equal(left.expert_ids[layer.layer], right.expert_ids[layer.layer])


def test_trusted_code_that_fails_is_named(with_code: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (with_code / "code.py").write_text("raise RuntimeError('boo')")
    with pytest.warns(UserWarning, match="code of the checkpoint"), pytest.raises(ModelUnsupported, match="boo"):
        load_model(with_code, EngineOptions(device="cpu", trust_remote_code=True))


def test_of_an_omni_model_the_thinker_is_recorded_and_the_talker_named(checkpoint: Save, tokenizer: Any) -> None:
    torch.manual_seed(0)
    talker = {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 24}}
    config = tiny_config("qwen3_omni_moe", talker_config=talker, code2wav_config={"decoder_dim": 16})
    whole = transformers.Qwen3OmniMoeForConditionalGeneration(config).eval()
    loaded = load_model(checkpoint(whole, tokenizer), EngineOptions(device="cpu"))
    adopted = adopt_model(whole, tokenizer, EngineOptions())
    for model in (loaded, adopted):
        assert model.description["not_recorded"] == ["talker.model.layers.*.mlp.experts"]
        assert [experts.name for experts in model.experts] == [
            f"language_model.layers.{at}.mlp.experts" for at in range(4)
        ]
        assert model.body.state_dict().keys() == whole.thinker.model.state_dict().keys()
    for name, tensor in loaded.body.state_dict().items():
        assert torch.equal(tensor, whole.thinker.model.state_dict()[name]), name


def test_of_a_model_with_several_towers_those_left_out_are_named(tokenizer: Any, tmp_path: Path) -> None:
    for family, left_out in {
        "dots3_note": ["vision_tower.blocks.*.mlp.experts"],
        "ernie4_5_vl_moe": ["language_model.layers.*.mlp.vision_moe.experts"],
        "diffusion_gemma": ["decoder.layers.*.experts"],
        "jetmoe": ["layers.*.self_attention.experts"],
    }.items():
        trace = moescope.record((tiny_model(family), tokenizer), some_documents([20]), tmp_path / family)
        assert trace.header.model["not_recorded"] == left_out
    assert (
        "not_recorded"
        not in moescope.record(
            (tiny_model("mixtral"), tokenizer), some_documents([20]), tmp_path / "mixtral"
        ).header.model
    )


def test_an_adapter_refuses_a_block_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("nllb-moe")
    monkeypatch.setattr(NllbMoeExperts, "forward", lambda self, hidden, ids, weights: hidden)
    with pytest.raises(ModelUnsupported, match="is not as its adapter knows it: this version of transformers"):
        find_experts(model, "m")
    other = tiny_model("jetmoe")
    other.layers[1].mlp.router.forward = lambda hidden: hidden
    with RouterWatch(find_experts(other, "m")) as watch, pytest.raises(ModelUnsupported, match="layer 1 is called, or"):
        watch.run(other, {"input_ids": torch.ones(1, 5, dtype=torch.int64)})


class Gate(nn.Module):
    """Routing that depends on the whole batch, as a model with `batching="alone"` may."""

    def forward(self, hidden: Any) -> Any:
        return (hidden.sum() * torch.arange(1, 9) * 1e3).sin().expand(*hidden.shape[:2], 8)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gates = nn.Embedding(320, 4), nn.ModuleList([Gate()])

    def forward(self, input_ids: Any) -> Any:
        return self.gates[0](self.embed(input_ids))


def test_sequences_run_alone_where_a_batch_decides(tmp_path: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    model, documents = Odd(), some_documents([40, 40, 40])
    router = moescope.Router("gates.0", read_scores, 8, batching="alone")
    together = moescope.record((model, tokenizer), documents, tmp_path / "t", routers=[router])
    for document in documents:
        (single,) = moescope.record(
            (model, tokenizer), [document], tmp_path / f"{document.number}", routers=[router]
        ).iter_parts()
        np.testing.assert_array_equal(together.document(document.number).expert_ids[0], single.expert_ids[0])
