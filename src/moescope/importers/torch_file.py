"""A file of ``torch.save``, read without torch and without unpickling: plain values and dense tensors only.

Such a file is a zip: ``data.pkl`` describes the values, ``data/0`` and so on hold the numbers. The description is a
pickle, a program for a stack machine that can call any Python function. We interpret the few instructions that
``torch.save`` needs for dictionaries, lists, numbers, strings and tensors ourselves; any other instruction, and any
global but the few below, is an error. Nothing in the file is ever called, and torch is not needed.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportMalformed, ImportTooLarge

MAX_DESCRIPTION_BYTES = 1 << 26
MAX_STEPS = 1 << 23  # as many strings take 256 MB
MAX_CONTAINERS = 1 << 20  # an empty one takes 64 bytes, which one byte of description can create
MAX_MEMBERS = 1 << 20
MAX_DIRECTORY_BYTES = 1 << 25  # Python's zipfile holds the list in memory, several times this size
MAX_TENSOR_BYTES = 1 << 28

_STORAGES = {
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
}


@dataclass(frozen=True)
class TorchTensor:
    """A tensor whose numbers are still in the file.

    Attributes:
        shape: Its shape.
        dtype: Type of its numbers.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    _member: str
    _offset: int
    _file: TorchFile

    def numpy(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows `start` to `stop` of its first dimension.

        Raises:
            ImportTooLarge: They take more memory than the limit.
            ImportMalformed: The file is damaged.
        """
        row = int(np.prod(self.shape[1:], dtype=np.int64)) if self.shape else 1
        rows = (self.shape[0] if stop is None else stop) - start if self.shape else 1
        size = rows * row * self.dtype.itemsize
        path = self._file.path
        if size > MAX_TENSOR_BYTES:
            raise ImportTooLarge(path, f"has a tensor of {size:,} bytes, expected at most {MAX_TENSOR_BYTES:,}")
        begin = (self._offset + start * row) * self.dtype.itemsize
        try:
            data = self._file.read(self._member, begin, begin + size)
        except _UNREADABLE as error:
            raise ImportMalformed(path, f"cannot be read: {error}") from None
        except zipfile.BadZipFile as error:
            raise ImportMalformed(path, f"is damaged: {error}") from None
        if len(data) != size:
            raise ImportMalformed(path, f"is truncated: {len(data)} bytes of a tensor of {size}")
        return np.frombuffer(data, self.dtype).reshape((rows, *self.shape[1:]) if self.shape else ())


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype[Any]
    member: str


@dataclass(frozen=True)
class _Global:
    name: str


_MARK = object()
_UNREADABLE = (OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zlib.error, KeyError)
"""What a damaged zip makes Python's zipfile raise, beside `BadZipFile`."""


class TorchFile:
    """A file of ``torch.save``.

    Args:
        path: The file.
    Attributes:
        value: What was saved; tensors as `TorchTensor`.
    Raises:
        ImportMalformed: It is something else, is damaged, or holds more than plain values and tensors.
        ImportTooLarge: Its description is beyond the limits.
    """

    value: Any

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            _check_directory(path)
            self._archive = zipfile.ZipFile(path)
            members = self._archive.infolist()
            if len(members) > MAX_MEMBERS:
                raise ImportTooLarge(path, f"holds {len(members):,} members, expected at most {MAX_MEMBERS:,}")
            descriptions = [m for m in members if m.filename.endswith("/data.pkl")]
            if len(descriptions) != 1:
                raise ImportMalformed(path, f"is a zip with {len(descriptions)} data.pkl, expected one of torch.save")
            self._root = descriptions[0].filename.removesuffix("data.pkl")
            self._sizes = {m.filename: m.file_size for m in members}
            if descriptions[0].file_size > MAX_DESCRIPTION_BYTES:
                raise ImportTooLarge(path, f"has a description of more than {MAX_DESCRIPTION_BYTES:,} bytes")
            order = f"{self._root}byteorder"
            if order in self._sizes and self.read(order, 0, 16) != b"little":
                raise ImportMalformed(path, "holds big-endian numbers, expected little-endian")
            text = self.read(descriptions[0].filename, 0, MAX_DESCRIPTION_BYTES)
        except zipfile.BadZipFile as error:
            raise ImportMalformed(
                path,
                f"is not a file of torch.save, or incomplete ({error})",
                "files from before PyTorch 1.6 and other pickles are not read: save them again with a current torch",
            ) from None
        except _UNREADABLE as error:
            raise ImportMalformed(path, f"cannot be read: {error}") from None
        self.value = _interpret(text, self)

    def read(self, member: str, start: int, stop: int) -> bytes:
        """Bytes of a member of the zip."""
        with self._archive.open(member) as file:
            file.seek(start)
            return file.read(stop - start)

    def tensor(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> TorchTensor:
        """A tensor of the file, checked to be dense and within its storage."""
        expected, length = [], 1
        for size in reversed(shape):
            expected.append(length)
            length *= size
        dense = all(a == b or n == 1 for a, b, n in zip(strides, reversed(expected), shape, strict=True)) or not length
        size = self._sizes.get(storage.member, -1)
        if not dense or offset < 0 or (offset + length) * storage.dtype.itemsize > size:
            raise ImportMalformed(
                self.path,
                f"has a tensor of shape {shape}, strides {strides}, offset {offset} in a storage of {size} bytes; "
                "expected dense rows within it",
            )
        return TorchTensor(shape, storage.dtype, storage.member, offset, self)

    def storage(self, dtype: np.dtype[Any], key: str, length: int) -> _Storage:
        """A storage of the file, by its key."""
        member = f"{self._root}data/{key}"
        if self._sizes.get(member, -1) < length * dtype.itemsize:
            raise ImportMalformed(self.path, f"lacks the {length} numbers of storage {key[:20]}")
        return _Storage(dtype, member)


def _check_directory(path: Path) -> None:
    """Refuse a zip whose list of members is too long, before anything reads it."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - (1 << 16) - 128))
        tail = file.read()
    record, zip64 = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")  # the ends of the two kinds of list
    size = int.from_bytes(tail[record + 12 : record + 16], "little") if record >= 0 else 0
    if zip64 >= 0:
        size = max(size if size != 2**32 - 1 else 0, int.from_bytes(tail[zip64 + 40 : zip64 + 48], "little"))
    if MAX_DIRECTORY_BYTES < size < 2**32 - 1:
        raise ImportTooLarge(path, f"lists its members in {size:,} bytes, expected at most {MAX_DIRECTORY_BYTES:,}")


def _interpret(text: bytes, file: TorchFile) -> Any:
    """The value of a description, interpreted by `_VALUES`, `_CONSTANTS`, `_CONTAINERS` and `_STEPS`."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    containers = 0
    try:
        argument: Any
        for step, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(text))):
            if step > MAX_STEPS:
                raise ImportTooLarge(file.path, f"has a description of more than {MAX_STEPS:,} steps")
            name = opcode.name
            if name == "STOP":
                return stack.pop()
            if name in ("PROTO", "FRAME"):
                continue
            if name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in _VALUES:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _CONTAINERS:
                containers += 1
                if containers > MAX_CONTAINERS:
                    raise ImportTooLarge(file.path, f"describes more than {MAX_CONTAINERS:,} lists, tuples and so on")
                _CONTAINERS[name](stack)
            elif name in _STEPS:
                _STEPS[name](stack)
            elif name == "GLOBAL":
                stack.append(_Global(argument))
            elif name == "STACK_GLOBAL":
                called, module = stack.pop(), stack.pop()
                stack.append(_Global(f"{module} {called}"))
            elif name == "BINPERSID":
                stack.append(_persistent(stack.pop(), file))
            elif name == "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments, file))
            elif name == "BUILD":
                state, target = stack.pop(), stack[-1]
                if not isinstance(target, dict) or state:
                    raise _Refused("sets the state of an object")
            else:
                raise _Refused(f"has the instruction {name}")
    except _Refused as error:
        raise ImportMalformed(
            file.path,
            f"{error}, which plain values and tensors do not need; nothing in it was run",
            "no recording of SGLang contains this: do not load this file with pickle or torch either",
        ) from None
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError, UnicodeDecodeError) as error:
        raise ImportMalformed(file.path, f"its description is damaged: {str(error)[:200]}") from None
    raise ImportMalformed(file.path, "its description is truncated")


class _Refused(Exception):
    """An instruction that could run code."""


def _since_mark(stack: list[Any]) -> list[Any]:
    for index in range(len(stack) - 1, -1, -1):
        if stack[index] is _MARK:
            items = stack[index + 1 :]
            del stack[index:]
            return items
    raise ValueError("a mark is missing")


def _top(stack: list[Any], number: int) -> tuple[Any, ...]:
    if len(stack) < number:
        raise ValueError("the stack is empty")
    items = tuple(stack[-number:])
    del stack[-number:]
    return items


def _extend(stack: list[Any], items: Sequence[Any]) -> None:
    _target(stack, list).extend(items)


def _update(stack: list[Any], items: Sequence[Any]) -> None:
    target = _target(stack, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):
            raise ValueError("a key is neither text nor a number")
        target[key] = value


def _target(stack: list[Any], kind: type) -> Any:
    if not stack or type(stack[-1]) is not kind:
        raise ValueError(f"a {kind.__name__} is missing")
    return stack[-1]


_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_CONTAINERS: dict[str, Callable[[list[Any]], None]] = {
    "EMPTY_DICT": lambda stack: stack.append({}),
    "EMPTY_LIST": lambda stack: stack.append([]),
    "TUPLE": lambda stack: stack.append(tuple(_since_mark(stack))),
    "TUPLE1": lambda stack: stack.append(_top(stack, 1)),
    "TUPLE2": lambda stack: stack.append(_top(stack, 2)),
    "TUPLE3": lambda stack: stack.append(_top(stack, 3)),
}
_STEPS: dict[str, Callable[[list[Any]], None]] = {
    "APPENDS": lambda stack: _extend(stack, _since_mark(stack)),
    "APPEND": lambda stack: _extend(stack, _top(stack, 1)),
    "SETITEMS": lambda stack: _update(stack, _since_mark(stack)),
    "SETITEM": lambda stack: _update(stack, _top(stack, 2)),
}


def _persistent(value: Any, file: TorchFile) -> _Storage:
    """A storage: ``("storage", type, key, device, length)``."""
    if (
        isinstance(value, tuple)
        and len(value) == 5
        and value[0] == "storage"
        and isinstance(value[1], _Global)
        and isinstance(value[2], str)
        and isinstance(value[4], int)
        and 0 <= value[4] < 2**40
    ):
        module, _, name = value[1].name.partition(" ")
        if module == "torch" and name in _STORAGES:
            return file.storage(np.dtype(_STORAGES[name]), value[2], value[4])
    raise _Refused(f"refers to {str(value)[:80]}")


def _call(function: Any, arguments: Any, file: TorchFile) -> Any:
    """The result of the few calls that ``torch.save`` needs, without calling anything."""
    name = function.name if isinstance(function, _Global) else str(function)[:80]
    if name == "collections OrderedDict" and arguments == ():
        return {}
    if name == "torch._utils _rebuild_tensor_v2" and isinstance(arguments, tuple) and len(arguments) >= 4:
        storage, offset, shape, strides = arguments[:4]
        valid = all(type(number) is int and 0 <= number < 2**40 for number in (offset, *shape, *strides))
        if isinstance(storage, _Storage) and len(shape) == len(strides) <= 8 and valid:
            return file.tensor(storage, offset, shape, strides)
        raise ValueError("the description of a tensor is invalid")
    raise _Refused(f"calls {name[:80]}")
