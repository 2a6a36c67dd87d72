"""A placement in the formats of servers: SGLang's JSON, and the arrays of EPLB and vLLM.

Unit: the slot, counted over all devices, those of device 0 first. SGLang counts the layers of the whole model, so a
layer without a placement (a dense one, or one that was not placed) gets the experts in their order, the redundant slots
starting from expert 0, as in SGLang itself; EPLB's arrays hold the placed layers only, which `layers` names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moescope.errors import NotExportable
from moescope.exporting.output import new_output
from moescope.exporting.vllm import num_model_layers
from moescope.trace import Trace

if TYPE_CHECKING:
    from moescope.simulation import Placement


def export_placement(
    placement: Placement, out: str | Path, *, trace: Trace, format: str = "sglang", force: bool = False
) -> Path:
    """Write a placement for a server.

    Args:
        placement: Result of `moescope.placement`.
        out: File to write; it appears when it is complete.
        trace: The trace it was fitted on: it gives the number of layers of the model and, for sglang-counts, the loads.
        format: ``sglang``: JSON with ``physical_to_logical_map``, shape (layer of the model, slot), for
            ``--init-expert-location``. ``sglang-counts``: JSON with ``logical_count`` instead, assignments by (layer of
            the model, expert), from which SGLang computes its own placement; it takes one or the other. ``eplb``:
            ``phy2log`` (layer, slot), ``log2phy`` (layer, expert, replica; -1 = none) and ``logcnt`` (layer, expert),
            as ``.npz``, or as JSON if `out` ends in ``.json``.
        force: Replace an existing file.
    Returns:
        Path of what was written.
    Raises:
        ValueError: There is no such format, JSON is to be written to ``.npz``, or the placement has a layer that the
            trace lacks.
        NotExportable: Layers differ in experts or slots, which these formats cannot represent.
        OutputExists: `out` exists.
        DiskFull: There is no space left.
    """
    if format not in FORMATS:
        raise ValueError(f"no format {format!r}; there are {', '.join(FORMATS)}")
    out = Path(out)
    if format != "eplb" and out.suffix == ".npz":
        raise ValueError(f"{format} is JSON, and {out.name} would hold arrays; choose a name in .json, or eplb")
    chosen = trace.select_layers([layer.layer for layer in placement.layers])
    if [layer.num_experts for layer in chosen] != [layer.num_experts for layer in placement.layers]:
        raise ValueError("the placement has layers with different experts than the trace")
    shapes = {(layer.num_experts, len(placement.experts[layer.layer])) for layer in chosen}
    if len(shapes) > 1:
        sizes = " and ".join(f"{slots} slots of {experts} experts" for experts, slots in sorted(shapes))
        raise NotExportable(trace.path, f"its layers differ: {sizes}", "--layers selects layers of the same size")
    with new_output(out, apart_from=trace.path, force=force) as beside:
        arrays = FORMATS[format](placement, trace)
        if format == "eplb" and out.suffix != ".json":
            with beside.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        else:
            lists = {name: array.tolist() for name, array in arrays.items()}
            beside.write_text(json.dumps(lists, separators=(",", ":")) + "\n", encoding="utf-8")
    return out


def _eplb(placement: Placement, _: Trace) -> dict[str, NDArray[np.int64]]:
    numbers = [layer.layer for layer in placement.layers]
    count = np.array([placement.num_replicas(layer) for layer in numbers], np.int64)
    return {
        "phy2log": np.array([placement.experts[layer] for layer in numbers], np.int64),
        "log2phy": np.array([placement.slots(layer, int(count.max())) for layer in numbers], np.int64),
        "logcnt": count,
        "layers": np.array(numbers, np.int64),
    }


def _sglang(placement: Placement, trace: Trace) -> dict[str, NDArray[np.int64]]:
    first = placement.layers[0]
    plain = np.arange(len(placement.experts[first.layer])) % first.num_experts
    layers = range(num_model_layers(trace))
    return {"physical_to_logical_map": np.array([placement.experts.get(layer, plain) for layer in layers])}


def _counts(placement: Placement, trace: Trace) -> dict[str, NDArray[np.int64]]:
    table = np.zeros((num_model_layers(trace), placement.layers[0].num_experts), np.int64)
    for layer, loads in trace.expert_loads(placement.layers).items():
        table[layer] = loads
    return {"logical_count": table}


FORMATS = {"sglang": _sglang, "sglang-counts": _counts, "eplb": _eplb}
"""By name, the function that makes the arrays of a placement, given the trace."""
