"""How kernels are compiled: by numba, free of the lock of Python, and kept where there is a place for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def kernel(*, inline: str = "never") -> Callable[[Callable[..., Any]], Any]:
    """A decorator that compiles a function.

    A read-only installation without a home that can be written has no place for what is compiled; there it is compiled
    anew in every process.

    Args:
        inline: ``always`` for a function that its callers take in.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, inline=inline)(function)
        except RuntimeError:  # "no locator available"
            return numba.njit(nogil=True, inline=inline)(function)

    return compiled
