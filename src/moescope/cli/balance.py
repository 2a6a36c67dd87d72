"""``moescope balance``: how evenly the experts are loaded, over the trace, by domain and within batches."""

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
    """Show how evenly the experts are loaded.

    The largest load over the mean (MaxVio is this minus 1), the coefficient of variation, Gini, entropy, idle experts:
    over the whole trace and by domain, beside what perfect balance would show with such documents; the imbalance within
    batches of 1, 16 and 256 consecutive sequences, beside that of tokens drawn independently; and, if they were
    recorded, the gate weights. CSV and JSON hold all of it in one table.

    \b
    Example:
      moescope balance pile.moe --layers 0,15,31
    """
    from moescope.cli.printing import print_table, save_figure
    from moescope.measures import balance
    from moescope.reporting.results import shown_layers
    from moescope.reporting.tables import balance_tables
    from moescope.trace import open_trace

    opened = open_trace(trace)
    shown = shown_layers(opened, layers)
    result = balance(opened, shown if figures is None else None)
    tables = balance_tables(result, shown)
    for number, table in enumerate(tables if format in ("text", "latex") else tables[:1]):
        if number:
            click.echo()
        print_table(table, format)
    if figures is not None:
        save_figure("balance", result, figures)
