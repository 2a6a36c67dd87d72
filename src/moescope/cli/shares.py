"""``moescope shares``: Figures 7 and 9 as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from moescope.cli.options import format_option, shown_layers_option, trace_argument


@click.command()
@trace_argument
@shown_layers_option
@click.option(
    "--choice",
    default="either",
    show_default=True,
    metavar="CHOICE",
    help="Which choice: first, second, third, 4th … or either, all of a token's choices together.",
)
@click.option(
    "--of",
    type=click.Choice(["assignments", "tokens"]),
    default="assignments",
    show_default=True,
    help="Of the assignments, as in Figure 7, or of the tokens, as OLMoE's domain specialization.",
)
@format_option
def command(
    trace: Path, layers: tuple[int, ...] | None, choice: str, of: Literal["assignments", "tokens"], format: str
) -> None:
    """Show the share of the assignments each expert receives, by domain.

    Figures 7 and 9 as a table: in per cent, with the larger side of a 95 % interval clustered by document. CSV and JSON
    hold the interval, the uniform share and the share of tokens, too.

    \b
    Example:
      moescope shares pile.moe --layer 15 --choice first --format csv
    """
    from moescope.cli.printing import print_table
    from moescope.measures import shares
    from moescope.reporting.results import shown_layers
    from moescope.reporting.tables import shares_table
    from moescope.tallying import tally
    from moescope.trace import open_trace

    opened = open_trace(trace)
    shown = shown_layers(opened, layers)
    result = shares(tally(opened, shown))
    known = result["choice"].values.tolist()
    if choice not in known:
        raise click.BadParameter(f"{choice!r} is not one of {', '.join(known)}.", param_hint="'--choice'")
    print_table(shares_table(result, shown, choice, of), format)
