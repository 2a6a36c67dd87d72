"""Parquet, one record per row; only the requested columns are read, one page of each at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moescope.corpus.records import Record, Unreadable

ROWS = 64  # decoded at a time; few, because documents may be large
BUFFER_BYTES = 1 << 20  # read at a time from a column; without it pyarrow reads all of the column's row group


def read(path: Path, fields: Sequence[str] | None = None) -> Iterator[Record]:
    """Yield the record of each row; where the file cannot be read further, an ``Unreadable`` is the last.

    The fields are columns to read, with a dotted path for a part of a struct; None reads all.
    """
    try:
        with (
            path.open("rb") as file,
            pq.ParquetFile(
                file, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
            ) as parquet,
        ):
            for batch in parquet.iter_batches(ROWS, columns=fields, use_threads=False):
                yield from rows_of(batch)
    except (pa.ArrowException, OSError) as error:
        yield Unreadable(f"the file cannot be read from here: {str(error).splitlines()[0]}")


def rows_of(batch: pa.RecordBatch) -> Iterator[Record]:
    """Yield the record of each row; whatever its decoding raises is of that record alone."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for row in range(batch.num_rows):
        try:
            yield {name: column[row].as_py() for name, column in columns.items()}
        except UnicodeDecodeError as error:
            yield Unreadable(f"not UTF-8 (byte {error.start + 1} of its string)")
        except Exception as error:  # dates out of range, unknown time zones, types of other programs
            yield Unreadable(f"cannot be decoded ({type(error).__name__}: {str(error)[:100]})")


def schema(path: Path) -> pa.Schema:
    """The columns of a file."""
    return pq.read_schema(path)


def field_names(columns: pa.Schema | pa.StructType, prefix: str = "") -> Iterator[str]:
    """The paths of the fields of a schema, structs opened, in their order."""
    for field in (columns.field(number) for number in range(len(columns.names))):
        if pa.types.is_struct(field.type):
            yield from field_names(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"
