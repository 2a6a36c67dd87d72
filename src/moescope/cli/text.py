"""``moescope text``: Figure 8 in the terminal."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.reporting.options import exclude_option, shown_layers_option, trace_argument


@click.command()
@trace_argument
@click.option(
    "--document",
    type=click.IntRange(min=0),
    metavar="NUMBER",
    help="Index of the document in the corpus.  [default: the first recorded]",
)
@shown_layers_option
@click.option(
    "--width", type=click.IntRange(min=20), metavar="COLUMNS", help="Columns to fill.  [default: those of the terminal]"
)
@exclude_option
def command(
    trace: Path, document: int | None, layers: tuple[int, ...] | None, width: int | None, exclude: tuple[str, ...]
) -> None:
    """Show a document with its tokens coloured by expert.

    Figure 8: each token on the colour of its first choice, a column a layer. Without colour (a pipe, NO_COLOR=1) the id
    of each token's expert stands below it. Control characters of the text are shown as symbols.

    \b
    Example:
      moescope text pile.moe --document 17 --layers 0,15,31
    """
    from rich.console import Console

    from moescope.reporting.documents import read_document
    from moescope.reporting.layers import shown_layers
    from moescope.reporting.terminal import print_document
    from moescope.trace import open_trace

    opened = open_trace(trace, exclude=exclude)
    shown = shown_layers(opened, layers)
    number = int(opened.document_numbers[0]) if document is None else document
    routed = read_document(opened, number, shown)
    print_document(Console(width=width, highlight=False), routed, opened.select_layers(shown))
