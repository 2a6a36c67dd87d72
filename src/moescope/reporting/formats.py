"""A table in the formats that commands print and files hold: text for a terminal, CSV, JSON, LaTeX."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise, zip_longest

from rich.cells import cell_len
from rich.text import Text

from moescope.reporting import frames
from moescope.reporting.tables import Cell, Row, Section, Table

GAP = "  "
MOST_IN_LABEL, MOST_IN_CELL = 40, 24
"""Columns of text after which a label, and a cell that holds nothing but words, go on in the next line."""


def render(table: Table, format: str) -> str:
    """The table in one of `FORMATS`, without colour."""
    if format not in FORMATS:
        raise ValueError(f"no format {format!r}; there are {', '.join(FORMATS)}")
    return FORMATS[format](table)


def styled(table: Table, width: int | None = None) -> Text:
    """The table for a terminal: headings bold, intervals and notes dim.

    One without groups of columns that is wider than the terminal is cut into blocks that fit; None cuts nothing.
    """
    blocks = [table] if width is None else _blocks(table, width)
    return Text("\n").join(_block(block) for block in blocks)


def latex(table: Table) -> str:
    """The table as a LaTeX ``tabular`` with booktabs rules; title and notes are comments above it."""
    out = io.StringIO()
    for comment in (table.title, *table.notes, r"needs \usepackage{booktabs}"):
        out.write(f"% {comment}\n")
    width = len(table.columns) + 1
    out.write(f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}\n\\toprule\n")
    if table.groups:
        spans, rules, column = [], [], 2
        for title, size in table.groups:
            spans.append(f"\\multicolumn{{{size}}}{{c}}{{{escape_latex(title)}}}")
            rules += [f"\\cmidrule(lr){{{column}-{column + size - 1}}}"] if title else []
            column += size
        out.write(f" & {' & '.join(spans)} \\\\\n{' '.join(rules)}\n")
    out.write(_latex_row(map(escape_latex, (table.stub, *table.columns))))
    for section in table.sections:
        out.write("\\midrule\n")
        if section.title:
            out.write(f"\\multicolumn{{{width}}}{{l}}{{\\textit{{{escape_latex(section.title)}}}}} \\\\\n")
        if section.note:
            out.write(f"\\multicolumn{{{width}}}{{p{{\\linewidth}}}}{{{escape_latex(section.note)}}} \\\\\n")
        for row in section.rows:
            out.write(_latex_row([escape_latex(row.label), *map(_latex_cell, row.cells)]))
    out.write("\\bottomrule\n\\end{tabular}\n")
    return out.getvalue()


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it reads.

    Example:
        >>> escape_latex("50 % of a_b & ~$x$\\\\input{y}")
        '50 \\\\% of a\\\\_b \\\\& \\\\textasciitilde{}\\\\$x\\\\$\\\\textbackslash{}input\\\\{y\\\\}'
    """
    return "".join(_LATEX.get(character, character) for character in text)


FORMATS: dict[str, Callable[[Table], str]] = {
    "text": lambda table: styled(table).plain,
    "csv": lambda table: frames.csv(table.frame),
    "json": lambda table: frames.json(table.frame),
    "latex": latex,
}
"""A function a format; CSV and JSON hold the table's values."""

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "–": "--",
    "“": "``",
    "”": "''",
    "±": r"$\pm$",
    "−": r"$-$",
    "+": r"$+$",
}


def _blocks(table: Table, width: int) -> list[Table]:
    """The table, or narrower ones that together hold its columns."""
    label_width = _label_width(table)
    starts, used = [0], label_width
    for column, needed in enumerate(_column_widths(table)):
        if used + len(GAP) + needed > width and column > starts[-1]:
            starts.append(column)
            used = label_width
        used += len(GAP) + needed
    if len(starts) == 1 or table.groups:
        return [table]
    cuts = [slice(a, b) for a, b in pairwise([*starts, len(table.columns)])]
    return [
        replace(
            table,
            title=table.title if number == 0 else f"{table.title} (continued)",
            columns=table.columns[cut],
            sections=tuple(
                Section(
                    section.title,
                    tuple(Row(row.label, row.cells[cut]) for row in section.rows),
                    section.note if number == 0 else "",
                )
                for section in table.sections
            ),
            notes=table.notes if number == len(cuts) - 1 else (),
        )
        for number, cut in enumerate(cuts)
    ]


def _block(table: Table) -> Text:
    out = Text()
    label_width = _label_width(table)
    widths = _column_widths(table)
    out.append(f"{table.title}\n\n", "bold")
    if table.groups:
        out.append((" " * label_width + GAP + GAP.join(_spans(table, widths))).rstrip() + "\n", "dim")
    headings = [_wrap(heading, width) for heading, width in zip(table.columns, widths, strict=True)]
    depth = max((len(lines) for lines in headings), default=1)
    for line in range(depth):
        label = table.stub if line == depth - 1 else ""
        cells = [_fit(lines[line - depth + len(lines)] if line >= depth - len(lines) else "", width)
                 for lines, width in zip(headings, widths, strict=True)]  # fmt: skip
        out.append(GAP.join([_pad(label, label_width), *cells]).rstrip() + "\n", "bold")
    out.append("─" * (label_width + sum(width + len(GAP) for width in widths)) + "\n", "dim")
    value_widths, spread_widths = _parts(table)
    for number, section in enumerate(table.sections):
        if number:
            out.append("\n")
        if section.title:
            out.append(f"{section.title}\n", "italic")
        for text_line in _wrap(section.note, max(label_width + sum(width + len(GAP) for width in widths), 60)):
            out.append(f"{text_line}\n" if text_line else "", "dim")
        for row in section.rows:
            for beginning, in_line in _lines(row):
                line_text = Text(_pad(beginning, label_width))
                for cell, width, left, right in zip(in_line, widths, value_widths, spread_widths, strict=True):
                    line_text.append(GAP + " " * (width - left - right) + _fit(cell.value, left - cell_len(cell.mark)))
                    line_text.append(cell.mark)
                    line_text.append(_pad(cell.spread, right), "dim")
                line_text.rstrip()
                out.append_text(line_text).append("\n")
    for note in table.notes:
        out.append(f"\n{note}", "dim")
    out.append("\n" if table.notes else "")
    return out


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\" + "\n"


def _latex_cell(cell: Cell) -> str:
    mark = f"\\rlap{{{cell.mark}}}" if cell.mark else ""
    half = f" {{\\scriptsize {escape_latex(cell.spread)}}}" if cell.spread else ""
    return f"{escape_latex(cell.value)}{mark}{half}"


def _label_width(table: Table) -> int:
    labels = [table.stub, *(row.label for section in table.sections for row in section.rows)]
    return max(cell_len(line) for label in labels for line in _wrap(label, MOST_IN_LABEL))


def _lines(row: Row) -> Iterator[Row]:
    """The row, or several where its label or a cell of words is long."""
    label = _wrap(row.label, MOST_IN_LABEL)
    cells = [
        [cell] if cell.mark or cell.spread else [Cell(line) for line in _wrap(cell.value, MOST_IN_CELL)]
        for cell in row.cells
    ]
    for beginning, *in_line in zip_longest(map(Cell, label), *cells, fillvalue=Cell("")):
        yield Row(beginning.value, tuple(in_line))


def _parts(table: Table) -> tuple[list[int], list[int]]:
    """Width of the values and of the intervals, by column."""
    values, spreads = [1] * len(table.columns), [0] * len(table.columns)
    for section in table.sections:
        for row in (line for whole in section.rows for line in _lines(whole)):
            for column, cell in enumerate(row.cells):
                values[column] = max(values[column], cell_len(cell.value + cell.mark))
                spreads[column] = max(spreads[column], cell_len(cell.spread))
    return values, spreads


def _column_widths(table: Table) -> list[int]:
    """Columns as wide as their cells and the longest word above them; a group's title widens its last column."""
    widths = [
        max(value + half, *(cell_len(word) for word in heading.split() or [""]))
        for heading, value, half in zip(table.columns, *_parts(table), strict=True)
    ]
    start = 0
    for title, size in table.groups:
        span = sum(widths[start : start + size]) + len(GAP) * (size - 1)
        widths[start + size - 1] += max(0, cell_len(title) - span)
        start += size
    return widths


def _spans(table: Table, widths: list[int]) -> list[str]:
    spans, start = [], 0
    for title, size in table.groups:
        width = sum(widths[start : start + size]) + len(GAP) * (size - 1)
        left = (width - cell_len(title)) // 2
        dashes = "─" * max(left - 1, 0), "─" * max(width - cell_len(title) - left - 1, 0)
        spans.append(f"{dashes[0]} {title} {dashes[1]}"[:width] if title and left > 1 else _fit(title, width))
        start += size
    return spans


def _wrap(heading: str, width: int) -> list[str]:
    """The words of a heading in lines no wider than the column."""
    lines = [""]
    for word in heading.split():
        if lines[-1] and cell_len(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _fit(text: str, width: int) -> str:
    return " " * (width - cell_len(text)) + text


def _pad(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))
