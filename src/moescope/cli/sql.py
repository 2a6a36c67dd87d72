"""``moescope sql``: a query over a trace, or, without one, what there is to query."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import math
from collections.abc import Iterator, Sequence
from itertools import count as count_from
from pathlib import Path
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from moescope.reporting.numbers import MISSING, count
from moescope.reporting.options import format_option_for, trace_argument
from moescope.reporting.printing import print_styled, say, write
from moescope.reporting.visible import visible

MOST_ROWS = 1000
"""Rows that are shown as text; CSV and JSON hold all."""


@click.command()
@trace_argument
@click.argument("query", required=False)
@format_option_for("text", "csv", "json")
def command(trace: Path, query: str | None, format: str) -> None:
    """Query a trace in SQL.

    Views: tokens (a row a token, a column a layer and rank), choices (a row a token, layer and rank), vocabulary.
    Without QUERY, shows their columns and two examples. DuckDB answers; it can read the trace and nothing else.

    \b
    Example:
      moescope sql pile.moe "SELECT domain, L15_0 AS expert, count(*) FROM tokens GROUP BY ALL"
    """
    from moescope.exporting.database import answer, examples, schema
    from moescope.trace import open_trace

    opened = open_trace(trace)
    if query is None:
        columns = schema(opened)
        _write(
            ["view", "column", "type", "meaning"],
            iter([[(column.view, column.name, column.type, column.meaning) for column in columns]]),
            format,
        )
        if format == "text":
            say("\nExamples:")
            for example in examples(opened):
                say(f"  {example}")
        return
    try:
        with answer(opened, query) as result:
            _write(result.names, result.batches, format)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'QUERY'") from error


def _write(names: Sequence[str], batches: Iterator[list[tuple[Any, ...]]], format: str) -> None:
    """Print rows as they come; as text, the first of them once their widths are known."""
    if format == "csv":
        writer = csv.writer(_Stdout(), lineterminator="\n")
        writer.writerow(names)
        for rows in batches:
            writer.writerows([_plain(value) for value in row] for row in rows)
    elif format == "json":
        _write_json(names, batches)
    else:
        _print(names, batches)


class _Stdout:
    """What `csv` writes to."""

    write = staticmethod(write)


def _write_json(names: Sequence[str], batches: Iterator[list[tuple[Any, ...]]]) -> None:
    names = _distinct(names)
    separator = "[\n "
    for rows in batches:
        for row in rows:
            values = dict(zip(names, map(_plain, row), strict=True))
            write(separator + json.dumps(values, ensure_ascii=False, allow_nan=False))
            separator = ",\n "
    write("[]\n" if separator == "[\n " else "\n]\n")


def _distinct(names: Sequence[str]) -> list[str]:
    """The names of the columns, each later one of a name numbered, so that an object of them loses none.

    Example:
        >>> _distinct(["n", "n", "n_2", "n"])
        ['n', 'n_3', 'n_2', 'n_4']
    """
    taken, distinct = set(names), []
    for place, name in enumerate(names):
        if name in names[:place]:
            name = next(new for number in count_from(2) if (new := f"{name}_{number}") not in taken)
            taken.add(name)
        distinct.append(name)
    return distinct


def _print(names: Sequence[str], batches: Iterator[list[tuple[Any, ...]]]) -> None:
    table: list[tuple[Any, ...]] = []
    for rows in batches:
        table += rows
        if len(table) > MOST_ROWS:
            break
    console = Console(highlight=False)
    shown = [[MISSING if value is None else visible(_short(value)) for value in row] for row in table[:MOST_ROWS]]
    number = int | float | decimal.Decimal | None
    numeric = [all(isinstance(row[column], number) for row in table) for column in range(len(names))]
    heading = [visible(name) for name in names]
    widths = [max(map(cell_len, column)) for column in zip(heading, *shown, strict=True)]
    for line, row in enumerate([heading, *shown]):
        cells = [
            " " * (width - cell_len(cell)) + cell if right else cell + " " * (width - cell_len(cell))
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        print_styled(console, Text("  ".join(cells).rstrip(), "" if line else "bold"))
        if not line:
            print_styled(console, Text("─" * (sum(widths) + 2 * len(widths) - 2), "dim"))
    if len(table) > MOST_ROWS:
        say(f"only the first {count(MOST_ROWS, 'row')} are shown; --format csv writes all", err=True)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(_plain(value))


def _plain(value: Any) -> Any:
    """A value of a result as CSV and JSON hold it: exact numbers, text, lists and objects of them; None for NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return "".join(chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\x{byte:02X}" for byte in value)
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return value if isinstance(value, str | int | bool | None) else str(value)
