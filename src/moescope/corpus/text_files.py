"""Plain text, one document per file: its one record is ``{"text": ...}``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moescope.corpus.json_lines import check_size
from moescope.corpus.records import Record, Unreadable


def read(path: Path, max_bytes: int) -> Iterator[Record]:
    """Yield the text of the file unchanged, line ends included, except for a byte order mark.

    Raises:
        CorpusTooLarge: It is larger than so many bytes.
    """
    check_size(path, "its text", path.stat().st_size, max_bytes)
    try:
        text = path.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        yield Unreadable(f"not UTF-8 (byte {error.start + 1})")
        return
    yield Unreadable("holds NUL bytes, so it is not text") if "\0" in text else {"text": text}
