"""Plain text, one document per file: its one record is ``{"text": ...}``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moescope.corpus.records import Record, Unreadable


def read(path: Path) -> Iterator[Record]:
    """Yield the text of the file unchanged, line ends and NULs included, except for a byte order mark."""
    try:
        yield {"text": path.read_bytes().decode().removeprefix("\ufeff")}
    except UnicodeDecodeError as error:
        yield Unreadable(f"not UTF-8 (byte {error.start + 1})")
