"""What a header says of a model of transformers, of its layers and of its run: for recordings and watches alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moescope.engines import provenance
from moescope.engines.transformers.routers import Experts, hidden_size, num_layers, text_config
from moescope.trace import Layer

HASHED_WHOLE_BYTES = 10**9
"""Checkpoints up to this size are hashed whole, larger ones by evenly spaced blocks of every file."""

_BLOCKS, _BLOCK_BYTES = 64, 2**16  # 4 MB of a file, read in a moment wherever it lies

LIBRARIES = ("torch", "transformers")
"""What decides how a model is computed."""


def describe_body(
    body: Any, experts: Sequence[Experts], name: str, fingerprint: str, left_out: Sequence[str] = ()
) -> dict[str, Any]:
    """Provenance of a model without its head, or of a module that has no configuration."""
    config = getattr(body, "config", None)
    architectures = getattr(config, "architectures", None) or [type(body).__name__]
    return provenance.ModelProvenance(
        name=name,
        family=str(getattr(config, "model_type", None) or "custom"),
        architecture=str(architectures[0]),
        num_layers=num_layers(config),
        hidden_size=hidden_size(config),
        dtype=str(next(body.parameters()).dtype).removeprefix("torch."),
        fingerprint=fingerprint,
        expert_widths=_expert_widths(experts, hidden_size(config)),
        router=_router(body, experts[0]),
        not_recorded=list(left_out),
    ).described()


def _expert_widths(experts: Sequence[Experts], hidden_size: int | None) -> list[int] | None:
    """Widths of the experts, read off their stacked down projections; None if the experts are not stacked."""
    shapes: list[tuple[int, ...]] = [
        getattr(getattr(block.module, "down_proj", None), "shape", ()) for block in experts
    ]
    if hidden_size is None or not all(len(shape) == 3 and hidden_size in shape[1:] for shape in shapes):
        return None
    return sorted({shape[1] * shape[2] // hidden_size for shape in shapes})


def _router(body: nn.Module, experts: Experts) -> str | None:
    """Class of the router of a layer: of the module that is read, else of the one beside the experts."""
    beside = (dict(module.named_children()) for module in body.modules() if experts.module in module.children())
    siblings = next(beside, {})
    router = experts.router or siblings.get("router") or siblings.get("gate")
    return None if router is None else type(router).__name__


def describe_run(body: Any, experts: Experts, device: torch.device) -> dict[str, Any]:
    """Provenance of a run, as the model and one of its layers are set up now."""
    config = text_config(getattr(body, "config", None))
    experts_config = getattr(experts.module, "config", config)
    return provenance.describe_run(
        device=device.type,
        attn_implementation=str(getattr(config, "_attn_implementation", None)),
        experts_implementation=str(getattr(experts_config, "_experts_implementation", None)),
        libraries=LIBRARIES,
    )


def describe_layer(experts: Experts, top_k: int) -> Layer:
    """A layer as a trace describes it."""
    return Layer(
        layer=experts.layer,
        num_experts=experts.num_experts,
        top_k=top_k,
        module=experts.name,
        num_null_experts=experts.num_null_experts,
        num_shared_experts=experts.num_shared_experts,
        drops=experts.drops,
    )


def checkpoint_fingerprint(folder: Path) -> str:
    """sha256 over configuration and weights of a checkpoint; evenly spaced blocks of each file if it is large."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    whole = sum(file.stat().st_size for file in files) <= HASHED_WHOLE_BYTES
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if whole:
                while block := file.read(2**20):
                    digest.update(block)
            else:
                for index in range(_BLOCKS):
                    file.seek((size - min(size, _BLOCK_BYTES)) * index // (_BLOCKS - 1))
                    digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def tensors_fingerprint(model: nn.Module) -> str:
    """sha256 over configuration, names, shapes and values of a model in memory; some values of each if it is large."""
    tensors = sorted(model.state_dict().items())
    whole = sum(tensor.nbytes for _, tensor in tensors) <= HASHED_WHOLE_BYTES
    config: Any = getattr(model, "config", None)
    text = config.to_json_string() if hasattr(config, "to_json_string") else repr(model)
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.device.type == "meta":
            continue
        values = tensor.detach().flatten()
        values = values if whole else values[:: max(1, len(values) // 4096)]
        digest.update(values.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
