"""What a report shows, and what stands where on its page: chapters of sections of figures and tables.

Subjects say what they show and in which section, and come in the order of the page. A section without a figure goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from moescope.plugins import guarded, installed_plugins
from moescope.reporting import frames
from moescope.reporting.formats import FORMATS
from moescope.reporting.subject import (
    Block,
    Chapter,
    PageFigure,
    PageSection,
    PageTable,
    Recommendation,
    Results,
    Subject,
)
from moescope.reporting.subjects import load
from moescope.reporting.tables import Table
from moescope.reporting.wording import cover_notes

MOST_SENTENCES = 12
"""Layers of which each has a sentence; of more layers only those shown have one."""


@dataclass(frozen=True)
class FilledSection:
    """A section with what its subjects say: their advice, a sentence or none a layer, figures and tables in order."""

    about: PageSection
    advice: list[Recommendation] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    blocks: list[PageFigure | PageTable] = field(default_factory=list)

    def extend(self, other: FilledSection) -> None:
        """Add what another subject of the section says."""
        self.advice.extend(other.advice)
        self.sentences.extend(other.sentences)
        self.blocks.extend(other.blocks)


@dataclass(frozen=True)
class Contents:
    """What a report shows: all figures, all tables by name, and in chapters what of them stands on the page."""

    figures: list[PageFigure]
    tables: dict[str, Table]
    chapters: Mapping[Chapter, list[FilledSection]]


def contents(results: Results, draw: Callable[[PageFigure], object] = lambda _: None) -> Contents:
    """What the subjects show of their results; those that the trace cannot tell show nothing.

    Args:
        results: The results.
        draw: Called with each figure as soon as its result is there.
    """
    shown = Contents([], {}, {})
    sections: dict[PageSection, FilledSection] = {}
    notes = tuple(cover_notes(results.trace))
    for name in results.found:
        known = len(shown.figures)
        with guarded(name):
            result = results.found[name]
            if result is None or (subject := load(name)).blocks is None:
                continue
            blocks = [_noted(block, notes) for block in subject.blocks(result, results)]
            if name in installed_plugins():
                blocks = _checked(blocks, shown)
            section = _filled(subject, result, blocks, results)
            for block in blocks:
                if isinstance(block, PageFigure):
                    shown.figures.append(block)
                else:
                    table = block.table if isinstance(block, PageTable) else block
                    shown.tables[table.name] = table
            if section is not None:
                sections.setdefault(section.about, FilledSection(section.about)).extend(section)
        for figure in shown.figures[known:]:
            draw(figure)
    chapters: dict[Chapter, list[FilledSection]] = {}
    for section in sections.values():
        if any(isinstance(block, PageFigure) for block in section.blocks):
            chapters.setdefault(section.about.chapter, []).append(section)
    return replace(shown, chapters=chapters)


def _noted(block: Block, notes: tuple[str, ...]) -> Block:
    """The block with notes that belong to all of the trace."""
    if not notes:
        return block
    if isinstance(block, PageFigure):
        return replace(block, caption=" ".join([block.caption, *notes]))
    if isinstance(block, PageTable):
        return replace(block, table=replace(block.table, notes=(*block.table.notes, *notes)))
    return replace(block, notes=(*block.notes, *notes))


def _filled(subject: Subject, result: Any, blocks: list[Block], results: Results) -> FilledSection | None:
    """What a subject adds to its section."""
    if subject.section is None:
        return None
    recorded = [layer.layer for layer in results.trace.layers]
    layers = recorded if len(recorded) <= MOST_SENTENCES else results.layers
    sentences = [] if subject.sentence is None else [subject.sentence(result, layer) for layer in layers]
    return FilledSection(
        subject.section,
        [] if subject.advise is None else [subject.advise(result)],
        [sentence for sentence in sentences if sentence],
        [block for block in blocks if not isinstance(block, Table)],
    )


def _checked(blocks: list[Block], shown: Contents) -> list[Block]:
    """The blocks of another package, drawn and written once, so that what fails fails before the page is made.

    Raises:
        ValueError: A figure or a table has the name of an earlier one.
    """
    names, files = {figure.name for figure in shown.figures}, {figure.file for figure in shown.figures}
    checked: list[Block] = []
    for block in blocks:
        if isinstance(block, PageFigure):
            if block.name in names or block.file in files:
                raise ValueError(f"there is a figure {block.name!r} or a file {block.file!r} already")
            frames.csv(block.frame)
            block = replace(block, draw=partial(lambda figure: figure, block.draw()))
        else:
            table = block.table if isinstance(block, PageTable) else block
            if table.name in shown.tables:
                raise ValueError(f"there is a table {table.name!r} already")
            for write in FORMATS.values():
                write(table)
        checked.append(block)
    return checked
