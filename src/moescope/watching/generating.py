"""Calls of ``generate``: which tokens they read, and when they begin and end."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moescope.watching.calls import Call

Announce = Callable[[Any, tuple[Any, ...], dict[str, Any]], AbstractContextManager[None]]
"""Called with the model and the arguments of ``generate``, which runs in the block that it returns."""


@dataclass
class Generation:
    """One call of ``generate``.

    Attributes:
        unlike: What makes it read other things than each token of each sequence once, in order; None if nothing does.
        end_ids: Ids that end a sequence; after one ``generate`` feeds the row padding, masked as if it were real.
        finished: Rows that have ended, shape (sequence,).
        started: Whether a forward pass has been made.
    """

    unlike: str | None
    end_ids: tuple[int, ...]
    finished: Tensor | None = None
    started: bool = False

    @classmethod
    def read(cls, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation:
        """From the arguments of ``generate``: its own, else of the configuration given, else of the model's."""
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)

        def value(name: str) -> Any:
            if kwargs.get(name) is not None:
                return kwargs[name]
            chosen = getattr(given, name, None)
            return chosen if chosen is not None else getattr(getattr(model, "generation_config", None), name, None)

        odd = {
            "num_beams": (value("num_beams") or 1) > 1,
            "assistant_model": kwargs.get("assistant_model") is not None,
            "prompt_lookup_num_tokens": value("prompt_lookup_num_tokens") is not None,
            "assistant_early_exit": value("assistant_early_exit") is not None,
            "penalty_alpha": bool(value("penalty_alpha")),
            "guidance_scale": (value("guidance_scale") or 1) != 1,
            "custom_generate": kwargs.get("custom_generate") is not None,
            "use_cache=False": value("use_cache") is False,
            "cache_implementation='paged'": value("cache_implementation") == "paged",
        }
        unlike = next((name for name, is_so in odd.items() if is_so), None)
        end_ids = value("eos_token_id")
        end_ids = end_ids.flatten().tolist() if isinstance(end_ids, Tensor) else end_ids
        end_ids = [] if end_ids is None or unlike else end_ids
        return cls(unlike, tuple(end_ids) if isinstance(end_ids, list | tuple) else (int(end_ids),))

    def running(self, call: Call) -> Tensor | None:
        """Rows whose sequence has not ended, shape (sequence, 1); None if all run."""
        started, self.started = self.started, True
        if not started or not self.end_ids or call.shape[1] != 1 or call.input_ids is None:
            return None
        ends = torch.zeros_like(call.input_ids, dtype=torch.bool)
        for token_id in self.end_ids:
            ends |= call.input_ids == token_id
        self.finished = ends if self.finished is None else self.finished | ends
        return ~self.finished


_GENERATING: weakref.WeakKeyDictionary[nn.Module, tuple[list[Announce], Any]] = weakref.WeakKeyDictionary()
"""For each watched model who listens, and a ``generate`` that the instance had of its own."""


@contextmanager
def generate_announced(model: nn.Module, announce: Announce) -> Iterator[None]:
    """Have ``generate`` of the model run, until the block ends, within what `announce` returns for its arguments."""
    original = getattr(model, "generate", None)
    if original is None:
        yield
        return
    listeners, own = _GENERATING.setdefault(model, ([], model.__dict__.get("generate")))
    listeners.append(announce)
    if len(listeners) == 1:

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for listener in tuple(listeners):
                    stack.enter_context(listener(model, args, kwargs))
                return original(*args, **kwargs)

        model.__dict__["generate"] = generate
    try:
        yield
    finally:
        listeners.remove(announce)
        if not listeners:
            del model.__dict__["generate"], _GENERATING[model]
            if own is not None:
                model.__dict__["generate"] = own
