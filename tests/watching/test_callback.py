"""Figures in the Trainer's own logs: of training only, of every micro-batch, with a word on layers that collapse."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import tiny_model

import moescope
from moescope.watching.callback import RoutingCallback, figures

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning", "ignore::FutureWarning")

NUM_LAYERS = 4


class Texts(torch.utils.data.Dataset):
    def __init__(self, number: int) -> None:
        self.ids = torch.randint(1, 300, (number, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer_of(model: Any, folder: Path, number: int = 24, **options: Any) -> transformers.Trainer:
    options = {
        "per_device_train_batch_size": 2, "max_steps": 6, "logging_steps": 2, "report_to": [], "save_strategy": "no",
        "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3, "seed": 0, **options,
    }  # fmt: skip
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **options),
        train_dataset=Texts(number),
        eval_dataset=Texts(6),
    )


@pytest.fixture
def model() -> Any:
    return tiny_model("mixtral", causal=True)


def entries(trainer: transformers.Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "moe/imbalance" in entry]


class Spy(transformers.TrainerCallback):
    """Load of each step by what the experts modules really ran, of training and apart from it."""

    def __init__(self, model: Any) -> None:
        self.training, self.other = [], 0
        self._load: np.ndarray | None = None
        modules = [m for name, m in model.named_modules() if name.endswith("mlp.experts")]
        for place, module in enumerate(modules):

            def forward(hidden: Any, ids: Any, weights: Any, place: int = place, run: Any = module.forward) -> Any:
                if self._load is None:
                    self.other += 1
                else:
                    np.add.at(self._load[place], ids.flatten().numpy(), 1)
                return run(hidden, ids, weights)

            module.forward = forward

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._load = np.zeros((NUM_LAYERS, 8), int)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.training.append(self._load)
        self._load = None


def expected(loads: Sequence[np.ndarray]) -> dict[str, float]:
    load = np.sum(loads, axis=0)
    imbalance = load.max(1) / load.mean(1)
    share = load / load.sum(1, keepdims=True)
    with np.errstate(all="ignore"):
        entropy = -np.nansum(share * np.log(share), axis=1) / np.log(8)
    return {
        "moe/imbalance": imbalance.mean(), "moe/imbalance_max": imbalance.max(),
        "moe/max_violation": imbalance.mean() - 1, "moe/max_violation_max": imbalance.max() - 1,
        "moe/entropy": entropy.mean(), "moe/entropy_min": entropy.min(),
        "moe/idle_experts": (load == 0).sum(), "moe/idle_experts_max": (load == 0).sum(1).max(),
    }  # fmt: skip


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_entries_are_of_training_alone_with_every_micro_batch(model: Any, tmp_path: Path, accumulation: int) -> None:
    trainer = trainer_of(model, tmp_path, gradient_accumulation_steps=accumulation, eval_strategy="steps", eval_steps=1)
    spy = Spy(model)
    trainer.add_callback(spy)
    trainer.add_callback(RoutingCallback(trainer))
    before = hooks(model)
    trainer.train()
    assert spy.other == 6 * NUM_LAYERS * 1  # an evaluation of one batch after every step
    found = entries(trainer)
    assert [entry["step"] for entry in found] == [2, 4, 6]
    for number, entry in enumerate(found):
        steps = spy.training[2 * number : 2 * number + 2]
        assert np.sum(steps) == 2 * accumulation * 2 * 12 * 2 * NUM_LAYERS
        for name, value in expected(steps).items():
            assert entry[name] == pytest.approx(value, rel=1e-9), name
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4, 6]
    assert hooks(model) == before
    json.dumps(trainer.state.log_history)


def test_every_and_count_every_choose_the_steps(model: Any, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, logging_steps=100)
    spy = Spy(model)
    trainer.add_callback(spy)
    trainer.add_callback(RoutingCallback(trainer, every=3, count_every=2))
    trainer.train()
    found = entries(trainer)
    assert [entry["step"] for entry in found] == [3, 6]
    assert found[0]["moe/imbalance"] == pytest.approx(expected([spy.training[0], spy.training[2]])["moe/imbalance"])
    assert found[1]["moe/imbalance"] == pytest.approx(expected([spy.training[4]])["moe/imbalance"])


def test_layers_may_be_logged_one_by_one(model: Any, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, max_steps=2)
    trainer.add_callback(RoutingCallback(trainer, per_layer=True, layers=[1, 3]))
    trainer.train()
    (entry,) = entries(trainer)
    layers = [entry["moe/layer_1/imbalance"], entry["moe/layer_3/imbalance"]]
    assert entry["moe/imbalance"] == pytest.approx(np.mean(layers))
    assert entry["moe/imbalance_max"] == max(layers)
    assert "moe/layer_3/idle_experts" in entry
    assert "moe/layer_0/imbalance" not in entry


def test_other_callbacks_get_the_figures_whatever_their_order(model: Any, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    trainer = trainer_of(model, tmp_path)
    trainer.callback_handler.callbacks.insert(0, Reporter())  # where TensorBoard's and W&B's are
    trainer.add_callback(RoutingCallback(trainer))
    trainer.train()
    assert len([logs for logs in seen if "moe/entropy" in logs]) == 3
    assert len([logs for logs in seen if "loss" in logs]) == 3


def test_training_is_the_same_with_the_callback_and_without(tmp_path: Path) -> None:
    losses = []
    for with_callback in (False, True):
        model = tiny_model("mixtral", causal=True)
        trainer = trainer_of(model, tmp_path)
        if with_callback:
            trainer.add_callback(RoutingCallback(trainer))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_hooks_are_gone_when_training_fails_and_it_can_be_started_again(model: Any, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(RoutingCallback(trainer))
    failing = [True]
    compute_loss = trainer.compute_loss

    def fail(*args: Any, **kwargs: Any) -> Any:
        if failing and trainer.state.global_step == 3:
            failing.clear()
            raise RuntimeError("out of memory")
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = fail
    before = hooks(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert hooks(model) == before
    assert type(model.model) is transformers.MixtralModel
    trainer.train()
    assert [entry["step"] for entry in entries(trainer)] == [2, 4, 6]
    assert hooks(model) == before


def test_a_resumed_run_goes_on_with_its_entries(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    first = trainer_of(tiny_model("mixtral", causal=True), tmp_path, **options)
    first.add_callback(RoutingCallback(first))
    first.train()
    again = trainer_of(tiny_model("mixtral", causal=True), tmp_path, **options)
    spy = Spy(again.model)
    again.add_callback(spy)
    again.add_callback(RoutingCallback(again))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    found = entries(again)
    assert [entry["step"] for entry in found] == [2, 4, 6]
    assert found[0] == entries(first)[0]  # from before the interruption
    assert len(spy.training) == 3
    assert found[1]["moe/imbalance"] == pytest.approx(expected(spy.training[:1])["moe/imbalance"])  # step 3 is lost
    assert found[2]["moe/imbalance"] == pytest.approx(expected(spy.training[1:])["moe/imbalance"])


def collapse(model: Any, layer: int) -> None:
    """Make a layer send all tokens to the same two experts, for good."""
    with torch.no_grad():
        gate = model.model.layers[layer].mlp.gate
        gate.weight.zero_().requires_grad_(False)


def test_a_collapsing_layer_is_warned_of_once_and_by_name(model: Any, tmp_path: Path) -> None:
    collapse(model, 2)
    trainer = trainer_of(model, tmp_path, logging_steps=1)
    trainer.add_callback(RoutingCallback(trainer, patience=2, max_imbalance=3.9))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    found = [str(each.message) for each in caught if "collapsing" in str(each.message)]
    assert len(found) == 1
    assert found[0].startswith("layer 2 is collapsing: for 2 entries")
    assert "(now 4.00)" in found[0]
    assert "(now 6)" in found[0]


def test_a_router_that_is_not_finite_is_not_called_collapsing(model: Any, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, logging_steps=1, max_steps=3)
    trainer.add_callback(RoutingCallback(trainer, patience=1, max_imbalance=1.0))
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.fill_(float("nan"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    found = [str(warning.message) for warning in caught]
    assert any(text.startswith("layer 0: the router is not finite") for text in found)
    assert not any("collapsing" in text for text in found)


def test_a_balanced_model_and_a_passing_dip_are_not_warned_of(model: Any, tmp_path: Path) -> None:
    collapse(model, 2)
    trainer = trainer_of(model, tmp_path, logging_steps=2, max_steps=4)
    trainer.add_callback(RoutingCallback(trainer, patience=3))  # two entries are not enough
    trainer.train()
    assert entries(trainer)[1]["moe/imbalance_max"] == 4


def test_figures_leave_out_what_is_undefined() -> None:
    model = tiny_model("mixtral", causal=True)
    with moescope.watch(model) as w:
        model(torch.ones(1, 3, dtype=torch.long))
        w.reset()
        assert figures(w.loads()) == {"moe/idle_experts": 32.0, "moe/idle_experts_max": 8.0}


def test_wrong_arguments_are_refused(model: Any, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path)
    for options in ({"every": 0}, {"count_every": 0}, {"patience": 0}):
        with pytest.raises(ValueError, match="below 1"):
            RoutingCallback(trainer, **options)


def test_the_callback_can_be_had_from_the_package() -> None:
    assert moescope.RoutingCallback is RoutingCallback
