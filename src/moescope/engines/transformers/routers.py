"""Where a model routes: the blocks that choose experts, one a layer with routed experts.

Unit: one `Experts` a layer. Convention: what counts is what **reaches** the experts, never what could be recomputed
from router logits (biases, groups and capacity make that wrong for most families).

The general rule. From version 5 of transformers the experts of a layer are one module, called with the hidden states,
the chosen ids and their gate weights. A module whose ``forward`` names both of the latter is therefore an experts
module, whatever its class and its router. What that cannot describe is read by an adapter (`adapters`), or by a
`Router` of the user's. Anything else that holds experts is refused by name.

A layer has one block in a trace: the feed-forward one, unless the attention's is asked for. Of a model with several
towers, the one that text goes through is recorded; `find_left_out` names the rest.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moescope.engines.transformers.adapters import Reading, find_adapter
from moescope.engines.transformers.batches import Batching
from moescope.errors import ModelNotMoE, ModelUnsupported, NoSuchLayer
from moescope.trace.header import ranges

ID_PARAMETERS = frozenset({"top_k_index", "router_indices", "selected_experts"})
WEIGHT_PARAMETERS = frozenset({"top_k_weights", "routing_weights"})

TEXT_TOWERS = {"diffusion_gemma": "encoder", "qwen3_omni_moe": "thinker.model"}
"""Families (``model_type``) of which only a part reads text, and where in the model it is."""

_NOT_FOR_TEXT = frozenset({"vision_moe"})
"""Blocks inside a text tower that no text token reaches (ERNIE 4.5 VL)."""

_MOE_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""Fields of configurations that count routed experts."""

_SHARED_FIELDS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
"""Fields of configurations that count shared experts."""

_WHOLE_NUMBERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})

_WRAPPERS = re.compile(r"(\.base_layer)+$")

NEWER = "a newer transformers may call its experts with both"
"""The hint where a family is refused: from version to version more of them do."""


@dataclass(frozen=True, kw_only=True)
class Experts(Reading):
    """The experts of one layer and how to read which of them were chosen.

    Attributes:
        layer: Index in the whole model, dense layers included; a decoder's follow its encoder's.
        name: Path in the model of the module that holds the experts.
        module: That module; where an adapter reads it, the router may be in it, too.
        in_decoder: Whether it stands in the decoder of an encoder-decoder, which reads a token before each sequence.
    """

    layer: int
    name: str
    module: nn.Module
    in_decoder: bool = False


@dataclass(frozen=True)
class Router:
    """How to read one router of a model of your own; see `docs/how-to/add-a-router.md`.

    Attributes:
        module: Path of a module in the model, such as ``blocks.3.moe.gate``.
        read: Called as ``read(args, kwargs, output)`` each time the module runs, with the positional and the named
            arguments and what it returned (None with ``at="call"``). Returns the chosen expert ids and their gate
            weights, two tensors of shape (token, choice), tokens in the order of the flattened input ids.
        num_experts: Routed experts; ids are 0 .. num_experts - 1.
        layer: Index in the whole model; None for the first number in the path.
        at: ``output``: read after the module ran; ``call``: before, which lets a recording stop before the experts run.
        num_null_experts: Choices that run no expert; their ids follow the routed ones.
        num_shared_experts: Experts that always run, for the metadata.
        drops: Whether capacity may drop assignments; a dropped one has id -1 and weight 0.
        batching: ``padded``: sequences of different length may go together, padded on the right; ``equal``: only those
            of equal length; ``alone``: none, because a token's choices depend on all that is in the batch.
    """

    module: str
    read: Callable[[tuple[Any, ...], Mapping[str, Any], Any], tuple[Tensor, Tensor]]
    num_experts: int
    layer: int | None = None
    at: Literal["output", "call"] = "output"
    num_null_experts: int = 0
    num_shared_experts: int = 0
    drops: bool = False
    batching: Batching = "equal"

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.num_null_experts < 0 or self.num_shared_experts < 0:
            raise ValueError(f"{self.module}: a router has at least one expert and no negative number of others")
        if self.at not in ("output", "call") or self.batching not in ("padded", "equal", "alone"):
            raise ValueError(f"{self.module}: at is 'output' or 'call', batching 'padded', 'equal' or 'alone'")


_AS_READING = ("read", "num_experts", "num_null_experts", "num_shared_experts", "drops", "batching")
"""What a `Router` says as a `Reading` does."""


def find_experts(model: nn.Module, subject: object, *, block: str = "mlp") -> tuple[Experts, ...]:
    """Find the experts of every layer of a model; its weights may still be on the meta device.

    Args:
        model: A model of transformers, with or without its head.
        subject: What errors call it.
        block: ``mlp`` for the feed-forward blocks, ``attention`` for those of attention, where a family routes it.
    Returns:
        The experts by layer, ascending.
    Raises:
        ModelNotMoE: It has no routed experts.
        ModelUnsupported: It has some whose routing cannot be read exactly, or none of this block.
    """
    config = getattr(model, "config", None)
    candidates, uncovered = _routed_blocks(model, subject)
    covered = tuple(f"{experts.name}." for experts in candidates)
    # An adapter of PEFT on the parameters of the experts wraps their module, once a parameter.
    wrapped = {_WRAPPERS.sub("", experts.name) for experts in candidates}
    for name in uncovered:
        if not f"{name}.".startswith(covered) and _WRAPPERS.sub("", name) not in wrapped:
            raise ModelUnsupported(
                subject,
                f"{_family(config)}: {name} holds experts, but is not called with chosen ids and gate weights",
                NEWER,
            )
    if not candidates:
        _refuse_without_experts(config, subject)
    by_layer: dict[int, Experts] = {}
    for experts in candidates:
        if experts.block != block:
            continue
        if (other := by_layer.get(experts.layer)) is not None:
            raise ModelUnsupported(
                subject,
                f"{_family(config)}: layer {experts.layer} has two routed blocks, {other.name} and {experts.name}; "
                "moescope records models with one a layer",
            )
        by_layer[experts.layer] = experts
    if not by_layer:
        others = " and ".join(sorted({experts.block for experts in candidates}))
        raise ModelUnsupported(subject, f"{_family(config)} routes no {block} blocks, only {others}")
    return tuple(by_layer[layer] for layer in sorted(by_layer))


def find_left_out(model: nn.Module, experts: Sequence[Experts]) -> tuple[str, ...]:
    """Routed blocks of a model that are not among `experts`: those of another kind, and of towers text never reaches.

    Args:
        model: The whole model, even if only a part of it is recorded.
        experts: The experts of all layers of that part.
    Returns:
        Their paths, each once, with ``*`` for the index of the layer.
    """
    taken = {id(module) for block in experts for module in block.module.modules()}
    names = []
    for name, module in model.named_modules():
        routed = (name.rpartition(".")[2] == "experts" and _has_parameters(module)) or _is_routed(module)
        if routed and not any(id(inner) in taken for inner in module.modules()):
            names.append(re.sub(r"\.\d+(?=\.|$)", ".*", name, count=1))
    return tuple(dict.fromkeys(names))


def given_experts(model: nn.Module, routers: Sequence[Router]) -> tuple[Experts, ...]:
    """The experts that a user's routers describe, by layer, ascending.

    Raises:
        ValueError: A path is not in the model or says no layer, or two routers are of one layer.
    """
    by_layer: dict[int, Experts] = {}
    for router in routers:
        try:
            module = model.get_submodule(router.module)
        except AttributeError as error:
            raise ValueError(f"the model has no module {router.module!r}: {error}") from None
        index = layer_index(router.module) if router.layer is None else None
        layer = int(index[1]) if index is not None else router.layer
        if layer is None:
            raise ValueError(f"{router.module} is in no numbered layer: say which, Router(layer=…)")
        if layer in by_layer:
            raise ValueError(f"layer {layer} has two routers, {by_layer[layer].name} and {router.module}")
        reading: dict[str, Any] = {name: getattr(router, name) for name in _AS_READING}
        called, listened = (module, None) if router.at == "call" else (None, module)
        by_layer[layer] = Experts(
            **reading, layer=layer, name=router.module, module=module, called=called, router=listened
        )
    if not by_layer:
        raise ValueError("routers must name at least one router")
    return tuple(by_layer[layer] for layer in sorted(by_layer))


def select_experts(
    experts: Sequence[Experts], layers: Sequence[int] | None, num_layers: int | None, subject: object
) -> tuple[Experts, ...]:
    """The experts of some layers, ascending; of all for None.

    Raises:
        NoSuchLayer: A layer does not exist or has no routed experts.
    """
    if layers is None:
        return tuple(experts)
    have = [block.layer for block in experts]
    for layer in layers:
        if layer not in have:
            dense = num_layers is not None and 0 <= layer < num_layers
            problem = f"layer {layer} has no routed experts" if dense else f"there is no layer {layer}"
            raise NoSuchLayer(subject, f"{problem}; the layers with routed experts are {ranges(have)}")
    return tuple(block for block in experts if block.layer in set(layers))


def forward_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of a module's ``forward``; none if Python cannot say."""
    try:
        return list(inspect.signature(type(module).forward).parameters)[1:]  # 0 is self
    except (TypeError, ValueError):
        return []


def layer_index(name: str) -> re.Match[str] | None:
    """The first number in the path of a module, as group 1 of a match."""
    return re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)


def text_tower(model: Any) -> Any:
    """The part of a model that reads text by itself; the model, if it is of one piece."""
    path = TEXT_TOWERS.get(str(getattr(getattr(model, "config", None), "model_type", None)))
    for name in () if path is None else (path, f"model.{path}"):
        try:
            return model.get_submodule(name)
        except AttributeError:
            continue
    return model


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def num_layers(config: Any) -> int | None:
    """Layers of a model, those of an encoder and a decoder together; None if the configuration does not say."""
    if getattr(config, "is_encoder_decoder", False):
        stacks = [_whole_number(config, f"{stack}_layers", f"num_{stack}_layers") for stack in ("encoder", "decoder")]
        stacks[0] = stacks[0] or _whole_number(config, "num_layers")
        return sum(number for number in stacks if number) if all(stacks) else None
    return _whole_number(text_config(config), "num_hidden_layers")


def hidden_size(config: Any) -> int | None:
    """Values of a hidden state; None if the configuration does not say."""
    return _whole_number(text_config(config), "hidden_size", "d_model")


def _routed_blocks(model: nn.Module, subject: object) -> tuple[list[Experts], list[str]]:
    """Every routed block that text reaches, and the names of modules that hold experts and are not called as one."""
    tower = _language_model(model)
    blocks: list[Experts] = []
    uncovered: list[str] = []
    for name, module in model.named_modules():
        if not f"{name}.".startswith(tower) or _NOT_FOR_TEXT & set(name.split(".")):
            continue
        try:
            reading = find_adapter(module) or _general_rule(module)
        except (ValueError, AttributeError, TypeError, OSError) as error:
            raise ModelUnsupported(subject, f"{name} is not as its adapter knows it: {error}", NEWER) from error
        if reading is not None:
            blocks.append(_describe(model, name, module, reading, subject))
        elif name.rpartition(".")[2] == "experts" and _has_parameters(module):
            uncovered.append(name)
    return blocks, uncovered


def _language_model(model: Any) -> str:
    """Path, with a dot, of the part of a model with several towers that reads text; empty for all of it."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return ""
    tower = text_tower(model)
    decoder = tower.get_decoder() if hasattr(tower, "get_decoder") else tower
    if decoder is model or not any(_is_routed(module) for module in decoder.modules()):
        return ""
    return next((f"{name}." for name, module in model.named_modules() if module is decoder), "")


def _is_routed(module: nn.Module) -> bool:
    try:
        return (find_adapter(module) or _general_rule(module)) is not None
    except (ValueError, AttributeError, TypeError, OSError):
        return True


def _general_rule(module: nn.Module) -> Reading | None:
    """How to read the ids and weights that a module is called with; None if it is not called with them."""
    names = forward_parameters(module)
    ids = next((name for name in names if name in ID_PARAMETERS), None)
    weights = next((name for name in names if name in WEIGHT_PARAMETERS), None)
    if ids is None or weights is None:
        return None
    ids_place, weights_place = names.index(ids), names.index(weights)

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any = None) -> tuple[Any, Any]:
        return (
            args[ids_place] if ids_place < len(args) else kwargs.get(ids),
            args[weights_place] if weights_place < len(args) else kwargs.get(weights),
        )

    return Reading(
        read, module, None, _num_experts(module) or 0,
        num_null_experts=int(getattr(module, "zero_expert_num", None) or 0), says="the experts' arguments",
    )  # fmt: skip


def _describe(model: nn.Module, name: str, module: nn.Module, reading: Reading, subject: object) -> Experts:
    index = layer_index(name)
    if index is None:
        raise ModelUnsupported(subject, f"{name} is in no numbered layer")
    if not reading.num_experts:
        raise ModelUnsupported(subject, f"{name} does not say how many experts it has")
    if getattr(module, "_is_expert_parallel", False):
        raise ModelUnsupported(subject, f"{name} holds only this process's share of the experts")
    if reading.holder:
        name, module = f"{name}.{reading.holder}", module.get_submodule(reading.holder)
    config = getattr(model, "config", None)
    in_decoder = bool(getattr(config, "is_encoder_decoder", False)) and "decoder" in name[: index.start()].split(".")
    in_place = {
        "num_shared_experts": reading.num_shared_experts or _num_shared_experts(model, name, index.end(1)),
        "block": "attention" if re.search("attn|attention", name[index.end(1) :]) else reading.block,
    }
    layer = int(index[1]) + (_num_encoder_layers(model) if in_decoder else 0)
    return Experts(**vars(reading) | in_place, layer=layer, name=name, module=module, in_decoder=in_decoder)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _num_experts(module: nn.Module) -> int | None:
    """Routed experts of a module: what it says, else the first dimension that its stacked weights share."""
    for name in ("num_routed_experts", "num_experts", "num_local_experts"):
        if isinstance(number := getattr(module, name, None), int):
            return number
    dims = {parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.dim() == 3}
    return dims.pop() if len(dims) == 1 else None


def _num_encoder_layers(model: nn.Module) -> int:
    names = [name for name, _ in model.named_modules()]
    return 1 + max(int(number[1]) for name in names if (number := re.search(r"(?:^|\.)encoder\.\w+\.(\d+)$", name)))


def _num_shared_experts(model: nn.Module, name: str, end_of_layer: int) -> int:
    """Shared experts of a layer: whether it has any it shows by their name, how many the configuration says.

    They stand beside the experts, or beside the block that holds them. A model may fuse several into one module and say
    no number.
    """
    shared = any(
        "shared" in child and _has_parameters(module)
        for parent in _parents(name, end_of_layer)
        for child, module in model.get_submodule(parent).named_children()
    )
    if not shared:
        return 0
    return _whole_number(text_config(getattr(model, "config", None)), *_SHARED_FIELDS) or 1


def _parents(name: str, end: int) -> Iterator[str]:
    """The paths above a module, from the nearest one up to the layer, whose path is the first `end` characters."""
    while len(name) > end:
        name = name.rpartition(".")[0]
        yield name


def _whole_number(config: Any, *names: str) -> int | None:
    """The first of some fields of a configuration that holds a number from 1."""
    for name in names:
        number = getattr(config, name, None)
        if isinstance(number, int) and not isinstance(number, bool) and number > 0:
            return number
    return None


def _refuse_without_experts(config: Any, subject: object) -> None:
    family = _family(config)
    for name in _MOE_FIELDS:
        number = getattr(text_config(config), name, None)
        if isinstance(number, int) and number > 1:
            raise ModelUnsupported(
                subject,
                f"{family}: the configuration says {name} = {number}, but no module is called with chosen ids and "
                "gate weights",
                NEWER,
            )
    raise ModelNotMoE(subject, f"{family} is not a mixture of experts: none of its layers has routed experts")


def _family(config: Any) -> str:
    return str(getattr(config, "model_type", None) or "the model")


def check_call(experts: Experts, ids: Any, weights: Any) -> tuple[Tensor, Tensor]:
    """What reached the experts, if it is ids and gate weights.

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
