"""GGUF, as far as an importance matrix needs it: metadata and F32 tensors, every length checked before it is used."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportMalformed, ImportTooLarge

MAX_ENTRIES = 1 << 16
MAX_STRING_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 26
"""All strings together."""
MAX_LENGTH = 1 << 20
"""Numbers of a tensor that is read."""
MAX_KEPT_ITEMS = 1024
"""Longest array of metadata that is kept; longer ones are skipped."""
F32 = 0
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        shape: Its shape, the fastest dimension last.
        kind: Code of its type; 0 is F32.
        offset: Where its numbers begin in the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Gguf:
    """What a GGUF file holds.

    Attributes:
        path: The file.
        metadata: Scalars, strings and short arrays by their key.
        tensors: Tensors by their name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def f32(self, name: str) -> NDArray[np.float32]:
        """The numbers of an F32 tensor.

        Raises:
            ImportMalformed: It is of another type, or the file ends before it.
        """
        tensor = self.tensors[name]
        if tensor.kind != F32:
            raise ImportMalformed(f"{self.path}, {name}", f"is of type {tensor.kind}, expected F32")
        length = int(np.prod(tensor.shape, dtype=np.float64))
        if length > MAX_LENGTH:
            raise ImportTooLarge(f"{self.path}, {name}", f"holds {length:,} numbers, expected at most {MAX_LENGTH:,}")
        if tensor.offset + 4 * length > self.path.stat().st_size:
            raise ImportMalformed(f"{self.path}, {name}", "lies beyond the end of the file")
        return np.fromfile(self.path, "<f4", length, offset=tensor.offset).reshape(tensor.shape)


def read(path: Path) -> Gguf:
    """Read the head of a GGUF file.

    Raises:
        ImportMalformed: It is something else, or breaks off.
    """
    with path.open("rb") as file:
        head = _Head(file, path)
        if file.read(4) != b"GGUF":
            raise ImportMalformed(
                path, "is not a GGUF file", "convert an old .dat with llama-imatrix --output-format gguf"
            )
        version = head.scalar(4)
        if version not in (2, 3):
            raise ImportMalformed(path, f"is GGUF version {version}, expected 2 or 3")
        num_tensors, num_values = head.scalar(10), head.scalar(10)
        if num_tensors > MAX_ENTRIES or num_values > MAX_ENTRIES:
            raise ImportMalformed(path, f"says it has {num_tensors} tensors and {num_values} values")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = head.string()
            metadata[key] = head.value(head.scalar(4))
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name, dims = head.string(), head.scalar(4)
            if dims > 4 or name in found:
                raise ImportMalformed(path, f"has a tensor {name[:80]!r} of {dims} dimensions, or twice")
            shape = tuple(head.scalar(10) for _ in range(dims))[::-1]
            if any(n >= 2**32 for n in shape):
                raise ImportMalformed(path, f"has a tensor {name[:80]!r} of shape {shape}")
            found[name] = (shape, head.scalar(4), head.scalar(10))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise ImportMalformed(path, f"has alignment {alignment!r}")
        base = -(-file.tell() // alignment) * alignment
    return Gguf(path, metadata, {n: GgufTensor(shape, kind, base + at) for n, (shape, kind, at) in found.items()})


@dataclass
class _Head:
    """Values one after the other; a length is checked before anything of that length is read."""

    file: BinaryIO
    path: Path
    text_bytes: int = 0

    def take(self, size: int) -> bytes:
        data = self.file.read(size)
        if len(data) != size:
            raise ImportMalformed(self.path, f"breaks off at byte {self.file.tell()}")
        return data

    def scalar(self, kind: int) -> Any:
        form = _SCALARS[kind]
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        length = self.scalar(10)
        if length > MAX_STRING_BYTES:
            raise ImportMalformed(self.path, f"has a string of {length} bytes at byte {self.file.tell()}")
        self.text_bytes += length
        if self.text_bytes > MAX_TEXT_BYTES:
            raise ImportTooLarge(self.path, f"describes itself in more than {MAX_TEXT_BYTES:,} bytes")
        return self.take(length).decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(kind)
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ImportMalformed(self.path, f"has a value of unknown type {kind} at byte {self.file.tell()}")
        inner, length = self.scalar(4), self.scalar(10)
        if inner not in _SCALARS and inner != _STRING:
            raise ImportMalformed(self.path, f"has an array of type {inner} at byte {self.file.tell()}")
        if length > 1 << 24:
            raise ImportMalformed(self.path, f"has an array of {length} values at byte {self.file.tell()}")
        kept: list[Any] = []
        for _ in range(length):
            item = self.value(inner)
            if len(kept) < MAX_KEPT_ITEMS:
                kept.append(item)
        return kept if length <= MAX_KEPT_ITEMS else None
