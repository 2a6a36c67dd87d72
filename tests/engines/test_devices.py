"""A checkpoint spread over devices, memory and disk: the same choices, nothing left loaded, nothing left on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from click.testing import CliRunner
from families import tiny_model
from tiny import assert_same, some_documents

from moescope.cli import main
from moescope.engines.options import EngineOptions
from moescope.engines.transformers.hooks import RouterWatch
from moescope.engines.transformers.model import accelerate_hooks, adopt_model, probe, weights_put_back
from moescope.errors import ModelDamaged
from moescope.recording import Progress, record

Save = Callable[..., Path]
Map = Mapping[str, int | str]

SPREADS: dict[str, str | Map] = {
    "one device": {"": "cpu"},
    "auto": "auto",
    "layers in memory and on disk": {
        "embed_tokens": "cpu",
        "layers.0": "disk",
        "layers.1": "cpu",
        "layers.2": "disk",
        "layers.3": "disk",
        "norm": "cpu",
        "rotary_emb": "cpu",
    },
    "all on disk": {"": "disk"},
}


@pytest.fixture
def model_path(checkpoint: Save, bos_tokenizer: Any) -> Path:
    return checkpoint(tiny_model("mixtral", causal=True), bos_tokenizer)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that the engine loads."""
    import moescope.engines.transformers.model as model

    models: list[Any] = []
    load_model = model.load_model

    def load(*args: Any, **kwargs: Any) -> Any:
        models.append(load_model(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(model, "load_model", load)
    return models


def offloaded(body: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """The parameters that accelerate is to keep elsewhere between forward passes."""
    for module, hook in accelerate_hooks(body):
        if getattr(hook, "offload", False):
            yield from module.parameters(recurse=False)


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
@pytest.mark.parametrize("layers", [None, [1]])
def test_a_spread_model_makes_the_same_choices_and_leaves_nothing_behind(
    spread: str | Map, layers: list[int] | None, model_path: Path, loaded: list[Any], tmp_path: Path
) -> None:
    whole = record(model_path, some_documents(), tmp_path / "whole.moe", layers=layers, weights=True, device="cpu")
    trace = record(
        model_path, some_documents(), tmp_path / "t.moe",
        layers=layers, weights=True, device_map=spread, offload_folder=tmp_path / "offload",
    )  # fmt: skip
    assert_same(trace, whole, rtol=1e-5)  # of the weights: kernels round by how the tensors lie in memory
    assert trace.header == whole.header  # so that either may go on with the other
    kept_elsewhere = list(offloaded(loaded[-1].body))
    assert bool(kept_elsewhere) == ("disk" in str(spread))
    assert all(parameter.device.type == "meta" for parameter in kept_elsewhere)
    assert list((tmp_path / "offload").iterdir()) == []


def test_offloaded_weights_go_beside_the_trace_while_it_is_recorded(model_path: Path, tmp_path: Path) -> None:
    sizes: list[int] = []

    def look(_: Progress) -> None:
        folders = list((tmp_path / "out").glob("moescope-offload-*"))
        sizes.append(sum(file.stat().st_size for folder in folders for file in folder.iterdir()))

    record(model_path, some_documents(), tmp_path / "out" / "t.moe", device_map={"": "disk"}, progress=look)
    experts = 4 * 8 * 3 * 24 * 32 * 4  # layers, experts, matrices, rows, columns, bytes: what is converted on loading
    assert min(sizes) >= experts
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["t.moe"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_the_middle_leaves_no_offloaded_weights(
    error: type[BaseException], model_path: Path, loaded: list[Any], tmp_path: Path
) -> None:
    whole = record(model_path, some_documents(), tmp_path / "whole.moe", part_tokens=100, device="cpu")

    def fail(progress: Progress) -> None:
        if progress.tokens > 300:
            raise error

    spread: Any = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload", "part_tokens": 100}
    with pytest.raises(error):
        record(model_path, some_documents(), tmp_path / "t.moe", progress=fail, **spread)
    assert all(parameter.device.type == "meta" for parameter in offloaded(loaded[-1].body))
    assert list((tmp_path / "offload").iterdir()) == []
    assert_same(record(model_path, some_documents(), tmp_path / "t.moe", **spread), whole)  # ids


def test_a_pass_that_is_cut_short_puts_the_weights_of_a_given_model_back(bos_tokenizer: Any) -> None:
    plain = adopt_model(tiny_model("mixtral"), bos_tokenizer, EngineOptions(layers=[2]))
    moved = adopt_model(cpu_offload(tiny_model("mixtral")), bos_tokenizer, EngineOptions(layers=[2]))
    inputs = {"input_ids": torch.arange(7).unsqueeze(0)}
    found = []
    for model in (plain, moved):
        _, stop_at = probe(model)
        assert stop_at == 2
        with RouterWatch(model.experts, stop_at=stop_at) as watch, weights_put_back(model):
            found.append(watch.run(model.body, inputs)[2])
    assert (found[0].expert_ids == found[1].expert_ids).all()
    assert all(parameter.device.type == "meta" for parameter in moved.body.parameters())
    with torch.no_grad():
        assert torch.equal(plain.body(**inputs)[0], moved.body(**inputs)[0])


def test_what_a_forward_pass_was_interrupted_in_is_put_back(bos_tokenizer: Any) -> None:
    model = adopt_model(cpu_offload(tiny_model("mixtral")), bos_tokenizer, EngineOptions())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.body.layers[2].mlp.gate.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), weights_put_back(model), torch.no_grad():
        model.body(torch.arange(7).unsqueeze(0))
    handle.remove()
    assert all(parameter.device.type == "meta" for parameter in model.body.parameters())


def test_a_device_and_a_device_map_exclude_each_other(model_path: Path, bos_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        record(model_path, some_documents(), tmp_path / "t.moe", device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="are what they are"):
        record((tiny_model("mixtral"), bos_tokenizer), some_documents(), tmp_path / "t.moe", device_map="auto")


def test_a_device_map_that_is_wrong_is_said_to_be_at_fault(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelDamaged, match="its weights cannot be loaded") as error:
        record(model_path, some_documents(), tmp_path / "t.moe", device_map={"": "hologram"})
    assert "device map" in str(error.value.hint)
    assert list(tmp_path.glob("moescope-offload-*")) == []


def test_the_command_takes_a_device_map(model_path: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "the cat sat on the mat", "meta": {"pile_set_name": "d"}}\n')
    arguments = ["record", str(model_path), str(corpus), "-o", str(tmp_path / "t.moe"), "--device-map", "auto"]
    assert CliRunner().invoke(main, [*arguments, "--device", "cpu"]).exit_code == 2
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
