"""The bytes of a file, decompressed as a stream; zstd and gzip are recognised by their first bytes, not by name."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import zstandard

COMPRESSED_BYTES = 1 << 15  # read at a time; small, since each piece is decompressed at once
PLAIN_BYTES = 1 << 18  # read at a time where a piece cannot grow
MAX_WINDOW_BYTES = 1 << 31  # `zstd --long=31`, the largest that zstd supports


class BrokenFile(Exception):
    """The compressed data is damaged or truncated; what came before is intact."""


def chunks(
    path: Path, *, compressed_bytes: int = COMPRESSED_BYTES, max_window_bytes: int = MAX_WINDOW_BYTES
) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file, piece by piece.

    Args:
        compressed_bytes: Bytes of a zstd file read at a time; hostile data can expand 30,000-fold.
        max_window_bytes: Largest window that a zstd file may request.
    Raises:
        BrokenFile: After the last piece that could be decompressed.
    """
    with path.open("rb") as file:
        magic = file.peek(4)[:4]
        try:
            if magic == b"\x28\xb5\x2f\xfd" or (magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5):
                yield from _decompressed_zstd(file, compressed_bytes, max_window_bytes)
            elif magic[:2] == b"\x1f\x8b":
                with gzip.open(file) as plain:
                    yield from iter(partial(plain.read, PLAIN_BYTES), b"")
            else:
                yield from iter(partial(file.read, PLAIN_BYTES), b"")
        except (zstandard.ZstdError, zlib.error, gzip.BadGzipFile, EOFError) as error:
            raise BrokenFile(str(error)) from error


def _decompressed_zstd(file: BinaryIO, compressed_bytes: int, max_window_bytes: int) -> Iterator[bytes]:
    """Decompress frame after frame; unlike zstandard's ``stream_reader``, detect a truncated last frame."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=max_window_bytes)
    frame, rest = None, b""
    while data := rest or file.read(compressed_bytes):
        frame = frame or decompressor.decompressobj()
        if plain := frame.decompress(data):
            yield plain
        rest = frame.unused_data
        if frame.eof:
            frame = None
    if frame is not None:
        raise EOFError("the zstd stream is truncated")
