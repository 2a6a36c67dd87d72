"""What is another while a ``with`` block lasts: an attribute, or a function of ``torch.nn.functional`` for one thread.

Models call such functions by their name. A torch function mode would reach every call, but it slows all functions of
torch, by a fifth of a small model's forward pass (docs/decisions/log.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch.nn import functional


@contextmanager
def attribute_set(owner: object, name: str, value: object) -> Iterator[None]:
    """An attribute of an object has another value until the block ends."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Replacing:
    """What stands for a function of torch in the thread that entered it; the last one entered counts."""

    name: ClassVar[str]
    """Name of the function in ``torch.nn.functional``."""

    _active: ClassVar[dict[tuple[str, int], list[Replacing]]] = {}
    _replaced: ClassVar[dict[str, Callable[..., Any]]] = {}
    _changing: ClassVar = threading.Lock()

    def __enter__(self) -> Self:
        with self._changing:
            if self.name not in self._replaced:
                self._replaced[self.name] = getattr(functional, self.name)
                setattr(functional, self.name, _dispatching(self.name, self._replaced[self.name]))
            self._active.setdefault((self.name, threading.get_ident()), []).append(self)
        return self

    def __exit__(self, *_: object) -> None:
        with self._changing:
            mine = self._active[self.name, threading.get_ident()]
            mine.pop()
            if not mine:
                del self._active[self.name, threading.get_ident()]
            if not any(name == self.name for name, _ in self._active):
                setattr(functional, self.name, self._replaced.pop(self.name))

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Called in place of torch's function."""
        raise NotImplementedError


def _dispatching(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """What every thread calls by that name meanwhile; code that is being compiled keeps to torch's function."""

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        active = Replacing._active.get((name, threading.get_ident()))
        if not active or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        return active[-1].call(*args, **kwargs)

    return dispatch
