"""A trace into another format: which formats there are, and the one way into each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from moescope.exporting import hot_experts, json_lines, oracle_general, vllm
from moescope.exporting.output import new_output
from moescope.trace import Layer, Trace, as_trace

FORMATS: dict[str, Callable[[Trace, tuple[Layer, ...], Path, str], None]] = {
    "hot-experts": hot_experts.write,
    "jsonl": json_lines.write,
    "oracle-general": oracle_general.write,
    "vllm": vllm.write,
}
"""By name, what writes the layers of a trace to a path, given the name under which it will be known."""


def export(
    trace: Trace | str | Path,
    out: str | Path,
    *,
    format: str,
    layers: Iterable[int] | None = None,
    force: bool = False,
) -> Path:
    """Write a trace in a format of other programs; memory is that of one part.

    Args:
        trace: The trace, or its folder; of an unfinished one, what is finished, with a warning.
        out: File or folder to write; it appears when it is complete.
        format: ``vllm``: arrays of expert ids, shape (token, layer of the model, choice), one `.npy` a sequence in
            the folder `out`, or all in one file if that ends in `.npz`. ``jsonl``: a file, a line a token and layer.
            ``oracle-general``: a file of requests for cache simulators, 24 bytes each. ``hot-experts``: a JSON file,
            loads and the experts in order of heat.
        layers: Layers to export, counted over the whole model; None for all recorded.
        force: Replace an earlier export.
    Returns:
        Path of what was written.
    Raises:
        ValueError: There is no such format.
        OutputExists: There is something at `out`.
        NotExportable: The format cannot hold what the trace holds.
        TraceError: The trace is not there or damaged, or a layer was not recorded.
        DiskFull: There is no room.
    """
    if format not in FORMATS:
        raise ValueError(f"no format {format!r}; there are {', '.join(FORMATS)}")
    out = Path(out)
    opened = as_trace(trace)
    chosen = opened.select_layers(layers)
    if not opened.complete:
        warnings.warn(f"{opened.path} is unfinished: only what is recorded so far is exported", stacklevel=2)
    with new_output(out, apart_from=opened.path, force=force) as beside:
        FORMATS[format](opened, chosen, beside, out.name)
    return out
