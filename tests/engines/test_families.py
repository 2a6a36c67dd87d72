"""Every family of the installed transformers that routes, recorded and compared with which experts really ran.

The truth is a knock-out, which looks at no router and no index: zero what one expert gives back, run the block again on
the same inputs, and the tokens whose output changes are those that the expert served. With all experts made alike, the
size of the change is the gate weight times what any of them makes of the token.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, NOT_ROUTED, families_in, installed_families, tiny_model
from tiny import byte_level_tokenizer, some_documents
from torch import Tensor, nn

from moescope.engines.transformers.routers import num_layers, text_tower
from moescope.recording import record
from moescope.trace import Layer, Part, Trace

DOCS = Path(__file__).parents[2] / "docs"
SHARED = {
    "doge": 1,  # a dense block inside, no field says so
    "flint": 1,
    "granitemoe_swa": 1,
    "granitemoehybrid": 1,
    "granitemoeshared": 1,
    "hunyuan_v1_moe": 1,
    "kolibri1": 1,
    "laguna": 1,
    "llama4": 1,
    "minimax_m3_vl": 1,
    "qwen2_moe": 1,
    "qwen3_5_moe": 1,
    "qwen3_next": 1,
    "qwen4_exp": 1,
    "step3p7": 1,
}
"""Shared experts of the families whose configuration does not count them (it gives a size, or nothing)."""


def test_every_family_that_transformers_has_is_in_the_list_of_those_that_are_checked() -> None:
    installed = installed_families()
    new = sorted(folder for folder, family in installed.items() if family not in FAMILIES)
    assert not new, f"new families in transformers: {new}; add each to FAMILIES (or, with the reason, to NOT_ROUTED)"
    gone = sorted(FAMILIES.keys() - set(installed.values()))
    assert not gone, f"families that this transformers does not have: {gone}"
    folders = {path.name for path in (Path(transformers.__file__).parent / "models").iterdir()}
    assert NOT_ROUTED.keys() <= folders


def test_a_new_family_would_be_found(tmp_path: Path) -> None:
    for name, source in {
        "calls_experts": "self.mlp = Mlp()\nout = self.experts(hidden, ids, weights)",
        "decorates_experts": "@use_experts_implementation\nclass Feed(nn.Module):",
        "retrieves": "class NewCDMoE(nn.Module):",
        "scores": "class NewTopKRouter(nn.Linear):",
        "dense": "self.mlp = NewMLP(config)",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"modeling_{name}.py").write_text(source)
    assert [*families_in(tmp_path)] == ["calls_experts", "decorates_experts", "retrieves", "scores"]


def test_the_page_of_supported_models_says_what_is_checked() -> None:
    script = importlib.util.spec_from_file_location("make_models_page", DOCS / "make_models_page.py")
    assert script is not None
    assert script.loader is not None
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    stale = "docs/reference/models.md is stale: python docs/make_models_page.py"
    assert (DOCS / "reference" / "models.md").read_text(encoding="utf-8") == module.page(), stale
    assert (DOCS.parent / "README.md").read_text(encoding="utf-8") == module.readme(), stale


@pytest.mark.parametrize("family", FAMILIES)
def test_every_recorded_id_and_weight_is_that_of_the_experts_that_ran(family: str, tmp_path: Path) -> None:
    for block in ("mlp", "attention") if family == "jetmoe" else ("mlp",):
        model, tokenizer = tiny_model(family), byte_level_tokenizer(bos=True)
        documents = some_documents([60, 45])
        with warns_of_what_runs(family):
            trace = record((model, tokenizer), documents, tmp_path / block, weights=True, block=block)
        body = text_tower(model.base_model)
        check_metadata(family, body.config, trace)
        varied: set[tuple[int, ...]] = set()
        for document in documents:
            part = trace.document(document.number, weights=True)
            with torch.no_grad():
                for layer, truth in knock_out(copy.deepcopy(body), trace, [0, *part.token_id.tolist()]):
                    compare(layer, part, truth)
            varied |= {tuple(sorted(row)) for layer in trace.layers for row in part.expert_ids[layer.layer].tolist()}
        check_what_no_expert_served(family, trace)
        assert len(varied) >= (2 if family == "nllb-moe" else 6), "the choices are too alike to prove anything"


def warns_of_what_runs(family: str) -> Any:
    return pytest.warns(UserWarning, match="what ran") if family == "nllb-moe" else nullcontext()


def check_what_no_expert_served(family: str, trace: Trace) -> None:
    """Where assignments can be dropped or run nothing, some are and some are not."""
    ids = np.concatenate([part.expert_ids[each.layer] for part in trace.iter_parts() for each in trace.layers])
    (num_experts,) = {layer.num_experts for layer in trace.layers}
    assert (0 < (ids == -1).mean() < 1) == trace.layers[0].drops
    assert (0 < (ids >= num_experts).mean() < 1) == bool(trace.layers[0].num_null_experts)
    if family == "nllb-moe":
        assert {*np.unique(ids).tolist()} == {-1, 0, 1}


def check_metadata(family: str, config: Any, trace: Trace) -> None:
    """Experts, top-k, shared experts and layers as the configuration counts them."""
    text = config if config.is_encoder_decoder else config.get_text_config()
    text = getattr(text, "ffn_config", text)  # DBRX

    def number(*names: str) -> int | None:
        return next((found for name in names if (found := getattr(text, name, None)) is not None), None)

    num_experts = number("n_routed_experts", "num_local_experts", "moe_num_experts", "num_experts")
    top_k = {"switch_transformers": 1, "nllb-moe": 2}.get(family) or number(
        "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k"
    )
    shared = SHARED.get(family)
    if shared is None:
        shared = number("n_shared_experts", "num_shared_experts", "moe_num_shared_experts") or 0
    for layer in trace.layers:
        found = (layer.num_experts, layer.top_k, layer.num_shared_experts)
        assert found == (num_experts, top_k, shared), layer
        assert layer.num_null_experts == {"longcat_flash": 3, "zaya": 1}.get(family, 0)
        assert layer.drops == (family in ("nllb-moe", "switch_transformers"))
    if isinstance(kinds := getattr(text, "mlp_layer_types", None), list):
        assert [layer.layer for layer in trace.layers] == [at for at, kind in enumerate(kinds) if kind != "dense"]
    count = trace.header.model["num_layers"]
    assert count == num_layers(config)
    assert count is None or max(layer.layer for layer in trace.layers) < count


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers", "doge"])
def test_windows_share_a_forward_pass_only_where_that_changes_no_choice(family: str, tmp_path: Path) -> None:
    model, passes = tiny_model(family), []
    model.register_forward_pre_hook(lambda _, args, kwargs: passes.append(kwargs), with_kwargs=True)
    trace = record((model, byte_level_tokenizer()), some_documents([40, 20, 40, 30, 7]), tmp_path / "t", window=16)
    del passes[0]  # the probe
    most = max(len(kwargs["input_ids"]) for kwargs in passes)
    num_padding = sum(kwargs["input_ids"].numel() for kwargs in passes) - trace.num_tokens
    if family == "mixtral":
        assert most > 1
        assert num_padding > 0
    else:
        assert (most > 1) == (family == "switch_transformers")  # equal lengths
        assert num_padding == 0
        assert not any("attention_mask" in kwargs for kwargs in passes)


@dataclass
class Truth:
    """What a knock-out says of one layer, over the tokens that were run.

    Attributes:
        served: Whether each expert served each token, shape (token, expert).
        weights: With which weight, shape (token, expert).
        null: Weight of all null experts of a token together, shape (token,).
        absolute: Whether the weights are exact, and not only up to a factor a token.
    """

    served: np.ndarray
    weights: np.ndarray
    null: np.ndarray
    absolute: bool


def knock_out(model: Any, trace: Trace, token_ids: list[int]) -> Iterator[tuple[Layer, Truth]]:
    """For each layer of a trace, over some tokens run alone: which experts served them, with which weights."""
    inputs = {"input_ids": torch.tensor([token_ids])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[getattr(model.config, "decoder_start_token_id", 0), *token_ids]])
    modules = {layer: (model.get_submodule(layer.module), model.get_submodule(_block(layer))) for layer in trace.layers}
    calls: dict[nn.Module, Any] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, a, k: calls.__setitem__(m, (a, k)), with_kwargs=True)
        for pair in modules.values()
        for module in pair
    ]
    model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    for layer, (holder, block) in modules.items():
        num_rows = len(token_ids) + ("decoder." in layer.module)

        def run(*, inner: bool, block: Any = block, holder: Any = holder, num_rows: int = num_rows) -> Tensor:
            """Output of the experts alone, or of the block with what comes after them, shape (token, number)."""
            seen = []
            handle = holder.register_forward_hook(lambda _, args, output: seen.append(output))
            args, kwargs = calls[block]
            kwargs = {name: value for name, value in kwargs.items() if name != "past_key_values"}  # it has grown
            output = block(*args, **kwargs)
            handle.remove()
            output = seen[0] if inner and seen else output
            output = (output[0] if isinstance(output, tuple) else output).clone()
            return output.view(-1, num_rows, output.shape[-1]).sum(0) if inner else output.reshape(num_rows, -1)

        before = run(inner=False)
        served = np.zeros((num_rows, layer.num_experts), bool)
        for expert in range(layer.num_experts):
            with silenced(holder, [expert]):
                served[:, expert] = (run(inner=False) != before).any(dim=1).numpy()
        alike(holder, layer.num_experts)
        before = run(inner=True)
        changes = torch.empty(layer.num_experts, *before.shape)
        for expert in range(layer.num_experts):
            with silenced(holder, [expert]):
                changes[expert] = before - run(inner=True)
        with silenced(holder, range(layer.num_experts)):
            nothing = run(inner=True)
        alone = by_itself(holder, calls.get(holder), calls[block], num_rows)
        one = changes.sum(0) if alone is None else alone
        norm = one.double().square().sum(1, keepdim=True).clamp_min(1e-30)  # 0 if all choices of a token are dropped
        weights = torch.einsum("eth,th->te", changes.double(), one.double()) / norm
        null = torch.zeros(num_rows)
        if layer.num_null_experts and holder in calls:
            hidden = calls[holder][0][0]
            null = (nothing * hidden).sum(1) / hidden.square().sum(1)
        yield layer, Truth(served, weights.numpy(), null.numpy(), alone is not None)


def _block(layer: Layer) -> str:
    """Path of the module that is run again: the one that holds router and experts."""
    parent = layer.module.rpartition(".")[0]
    return layer.module if parent.rpartition(".")[2].isdecimal() and layer.module.endswith("mlp") else parent


def by_itself(holder: Any, call: Any, block_call: Any, num_rows: int) -> Tensor | None:
    """What an expert makes of each token with weight 1; None where an expert cannot be called by itself."""
    kind = type(holder).__name__
    if call is None or kind in ("NllbMoeExperts", "JetMoeMoE", "DogeCDMoE"):
        return None
    if kind == "Llama4TextExperts":  # the experts are linear by now, see `alike`
        hidden = block_call[0][0].reshape(num_rows, -1)
        return holder(hidden.repeat(holder.num_experts, 1)).view(holder.num_experts, num_rows, -1)[0]
    hidden = call[0][0]
    if kind == "SwitchTransformersExperts":
        first = nn.functional.one_hot(torch.zeros(num_rows, 1, dtype=torch.int64), holder.num_experts)
        return holder(hidden, first, torch.ones(num_rows, 1))
    ids, weights = torch.tensor([[0, 1]]).repeat(num_rows, 1), torch.tensor([[1.0, 0.0]]).repeat(num_rows, 1)
    return holder(hidden, ids, weights).reshape(num_rows, -1)


def of_expert(holder: Any, expert: int, *, down: bool) -> list[Tensor]:
    """Views of the weights of one expert, or only of those that make what it gives back."""
    if isinstance(holder, nn.ModuleDict):
        pairs = holder[f"expert_{expert}"].named_parameters()
        return [value for name, value in pairs if not down or name.startswith(("wo.", "fc2."))]
    pattern = r"(.*\.)?(down_proj(_bias)?|w2)|output_linear\.weight|up_embed\.weight"
    if not down:
        pattern += r"|(.*\.)?((gate_)?up_proj(_bias)?|w1|v1)|input_linear\.weight|down_embed\.weight"
    found = [value for name, value in holder.named_parameters() if re.fullmatch(pattern, name)]
    assert found, [name for name, _ in holder.named_parameters()]
    return [
        (value.view(8, -1, value.shape[-1]) if type(holder).__name__ == "DbrxExperts" else value)[expert]
        for value in found
    ]


@contextmanager
def silenced(holder: Any, experts: Iterable[int]) -> Iterator[None]:
    """Experts that give nothing back while the block lasts."""
    views = [view for expert in experts for view in of_expert(holder, expert, down=True)]
    kept = [view.clone() for view in views]
    for view in views:
        view.zero_()
    yield
    for view, value in zip(views, kept, strict=True):
        view.copy_(value)


def alike(holder: Any, num_experts: int) -> None:
    """Make every expert of a layer like its first; and Llama 4's linear, since their weight scales the input."""
    firsts = of_expert(holder, 0, down=False)
    for expert in range(1, num_experts):
        for view, first in zip(of_expert(holder, expert, down=False), firsts, strict=True):
            view.copy_(first)
    if type(holder).__name__ == "Llama4TextExperts":
        holder.act_fn = Ones()


class Ones(nn.Module):
    def forward(self, gate: Tensor) -> Tensor:
        return torch.ones_like(gate)


def compare(layer: Layer, part: Part, truth: Truth) -> None:
    """Recorded ids and weights of one layer against the truth, to the last id."""
    served, weights, null = truth.served, truth.weights, truth.null
    ids, gates = part.expert_ids[layer.layer], part.gate_weights[layer.layer]
    start = len(served) - len(ids)  # the added token, and a decoder's start token
    found, found_weights = np.zeros(served.shape, bool)[start:], np.zeros(weights.shape)[start:]
    null_weights = np.zeros(len(ids))
    for row, (row_ids, row_gates) in enumerate(zip(ids.tolist(), gates.tolist(), strict=True)):
        assert row_gates == sorted(row_gates, reverse=True)
        assert len({each for each in row_ids if each >= 0}) == sum(each >= 0 for each in row_ids)
        for expert, gate in zip(row_ids, row_gates, strict=True):
            if 0 <= expert < layer.num_experts:
                found[row, expert], found_weights[row, expert] = True, gate
            elif expert >= layer.num_experts:
                null_weights[row] += gate
            else:
                assert gate == 0
    np.testing.assert_array_equal(found, served[start:])
    if not truth.absolute:
        found_weights = found_weights / np.maximum(found_weights.sum(axis=1, keepdims=True), 1e-30)
    np.testing.assert_allclose(found_weights, weights[start:], rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(null_weights, null[start:], rtol=2e-3, atol=2e-5)
