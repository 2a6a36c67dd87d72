"""A file of named arrays with a few words about them, checksummed: what docs/reference/counted-format.md says.

The layout is that of safetensors, so that any reader of those reads the arrays. Nothing in it is executed, everything
in it is looked at before it is used, and reading takes the memory of the file once at most.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import OutputExists, TraceDamaged, TraceNewer, TraceNotFound

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "F64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_DIGEST = "sha256"
_MOST_HEADER = 2**27  # bytes: a domain a line and a few hundred arrays take far less


def write(
    path: Path, format: str, version: int, metadata: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]
) -> None:
    """Write arrays and what is said of them; the file appears whole or not at all.

    Raises:
        OutputExists: There is something at the path.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": format, "version": str(version), **metadata}}
    end = 0
    for name, array in arrays.items():
        entries[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    entries[_DIGEST] = {"dtype": "U8", "shape": [32], "data_offsets": [end, end + 32]}
    header = json.dumps(entries, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            for piece in (struct.pack("<Q", len(header)), header, *map(_bytes, arrays.values())):
                digest.update(piece)
                file.write(piece)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # which, unlike a rename, never replaces what is there
    except FileExistsError:
        raise OutputExists(path, "there is something at this path already", "choose another, or remove it") from None
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, format: str, version: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read what `write` wrote: what is said of the arrays, and the arrays.

    Raises:
        TraceNotFound: There is no file of this format at the path.
        TraceNewer: It was written in a later version of the format.
        TraceDamaged: It is not what its checksum or its header says.
    """
    if not path.is_file():
        raise TraceNotFound(path, f"is not a {format}: no file there")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MOST_HEADER, size - 8):
            raise TraceNotFound(path, f"is not a {format}: no header in it")
        text = file.read(length)
        entries, metadata = _entries(text, path, format, version)
        layout = _layout(entries, size - 8 - length, path)
        digest = hashlib.sha256(struct.pack("<Q", length) + text)
        arrays: dict[str, NDArray[Any]] = {}
        for name, (dtype, shape) in layout.items():
            arrays[name] = np.fromfile(file, dtype, int(np.prod(shape, dtype=object))).reshape(shape)
            if name != _DIGEST:
                digest.update(_bytes(arrays[name]))
    expected, found = arrays.pop(_DIGEST).tobytes().hex(), digest.hexdigest()
    if expected != found:
        raise TraceDamaged(path, f"fails its checksum (expected {expected[:8]}…, found {found[:8]}…)")
    return metadata, arrays


def _entries(text: bytes, path: Path, format: str, version: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of the header, and what it says of the whole."""
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__")
        known = isinstance(metadata, dict) and metadata.get("format") == format
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        known = False
    if not known:
        raise TraceNotFound(path, f"is not a {format}: its header does not say so")
    written = metadata.get("version")
    if not isinstance(written, str) or not written.isascii() or not written.isdecimal() or int(written[:9]) < 1:
        raise TraceDamaged(path, f"has version {written!r}, expected a whole number from 1")
    if int(written[:9]) > version:
        raise TraceNewer(
            path,
            f"written in version {written[:9]} of {format}; this moescope reads up to {version}",
            "upgrade with `pip install -U moescope`",
        )
    return entries, metadata


def _layout(entries: Mapping[str, Any], size: int, path: Path) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and shape of each array, in the order in which they fill the file, the digest last."""
    arrays, end = {}, 0
    for name, entry in entries.items():
        try:
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, stop = entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise TraceDamaged(path, f"{name} has no type, shape and place that could be") from None
        if not all(type(number) is int and 0 <= number < 2**62 for number in (*shape, begin, stop)) or len(shape) > 8:
            raise TraceDamaged(path, f"{name} has shape {shape} at {begin} to {stop}, expected whole numbers from 0")
        nbytes = dtype.itemsize * int(np.prod(shape, dtype=object))
        if begin != end or stop != begin + nbytes:
            raise TraceDamaged(path, f"{name} lies at {begin} to {stop}, expected {end} to {end + nbytes}")
        arrays[name], end = (dtype, shape), stop
    if end != size or list(arrays)[-1:] != [_DIGEST] or arrays[_DIGEST] != (_DTYPES["U8"], (32,)):
        raise TraceDamaged(path, f"holds {size} bytes of arrays, expected {end}, the last 32 a checksum")
    return arrays


def _bytes(array: NDArray[Any]) -> Any:
    """The bytes of an array, which may be large, without a copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
