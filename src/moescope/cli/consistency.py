"""``moescope consistency``: whether a fixed set of experts would serve a segment of tokens."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.cli.options import figures_option, format_option, shown_layers_option, trace_argument


@click.command()
@trace_argument
@shown_layers_option
@click.option("--domain", metavar="NAME", help="Show one domain.  [default: all of them together]")
@figures_option
@format_option
def command(trace: Path, layers: tuple[int, ...] | None, domain: str | None, figures: Path | None, format: str) -> None:
    """Show how well one set of experts would serve consecutive tokens.

    Local routing consistency (SRP) over segments of 4, 16, 64 and 256 tokens; beside it what the documents' favourite
    experts give without any order, and uniform routing. The row of all layers is the number that is published.

    \b
    Example:
      moescope consistency pile.moe --layers 0,15,31
    """
    from moescope.cli.printing import print_table, save_figure
    from moescope.errors import NoSuchDomain
    from moescope.measures import consistency
    from moescope.reporting.comparison_tables import consistency_table
    from moescope.reporting.results import shown_layers
    from moescope.trace import open_trace

    opened = open_trace(trace)
    opened.need_tokens()
    shown = shown_layers(opened, layers)
    if domain is not None and domain not in opened.domains:
        raise NoSuchDomain(opened.path, f"no domain {domain!r}; the trace has {', '.join(opened.domains)}")
    result = consistency(opened)
    print_table(consistency_table(result, shown, domain), format)
    if figures is not None:
        save_figure("consistency", result, figures)
