"""Traces of moe-policylang: a header line, then ``p, t, l, e, s`` per line; or Parquet with the same columns.

``p`` is the prompt (a document), ``t`` the token, ``l`` the layer, ``e`` the chosen experts, ``s`` their scores, which
may be missing or null. Older versions write no ``p``; then a trace is one document.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from moescope.errors import ImportIncomplete, ImportMalformed
from moescope.importers.documents import ModelFacts, TokenDocument
from moescope.importers.files import decode, find, lines
from moescope.importers.findings import Findings, Options
from moescope.importers.named import MAX_EVENT_BYTES, Columns, Row, parquet_rows, read_events

_LONG = {
    "p": ("p", "prompt_idx", "prompt"),
    "t": ("t", "token_idx"),
    "l": ("l", "layer_idx", "layer"),
    "e": ("e", "selected_experts", "experts"),
    "s": ("s", "router_scores", "scores"),
}


class _Header(msgspec.Struct):
    model_name: str = ""
    num_layers: int | None = None
    num_experts: int | None = None
    top_k: int | None = None
    num_entries: int | None = None


def read(paths: Sequence[Path], options: Options, findings: Findings) -> Generator[TokenDocument, None, None]:
    """One document per prompt."""
    for path in find(paths):
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        header = _Header()
        table: Iterator[tuple[str, Row]]
        if is_parquet:
            table = parquet_rows(path, {name for names in _LONG.values() for name in names})
        else:
            place, line = next(lines(path, MAX_EVENT_BYTES), (str(path), b""))
            header = decode(line, _Header, place)
            if header == _Header():
                raise ImportMalformed(place, "is not a header with model_name, num_layers, num_experts and top_k")
            table = _entries(path, header)
        first = next(table, None)
        if first is None:
            raise ImportMalformed(path, "holds no entry")
        scores = first[1].get(_name("s", first[1]))
        columns = Columns(
            experts=_needed("e", first),
            weights=_name("s", first[1]) if scores is not None else "",
            token=_needed("t", first),
            layer=_needed("l", first),
            document=_name("p", first[1]),
        )
        model = ModelFacts(header.model_name, header.num_experts, header.top_k, header.num_layers)
        if scores is not None:
            findings.warn("scores were taken as gate weights; the file does not state whether they are those executed")
        yield from read_events(path, chain([first], table), columns, options, findings, model)


def _name(key: str, row: Row) -> str:
    return next((name for name in _LONG[key] if name in row), "")


def _needed(key: str, first: tuple[str, Row]) -> str:
    name = _name(key, first[1])
    if not name:
        raise ImportIncomplete(first[0], f"has no field {key!r}", f"it has {', '.join(first[1])[:200]}")
    return name


def _entries(path: Path, header: _Header) -> Iterator[tuple[str, dict[str, Any]]]:
    entries = 0
    table = lines(path, MAX_EVENT_BYTES)
    next(table)
    for place, line in table:
        yield place, decode(line, dict[str, Any], place)
        entries += 1
    if header.num_entries is not None and header.num_entries != entries:
        raise ImportMalformed(path, f"has {entries} entries, its header says {header.num_entries}", "is it truncated?")
