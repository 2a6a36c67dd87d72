"""Watching somebody else's loop: every token once, nothing changed, nothing left behind, never silent."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import tiny_model
from tiny import byte_level_tokenizer, some_documents
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import moescope
from moescope import mini
from moescope.corpus import open_corpus, sample
from moescope.engines.transformers.hooks import RouterWatch
from moescope.engines.transformers.routers import find_experts
from moescope.engines.transformers.tokenizer import Tokenizer
from moescope.errors import DiskFull, ModelNotMoE, ModelUnsupported, RouterNotFinite, RouterSilent, TraceExists
from moescope.trace import Trace, TraceWriter, open_trace
from moescope.trace.columns import PHASES
from moescope.watching.live import LiveTally
from moescope.watching.watcher import watch

PREFILL, DECODE = range(len(PHASES))


@pytest.fixture
def model() -> Any:
    return tiny_model("mixtral", causal=True)


def some_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 300, shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def spied(model: Any) -> Iterator[dict[int, list[np.ndarray]]]:
    """What the experts modules are really run with, by replacing their forward; a list entry a call."""
    calls: dict[int, list[np.ndarray]] = {}
    modules = [(int(name.split(".")[-3]), m) for name, m in model.named_modules() if name.endswith("mlp.experts")]
    for layer, module in modules:

        def forward(hidden: Any, ids: Any, weights: Any, layer: int = layer, run: Any = module.forward) -> Any:
            calls.setdefault(layer, []).append(ids.detach().numpy().copy())
            return run(hidden, ids, weights)

        module.forward = forward
    try:
        yield calls
    finally:
        for _, module in modules:
            del module.forward


def slow_load(calls: dict[int, list[np.ndarray]], counted: Any = None, num_experts: int = 8) -> np.ndarray:
    """Assignments by layer and expert, one by one; `counted` are the flat places of the tokens that count."""
    load = np.zeros((len(calls), num_experts), np.int64)
    for row, layer in enumerate(sorted(calls)):
        for ids in calls[layer]:
            for place, token in enumerate(ids):
                if counted is None or place in counted:
                    for expert in token:
                        load[row, expert] += 1
    return load


def rows(trace: Trace) -> dict[str, np.ndarray]:
    parts = list(trace.iter_parts(weights=trace.header.weights))
    names = ("document", "domain", "sequence", "position", "token_id")
    found = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    if trace.header.phases:
        found["phase"] = np.concatenate([part.phase for part in parts])
    for layer in trace.layers:
        found[f"L{layer.layer}"] = np.concatenate([part.expert_ids[layer.layer] for part in parts])
        if trace.header.weights:
            found[f"W{layer.layer}"] = np.concatenate([part.gate_weights[layer.layer] for part in parts])
    return found


def tallied(trace: Trace) -> np.ndarray:
    """Load of a trace, dims (layer, expert)."""
    return moescope.tally(trace).data["loads"].sel(choice="all").sum("domain").values


def hooks(model: nn.Module) -> dict[str, Any]:
    """What a watch could leave behind: hooks, attributes and classes of the modules."""
    return {
        name: (list(module._forward_pre_hooks), list(module._forward_hooks), sorted(vars(module)), type(module))
        for name, module in model.named_modules()
    }


def untouched(model: nn.Module) -> bool:
    """Whether no module has hooks, and each is of a class that can be imported."""
    return "generate" not in vars(model) and all(
        not before and not after and getattr(sys.modules[kind.__module__], kind.__name__) is kind
        for before, after, _, kind in hooks(model).values()
    )


def checkpoint_layers(model: Any, *, reentrant: bool) -> None:
    """Gradient checkpointing, under the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


# ---------------------------------------------------------------------------------------------------- live tally


def test_the_live_tally_is_what_the_experts_ran(model: Any) -> None:
    with spied(model) as calls, watch(model) as w:
        model(some_ids(2, 16))
        model(some_ids(3, 7, seed=1))
    np.testing.assert_array_equal(w.load.values, slow_load(calls))
    assert w.load.dims == ("layer", "expert")
    assert w.load["layer"].values.tolist() == [0, 1, 2, 3]
    assert (w.tokens, w.forwards) == (2 * 16 + 3 * 7, 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(model: Any, side: str) -> None:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    with spied(model) as calls, watch(model) as w:
        model(some_ids(2, 6), attention_mask=mask)
    np.testing.assert_array_equal(w.load.values, slow_load(calls, set(np.flatnonzero(mask.numpy()))))
    assert w.tokens == 10


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_padding_is_read_from_a_prepared_mask_of_four_dimensions(model: Any, dtype: torch.dtype) -> None:
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril() & real[:, None, None, :]
    mask = allowed if dtype == torch.bool else torch.zeros(allowed.shape).masked_fill(~allowed, -1e30)
    with watch(model) as w:
        model(some_ids(2, 5), attention_mask=mask)
    assert w.tokens == 8


def test_a_mask_that_does_not_tell_padding_is_refused(model: Any) -> None:
    with pytest.raises(ModelUnsupported, match="does not tell which of"), watch(model):
        model.model(some_ids(2, 5), attention_mask=torch.ones(2, 3))
    assert untouched(model)


def test_layers_can_be_chosen(model: Any) -> None:
    with watch(model) as every:
        model(some_ids(1, 9))
    with watch(model, layers=[3, 1]) as some:
        model(some_ids(1, 9))
    np.testing.assert_array_equal(some.load.values, every.load.sel(layer=[1, 3]).values)


def test_figures_are_those_of_a_hand_counted_load() -> None:
    experts = find_experts(tiny_model("mixtral", num_hidden_layers=2, num_local_experts=4), "model")
    tally = LiveTally(experts)
    counts: dict[torch.device, torch.Tensor] = {}
    tally.count(counts, 0, torch.tensor([[0, 1], [0, 1], [0, 2], [0, -1]]), torch.ones(4, 2), None)
    tally.count(counts, 1, torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]]), torch.ones(4, 2), None)  # 2, 2, 2, 2
    tally.commit(counts)
    loads = tally.read()
    assert loads.load.values.tolist() == [[4, 2, 1, 0], [2, 2, 2, 2]]
    assert (loads.dropped.values.tolist(), loads.tokens) == ([1, 0], 4)
    np.testing.assert_allclose(loads.imbalance, [4 / (7 / 4), 1])
    np.testing.assert_allclose(loads.max_violation, [4 / (7 / 4) - 1, 0], atol=1e-15)
    shares = np.array([4, 2, 1]) / 7
    np.testing.assert_allclose(loads.entropy, [-(shares * np.log(shares)).sum() / np.log(4), 1])
    np.testing.assert_allclose(loads.variation, [np.std([4, 2, 1, 0]) / (7 / 4), 0], atol=1e-15)
    np.testing.assert_allclose(loads.share.sum("expert"), 1)
    assert loads.idle.values.tolist() == [1, 0]


def break_router(model: Any, layer: int, value: float) -> None:
    with torch.no_grad():
        model.get_parameter(f"layers.{layer}.mlp.gate.weight").fill_(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_router_that_is_not_finite_is_said_to_be_so_with_its_layer(value: float) -> None:
    model = tiny_model("mixtral", num_hidden_layers=3)
    break_router(model, 1, value)
    with watch(model) as w:
        model(some_ids(2, 8))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loads = w.loads()
            w.loads()
    said = [str(warning.message) for warning in caught]  # once, also of layer 2, which reads what layer 1 wrote
    assert [text.split(" tokens")[0] for text in said] == [
        f"layer {layer}: the router is not finite: of 16 of 16" for layer in (1, 2)
    ]
    assert loads.not_finite.values.tolist() == [0, 16, 16]


def test_padding_of_a_broken_router_is_not_counted() -> None:
    experts = find_experts(tiny_model("mixtral"), "model")[:1]
    tally = LiveTally(experts)
    counts: dict[torch.device, torch.Tensor] = {}
    weights = torch.tensor([[0.5, 0.5], [float("nan"), 1], [float("inf"), 0], [0.5, float("nan")]])
    tally.count(counts, 0, torch.zeros(4, 2, dtype=int), weights, torch.tensor([True, True, False, True]))
    tally.commit(counts)
    with pytest.warns(UserWarning, match="of 2 of 3 tokens"):
        assert tally.read().not_finite.item() == 2


class Adapted(torch.nn.Module):
    """Wraps the experts as PEFT does to adapt one of their parameters (`target_parameters` of a LoRA)."""

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(4, 2)})

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(x, *args, **kwargs)


def test_experts_whose_parameters_are_adapted_are_watched_in_their_wrappers() -> None:
    model = tiny_model("mixtral", num_hidden_layers=2)
    ids = some_ids(2, 9)
    with watch(model) as plain:
        model(ids)
    for layer in model.layers:
        layer.mlp.experts = Adapted(Adapted(layer.mlp.experts))
    with watch(model) as adapted:
        model(ids)
    np.testing.assert_array_equal(adapted.load, plain.load)
    assert adapted.experts[1].name == "layers.1.mlp.experts.base_layer.base_layer"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_lora_of_peft_on_fused_experts_is_watched() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("mixtral", num_hidden_layers=2)
    ids = some_ids(2, 9)
    with watch(model) as plain:
        model(ids)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_parameters=parameters))
    with watch(adapted) as w:
        adapted(ids)
    np.testing.assert_array_equal(w.load, plain.load)


def test_null_experts_are_in_the_load_and_not_in_the_imbalance() -> None:
    model = tiny_model("longcat_flash")
    with watch(model) as w:
        model(some_ids(2, 32))
    assert w.load.sizes["expert"] == 8 + 3
    assert w.load.values[:, 8:].sum() > 0
    load = w.load.values[:, :8]
    np.testing.assert_allclose(w.imbalance, load.max(1) / load.mean(1))


def test_an_impossible_id_is_an_error_when_read_and_harms_nobody_before() -> None:
    experts = find_experts(tiny_model("mixtral"), "model")
    tally = LiveTally(experts[:1])
    counts: dict[torch.device, torch.Tensor] = {}
    tally.count(counts, 0, torch.tensor([[0, 10**9]]), torch.ones(1, 2), None)
    tally.commit(counts)
    with pytest.raises(ModelUnsupported, match=r"outside 0\.\.7"):
        tally.read()


def test_reset_starts_anew_and_a_pause_counts_nothing(model: Any) -> None:
    with watch(model) as w:
        model(some_ids(4, 8))
        w.reset()
        model(some_ids(2, 8, seed=1))
        with w.paused():
            model(some_ids(5, 8, seed=2))
        again = w.load
    with watch(model) as other:
        model(some_ids(2, 8, seed=1))
    np.testing.assert_array_equal(again, other.load)


@pytest.mark.parametrize("window", [1, 2, 3, 10])
def test_a_window_counts_the_last_passes(model: Any, window: int) -> None:
    batches = [some_ids(1, 4 + n, seed=n) for n in range(5)]
    with watch(model, window=window) as w:
        for ids in batches:
            model(ids)
    with watch(model) as last:
        for ids in batches[-window:]:
            model(ids)
    np.testing.assert_array_equal(w.load, last.load)
    assert w.loads().forwards == min(window, 5)


def test_reading_where_nothing_was_seen_is_an_error_and_the_end_warns(model: Any) -> None:
    with pytest.warns(UserWarning, match="no forward pass of the watched model was seen"), watch(model) as w:
        pass
    with pytest.raises(RouterSilent, match="no forward pass"):
        _ = w.load


def test_wrong_arguments_are_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="window 0"):
        watch(model, window=0)
    with pytest.raises(ModelNotMoE):
        watch(
            transformers.AutoModelForCausalLM.from_config(
                transformers.LlamaConfig(
                    vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
                )
            )
        )
    w = watch(model)
    with w:
        model(some_ids(1, 3))
    with pytest.raises(ValueError, match="entered once"), w:
        pass


# ------------------------------------------------------------------------------- nothing changed, nothing left


def gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach().clone(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("with_trace", [False, True])
def test_outputs_and_gradients_are_equal_to_the_bit(
    model: Any, checkpointing: bool | None, with_trace: bool, tmp_path: Path
) -> None:
    model.train()
    if checkpointing is not None:
        checkpoint_layers(model, reentrant=checkpointing)
    logits, grads = gradients(model, some_ids(2, 12))
    before = hooks(model)
    with watch(model, tmp_path / "t.moe" if with_trace else None):
        watched_logits, watched_grads = gradients(model, some_ids(2, 12))
    assert torch.equal(logits, watched_logits)
    assert len(grads) == len(watched_grads) > 10
    assert all(torch.equal(one, other) for one, other in zip(grads, watched_grads, strict=True))
    assert hooks(model) == before


@pytest.mark.filterwarnings("ignore:.*requires_grad=True.*:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_what_checkpointing_runs_again_is_counted_once(model: Any, reentrant: bool, whole: bool) -> None:
    ids = some_ids(2, 12)
    with watch(model) as plain:
        model(ids)
    model.train()
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    with spied(model) as calls, watch(model) as w:
        for _ in range(2):
            if whole:  # the whole model is run again, not only its layers
                run = torch.utils.checkpoint.checkpoint(
                    lambda x: model(inputs_embeds=x).logits, embeds, use_reentrant=reentrant
                )
                run.sum().backward()
            else:
                checkpoint_layers(model, reentrant=reentrant)
                model(ids, labels=ids).loss.backward()
    assert [len(found) for found in calls.values()] == [4, 4, 4, 4]  # every layer did run twice
    np.testing.assert_array_equal(w.load, 2 * plain.load)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_exception_and_half_a_pass_does_not_count(
    model: Any, error: type[BaseException]
) -> None:
    before = hooks(model)

    def fail(*_: Any) -> None:
        raise error("in the third layer")

    with pytest.raises(error, match="third"), watch(model) as w:  # noqa: PT012
        model(some_ids(1, 5))
        handle = model.model.layers[2].register_forward_pre_hook(fail)
        try:
            model(some_ids(1, 9))
        finally:
            handle.remove()
    assert w.tokens == 5
    assert hooks(model) == before
    assert untouched(model)


def test_a_pass_after_a_failed_one_is_counted_whole(model: Any) -> None:
    failing = [True]

    def fail(*_: Any) -> None:
        if failing.pop() if failing else False:
            raise RuntimeError("out of memory")

    with watch(model) as w, model.model.layers[2].register_forward_pre_hook(fail):
        with pytest.raises(RuntimeError):
            model(some_ids(1, 9))
        model(some_ids(1, 5))
    assert (w.tokens, w.forwards) == (5, 1)


def test_two_watches_count_each_for_itself_whichever_ends_first(model: Any) -> None:
    first, second = watch(model), watch(model, layers=[2])
    first.__enter__()
    model(some_ids(1, 4))
    second.__enter__()
    model(some_ids(1, 8))
    model.generate(some_ids(1, 3), max_new_tokens=2, min_new_tokens=2)
    first.__exit__(None, None, None)
    model(some_ids(1, 16))
    second.__exit__(None, None, None)
    assert (first.tokens, second.tokens) == (4 + 8 + 4, 8 + 4 + 16)
    assert untouched(model)
    assert type(model.model) is transformers.MixtralModel
    assert type(model.model.layers[2].mlp.experts).__mro__[1].__name__ != "MixtralExperts"


def test_counting_never_waits_for_the_device(model: Any) -> None:
    class Operators(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    model.set_experts_implementation("grouped_mm")
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 5:] = 0
    with Operators() as plain:
        model(some_ids(2, 8), attention_mask=mask)
    with watch(model), Operators() as watched:
        model(some_ids(2, 8), attention_mask=mask)
    more = {name: watched.names.count(name) - plain.names.count(name) for name in set(watched.names)}
    assert more["aten.scatter_add_.default"] == 4
    assert not [
        name for name, n in more.items() if n and any(w in name for w in ("local_scalar", "nonzero", "bincount"))
    ]


# ------------------------------------------------------------------------------------------------ never silent


def test_a_layer_that_does_not_speak_is_an_error(model: Any) -> None:
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(RouterSilent, match="layer 1") as caught, watch(model):
        model(some_ids(1, 4))
    assert "model.layers.1.mlp.experts was not called" in str(caught.value)
    assert untouched(model)


def test_a_layer_that_speaks_twice_or_for_other_tokens_is_an_error(model: Any) -> None:
    block = model.model.layers[1].mlp
    run = block.forward
    block.forward = lambda hidden: run(hidden) + run(hidden)
    with pytest.raises(RouterSilent, match="called 2 times"), watch(model):
        model(some_ids(1, 4))
    block.forward = lambda hidden: torch.cat([run(hidden[:, :2]), run(hidden[:, 2:])], 1)
    with pytest.raises(RouterSilent, match="with 2 rows, expected once with 4"), watch(model):
        model(some_ids(1, 4))


def test_layers_called_one_by_one_are_an_error(model: Any) -> None:
    with pytest.raises(RouterSilent, match="outside a forward pass of model"), watch(model):
        model.model.layers[0].mlp(torch.randn(1, 4, 32))


# -------------------------------------------------------------------------------------------- wrappers, compile


@pytest.fixture
def compilable() -> Iterator[Any]:
    """A small model whose experts break no graph; nothing that others compiled is kept, nor what is compiled here."""
    model = tiny_model("mixtral", causal=True, num_hidden_layers=1)
    model.set_experts_implementation("grouped_mm")
    torch._dynamo.reset()
    yield model
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize(
    ("backend", "compiled", "handed"),
    [
        ("eager", "before", "the compiled model"),
        ("eager", "in the block", "the model within"),
        ("aot_eager", "before", "the model within"),
    ],
)
def test_compiled_models_are_counted_whenever_they_were_compiled(
    compilable: Any, backend: str, compiled: str, handed: str, tmp_path: Path
) -> None:
    model = compilable
    ids = some_ids(2, 12)
    with watch(model) as plain:
        model(ids)
    fast = torch.compile(model, backend=backend)
    if compiled == "before":
        fast(ids)
    with watch(fast if handed == "the compiled model" else model, tmp_path / "t.moe") as w:
        fast(ids)
        loss = fast(ids, labels=ids).loss
        if backend == "eager":  # backward through aot_eager: below, layer by layer
            loss.backward()
    np.testing.assert_array_equal(w.load, 2 * plain.load)
    np.testing.assert_array_equal(tallied(open_trace(tmp_path / "t.moe")), w.load)
    fast(ids)
    assert w.forwards == 2
    if backend == "eager":  # compiling takes long, and this is the same for every backend
        with watch(model) as again:
            fast(ids)
        np.testing.assert_array_equal(again.load, plain.load)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo's and checkpoint's own
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_compiled_one_by_one_in_whole_graphs_and_checkpointed_are_counted_once(
    compilable: Any, reentrant: bool
) -> None:
    model = compilable
    ids = some_ids(2, 12)
    with watch(model) as plain:
        model(ids)
    model.train()
    checkpoint_layers(model, reentrant=reentrant)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    model(ids)
    with watch(model) as w:
        model(ids, labels=ids).loss.backward()
    np.testing.assert_array_equal(w.load, plain.load)


def test_a_whole_graph_over_the_model_fails_loudly(compilable: Any) -> None:
    fast = torch.compile(compilable, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Passes\._stack_hooks"), watch(fast):
        fast(some_ids(1, 4))
    assert untouched(compilable)


def test_a_model_in_data_parallel_is_found(model: Any) -> None:
    wrapped = nn.DataParallel(model)
    with watch(wrapped) as w:
        wrapped(some_ids(2, 5))
    assert w.tokens == 10


RANK = """
import sys, numpy, torch
sys.path.insert(0, sys.argv[1])
from families import tiny_model
import moescope
rank, folder = int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
wrapped = torch.nn.parallel.DistributedDataParallel(tiny_model("mixtral", causal=True))
with moescope.watch(wrapped) as w:
    for step in range(2):
        ids = torch.randint(1, 300, (1 + rank, 6 + rank))
        wrapped(input_ids=ids, labels=ids).loss.backward()
both = w.all_reduce()
numpy.savez(f"{folder}/{rank}.npz", own=w.load.values, both=both.load.values, n=[both.tokens, both.forwards])
torch.distributed.destroy_process_group()
"""


def test_ranks_count_their_own_and_all_reduce_adds_them_up(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK, str(Path(__file__).parents[1])]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in range(2))
    assert (first["own"].sum(), second["own"].sum()) == (4 * 2 * 12, 4 * 2 * 28)
    np.testing.assert_array_equal(first["both"], first["own"] + second["own"])
    np.testing.assert_array_equal(second["both"], first["both"])
    assert first["n"].tolist() == second["n"].tolist() == [12 + 28, 4]


def test_all_reduce_of_one_process_is_its_own_tally(model: Any) -> None:
    with watch(model) as w:
        model(some_ids(1, 5))
    np.testing.assert_array_equal(w.all_reduce().load, w.load)


def test_inference_mode_and_training_may_alternate(model: Any) -> None:
    ids = some_ids(1, 6)
    with watch(model) as w:
        with torch.inference_mode():
            model(ids)
        model(ids, labels=ids).loss.backward()
        with torch.inference_mode():
            model(ids)
    assert w.tokens == 18


def test_a_module_that_is_no_model_of_transformers_is_counted_by_rows() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 4
            self.up = nn.Parameter(torch.randn(4, 3, 3))

        def forward(self, hidden: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            return (self.up[top_k_index] * top_k_weights[..., None, None]).sum(1) @ hidden.mean(0)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"gate": nn.Linear(3, 4), "experts": Experts()}) for _ in range(2)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                flat = x.reshape(-1, 3)
                weights, ids = layer["gate"](flat).softmax(-1).topk(2)
                x = layer["experts"](flat, ids, weights).reshape(x.shape)
            return x

    with watch(Own()) as w:
        w_model = w._model
        w_model(torch.randn(2, 5, 3))
    assert w.tokens == 10
    assert w.load.sum("expert").values.tolist() == [20, 20]


@pytest.mark.parametrize("family", ["llama4_text", "jetmoe", "zaya", "doge"])
def test_families_that_adapters_read_are_counted_as_they_are_recorded(family: str, tmp_path: Path) -> None:
    model, ids = tiny_model(family), some_ids(2, 12)
    experts = find_experts(model, family)
    with RouterWatch(experts) as recorder:
        choices = recorder.run(model, {"input_ids": ids})
    with watch(model, tmp_path / "t.moe") as w:
        model(input_ids=ids)
    for each in experts:
        expected = np.bincount(choices[each.layer].expert_ids.ravel(), minlength=w.load.sizes["expert"])
        np.testing.assert_array_equal(w.load.sel(layer=each.layer), expected)
    np.testing.assert_array_equal(tallied(open_trace(tmp_path / "t.moe")), w.load)
    assert untouched(model)


@pytest.mark.filterwarnings("ignore::UserWarning")  # what find_experts says of these families
@pytest.mark.parametrize("family", ["switch_transformers", "nllb-moe"])
def test_encoder_and_decoder_count_each_its_own_tokens_and_a_trace_of_both_is_refused(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    with watch(model) as w:
        model(input_ids=some_ids(2, 12), attention_mask=mask, decoder_input_ids=some_ids(2, 5))
    loads = w.loads()
    made = (loads.load.sum("expert") + loads.dropped).values
    top_k = 1 if family == "switch_transformers" else 2
    assert made.tolist() == [21 * top_k] * 2 + [10 * top_k] * 2
    assert w.forwards == 2  # of the encoder and of the decoder
    with pytest.raises(ModelUnsupported, match="a trace holds one stack"):
        watch(model, tmp_path / "t.moe")


def test_routers_of_ones_own_are_counted(tmp_path: Path) -> None:
    class Gate(nn.Linear):
        pass

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(300, 8)
            self.blocks = nn.ModuleList(Gate(8, 4) for _ in range(2))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(input_ids)
            for gate in self.blocks:
                hidden = hidden + gate(hidden).sum(-1, keepdim=True)
            return hidden

    def read(args: Any, kwargs: Any, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = output.flatten(0, 1).softmax(-1).topk(2)
        return ids, weights

    model, ids = Own(), some_ids(2, 9)
    routers = [moescope.Router(f"blocks.{layer}", read, num_experts=4) for layer in range(2)]
    with watch(model, tmp_path / "t.moe", routers=routers) as w:
        model(ids)
    chosen = model.blocks[0](model.embed(ids)).flatten(0, 1).topk(2).indices
    np.testing.assert_array_equal(w.load.values[0], np.bincount(chosen.flatten().numpy(), minlength=4))
    np.testing.assert_array_equal(tallied(open_trace(tmp_path / "t.moe")), w.load)


# ------------------------------------------------------------------------------------------------------ traces


def test_a_trace_of_the_mini_model_is_the_one_that_record_makes(tmp_path: Path) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(mini.model_path(), dtype=torch.float32).eval()
    loaded.set_experts_implementation("eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(mini.model_path())
    documents = list(sample(open_corpus(mini.corpus_path()), max_documents_per_domain=1))
    documents = [type(d)(number, d.domain, d.text[:1200]) for number, d in enumerate(documents)]
    window = 100
    recorded = moescope.record((loaded, tokenizer), documents, tmp_path / "r.moe", window=window, weights=True)
    added = list(Tokenizer(tokenizer).added_ids)
    assert added
    with torch.no_grad(), watch(loaded, tmp_path / "w.moe", tokenizer=tokenizer, weights=True) as w:
        for document in documents:
            ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
            with w.document(document.domain):
                for start in range(0, len(ids), window - len(added)):
                    loaded(torch.tensor([added + ids[start : start + window - len(added)]]))
    watched = open_trace(tmp_path / "w.moe")
    assert (watched.verify(), watched.complete, watched.domains) == ([], True, recorded.domains)
    found, expected = rows(watched), rows(recorded)
    assert (found.pop("phase") == PREFILL).all()
    assert found.keys() == expected.keys()
    assert found["sequence"].max() > 1
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-4 if name[0] == "W" else 0, err_msg=name)
    np.testing.assert_array_equal(w.load, tallied(recorded))
    assert watched.header.model == recorded.header.model | {"name": watched.header.model["name"]}
    of_batches = {"window", "batch_tokens"}  # how the caller batches is not known
    assert watched.header.run.keys() >= recorded.header.run.keys() - of_batches
    same = recorded.header.run.keys() - of_batches - {"part_tokens", "experts_implementation"}
    assert {name: watched.header.run[name] for name in same} == {name: recorded.header.run[name] for name in same}
    assert watched.header.tokenizer == recorded.header.tokenizer


def test_a_padded_batch_with_a_domain_a_row_gives_the_documents_that_record_does(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("mixtral", causal=True), byte_level_tokenizer(bos=True)
    documents = some_documents([40, 90, 7, 33])
    recorded = moescope.record((model, tokenizer), documents, tmp_path / "r.moe", weights=True)
    tokenizer.pad_token = tokenizer.bos_token
    for side in ("left", "right"):
        batch = tokenizer([d.text for d in documents], return_tensors="pt", padding=True, padding_side=side)
        domains = [document.domain for document in documents]
        with watch(model, tmp_path / f"{side}.moe", tokenizer=tokenizer, weights=True) as w, w.domain(domains):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        found, expected = rows(open_trace(tmp_path / f"{side}.moe")), rows(recorded)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-3 if name[0] == "W" else 0, err_msg=name)
        np.testing.assert_array_equal(w.load, tallied(recorded))


def test_the_live_tally_of_a_traced_training_run_is_the_tally_of_the_trace(model: Any, tmp_path: Path) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with watch(model, tmp_path / "t.moe", part_tokens=30) as w:
        for step in range(4):
            ids = some_ids(2, 10, seed=step)
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    trace = open_trace(tmp_path / "t.moe")
    assert len(trace.parts) > 1
    assert (trace.num_documents, trace.num_tokens, trace.verify()) == (8, 80, [])
    np.testing.assert_array_equal(tallied(trace), w.load)


def packed_positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens_q"])
def test_packed_sequences_are_documents_of_their_own(model: Any, tmp_path: Path, how: str) -> None:
    packing = {
        "position_ids": {"position_ids": packed_positions(5, 1, 6)},
        "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 5, 6, 12], dtype=torch.int32)},
    }[how]
    ids = some_ids(1, 12)
    with watch(model, tmp_path / "t.moe") as w:
        model(ids, **packing)
        with w.document("one"):
            model(ids, **packing)
    found = rows(open_trace(tmp_path / "t.moe"))
    assert found["document"].tolist() == [0] * 5 + [1] + [2] * 6 + [3] * 12
    assert found["sequence"].tolist() == [0] * 12 + [0] * 5 + [1] + [2] * 6
    assert found["position"].tolist() == packed_positions(5, 1, 6, 5, 1, 6)[0].tolist()
    assert found["token_id"].tolist() == ids[0].tolist() * 2


def test_added_tokens_are_left_out_at_the_start_of_each_packed_sequence(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("mixtral", causal=True), byte_level_tokenizer(bos=True)
    ids = torch.tensor([[0, 7, 8, 0, 9, 0, 5]])  # the last 0 is no start, so it is text
    with watch(model, tmp_path / "t.moe", tokenizer=tokenizer) as w:
        model(ids, position_ids=packed_positions(3, 4))
    assert rows(open_trace(tmp_path / "t.moe"))["token_id"].tolist() == [7, 8, 9, 0, 5]
    assert w.tokens == 5


def test_embeddings_are_counted_and_a_trace_of_them_has_no_token_ids(model: Any, tmp_path: Path) -> None:
    ids = some_ids(2, 7)
    with watch(model, tmp_path / "t.moe") as w:
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with watch(model) as plain:
        model(ids)
    np.testing.assert_array_equal(w.load, plain.load)
    trace = open_trace(tmp_path / "t.moe")
    assert not trace.header.token_ids
    np.testing.assert_array_equal(tallied(trace), w.load)
    with pytest.raises(ModelUnsupported, match="called with embeddings"), watch(model, tmp_path / "u.moe"):  # noqa: PT012
        model(ids)
        model(inputs_embeds=model.get_input_embeddings()(ids))


# ---------------------------------------------------------------------------------------------------- generate


def replayed(model: Any, ids: list[int]) -> dict[int, np.ndarray]:
    """Choices of one plain forward pass over a sequence, sorted by id, by layer."""
    with torch.no_grad(), spied(model) as calls:
        model(torch.tensor([ids]), use_cache=False)
    return {layer: np.sort(found[0], axis=1) for layer, found in calls.items()}


def assert_replays(model: Any, trace: Trace, number: int, ids: list[int]) -> None:
    part = trace.document(number)
    assert part.token_id.tolist() == ids
    assert part.position.tolist() == list(range(len(ids)))
    for layer, expected in replayed(model, ids).items():
        np.testing.assert_array_equal(np.sort(part.expert_ids[layer], axis=1), expected)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generated_sequences_continue_their_prompts_each_token_once(
    model: Any, tmp_path: Path, cache: str | None
) -> None:
    prompts = some_ids(2, 6)
    mask = torch.ones_like(prompts)
    mask[1, :2] = 0
    with watch(model, tmp_path / "t.moe", domain="chat", weights=True) as w:
        output = model.generate(
            prompts, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0,
            cache_implementation=cache,
        )  # fmt: skip
    trace = open_trace(tmp_path / "t.moe")
    assert (trace.verify(), trace.num_documents, trace.domains) == ([], 2, ("chat",))
    assert_replays(model, trace, 0, output[0, :-1].tolist())  # the last token is generated and never read
    assert_replays(model, trace, 1, output[1, 2:-1].tolist())
    assert trace.document(0).phase.tolist() == [PREFILL] * 6 + [DECODE] * 4
    assert trace.document(1).phase.tolist() == [PREFILL] * 4 + [DECODE] * 4
    np.testing.assert_array_equal(tallied(trace), w.load)
    assert untouched(model)


def test_what_generate_feeds_after_a_sequence_has_ended_is_not_counted(model: Any, tmp_path: Path) -> None:
    prompts = some_ids(4, 5)
    free = model.generate(prompts, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    end = int(free[0, 5 + 2])  # the token that the first row generates third ends a sequence
    singles = [
        model.generate(prompt[None], max_new_tokens=9, do_sample=False, eos_token_id=[end], pad_token_id=0)[0].tolist()
        for prompt in prompts
    ]
    assert len({len(single) for single in singles}) > 1
    with watch(model, tmp_path / "t.moe") as w:
        model.generate(prompts, max_new_tokens=9, do_sample=False, eos_token_id=[end], pad_token_id=0)
    trace = open_trace(tmp_path / "t.moe")
    for number, single in enumerate(singles):
        assert trace.document(number).token_id.tolist() == single[:-1]
    assert w.tokens == sum(len(single) - 1 for single in singles) == trace.num_tokens
    np.testing.assert_array_equal(tallied(trace), w.load)


def test_sampled_sequences_of_one_prompt_are_documents_each(model: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with watch(model, tmp_path / "t.moe") as w, w.domain(["Github", "ArXiv"]):
        output = model.generate(
            some_ids(2, 4), do_sample=True, num_return_sequences=3, max_new_tokens=4, min_new_tokens=4, pad_token_id=0
        )
    trace = open_trace(tmp_path / "t.moe")
    assert trace.num_documents == 6
    assert [trace.domains[trace.document(n).domain[0]] for n in range(6)] == ["Github"] * 3 + ["ArXiv"] * 3
    for number in range(6):
        assert_replays(model, trace, number, output[number, :-1].tolist())


def test_a_prompt_read_in_chunks_is_prefill(model: Any, tmp_path: Path) -> None:
    with watch(model, tmp_path / "t.moe"):
        output = model.generate(
            some_ids(1, 9), max_new_tokens=3, min_new_tokens=3, do_sample=False, prefill_chunk_size=4, pad_token_id=0
        )
    trace = open_trace(tmp_path / "t.moe")
    assert_replays(model, trace, 0, output[0, :-1].tolist())
    assert trace.document(0).phase.tolist()[-2:] == [DECODE] * 2
    assert trace.document(0).phase.tolist()[:8] == [PREFILL] * 8


def test_a_loop_of_ones_own_with_a_cache_is_followed(model: Any, tmp_path: Path) -> None:
    ids = some_ids(2, 8)
    with torch.no_grad(), watch(model, tmp_path / "t.moe") as w:
        out = model(ids[:, :5], use_cache=True)
        other = model(ids[:, :3], use_cache=False)
        for step in range(5, 8):
            out = model(ids[:, step : step + 1], past_key_values=out.past_key_values)
        del other
    trace = open_trace(tmp_path / "t.moe")
    by_length = {len(trace.document(n).token_id): n for n in trace.document_numbers.tolist()}
    assert trace.num_documents == 4
    assert_replays(model, trace, by_length[8], ids[1].tolist())
    assert trace.document(by_length[8]).phase.tolist() == [PREFILL] * 5 + [DECODE] * 3
    np.testing.assert_array_equal(tallied(trace), w.load)


def test_a_conversation_in_one_cache_is_one_document(model: Any, tmp_path: Path) -> None:
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with watch(model, tmp_path / "t.moe"):
        first = model.generate(some_ids(1, 4), return_dict_in_generate=True, **options)
        question = torch.cat([first.sequences, some_ids(1, 3, seed=5)], 1)
        second = model.generate(question, past_key_values=first.past_key_values, **options)
    trace = open_trace(tmp_path / "t.moe")
    assert trace.num_documents == 1
    assert_replays(model, trace, 0, second[0, :-1].tolist())


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}])
def test_methods_that_read_tokens_in_vain_are_counted_and_refused_in_a_trace(
    model: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with spied(model) as calls, watch(model) as w:
        model.generate(some_ids(1, 4), **options)
    np.testing.assert_array_equal(w.load, slow_load(calls))
    with pytest.raises(ValueError, match="cannot be followed in a trace"), watch(model, tmp_path / "t.moe"):
        model.generate(some_ids(1, 4), **options)
    assert not (tmp_path / "t.moe").exists()
    assert untouched(model)


def test_a_cache_that_was_cut_is_refused_in_a_trace(model: Any, tmp_path: Path) -> None:
    ids = some_ids(1, 6)
    with torch.no_grad(), pytest.raises(ModelUnsupported, match="cut or rearranged"), watch(model, tmp_path / "t.moe"):  # noqa: PT012
        cache = transformers.DynamicCache()
        model(ids, past_key_values=cache)
        cache.crop(-3)
        model(ids[:, :1], past_key_values=cache)


# ------------------------------------------------------------------------------------------- ends of a trace


def test_an_error_leaves_an_unfinished_trace_of_what_was_whole(model: Any, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("interrupted")

    class Stop(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] > 6:
                raise RuntimeError("interrupted")
            return scores

    with pytest.raises(RuntimeError, match="interrupted"), watch(model, tmp_path / "t.moe") as w:  # noqa: PT012
        kept = model(some_ids(2, 5))
        with w.document("half"), pytest.raises(RuntimeError):  # noqa: PT012
            model(some_ids(1, 7))
            model.generate(some_ids(1, 4), max_new_tokens=9, logits_processor=[Stop()])
        model.generate(some_ids(1, 4), max_new_tokens=9, logits_processor=[Stop()])
    trace = open_trace(tmp_path / "t.moe")
    assert not trace.complete
    assert (trace.verify(), trace.num_tokens, kept.logits.shape[0]) == ([], 2 * 5 + 7, 2)
    assert untouched(model)


def test_a_document_that_an_error_ends_is_not_in_the_trace(model: Any, tmp_path: Path) -> None:
    with watch(model, tmp_path / "t.moe") as w:
        with pytest.raises(KeyError), w.document("broken"):  # noqa: PT012
            model(some_ids(1, 7))
            raise KeyError
        with w.document("sound"):
            model(some_ids(1, 3))
    trace = open_trace(tmp_path / "t.moe")
    assert (trace.domains, trace.num_tokens, trace.complete) == (("sound",), 3, True)


def test_a_part_that_could_not_be_written_is_written_with_the_next(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = TraceWriter.write, iter(range(10**6))

    def write(*args: Any) -> None:
        if next(calls) == 1:
            raise DiskFull(tmp_path, "no space left on the disk")
        own(*args)

    monkeypatch.setattr(TraceWriter, "write", write)
    failed = 0
    with watch(model, tmp_path / "t.moe", part_tokens=20) as w:
        for _ in range(8):
            try:
                model(input_ids=some_ids(2, 10), use_cache=False)
            except DiskFull:
                failed += 1
    trace = open_trace(tmp_path / "t.moe")
    assert (failed, trace.complete, trace.num_tokens, w.tokens) == (1, True, 160, 160)
    assert trace.document_numbers.tolist() == list(range(16))


def test_a_generation_that_fails_in_one_thread_leaves_those_of_another_whole(model: Any, tmp_path: Path) -> None:
    inside, over = threading.Event(), threading.Event()

    class Gate(transformers.LogitsProcessor):
        def __init__(self, fails: bool) -> None:
            self.fails, self.calls = fails, 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.fails:
                raise RuntimeError
            if self.calls == 2:
                inside.set()
                over.wait(60)
            return scores

    def generate(fails: bool) -> None:
        try:
            model.generate(some_ids(1, 4), max_new_tokens=6, do_sample=False, logits_processor=[Gate(fails)], **NO_END)
        except RuntimeError:
            over.set()

    with watch(model, tmp_path / "t.moe"):
        sound = threading.Thread(target=generate, args=(False,))
        sound.start()
        inside.wait(60)
        generate(True)
        sound.join()
        assert model.generate(some_ids(1, 3), max_new_tokens=2, **NO_END).shape == (1, 5)
    trace = open_trace(tmp_path / "t.moe")
    assert [len(part.position) for part in trace.iter_parts()] == [9 + 4]
    assert (trace.complete, trace.num_documents) == (True, 2)


NO_END: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}


def test_a_generate_of_the_models_own_is_there_again_afterwards(model: Any) -> None:
    own = model.generate

    def mine(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    model.generate = mine
    with watch(model), watch(model) as w:
        model.generate(some_ids(1, 3), max_new_tokens=2, **NO_END)
    assert model.generate is mine
    assert w.tokens == 4


def test_a_trace_is_kept_unless_force_is_said(model: Any, tmp_path: Path) -> None:
    for _ in range(2):
        with watch(model, tmp_path / "t.moe", force=True):
            model(some_ids(1, 4))
    assert open_trace(tmp_path / "t.moe").num_tokens == 4
    with pytest.raises(TraceExists):
        watch(model, tmp_path / "t.moe")
    with pytest.raises(RuntimeError), watch(model, tmp_path / "u.moe"):  # noqa: PT012
        model(some_ids(1, 4))
        raise RuntimeError
    with pytest.raises(TraceExists):  # unfinished, and of another watch
        watch(model, tmp_path / "u.moe")
    with watch(model, tmp_path / "u.moe", force=True):
        model(some_ids(1, 5))
    assert open_trace(tmp_path / "u.moe").num_tokens == 5


def test_a_trace_of_nothing_is_an_error(model: Any, tmp_path: Path) -> None:
    with pytest.raises(RouterSilent, match="no forward pass"), watch(model, tmp_path / "t.moe"):
        pass
    assert not (tmp_path / "t.moe").exists()


def test_domains_must_fit_the_batch(model: Any, tmp_path: Path) -> None:
    w = watch(model, tmp_path / "t.moe")
    with pytest.raises(ValueError, match="2 domains are given for a batch of 3"), w, w.domain(["a", "b"]):
        model(some_ids(3, 4))
    with pytest.raises(ValueError, match="cannot lie in another"), watch(model) as w, w.document("a"), w.document("b"):
        pass


def test_gate_weights_that_are_not_finite_stop_a_trace(model: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        model.model.layers[2].mlp.gate.weight.fill_(torch.nan)
    with pytest.raises(RouterNotFinite, match="layer 2"), watch(model, tmp_path / "t.moe"):
        model(some_ids(1, 4))
    assert untouched(model)
