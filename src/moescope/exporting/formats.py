"""A trace in another format: the formats, and the one function that writes them."""

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
"""By name, the function that writes the layers of a trace to a path, given the final name of the output."""


def export(
    trace: Trace | str | Path,
    out: str | Path,
    *,
    format: str,
    layers: Iterable[int] | None = None,
    force: bool = False,
) -> Path:
    """Write a trace in a format of other programs, with one part in memory.

    Args:
        trace: The trace, or its folder; of an unfinished one, its finished parts, with a warning.
        out: File or folder to write; it appears when it is complete.
        format: ``vllm``: arrays of expert ids, shape (token, layer of the model, choice), one `.npy` per sequence
            in the folder `out`, or all in one file if that ends in `.npz`. ``jsonl``: a line per token and layer.
            ``oracle-general``: a file of requests for cache simulators, 24 bytes each. ``hot-experts``: a JSON file,
            loads, and the experts in order of load.
        layers: Layers to export, counted over the whole model; None for all recorded.
        force: Replace an earlier export.
    Returns:
        Path of what was written.
    Raises:
        ValueError: There is no such format.
        OutputExists: `out` exists.
        NotExportable: The format cannot represent the trace.
        TraceError: The trace is missing or damaged, or a layer was not recorded.
        DiskFull: There is no space left.
    """
    if format not in FORMATS:
        raise ValueError(f"no format {format!r}; there are {', '.join(FORMATS)}")
    out = Path(out)
    opened = as_trace(trace)
    chosen = opened.select_layers(layers)
    if not opened.complete:
        warnings.warn(f"{opened.path} is unfinished: only what has been recorded so far is exported", stacklevel=2)
    with new_output(out, apart_from=opened.path, force=force) as beside:
        FORMATS[format](opened, chosen, beside, out.name)
    return out
