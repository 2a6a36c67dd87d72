"""JSON lines, one object per line, like the Pile and most corpora; plain, zstd or gzip."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec

from moescope.corpus.compression import BrokenFile, chunks
from moescope.corpus.records import Record, Unreadable, kind
from moescope.errors import CorpusTooLarge

BOM = b"\xef\xbb\xbf"


def read(path: Path, max_bytes: int) -> Iterator[Record]:
    """Yield the record of each line; where a compressed file is damaged, an ``Unreadable`` is the last.

    Raises:
        CorpusTooLarge: A line is longer than so many bytes.
    """
    try:
        for index, line in enumerate(_lines(path, max_bytes)):
            yield decoded(line if index else line.removeprefix(BOM))
    except BrokenFile as error:
        yield Unreadable(f"the file is damaged from here: {error}")


def _lines(path: Path, max_bytes: int) -> Iterator[bytes]:
    """Yield the lines without their newline; a line is concatenated once."""
    pieces: list[bytes] = []
    number, size = 1, 0
    for chunk in chunks(path):
        end, *starts = chunk.split(b"\n")
        pieces.append(end)
        size += len(end)
        for start in starts:
            check_size(path, f"line {number}", size, max_bytes)
            yield b"".join(pieces)
            number, pieces, size = number + 1, [start], len(start)
        check_size(path, f"line {number}", size, max_bytes)
    if last := b"".join(pieces):
        yield last


def check_size(path: Path, place: str, size: int, max_bytes: int) -> None:
    """Refuse a record that would take too much memory.

    Raises:
        CorpusTooLarge: It has more than so many bytes.
    """
    if size > max_bytes:
        hint = f"if it is a text, --max-record-bytes {2 * size} reads it, in some five times that memory"
        raise CorpusTooLarge(f"{path}, {place}", f"is longer than {max_bytes:,} bytes", hint)


def decoded(line: bytes) -> Record:
    """The record that some JSON holds, or why it holds none; None for a blank line."""
    try:
        record = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Unreadable(_why(line)) if line.strip() else None
    return record if isinstance(record, dict) else Unreadable(f"not an object but {kind(record)}")


def _why(line: bytes) -> str:
    """Why a line is not JSON; Python's own parser gives more detail than the fast one, and accepts more."""
    try:
        line.decode()
        json.dumps(json.loads(line), ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1})"
    except UnicodeEncodeError:
        return "half of a surrogate pair, which text cannot contain"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg[0].lower()}{error.msg[1:]}, character {error.pos + 1})"
    except RecursionError:
        return "not JSON that can be read (nested too deeply)"
    except ValueError as error:
        return f"not JSON that can be read ({error})"
    return "not JSON (a number that JSON lacks, such as NaN)"
