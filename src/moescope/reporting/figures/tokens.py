"""Figure 8: text on the colours of the first-choice experts, a column a layer, a row of panels a document."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from rich.cells import cell_len

from moescope.reporting.colours import INK, MUTED, NO_EXPERT_LIGHT, PAPER, RULE, expert_colours
from moescope.reporting.documents import RoutedDocument
from moescope.reporting.figures import style
from moescope.reporting.figures.style import FULL_WIDTH, LONGEST_NAME
from moescope.reporting.layout import LINE_BREAK, Segment, lay_out
from moescope.reporting.visible import shorten
from moescope.trace import Layer

FONT = "DejaVu Sans Mono"  # comes with matplotlib: the same columns everywhere
SIZE = 5.6  # points
CHARACTER = 0.60205 * SIZE / 72  # inches; 0.60205 em is the advance of every character of this font
LINE = 1.42 * SIZE / 72  # inches from line to line
MOST_LINES = 16
LINES_BEFORE = 2
GAP = 0.14  # inches between columns
MISSING_GLYPH = "□"


def draw_tokens(documents: Sequence[RoutedDocument], layers: Sequence[Layer], words: Sequence[str] = ()) -> Figure:
    """Figure 8, a column a layer: a few lines of each document from before the first of the words, or its start."""
    column = (FULL_WIDTH - 0.04 - GAP * (len(layers) - 1)) / len(layers)
    width = max(2, int(column / CHARACTER))
    font = font_manager.get_font(font_manager.findfont(FONT))
    with style.style():
        shown = [_excerpt(document, width, font, words) for document in documents]
        few = max((layer.num_ids for layer in layers), default=0) <= 16
        top = 0.26 + (0.2 if few else 0.0)
        heights = [len(lines) * LINE + 0.19 for lines in shown]
        height = top + sum(heights) + 0.12 * (len(shown) - 1) + 0.04
        figure = style.new_figure(FULL_WIDTH, height)
        for place, layer in enumerate(layers):
            left = 0.02 + place * (column + GAP)
            figure.text(left / FULL_WIDTH, 1 - (top - 0.06) / height, f"Layer {layer.layer}", weight="bold", fontsize=8)
            edge = top
            for document, lines, panel in zip(documents, shown, heights, strict=True):
                box = (left / FULL_WIDTH, 1 - (edge + panel) / height, column / FULL_WIDTH, (panel - 0.15) / height)
                _draw_lines(figure.add_axes(box), lines, document, layer, column)
                if place == 0:
                    title = f"{shorten(document.domain, LONGEST_NAME)}, document {document.number}"
                    figure.text(left / FULL_WIDTH, 1 - (edge + 0.1) / height, title, fontsize=6.5, color=MUTED)
                edge += panel + 0.12
        if few:
            _draw_legend(figure, max(layers, key=lambda layer: layer.num_experts))
    return figure


def _excerpt(document: RoutedDocument, width: int, font: FT2Font, words: Sequence[str]) -> list[list[Segment]]:
    """A few lines of the document, every character of which the font has, in one column."""
    lines = lay_out(document.texts, width)
    token = min(document.find(words), default=0)
    start = next((number for number, line in enumerate(lines) if line and line[-1].token >= token), 0)
    start = max(0, min(start - LINES_BEFORE, len(lines) - MOST_LINES))
    return [
        [Segment(_in_font(segment.text, font), segment.token) for segment in line]
        for line in lines[start : start + MOST_LINES]
    ]


def _in_font(text: str, font: FT2Font) -> str:
    text = text.replace(LINE_BREAK, " ")
    if text.isascii():
        return text
    shown = ""
    for character in unicodedata.normalize("NFC", text):
        known = font.get_char_index(ord(character)) and cell_len(character) == 1
        shown += character if known else MISSING_GLYPH
    return shown


def _draw_lines(axes: Axes, lines: list[list[Segment]], document: RoutedDocument, layer: Layer, column: float) -> None:
    colours = expert_colours(layer.num_experts)
    first = document.expert_ids[layer.layer][:, 0].tolist()
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    for row, line in enumerate(lines):
        x = 0
        for segment in line:
            end = x + len(segment.text)
            expert = first[segment.token]
            colour = colours[expert] if 0 <= expert < layer.num_experts else NO_EXPERT_LIGHT
            boxes.setdefault(colour, []).append((x, row, end, row + 1))
            x = end
        text = "".join(segment.text for segment in line).rstrip()
        if text:
            axes.text(0, row + 0.74, text, family=FONT, fontsize=SIZE, color=INK, va="baseline")
    for colour, rectangles in boxes.items():
        style.add_rectangles(axes, np.array(rectangles), facecolor=colour, edgecolor=PAPER, linewidth=0.25)
    axes.set_xlim(0, column / CHARACTER)
    axes.set_ylim(max(len(lines), 1), 0)
    axes.set_axis_off()


def _draw_legend(figure: Figure, layer: Layer) -> None:
    height = figure.get_size_inches()[1]
    size, y = 0.14, 1 - 0.17 / height
    figure.text(0.02 / FULL_WIDTH, y + 0.035 / height, "First choice: expert", fontsize=7, color=INK)
    axes = figure.add_axes((1.06 / FULL_WIDTH, y, size * layer.num_experts / FULL_WIDTH, size / height))
    for expert, colour in enumerate(expert_colours(layer.num_experts)):
        box = np.array([(expert, 0.0, expert + 1, 1.0)])
        style.add_rectangles(axes, box, facecolor=colour, edgecolor=RULE, linewidth=0.4)
        axes.text(expert + 0.5, 0.47, str(expert), fontsize=6.5, ha="center", va="center", color=INK)
    axes.set_xlim(0, layer.num_experts)
    axes.set_ylim(0, 1)
    axes.set_axis_off()
