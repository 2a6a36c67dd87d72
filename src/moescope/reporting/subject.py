"""What a subject is: how one measure or simulation is asked for and shown, in a report and by a command.

A subject says what it takes from what was counted, which tables and figures show it, where they stand on the page, and
what its command does. It draws and prints nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import xarray as xr

from moescope.reporting.tables import Table
from moescope.tallying import Counted
from moescope.trace import Trace

if TYPE_CHECKING:
    from moescope.simulation.together import Job


@dataclass(frozen=True)
class Chapter:
    """Sections of the page that belong together: the id in the page, the heading, and what they are about."""

    name: str
    title: str
    lead: str


@dataclass(frozen=True)
class PageSection:
    """One question, which one subject answers, or several.

    Attributes:
        chapter: The chapter it stands in.
        name: Its id in the page.
        title: The question.
        short: Its line in the table of contents.
        lead: Why one asks.
    """

    chapter: Chapter
    name: str
    title: str
    short: str
    lead: str


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure, not drawn yet.

    Attributes:
        file: Name of its files, without ending.
        draw: Gives a figure of matplotlib; called only where the extra `report` is installed.
    """

    file: str
    draw: Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class PageFigure(Drawing):
    """A figure of the page with the words around it.

    Attributes:
        name: Its id in the page.
        label: What the paper calls it, or we do.
        title: What it shows.
        caption: What is drawn, with unit and null.
        how: How to read it.
        cannot: What it cannot tell.
        frame: Its CSV twin.
    """

    name: str
    label: str
    title: str
    caption: str
    how: str
    cannot: str
    frame: pd.DataFrame


@dataclass(frozen=True)
class PageTable:
    """A table where it stands on the page.

    Attributes:
        table: The table.
        folded: The line that unfolds it; empty if it is open.
        heading: A heading above; may be empty.
    """

    table: Table
    folded: str = ""
    heading: str = ""

    @classmethod
    def each(cls, tables: Iterable[Table], lines: Mapping[str, str]) -> Iterator[PageTable]:
        """Tables by name, each with the line that unfolds it, in the order of the lines; missing ones are left out."""
        by_name = {table.name: table for table in tables}
        return (cls(by_name[name], folded=line) for name, line in lines.items() if name in by_name)


def where_known(result: xr.Dataset, name: str) -> xr.Dataset | None:
    """The result of a measure; None where the trace does not tell the value anywhere."""
    return result if result[name].notnull().any() else None


Block = PageFigure | PageTable | Table
"""What a subject shows of a result; a bare table is written to ``tables/`` and does not stand on the page."""


@dataclass(frozen=True)
class Recommendation:
    """What to do, in plain words; and the numbers it rests on, with their 95 % intervals, and what it leaves open."""

    advice: str
    evidence: str


@dataclass(frozen=True)
class Results:
    """What a report is made of.

    Attributes:
        trace: The trace.
        layers: Layers that tables and figures with a panel a layer show.
        words: Words that are asked for, without indentation.
        found: The result of each subject by name, of all recorded layers; None where the trace cannot tell.
    """

    trace: Trace
    layers: tuple[int, ...]
    words: tuple[str, ...]
    found: dict[str, Any]

    @property
    def has_text(self) -> bool:
        """Whether words can be found, and have a first choice."""
        return self.trace.header.token_ids and all(layer.ranked for layer in self.trace.layers)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A measure or simulation that is shown.

    Attributes:
        measure: Its result for a report, from the counts and the results of the subjects before it; where there is
            nothing to show None, or NotRecorded raised. None itself for a subject that no report shows.
        play: In place of `measure` for what goes through the trace token by token: a job that gives the result, run
            beside those of other subjects; None where there is nothing to show.
        blocks: Shows a result: its figures and tables in the order of the page.
        section: Where they stand; None if nothing does.
        sentence: What a result says of a layer, in plain words; may be empty.
        advise: What a result recommends.
        command: Its command, made of options of click; its docstring is the help. Its arguments are traces, which it
            gets opened. It yields tables, the first of which holds everything, then drawings.
    """

    measure: Callable[[Counted, Results], Any] | None = None
    play: Callable[[Results], Job | None] | None = None
    blocks: Callable[[Any, Results], Iterator[Block]] | None = None
    section: PageSection | None = None
    sentence: Callable[[Any, int], str] | None = None
    advise: Callable[[Any], Recommendation] | None = None
    command: Callable[..., Iterator[Table | Drawing]] | None = None
