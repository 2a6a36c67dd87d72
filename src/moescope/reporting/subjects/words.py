"""Whether the tokens of a word, or of indentation, go to one expert."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import click
import xarray as xr

from moescope.measures.words import words as words_of
from moescope.reporting.cells import BY_DOCUMENT, by_layer, rows_of
from moescope.reporting.chapters import TEXT
from moescope.reporting.frames import tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.options import shown_layers_option, trace_argument, word_option
from moescope.reporting.subject import PageTable, Results, Subject
from moescope.reporting.tables import Table
from moescope.tallying import WORDS, Counted
from moescope.trace import Trace


def measure(counted: Counted, results: Results) -> xr.Dataset | None:
    """Of the words asked for, and of indentation."""
    return words_of(counted, list(results.words), indentation=True) if results.has_text else None


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageTable]:
    """The table counts what the coloured text above it shows."""
    yield PageTable(words_table(result, results.layers))


@trace_argument
@word_option("A word, result whole and with its case; repeatable.")
@click.option("--indentation", is_flag=True, help="Include the spaces and tabs at the start of lines.")
@shown_layers_option
def command(trace: Trace, words: tuple[str, ...], indentation: bool, layers: tuple[int, ...] | None) -> Iterator[Table]:
    """Show whether the tokens of a word go to the same expert.

    Compares tokens of the word from different documents with any two tokens, and the tokens of a word that the
    tokenizer cut with what their token ids do elsewhere. Without a word: those of the paper, and indentation.

    \b
    Example:
      moescope words pile.moe --word self --word Question --indentation
    """
    if not words and not indentation:
        words, indentation = WORDS, True
    shown = shown_layers(trace, layers)
    result = words_of(trace, words, indentation=indentation, layers=shown)
    for word in result["word"].values[result["occurrences"].values == 0].tolist():
        warnings.warn(f"{word!r} occurs nowhere as a whole word, with its case", stacklevel=2)
    yield words_table(result, shown)


def words_table(words: xr.Dataset, layers: Sequence[int]) -> Table:
    """Words and indentation: a section a layer, a row a word."""
    data = words.sel(layer=list(layers))
    names = ["occurrences", "top_expert"]
    names += [f"{name}{end}" for name in ("top_share", "same", "together") for end in ("", "_null")]
    return Table(
        "words",
        "First-choice expert of words, %",
        "word",
        ("occurrences", "expert", "of the word", "of all tokens", "measured", "any tokens", "measured", "token ids"),
        by_layer(data, lambda of_layer: rows_of(of_layer, "word", names)),
        groups=(("", 1), ("most frequent expert", 3), ("two documents agree", 2), ("within a word", 2)),
        notes=(
            "two documents agree: two tokens of the word from different documents have the same first choice, against "
            "any two tokens of the trace.",
            "within a word: all tokens of an occurrence that the tokenizer cut have the same first choice, against "
            "what their token ids do elsewhere.",
            BY_DOCUMENT,
        ),
        frame=tidy(data, "word", "layer"),
    )


subject = Subject(measure=measure, blocks=blocks, section=TEXT, command=command)
