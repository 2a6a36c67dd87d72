"""The work folder of a streamed recording: what the last finished layer returned, and what every finished layer chose.

    pile.moe.stream/
      plan.json                  header of the trace to be, and a hash of all its tokens: what a resumed run must share
      choices-000007.npy         experts that layer 7 chose, one row a token of the corpus, shape (token, choice)
      weights-000007.npy         their gate weights, if recorded
      states-000007              what layer 7 returned for every batch; removed once layer 8 is finished
      SHA256SUMS                 as in a trace; a file counts once it is listed and has its name

A layer is finished once its states are listed, or its choices if it is the last. A kill at any moment costs the layer
in work, and perhaps the one whose files were still being synced behind it. Everything is on disk; what fits the memory
given is kept in memory as well, and not read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.engines import work
from moescope.engines.interrupts import despite_interrupts
from moescope.engines.transformers.hooks import tensors_in
from moescope.engines.work import PLAN
from moescope.errors import ModelNotStreamable, TraceDamaged, TraceExists, TraceMismatch
from moescope.trace import Header, checksums
from moescope.trace.locks import locked


class Chosen(NamedTuple):
    """What a layer chose for every token of the corpus, shapes (token, choice); weights are None if not recorded."""

    expert_ids: NDArray[np.integer[Any]]
    gate_weights: NDArray[np.float32] | None = None


class States:
    """What one layer returned, a batch at a time, on disk and as far as there is memory for it in memory, too.

    Attributes:
        name: Name of the file.
        nbytes: Bytes written.
    """

    def __init__(self, folder: Path, name: str, memory: _Memory) -> None:
        self.name, self.nbytes = name, 0
        self._folder, self._memory = folder, memory
        self._kept: dict[int, Any] = {}
        self._index: list[Any] = []
        self._digest = hashlib.sha256()
        self._path = folder / (name + checksums.TEMPORARY)
        self._out: BinaryIO | None = self._path.open("wb", buffering=0)
        # A file of its own has a position of its own: `seal` writes while another thread reads.
        self._file = self._path.open("rb")

    @classmethod
    def reopen(cls, folder: Path, name: str, memory: _Memory) -> States:
        """A finished file, for reading.

        Raises:
            TraceDamaged: It is not one.
        """
        states = cls.__new__(cls)
        states.name, states._memory, states._kept, states._out = name, memory, {}, None
        states._path = folder / name
        states._file = states._path.open("rb")
        states.nbytes = os.fstat(states._file.fileno()).st_size
        try:
            length = int.from_bytes(states._read(states.nbytes - 8, 8), "little")
            states._index = json.loads(states._read(states.nbytes - 8 - length, length))
        except (ValueError, OSError) as error:
            raise work.damaged(states._path, f"has no index: {error}") from None
        return states

    def append(self, value: Any) -> None:
        """Write what the layer returned for the next batch: a tensor, or tuples of tensors and plain values."""
        value = move(value, torch.device("cpu"))
        self._index.append(self._write_value(value))
        if (nbytes := _nbytes(value)) <= self._memory.left:
            self._memory.left -= nbytes
            self._kept[len(self._index) - 1] = value

    def take(self, index: int) -> Any:
        """What the layer returned for a batch, on the CPU; asked for once.

        Raises:
            TraceDamaged: It is not there, or not as it was written.
        """
        if index in self._kept:
            value = self._kept.pop(index)
            self._memory.left += _nbytes(value)
            return value
        try:
            return self._read_value(self._index[index])
        except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise work.damaged(self._path, f"cannot be read: {error!r}") from None

    def seal(self) -> str:
        """Write the index and sync; return the SHA-256 of the file."""
        index = json.dumps(self._index).encode()
        self._write(memoryview(index))
        self._write(memoryview(len(index).to_bytes(8, "little")))
        assert self._out is not None
        os.fsync(self._out.fileno())
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file and release the memory."""
        self._memory.left += _nbytes(list(self._kept.values()))
        self._kept.clear()
        self._file.close()
        if self._out is not None:
            self._out.close()

    def _write_value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            entry = {"dtype": dtype, "shape": list(value.shape), "start": self.nbytes}
            if value.numel():
                self._write(_bytes(value))
                entry["crc32"] = zlib.crc32(_bytes(value))
            return entry
        if isinstance(value, tuple | list):
            return [isinstance(value, tuple), [self._write_value(item) for item in value]]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ModelNotStreamable("streaming", f"a layer returns a {type(value).__name__}, which cannot be spooled")

    def _read_value(self, entry: Any) -> Any:
        if isinstance(entry, dict):
            tensor = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
            if tensor.numel():
                self._read_into(_bytes(tensor), entry["start"])
                if zlib.crc32(_bytes(tensor)) != entry["crc32"]:
                    raise ValueError(f"bytes {entry['start']} and on are not those written")
            return tensor
        if isinstance(entry, list):
            values = [self._read_value(item) for item in entry[1]]
            return tuple(values) if entry[0] else values
        return entry

    def _write(self, data: memoryview) -> None:
        assert self._out is not None
        with checksums.no_room(self._folder):
            done = 0
            while done < len(data):
                done += self._out.write(data[done:]) or 0
        self._digest.update(data)
        self.nbytes += len(data)

    def _read(self, start: int, length: int) -> bytes:
        data = bytearray(max(0, length))
        self._read_into(memoryview(data), start)
        return bytes(data)

    def _read_into(self, data: memoryview, start: int) -> None:
        if start < 0:
            raise ValueError(f"starts at {start}")
        self._file.seek(start)
        count = self._file.readinto(data)
        if count < len(data):
            raise ValueError(f"ends after {start + count} bytes")


class Spool:
    """The work folder, created or resumed, locked until `close`.

    Args:
        path: The folder.
        plan: Header of the trace to be, whose layers have `top_k` 1: how many choices they make is not known yet.
        tokens: Hash of all tokens in their batches.
        num_layers: Layers to run, from the first.
        memory: Bytes of states that may be kept in memory.
        force: Replace the work of another recording.

    Attributes:
        next_layer: The first layer that is not finished; `num_layers` if all are.

    Raises:
        TraceExists: The path holds something else.
        TraceMismatch: It holds the work of another recording; what differs is named.
        TraceBusy: Another process is at it.
        TraceDamaged: A finished file is missing or fails its checksum.
        DiskFull: The disk is full.
    """

    def __init__(
        self, path: Path, plan: Header, tokens: str, *, num_layers: int, memory: int, force: bool = False
    ) -> None:
        self.path, self._num_layers = path, num_layers
        self._recorded = tuple(layer.layer for layer in plan.layers)
        self._kinds = ("choices", "weights") if plan.weights else ("choices",)
        self._memory = _Memory(memory)
        self._lock = ExitStack()
        self._behind = ThreadPoolExecutor(1, "commit")
        self._pending: Future[None] | None = None
        self._states: States | None = None
        if path.exists() and not (path.is_dir() and work.is_work(path)):
            raise TraceExists(path, "exists and is not the work of a streamed recording", "move it away")
        with checksums.no_room(path):
            path.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(locked(path))
        try:
            try:
                self.next_layer = self._resume(plan, tokens)
            except (TraceDamaged, TraceMismatch):
                if not force:
                    raise
                work.clear(path, keep=True)
                self.next_layer = self._resume(plan, tokens)
        except BaseException:
            self.close()
            raise

    def take(self, index: int) -> Any:
        """What the layer before the one in work returned for a batch."""
        assert self._states is not None
        return self._states.take(index)

    def states_of(self, layer: int) -> States:
        """A new file for what a layer returns."""
        with checksums.no_room(self.path):
            return States(self.path, _states(layer), self._memory)

    def commit(self, layer: int, states: States | None, chosen: Chosen | None) -> None:
        """Finish a layer; its files are synced and listed while the next layer runs.

        The last layer has no states, and one that is not recorded nothing chosen.
        """
        try:
            self.settle()
        except BaseException:
            if states is not None:
                states.close()
            raise
        before, self._states = self._states, states
        if before is not None:
            before.close()
        self._pending = self._behind.submit(self._commit, layer, states, chosen, before)
        self.next_layer = layer + 1

    def settle(self) -> None:
        """Wait until everything that was committed is on disk."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None  # only now: after Ctrl-C `close` waits for it

    def choices(self, layer: int) -> Chosen:
        """What a layer chose, not yet read."""
        try:
            arrays = [np.load(self.path / name, mmap_mode="r", allow_pickle=False) for name in self._files(layer)]
        except (OSError, ValueError) as error:
            raise work.damaged(self.path, f"what layer {layer} chose cannot be read: {error}") from None
        return Chosen(*arrays)

    def close(self) -> None:
        """Release the folder once what was committed is on disk, whatever Ctrl-C says; it can be resumed."""
        # Released before, the folder would change under whoever takes it.
        interrupt = despite_interrupts(lambda: wait([self._pending] if self._pending else []))
        self._behind.shutdown(wait=False)
        if self._states is not None:
            self._states.close()
            self._states = None
        self._lock.close()
        if interrupt is not None:
            raise interrupt

    def _commit(self, layer: int, states: States | None, chosen: Chosen | None, before: States | None) -> None:
        for name, array in zip(self._files(layer), chosen or (), strict=False):
            if array is not None:
                checksums.commit(self.path, name, partial(np.save, arr=array, allow_pickle=False))
        if states is not None:
            checksums.enlist(self.path, states.name, states.seal())
        if before is not None:
            (self.path / before.name).unlink(missing_ok=True)

    def _begin(self, plan: Header, tokens: str) -> None:
        if not (self.path / PLAN).exists():
            checksums.rewrite(self.path, {})
            text = json.dumps({"header": json.loads(plan.to_json()), "tokens": tokens}, indent=1) + "\n"
            checksums.commit_bytes(self.path, PLAN, text.encode())
            return
        begun = work.read_plan(self.path)
        differences = plan.differences(Header.from_json(json.dumps(begun["header"]), self.path))
        if not differences and begun.get("tokens") != tokens:
            differences = ["the tokens of the corpus"]
        if differences:
            raise TraceMismatch(
                self.path,
                "holds the unfinished work of another recording: " + "; ".join(differences[:4]),
                "run the command it was started with, choose another output, or --force to record it anew",
            )

    def _resume(self, plan: Header, tokens: str) -> int:
        """Drop what a kill left unfinished; open the states of the last finished layer and return the one after it."""
        self._begin(plan, tokens)
        sums = {name: digest for name, digest in checksums.read(self.path).items() if (self.path / name).exists()}
        finished = max((int(name.split("-")[1]) for name in sums if name.startswith("states-")), default=-1)
        last = self._num_layers - 1
        if all(name in sums for name in self._files(last)):  # the last layer has no states; it is always recorded
            finished = last
        kept = {PLAN, *(name for layer in range(finished + 1) for name in self._files(layer))}
        if 0 <= finished < last:
            kept.add(_states(finished))
        for name in sorted(kept):
            if name not in sums:
                raise work.damaged(self.path, f"{name} is missing")
            if checksums.digest_file(self.path / name) != sums[name]:
                raise work.damaged(self.path, f"{name} fails its checksum")
        for file in list(self.path.iterdir()):
            if file.name not in kept and file.name != checksums.FILE_NAME:
                file.unlink()
        checksums.rewrite(self.path, {name: digest for name, digest in sums.items() if name in kept})
        if 0 <= finished < last:
            self._states = States.reopen(self.path, _states(finished), self._memory)
        return finished + 1

    def _files(self, layer: int) -> list[str]:
        """Names of the files of what a layer chose."""
        return [f"{kind}-{layer:06d}.npy" for kind in self._kinds] if layer in self._recorded else []


@dataclass
class _Memory:
    """How many bytes of what is spooled may still be kept in memory."""

    left: int


def move(value: Any, device: torch.device) -> Any:
    """What a layer returned, its tensors contiguous on a device."""
    if isinstance(value, Tensor):
        return value.to(device).contiguous()
    return type(value)(move(item, device) for item in value) if type(value) in (tuple, list) else value


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _nbytes(value: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_in(value))


def _states(layer: int) -> str:
    return f"states-{layer:06d}"
