"""Whether a family comes out the same layer by layer: a small model of it, recorded both ways and compared bit by bit.

The small model is made from the user's own configuration, saved as a checkpoint and read back, so the weight
conversion is rehearsed along with the layers.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from moescope.engines.streamed.layerwise import NO_STREAM, Layerwise
from moescope.engines.streamed.shrinking import MIN_LAYERS, shrink
from moescope.engines.streamed.spool import move
from moescope.engines.transformers.hooks import Choices, RouterWatch, tensors_in
from moescope.engines.transformers.model import Checkpoint, Model, quiet, ready_to_record
from moescope.engines.transformers.routers import Experts, find_experts
from moescope.errors import ModelNotStreamable, MoescopeError

_LENGTHS = ((2, 24), (1, 9))  # of batches (sequence, token): with several sequences, and with a shorter one

Routing = list[dict[int, Choices]]


@dataclass(frozen=True)
class Rehearsal:
    """What the small model taught.

    Attributes:
        bare: Whether the last layer can do without its experts' weights.
        top_k: Choices of a token in its first layer with routed experts.
        state_widths: Numbers that a layer gives to the next for a token, in multiples of the hidden size.
    """

    bare: bool
    top_k: int
    state_widths: float


def rehearse(checkpoint: Checkpoint, experts: Sequence[Experts], dtype: torch.dtype) -> Rehearsal:
    """Stream a small model, made from a checkpoint's configuration alone, and compare it with its own forward pass.

    Raises:
        ModelNotStreamable: The choices or gate weights differ, or no small model can be made to tell.
    """
    with tempfile.TemporaryDirectory() as name, quiet():
        folder = Path(name)
        config = _save_small(checkpoint, folder, experts[0].layer, dtype)
        inputs = _inputs(config)
        try:
            whole = _run_whole(folder, config, checkpoint, dtype, inputs)
        except Exception as error:
            raise _no_small_model(checkpoint, error) from error
        faults: list[str] = []
        for bare in (True, False):
            try:
                streamed, widths = _run_streamed(folder, config, checkpoint, dtype, inputs, bare=bare)
            except MoescopeError as error:
                faults.append(error.problem)
            except Exception as error:  # whatever a family's code makes of being run in pieces
                faults.append(f"{type(error).__name__}: {error}")
            else:
                layer = _first_difference(whole, streamed)
                if layer is None:
                    top_k = whole[0][min(whole[0])].expert_ids.shape[1]
                    return Rehearsal(bare, top_k, widths)
                faults.append(f"layer {layer} chooses otherwise")
    raise ModelNotStreamable(
        checkpoint.name,
        f"{checkpoint.config.model_type} models cannot be streamed: a small one, run layer by layer, differs from its "
        f"own forward pass ({faults[-1]})",
        NO_STREAM,
    )


def _save_small(checkpoint: Checkpoint, folder: Path, first_layer: int, dtype: torch.dtype) -> Any:
    """Save a small random model of the checkpoint's family and return its configuration, as loaded from there."""
    try:
        config = shrink(checkpoint.config, max(MIN_LAYERS, first_layer + MIN_LAYERS // 2))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModel.from_config(config, dtype=dtype).eval()
            _perturb_constants(model)
            model.save_pretrained(folder)
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _no_small_model(checkpoint, error) from error


def _perturb_constants(model: nn.Module) -> None:
    """Change what is constant, such as biases of 0, so that a tensor that is lost or misplaced changes a choice."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.state_dict().values()]:
            if tensor.is_floating_point() and tensor.numel() > 1 and not tensor.isfinite().all():
                tensor.normal_(std=0.02)  # memory that was never initialised
            elif tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(torch.randn(tensor.shape).to(tensor) * 0.02)


def _inputs(config: Any) -> list[dict[str, Tensor]]:
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    num_ids = max(2, min(int(getattr(text, "vocab_size", None) or 256), 256))
    return [{"input_ids": torch.randint(1, num_ids, shape, generator=generator)} for shape in _LENGTHS]


def _run_whole(
    folder: Path, config: Any, checkpoint: Checkpoint, dtype: torch.dtype, inputs: Sequence[Mapping[str, Tensor]]
) -> Routing:
    body = transformers.AutoModel.from_pretrained(
        folder, config=copy.deepcopy(config), dtype=dtype, local_files_only=True
    ).eval()
    experts = find_experts(body, checkpoint.name)
    with ready_to_record(Model(body, checkpoint.tokenizer, experts, {})), RouterWatch(experts) as watch:
        return [watch.run(body, batch) for batch in inputs]


def _run_streamed(
    folder: Path,
    config: Any,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    inputs: Sequence[Mapping[str, Tensor]],
    *,
    bare: bool,
) -> tuple[Routing, float]:
    device = torch.device("cpu")
    small = Layerwise(folder, config, dtype=dtype, device=device, find=find_experts, subject=checkpoint.name)
    routing: Routing = [{} for _ in inputs]
    states: list[Any] = [None for _ in inputs]
    widths = 0.0
    with closing(small), ready_to_record(Model(small.body, checkpoint.tokenizer, small.experts, {})):
        small.load(None)
        last = small.experts[-1].layer
        for layer in range(last + 1):
            small.load(layer, bare=bare and layer == last)
            own = [block for block in small.experts if block.layer == layer]
            with RouterWatch(own, stop_at=layer if layer == last and bare else None) as watch:
                for index, batch in enumerate(inputs):
                    choices, states[index] = run_layer(small, watch, layer, batch, states[index])
                    routing[index] |= choices
            if layer == 0 and last:
                state_numbers = sum(tensor.numel() for tensor in tensors_in(states[0]))
                widths = state_numbers / inputs[0]["input_ids"].numel() / small.hidden_size
            small.free(layer)
    return routing, widths


def run_layer(
    layerwise: Layerwise, watch: RouterWatch, layer: int, inputs: Mapping[str, Tensor], before: Any
) -> tuple[dict[int, Choices], Any]:
    """Run a loaded layer over a batch: inputs of the whole model, and what the layer before returned, on the CPU.

    Returns:
        What it chose, and what it returned, on the CPU; None if the watch stopped it before that.
    """
    returned: list[Any] = []
    device = inputs["input_ids"].device

    def forward() -> None:
        returned.append(layerwise.run(layer, inputs, move(before, device)))

    choices = watch.observe(forward, inputs["input_ids"].numel())
    return choices, move(returned[0], torch.device("cpu")) if returned else None


def _first_difference(left: Routing, right: Routing) -> int | None:
    """The first layer whose ids or gate weights are not the same to the bit."""
    for one, other in zip(left, right, strict=True):
        for layer in sorted(one.keys() | other.keys()):
            if layer not in one or layer not in other:
                return layer
            for name in ("expert_ids", "gate_weights"):
                a, b = getattr(one[layer], name), getattr(other[layer], name)
                if a.tobytes() != b.tobytes() or a.shape != b.shape:
                    return layer
    return None


def _no_small_model(checkpoint: Checkpoint, error: Exception) -> ModelNotStreamable:
    return ModelNotStreamable(
        checkpoint.name,
        f"{checkpoint.config.model_type} models cannot be streamed: no small one could be made and run to rehearse it "
        f"({type(error).__name__}: {error})",
        NO_STREAM,
    )
