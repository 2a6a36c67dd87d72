"""A model of which one layer at a time is in memory, each as the model itself would call it.

The body is built empty. What lies outside its layers is loaded first, then a layer when it is asked for, with
transformers' own weight conversion on that layer's tensors alone. To run layer 7, the model's own forward pass is run:
the layers before it return what layer 6 returned in its own pass, layer 7 runs, and there the pass ends. So masks,
positions and whatever else a layer is called with are made by the model's own code, and never stored.

A family that hands more from layer to layer than the layers' outputs comes out wrong that way; `rehearsal` finds out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from moescope.engines.streamed.shards import Shards, StoredTensor
from moescope.engines.transformers.faults import refuse_wrapped
from moescope.engines.transformers.routers import Experts, hidden_size
from moescope.errors import ModelDamaged, ModelNotStreamable

try:  # semi-internal; tests/engines/test_streaming.py pins what is used
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        convert_and_load_state_dict_in_model,
        dot_natural_key,
        rename_source_key,
    )
    from transformers.modeling_utils import LoadStateDictConfig

    _MISSING: str | None = None
except ImportError as error:  # pragma: no cover - another version of transformers
    _MISSING = str(error)

NO_STREAM = "--no-stream loads the model whole"


class _LayerDone(BaseException):
    """Ends a forward pass after one layer; no ``except Exception`` of a model may swallow it."""


class Layerwise:
    """The body of a model whose layers are loaded and run one at a time.

    Args:
        folder: A checkpoint in safetensors files; they are kept open until `close`.
        config: Its configuration, not quantized.
        dtype: ``auto`` (the checkpoint's), ``bfloat16``, ``float16``, ``float32``, or one of torch.
        device: Where the layer runs.
        find: Finds the experts of the body.
        subject: What errors call it.

    Attributes:
        dtype: What it computes in.
        device: Where.
        body: The model without its head, everything on the meta device until it is loaded.
        experts: Its experts by layer, ascending.
        shards: The files.

    Raises:
        ModelDamaged: The files are damaged.
        ModelNotStreamable: The model has no one list of layers, or this transformers cannot load a part of one.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        *,
        dtype: str | torch.dtype,
        device: torch.device,
        find: Callable[[nn.Module, object], tuple[Experts, ...]],
        subject: object,
    ) -> None:
        if _MISSING is not None:
            raise ModelNotStreamable(
                subject, f"transformers {transformers.__version__} cannot load one layer: {_MISSING}", NO_STREAM
            )
        self.subject = subject
        self.shards = Shards(folder)
        try:
            self.device = device
            self.dtype = _resolve_dtype(dtype, config, self.shards)
            with torch.device("meta"):
                self.body: Any = transformers.AutoModel.from_config(copy.deepcopy(config), dtype=self.dtype).eval()
            self.experts = find(self.body, subject)
            self._prefix, self._layers = _find_layers(self.body, self.experts, subject)
            self._empty = dict([*self.body.named_parameters(), *self.body.named_buffers()])
            self._conversions = get_model_conversion_mapping(self.body)
            self._targets = self._find_targets()
            self._stacked: dict[str, Tensor] = {}  # in the layer that is loaded
            self._spare: list[Tensor] = []  # of the layer that was freed, for the next one to be read into
        except BaseException:
            self.shards.close()
            raise

    def keys(self, layer: int | None, *, bare: bool = False) -> list[str]:
        """Names, in the checkpoint, of a layer's tensors; for None, of all that lie in no layer.

        Those of its routed experts are left out if `bare`.
        """
        inside = self._names_within(layer, bare=bare)
        return [key for key, target in self._targets.items() if inside(target)]

    def nbytes(self, layer: int | None, *, bare: bool = False) -> int:
        """Bytes, in the checkpoint, of the tensors that `keys` names."""
        return sum(self.shards.tensors[key].nbytes for key in self.keys(layer, bare=bare))

    def memory_bytes(self, layer: int | None) -> int:
        """Bytes that a layer takes once it is loaded; for None, all that lies in no layer."""
        inside = self._names_within(layer)
        return sum(tensor.nbytes for name, tensor in self._empty.items() if inside(name))

    def operations(self, layer: int, *, share_of_experts: float) -> float:
        """Multiplications and additions a token in the matrices of a layer, of whose experts only a share runs."""
        inside = self._names_within(layer)
        outside_experts = self._names_within(layer, bare=True)
        return sum(
            2 * tensor.numel() * (1 if outside_experts(name) else share_of_experts)
            for name, tensor in self._empty.items()
            if inside(name) and tensor.dim() >= 2
        )

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return hidden_size(self.body.config) or 1

    def check(self, last: int, *, bare: bool) -> None:
        """See that the checkpoint holds every tensor up to a layer in its shape, before hours are spent on the others.

        The last one will be loaded without its routed experts if `bare`.

        Raises:
            ModelDamaged: A tensor is missing or misshapen.
        """
        for layer in (None, *range(last + 1)):
            without_experts = bare and layer == last
            shapes = {
                key: torch.empty(self.shards.tensors[key].shape, dtype=self.shards.tensors[key].dtype, device="meta")
                for key in self.keys(layer, bare=without_experts)
            }
            info = self._convert(shapes, torch.device("meta"))
            self._refuse_gaps(info, layer, info.missing_keys, bare=without_experts)
            self._empty_out(layer)

    def load(self, layer: int | None, *, bare: bool = False) -> None:
        """Load one layer, or all of it but its routed experts; for None, all that lies in no layer.

        Raises:
            ModelDamaged: A tensor is missing or misshapen, or a file cannot be read.
        """
        tensors = {key: self.shards.tensors[key] for key in self.keys(layer, bare=bare)}
        for target, merged in self._merge(tensors).items():
            self._set(target, merged)
        info = self._convert(tensors, self.device)
        self._make_buffers(layer)
        missing = {name for name, tensor in self.body.state_dict().items() if tensor.is_meta}
        self._refuse_gaps(info, layer, missing, bare=bare)

    def fetch_ahead(self, layer: int, *, bare: bool = False) -> None:
        """Have the system read one layer while something else is computed."""
        self.shards.fetch_ahead(self.keys(layer, bare=bare))

    def free(self, layer: int) -> None:
        """Empty one layer."""
        self._empty_out(layer)
        self._spare, self._stacked = list(self._stacked.values()), {}

    def run(self, layer: int, inputs: Mapping[str, Tensor], before: Any) -> Any:
        """Run one layer, which must be loaded, and return what it returns.

        Args:
            inputs: Of the whole model: ``input_ids`` of shape (sequence, token), and ``attention_mask`` if need be.
            before: What the layer before it returned; None for the first.
        Raises:
            ModelNotStreamable: The model did not come to this layer.
        """
        returned: list[Any] = []
        own = self._layers[layer].forward

        def run(*args: Any, **kwargs: Any) -> Any:
            returned.append(own(*args, **kwargs))
            raise _LayerDone

        def pass_through(*_: Any, **__: Any) -> Any:
            return before

        for earlier in self._layers[:layer]:
            earlier.forward = pass_through
        self._layers[layer].forward = run
        try:
            with suppress(_LayerDone), torch.no_grad():
                self.body(**inputs, use_cache=False)
        finally:
            for changed in self._layers[: layer + 1]:
                del changed.forward
        if not returned:
            raise ModelNotStreamable(self.subject, f"a forward pass ends before layer {layer}", NO_STREAM)
        return returned[0]

    def close(self) -> None:
        """Close the files."""
        self.shards.close()

    def _find_targets(self) -> dict[str, str]:
        """For each tensor of the checkpoint that the body has, the name it has there; one of several if it is split."""
        renamings = [conversion for conversion in self._conversions if isinstance(conversion, WeightRenaming)]
        converters = [conversion for conversion in self._conversions if isinstance(conversion, WeightConverter)]
        names, prefix = self.body.state_dict(), self.body.base_model_prefix
        targets: dict[str, str] = {}
        self._patterns: dict[str, str] = {}
        for key in self.shards.tensors:
            target, pattern = rename_source_key(key, renamings, converters, prefix, names)
            if target not in names and key in names:
                target, pattern = rename_source_key(key, [], [], prefix, names)
            if target in names:
                targets[key] = target
                if pattern is not None:
                    self._patterns[key] = pattern
        return targets

    def _convert(self, tensors: Mapping[str, Any], device: torch.device) -> Any:
        """Give the body these tensors of the checkpoint; return what transformers says of it."""
        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.body._get_dtype_plan(self.dtype),
            device_map={"": device},
            weight_mapping=self._conversions,
        )
        try:
            info, _ = convert_and_load_state_dict_in_model(self.body, dict(tensors), config)
        except ModelDamaged:
            raise
        except Exception as error:  # whatever damaged tensors make a conversion raise
            raise ModelDamaged(self.subject, f"its weights cannot be loaded: {error}") from error
        return info

    def _refuse_gaps(self, info: Any, layer: int | None, missing: Iterable[str], *, bare: bool) -> None:
        gaps = sorted(filter(self._names_within(layer, bare=bare), missing))
        gaps += sorted([*info.conversion_errors, *(str(key[0]) for key in info.mismatched_keys)])
        if gaps:
            refuse_wrapped(self.subject, sorted(self.shards.tensors))
            raise ModelDamaged(self.subject, f"{len(gaps)} tensors are missing or misshapen, such as {gaps[0]}")

    def _empty_out(self, layer: int | None) -> None:
        inside = self._names_within(layer)
        for name, empty in self._empty.items():
            if inside(name):
                module, _, last = name.rpartition(".")
                owner = self.body.get_submodule(module)
                (owner._parameters if last in owner._parameters else owner._buffers)[last] = empty

    def _names_within(self, layer: int | None, *, bare: bool = False) -> Callable[[str], bool]:
        """Whether a name of the body lies in a layer, and if `bare` in none of its experts; for None, in no layer."""
        start = f"{self._prefix}." if layer is None else f"{self._prefix}.{layer}."
        without = tuple(f"{block.name}." for block in self.experts if bare and block.layer == layer)
        return lambda name: name.startswith(start) != (layer is None) and not name.startswith(without)

    def _merge(self, tensors: dict[str, StoredTensor]) -> dict[str, Tensor]:
        """Take from `tensors` those that are stacked into one, and read each right to its place.

        The experts are most of a layer. transformers would hold them twice: read, then stacked.
        """
        groups: dict[str, list[str]] = {}
        for key in tensors:
            if key in self._patterns:
                groups.setdefault(self._targets[key], []).append(key)
        converters = {
            pattern: conversion
            for conversion in self._conversions
            if isinstance(conversion, WeightConverter)
            for pattern in conversion.source_patterns
        }
        merged: dict[str, Tensor] = {}
        plan = self.body._get_dtype_plan(self.dtype)
        for target, keys in groups.items():
            converter = converters[self._patterns[keys[0]]]
            places = self._places(converter, keys, tensors, self._empty[target])
            if places is None or any(re.search(pattern.replace("*", ".*"), target) for pattern in plan):
                continue
            out = self._memory_for(self._empty[target])
            for key, (index, start, end) in places.items():
                tensors.pop(key).read_into(out[index, start:end])
            self._stacked[target] = out
            merged[target] = out.to(self.device)
        self._spare.clear()  # what this layer has no use for
        return merged

    def _memory_for(self, empty: Tensor) -> Tensor:
        """Memory for a tensor: that of the layer before if it fits, since new pages cost time to fault in."""
        for index, spare in enumerate(self._spare):
            if (spare.shape, spare.dtype) == (empty.shape, empty.dtype):
                return self._spare.pop(index)
        return torch.empty(empty.shape, dtype=empty.dtype)

    def _places(
        self, converter: WeightConverter, keys: list[str], tensors: Mapping[str, StoredTensor], target: Tensor
    ) -> dict[str, tuple[int, int, int]] | None:
        """Where in the stack each tensor goes: index, first row, end; None if it is not a plain stack of matrices."""
        kinds = [(type(operation), operation.dim) for operation in converter.operations if hasattr(operation, "dim")]
        if len(kinds) != len(converter.operations) or len(converter.target_patterns) != 1 or target.dim() != 3:
            return None
        if kinds not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
            return None
        places: dict[str, tuple[int, int, int]] = {}
        row = 0
        for pattern in converter.source_patterns:
            members = sorted((key for key in keys if self._patterns[key] == pattern), key=dot_natural_key)
            shapes = {tensors[key].shape for key in members}
            if len(members) != target.shape[0] or len(shapes) != 1:
                return None
            (shape,) = shapes
            if len(shape) != 2 or shape[1] != target.shape[2]:
                return None
            places |= {key: (index, row, row + shape[0]) for index, key in enumerate(members)}
            row += shape[0]
        return places if row == target.shape[1] and len(places) == len(keys) else None

    def _set(self, name: str, value: Tensor) -> None:
        module, _, last = name.rpartition(".")
        owner = self.body.get_submodule(module)
        if last in owner._parameters:
            value = nn.Parameter(value, requires_grad=False)
        value._is_hf_initialized = True  # type: ignore[attr-defined]
        setattr(owner, last, value)

    def _make_buffers(self, layer: int | None) -> None:
        """Make what a checkpoint does not hold (rotary frequencies …) as transformers does after loading."""
        inside = self._names_within(layer)
        for name, buffer in list(self.body.named_non_persistent_buffers()):
            if buffer.is_meta and inside(name):
                module, _, last = name.rpartition(".")
                self.body.get_submodule(module)._buffers[last] = torch.empty_like(buffer, device=self.device)
        for name, module in self.body.named_modules():
            module._is_hf_initialized = not inside(f"{name}.")
        self.body.initialize_weights()


def _resolve_dtype(dtype: str | torch.dtype, config: Any, shards: Shards) -> torch.dtype:
    """The dtype by transformers' rule: the one asked for, else the configuration's, else that of the first weights."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return getattr(torch, dtype)
    named = getattr(config, "dtype", None)
    named = getattr(torch, named, None) if isinstance(named, str) else named
    if isinstance(named, torch.dtype):
        return named
    return next((tensor.dtype for tensor in shards.tensors.values() if tensor.dtype.is_floating_point), torch.float32)


def _find_layers(body: nn.Module, experts: tuple[Experts, ...], subject: object) -> tuple[str, nn.ModuleList]:
    prefixes = {re.split(r"\.\d+\.", block.name)[0] for block in experts}
    prefix = min(prefixes)
    layers = body.get_submodule(prefix)
    if len(prefixes) == 1 and isinstance(layers, nn.ModuleList):
        return prefix, layers
    raise ModelNotStreamable(
        subject, f"its layers with experts are not in one list: {', '.join(sorted(prefixes))}", NO_STREAM
    )
