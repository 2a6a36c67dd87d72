"""A part of a trace: whole documents, one row per token, as arrays in memory and as one Parquet file.

The columns are ``document, domain, sequence, position``, ``token_id`` and ``phase`` if the header says so, then
``L{layer}_{rank}`` (chosen expert; null = the assignment was dropped) and, if recorded, ``W{layer}_{rank}`` (gate
weight as executed) and ``P{layer}_{distance}_{rank}`` (expert predicted that many recorded layers earlier).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moescope.errors import NotRecorded, TraceDamaged
from moescope.trace.counts import COUNT_COLUMNS, COUNTS_HINT, Counts, check_counts
from moescope.trace.header import Header, Layer

DROPPED = -1
"""The expert id, in memory, of an assignment that was dropped by capacity; a null in the file."""

PHASES = ("prefill", "decode")
"""Names of the codes of `Part.phase`: processed as part of a prompt, or one at a time as generated."""

ROW_GROUP_TOKENS = 131_072  # twice the usual tokens of a part: only a part with a very long document has several
_METADATA_KEY = b"moescope"


@dataclass(frozen=True)
class Part:
    """Rows of a trace, one per token; a document's rows are contiguous, in the order of its text.

    Attributes:
        document: Index of the record in the corpus, shape (token,).
        domain: Code of the domain, an index into `domain_names`, shape (token,).
        domain_names: Labels of the domains.
        sequence: Window within the document, from 0, shape (token,).
        position: Place within the window, from 0, tokens added by the tokenizer not counted, shape (token,).
        token_id: Vocabulary id, shape (token,); all zero if the header says that they are unknown.
        expert_ids: For each layer the chosen experts, rank 0 first, shape (token, choice); -1 = dropped.
        gate_weights: For each layer the gate weights, shape (token, choice), dimensionless; empty if not recorded.
        phase: Code of the phase, an index into `PHASES`, shape (token,); None if the header says that it is unknown.
        predictions: For each layer and distance the experts predicted at that distance, rank 0 first, shape
            (token, predicted); empty if not recorded, or not read.
    """

    document: NDArray[np.integer[Any]]
    domain: NDArray[np.integer[Any]]
    domain_names: tuple[str, ...]
    sequence: NDArray[np.integer[Any]]
    position: NDArray[np.integer[Any]]
    token_id: NDArray[np.integer[Any]]
    expert_ids: Mapping[int, NDArray[np.integer[Any]]]
    gate_weights: Mapping[int, NDArray[np.floating[Any]]] = field(default_factory=dict)
    phase: NDArray[np.integer[Any]] | None = None
    predictions: Mapping[tuple[int, int], NDArray[np.integer[Any]]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Rows of the part."""
        return len(self.document)

    def document_starts(self) -> NDArray[np.int64]:
        """Row at which each document starts, with the number of rows at the end, shape (document + 1,)."""
        return _run_starts(self.document)

    def sequence_starts(self) -> NDArray[np.int64]:
        """Row at which each sequence starts, with the number of rows at the end, shape (sequence + 1,)."""
        starts = np.flatnonzero(self.position == 0)
        return np.append(starts, self.num_tokens).astype(np.int64)

    @classmethod
    def joined(cls, parts: Sequence[Part]) -> Part:
        """The rows of several parts, one after the other; they have the same domain names, layers and columns."""
        first = parts[0]
        if len(parts) == 1:
            return first

        def column(name: str) -> NDArray[Any]:
            return np.concatenate([getattr(part, name) for part in parts])

        def columns(name: str) -> dict[Any, NDArray[Any]]:
            return {key: np.concatenate([getattr(part, name)[key] for part in parts]) for key in getattr(first, name)}

        return cls(
            column("document"),
            column("domain"),
            first.domain_names,
            column("sequence"),
            column("position"),
            column("token_id"),
            columns("expert_ids"),
            columns("gate_weights"),
            None if first.phase is None else column("phase"),
            columns("predictions"),
        )

    def rows(self, selected: slice | NDArray[Any]) -> Part:
        """The part that holds only the selected rows."""
        return replace(
            self,
            document=self.document[selected],
            domain=self.domain[selected],
            sequence=self.sequence[selected],
            position=self.position[selected],
            token_id=self.token_id[selected],
            expert_ids={layer: ids[selected] for layer, ids in self.expert_ids.items()},
            gate_weights={layer: weights[selected] for layer, weights in self.gate_weights.items()},
            phase=None if self.phase is None else self.phase[selected],
            predictions={key: ids[selected] for key, ids in self.predictions.items()},
        )


def token_columns(header: Header) -> list[str]:
    """Names of the columns that identify the token of a row."""
    known = ["token_id"] if header.token_ids else []
    return ["document", "domain", "sequence", "position", *known, *(["phase"] if header.phases else [])]


def column_names(header: Header) -> list[str]:
    """Names of the columns of a part, in their order."""
    if header.counts_only:
        return list(COUNT_COLUMNS)
    names = token_columns(header) + [name for layer in header.layers for name in layer.expert_columns()]
    names += [name for layer in header.layers for name in layer.weight_columns()] if header.weights else []
    return names + prediction_columns(header.layers)


def prediction_columns(layers: Iterable[Layer]) -> list[str]:
    """Names of the columns of predicted experts, by layer, distance and rank."""
    return [name for layer in layers for distance in layer.lookahead for name in layer.prediction_columns(distance)]


def check(part: Part, header: Header) -> None:
    """Refuse a part that contradicts the header or the format.

    Raises:
        ValueError: A shape, an id or the order of the rows differs from the header or violates the format.
    """
    num_tokens = part.num_tokens
    if num_tokens == 0:
        raise ValueError("a part holds at least one token")
    if header.counts_only or (part.phase is not None) != header.phases:
        raise ValueError("tokens and their phases must be given if and only if the header declares them")
    for name in token_columns(header):
        column = getattr(part, name)
        if column.shape != (num_tokens,) or (column < 0).any():
            raise ValueError(f"{name} must be {num_tokens} numbers from 0, found shape {column.shape}")
    if part.domain.max() >= len(part.domain_names):
        raise ValueError(f"domain code {part.domain.max()} has no name")
    if part.phase is not None and part.phase.max() >= len(PHASES):
        raise ValueError(f"phase code {part.phase.max()} has no name")
    _check_order(part)
    if set(part.expert_ids) != {layer.layer for layer in header.layers}:
        raise ValueError(f"expert ids are given for layers {sorted(part.expert_ids)}, the header has others")
    if header.weights != bool(part.gate_weights):
        raise ValueError("gate weights must be given if and only if the header declares them")
    for layer in header.layers:
        ids = part.expert_ids[layer.layer]
        if ids.shape != (num_tokens, layer.top_k):
            raise ValueError(f"layer {layer.layer}: ids have shape {ids.shape}, not {(num_tokens, layer.top_k)}")
        if ids.min() < (DROPPED if layer.drops else 0) or ids.max() >= layer.num_ids:
            raise ValueError(f"layer {layer.layer}: id outside 0..{layer.num_ids - 1}: {ids.min()}..{ids.max()}")
        if header.weights and part.gate_weights[layer.layer].shape != ids.shape:
            raise ValueError(f"layer {layer.layer}: gate weights and ids differ in shape")
    if set(part.predictions) != {(layer.layer, distance) for layer in header.layers for distance in layer.lookahead}:
        raise ValueError("predictions must be given for exactly the layers and distances of the header")
    for layer in header.layers:
        for distance in layer.lookahead:
            ids = part.predictions[layer.layer, distance]
            if ids.shape != (num_tokens, layer.num_predicted) or ids.min() < 0 or ids.max() >= layer.num_ids:
                raise ValueError(
                    f"layer {layer.layer}: predictions have shape {ids.shape} and ids {ids.min()}..{ids.max()}, not "
                    f"{(num_tokens, layer.num_predicted)} and 0..{layer.num_ids - 1}"
                )


def _check_order(part: Part) -> None:
    """Documents are contiguous; in each, sequences count from 0 and so do the positions of each sequence."""
    documents = part.document_starts()
    if len(np.unique(part.document[documents[:-1]])) != len(documents) - 1:
        raise ValueError("the rows of a document must be contiguous")
    if part.sequence[documents[:-1]].any() or part.position[documents[:-1]].any():
        raise ValueError("a document starts with sequence 0, position 0")
    # Few rows do not advance by one position; only these may change the sequence or the document.
    jumps = np.flatnonzero(part.position[1:] != part.position[:-1] + 1) + 1
    sequences = _run_starts(part.sequence)[1:-1]
    inner = np.setdiff1d(jumps, documents, assume_unique=True)  # where a document continues in its next sequence
    if (
        not np.isin(np.concatenate([sequences, documents[1:-1]]), jumps).all()
        or part.position[inner].any()
        or (part.sequence[inner] != part.sequence[inner - 1] + 1).any()
    ):
        raise ValueError("the rows of a document must be in the order of its text")
    if not np.isin(_run_starts(part.domain)[1:-1], documents).all():
        raise ValueError("a document has one domain")


def write_part(file: BinaryIO, part: Part, header: Header, progress: Mapping[str, Any]) -> None:
    """Write a part as Parquet, its encodings chosen by measurement (`docs/decisions/log.md`).

    Columns are required, not nullable, wherever no value can be missing: without definition levels a page is read a
    third faster. Expert columns are dictionary pages without a codec, which would save nothing; token ids and positions
    gain from zstd; weights are float32, exact for every executed dtype of up to 32 bits, byte-stream-split + zstd, so
    that the two empty bytes of a bf16 value compress away.
    """
    nullable = {name for layer in header.layers if layer.drops for name in layer.expert_columns()}
    columns: dict[str, pa.Array] = {
        "document": pa.array(part.document.astype(np.uint32)),
        "domain": _labels(part.domain, part.domain_names),
        "sequence": pa.array(part.sequence.astype(np.uint32)),
        "position": pa.array(part.position.astype(np.uint32)),
    }
    if header.token_ids:
        columns["token_id"] = pa.array(part.token_id.astype(np.uint32))
    if part.phase is not None:
        columns["phase"] = _labels(part.phase, PHASES)
    weight_names: list[str] = []
    for layer in header.layers:
        ids = part.expert_ids[layer.layer]
        dropped = ids == DROPPED if ids.dtype.kind == "i" else None
        for rank, name in enumerate(layer.expert_columns()):
            mask = dropped[:, rank] if dropped is not None and dropped[:, rank].any() else None
            columns[name] = pa.array(ids[:, rank].astype(id_dtype(layer)), mask=mask)
    if header.weights:
        for layer in header.layers:
            weights = part.gate_weights[layer.layer]
            for rank, name in enumerate(layer.weight_columns()):
                columns[name] = pa.array(np.ascontiguousarray(weights[:, rank], np.float32))
                weight_names.append(name)
    for layer in header.layers:
        for distance in layer.lookahead:
            predicted = part.predictions[layer.layer, distance]
            for rank, name in enumerate(layer.prediction_columns(distance)):
                columns[name] = pa.array(np.ascontiguousarray(predicted[:, rank], id_dtype(layer)))
    fields = [pa.field(name, column.type, nullable=name in nullable) for name, column in columns.items()]
    table = pa.table(columns, pa.schema(fields))
    zstd = {"position": 3, **({"token_id": 9} if header.token_ids else {}), **dict.fromkeys(weight_names, 3)}
    with pq.ParquetWriter(
        file,
        table.schema,
        use_dictionary=[name for name in columns if name not in zstd],
        column_encoding={
            "position": "DELTA_BINARY_PACKED",
            **({"token_id": "PLAIN"} if header.token_ids else {}),
            **dict.fromkeys(weight_names, "BYTE_STREAM_SPLIT"),
        },
        compression={name: "zstd" if name in zstd else "none" for name in columns},
        compression_level=zstd,
        dictionary_pagesize_limit=2**22,  # beyond the 2**16 ids of uint16: ids never fall back to plain pages
        data_page_size=2**20,  # pages end by rows, not by bytes; their size did not change the speed of reading
        max_rows_per_page=ROW_GROUP_TOKENS // 2,
        write_page_checksum=True,
        write_statistics=token_columns(header),
        store_schema=False,
    ) as writer:
        writer.write_table(table, row_group_size=ROW_GROUP_TOKENS)
        writer.add_key_value_metadata({_METADATA_KEY: json.dumps({"progress": progress}).encode()})


def write_counts(file: BinaryIO, counts: Counts, progress: Mapping[str, Any]) -> None:
    """Write a part of a trace of counts as Parquet."""
    columns = {
        "document": pa.array(counts.document.astype(np.uint32)),
        "domain": _labels(counts.domain, counts.domain_names),
        "layer": pa.array(counts.layer.astype(np.uint16)),
        "expert": pa.array(counts.expert.astype(np.uint16)),
        "count": pa.array(counts.count.astype(np.uint64)),
    }
    fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
    with pq.ParquetWriter(
        file, pa.schema(fields), compression="zstd", write_page_checksum=True, store_schema=False
    ) as writer:
        writer.write_table(pa.table(columns, pa.schema(fields)))
        writer.add_key_value_metadata({_METADATA_KEY: json.dumps({"progress": progress}).encode()})


def _labels(codes: NDArray[np.integer[Any]], names: Sequence[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(codes.astype(np.int32), list(names)).cast(pa.string())


def id_dtype(layer: Layer) -> type[np.uint8 | np.uint16]:
    """Width of a layer's expert columns: one byte up to 256 ids, two above."""
    return np.uint8 if layer.num_ids <= 256 else np.uint16


class PartFile:
    """A part on disk, opened for reading; page checksums are verified on every read.

    Attributes:
        path: The Parquet file.
        num_tokens: Its rows; in a trace of counts these are not tokens.
        progress: The recorder's progress when it finished the part.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self._header = header
        with self._damage():
            metadata = pq.read_metadata(path)
            names = metadata.schema.names
            note = json.loads((metadata.metadata or {}).get(_METADATA_KEY, b"null"))
        if names != (expected := column_names(header)):
            differing = sorted(set(names) ^ set(expected)) or ["their order"]
            raise TraceDamaged(path, f"the columns are not those of the header: {', '.join(differing[:5])}")
        if not isinstance(note, dict) or not isinstance(note.get("progress"), dict):
            raise TraceDamaged(path, "the recorder's progress is missing")
        self.progress: dict[str, Any] = note["progress"]
        self.num_tokens: int = metadata.num_rows

    def read(
        self,
        layers: Iterable[Layer],
        *,
        weights: bool = False,
        tokens: bool = True,
        predictions: bool = False,
        choices: bool = True,
    ) -> Part:
        """Read the token columns and the columns of some layers.

        Args:
            layers: Layers of the header.
            weights: Also read the gate weights.
            tokens: Read the token ids and phases; otherwise `Part.token_id` is all zero and `Part.phase` None.
            predictions: Also read the predictions for these layers.
            choices: Read the chosen experts; otherwise `Part.expert_ids` is empty.
        Raises:
            NotRecorded: It is a part of a trace of counts.
            TraceDamaged: A page fails its checksum, or a value is invalid.
        """
        if self._header.counts_only:
            raise NotRecorded(self.path, "holds counts of assignments, and no token", COUNTS_HINT)
        layers = tuple(layers)
        wanted = [name for name in token_columns(self._header) if tokens or name not in ("token_id", "phase")]
        wanted += [name for layer in layers for name in layer.expert_columns()] if choices else []
        wanted += [name for layer in layers for name in layer.weight_columns()] if weights else []
        wanted += prediction_columns(layers) if predictions else []
        labels = [name for name in ("domain", "phase") if name in wanted]
        with self._damage():
            with pq.ParquetFile(
                self.path, page_checksum_verification=True, read_dictionary=labels, buffer_size=2**16
            ) as file:
                table = file.read(wanted, use_threads=False)
            if table.num_rows != self.num_tokens:
                raise ValueError(f"{table.num_rows} rows, expected {self.num_tokens}")
            domain, names = _codes(table, "domain")
            part = Part(
                _numbers(table, "document"),
                domain,
                names,
                _numbers(table, "sequence"),
                _numbers(table, "position"),
                _numbers(table, "token_id") if "token_id" in wanted else np.zeros(self.num_tokens, np.uint32),
                {layer.layer: _ids(table, layer, layer.expert_columns()) for layer in layers} if choices else {},
                {layer.layer: _gate_weights(table, layer) for layer in layers} if weights else {},
                _phase(table) if "phase" in wanted else None,
                {
                    (layer.layer, distance): _ids(table, layer, layer.prediction_columns(distance))
                    for layer in (layers if predictions else ())
                    for distance in layer.lookahead
                },
            )
            _check_order(part)
        return part

    def read_counts(self) -> Counts:
        """Read a part of a trace of counts.

        Raises:
            TraceDamaged: A page fails its checksum, or a value is invalid.
        """
        with self._damage():
            with pq.ParquetFile(self.path, page_checksum_verification=True, read_dictionary=["domain"]) as file:
                table = file.read(list(COUNT_COLUMNS), use_threads=False)
            domain, names = _codes(table, "domain")
            numbers = (_numbers(table, name) for name in COUNT_COLUMNS if name != "domain")
            document, layer, expert, count = (column.astype(np.int64) for column in numbers)
            counts = Counts(document, domain, names, layer, expert, count)
            check_counts(counts, self._header)
        return counts

    def _damage(self) -> _Damage:
        return _Damage(self.path)


class _Damage:
    """Converts the errors that reading a damaged file raises into `TraceDamaged`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, FileNotFoundError):
            raise TraceDamaged(self.path, "is missing") from error
        if isinstance(error, (OSError, ValueError, KeyError, TypeError, pa.ArrowException)):
            raise TraceDamaged(
                self.path, f"cannot be read: {error}", "`moescope verify` lists every damaged file of the trace"
            ) from error


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
    """Ids of one layer, shape (token, rank), each rank contiguous in memory; signed only if some were dropped."""
    columns = [table[name] for name in names]
    dropped = any(column.null_count for column in columns)
    if dropped and names[0].startswith("P"):
        raise ValueError(f"predictions of layer {layer.layer} have nulls")
    dtype = np.dtype(np.int32 if dropped else id_dtype(layer))
    ids = np.empty((len(names), table.num_rows), dtype)
    for rank, column in enumerate(columns):
        if column.null_count:
            column = column.cast(pa.int32()).fill_null(DROPPED)
        if pa.types.is_floating(column.type) or not pa.types.is_integer(column.type):
            raise ValueError(f"column {names[rank]} holds {column.type}")
        ids[rank] = column.to_numpy()
    if ids.max(initial=0) >= layer.num_ids:
        raise ValueError(f"layer {layer.layer} has expert id {ids.max()}, expected at most {layer.num_ids - 1}")
    return ids.T


def _gate_weights(table: pa.Table, layer: Layer) -> NDArray[np.float32]:
    weights = np.empty((layer.top_k, table.num_rows), np.float32)
    for rank, name in enumerate(layer.weight_columns()):
        weights[rank] = _numbers(table, name)
    return weights.T


def _run_starts(values: NDArray[Any]) -> NDArray[np.int64]:
    """Indices at which a new run of equal values starts, with the length at the end."""
    if not len(values):
        return np.zeros(1, np.int64)
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    return np.concatenate([[0], changes, [len(values)]]).astype(np.int64)
