"""The arrays that vLLM returns as ``routed_experts``: expert ids, shape (token, layer of the model, choice).

A folder of ``{document}_{sequence}.npy``, or one `.npz` with the same names. Unit: an array per sequence, with one row
per token; uint8 if no layer has more than 256 ids, else uint16. As in vLLM, a layer that has no routed experts or was
not exported is all zeros, like expert 0; beside the arrays, ``layout.json`` therefore names the layers exported, and
``sequences.jsonl`` describes each array, with its token ids. vLLM leaves out the last token of a sequence, which it
never runs; a trace holds it, and so do these arrays.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from moescope.errors import NotExportable
from moescope.exporting.output import MARKER
from moescope.trace import Layer, Part, Trace
from moescope.trace.columns import NOT_RECORDED

FORMAT = "moescope-vllm-arrays"
SEQUENCES = "sequences.jsonl"
MOST_LAYERS = 10_000
"""A header that claims more layers is not trusted: far beyond any model, and its arrays would fill the disk."""

_NO_DATE = (1980, 1, 1, 0, 0, 0)


def write(trace: Trace, layers: tuple[Layer, ...], path: Path, name: str) -> None:
    """Write the layers of a trace to a folder, or to one file if `name`, its final name, ends in ``.npz``.

    Raises:
        NotExportable: The layers differ in top-k, or dropped an assignment.
    """
    top_k = _top_k(trace, layers)
    num_layers = num_model_layers(trace)
    dtype = np.uint8 if max(layer.num_ids for layer in layers) <= 256 else np.uint16
    layout = {
        "format": FORMAT,
        "version": 1,
        "shape": ["num_tokens", "num_hidden_layers", "top_k"],
        "dtype": np.dtype(dtype).name,
        "num_hidden_layers": num_layers,
        "top_k": top_k,
        "layers": [
            {
                "layer": layer.layer,
                "num_experts": layer.num_experts,
                "num_null_experts": layer.num_null_experts,
                "ranked": layer.ranked,
            }
            for layer in layers
        ],
        "layers_of_zeros": sorted(set(range(num_layers)) - {layer.layer for layer in layers}),
        "complete": trace.complete,
        "model": trace.header.model,
        "tokenizer": trace.header.tokenizer,
        "corpus": trace.header.corpus,
    }
    if name.endswith(".npz"):
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
            tempfile.TemporaryFile("w+b", dir=path.parent) as spooled,
        ):

            def member(name: str) -> IO[bytes]:
                entry = zipfile.ZipInfo(name, _NO_DATE)
                entry.compress_type = zipfile.ZIP_DEFLATED
                return archive.open(entry, "w", force_zip64=True)

            _write_arrays(trace, layers, (num_layers, top_k), dtype, member, spooled)
            spooled.seek(0)
            with member(SEQUENCES) as file:
                shutil.copyfileobj(spooled, file)
            with member(MARKER) as file:
                file.write(_json(layout))
        return
    path.mkdir()
    with (path / SEQUENCES).open("wb") as sequences:
        _write_arrays(trace, layers, (num_layers, top_k), dtype, lambda name: (path / name).open("wb"), sequences)
    (path / MARKER).write_bytes(_json(layout))


def _write_arrays(
    trace: Trace,
    layers: tuple[Layer, ...],
    shape: tuple[int, int],
    dtype: type[np.unsignedinteger[Any]],
    create: Callable[[str], IO[bytes]],
    sequences: IO[bytes],
) -> None:
    for part in trace.iter_parts([layer.layer for layer in layers]):
        starts = part.sequence_starts().tolist()
        for start, end in pairwise(starts):
            rows = part.rows(slice(start, end))
            name = f"{rows.document[0]}_{rows.sequence[0]}"
            array = np.zeros((rows.num_tokens, *shape), dtype)
            for layer in layers:
                array[:, layer.layer] = _ids(trace, rows, layer)
            with create(f"{name}.npy") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
            line = {
                "array": name,
                "domain": part.domain_names[rows.domain[0]],
                "document": int(rows.document[0]),
                "sequence": int(rows.sequence[0]),
                "token_ids": rows.token_id.tolist(),
            }
            sequences.write(json.dumps(line).encode() + b"\n")


def _ids(trace: Trace, rows: Part, layer: Layer) -> np.ndarray[Any, np.dtype[np.integer[Any]]]:
    """The ids of a layer; of each token all of them, because the layout has no value for what is missing."""
    ids = rows.expert_ids[layer.layer]
    if ids.min() < 0:
        lacks = "lacks a token" if ids.min() == NOT_RECORDED else "dropped an assignment"
        raise NotExportable(
            trace.path,
            f"layer {layer.layer} {lacks} in document {rows.document[0]}; vLLM's layout has no value for that",
            "the format jsonl can represent it; --layers selects other layers",
        )
    return ids


def _top_k(trace: Trace, layers: tuple[Layer, ...]) -> int:
    """The common top-k; padding would invent experts, because the layout has no empty value."""
    by_top_k = {layer.top_k: layer.layer for layer in reversed(layers)}
    if len(by_top_k) > 1:
        numbers = ", ".join(f"{top_k} in layer {layer}" for top_k, layer in sorted(by_top_k.items()))
        raise NotExportable(
            trace.path,
            f"vLLM's layout has one number of choices for all layers, found {numbers}",
            "--layers selects layers with the same; the format jsonl can represent all",
        )
    return next(iter(by_top_k))


def num_model_layers(trace: Trace) -> int:
    """Layers of the model according to its header if plausible, otherwise up to the last recorded one."""
    last = trace.layers[-1].layer + 1
    if last > MOST_LAYERS:
        raise NotExportable(trace.path, f"layer {last - 1} would make arrays of {last} layers")
    claimed = trace.header.model.get("num_layers")
    if isinstance(claimed, int) and not isinstance(claimed, bool) and last <= claimed <= MOST_LAYERS:
        return claimed
    return last


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
