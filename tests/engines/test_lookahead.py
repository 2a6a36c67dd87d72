"""Lookahead: what is recorded is what the next layers' routers say of this layer's hidden states, and nothing else."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import tiny_model
from tiny import byte_level_tokenizer, some_documents
from torch import nn

import moescope
from moescope import mini
from moescope.cli import main
from moescope.engines.options import EngineOptions
from moescope.engines.transformers.hooks import RouterWatch
from moescope.engines.transformers.model import adopt_model, probe_lookahead
from moescope.errors import ModelNotStreamable, ModelUnsupported, NoSuchLayer, RouterSilent, TraceMismatch
from moescope.recording import record
from moescope.trace import Trace, open_trace

ASKED = (
    "mixtral",
    "afmoe",
    "minimax_m2",
    "jetmoe",
    "deepseek_v3",
    "gpt_oss",
    "gemma4",
    "llama4",
    "longcat_flash",
    "nemotron_h",
    "olmoe",
    "qwen3_next",
)
REFUSED = {
    "dbrx": "no module gives the ids",
    "doge": "no module gives the ids",
    "deepseek_v4": "called with more than hidden states",
    "switch_transformers": "capacity drops assignments",
    "zaya": "no module gives the ids",
}


def columns(trace: Trace, prefix: str) -> dict[str, np.ndarray]:
    """All columns of a kind, tokens in the order of the corpus."""
    found: dict[str, list[np.ndarray]] = {}
    for part in trace.iter_parts(weights=trace.header.weights, predictions=True):
        of = {"L": part.expert_ids, "W": part.gate_weights, "P": part.predictions}[prefix]
        for key, values in of.items():
            found.setdefault(str(key), []).append(values)
    return {key: np.concatenate(values) for key, values in found.items()}


@contextmanager
def router_inputs(model: nn.Module, names: dict[int, str]) -> Iterator[dict[int, torch.Tensor]]:
    """Replace ``forward`` of routers by one that notes what it is given; no hooks."""
    seen: dict[int, torch.Tensor] = {}
    routers = {layer: model.get_submodule(name) for layer, name in names.items()}
    for layer, router in routers.items():

        def forward(hidden: Any, *rest: Any, _layer: int = layer, _own: Any = router.forward) -> Any:
            seen[_layer] = hidden.clone()
            return _own(hidden, *rest)

        router.forward = forward
    try:
        yield seen
    finally:
        for router in routers.values():
            del router.forward


def test_a_prediction_is_the_later_gate_applied_to_the_earlier_hidden_states(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("mixtral"), byte_level_tokenizer(bos=True)
    documents = some_documents([130, 0, 61, 1])
    trace = record((model, tokenizer), documents, tmp_path / "t", window=40, lookahead=(2, 1, 3), batch_tokens=120)
    assert trace.header.lookahead == (1, 2, 3)
    assert [layer.lookahead for layer in trace.layers] == [(), (1,), (1, 2), (1, 2, 3)]
    assert [layer.num_predicted for layer in trace.layers] == [0, 8, 8, 8]
    assert trace.verify() == []
    names = {layer: f"layers.{layer}.mlp.gate" for layer in range(4)}
    for document in documents:
        if not document.text:
            continue
        part = next(p for p in trace.iter_parts(predictions=True))
        part = part.rows(part.document == document.number)
        for sequence in np.unique(part.sequence):
            rows = part.rows(part.sequence == sequence)
            with router_inputs(model.base_model, names) as seen, torch.no_grad():
                model(input_ids=torch.tensor([[0, *rows.token_id.tolist()]]))
            for target in range(1, 4):
                for distance in range(1, target + 1):
                    hidden = seen[target - distance].reshape(-1, 32)[1:]  # the first is the token that is added
                    gate = model.base_model.get_submodule(names[target]).weight
                    scores = nn.functional.linear(hidden, gate).float().softmax(dim=-1)
                    expected = scores.argsort(dim=1, descending=True, stable=True)
                    np.testing.assert_array_equal(rows.predictions[target, distance], expected.numpy())


@pytest.mark.parametrize("family", ASKED)
def test_looking_ahead_changes_no_choice_and_begins_with_the_routers_own(family: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(family), byte_level_tokenizer()
    documents = some_documents([90, 30, 7])
    plain = record((model, tokenizer), documents, tmp_path / "plain", weights=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    looked = record((model, tokenizer), documents, tmp_path / "looked", weights=True, lookahead=[1])
    for prefix in "LW":
        expected, found = columns(plain, prefix), columns(looked, prefix)
        assert list(expected) == list(found)
        for key in expected:
            np.testing.assert_array_equal(expected[key], found[key])
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert looked.verify() == []
    for (layer, distance), ids in next(looked.iter_parts(predictions=True)).predictions.items():
        described = next(each for each in looked.layers if each.layer == layer)
        assert distance == 1
        assert ids.shape[1] == described.num_predicted >= described.top_k
        assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_a_bias_that_only_chooses_is_in_a_prediction_and_the_longer_list_follows(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    ready = adopt_model(model, byte_level_tokenizer(), EngineOptions())
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias.copy_(torch.randn(8).mul(0.3))
    looking = probe_lookahead(ready, [1])
    assert looking is not None
    for router in looking.routers.values():
        hidden = torch.randn(50, 32)
        with torch.no_grad():
            _, weights, ids = router.module(hidden)
            predicted = router.predict(hidden)
        own = ids.gather(1, weights.sort(dim=1, descending=True).indices)
        assert predicted[:, :2].equal(own)
        assert predicted.shape == (50, 8)
        assert predicted.sort(dim=1).values.equal(torch.arange(8).expand(50, 8))
        naive = nn.functional.linear(hidden, router.module.weight).topk(2).indices
        assert not naive.sort(dim=1).values.equal(own.sort(dim=1).values)
        assert router.module.top_k == 2


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_whose_router_cannot_be_asked_earlier_is_named(family: str, tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match=REFUSED[family]) as error:
        record((tiny_model(family), byte_level_tokenizer()), some_documents([20]), tmp_path / "t", lookahead=[1])
    assert family in str(error.value)
    assert "without --lookahead" in error.value.render()
    assert not (tmp_path / "t" / "trace.json").exists()


class Stops(Exception):
    """Ends a recording in the middle."""


def test_hooks_and_top_k_are_as_before_also_after_an_exception(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    ready = adopt_model(model, byte_level_tokenizer(), EngineOptions())
    ids = torch.arange(40).reshape(1, 40)
    expected = model(input_ids=ids).last_hidden_state

    def hooks() -> list[Any]:
        return [[*m._forward_hooks, *m._forward_pre_hooks] for m in model.modules()]

    def fails(*_: Any) -> None:
        raise Stops

    before, looking = hooks(), probe_lookahead(ready, [1, 2])
    assert hooks() == before
    last = model.base_model.layers[3].mlp.gate
    last.forward = fails  # a router that is asked early fails in the hook of an earlier layer
    with pytest.raises(Stops):  # noqa: SIM117
        with RouterWatch(ready.experts, lookahead=looking) as watch:
            watch.run(ready.body, {"input_ids": ids})
    del last.forward
    assert hooks() == before
    assert {m.top_k for m in model.modules() if hasattr(m, "top_k")} == {2}
    assert model(input_ids=ids).last_hidden_state.equal(expected)


def test_a_router_that_is_passed_by_is_noticed() -> None:
    model = tiny_model("mixtral")
    ready = adopt_model(model, byte_level_tokenizer(), EngineOptions())
    looking = probe_lookahead(ready, [1])
    gate = model.base_model.layers[1].mlp.gate
    model.base_model.layers[1].mlp.gate = type("Bypass", (nn.Module,), {"forward": lambda _, x: gate.forward(x)})()
    with pytest.raises(RouterSilent, match="gave nothing to predict layer 2"):  # noqa: SIM117
        with RouterWatch(ready.experts, lookahead=looking) as watch:
            watch.run(ready.body, {"input_ids": torch.arange(4).reshape(1, 4)})


def test_distances_beyond_the_layers_are_refused_before_weights_are_read(checkpoint: Any, tmp_path: Path) -> None:
    path = checkpoint(tiny_model("mixtral"), byte_level_tokenizer())
    (path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(NoSuchLayer, match="cannot look 4 layers ahead: 4 with routed experts are recorded"):
        record(path, some_documents([9]), tmp_path / "t", lookahead=[1, 4], stream=False)
    with pytest.raises(NoSuchLayer, match="distances go up to 1"):
        record(path, some_documents([9]), tmp_path / "t", layers=[0, 2], lookahead=[2], stream=False)
    with pytest.raises(ValueError, match="whole numbers from 1"):
        record(path, some_documents([9]), tmp_path / "t", lookahead=[0], stream=False)


def test_distance_counts_the_layers_that_are_recorded(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("mixtral"), byte_level_tokenizer()
    full = record((model, tokenizer), some_documents([60]), tmp_path / "full", lookahead=[2])
    some = record((model, tokenizer), some_documents([60]), tmp_path / "some", layers=[1, 3], lookahead=[1])
    a, b = columns(full, "P"), columns(some, "P")
    np.testing.assert_array_equal(a["(3, 2)"], b["(3, 1)"])


def test_an_interrupted_recording_goes_on_with_the_same_predictions(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("mixtral"), byte_level_tokenizer()
    documents = some_documents([200, 150, 90, 40])
    whole = record((model, tokenizer), documents, tmp_path / "whole", lookahead=[1, 2], part_tokens=64)

    def stop(progress: Any) -> None:
        if progress.tokens > 150:
            raise Stops

    def again(**more: Any) -> Trace:
        return record((model, tokenizer), documents, tmp_path / "cut", lookahead=[1, 2], part_tokens=64, **more)

    with pytest.raises(Stops):
        again(progress=stop)
    assert 0 < len(open_trace(tmp_path / "cut").parts) < len(whole.parts)
    with pytest.raises(TraceMismatch, match="layers differ"):
        record((model, tokenizer), documents, tmp_path / "cut", lookahead=[1], part_tokens=64)
    resumed = again()
    digest = [hashlib.sha256((t.path / "SHA256SUMS").read_bytes()).hexdigest() for t in (whole, resumed)]
    assert digest[0] == digest[1]


def test_streaming_says_that_it_cannot_look_ahead(checkpoint: Any, tmp_path: Path) -> None:
    path = checkpoint(tiny_model("mixtral"), byte_level_tokenizer())
    with pytest.raises(ModelNotStreamable, match="routers of later layers") as error:
        record(path, some_documents([9]), tmp_path / "t", stream=True, lookahead=[1])
    assert "--no-stream" in error.value.render()


def test_a_spread_model_is_asked_ahead_too(checkpoint: Any, tmp_path: Path) -> None:
    path = checkpoint(tiny_model("mixtral"), byte_level_tokenizer())
    documents = some_documents([60, 20])
    plain = record(path, documents, tmp_path / "plain", lookahead=[1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        offloaded = record(path, documents, tmp_path / "spread", lookahead=[1, 2], device_map={"": "disk"})
    for key, ids in columns(plain, "P").items():
        np.testing.assert_array_equal(columns(offloaded, "P")[key], ids)


class Block(nn.Module):
    """Routes to expert (token + layer) mod 4 by an exact score, and changes nothing."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.scorer = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.scorer.weight.copy_(torch.eye(4).roll(layer, 0))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.scorer(hidden)
        return hidden


class Rotating(nn.Module):
    """Token i has the one-hot hidden state i mod 4."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(layer) for layer in range(3))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.one_hot(input_ids % 4, 4).float()
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def read_scores(args: Any, kwargs: Any, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = output.flatten(0, 1).topk(1)
    return ids, weights


def test_a_router_of_the_users_own_is_asked_ahead_by_its_reading(tmp_path: Path) -> None:
    routers = [moescope.Router(f"blocks.{layer}.scorer", read_scores, 4) for layer in range(3)]
    trace = record(
        (Rotating(), byte_level_tokenizer()), some_documents([50, 9]), tmp_path / "t", routers=routers, lookahead=[1, 2]
    )
    for part in trace.iter_parts(predictions=True):
        for layer in range(3):
            np.testing.assert_array_equal(part.expert_ids[layer][:, 0], (part.token_id + layer) % 4)
        for (layer, _), ids in part.predictions.items():
            np.testing.assert_array_equal(ids[:, 0], (part.token_id + layer) % 4)
    result = moescope.prefetch(trace)
    known = result["recall"].sel(predictor="lookahead 2", layer=2, loaded=1)
    assert known == 1


def test_a_router_that_does_not_repeat_itself_is_refused(tmp_path: Path) -> None:
    model, calls = Rotating(), iter(range(1000))
    for block in model.blocks:
        block.scorer.forward = lambda hidden: (hidden + 0).roll(next(calls), -1)
    routers = [moescope.Router(f"blocks.{layer}.scorer", read_scores, 4) for layer in range(3)]
    with pytest.raises(ModelUnsupported, match="chooses otherwise when run again"):
        record((model, byte_level_tokenizer()), some_documents([9]), tmp_path / "t", routers=routers, lookahead=[1])


def test_the_command_records_and_info_and_sql_know_of_it(tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "a cat sat on the mat", "meta": {"pile_set_name": "Github"}}\n' * 3)
    done = run("record", mini.model_path(), corpus, "-o", tmp_path / "t.moe", "--lookahead", "1,4")
    assert done.exit_code == 0, done.stderr
    shown = run("info", tmp_path / "t.moe").stdout
    assert "1 layer ahead (for 5), 4 layers ahead (for 2)" in shown
    assert "0-5: top-2 of 8 experts" in shown
    assert "P{layer}_{distance}_{rank}" in run("sql", tmp_path / "t.moe").stdout
    same = run("sql", tmp_path / "t.moe", "SELECT count(*) AS n FROM tokens WHERE P4_4_0 >= 0", "--format", "csv")
    assert same.stdout.split() == ["n", str(open_trace(tmp_path / "t.moe").num_tokens)]
    wrong = run("record", mini.model_path(), corpus, "-o", tmp_path / "u.moe", "--lookahead", "0,1")
    assert wrong.exit_code == 2
    assert "from 1" in wrong.stderr
    far = run("record", mini.model_path(), corpus, "-o", tmp_path / "u.moe", "--lookahead", "6")
    assert far.exit_code == 1
    assert "distances go up to 5" in far.stderr
