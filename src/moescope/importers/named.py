"""Tables with named columns, as many loggers write them: JSON lines, CSV or Parquet; one row per token and layer.

A row holds a token's experts of a layer as a list or, in long form, a single expert. Names are looked up among those
that loggers use (`NAMES`), or given. A document is identified by domain and document field, or else by its file.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moescope.errors import ImportIncomplete, ImportMalformed
from moescope.importers import parquet_probe
from moescope.importers.documents import NO_MODEL, ModelFacts, TokenDocument
from moescope.importers.events import UNKNOWN, DocumentNumbers, Event, Meaning, batches, gather
from moescope.importers.files import decode, find, lines, number, real, stem, table
from moescope.importers.findings import Findings, Options

NAMES: Mapping[str, tuple[str, ...]] = {
    content: tuple(names.split())
    for content, names in {
        "experts": "experts selected_experts expert_ids topk_experts topk_ids top_experts expert_indices",
        "expert": "expert expert_id expert_idx",
        "weights": "weights gating_probs gate_weights routing_weights topk_weights selected_probs scores probs",
        "weight": "weight gating_prob gate_weight routing_weight prob score",
        "logits": "router_logits logits",
        "token": "token_idx token_index token_pos token_position position pos token",
        "token_id": "token_id input_id",
        "layer": "layer layer_idx layer_id layer_index",
        "slot": "slot rank topk_rank expert_rank",
        "document": "document problem_id document_id doc_id sequence_id seq_id request_id prompt_idx sample_id",
        "domain": "domain dataset dataset_source category",
        "phase": "phase is_decode",
    }.items()
}
"""Names of a field in files, in order of preference."""

PHASE_WORDS = {"prefill": 0, "prompt": 0, "decode": 1, "generation": 1, "0": 0, "1": 1, "false": 0, "true": 1}
MAX_EVENT_BYTES = 1 << 20  # a row has the choices of one token in one layer, and perhaps its logits
MAX_CHOICES = 1024  # far beyond any top-k
BATCH_ROWS = 1 << 12  # of Parquet at a time; few, because they become Python objects
MAX_PARQUET_BYTES = 3 << 29
"""Memory in which a Parquet file must be decodable: 1.6 GB, of the 2 GB of an import."""

_NUMBER = re.compile(r"[-+0-9.eE]+|nan|NaN|inf")

Row = Mapping[str, Any]


def read_jsonl(paths: Sequence[Path], options: Options, findings: Findings) -> Generator[TokenDocument, None, None]:
    """Documents of JSON lines, one object per row."""
    yield from _read(find(paths), _json_rows, options, findings)


def read_csv(paths: Sequence[Path], options: Options, findings: Findings) -> Generator[TokenDocument, None, None]:
    """Documents of CSV with a header; a list in a cell is numbers with any separators."""
    yield from _read(find(paths), _csv_rows, options, findings)


def read_parquet(paths: Sequence[Path], options: Options, findings: Findings) -> Generator[TokenDocument, None, None]:
    """Documents of Parquet files, their row groups read one at a time."""
    given = options.fields.values()
    yield from _read(find(paths, "*.parquet"), lambda path: parquet_rows(path, given), options, findings)


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    for place, line in lines(path, MAX_EVENT_BYTES):
        yield place, decode(line, dict[str, Any], place)


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    place, names, rows = table(path)
    if len(set(names)) != len(names) or not names:
        raise ImportMalformed(place, "is not a header: a column occurs twice, or there is none")
    for place, cells in rows:
        if len(cells) != len(names):
            raise ImportMalformed(place, f"has {len(cells)} cells, expected {len(names)}")
        yield place, dict(zip(names, cells, strict=True))


def parquet_rows(path: Path, wanted: Iterable[str] = ()) -> Iterator[tuple[str, Row]]:
    """Place and values of each row of a Parquet file, for the columns that importers know or that are wanted."""
    known = sorted({name for names in NAMES.values() for name in names} | set(wanted))
    command = [sys.executable, "-P", parquet_probe.__file__, str(path), str(MAX_PARQUET_BYTES), str(BATCH_ROWS), *known]
    probe = subprocess.run(command, capture_output=True, check=False)
    if probe.returncode:
        message = " ".join(probe.stderr.decode(errors="replace").split())[-300:]
        reason = message or f"the decoder ended with {probe.returncode}"
        raise ImportMalformed(path, f"cannot be decoded as Parquet within {MAX_PARQUET_BYTES:,} bytes: {reason}")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            columns = [name for name in file.schema_arrow.names if name in known]
            index = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    yield f"{path}, row {index}", row
                    index += 1
    except (OSError, ValueError, KeyError, TypeError, OverflowError, pa.ArrowException) as error:
        raise ImportMalformed(path, f"cannot be read as Parquet: {str(error)[:200]}") from None


def _read(
    paths: list[Path],
    read_rows: Callable[[Path], Iterator[tuple[str, Row]]],
    options: Options,
    findings: Findings,
) -> Generator[TokenDocument, None, None]:
    """One table after the other; documents do not span files."""
    for path in paths:
        table = read_rows(path)
        first = next(table, None)
        if first is None:
            raise ImportMalformed(path, "holds no row")
        columns = find_columns(first[0], first[1], options, findings)
        yield from read_events(path, chain([first], table), columns, options, findings)


@dataclass(frozen=True)
class Columns:
    """Name of the column for each content; empty if there is none."""

    experts: str = ""
    expert: str = ""
    weights: str = ""
    weight: str = ""
    logits: str = ""
    token: str = ""
    token_id: str = ""
    layer: str = ""
    slot: str = ""
    document: str = ""
    domain: str = ""
    phase: str = ""


def find_columns(place: str, row: Row, options: Options, findings: Findings) -> Columns:
    """Find the columns by their known names.

    Raises:
        ImportIncomplete: No column holds the experts, the layer or the token.
    """
    columns: dict[str, str] = {}
    for content, names in NAMES.items():
        present = [name for name in names if name in row]
        if (given := options.fields.get(content)) is not None:
            if given not in row:
                problem = f"has no column {given!r} for {content}"
                raise ImportIncomplete(place, problem, f"it has {', '.join(row)[:200]}")
            present = [given]
        if present:
            columns[content] = present[0]
        if len(present) > 1:
            findings.warn(f"{content} was read from {present[0]!r}; also present: {', '.join(map(repr, present[1:]))}")
    if "experts" in columns and not isinstance(row[columns["experts"]], list | str):
        columns.setdefault("expert", columns["experts"])  # long form under the name of a list
        del columns["experts"]
    for content in ("expert", "layer", "token"):
        if content not in columns and not (content == "expert" and "experts" in columns):
            raise ImportIncomplete(
                place,
                f"has no column for {content}: none of {', '.join(NAMES[content])}",
                f"give it with --field {content}=NAME; the columns are {', '.join(row)[:200]}",
            )
    for content in ("expert", "weight", "slot") if "experts" in columns else ("weights",):
        columns.pop(content, None)
    if "document" not in columns:
        findings.warn("no column separates documents: each file was taken to be one; --field document=NAME names it")
    return Columns(**columns)


def read_events(
    path: Path,
    table: Iterable[tuple[str, Row]],
    columns: Columns,
    options: Options,
    findings: Findings,
    model: ModelFacts = NO_MODEL,
) -> Generator[TokenDocument, None, None]:
    """Gather the rows of a table into documents."""
    documents = DocumentNumbers()
    weights = bool(columns.weights or columns.weight)
    events = _events(path, table, columns, documents, options, findings)
    yield from gather(batches(events), documents, Meaning(weights, ranked=False, model=model), findings)


def _events(
    path: Path,
    table: Iterable[tuple[str, Row]],
    columns: Columns,
    documents: DocumentNumbers,
    options: Options,
    findings: Findings,
) -> Iterator[Event]:
    default = options.domain or stem(path)
    unslotted: dict[tuple[int, int, int], int] = {}
    last = (-1, -1, -1)
    for place, row in table:
        token = number(row.get(columns.token), place, columns.token, high=2**40)
        layer = number(row.get(columns.layer), place, columns.layer, high=65535)
        domain = default if options.domain or not columns.domain else _label(row.get(columns.domain), place)
        key = _label(row.get(columns.document), place) if columns.document else ""
        document = documents.number((domain, key), domain, f"{path}, document {key[:60]}" if key else str(path))
        token_id = UNKNOWN if not columns.token_id else number(row.get(columns.token_id), place, columns.token_id)
        phase = UNKNOWN if not columns.phase else _phase(row.get(columns.phase), place)
        if columns.logits:
            _check_logits(row.get(columns.logits), place, findings)
        if columns.experts:
            experts = _list(row.get(columns.experts), place, columns.experts)
            if not 1 <= len(experts) <= MAX_CHOICES:
                raise ImportMalformed(
                    place, f"{columns.experts}: has {len(experts)} experts, expected 1 to {MAX_CHOICES}"
                )
            weights: Sequence[Any] = ()
            if columns.weights:
                weights = _list(row.get(columns.weights), place, columns.weights)
                if len(weights) != len(experts):
                    raise ImportMalformed(
                        place, f"{columns.weights}: has {len(weights)} weights for {len(experts)} experts"
                    )
            for slot, expert in enumerate(experts):
                chosen = number(expert, place, columns.experts, low=-1, high=65535)
                weight = real(weights[slot], place, columns.weights) if weights else math.nan
                yield document, token, layer, slot, chosen, weight, token_id, phase
            continue
        if columns.slot:
            slot = number(row.get(columns.slot), place, columns.slot, high=MAX_CHOICES)
        else:  # rows of a token in a layer are adjacent
            cell = (document, token, layer)
            slot = unslotted.get(cell, -1) + 1
            if slot >= MAX_CHOICES:
                raise ImportMalformed(place, f"is choice number {slot + 1} of its token and layer")
            if cell != last:
                unslotted.clear()
                last = cell
            unslotted[cell] = slot
        weight = real(row.get(columns.weight), place, columns.weight) if columns.weight else math.nan
        chosen = number(row.get(columns.expert), place, columns.expert, low=-1, high=65535)
        yield document, token, layer, slot, chosen, weight, token_id, phase


def _label(value: Any, place: str) -> str:
    if type(value) is str and len(value) <= 1000:
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float) or len(str(value)) > 1000:
        raise ImportMalformed(place, f"has {str(value)[:40]!r} as the name of a document or domain")
    return str(value)


def _phase(value: Any, place: str) -> int:
    code = PHASE_WORDS.get(str(value).strip().lower()[:20])
    if code is None:
        raise ImportMalformed(place, f"has phase {str(value)[:40]!r}, expected prefill or decode")
    return code


def _list(value: Any, place: str, what: str) -> Sequence[Any]:
    """A list, or the numbers in a text cell."""
    if isinstance(value, list):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if isinstance(value, str):
        return _NUMBER.findall(value)
    raise ImportMalformed(place, f"{what}: expected a list, found {json.dumps(value, default=str)[:40]}")


def _check_logits(value: Any, place: str, findings: Findings) -> None:
    """Values called logits that are non-negative and sum to 1 are probabilities."""
    numbers = [real(item, place, "logits") for item in _list(value, place, "logits")]
    if len(numbers) > 1 and min(numbers) >= 0 and abs(sum(numbers) - 1) < 1e-3:
        findings.count("rows have logits that sum to 1, which are probabilities; they were left out")
    else:
        findings.warn("router logits were left out: a trace holds gate weights as executed")
