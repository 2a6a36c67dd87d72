"""Decode a Parquet file within a memory limit and discard the result: run as a program.

Arrow's decoder crashes the whole process on some damaged files, and a few kilobytes can expand to gigabytes. Foreign
files are therefore decoded here first, in a process of their own; a file that kills it never reaches the importer.
"""

from __future__ import annotations

import sys

import pyarrow.parquet as pq

try:
    import resource
except ImportError:  # pragma: no cover - Windows has no limits of this kind
    resource = None  # type: ignore[assignment]


def probe(path: str, max_bytes: int, columns: list[str], batch_rows: int) -> None:
    """Decode the columns that the file has, a batch at a time."""
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        wanted = [name for name in file.schema_arrow.names if name in columns]
        for batch in file.iter_batches(batch_rows, columns=wanted, use_threads=False):
            batch.validate(full=True)
            if batch.nbytes > max_bytes // 16:  # Python objects take some nine times as much
                raise MemoryError(f"{batch.num_rows} rows take {batch.nbytes} bytes")


if __name__ == "__main__":
    try:
        probe(sys.argv[1], int(sys.argv[2]), sys.argv[4:], int(sys.argv[3]))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}"[:300], file=sys.stderr)
        sys.exit(1)
