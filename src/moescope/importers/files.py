"""Reading files of other programs: bounded, never trusted, every fault reported with file and place.

Limits keep the memory of an import below 2 GB, whatever a file claims (peaks are in `docs/decisions/log.md`).
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from moescope.corpus.compression import BrokenFile, chunks
from moescope.errors import ImportMalformed, ImportNotFound, ImportTooLarge
from moescope.trace.checksums import digest_file

MAX_LINE_BYTES = 1 << 25
"""Longest line or file of JSON; 12 million short values fill it."""

MAX_RESPONSE_BYTES = 1 << 28
"""Longest line or file of JSON that is mostly one string; decoded and copied it takes 1.5 GB."""

MAX_VALUES = 12_000_000
"""Most values of JSON decoded together; each takes up to 64 bytes, 770 MB in total."""

MAX_WINDOW_BYTES = 1 << 27  # the largest that zstd itself decompresses by default
COMPRESSED_BYTES = 1 << 11  # expands to 60 MB at most
BOM = b"\xef\xbb\xbf"
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|=](?:[iu][1248]|f[248]|b1))', 'fortran_order': (True|False), "
    rb"'shape': \(([0-9, ]{0,80})\), \}\s*"
)

T = TypeVar("T")


def find(paths: Sequence[Path], pattern: str | None = None) -> list[Path]:
    """The files, in order; a folder stands for the files in it that match the pattern, if its format allows folders.

    Raises:
        ImportNotFound: Nothing is there.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            matching = sorted(path.glob(pattern)) if pattern else []
            if not matching:
                problem = f"holds no {pattern}" if pattern else "is a folder, expected a file"
                raise ImportNotFound(path, problem)
            files += matching
        elif path.is_file():
            files.append(path)
        else:
            raise ImportNotFound(path, "there is no such file" if not path.exists() else "is not a file")
    if not files:
        raise ImportNotFound("import", "no file was given")
    return files


def fingerprint(files: Sequence[Path]) -> str:
    """SHA-256 of a file, or of the digests of several, in hexadecimal."""
    digests = [digest_file(path) for path in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def stem(path: Path) -> str:
    """Name of a file without its extensions, as the label of its contents."""
    name = path.name.split(".")[0] or path.name
    return name.encode(errors="replace").decode()


def plain(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed, piece by piece.

    Raises:
        ImportMalformed: It is truncated, or requests too much memory.
    """
    try:
        yield from chunks(path, compressed_bytes=COMPRESSED_BYTES, max_window_bytes=MAX_WINDOW_BYTES)
    except BrokenFile as error:
        raise ImportMalformed(path, f"cannot be decompressed further: {error}") from None


def whole(path: Path, max_bytes: int = MAX_LINE_BYTES) -> bytes:
    """All bytes of a file, decompressed.

    Raises:
        ImportTooLarge: There are more than the limit.
    """
    pieces, size = [], 0
    for piece in plain(path):
        size += len(piece)
        if size > max_bytes:
            raise ImportTooLarge(path, f"holds more than {max_bytes:,} bytes, expected fewer at once")
        pieces.append(piece)
    return b"".join(pieces)


def lines(path: Path, max_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[str, bytes]]:
    """Place and bytes of each line that is not blank.

    Raises:
        ImportTooLarge: A line is longer than the limit.
    """
    number, pieces, size = 1, list[bytes](), 0
    for count, chunk in enumerate(plain(path)):
        end, *starts = (chunk if count else chunk.removeprefix(BOM)).split(b"\n")
        pieces.append(end)
        size += len(end)
        for start in starts:
            _check_length(path, number, size, max_bytes)
            if size and (line := b"".join(pieces)).strip():
                yield f"{path}, line {number}", line
            number, pieces, size = number + 1, [start], len(start)
        _check_length(path, number, size, max_bytes)
    if (line := b"".join(pieces)).strip():
        yield f"{path}, line {number}", line


def _check_length(path: Path, number: int, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ImportTooLarge(f"{path}, line {number}", f"is longer than {max_bytes:,} bytes")


def decode(text: bytes, kind: type[T], place: object) -> T:
    """Decode JSON of a known type.

    Raises:
        ImportMalformed: It is not JSON, or has another type.
        ImportTooLarge: It holds more values than the limit.
    """
    if len(text) > MAX_VALUES and (values := sum(map(text.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise ImportTooLarge(place, f"holds some {values:,} values at once, expected at most {MAX_VALUES:,}")
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImportMalformed(place, f"is not the JSON expected: {str(error)[:200]}") from None


def objects(path: Path, kind: type[T], max_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[str, T]]:
    """Place and value of each object of a JSON file: one object, a list, or an object or list per line.

    Raises:
        ImportMalformed: It is not JSON, or an object has another type.
        ImportTooLarge: A line, or a file of one object, is longer than the limit.
    """
    first = next(lines(path, max_bytes), None)
    if first is None:
        raise ImportMalformed(path, "is empty")
    pieces = lines(path, max_bytes)
    if not _is_json(first[1]):  # one value on several lines
        pieces = iter([(str(path), whole(path, max_bytes).removeprefix(BOM))])
    for place, text in pieces:
        if text.lstrip()[:1] == b"[":
            items: list[T] = decode(text, list[kind], place)  # type: ignore[valid-type]
            for index, item in enumerate(items):
                yield f"{place}, item {index}", item
        else:
            yield place, decode(text, kind, place)


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def rows(path: Path, *, comments: list[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Place and cells of each row of a CSV file; lines that begin with ``#`` go to `comments`.

    Raises:
        ImportMalformed: A line is not UTF-8 or not CSV.
    """
    for place, line in lines(path, 1 << 20):  # a row of numbers is far shorter; longer is no CSV
        try:
            text = line.decode().rstrip("\r")
        except UnicodeDecodeError as error:
            raise ImportMalformed(place, f"is not UTF-8 (byte {error.start + 1})") from None
        if text.startswith("#"):
            if comments is not None and len(comments) < 100_000:
                comments.append(text[1:].strip())
            continue
        try:
            yield place, next(csv.reader([text], strict=True))
        except (csv.Error, StopIteration) as error:
            raise ImportMalformed(place, f"is not CSV: {error}") from None


def table(path: Path, *, comments: list[str] | None = None) -> tuple[str, list[str], Iterator[tuple[str, list[str]]]]:
    """Place and names of the header of a CSV file (no name if the file is empty), and its other rows; as `rows`."""
    cells = rows(path, comments=comments)
    place, header = next(cells, (str(path), []))
    return place, [name.strip() for name in header], cells


def number(text: Any, place: str, what: str, *, low: int = 0, high: int = 2**32 - 1) -> int:
    """A whole number within bounds.

    Raises:
        ImportMalformed: It is something else.
    """
    if type(text) is int and low <= text <= high:
        return text
    value = text
    if isinstance(text, str):
        digits = text.strip()
        body = digits[1:] if digits[:1] == "-" else digits
        value = int(digits) if body.isascii() and body.isdecimal() and len(body) <= 19 else None
    elif isinstance(text, float) and text.is_integer() and abs(text) < 2**53:
        value = int(text)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ImportMalformed(place, f"{what}: expected a whole number from {low} to {high}, found {str(text)[:40]!r}")
    return value


def real(text: Any, place: str, what: str) -> float:
    """A number, possibly NaN or infinity.

    Raises:
        ImportMalformed: It is something else.
    """
    try:
        if isinstance(text, bool) or not isinstance(text, str | int | float) or len(str(text)) > 60:
            raise ValueError
        return float(text)
    except (ValueError, OverflowError):
        raise ImportMalformed(place, f"{what}: expected a number, found {str(text)[:40]!r}") from None


def npy(data: bytes, place: str) -> NDArray[Any]:
    """The array of numbers of a ``.npy`` file; its header is not evaluated, and its size checked against the bytes.

    Raises:
        ImportMalformed: It is something else, or incomplete.
    """
    start, size = (10, data[8:10]) if data[6:7] == b"\x01" else (12, data[8:12])
    header = data[start : start + int.from_bytes(size, "little")]
    match = _NPY_HEADER.fullmatch(header)
    if not data.startswith(b"\x93NUMPY") or data[6:7] not in (b"\x01", b"\x02") or match is None:
        raise ImportMalformed(place, f"is not a .npy file of numbers: its header is {header[:80]!r}")
    dtype = np.dtype(match[1].decode())
    shape = tuple(int(n) for n in match[3].decode().replace(",", " ").split())
    length = dtype.itemsize * math.prod(shape)
    start += len(header)
    if length != len(data) - start or len(shape) > 8:
        raise ImportMalformed(place, f"its shape {shape} of {dtype} takes {length} bytes, found {len(data) - start}")
    array = np.frombuffer(data, dtype, offset=start)
    array = array.reshape(shape[::-1]).T if match[2] == b"True" else array.reshape(shape)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
