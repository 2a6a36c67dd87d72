"""What a report shows, and what stands where on its page: chapters of sections of figures and tables.

Subjects say what they show and in which section, and come in the order of the page. A section without a figure goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moescope.reporting.subject import Chapter, PageFigure, PageSection, PageTable, Recommendation, Results
from moescope.reporting.subjects import SUBJECTS, load
from moescope.reporting.tables import Table

MOST_SENTENCES = 12
"""Layers of which each has a sentence; of more layers only those shown have one."""


@dataclass(frozen=True)
class FilledSection:
    """A section with what its subjects say.

    Attributes:
        about: Its title and lead.
        advice: What its results recommend.
        sentences: What they say of a layer.
        blocks: Figures and tables, in order.
    """

    about: PageSection
    advice: list[Recommendation] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    blocks: list[PageFigure | PageTable] = field(default_factory=list)


@dataclass(frozen=True)
class Contents:
    """What a report shows.

    Attributes:
        figures: All figures.
        tables: All tables by name, whether they stand on the page or not.
        chapters: What stands on the page.
    """

    figures: list[PageFigure]
    tables: dict[str, Table]
    chapters: Mapping[Chapter, list[FilledSection]]


def contents(results: Results) -> Contents:
    """What the subjects show of their results; those that the trace cannot tell show nothing."""
    figures: list[PageFigure] = []
    tables: dict[str, Table] = {}
    sections: dict[PageSection, FilledSection] = {}
    recorded = [layer.layer for layer in results.trace.layers]
    layers = recorded if len(recorded) <= MOST_SENTENCES else results.layers
    for name in SUBJECTS:
        subject, found = load(name), results.found[name]
        if found is None or subject.blocks is None:
            continue
        blocks = list(subject.blocks(found, results))
        figures += [block for block in blocks if isinstance(block, PageFigure)]
        for block in blocks:
            if not isinstance(block, PageFigure):
                table = block.table if isinstance(block, PageTable) else block
                tables[table.name] = table
        if subject.section is not None:
            section = sections.setdefault(subject.section, FilledSection(subject.section))
            section.blocks.extend(block for block in blocks if not isinstance(block, Table))
            if subject.sentence is not None:
                section.sentences.extend(filter(None, (subject.sentence(found, layer) for layer in layers)))
            if subject.advise is not None:
                section.advice.append(subject.advise(found))
    chapters: dict[Chapter, list[FilledSection]] = {}
    for section in sections.values():
        if any(isinstance(block, PageFigure) for block in section.blocks):
            chapters.setdefault(section.about.chapter, []).append(section)
    return Contents(figures, tables, chapters)
