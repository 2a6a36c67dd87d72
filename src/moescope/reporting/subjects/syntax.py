"""Whether classes of words that show syntax have experts of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isnan
from pathlib import Path

import pandas as pd
import xarray as xr

from moescope.measures.syntax import syntax
from moescope.reporting import figures as drawn
from moescope.reporting.cells import BY_DOCUMENT, bits_range_cell, mark, percent_cell, share_cell
from moescope.reporting.chapters import VOCABULARY
from moescope.reporting.frames import in_percent
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import MISSING, bits, count, percent
from moescope.reporting.options import choice_option, figures_option, shown_layers_option, trace_argument
from moescope.reporting.subject import Drawing, PageFigure, PageTable, Results, Subject
from moescope.reporting.tables import SIGNIFICANT, Cell, Row, Section, Table, grid
from moescope.reporting.wording import choice_of
from moescope.tallying import Counted
from moescope.trace import Trace


def measure(counted: Counted, results: Results) -> xr.Dataset | None:
    """Of all layers, if a class stands beside other tokens."""
    found = syntax(counted)
    return found if found["jsd"].notnull().any() else None


def blocks(found: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """A map of classes and layers, then the tables."""
    yield PageFigure(
        name="classes",
        file="word-classes",
        draw=lambda: drawn.word_classes.draw_word_classes(found),
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
        frame=syntax_frame(found),
    )
    yield PageTable(word_classes_table(found, results.layers), folded="Classes of words, as a table")
    yield PageTable(word_class_experts_table(found, results.layers), folded="The expert that stands out in each class")


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
    found = syntax(trace, shown if figures is None else None, choice=choice)
    yield word_classes_table(found, shown)
    yield word_class_experts_table(found, shown)
    yield Drawing(file="word_classes", draw=lambda: drawn.word_classes.draw_word_classes(found))


def word_classes_table(syntax: xr.Dataset, layers: Sequence[int]) -> Table:
    """Divergence of each word class from other tokens of its documents: a row a class, a column a layer."""
    data = syntax.sel(layer=list(layers))

    def rows(cell: Callable[[xr.Dataset], Cell]) -> tuple[Row, ...]:
        classes = data["word_class"].values.tolist()
        return grid(classes, layers, lambda of, layer: cell(data.sel(word_class=of, layer=layer)))

    return Table(
        "word_classes",
        f"Jensen-Shannon divergence of word classes from other tokens of their documents, {choice_of(syntax)}, bits",
        "class",
        tuple(f"layer {layer}" for layer in layers),
        (
            Section("measured", rows(lambda at: Cell(bits(float(at["jsd"])), mark=mark(at["q_value"])))),
            Section("expected from sampling documents alone", rows(lambda at: Cell(bits(float(at["jsd_null"]))))),
            Section("95 % interval of the true divergence", rows(lambda at: bits_range_cell(at, "jsd"))),
            Section(
                "against all other tokens, whatever their documents", rows(lambda at: Cell(bits(float(at["jsd_all"]))))
            ),
        ),
        notes=(f"* differs (false discovery rate {percent(SIGNIFICANT, 0)} % over classes and layers).",),
        frame=syntax_frame(data),
    )


def word_class_experts_table(syntax: xr.Dataset, layers: Sequence[int]) -> Table:
    """The expert that stands out in each word class: a section a layer, a row a class."""
    data = syntax.sel(layer=list(layers))
    sections = []
    for layer in layers:
        rows = []
        for of in data["word_class"].values.tolist():
            at = data.sel(word_class=of, layer=layer)
            top = float(at["top_expert"])
            cells = (
                *(Cell(count(int(at[name]))) for name in ("tokens", "documents")),
                Cell(MISSING if isnan(top) else str(int(top))),
                share_cell(at, "top_share", "top_low", "top_high"),
                percent_cell(at, "top_share_others"),
            )
            rows.append(Row(of, cells))
        sections.append(Section(f"layer {layer}", tuple(rows)))
    return Table(
        "word_class_experts",
        f"The expert that stands out in each word class, {choice_of(syntax)}, %",
        "class",
        ("tokens", "documents", "expert", "of the class", "of the others"),
        tuple(sections),
        notes=(
            "The expert whose share of the class exceeds that of the other tokens of the same documents by most. "
            f"{BY_DOCUMENT}",
        ),
        frame=syntax_frame(data),
    )


def syntax_frame(syntax: xr.Dataset) -> pd.DataFrame:
    """A row a (word class, layer)."""
    names = {f"jsd{end}": f"jsd{end}_bits" for end in ("", "_low", "_high", "_null", "_all")}
    shares = {f"top_{name}": f"top_{name}_percent" for name in ("share", "low", "high", "share_others")}
    kept = syntax[["tokens", "documents", *names, "p_value", "q_value", "top_expert", *shares]]
    frame = kept.drop_vars(["num_experts", "num_ids", "top_k"]).to_dataframe(["word_class", "layer"]).reset_index()
    frame["top_expert"] = frame["top_expert"].astype("Int64")
    return in_percent(frame.rename(columns=names), shares)


subject = Subject(measure=measure, blocks=blocks, section=VOCABULARY, command=command)
