"""Opening a trace, whole or without some of its documents or tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moescope.trace.excluding import without
from moescope.trace.gate import pass_gate
from moescope.trace.reader import Trace


def open_trace(path: Path | str, *, exclude: Sequence[str] = ()) -> Trace:
    """Open a trace, finished or not.

    Args:
        path: Folder of the trace.
        exclude: What is left out: ``documents:3,17-20`` by number, ``tokens:0-8191`` by place in the trace, from 0.
    Raises:
        TraceNotFound: There is no trace at the path.
        TraceNewer: It was written in a later version of the format.
        TraceDamaged: A file is missing or contradicts the header.
        ValueError: An item of `exclude` is none that could be.
        NoSuchDocument: The trace does not have what is to be left out, or nothing is left.
    """
    path = Path(path)
    opened = pass_gate(path)
    return without(Trace(path, opened.header, opened.parts, opened.summary), exclude)


def as_trace(source: Trace | Path | str) -> Trace:
    """The trace itself, or that at a path: what every function that is given a trace begins with.

    Raises:
        TypeError: It is neither.
        TraceNotFound: There is no trace at the path.
    """
    if isinstance(source, str | Path):
        return open_trace(source)
    if not isinstance(source, Trace):
        raise TypeError(f"expected a trace or the path of one, not {type(source).__name__}")
    return source
