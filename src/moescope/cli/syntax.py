"""``moescope syntax``: whether word classes that show syntax have experts of their own."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.cli.options import figures_option, format_option, shown_layers_option, trace_argument


@click.command()
@trace_argument
@shown_layers_option
@click.option(
    "--choice",
    type=click.Choice(["first", "either"]),
    default="first",
    show_default=True,
    help="The first choice of a token, or each of its choices.",
)
@figures_option
@format_option
def command(trace: Path, layers: tuple[int, ...] | None, choice: str, figures: Path | None, format: str) -> None:
    """Show whether indentation, punctuation, digits and the like have experts of their own.

    For each word class (indentation, newline, digits, punctuation, capitalised, keyword of Python, command of LaTeX,
    continuation of a word): how far its choices are from those of the other tokens of the same documents, in bits,
    beside what sampling documents alone would give; and the expert that stands out.

    \b
    Example:
      moescope syntax pile.moe --layers 0,15,31
    """
    from moescope.cli.printing import print_table, save_figure
    from moescope.measures import syntax
    from moescope.reporting.results import shown_layers
    from moescope.reporting.vocabulary_tables import syntax_tables
    from moescope.trace import open_trace

    opened = open_trace(trace)
    opened.need_tokens()
    shown = shown_layers(opened, layers)
    result = syntax(opened, shown if figures is None else None, choice=choice)
    tables = syntax_tables(result, shown)
    for number, table in enumerate(tables if format in ("text", "latex") else tables[:1]):
        if number:
            click.echo()
        print_table(table, format)
    if figures is not None:
        save_figure("word_classes", result, figures)
