"""A part of a trace on disk: one Parquet file of whole documents, whose columns are those of `columns`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moescope.errors import NotRecorded, TraceDamaged
from moescope.trace import plain_json
from moescope.trace.checksums import digest_file
from moescope.trace.columns import (
    COUNT_COLUMNS,
    DROPPED,
    NOT_RECORDED,
    PHASES,
    check_schema,
    columns,
    id_dtype,
    prediction_columns,
    token_columns,
)
from moescope.trace.counts import COUNTS_HINT, Counts, check_counts
from moescope.trace.header import Header, Layer
from moescope.trace.part import Part, RowLabels
from moescope.trace.rules import check_rows

PART_TOKENS = 65_536
"""Tokens of a part, unless the caller says otherwise: what an interruption can cost."""

ROW_GROUP_TOKENS = 2 * PART_TOKENS  # only a part with a very long document has several
_METADATA_KEY = b"moescope"


@dataclass(frozen=True)
class PartContents:
    """What a part holds, so that a trace can be opened without reading a column.

    Attributes:
        rows: Its rows: tokens, or counts.
        sequences: Sequences; 0 in a part of counts.
        first_document: Number of its first document.
        domains: For each domain, in order of appearance, its documents and its rows.
        recorded: For each layer of which not all tokens were recorded, how many were.
    """

    rows: int
    sequences: int
    first_document: int
    domains: Mapping[str, tuple[int, int]]
    recorded: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Part | Counts, header: Header) -> PartContents:
        """The contents of a part in memory, which has all layers of the header that are partly recorded."""
        starts = rows.document_starts()
        lengths, codes = np.diff(starts), rows.domain[starts[:-1]]
        domains = {
            rows.domain_names[code]: (int((codes == code).sum()), int(lengths[codes == code].sum()))
            for code in dict.fromkeys(codes.tolist())
        }
        sequences = len(rows.sequence_starts()) - 1 if isinstance(rows, Part) else 0
        recorded = {
            layer.layer: int(np.count_nonzero(rows.expert_ids[layer.layer][:, 0] != NOT_RECORDED))
            for layer in header.layers
            if layer.partial and isinstance(rows, Part) and layer.layer in rows.expert_ids
        }
        return cls(len(rows.document), sequences, int(rows.document[0]), domains, recorded)

    @classmethod
    def from_json(cls, note: Any) -> PartContents:
        """What `to_json` gave.

        Raises:
            ValueError: It is something else.
        """
        try:
            rows, sequences, first = (note[name] for name in ("rows", "sequences", "first_document"))
            domains = {name: (documents, tokens) for name, (documents, tokens) in note["domains"].items()}
            recorded = {int(layer): number for layer, number in note.get("recorded", {}).items()}
        except (TypeError, KeyError, AttributeError, ValueError):
            raise ValueError(f"the contents of a part are not {str(note)[:60]!r}") from None
        numbers = [rows, sequences, first, *recorded.values()]
        numbers += [number for pair in domains.values() for number in pair]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("the contents of a part are whole numbers from 0")
        if sum(of_domain for _, of_domain in domains.values()) != rows:
            raise ValueError(f"the rows of the domains of a part do not add up to {rows}")
        return cls(rows, sequences, first, domains, recorded)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        note = {"rows": self.rows, "sequences": self.sequences, "first_document": self.first_document}
        return note | {"domains": self.domains} | ({"recorded": self.recorded} if self.recorded else {})


def write_part(file: BinaryIO, part: Part, header: Header, progress: Mapping[str, Any]) -> None:
    """Write a part as Parquet, its encodings chosen by measurement (`docs/decisions/log.md`).

    Columns are required, not nullable, wherever no value can be missing: without definition levels a page is read a
    third faster. Expert columns are dictionary pages without a codec, which would save nothing; token ids and positions
    gain from zstd; weights and scores are float32, exact for every executed dtype of up to 32 bits, byte-stream-split +
    zstd, so that the two empty bytes of a bf16 value compress away.
    """
    arrays: dict[str, pa.Array] = {
        "document": pa.array(part.document.astype(np.uint32)),
        "domain": _labels(part.domain, part.domain_names),
        "sequence": pa.array(part.sequence.astype(np.uint32)),
        "position": pa.array(part.position.astype(np.uint32)),
    }
    if part.cluster is not None:
        arrays["cluster"] = _labels(part.cluster.codes, part.cluster.names)
    if header.token_ids:
        arrays["token_id"] = pa.array(part.token_id.astype(np.uint32))
    if part.phase is not None:
        arrays["phase"] = _labels(part.phase, PHASES)
    if part.label is not None:
        arrays["label"] = _labels(part.label.codes, part.label.names)
    floats: list[str] = []
    for layer in header.layers:
        ids = part.expert_ids[layer.layer]
        missing = ids < 0 if ids.dtype.kind == "i" else None
        if layer.partial and missing is not None:
            missing = ids == NOT_RECORDED
            ids = np.where(ids == DROPPED, layer.num_ids, ids)
        for rank, name in enumerate(layer.expert_columns()):
            mask = missing[:, rank] if missing is not None and missing[:, rank].any() else None
            arrays[name] = pa.array(ids[:, rank].astype(id_dtype(layer)), mask=mask)
    if header.weights:
        for layer in header.layers:
            weights = part.gate_weights[layer.layer]
            for rank, name in enumerate(layer.weight_columns()):
                arrays[name] = pa.array(np.ascontiguousarray(weights[:, rank], np.float32))
                floats.append(name)
    for layer in header.layers:
        for name, values in ((layer.margin_column, part.margins), (layer.mass_column, part.masses)):
            if layer.layer in values:
                arrays[name] = pa.array(np.ascontiguousarray(values[layer.layer], np.float32))
                floats.append(name)
    for layer in header.layers:
        for distance in layer.lookahead:
            predicted = part.predictions[layer.layer, distance]
            for rank, name in enumerate(layer.prediction_columns(distance)):
                arrays[name] = pa.array(np.ascontiguousarray(predicted[:, rank], id_dtype(layer)))
    table = pa.table(
        {column.name: arrays[column.name] for column in columns(header)},
        pa.schema([column.field() for column in columns(header)]),
    )
    zstd = {"position": 3, **({"token_id": 9} if header.token_ids else {}), **dict.fromkeys(floats, 3)}
    with pq.ParquetWriter(
        file,
        table.schema,
        use_dictionary=[name for name in arrays if name not in zstd],
        column_encoding={
            "position": "DELTA_BINARY_PACKED",
            **({"token_id": "PLAIN"} if header.token_ids else {}),
            **dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
        },
        compression={name: "zstd" if name in zstd else "none" for name in arrays},
        compression_level=zstd,
        dictionary_pagesize_limit=2**22,  # beyond the 2**16 ids of uint16: ids never fall back to plain pages
        data_page_size=2**20,  # pages end by rows, not by bytes; their size did not change the speed of reading
        max_rows_per_page=ROW_GROUP_TOKENS // 2,
        write_page_checksum=True,
        write_statistics=token_columns(header),
        store_schema=False,
    ) as writer:
        writer.write_table(table, row_group_size=ROW_GROUP_TOKENS)
        writer.add_key_value_metadata(_footer(part, header, progress))


def write_counts(file: BinaryIO, counts: Counts, header: Header, progress: Mapping[str, Any]) -> None:
    """Write a part of a trace of counts as Parquet."""
    arrays = {
        "document": pa.array(counts.document.astype(np.uint32)),
        "domain": _labels(counts.domain, counts.domain_names),
        "layer": pa.array(counts.layer.astype(np.uint16)),
        "expert": pa.array(counts.expert.astype(np.uint16)),
        "count": pa.array(counts.count.astype(np.uint64)),
    }
    table = pa.table(arrays, pa.schema([column.field() for column in columns(header)]))
    with pq.ParquetWriter(
        file, table.schema, compression="zstd", write_page_checksum=True, store_schema=False
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(_footer(counts, header, progress))


def _footer(rows: Part | Counts, header: Header, progress: Mapping[str, Any]) -> dict[bytes, bytes]:
    note = {"progress": progress, "contents": PartContents.of(rows, header).to_json()}
    return {_METADATA_KEY: json.dumps(note, allow_nan=False).encode()}


def _labels(codes: NDArray[np.integer[Any]], names: Sequence[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(codes.astype(np.int32), list(names)).cast(pa.string())


def is_part(path: Path) -> bool:
    """Whether a file carries the mark of a part of a trace."""
    with suppress(OSError, pa.ArrowException):
        return _METADATA_KEY in (pq.read_metadata(path).metadata or {})
    return False


def footer_digest(path: Path) -> str:
    """SHA-256 of the footer of a Parquet file, in hexadecimal: its schema, the places of its pages, its metadata.

    What the footer does not say, the checksums of the pages do. Two files that different programs wrote of the same
    rows, and two of different rows, differ in it.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - 8 - length))
        return hashlib.sha256(size.to_bytes(8, "little") + file.read()).hexdigest()


class PartFile:
    """A part on disk; its columns are checked before the first is read, page checksums whenever one is.

    Args:
        path: The Parquet file.
        header: Of its trace.
        contents: What the trace says it holds; None to ask the file.
        footer: Checksum of its footer, which another file under its name would not have; None not to look.
        digest: Checksum of all of it, looked at where there is none of the footer; None not to look.
    """

    def __init__(
        self,
        path: Path,
        header: Header,
        contents: PartContents | None = None,
        footer: str | None = None,
        *,
        digest: str | None = None,
    ) -> None:
        self.path = path
        self._header = header
        self._expected = contents
        self._footer, self._digest = footer, digest
        self._compared = False

    @cached_property
    def _note(self) -> dict[str, Any]:
        """Its note in the file, after a check of columns and rows; `num_rows` of the file is added."""
        with _damage(self.path):
            if self._footer is not None:
                if footer_digest(self.path) != self._footer:
                    raise ValueError("it is another file than the summary says")
            elif self._digest is not None and digest_file(self.path) != self._digest:
                raise ValueError("it is another file than the list says")
            metadata = pq.read_metadata(self.path)
            check_schema(metadata.schema.to_arrow_schema(), self._header)
            note = plain_json.parse_object((metadata.metadata or {}).get(_METADATA_KEY, b"null"))
            if not isinstance(note.get("progress"), dict):
                raise ValueError("the recorder's progress is missing")
            if self._expected is not None and metadata.num_rows != self._expected.rows:
                raise ValueError(f"{metadata.num_rows} rows, the summary says {self._expected.rows}")
            return note | {"num_rows": metadata.num_rows}

    @property
    def progress(self) -> dict[str, Any]:
        """The recorder's progress when it finished the part."""
        progress: dict[str, Any] = self._note["progress"]
        return progress

    @property
    def num_tokens(self) -> int:
        """Its rows; in a trace of counts these are not tokens."""
        return self._note["num_rows"] if self._expected is None else self._expected.rows

    @cached_property
    def contents(self) -> PartContents:
        """What it holds; read row by row if neither the trace nor the file says it."""
        if self._expected is not None:
            return self._expected
        if "contents" in self._note:
            with _damage(self.path):
                return PartContents.from_json(self._note["contents"])
        if self._header.counts_only:
            return PartContents.of(self.read_counts(), self._header)
        partial = [layer for layer in self._header.layers if layer.partial]
        return PartContents.of(self.read(partial, tokens=False), self._header)

    def read(
        self,
        layers: Iterable[Layer],
        *,
        weights: bool = False,
        tokens: bool = True,
        predictions: bool = False,
        choices: bool = True,
        scores: bool = False,
    ) -> Part:
        """Read the token columns and the columns of some layers.

        Args:
            layers: Layers of the header.
            weights: Also read the gate weights.
            tokens: Read the token ids, phases and labels; else `Part.token_id` is all zero, and the others are None.
            predictions: Also read the predictions for these layers.
            choices: Read the chosen experts; otherwise `Part.expert_ids` is empty.
            scores: Also read what was recorded of margins and masses.
        Raises:
            NotRecorded: It is a part of a trace of counts.
            TraceDamaged: A page fails its checksum, or a value is invalid.
        """
        if self._header.counts_only:
            raise NotRecorded(self.path, "holds counts of assignments, and no token", COUNTS_HINT)
        layers = tuple(layers)
        wanted = [name for name in token_columns(self._header) if tokens or name not in ("token_id", "phase", "label")]
        wanted += [name for layer in layers for name in layer.expert_columns()] if choices else []
        wanted += [name for layer in layers for name in layer.weight_columns()] if weights else []
        wanted += prediction_columns(layers) if predictions else []
        margins = {layer.layer: layer.margin_column for layer in layers if scores and self._header.margins}
        masses = {layer.layer: layer.mass_column for layer in layers if scores and self._header.masses}
        wanted += [*margins.values(), *masses.values()]
        labels = [name for name in ("domain", "cluster", "phase", "label") if name in wanted]
        num_rows = self._note["num_rows"]
        with _damage(self.path):
            with pq.ParquetFile(
                self.path, page_checksum_verification=True, read_dictionary=labels, buffer_size=2**16
            ) as file:
                table = file.read(wanted, use_threads=False)
            if table.num_rows != num_rows:
                raise ValueError(f"{table.num_rows} rows, expected {num_rows}")
            domain, names = _codes(table, "domain")
            part = Part(
                _numbers(table, "document"),
                domain,
                names,
                _numbers(table, "sequence"),
                _numbers(table, "position"),
                _numbers(table, "token_id") if "token_id" in wanted else np.zeros(num_rows, np.uint32),
                {layer.layer: _ids(table, layer, layer.expert_columns()) for layer in layers} if choices else {},
                {layer.layer: _gate_weights(table, layer) for layer in layers} if weights else {},
                _phase(table) if "phase" in wanted else None,
                {
                    (layer.layer, distance): _ids(table, layer, layer.prediction_columns(distance))
                    for layer in (layers if predictions else ())
                    for distance in layer.lookahead
                },
                RowLabels(*_codes(table, "cluster")) if "cluster" in wanted else None,
                RowLabels(*_codes(table, "label")) if "label" in wanted else None,
                {number: _numbers(table, name) for number, name in margins.items()},
                {number: _numbers(table, name) for number, name in masses.items()},
            )
            check_rows(part, self._header)
            self._compare(part)
        return part

    def _compare(self, part: Part) -> None:
        """Compare the first rows that are read with what is noted of them."""
        if not self._compared and (self._expected is not None or "contents" in self._note):
            held, noted = PartContents.of(part, self._header), self.contents
            recorded = {layer: number for layer, number in noted.recorded.items() if layer in part.expert_ids}
            if held != replace(noted, recorded=recorded):
                raise ValueError("it holds other documents, sequences or tokens than are noted of it")
        self._compared = True

    def read_counts(self) -> Counts:
        """Read a part of a trace of counts.

        Raises:
            TraceDamaged: A page fails its checksum, or a value is invalid.
        """
        _ = self._note
        with _damage(self.path):
            with pq.ParquetFile(self.path, page_checksum_verification=True, read_dictionary=["domain"]) as file:
                table = file.read(list(COUNT_COLUMNS), use_threads=False)
            domain, names = _codes(table, "domain")
            numbers = (_numbers(table, name) for name in COUNT_COLUMNS if name != "domain")
            document, layer, expert, count = (column.astype(np.int64) for column in numbers)
            counts = Counts(document, domain, names, layer, expert, count)
            check_counts(counts, self._header)
        return counts


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Convert the errors that reading a damaged file raises into `TraceDamaged`."""
    try:
        yield
    except FileNotFoundError as error:
        raise TraceDamaged(path, "is missing") from error
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        hint = "`moescope verify` lists every damaged file of the trace"
        raise TraceDamaged(path, f"cannot be read: {error}", hint) from error


def _numbers(table: pa.Table, name: str) -> NDArray[Any]:
    column = table[name]
    if column.null_count:
        raise ValueError(f"column {name} has nulls")
    return column.to_numpy()


def _codes(table: pa.Table, name: str) -> tuple[NDArray[np.integer[Any]], tuple[str, ...]]:
    """Codes of a column of labels, and the labels."""
    column = table[name].combine_chunks()
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    names = tuple(column.dictionary.to_pylist())
    if column.null_count or column.indices.null_count or pc.max(column.indices).as_py() >= len(names):
        raise ValueError(f"column {name} has nulls or codes without a name")
    return column.indices.to_numpy(zero_copy_only=False), names


def _phase(table: pa.Table) -> NDArray[np.integer[Any]]:
    codes, names = _codes(table, "phase")
    if unknown := set(names) - set(PHASES):
        raise ValueError(f"column phase holds {min(unknown)!r}, expected {' or '.join(PHASES)}")
    return np.array([PHASES.index(name) for name in names], np.uint8)[codes]


def _ids(table: pa.Table, layer: Layer, names: Sequence[str]) -> NDArray[np.integer[Any]]:
    """Ids of one layer, shape (token, rank), each rank contiguous in memory; signed only if some are no id."""
    columns = [table[name] for name in names]
    predicted = names[0].startswith("P")
    has_nulls = any(column.null_count for column in columns)
    if has_nulls and (predicted or not (layer.drops or layer.partial)):
        raise ValueError(f"column {names[0]} or a later rank has nulls, and no value of it can be missing")
    ids = np.empty((len(names), table.num_rows), np.int32 if has_nulls else id_dtype(layer))
    null = NOT_RECORDED if layer.partial else DROPPED
    for rank, column in enumerate(columns):
        ids[rank] = (column.cast(pa.int32()).fill_null(null) if column.null_count else column).to_numpy()
    if layer.partial and layer.drops and not predicted and (dropped := ids == layer.num_ids).any():
        ids = ids.astype(np.int32)
        ids[dropped] = DROPPED
    return ids.T


def _gate_weights(table: pa.Table, layer: Layer) -> NDArray[np.float32]:
    weights = np.empty((layer.top_k, table.num_rows), np.float32)
    for rank, name in enumerate(layer.weight_columns()):
        weights[rank] = _numbers(table, name)
    return weights.T
