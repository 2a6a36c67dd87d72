"""JSON lines, one object per line, like the Pile and most corpora; plain, zstd or gzip."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec

from moescope.corpus.compression import BrokenFile, chunks
from moescope.corpus.records import Record, Unreadable, kind

BOM = b"\xef\xbb\xbf"


def read(path: Path) -> Iterator[Record]:
    """Yield the record of each line; where a compressed file is damaged, an ``Unreadable`` is the last."""
    try:
        for index, line in enumerate(_lines(path)):
            yield _decoded(line if index else line.removeprefix(BOM))
    except BrokenFile as error:
        yield Unreadable(f"the file is damaged from here: {error}")


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines without their newline; a line of any length is concatenated once."""
    pieces: list[bytes] = []
    for chunk in chunks(path):
        end, *starts = chunk.split(b"\n")
        pieces.append(end)
        for start in starts:
            yield b"".join(pieces)
            pieces = [start]
    if last := b"".join(pieces):
        yield last


def _decoded(line: bytes) -> Record:
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
