"""``moescope coactivation``: which experts are chosen for the same token."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.cli.options import figures_option, format_option, shown_layers_option, trace_argument


@click.command()
@trace_argument
@shown_layers_option
@figures_option
@format_option
def command(trace: Path, layers: tuple[int, ...] | None, figures: Path | None, format: str) -> None:
    """Show which experts are chosen for the same token.

    All pairs of a token's set are counted and compared with sets of the same size in which only the popularity of each
    expert counts. The table lists the pairs that differ most; CSV and JSON hold all of them.

    \b
    Example:
      moescope coactivation pile.moe --layers 0,15,31
    """
    from moescope.cli.printing import print_table, save_figure
    from moescope.measures import coactivation
    from moescope.reporting.results import shown_layers
    from moescope.reporting.tables import coactivation_table
    from moescope.trace import open_trace

    opened = open_trace(trace)
    shown = shown_layers(opened, layers)
    result = coactivation(opened, shown)
    print_table(coactivation_table(result, shown), format)
    if figures is not None:
        save_figure("coactivation", result, figures)
