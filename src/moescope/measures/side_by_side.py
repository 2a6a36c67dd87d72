"""Layers measured side by side, in threads: what the measures of a sample of documents do with each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from moescope.trace import Layer

R = TypeVar("R")


def layer_by_layer(
    measure: Callable[[Layer], R],
    layers: Sequence[Layer],
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[R]:
    """What `measure` gives of each layer, in their order.

    Args:
        measure: Called with a layer, in any thread.
        layers: The layers.
        threads: Layers measured at a time.
        progress: Called with the number of layers done and of all.
    """
    done = 0

    def measured(layer: Layer) -> R:
        nonlocal done
        result = measure(layer)
        done += 1
        if progress is not None:
            progress(done, len(layers))
        return result

    if progress is not None:
        progress(0, len(layers))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(measured, layers))
