"""Load balance in the logs of a `transformers.Trainer`: figures every so many steps, a warning of collapsing layers.

Unit: the optimizer step with all its micro-batches. What the model reads between steps (evaluation, generation) is not
counted.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback

from moescope.watching.live import Loads, is_distributed
from moescope.watching.watcher import Watch, watch

ENOUGH_LOAD = 20
"""Mean load from which an idle expert is no accident: with even odds one in e^20 would be idle."""


class RoutingCallback(TrainerCallback):  # type: ignore[misc]
    """Logs how evenly the experts are used, through the Trainer's own logging (TensorBoard, W&B, ``log_history``).

    The keys are ``moe/imbalance`` (mean over layers) and ``moe/imbalance_max``, ``moe/max_violation`` and
    ``moe/max_violation_max`` (MaxVio), ``moe/entropy`` and ``moe/entropy_min`` (1 is even), ``moe/idle_experts`` (all
    layers together) and ``moe/idle_experts_max``; with `per_layer` also ``moe/layer_3/imbalance`` and so on. Each entry
    covers the steps since the one before, summed over processes. Hooks are gone when ``train`` returns or raises.

    Args:
        trainer: The trainer; add the callback to it, too.
        every: Steps between two entries; None for the trainer's ``logging_steps``.
        count_every: Count only every so many steps.
        layers: Layers to watch; None for all with routed experts.
        per_layer: Log the figures of each layer, too.
        max_imbalance: A layer above this, or with an idle expert, is collapsing; None for halfway from even to the
            worst, (1 + num_experts / top_k) / 2.
        patience: Consecutive entries in which it must be so before a `UserWarning` says so, once a layer.
    Example:
        trainer.add_callback(moescope.RoutingCallback(trainer))
    """

    def __init__(
        self,
        trainer: Any,
        *,
        every: int | None = None,
        count_every: int = 1,
        layers: Sequence[int] | None = None,
        per_layer: bool = False,
        max_imbalance: float | None = None,
        patience: int = 3,
    ) -> None:
        if min(every or 1, count_every, patience) < 1 or every == 0:
            raise ValueError(f"every {every}, count_every {count_every} or patience {patience} is below 1")
        self._trainer = trainer
        self._every, self._count_every = every, count_every
        self._layers, self._per_layer = layers, per_layer
        self._max_imbalance, self._patience = max_imbalance, patience
        self._watch: Watch | None = None
        self._streaks: dict[int, int] = {}
        trainer.train = self._ending_with(trainer.train)  # an error in `train` is no event

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Training begins: watch, and wait for the first step."""
        self._stop()
        self._watch = watch(self._trainer.model, layers=self._layers).__enter__()
        self._watch.pause()
        self._streaks = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The first micro-batch of a step comes."""
        if self._watch is not None and state.global_step % self._count_every == 0:
            self._watch.resume()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step is done; evaluation may follow and is not counted."""
        if self._watch is None:
            return
        self._watch.pause()
        if state.global_step % (self._every or max(1, int(state.logging_steps))):
            return
        loads = self._watch.all_reduce() if is_distributed() else self._watch.loads()
        self._watch.reset()
        if not loads.tokens:
            return  # none of the steps since the last entry was one of those that count
        wanted = control.should_log
        self._trainer.log(figures(loads, per_layer=self._per_layer))
        control.should_log = wanted  # the trainer takes an entry for its own, and would leave out the loss
        self._warn(loads)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Training is over."""
        self._stop()

    def _ending_with(self, train: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            finally:
                self._stop()

        return run

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.pause()
            self._watch.__exit__(None, None, None)
            self._watch = None

    def _warn(self, loads: Loads) -> None:
        top_k = (loads.load.sum("expert") + loads.dropped) / loads.tokens
        worst = loads.load["num_experts"] / top_k
        limit = (1 + worst) / 2 if self._max_imbalance is None else 0 * worst + self._max_imbalance
        enough = loads.load.sum("expert") / loads.load["num_experts"] >= ENOUGH_LOAD
        collapsing = ((loads.imbalance > limit) | ((loads.idle > 0) & enough)) & (loads.not_finite == 0)
        for layer in loads.load["layer"].values.tolist():
            before = self._streaks.get(layer, 0)
            self._streaks[layer] = before + 1 if collapsing.sel(layer=layer) or before >= self._patience else 0
            if self._streaks[layer] == self._patience:
                warnings.warn(
                    f"layer {layer} is collapsing: for {self._patience} entries its busiest expert has more than "
                    f"{float(limit.sel(layer=layer)):.2f} times the mean load (now "
                    f"{float(loads.imbalance.sel(layer=layer)):.2f}) or experts are idle (now "
                    f"{int(loads.idle.sel(layer=layer))}); is the load-balancing loss on, and summed layer by layer?",
                    stacklevel=2,
                )


def figures(loads: Loads, *, per_layer: bool = False) -> dict[str, float]:
    """The figures of an entry, as plain numbers; those that are undefined (no assignments) are left out."""
    measures = {"imbalance": loads.imbalance, "max_violation": loads.max_violation, "entropy": loads.entropy}
    entry: dict[str, float] = {}
    for name, values in measures.items():
        end = "min" if name == "entropy" else "max"
        entry[f"moe/{name}"] = float(values.mean())
        entry[f"moe/{name}_{end}"] = float(values.min() if end == "min" else values.max())
    entry["moe/idle_experts"] = float(loads.idle.sum())
    entry["moe/idle_experts_max"] = float(loads.idle.max())
    if per_layer:
        for name, values in {**measures, "idle_experts": loads.idle}.items():
            for layer in values["layer"].values.tolist():
                entry[f"moe/layer_{layer}/{name}"] = float(values.sel(layer=layer))
    return {name: value for name, value in entry.items() if np.isfinite(value)}
