"""One pass over a trace that fills several counters, a part and some layers at a time, on several threads.

A counter holds sums that do not grow with tokens and merges with another of its kind, so neither the number of threads
nor the order of the parts changes a result. What a new measure needs from tokens is a new counter.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol, Self, TypeVar

from moescope.trace import Layer, Part, Trace

COLUMNS_A_READ = 64
"""Columns of expert ids read together, so that memory stays bounded whatever the number of layers."""


class Filled(Protocol):
    """What a pass fills; the counters of a trace (`counter.Counter`) are more than that."""

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count some layers of a part.

        Args:
            part: Whole documents, with the domain codes of the trace. Beside the layers of `group` it holds the layer
                counted before them, if there is one, for what goes from layer to layer.
            group: The layers to count; the groups of a part come in ascending order, the first layer's first.
        """

    def merge(self, other: Self) -> None:
        """Add what another counter of the same trace and layers holds, in place."""


C = TypeVar("C", bound=Filled)
S = TypeVar("S")
W = TypeVar("W")


def one_pass(
    trace: Trace,
    layers: Sequence[Layer],
    make: Callable[[], Sequence[C]],
    *,
    threads: int | None = None,
    tokens: bool = False,
    weights: bool = False,
    together: int = 0,
) -> list[C]:
    """Fill the counters that `make` gives with the whole trace.

    Args:
        trace: The trace, complete or not.
        layers: Layers to count, ascending.
        make: Makes empty counters, the same ones on each call; called once a thread.
        threads: Parts counted at a time; None for the number of processors.
        tokens: Whether a counter needs token ids or phases.
        weights: Whether a counter needs gate weights.
        together: Consecutive parts are joined up to so many tokens before they are counted, for what goes on from one
            document to the next; a part is never divided. 0 to count each part by itself.
    Returns:
        The counters of the whole trace.
    Raises:
        NotRecorded: Gate weights are needed and were not recorded, or the trace holds counts only.
        TraceDamaged: A page fails its checksum.
        ValueError: `threads` is not positive.
    """
    blocks = runs([part.num_tokens for part in trace.parts], together)
    threads = threads_to_use(threads, len(blocks))
    trace.need_tokens(weights=weights)

    def count(counters: list[C], block: range) -> None:
        before: Part | None = None
        for group in layer_groups(layers):
            part = Part.joined(
                [trace.with_trace_domains(trace.parts[n].read(group, tokens=tokens, weights=weights)) for n in block]
            )
            for counter in counters:
                counter.add(part if before is None else _with_layer_before(part, before), group)
            before = part

    made = sums_by_thread(blocks, threads, lambda: list(make()), count)
    total = list(make())
    for mine in total:
        for counters in made:
            mine.merge(counters.pop(0))  # and free it: the largest counters are in memory twice only one by one
    return total


def threads_to_use(threads: int | None, most: int | None = None) -> int:
    """So many threads, the number of processors for None; at most one for each of `most` pieces of work.

    Raises:
        ValueError: `threads` is not positive.
    """
    threads = threads if threads is not None else os.cpu_count() or 1
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    return threads if most is None else max(1, min(threads, most))


def sums_by_thread(work: Sequence[W], threads: int, make: Callable[[], S], add: Callable[[S, W], None]) -> list[S]:
    """What each thread added to sums of its own, which `make` gives empty; of no work, one of them."""
    local = threading.local()
    made: list[S] = []

    def run(piece: W) -> None:
        if not hasattr(local, "sums"):
            local.sums = make()
            made.append(local.sums)
        add(local.sums, piece)

    if threads == 1:
        for piece in work:
            run(piece)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, work))
    return made or [make()]


def runs(sizes: Iterable[int], most: int) -> list[range]:
    """Runs of consecutive things whose sizes add up to `most` at most, or of one that is larger.

    Example:
        >>> runs([3, 4, 9, 1, 1], 7)
        [range(0, 2), range(2, 3), range(3, 5)]
    """
    found: list[range] = []
    held = 0
    for n, size in enumerate(sizes):
        if found and held + size <= most:
            found[-1] = range(found[-1].start, n + 1)
            held += size
        else:
            found.append(range(n, n + 1))
            held = size
    return found


def _with_layer_before(part: Part, before: Part) -> Part:
    layer = max(before.expert_ids)
    weights = {layer: before.gate_weights[layer]} if before.gate_weights else {}
    return replace(
        part,
        expert_ids={layer: before.expert_ids[layer], **part.expert_ids},
        gate_weights={**weights, **part.gate_weights},
    )


def layer_groups(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Consecutive layers that are read together, at most `COLUMNS_A_READ` columns of ids or one layer."""
    return [[layers[n] for n in run] for run in runs((layer.top_k for layer in layers), COLUMNS_A_READ)]


def layer_by_layer(
    measure: Callable[[Layer], S],
    layers: Sequence[Layer],
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[S]:
    """What `measure`, called in any thread, gives of each layer; `progress` gets the number done and of all."""
    done = 0

    def measured(layer: Layer) -> S:
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
