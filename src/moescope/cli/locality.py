"""``moescope locality``: repeats against what popularity, the document and the words predict."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.cli.options import figures_option, format_option, shown_layers_option, trace_argument


@click.command()
@trace_argument
@shown_layers_option
@click.option(
    "--show",
    type=click.Choice(["excess", "lags", "runs"]),
    default="excess",
    show_default=True,
    help="Neighbours against each null, repeats by distance, or lengths of runs.",
)
@figures_option
@format_option
def command(trace: Path, layers: tuple[int, ...] | None, show: str, figures: Path | None, format: str) -> None:
    """Show how much more often neighbours repeat an expert than their words would anyway.

    The rate of Table 5, and by how many points it exceeds what the popularity of the experts, the document in any order
    and the same words in other documents predict, each with a 95 % interval by document.

    \b
    Example:
      moescope locality pile.moe --layers 0,15,31
      moescope locality pile.moe --show lags
    """
    from moescope.cli.printing import layer_progress, print_table, save_figure
    from moescope.measures import locality
    from moescope.reporting.locality_tables import lags_table, locality_table, runs_table
    from moescope.reporting.results import shown_layers
    from moescope.trace import open_trace

    opened = open_trace(trace)
    opened.need_tokens()
    shown = shown_layers(opened, layers)
    tables = {"excess": locality_table, "lags": lags_table, "runs": runs_table}
    with layer_progress("measuring") as progress:
        measured = locality(opened, shown if figures is None else None, progress=progress)
    print_table(tables[show](measured, shown), format)
    if figures is not None:
        save_figure("excess", measured, figures)
        save_figure("lags", measured, figures, shown)
