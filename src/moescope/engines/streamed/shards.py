"""The safetensors files of a checkpoint: where each tensor lies, read once and counted, the next ones fetched ahead.

Unit: bytes of the files. Convention: nothing is mapped into memory. Tensors are read into memory of their own, so what
a process holds is what it uses, and what is fetched ahead lies in the page cache of the system, not in the process.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moescope.errors import ModelDamaged, ModelNotStreamable

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 10**8  # the limit of the format
_LINE_BYTES = 64
_AHEAD_BYTES = 2**25  # a request to the system; small, so that closing never waits long


class StoredTensor:
    """A tensor that still lies in its file; ``[...]`` reads it whole, as a slice of the safetensors library does.

    Attributes:
        name: Its name in the checkpoint.
        shape: Its shape.
        dtype: Its dtype.
    """

    def __init__(self, shard: _Shard, name: str, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self._shard, self._start = shard, start

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> Tensor:
        if index is not Ellipsis:
            raise IndexError("a stored tensor is read whole")
        # Where matrices start in memory changes the last bit of some products. Loaded whole, a tensor starts where it
        # does in its file, counted from a page, so here it does, too.
        padded = torch.empty(self.nbytes + 2 * _LINE_BYTES, dtype=torch.uint8)
        skip = (self._start - padded.data_ptr()) % _LINE_BYTES if self._start % self.dtype.itemsize == 0 else 0
        tensor = padded[skip : skip + self.nbytes].view(self.dtype).view(self.shape)
        self.read_into(tensor)
        return tensor

    def read_into(self, out: Tensor) -> None:
        """Read it into a tensor on the CPU of the same shape; another dtype converts.

        Raises:
            ModelDamaged: The file ends early or cannot be read.
        """
        if out.dtype != self.dtype or not out.is_contiguous():
            out.copy_(self[...])
        elif out.numel():
            self._shard.read(out.view(-1).view(torch.uint8).numpy().data, self._start)


class Shards:
    """The safetensors files of a checkpoint, opened for reading until `close`.

    Attributes:
        tensors: Every tensor by its name.
    """

    def __init__(self, folder: Path) -> None:
        self._files: list[_Shard] = []
        self._ahead = ThreadPoolExecutor(1, "fetch-ahead")
        self._closing = threading.Event()
        self.tensors: dict[str, StoredTensor] = {}
        try:
            for name in _file_names(folder):
                self._files.append(_Shard(folder / name))
                self.tensors.update(self._files[-1].read_header())
        except BaseException:
            self.close()
            raise

    @property
    def bytes_read(self) -> int:
        """Bytes read from the files so far, headers included; what is only fetched ahead does not count twice."""
        return sum(shard.bytes_read for shard in self._files)

    def fetch_ahead(self, names: Iterable[str]) -> None:
        """Ask the system, from a thread, to read these tensors into its page cache; where it cannot, do nothing."""
        if hasattr(os, "posix_fadvise"):
            tensors = [self.tensors[name] for name in names]
            tensors.sort(key=lambda tensor: (tensor._shard.path, tensor._start))
            self._ahead.submit(self._advise, tensors)

    def _advise(self, tensors: Sequence[StoredTensor]) -> None:
        for tensor in tensors:
            end = tensor._start + tensor.nbytes
            for offset in range(tensor._start, end, _AHEAD_BYTES):
                if self._closing.is_set():
                    return
                length = min(_AHEAD_BYTES, end - offset)
                os.posix_fadvise(tensor._shard.file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the files."""
        self._closing.set()
        self._ahead.shutdown(cancel_futures=True)
        for shard in self._files:
            shard.file.close()


class _Shard:
    """One file; reads may come from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = path.open("rb")
        except OSError as error:
            raise ModelDamaged(path, f"cannot be opened: {error}") from error
        self.size = os.fstat(self.file.fileno()).st_size
        self.bytes_read = 0
        self._lock = threading.Lock()

    def read(self, into: memoryview, start: int) -> None:
        with self._lock:
            try:
                self.file.seek(start)
                count = self.file.readinto(into)
            except OSError as error:
                raise ModelDamaged(self.path, f"cannot be read: {error}") from error
            if count < len(into):
                raise ModelDamaged(self.path, f"ends at byte {start + count}, within a tensor")
            self.bytes_read += count

    def read_header(self) -> dict[str, StoredTensor]:
        """Its tensors by name; each lies within the file and is as long as its shape says."""
        length = bytearray(8)
        self.read(memoryview(length), 0) if self.size >= 8 else None
        header_bytes = int.from_bytes(length, "little")
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, self.size - 8):
            raise ModelDamaged(self.path, f"is not a safetensors file: its header would have {header_bytes:,} bytes")
        text = bytearray(header_bytes)
        self.read(memoryview(text), 8)
        try:
            header = json.loads(text)
            return {
                name: self._stored(name, entry, 8 + header_bytes)
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelDamaged(self.path, f"its header is not that of a safetensors file: {error!r}") from None

    def _stored(self, name: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
        if entry["dtype"] not in _DTYPES:
            raise ModelNotStreamable(
                self.path, f"tensor {name} has dtype {entry['dtype']}, which cannot be streamed", "--no-stream loads it"
            )
        shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
            raise ValueError(f"{name} has shape {shape} and offsets {start}, {end}")
        stored = StoredTensor(self, name, _DTYPES[entry["dtype"]], shape, data + start)
        if end - start != stored.nbytes or data + end > self.size:
            raise ValueError(f"{name} of shape {shape} cannot lie in bytes {start} to {end}")
        return stored


def _file_names(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [SINGLE]
        raise ModelNotStreamable(
            folder,
            f"has neither {INDEX} nor {SINGLE}; only safetensors files can be read layer by layer",
            "--no-stream loads other files whole, or convert them with save_pretrained",
        )
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not all(name == Path(name).name for name in names):
            raise ValueError("a file lies in another folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelDamaged(folder, f"{INDEX} cannot be read: {error!r}") from None
    return names
