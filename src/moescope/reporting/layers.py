"""Which layers are shown where each takes a table or a panel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moescope.errors import NoSuchDocument
from moescope.measures.claims import first_middle_last
from moescope.trace import Trace


def shown_layers(trace: Trace, layers: Iterable[int] | None = None) -> tuple[int, ...]:
    """The layers asked for, or else the first, the middle and the last recorded one, as in the paper.

    Raises:
        NoSuchLayer: A layer was not recorded.
        NoSuchDocument: Nothing has been recorded yet.
    """
    if not trace.num_tokens:
        raise NoSuchDocument(trace.path, "the trace holds no document yet", "`moescope record` goes on with it")
    recorded = tuple(layer.layer for layer in trace.select_layers(layers))
    return recorded if layers is not None else first_middle_last(recorded)


def among(shown: Sequence[int], known: Sequence[int]) -> tuple[int, ...]:
    """The shown layers that are known; if that leaves some out, the first, the middle and the last known."""
    kept = tuple(layer for layer in shown if layer in known)
    return kept if len(kept) >= min(len(shown), len(known)) else first_middle_last(known)
