"""Traces of moe-policylang: a header line, then ``p, t, l, e, s`` a line; or Parquet with the same columns.

``p`` is the prompt (a document), ``t`` the token, ``l`` the layer, ``e`` the chosen experts, ``s`` their scores, which
may be missing or null; an older recorder has no ``p``, and a trace is one document.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from moescope.errors import ImportIncomplete, ImportMalformed
from moescope.importers.documents import ModelShape, TokenDocument
from moescope.importers.files import decode, find, lines
from moescope.importers.findings import Findings, Options
from moescope.importers.named import MAX_EVENT_BYTES, Columns, Row, chain, parquet_rows, read_events

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
    """One document a prompt.

    Raises:
        ForeignTraceError: A file is something else, or has another number of entries than its header says.
    """
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
                raise ImportMalformed(place, "is no header with model_name, num_layers, num_experts and top_k")
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
        model = ModelShape(header.model_name, header.num_experts, header.top_k, header.num_layers)
        if scores is not None:
            findings.warn(
                "the scores are as the recorder calls them; whether they are gate weights as executed is not said"
            )
        yield from read_events(path, chain(first, table), columns, options, findings, model=model)


def _name(what: str, row: Row) -> str:
    return next((name for name in _LONG[what] if name in row), "")


def _needed(what: str, first: tuple[str, Row]) -> str:
    name = _name(what, first[1])
    if not name:
        raise ImportIncomplete(first[0], f"has no field {what!r}", f"it has {', '.join(first[1])[:200]}")
    return name


def _entries(path: Path, header: _Header) -> Iterator[tuple[str, dict[str, Any]]]:
    found = 0
    table = lines(path, MAX_EVENT_BYTES)
    next(table)
    for place, line in table:
        yield place, decode(line, dict[str, Any], place)
        found += 1
    if header.num_entries is not None and header.num_entries != found:
        raise ImportMalformed(path, f"has {found} entries, its header says {header.num_entries}", "is it whole?")
