"""``moescope words``: whether the tokens of a word, or of indentation, go to one expert."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.cli.options import format_option, shown_layers_option, trace_argument


@click.command()
@trace_argument
@click.option(
    "--word", "words", multiple=True, metavar="WORD", help="A word, found whole and with its case; repeatable."
)
@click.option("--indentation", is_flag=True, help="Include the spaces and tabs at the start of lines.")
@shown_layers_option
@format_option
def command(
    trace: Path, words: tuple[str, ...], indentation: bool, layers: tuple[int, ...] | None, format: str
) -> None:
    """Show whether the tokens of a word go to the same expert.

    Compares tokens of the word from different documents with any two tokens, and the tokens of a word that the
    tokenizer cut with what their token ids do elsewhere. Without a word: those of the paper, and indentation.

    \b
    Example:
      moescope words pile.moe --word self --word Question --indentation
    """
    from moescope.cli.printing import print_table
    from moescope.measures import words as measure
    from moescope.reporting.results import shown_layers
    from moescope.reporting.tables import words_table
    from moescope.tallying import WORDS
    from moescope.trace import open_trace

    if not all(word.strip() for word in words):
        raise click.BadParameter("a word must hold something besides spaces.", param_hint="'--word'")
    if not words and not indentation:
        words, indentation = WORDS, True
    opened = open_trace(trace)
    shown = shown_layers(opened, layers)
    print_table(words_table(measure(opened, words, indentation=indentation, layers=shown), shown), format)
