"""Hooks that note what reaches the experts during a forward pass, and stop it once the last layer has spoken.

Unit: one `Choices` a layer and forward pass. Convention: rank 0 is the largest gate weight; equal weights keep the
order in which the router gave them. The hooks read and never change; they are gone when the `with` block ends, however
it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moescope.errors import ModelUnsupported, RouterSilent
from moescope.recording.routers import Experts, check_call


@dataclass(frozen=True)
class Choices:
    """What one layer chose in one forward pass, padding included.

    Attributes:
        expert_ids: Chosen experts by falling gate weight, shape (token, choice).
        gate_weights: Their weights as executed, shape (token, choice).
    """

    expert_ids: NDArray[np.int16]
    gate_weights: NDArray[np.float32]


class _LastRouterSpoke(BaseException):
    """Ends a forward pass; no ``except Exception`` of a model may swallow it."""


class RouterWatch:
    """Watches the routers of a model while its ``with`` block lasts.

    Args:
        experts: The layers to watch.
        stop_at: Layer whose experts need not run any more, because it speaks last; None lets the pass run to its end.
    """

    def __init__(self, experts: Sequence[Experts], *, stop_at: int | None = None) -> None:
        self.experts = tuple(experts)
        self._stop_at = stop_at
        self._calls: list[tuple[Experts, Tensor, Tensor]] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> RouterWatch:
        for experts in self.experts:
            handle = experts.module.register_forward_pre_hook(self._hook(experts), with_kwargs=True)
            self._handles.append(handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[int, Choices]:
        """Run one forward pass and return what each watched layer chose, in the order in which they spoke.

        Args:
            model: The model, best without its head.
            inputs: ``input_ids`` of shape (sequence, token), and ``attention_mask`` if some tokens are padding.
        Raises:
            RouterSilent: A layer did not speak exactly once, or not for every token.
            ModelUnsupported: A layer was called with something else than ids and gate weights.
        """
        return self.observe(lambda: model(**inputs, use_cache=False), inputs["input_ids"].numel())

    def observe(self, forward: Callable[[], object], num_tokens: int) -> dict[int, Choices]:
        """Call `forward`, which runs the watched layers over `num_tokens` tokens, padding included; as `run`."""
        self._calls = []
        with suppress(_LastRouterSpoke), torch.no_grad():  # inference_mode would leave its tensors in buffers
            forward()
        calls, self._calls = self._calls, []
        spoke = [experts.layer for experts, _, _ in calls]
        rows = {experts.layer: len(ids) for experts, ids, _ in calls}
        for experts in self.experts:
            if spoke.count(experts.layer) != 1 or rows[experts.layer] != num_tokens:
                raise RouterSilent(
                    f"layer {experts.layer}",
                    f"{experts.name} was called {spoke.count(experts.layer)} times with {rows.get(experts.layer, 0)} "
                    f"rows, expected once with {num_tokens}",
                    "an experts implementation or kernel may bypass the module; load the model without it",
                )
        return {experts.layer: _ranked(experts, ids, weights) for experts, ids, weights in calls}

    def _hook(self, experts: Experts) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids, weights = check_call(experts, *experts.read(args, kwargs))
            self._calls.append((experts, ids, weights))
            if experts.layer == self._stop_at:
                raise _LastRouterSpoke

        return note


def _ranked(experts: Experts, ids: Tensor, weights: Tensor) -> Choices:
    """Choices by falling gate weight, on the CPU."""
    if ids.shape[1] > 1:
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(-1, order)
    expert_ids, gate_weights = ids.to(torch.int16).cpu().numpy(), weights.float().cpu().numpy()
    limit = experts.num_experts + experts.num_null_experts
    if expert_ids.min() < 0 or expert_ids.max() >= limit:
        raise ModelUnsupported(
            experts.name,
            f"layer {experts.layer} chose expert {expert_ids.max()} or {expert_ids.min()}, expected 0..{limit - 1}",
        )
    return Choices(expert_ids, gate_weights)
