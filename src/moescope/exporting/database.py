"""A trace as SQL tables, queried by DuckDB in place: nothing is copied, and a query has access to nothing else.

Views: ``tokens`` (the parts as they are, one row per token), ``choices`` (in long form, per token, layer and rank) and
``vocabulary``. DuckDB gets them from pyarrow, which verifies each page's checksum; its own access to files, network and
settings is off, so neither a query nor a path in a trace can reach outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as ds

from moescope.errors import require
from moescope.trace import Header, Trace, as_trace
from moescope.trace.columns import Column, columns, token_columns
from moescope.trace.kept_rows import KeptRows
from moescope.trace.verifying import part_problems

if TYPE_CHECKING:
    import pandas as pd

SETTINGS = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
    "lock_configuration": "true",
}

ROWS_AT_A_TIME = 10_000  # Python tuples held at once, a few MB


@dataclass(frozen=True)
class Answer:
    """The result of a query.

    Attributes:
        names: Its columns.
        batches: Its rows, in batches.
    """

    names: tuple[str, ...]
    batches: Iterator[list[tuple[Any, ...]]]


@dataclass(frozen=True)
class ViewColumn:
    """One column of a view.

    Attributes:
        view: Its view.
        name: Its name; for columns that repeat for each layer and rank, the first and the last.
        type: Its SQL type.
        meaning: What it holds.
    """

    view: str
    name: str
    type: str
    meaning: str


def sql(trace: Trace | str | Path, query: str) -> pd.DataFrame:
    """Answer a query in SQL (DuckDB's) over the views ``tokens``, ``choices`` and ``vocabulary`` of a trace.

    A trace of counts has the view ``counts`` instead of the first two.

    Args:
        trace: The trace, or its folder.
        query: One statement; with several, the result is that of the last.
    Raises:
        ValueError: The query is wrong.
        MissingExtra: The extra `sql` is not installed.
        TraceError: The trace is missing or damaged.
    """
    with _ask(trace, query) as result:
        frame: pd.DataFrame = result.df()
    return frame


@contextmanager
def answer(trace: Trace | str | Path, query: str) -> Iterator[Answer]:
    """The result of a query, to be read within the block; arguments and errors as for `sql`."""
    with _ask(trace, query) as result:
        names = tuple(column[0] for column in result.description)
        yield Answer(names, iter(lambda: result.fetchmany(ROWS_AT_A_TIME), []))


@contextmanager
def _ask(trace: Trace | str | Path, query: str) -> Iterator[Any]:
    """DuckDB's result of a query; errors within the block are raised as by `sql`."""
    duckdb = require("duckdb", extra="sql")
    opened = as_trace(trace)
    if any(isinstance(part, KeptRows) for part in opened.parts):
        raise ValueError("sql reads whole files; leave rows out by WHERE, not by `exclude`")
    connection = _connect(duckdb, opened)
    try:
        result = connection.execute(query)
        if result is None or not result.description:
            raise ValueError("the query holds no statement")
        yield result
    except duckdb.Error as error:
        raise ValueError(str(error)) from error
    finally:
        connection.close()


def schema(trace: Trace | str | Path) -> list[ViewColumn]:
    """The columns of the views, with their meaning."""
    opened = as_trace(trace)
    header = opened.header
    vocabulary = [ViewColumn("vocabulary", *row) for row in _VOCABULARY_COLUMNS]
    stored = columns(header)
    listed = [
        ViewColumn(_main_view(header), _span([c.name for c in alike]), _types(alike), meaning)
        for meaning, group in groupby(stored, key=lambda column: column.meaning)
        for alike in [list(group)]
    ]
    if header.counts_only:
        return listed + vocabulary
    chosen = [column for column in stored if column.name in opened.layers[0].expert_columns()]
    choices = [ViewColumn("choices", c.name, _types([c]), c.meaning) for c in stored[: len(token_columns(header))]]
    choices += [
        ViewColumn("choices", "layer", "UINTEGER", "index in the whole model"),
        ViewColumn("choices", "rank", "UINTEGER", "0 is the choice with the largest gate weight"),
        ViewColumn("choices", "expert", "USMALLINT", chosen[0].meaning),
    ]
    if header.weights:
        choices.append(ViewColumn("choices", "weight", "FLOAT", "its gate weight, as executed"))
    return listed + choices + vocabulary


def _main_view(header: Header) -> str:
    return "counts" if header.counts_only else "tokens"


def _types(alike: Iterable[Column]) -> str:
    """What DuckDB calls the types of some columns."""
    return " or ".join(sorted({_DUCKDB_TYPES[column.type] for column in alike}, key=len, reverse=True))


def examples(trace: Trace) -> list[str]:
    """Two queries that this trace can answer."""
    layer = trace.layers[len(trace.layers) // 2]
    if trace.header.counts_only:
        return [
            f"SELECT domain, expert, sum(count) AS n FROM counts WHERE layer = {layer.layer} GROUP BY ALL ORDER BY ALL",
            "SELECT layer, count(DISTINCT expert) AS used FROM counts GROUP BY ALL ORDER BY ALL",
        ]
    return [
        f"SELECT domain, {layer.expert_columns()[0]} AS expert, count(*) AS n FROM tokens GROUP BY ALL ORDER BY ALL",
        f"SELECT text, expert, count(*) AS n FROM choices JOIN vocabulary USING (token_id) "
        f"WHERE layer = {layer.layer} AND rank = 0 GROUP BY ALL ORDER BY n DESC LIMIT 20",
    ]


_VOCABULARY_COLUMNS = (
    ("token_id", "UINTEGER", "vocabulary id"),
    ("text", "VARCHAR", "its text piece; bytes that are not UTF-8 by themselves read U+FFFD"),
    ("bytes", "BLOB", "its exact bytes"),
)
_DUCKDB_TYPES = {
    pa.uint8(): "UTINYINT",
    pa.uint16(): "USMALLINT",
    pa.uint32(): "UINTEGER",
    pa.uint64(): "UBIGINT",
    pa.float32(): "FLOAT",
    pa.string(): "VARCHAR",
}


def _connect(duckdb: Any, trace: Trace) -> Any:
    """An empty database in memory with the views of a trace and nothing else."""
    connection = duckdb.connect(":memory:", config=SETTINGS)
    connection.register(_main_view(trace.header), _rows(trace))
    connection.register("vocabulary", trace.vocabulary.table())
    if not trace.header.counts_only:
        connection.execute(f"CREATE VIEW choices AS {_choices(trace)}")
    return connection


def _rows(trace: Trace) -> ds.Dataset:
    """The parts as one dataset with the columns that the header declares, after a look at every row.

    DuckDB reads the files by itself, so it would answer from rows that no other reader accepts.
    """
    for problem in part_problems(trace.parts, trace.header):
        raise problem
    options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    return ds.dataset(
        [str(part.path.absolute()) for part in trace.parts],
        schema=pa.schema([column.field() for column in columns(trace.header)]),
        format=ds.ParquetFileFormat(default_fragment_scan_options=options),
    )


def _choices(trace: Trace) -> str:
    """The long view: one branch per layer, so that a query about one layer reads only its columns."""
    keys = ", ".join(token_columns(trace.header))
    branches = []
    for layer in trace.layers:
        ranks = ", ".join(map(str, range(layer.top_k)))
        lists = {
            "rank": f"[{ranks}]::UINTEGER[]",
            "expert": f"[{', '.join(layer.expert_columns())}]::USMALLINT[]",
        }
        if trace.header.weights:
            lists["weight"] = f"[{', '.join(layer.weight_columns())}]"
        unnested = ", ".join(f"unnest({values}) AS {name}" for name, values in lists.items())
        branches.append(f"SELECT {keys}, {layer.layer}::UINTEGER AS layer, {unnested} FROM tokens")
    return " UNION ALL ".join(branches)


def _span(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
