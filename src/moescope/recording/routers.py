"""Where a model routes: the modules that are handed the chosen experts, one a layer with routed experts.

Unit: one `Experts` a layer. Convention: what counts is what **reaches** the experts, never what could be recomputed
from router logits (biases, groups and capacity make that wrong for most families).

The general rule. From version 5 of transformers the experts of a layer are one module, called with the hidden states,
the chosen ids and their gate weights. A module whose ``forward`` names both of the latter is therefore an experts
module, whatever its class and its router. A family that this cannot describe is in `REFUSED` with the reason; it leaves
that table when it gets an adapter, which builds its `Experts` with a `read` of its own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moescope.errors import ModelNotMoE, ModelUnsupported, NoSuchLayer

ID_PARAMETERS = frozenset({"top_k_index", "router_indices", "selected_experts"})
WEIGHT_PARAMETERS = frozenset({"top_k_weights", "routing_weights"})

REFUSED = {
    "doge": "it retrieves experts by product keys inside its block, not through an experts module",
    "jetmoe": "it routes the attention as well, two routers a layer, and sorts tokens by expert before the experts",
    "llama4": "it runs every expert on every token and scales the inputs, so no chosen ids reach the experts",
    "nllb-moe": "its experts are handed a mask instead of ids, and some transformers versions run the wrong ones",
    "switch_transformers": "it drops tokens over a capacity that depends on padding and batching",
    "zaya": "its skip expert reaches the experts as id 0, which cannot be told from expert 0",
}
"""Families (``model_type``) that the general rule would miss or misread."""

_MOE_FIELDS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
"""Fields of configurations that count routed experts."""

_SHARED_FIELDS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
"""Fields of configurations that count shared experts."""

_WHOLE_NUMBERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})

NEWER = "a newer transformers may call its experts with both"
"""The hint where a family is refused: from version to version more of them do."""

Read = Callable[[tuple[Any, ...], Mapping[str, Any]], tuple[Any, Any]]


@dataclass(frozen=True)
class Experts:
    """The experts of one layer and how to read what they are called with.

    Attributes:
        layer: Index in the whole model, dense layers included.
        name: Path of the module in the model.
        module: The module.
        num_experts: Routed experts.
        num_null_experts: Ids after the routed ones that run no expert (zero-compute experts).
        num_shared_experts: Experts beside them that always run.
        read: From the arguments of a call, the chosen ids and their gate weights, each of shape (token, choice).
    """

    layer: int
    name: str
    module: nn.Module
    num_experts: int
    num_null_experts: int
    num_shared_experts: int
    read: Read


def find_experts(model: nn.Module, subject: object) -> tuple[Experts, ...]:
    """Find the experts of every layer of a model; its weights may still be on the meta device.

    Args:
        model: A model of transformers, with or without its head.
        subject: What errors call it.
    Returns:
        The experts by layer, ascending.
    Raises:
        ModelNotMoE: It has no routed experts.
        ModelUnsupported: It has some whose routing cannot be read exactly.
    """
    config = getattr(model, "config", None)
    refuse_odd_families(config, subject)
    found: dict[int, Experts] = {}
    uncovered: list[str] = []
    for name, module in model.named_modules():
        read = _general_rule(module)
        if read is None:
            if name.rpartition(".")[2] == "experts" and _has_parameters(module):
                uncovered.append(name)
            continue
        experts = _describe(model, name, module, read, subject)
        if (other := found.get(experts.layer)) is not None:
            raise ModelUnsupported(
                subject,
                f"{_family(config)}: layer {experts.layer} has two routed blocks, {other.name} and {name}; "
                "moescope records models with one a layer",
            )
        found[experts.layer] = experts
    covered = tuple(experts.name for experts in found.values())
    for name in uncovered:
        if not name.startswith(tuple(f"{prefix}." for prefix in covered)):
            raise ModelUnsupported(
                subject,
                f"{_family(config)}: {name} holds experts, but is not called with chosen ids and gate weights",
                NEWER,
            )
    if not found:
        _refuse_without_experts(config, subject)
    return tuple(found[layer] for layer in sorted(found))


def select_experts(
    experts: Sequence[Experts], layers: Sequence[int] | None, num_layers: int | None, subject: object
) -> tuple[Experts, ...]:
    """The experts of some layers, ascending; of all for None.

    Raises:
        NoSuchLayer: A layer does not exist or has no routed experts.
    """
    if layers is None:
        return tuple(experts)
    have = [each.layer for each in experts]
    for layer in layers:
        if layer not in have:
            dense = num_layers is not None and 0 <= layer < num_layers
            problem = f"layer {layer} has no routed experts" if dense else f"there is no layer {layer}"
            raise NoSuchLayer(subject, f"{problem}; the layers with routed experts are {_ranges(have)}")
    return tuple(each for each in experts if each.layer in set(layers))


def refuse_odd_families(config: Any, subject: object) -> None:
    """Refuse a family of `REFUSED`, before anything is loaded.

    Raises:
        ModelUnsupported: The configuration, or its text part, is of such a family.
    """
    for family in (getattr(config, "model_type", None), getattr(_text_config(config), "model_type", None)):
        reason = REFUSED.get(str(family).removesuffix("_text"))
        if reason is not None:
            raise ModelUnsupported(subject, f"the routing of {family} models cannot be read exactly: {reason}")


def _general_rule(module: nn.Module) -> Read | None:
    """How to read the ids and weights that a module is called with; None if it is not called with them."""
    try:
        names = list(inspect.signature(type(module).forward).parameters)[1:]  # 0 is self
    except (TypeError, ValueError):
        return None
    ids = next((name for name in names if name in ID_PARAMETERS), None)
    weights = next((name for name in names if name in WEIGHT_PARAMETERS), None)
    if ids is None or weights is None:
        return None
    ids_place, weights_place = names.index(ids), names.index(weights)

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        return (
            args[ids_place] if ids_place < len(args) else kwargs.get(ids),
            args[weights_place] if weights_place < len(args) else kwargs.get(weights),
        )

    return read


def _describe(model: nn.Module, name: str, module: nn.Module, read: Read, subject: object) -> Experts:
    index = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    num_experts = _num_experts(module)
    if index is None or num_experts is None or getattr(module, "_is_expert_parallel", False):
        reason = (
            "is in no numbered layer"
            if index is None
            else "does not say how many experts it has"
            if num_experts is None
            else "holds only this process's share of the experts"
        )
        raise ModelUnsupported(subject, f"{name} {reason}")
    parent = model.get_submodule(name.rpartition(".")[0])
    shared = any("shared" in child and _has_parameters(block) for child, block in parent.named_children())
    return Experts(
        layer=int(index[1]),
        name=name,
        module=module,
        num_experts=num_experts,
        num_null_experts=int(getattr(module, "zero_expert_num", None) or 0),
        num_shared_experts=_num_shared_experts(getattr(model, "config", None)) if shared else 0,
        read=read,
    )


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _num_experts(module: nn.Module) -> int | None:
    """Routed experts of a module: what it says, else the first dimension that its stacked weights share."""
    for name in ("num_routed_experts", "num_experts", "num_local_experts"):
        if isinstance(number := getattr(module, name, None), int):
            return number
    dims = {parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.dim() == 3}
    return dims.pop() if len(dims) == 1 else None


def _num_shared_experts(config: Any) -> int:
    """Shared experts a layer by the configuration; a model may fuse them into one block without saying a number."""
    for name in _SHARED_FIELDS:
        if isinstance(number := getattr(_text_config(config), name, None), int) and number > 0:
            return number
    return 1


def _refuse_without_experts(config: Any, subject: object) -> None:
    family = _family(config)
    for name in _MOE_FIELDS:
        number = getattr(_text_config(config), name, None)
        if isinstance(number, int) and number > 1:
            raise ModelUnsupported(
                subject,
                f"{family}: the configuration says {name} = {number}, but no module is called with chosen ids and "
                "gate weights",
                NEWER,
            )
    raise ModelNotMoE(subject, f"{family} is not a mixture of experts: none of its layers has routed experts")


def _text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def _family(config: Any) -> str:
    return str(getattr(config, "model_type", None) or "the model")


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3, 5`` for 0, 1, 2, 3, 5.

    Example:
        >>> _ranges([0, 1, 2, 3, 5])
        '0-3, 5'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(str(number) for number in run) for run in runs)


def check_call(experts: Experts, ids: Any, weights: Any) -> tuple[Tensor, Tensor]:
    """What reached the experts, if it is what the general rule expects.

    Returns:
        Chosen ids and their gate weights, each of shape (token, choice).
    Raises:
        ModelUnsupported: The ids are not whole numbers of shape (token, choice), or the weights have another shape.
    """
    fits = (
        isinstance(ids, Tensor)
        and isinstance(weights, Tensor)
        and ids.dim() == 2
        and ids.shape == weights.shape
        and ids.dtype in _WHOLE_NUMBERS
        and weights.is_floating_point()
    )
    if not fits:
        raise ModelUnsupported(
            experts.name,
            f"layer {experts.layer} is called with ids {_shape(ids)} and gate weights {_shape(weights)}, expected "
            "whole numbers (token, choice) and as many weights",
            NEWER,
        )
    return ids, weights


def _shape(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
