"""Tables with named columns, as many loggers write them: JSON lines, CSV or Parquet; one row per token and layer.

A row holds a token's experts of a layer as a list or, in long form, a single expert. Names are looked up among those
that loggers use (`NAMES`), or given. A document is identified by domain and document field, or else by its file. Files
that differ in the number of a layer in their names hold one recording, a layer each.
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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moescope.errors import ImportIncomplete, ImportMalformed, ImportTooLarge
from moescope.importers import parquet_probe
from moescope.importers.documents import NO_MODEL, CountedDocument, ModelFacts, TokenDocument, integers
from moescope.importers.events import MAX_DOCUMENTS, UNKNOWN, DocumentNumbers, Event, Meaning, batches, gather
from moescope.importers.files import decode, find, lines, number, plain, real, stem, table
from moescope.importers.findings import Findings, Options

NAMES: Mapping[str, tuple[str, ...]] = {
    content: tuple(names.split())
    for content, names in {
        "experts": "experts selected_experts expert_ids topk_experts topk_ids top_experts expert_indices indices",
        "expert": "expert expert_id expert_idx",
        "weights": "weights gating_probs gate_weights routing_weights topk_weights selected_probs scores probs",
        "weight": "weight gating_prob gate_weight routing_weight prob score",
        "logits": "router_logits logits",
        "token": "token_idx token_index token_pos token_position position pos token",
        "token_id": "token_id input_id",
        "layer": "layer layer_idx layer_id layer_index",
        "slot": "slot rank topk_rank expert_rank",
        "document": "document problem_id document_id doc_id sequence_id seq_id request_id req_id prompt_idx sample_id",
        "domain": "domain dataset dataset_source category",
        "cluster": "cluster",
        "phase": "phase is_decode",
        "count": "count counts tokens_per_expert",
    }.items()
}
"""Names of a field in files, in order of preference."""

PHASE_WORDS = {"prefill": 0, "prompt": 0, "decode": 1, "generation": 1, "0": 0, "1": 1, "false": 0, "true": 1}
MAX_EVENT_BYTES = 1 << 20  # a row has the choices of one token in one layer, and perhaps its logits
MAX_CHOICES = 1024  # far beyond any top-k
BATCH_ROWS = 1 << 12  # of Parquet at a time; few, because they become Python objects
MAX_PARQUET_BYTES = 3 << 29
"""Memory in which a Parquet file must be decodable: 1.6 GB, of the 2 GB of an import."""

FACTS: Mapping[str, tuple[str, ...]] = {
    fact: tuple(names.split())
    for fact, names in {
        "name": "model model_id model_name",
        "num_experts": "num_experts n_experts n_expert num_local_experts n_routed_experts",
        "top_k": "top_k topk num_experts_per_tok n_expert_used",
        "num_layers": "num_layers n_layers n_layer num_hidden_layers",
    }.items()
}
"""What a header line says of the model, by names of its fields."""

_FROM_FILE = {"layer": "it was read from the name of each file", "token": "rows were taken to be tokens in order"}

MOST_HEADERS = 16
"""Lines before the first row of routing."""

_LAYER_IN_NAME = re.compile(r"layer[-_. ]?(\d{1,5})", re.IGNORECASE)
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


def read_counts(paths: Sequence[Path], options: Options, findings: Findings) -> Generator[CountedDocument, None, None]:
    """Documents of counts: a row is a layer and an expert, counted once or as a column says, or a layer and a list."""
    for path in find(paths):
        start = next(plain(path), b"")
        if start.startswith(b"PAR1"):
            rows = parquet_rows(path, options.fields.values())
        else:
            rows = _json_rows(path) if start.lstrip()[:1] == b"{" else _csv_rows(path)
        yield from _counted(_opened(path, rows, options, findings, needed=("expert", "layer")), options)


def _read(
    paths: list[Path],
    read_rows: Callable[[Path], Iterator[tuple[str, Row]]],
    options: Options,
    findings: Findings,
) -> Generator[TokenDocument, None, None]:
    """One recording after the other; documents do not span them."""
    for name, files in recordings(paths):
        tables = (_opened(path, read_rows(path), options, findings, layer) for path, layer in files.items())
        yield from _gathered(next(tables), tables, name, options, findings)


def recordings(paths: Iterable[Path]) -> list[tuple[str, dict[Path, int | None]]]:
    """Files that are read together: those that differ in the number of a layer in their names; any other alone.

    Returns:
        A label of each, and its files with the numbers of layers in their names, None where there is none.

    Example:
        >>> [(name, list(files.values())) for name, files in recordings(map(Path, ["x/layer_2.csv", "x/layer_4.csv"]))]
        [('x', [2, 4])]
    """
    groups: dict[tuple[object, ...], dict[Path, int | None]] = {}
    for path in paths:
        found = _LAYER_IN_NAME.search(path.name)
        rest = (path.parent, path.name[: found.start()], path.name[found.end() :]) if found else (path,)
        layer = int(found[1]) if found else None
        group = groups.setdefault(rest, {})
        if layer in group.values():
            group = groups[path, layer] = {}  # layer1 and layer01: not one recording
        group[path] = layer
    return [
        (stem(path) if len(files) == 1 else _common(path), files)
        for files in groups.values()
        for path in list(files)[:1]
    ]


def _common(path: Path) -> str:
    """What the names of files of layers have in common; the folder's name, if that is nothing."""
    name = stem(path.with_name(_LAYER_IN_NAME.sub("", path.name, count=1) or path.name)).strip("-_ ")
    return name if name and not name.startswith(".") and name not in path.suffixes else stem(path.absolute().parent)


@dataclass(frozen=True)
class _LogFile:
    """The rows of a file.

    Attributes:
        rows: Place and values of each row of routing.
        model: What header lines say.
        layer: The layer that its name says.
    """

    path: Path
    columns: Columns
    rows: Iterable[tuple[str, Row]]
    model: ModelFacts = NO_MODEL
    layer: int | None = None


def _opened(
    path: Path,
    rows: Iterator[tuple[str, Row]],
    options: Options,
    findings: Findings,
    layer: int | None = None,
    needed: Sequence[str] = ("expert", "layer", "token"),
) -> _LogFile:
    """The table of a file: its header lines are read, its columns known, and lines of another type left out."""
    model, headers = NO_MODEL, list[tuple[str, Row]]()
    routing = {*NAMES["experts"], *NAMES["expert"], *NAMES["count"], *options.fields.values()}
    for place, row in rows:
        facts = None if routing & set(row) else _facts(row, place)
        if routing & set(row) or len(headers) == MOST_HEADERS or not (facts or isinstance(row.get("type"), str)):
            break
        model = facts or model
        headers.append((place, row))
    else:
        if not headers:
            raise ImportMalformed(path, "holds no row")
        place, row = headers[0]  # to say what it lacks
    columns = find_columns(place, row, options, findings, needed, layer)
    kind = row.get("type")

    def of_routing() -> Iterator[tuple[str, Row]]:
        for where, cells in chain([(place, row)], rows):
            if kind != cells.get("type") and (columns.experts or columns.expert or columns.count) not in cells:
                findings.count("lines of another type than the first of routing were left out")
            else:
                yield where, cells

    return _LogFile(path, columns, of_routing(), model, layer)


def _facts(row: Row, place: str) -> ModelFacts | None:
    """What a header line says of the model; None if it says nothing."""
    found: dict[str, Any] = {}
    for fact, names in FACTS.items():
        name = next((name for name in names if row.get(name) is not None), None)
        if name is not None:
            found[fact] = str(row[name]) if fact == "name" else number(row[name], place, name, low=1, high=2**16)
    return ModelFacts(**found) if found else None


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
    cluster: str = ""
    phase: str = ""
    count: str = ""


def find_columns(
    place: str, row: Row, options: Options, findings: Findings, needed: Sequence[str], layer: int | None = None
) -> Columns:
    """Find the columns by their known names.

    Args:
        needed: What there must be a column for.
        layer: The layer that the name of the file says. Where no column does, rows may be tokens in order.
    Raises:
        ImportIncomplete: There is no column for something that is needed.
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
    by_name = layer is not None and "layer" not in columns
    for content in needed:
        if content in columns or (content == "expert" and "experts" in columns):
            continue
        if content == "expert" and isinstance(row.get(columns.get("count", "")), list) and "token" not in needed:
            continue  # a list of the counts of all experts
        if by_name and content in ("layer", "token"):
            findings.warn(f"no column for {content}: " + _FROM_FILE[content])
            continue
        only_counts = content == "token" and "experts" not in columns
        raise ImportIncomplete(
            place,
            f"has no column for {content}: none of {', '.join(NAMES[content])}",
            f"give it with --field {content}=NAME; the columns are {', '.join(row)[:200]}"
            + "; or count the rows: moescope import counts" * only_counts,
        )
    for content in ("expert", "weight", "slot") if "experts" in columns else ("weights",):
        columns.pop(content, None)
    if "document" not in columns and "token" in needed and options.document_tokens is None:
        findings.warn(
            "no column separates documents: each file was taken to be one; --field document=NAME names it, "
            "--document-tokens N divides the tokens"
        )
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
    yield from _gathered(_LogFile(path, columns, table, model), (), stem(path), options, findings)


def _gathered(
    table: _LogFile, others: Iterable[_LogFile], name: str, options: Options, findings: Findings
) -> Generator[TokenDocument, None, None]:
    """Gather the rows of a recording's tables into documents."""
    documents = DocumentNumbers()
    weights = bool(table.columns.weights or table.columns.weight)
    events = chain.from_iterable(_events(one, documents, name, options, findings) for one in chain([table], others))
    yield from gather(batches(events), documents, Meaning(weights, ranked=False, model=table.model), findings)


def _events(
    table: _LogFile, documents: DocumentNumbers, name: str, options: Options, findings: Findings
) -> Iterator[Event]:
    path, columns = table.path, table.columns
    default = options.domain or name
    restarts: dict[tuple[object, ...], tuple[int, int]] = {}  # last token and how often its number fell
    unslotted: dict[tuple[int, int, int], int] = {}
    last = (-1, -1, -1)
    for index, (place, row) in enumerate(table.rows):
        token = number(row.get(columns.token), place, columns.token, high=2**40) if columns.token else index
        layer = number(row.get(columns.layer), place, columns.layer, high=65535) if columns.layer else table.layer or 0
        domain = default if options.domain or not columns.domain else _label(row.get(columns.domain), place)
        key = _label(row.get(columns.document), place) if columns.document else ""
        part = 0
        if options.document_tokens is not None:
            part = token // options.document_tokens
        elif options.restarts:
            before, part = restarts.get((domain, key, layer), (-1, 0))
            part += token < before
            restarts[domain, key, layer] = token, part
        label = f"{key[:60]}, {part}" if part else key[:60]
        cluster = _label(row.get(columns.cluster), place) if columns.cluster else None
        where = f"{path}, document {label}" if label else str(path)
        document = documents.number((domain, key, part), domain, where, cluster)
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


def _counted(table: _LogFile, options: Options) -> Generator[CountedDocument, None, None]:
    """The documents of a table of counts, in order of appearance."""
    columns = table.columns
    loads: dict[tuple[str, str], dict[int, NDArray[np.int64]]] = {}
    lists: bool | None = None  # whether rows count all experts of a layer
    for place, row in table.rows:
        layer = number(row.get(columns.layer), place, columns.layer, high=65535)
        domain = options.domain or (_label(row.get(columns.domain), place) if columns.domain else stem(table.path))
        key = _label(row.get(columns.document), place) if columns.document else ""
        of_layer = loads.setdefault((domain, key), {})
        if len(loads) > MAX_DOCUMENTS:
            raise ImportTooLarge(place, f"begins document number {len(loads):,}", "is it read from the right field?")
        value = row.get(columns.count) if columns.count else 1
        if lists not in (None, isinstance(value, list)):
            raise ImportMalformed(place, f"{columns.count}: a list in some rows and a number in others")
        if lists := isinstance(value, list):
            if layer in of_layer:
                raise ImportMalformed(place, f"counts layer {layer} of a document again")
            of_layer[layer] = integers(value, place, columns.count, ndim=1).astype(np.int64)
            continue
        name = columns.experts or columns.expert
        times = number(value, place, columns.count, high=2**40)
        for chosen in _list(row.get(name), place, name) if columns.experts else [row.get(name)]:
            expert = number(chosen, place, name, high=65535)
            counts = of_layer.get(layer, np.zeros(0, np.int64))
            if expert >= len(counts):
                counts = np.append(counts, np.zeros(max(expert + 1, 2 * len(counts)) - len(counts), np.int64))
            counts[expert] += times
            of_layer[layer] = counts
    for (domain, key), by_layer in loads.items():
        where = f"{table.path}, document {key[:60]}" if key else str(table.path)
        yield CountedDocument(where, domain, by_layer, table.model, complete=bool(lists))


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
