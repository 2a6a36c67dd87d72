"""``moescope transitions``: how the choice of experts goes on from layer to layer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from moescope.cli.options import figures_option, format_option, layers_option, trace_argument


@click.command()
@trace_argument
@layers_option
@click.option(
    "--choice",
    type=click.Choice(["first", "any"]),
    default="first",
    show_default=True,
    help="First choices, or all pairs of an assignment at one layer and one at the next.",
)
@figures_option
@format_option
def command(
    trace: Path, layers: tuple[int, ...] | None, choice: Literal["first", "any"], figures: Path | None, format: str
) -> None:
    """Show how the choice of experts goes on from layer to layer.

    How much the expert at one layer tells of that at the next, in bits; which transitions are more and less frequent
    than independent layers make them; and how many paths through all the layers carry half of the tokens, beside a
    Markov chain and independent layers. CSV and JSON hold all of it in one table.

    \b
    Example:
      moescope transitions pile.moe --layers 0,1,2,3
    """
    from moescope.cli.printing import print_table, save_figure
    from moescope.measures import transitions
    from moescope.reporting.results import shown_layers
    from moescope.reporting.tables import transitions_tables
    from moescope.trace import open_trace

    opened = open_trace(trace)
    if not opened.header.counts_only:
        shown_layers(opened, layers)  # refuses a trace without a document
    result = transitions(opened, layers, choice=choice)
    tables = transitions_tables(result)
    for number, table in enumerate(tables if format in ("text", "latex") else tables[:1]):
        if number:
            click.echo()
        print_table(table, format)
    if figures is not None:
        save_figure("transitions", result, figures)
