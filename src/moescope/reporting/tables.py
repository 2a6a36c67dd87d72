"""Tables as people read them: cells of text in rows, sections and columns, built once and printed in any format.

Shares are in per cent, divergences in bits; ``±`` is the larger side of a 95 % interval clustered by document. The same
values unrounded are the table's `frame`, which is what CSV and JSON hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import pandas as pd

from moescope.reporting.visible import visible

K = TypeVar("K")
C = TypeVar("C")

SIGNIFICANT = 0.05
"""False discovery rate below which a value is marked."""


class Cell(NamedTuple):
    """What one cell says.

    Attributes:
        value: The number, rounded.
        spread: Half of its interval with its sign, such as ``±0.8``; empty if there is none.
        mark: ``*`` beside a value that differs from its null.
    """

    value: str
    spread: str = ""
    mark: str = ""


class Row(NamedTuple):
    """A label and its cells, one a column."""

    label: str
    cells: tuple[Cell, ...]


def grid(keys: Iterable[K], columns: Collection[C], cell: Callable[[K, C], Cell]) -> tuple[Row, ...]:
    """A row a key, which is its label, and in it a cell a column."""
    return tuple(Row(visible(str(key)), tuple(cell(key, column) for column in columns)) for key in keys)


@dataclass(frozen=True)
class Section:
    """Rows under a common title; the title may be empty. The note, a sentence or two, stands between them."""

    title: str
    rows: tuple[Row, ...]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table to print.

    Attributes:
        name: File name without ending.
        title: What is counted, and the unit.
        stub: Heading of the labels of rows.
        columns: Headings of the columns.
        sections: The rows.
        groups: Headings that span columns, with the number of columns each spans; may be empty.
        notes: What a reader needs to know.
        frame: The values, tidy and unrounded.
    """

    name: str
    title: str
    stub: str
    columns: tuple[str, ...]
    sections: tuple[Section, ...]
    groups: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    frame: pd.DataFrame = field(default_factory=pd.DataFrame)
