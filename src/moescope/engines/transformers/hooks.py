"""Hooks that note what reaches the experts during a forward pass, and stop it once the last layer has chosen.

Unit: one `Choices` a layer and forward pass. Convention: rank 0 is the largest gate weight; equal weights keep the
order in which the router gave them. The hooks read and never change; they are gone when the `with` block ends, however
it ends.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moescope.engines.transformers.routers import Experts, check_call
from moescope.errors import ModelUnsupported, RouterSilent
from moescope.trace.columns import DROPPED


@dataclass(frozen=True)
class Choices:
    """What one layer chose in one forward pass, padding included.

    Attributes:
        expert_ids: Chosen experts by falling gate weight, shape (token, choice).
        gate_weights: Their weights as executed, shape (token, choice).
        predicted: For each distance looked ahead from, the experts predicted, shape (token, predicted).
    """

    expert_ids: NDArray[np.int16]
    gate_weights: NDArray[np.float32]
    predicted: Mapping[int, NDArray[np.int16]] = field(default_factory=dict)


class PredictingHooks(Protocol):
    """What predicts choices during a forward pass, before they are made; its hooks last as long as those of a watch."""

    def __enter__(self) -> object: ...

    def __exit__(self, *_: object) -> None: ...

    def take(self, num_tokens: int) -> Mapping[int, Mapping[int, NDArray[np.int16]]]:
        """What was predicted in the last pass: for each layer and distance ids of shape (token, predicted)."""


class _LastRouterCalled(BaseException):
    """Ends a forward pass; no ``except Exception`` of a model may swallow it."""


Tell = Callable[[Tensor, Tensor], None]
"""Called with the ids and the gate weights of a layer, each of shape (token, choice), in the router's order."""


def listen(experts: Experts, tell: Tell) -> list[RemovableHandle]:
    """Hook a layer, so that `tell` is called each time it chooses; whoever calls this removes the hooks.

    Args:
        experts: The layer, in any of the ways in which one can be read.
        tell: May raise; the forward pass then ends before the experts of this layer run, where the layer is read by its
            arguments, and after its router has run otherwise.
    Raises:
        ModelUnsupported: From within the forward pass, if what comes by is not ids and gate weights.
    """
    called, router = experts.called, experts.router
    outputs = threading.local()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        output = outputs.__dict__.pop("last", None)
        tell(*_read(experts, args, kwargs, output))

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if called is None:
            tell(*_read(experts, args, kwargs, output))
        else:
            outputs.last = output

    handles = []
    if router is not None:
        handles.append(router.register_forward_hook(after, with_kwargs=True))
    if called is not None:
        handles.append(called.register_forward_pre_hook(before, with_kwargs=True))
    return handles


def _read(experts: Experts, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    try:
        ids, weights = experts.read(args, kwargs, output)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelUnsupported(
            experts.name,
            f"layer {experts.layer} is called, or answers, in another way than its reading knows: {error!r}",
        ) from error
    return check_call(experts, ids, weights)


class RouterWatch:
    """Watches the routers of a model while its ``with`` block lasts.

    Args:
        experts: The layers to watch.
        stop_at: Layer whose experts need not run any more, because it chooses last; None lets the pass run to its end.
        lookahead: Predicts choices before they are made; None for no predictions.
    """

    def __init__(
        self, experts: Sequence[Experts], *, stop_at: int | None = None, lookahead: PredictingHooks | None = None
    ) -> None:
        self.experts = tuple(experts)
        self._stop_at = stop_at
        self._lookahead = lookahead
        self._calls: list[tuple[Experts, Tensor, Tensor]] = []
        self.undo = ExitStack()

    def __enter__(self) -> RouterWatch:
        for experts in self.experts:
            for handle in listen(experts, self.note(experts)):
                self.undo.callback(handle.remove)
        if self._lookahead is not None:
            self.undo.enter_context(self._lookahead)
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[int, Choices]:
        """Run one forward pass and return what each watched layer chose, in the order in which they chose.

        The decoder of an encoder-decoder reads what its encoder reads, after its start token, which is not returned.

        Args:
            model: The model, best without its head.
            inputs: ``input_ids`` of shape (sequence, token), and ``attention_mask`` if some tokens are padding.
        Raises:
            RouterSilent: A layer did not choose exactly once, or not for every token.
            ModelUnsupported: A layer was called with something else than ids and gate weights.
        """
        input_ids = inputs["input_ids"]
        more: dict[str, Any] = {"use_cache": False} if _takes_use_cache(type(model).forward) else {}
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            more["decoder_input_ids"] = _after_start(model, input_ids)
        return self.observe(lambda: model(**inputs, **more), input_ids.numel(), num_sequences=len(input_ids))

    def observe(self, forward: Callable[[], object], num_tokens: int, *, num_sequences: int = 1) -> dict[int, Choices]:
        """Call `forward`, which runs the watched layers over `num_tokens` tokens, padding included; as `run`.

        Args:
            forward: Runs the layers. Those of an encoder-decoder's decoder read one token more a sequence, first.
            num_tokens: Tokens of all sequences.
            num_sequences: How many sequences these are; only a decoder's layers need to know.
        """
        self._calls = []
        with suppress(_LastRouterCalled), torch.no_grad():  # inference_mode would leave its tensors in buffers
            forward()
        calls, self._calls = self._calls, []
        called = [experts.layer for experts, _, _ in calls]
        rows = {experts.layer: len(ids) for experts, ids, _ in calls}
        for experts in self.experts:
            expected = num_tokens + num_sequences * experts.in_decoder
            if called.count(experts.layer) != 1 or rows[experts.layer] != expected:
                raise RouterSilent(
                    f"layer {experts.layer}",
                    f"{experts.name} was called {called.count(experts.layer)} times with {rows.get(experts.layer, 0)} "
                    f"rows, expected once with {expected}",
                    "an experts implementation or kernel may bypass the module; load the model without it",
                )
        choices = {}
        predicted: Mapping[int, Mapping[int, NDArray[np.int16]]]
        predicted = {} if self._lookahead is None else self._lookahead.take(num_tokens)
        for experts, ids, weights in calls:
            if experts.in_decoder:
                ids, weights = _without_start(ids, num_sequences), _without_start(weights, num_sequences)
            choices[experts.layer] = _choices(experts, ids, weights, predicted.get(experts.layer, {}))
        return choices

    def note(self, experts: Experts) -> Tell:
        """What is called when this layer chooses."""

        def note(ids: Tensor, weights: Tensor) -> None:
            # Copied at once: a router may answer from a buffer that it fills again, or a model change its answer.
            self._calls.append((experts, ids.clone(), weights.clone()))
            if experts.layer == self._stop_at:
                raise _LastRouterCalled

        return note


@cache
def _takes_use_cache(forward: Callable[..., Any]) -> bool:
    parameters = inspect.signature(forward).parameters.values()
    return any(parameter.name == "use_cache" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _after_start(model: Any, input_ids: Tensor) -> Tensor:
    """The start token of the decoder before each sequence, shape (sequence, token + 1)."""
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    known = (getattr(model.config, name, None) for name in names)
    start = next((token_id for token_id in known if token_id is not None), 0)
    return torch.cat([input_ids.new_full((len(input_ids), 1), start), input_ids], dim=1)


def _without_start(rows: Tensor, num_sequences: int) -> Tensor:
    """Rows of all tokens but the first of each sequence."""
    return rows.view(num_sequences, -1, rows.shape[1])[:, 1:].reshape(-1, rows.shape[1])


def ranked(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of ids and gate weights by falling weight, equal ones in the router's order; shapes (token, choice)."""
    weights, order = weights.sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order), weights


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in what a module returned, in their order, whatever tuples, lists and mappings they are in."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def _choices(experts: Experts, ids: Tensor, weights: Tensor, predicted: Mapping[int, NDArray[np.int16]]) -> Choices:
    ids, weights = ranked(ids, weights)
    expert_ids, gate_weights = ids.to(torch.int16).cpu().numpy(), weights.float().cpu().numpy()
    limit, least = experts.num_experts + experts.num_null_experts, DROPPED if experts.drops else 0
    if expert_ids.min() < least or expert_ids.max() >= limit:
        raise ModelUnsupported(
            experts.name,
            f"layer {experts.layer} chose expert {expert_ids.max()} or {expert_ids.min()}, "
            f"expected {least}..{limit - 1}",
        )
    return Choices(expert_ids, gate_weights, predicted)
