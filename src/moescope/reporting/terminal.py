"""Figure 8 in a terminal: a document's tokens on the colours of their first-choice experts, a column a layer.

Without colour the same lines carry, under each token, the id of its expert in each layer. Whatever in the text would
drive the terminal is shown as a symbol (`visible`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from moescope.reporting.colours import INK, NO_EXPERT_LIGHT, expert_colours
from moescope.reporting.documents import RoutedDocument
from moescope.reporting.layout import Segment, lay_out
from moescope.reporting.numbers import MISSING, count
from moescope.reporting.printing import print_styled
from moescope.reporting.visible import visible
from moescope.trace import Layer

GAP = "  "
NARROWEST = 12
"""Columns that a layer's text needs at least; with fewer, the layers stand below each other."""

MOST_EXPERTS_IN_LEGEND = 64


def document_lines(document: RoutedDocument, layers: Sequence[Layer], *, width: int, colour: bool) -> Iterator[Text]:
    """The lines that show a document in so many columns, in colours or else with ids."""
    kept, tokens = len(document.token_ids), count(document.num_tokens, "token")
    if kept < document.num_tokens:
        tokens = f"{count(kept)} of its {tokens}"
    yield Text(f"document {document.number}, {visible(document.domain)}, {tokens}", "bold")
    yield Text()
    if colour:
        across = max(1, min(len(layers), (width + len(GAP)) // (NARROWEST + len(GAP))))
        for start in range(0, len(layers), across):
            yield from _side_by_side(document, layers[start : start + across], width)
            yield Text()
        yield from _legend(layers, width)
    else:
        yield from _with_ids(document, layers, width)


def print_document(console: Console, document: RoutedDocument, layers: Sequence[Layer]) -> None:
    """Print a document in the width of the console, with colours if it has them."""
    colour = console.color_system is not None and not console.no_color
    for line in document_lines(document, layers, width=console.width, colour=colour):
        print_styled(console, line)


def _side_by_side(document: RoutedDocument, layers: Sequence[Layer], width: int) -> Iterator[Text]:
    column = (width - len(GAP) * (len(layers) - 1)) // len(layers)
    yield Text(GAP).join(Text(f"layer {layer.layer}".ljust(column), "bold") for layer in layers)
    experts = [document.expert_ids[layer.layer][:, 0].tolist() for layer in layers]
    styles = [_styles(layer) for layer in layers]
    for line in lay_out(document.texts, column):
        out = Text()
        for place, layer in enumerate(layers):
            used = 0
            for segment in line:
                out.append(segment.text, styles[place][_bounded(experts[place][segment.token], layer)])
                used += cell_len(segment.text)
            if place < len(layers) - 1:
                out.append(" " * (column - used) + GAP)
        yield out


def _styles(layer: Layer) -> list[Style]:
    """Style by expert id; the last is that of no expert."""
    colours = [*expert_colours(layer.num_experts), NO_EXPERT_LIGHT]
    return [Style(color=INK, bgcolor=colour) for colour in colours]


def _bounded(expert: int, layer: Layer) -> int:
    return expert if 0 <= expert < layer.num_experts else layer.num_experts


def _legend(layers: Sequence[Layer], width: int) -> Iterator[Text]:
    """The experts' colours, once for each number of experts."""
    for layer in {layer.num_experts: layer for layer in layers}.values():
        if layer.num_experts > MOST_EXPERTS_IN_LEGEND:
            recur = "experts: colours recur; without colour (NO_COLOR=1) ids are printed"
            yield Text(f"{layer.num_experts} {recur}", "dim")
            continue
        legend = Text("first choice, expert ")
        for expert, style in enumerate(_styles(layer)[:-1]):
            legend.append(f" {expert} ", style)
        yield legend
    yield Text("experts of different layers have nothing in common but their number", "dim")


def _with_ids(document: RoutedDocument, layers: Sequence[Layer], width: int) -> Iterator[Text]:
    """Lines of text, each token as wide as its ids, and below each line the ids of every layer."""
    labels = [f"L{layer.layer}" for layer in layers]
    margin = max(len(label) for label in labels) + 1
    ids = {
        layer.layer: [_id(expert, layer) for expert in document.expert_ids[layer.layer][:, 0].tolist()]
        for layer in layers
    }
    widest = [max(map(len, of_token)) + 1 for of_token in zip(*ids.values(), strict=True)]
    for line in lay_out(document.texts, max(NARROWEST, (width - margin) // 2)):
        yield Text(" " * margin + "".join(_padded(segment.text, segment, widest) for segment in line).rstrip())
        for label, layer in zip(labels, layers, strict=True):
            seen: set[int] = set()
            cells = []
            for segment in line:
                shown = "" if segment.token in seen else ids[layer.layer][segment.token]
                seen.add(segment.token)
                cells.append(shown.ljust(cell_len(_padded(segment.text, segment, widest))))
            yield Text(label.ljust(margin) + "".join(cells).rstrip(), "dim")
        yield Text()


def _padded(text: str, segment: Segment, widest: Sequence[int]) -> str:
    return text + " " * (widest[segment.token] - cell_len(text))


def _id(expert: int, layer: Layer) -> str:
    """An expert id as printed; a dash if the assignment was dropped."""
    if expert < 0:
        return MISSING
    return str(expert) if expert < layer.num_experts else f"{expert}∅"
