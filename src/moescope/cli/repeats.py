"""``moescope repeats``: Table 5, and the data of Figure 10."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.cli.options import format_option, shown_layers_option, trace_argument


@click.command()
@trace_argument
@shown_layers_option
@format_option
def command(trace: Path, layers: tuple[int, ...] | None, format: str) -> None:
    """Show how often consecutive tokens go to the same expert.

    Table 5, and the data of Figure 10: in per cent, with the larger side of a 95 % interval clustered by document;
    below, what the popularity of the experts alone and uniform routing predict, and, for domains of the Pile, what the
    paper found for Mixtral-8x7B.

    \b
    Example:
      moescope repeats pile.moe --layers 0,15,31
    """
    from moescope.cli.printing import print_table
    from moescope.measures import repeats
    from moescope.reporting.results import shown_layers
    from moescope.reporting.tables import repeats_table
    from moescope.tallying import tally
    from moescope.trace import open_trace

    opened = open_trace(trace)
    shown = shown_layers(opened, layers)
    print_table(repeats_table(repeats(tally(opened, shown)), shown), format)
