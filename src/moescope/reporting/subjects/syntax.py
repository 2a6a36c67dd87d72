"""Whether classes of words that show syntax have experts of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import xarray as xr

from moescope.measures.syntax import syntax
from moescope.reporting import figures as drawn
from moescope.reporting.cells import BY_DOCUMENT, FDR, by_layer, divergence_sections, grid_of, rows_of
from moescope.reporting.chapters import VOCABULARY
from moescope.reporting.frames import tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.options import choice_option, figures_option, shown_layers_option, trace_argument
from moescope.reporting.subject import Drawing, PageFigure, PageTable, Results, Subject, where_known
from moescope.reporting.tables import Section, Table
from moescope.reporting.wording import choice_of
from moescope.trace import Trace


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """A map of classes and layers, then the tables."""
    yield PageFigure(
        name="classes",
        file="word-classes",
        draw=lambda: drawn.divergence.draw_word_classes(result),
        label="Word classes",
        title="Word classes with experts of their own",
        caption=(
            "Jensen-Shannon divergence, bits, between the choices of a class of words and those of the other tokens "
            "of the same documents. Dot: not explained by sampling documents (false discovery rate 5 %)."
        ),
        how=(
            "A dark cell: the class goes its own way. Because both sides come from the same documents, domain cannot "
            "pass for syntax."
        ),
        cannot=(
            "Line breaks are one or two ids: a router that looks ids up separates them without knowing syntax. Classes "
            "overlap."
        ),
        frame=tidy(result, "word_class", "layer"),
    )
    yield PageTable(word_classes_table(result, results.layers), folded="Classes of words, as a table")
    yield PageTable(word_class_experts_table(result, results.layers), folded="The expert that stands out in each class")


@trace_argument
@shown_layers_option
@choice_option
@figures_option
def command(
    trace: Trace, layers: tuple[int, ...] | None, choice: str, figures: Path | None
) -> Iterator[Table | Drawing]:
    """Show whether indentation, punctuation, digits and the like have experts of their own.

    For each word class (indentation, newline, digits, punctuation, capitalised, keyword of Python, command of LaTeX,
    continuation of a word): how far its choices are from those of the other tokens of the same documents, in bits,
    beside what sampling documents alone would give; and the expert that stands out.

    \b
    Example:
      moescope syntax pile.moe --layers 0,15,31
    """
    trace.need_tokens()
    shown = shown_layers(trace, layers)
    result = syntax(trace, shown if figures is None else None, choice=choice)
    yield word_classes_table(result, shown)
    yield word_class_experts_table(result, shown)
    yield Drawing(file="word_classes", draw=lambda: drawn.divergence.draw_word_classes(result))


def word_classes_table(syntax: xr.Dataset, layers: Sequence[int]) -> Table:
    """Divergence of each word class from other tokens of its documents: a row a class, a column a layer."""
    data = syntax.sel(layer=list(layers))
    by_all = grid_of(data, "word_class", "layer", "jsd_all")
    return Table(
        "word_classes",
        f"Jensen-Shannon divergence of word classes from other tokens of their documents, {choice_of(syntax)}, bits",
        "class",
        tuple(f"layer {layer}" for layer in layers),
        (
            *divergence_sections(data, "word_class", "jsd"),
            Section("against all other tokens, whatever their documents", by_all),
        ),
        notes=(f"* differs ({FDR} over classes and layers).",),
        frame=tidy(data, "word_class", "layer"),
    )


def word_class_experts_table(syntax: xr.Dataset, layers: Sequence[int]) -> Table:
    """The expert that stands out in each word class: a section a layer, a row a class."""
    data = syntax.sel(layer=list(layers))
    columns = ("tokens", "documents", "top_expert", "top_share", "top_share_null")
    return Table(
        "word_class_experts",
        f"The expert that stands out in each word class, {choice_of(syntax)}, %",
        "class",
        ("tokens", "documents", "expert", "of the class", "of the others"),
        by_layer(data, lambda of_layer: rows_of(of_layer, "word_class", columns)),
        notes=(
            "The expert whose share of the class exceeds that of the other tokens of the same documents by most. "
            f"{BY_DOCUMENT}",
        ),
        frame=tidy(data, "word_class", "layer"),
    )


subject = Subject(
    measure=lambda counted, _: where_known(syntax(counted), "jsd"),  # a class may stand beside no other tokens
    blocks=blocks,
    section=VOCABULARY,
    command=command,
)
