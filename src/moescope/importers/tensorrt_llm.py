"""TensorRT-LLM's expert statistics: ``meta_info.json`` and ``rank*.safetensors``; a document is an iteration.

Keys are ``{iteration}_{layer}``, values int64 counts of the experts; ranks add up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from moescope.errors import ImportMalformed, ImportNotFound, ImportTooLarge
from moescope.importers.documents import CountedDocument, Ids, ModelFacts
from moescope.importers.files import decode, whole
from moescope.importers.findings import Findings, Options

MAX_HEADER_BYTES = 1 << 25  # some 300,000 tensors
_KEY = re.compile(r"(\d{1,12})_(\d{1,5})")


class _Statistics(msgspec.Struct):
    num_experts: int
    num_experts_per_token: int
    model_name: str = ""


def read(paths: Sequence[Path], options: Options, findings: Findings) -> Generator[CountedDocument, None, None]:
    """One document per iteration, for each given folder."""
    for folder in paths:
        if not folder.is_dir() or not (folder / "meta_info.json").is_file():
            raise ImportNotFound(folder, "is no folder with a meta_info.json", "give the folder, not its files")
        meta = decode(whole(folder / "meta_info.json"), _Statistics, folder / "meta_info.json")
        if not 1 <= meta.num_experts_per_token <= meta.num_experts <= 2**16:
            raise ImportMalformed(
                folder / "meta_info.json", f"says {meta.num_experts_per_token} of {meta.num_experts} experts per token"
            )
        files = sorted(folder.glob("rank*.safetensors"))
        if not files:
            raise ImportNotFound(folder, "holds no rank*.safetensors")
        ranks = [_Safetensors(path, meta.num_experts) for path in files]
        iterations: dict[int, set[int]] = {}
        for rank in ranks:
            for iteration, layer in rank.keys:
                iterations.setdefault(iteration, set()).add(layer)
        if len({frozenset(layers) for layers in iterations.values()}) > 1:
            findings.warn(f"{folder}: iterations have different layers")
        model = ModelFacts(meta.model_name, meta.num_experts, meta.num_experts_per_token)
        domain = options.domain or folder.resolve().name or "TensorRT-LLM"
        for iteration in sorted(iterations):
            counts: dict[int, Ids] = {}
            for layer in sorted(iterations[iteration]):
                loads = [rank.counts(iteration, layer) for rank in ranks if (iteration, layer) in rank.keys]
                if any(load.min() < 0 or load.max() >= 2**53 for load in loads):
                    raise ImportMalformed(f"{folder}, iteration {iteration}, layer {layer}", "holds impossible counts")
                counts[layer] = np.sum(loads, axis=0)
            yield CountedDocument(f"{folder}, iteration {iteration}", domain, counts, model)


class _Safetensors:
    """Position of each tensor in a file: a length, a header in JSON, then the numbers."""

    def __init__(self, path: Path, num_experts: int) -> None:
        self.path = path
        self._num_experts = num_experts
        self.keys: dict[tuple[int, int], int] = {}
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little") if len(start) == 8 else size
            if length > MAX_HEADER_BYTES and length <= size:
                raise ImportTooLarge(path, f"has a header of {length:,} bytes")
            if length > size - 8:
                raise ImportMalformed(path, "is not a complete safetensors file")
            header: dict[str, Any] = decode(file.read(length), dict[str, Any], path)
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            place = f"{path}, {key[:40]}"
            match = _KEY.fullmatch(key)
            if match is None:
                raise ImportMalformed(place, "is not named iteration_layer")
            expected = {"dtype": "I64", "shape": [num_experts]}
            described = {name: entry.get(name) for name in expected} if isinstance(entry, dict) else {}
            if described != expected:
                raise ImportMalformed(place, f"is {json.dumps(described)[:120]}, expected {json.dumps(expected)}")
            offsets = entry.get("data_offsets")
            if (
                not isinstance(offsets, list)
                or len(offsets) != 2
                or not all(type(offset) is int for offset in offsets)
                or not 0 <= offsets[0] <= offsets[1] <= size - 8 - length
                or offsets[1] - offsets[0] != 8 * num_experts
            ):
                raise ImportMalformed(place, f"is at {str(offsets)[:60]}, outside of the file")
            self.keys[int(match[1]), int(match[2])] = 8 + length + offsets[0]

    def counts(self, iteration: int, layer: int) -> Ids:
        with self.path.open("rb") as file:
            file.seek(self.keys[iteration, layer])
            return np.frombuffer(file.read(8 * self._num_experts), "<i8")
