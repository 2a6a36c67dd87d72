"""`vocabulary.parquet`: the text piece of every token id, so that a trace can be read without its tokenizer.

``token_id, text, bytes``: `bytes` are exact (a piece may be half a character); `text` is their decoded form for people
and SQL, with undecodable bytes as U+FFFD.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from moescope.errors import TraceDamaged

FILE_NAME = "vocabulary.parquet"
_COLUMNS = {"token_id": pa.uint32(), "text": pa.string(), "bytes": pa.binary()}


@dataclass(frozen=True)
class Vocabulary:
    """Text pieces by token id.

    Attributes:
        pieces: The exact bytes of each known id.

    Example:
        >>> vocabulary = Vocabulary({5: b"caf", 9: b"\\xc3", 7: b"\\xa9"})
        >>> vocabulary.text([5, 9, 7])
        'café'
        >>> vocabulary.piece(1)
        b'<|1|>'
    """

    pieces: dict[int, bytes]

    @classmethod
    def from_pieces(cls, pieces: Sequence[bytes]) -> Vocabulary:
        """The vocabulary in which the id of a piece is its index."""
        return cls(dict(enumerate(pieces)))

    def piece(self, token_id: int) -> bytes:
        """The bytes of an id; ``<|id|>`` for an unknown one."""
        known = self.pieces.get(int(token_id))
        return f"<|{int(token_id)}|>".encode() if known is None else known

    def text(self, token_ids: ArrayLike) -> str:
        """The concatenated text of some ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.piece(token_id) for token_id in np.asarray(token_ids).tolist()).decode(errors="replace")

    @cached_property
    def num_ids(self) -> int:
        """One more than the largest known id."""
        return max(self.pieces, default=-1) + 1

    def table(self) -> pa.Table:
        """The columns of ``vocabulary.parquet``, by id."""
        ids = sorted(self.pieces)
        pieces = [self.pieces[token_id] for token_id in ids]
        return pa.table(
            {
                "token_id": ids,
                "text": [piece.decode(errors="replace") for piece in pieces],
                "bytes": pieces,
            },
            pa.schema(_COLUMNS),
        )

    def write(self, file: BinaryIO) -> None:
        """Write ``vocabulary.parquet``."""
        pq.write_table(self.table(), file, compression="zstd", write_page_checksum=True, use_dictionary=False)

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """Read ``vocabulary.parquet``.

        Raises:
            TraceDamaged: The file is missing or cannot be read.
        """
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                found = file.schema_arrow
                if (types := list(zip(found.names, found.types, strict=True))) != list(_COLUMNS.items()):
                    raise ValueError(f"columns are {_names(types)}, expected {_names(_COLUMNS.items())}")
                table = file.read(["token_id", "bytes"], use_threads=False)
            token_ids, pieces = table["token_id"].to_pylist(), table["bytes"].to_pylist()
            known = dict(zip(token_ids, pieces, strict=True))
            if None in known or None in pieces:
                raise ValueError("a token id or a piece is missing")
            if len(known) != len(token_ids):
                raise ValueError(f"token id {Counter(token_ids).most_common(1)[0][0]} has two pieces")
            return cls(known)
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise TraceDamaged(path, f"cannot be read: {error}") from None


def _names(types: Iterable[tuple[str, pa.DataType]]) -> str:
    return ", ".join(f"{name} ({type})" for name, type in types)
