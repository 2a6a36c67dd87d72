"""Tokens set in lines of a fixed number of columns, as a terminal or a figure in a fixed-width font shows them.

Line breaks and indentation are kept, long lines are broken, if possible between tokens. Every token keeps at least
one column, so that its colour can be seen: a line break is ``↵`` at the end of its line, a token that holds only a part
of a character is ``·``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.cells import cell_len, chop_cells

from moescope.reporting.visible import visible

LINE_BREAK = "↵"
PART_OF_CHARACTER = "·"
TAB = "⇥   "


class Segment(NamedTuple):
    """The characters of a token that stand in one line, and the token's index."""

    text: str
    token: int


def lay_out(texts: Sequence[str], width: int) -> list[list[Segment]]:
    """Lines of segments, none wider than `width` columns, of which there are at least 2.

    Example:
        >>> for line in lay_out(["if", " x", ":\\n   ", " go"], 8):
        ...     print([segment.text for segment in line])
        ['if', ' x', ':↵']
        ['   ', ' go']
    """
    if width < 2:
        raise ValueError(f"lines need at least two columns, not {width}")
    lines: list[list[Segment]] = [[]]
    for token, text in enumerate(texts):
        for shown, ends_line in _pieces(text):
            size, used = cell_len(shown), sum(cell_len(segment.text) for segment in lines[-1])
            if used + size > width and lines[-1]:
                lines.append([])
            first, *others = [shown] if size <= width else chop_cells(shown, width)
            lines[-1].append(Segment(first, token))
            lines += [[Segment(part, token)] for part in others]
            if ends_line:
                lines.append([])
    return lines if lines[-1] or len(lines) == 1 else lines[:-1]


def _pieces(text: str) -> Iterable[tuple[str, bool]]:
    """What a token shows on each of its lines, and whether the line ends there."""
    if not text:
        yield PART_OF_CHARACTER, False
        return
    *ended, last = text.split("\n")
    for line in ended:
        yield _shown(line) + LINE_BREAK, True
    if last:
        yield _shown(last), False


def _shown(line: str) -> str:
    return TAB.join(visible(part) for part in line.split("\t"))
