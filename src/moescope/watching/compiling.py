"""Hooks in compiled models.

Dynamo traces hooks that are there when it compiles, as part of the graph, and never looks again: hooks that come later
are passed by (torch._dynamo.config.skip_nnmodule_hook_guards). Two things make hooks work all the same. The graph gets
one opaque operator a layer instead of what the hook does, so that it need not break there. And modules get, while they
are watched, a class of their own that differs from theirs in nothing but identity: graphs that were compiled without
the hooks check the class, do not fit any more, and fit again afterwards.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moescope.engines.transformers.hooks import Tell


class Listener(Protocol):
    """What learns which experts layers choose."""

    def note(self, place: int, ids: Tensor, weights: Tensor) -> None:
        """The layer at a place among those watched has chosen."""


_LISTENERS: weakref.WeakValueDictionary[int, Listener] = weakref.WeakValueDictionary()


def teller(listener: Listener, place: int, device: torch.device) -> Tell:
    """What passes the choices of the layer at a place to a listener, which it does not keep alive.

    Inside a compiled graph it is one opaque operator of it.
    """
    note, key = _note_operator(), id(listener)
    anchor = torch.zeros((), device=device)
    _LISTENERS[key] = listener

    def tell(ids: Tensor, weights: Tensor) -> None:
        if torch.compiler.is_compiling():
            note(ids, weights.detach(), anchor, key, place)
        else:
            listener.note(place, ids, weights)

    return tell


@functools.cache
def _note_operator() -> Any:
    """The operator that stands for a hook; it claims to change `anchor`, so that no compiler leaves it out."""

    @torch.library.custom_op("moescope::note", mutates_args=("anchor",))
    def note(ids: Tensor, weights: Tensor, anchor: Tensor, key: int, place: int) -> None:
        if (listener := _LISTENERS.get(key)) is not None:
            listener.note(place, ids, weights)

    return torch.ops.moescope.note.default


_CLASSES: weakref.WeakKeyDictionary[nn.Module, tuple[type, int]] = weakref.WeakKeyDictionary()


@contextmanager
def noticed_by_dynamo(module: nn.Module) -> Iterator[None]:
    """Make graphs that were compiled before fit this module no more, until the block ends."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    own, watches = _CLASSES.get(module, (type(module), 0))
    _CLASSES[module] = own, watches + 1
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    module.__class__ = type(own)(own.__name__, (own,), names)
    try:
        yield
    finally:
        own, watches = _CLASSES.pop(module)
        if watches > 1:
            _CLASSES[module] = own, watches - 1
        else:
            module.__class__ = own
