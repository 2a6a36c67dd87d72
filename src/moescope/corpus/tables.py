"""Data files other than JSON lines: a JSON array, CSV with a header line, Arrow as `datasets` saves it.

CSV is read as Python's `csv` reads it; all of its values are text.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pyarrow as pa

from moescope.corpus.compression import BrokenFile, chunks
from moescope.corpus.json_lines import decoded
from moescope.corpus.parquet import rows_of
from moescope.corpus.records import Record, Unreadable
from moescope.errors import CorpusTooLarge

MAX_ARRAY_BYTES = 1 << 29
"""Largest JSON array; it is held whole, twice while it is put together."""


def read_array(path: Path) -> Iterator[Record]:
    """Yield the records of a JSON array.

    Raises:
        CorpusTooLarge: It is larger than `MAX_ARRAY_BYTES`.
    """
    pieces, size = [], 0
    try:
        for chunk in chunks(path):
            size += len(chunk)
            if size > MAX_ARRAY_BYTES:
                hint = "make JSON lines of it: jq -c '.[]' FILE"
                raise CorpusTooLarge(path, f"is a JSON array of more than {MAX_ARRAY_BYTES:,} bytes", hint)
            pieces.append(chunk)
        items = msgspec.json.decode(b"".join(pieces).removeprefix(b"\xef\xbb\xbf"), type=list[msgspec.Raw])
    except (BrokenFile, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        yield Unreadable(f"the file is not a JSON array: {error}")
        return
    for item in items:
        yield decoded(bytes(item))


def read_csv(path: Path, max_bytes: int) -> Iterator[Record]:
    """Yield the record of each row by the names of the first one; after one that cannot be read, none follows."""
    csv.field_size_limit(max_bytes)
    try:
        with io.TextIOWrapper(
            io.BufferedReader(_Stream(chunks(path))), "utf-8-sig", errors="surrogateescape", newline=""
        ) as text:
            rows = csv.reader(text, delimiter="\t" if ".tsv" in path.name.lower() else ",", strict=True)
            names = next(rows, [])
            for cells in rows:
                if not cells:
                    yield None
                elif len(cells) != len(names):
                    yield Unreadable(f"{len(cells)} cells, expected {len(names)}")
                elif any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
                    yield Unreadable("not UTF-8")
                else:
                    yield dict(zip(names, cells, strict=True))
    except (csv.Error, BrokenFile) as error:
        yield Unreadable(f"the file cannot be read from here: {error}")


class _Stream(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        self._rest = self._rest or next(self._pieces, b"")
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        taken, self._rest = self._rest[: len(view)], self._rest[len(view) :]
        view[: len(taken)] = taken
        return len(taken)


def read_arrow(path: Path, fields: Sequence[str] | None = None) -> Iterator[Record]:
    """Yield the record of each row of an Arrow file or stream, of the columns that hold the fields; None reads all."""
    try:
        with pa.memory_map(str(path)) as source:
            reader = _arrow(source)
            wanted = [
                name
                for name in reader.schema.names
                if fields is None or any(field == name or field.startswith(f"{name}.") for field in fields)
            ]
            number = range(reader.num_record_batches) if isinstance(reader, pa.ipc.RecordBatchFileReader) else None
            batches = (reader.get_batch(n) for n in number) if number is not None else reader
            for batch in batches:
                yield from rows_of(batch.select(wanted))
    except (pa.ArrowException, OSError) as error:
        yield Unreadable(f"the file cannot be read from here: {str(error).splitlines()[0]}")


def arrow_schema(path: Path) -> pa.Schema:
    """The schema of an Arrow file or stream."""
    with pa.memory_map(str(path)) as source:
        return _arrow(source).schema


def _arrow(source: pa.MemoryMappedFile) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    opened: Callable[..., pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader] = (
        pa.ipc.open_file if is_file else pa.ipc.open_stream
    )
    return opened(source)
