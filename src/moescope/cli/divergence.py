"""``moescope divergence``: how differently the domains use the experts, and which stands out."""

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
    """Show how differently the domains use the experts.

    The Jensen-Shannon divergence of each domain's shares from the mean of the others', and of each pair of domains, in
    bits, beside what sampling documents alone would give; and the domain that stands out. CSV and JSON hold both.

    \b
    Example:
      moescope divergence pile.moe --layers 0,15,31
    """
    from moescope.cli.printing import print_table, save_figure
    from moescope.measures import divergence
    from moescope.reporting.results import shown_layers
    from moescope.reporting.tables import divergence_table, domain_pairs_table
    from moescope.tallying import tally
    from moescope.trace import open_trace

    opened = open_trace(trace)
    shown = shown_layers(opened, layers)
    found = divergence(tally(opened, shown if figures is None else None))
    tables = [divergence_table(found, shown)]
    if found.sizes["domain"] > 1:
        tables.append(domain_pairs_table(found, shown))
    for number, table in enumerate(tables if format in ("text", "latex") else tables[:1]):
        if number:
            click.echo()
        print_table(table, format)
    if figures is not None:
        save_figure("divergence", found, figures)
        from moescope.reporting.captions import FEWEST_DOMAINS_IN_PAIRS  # needs the extra of figures, as these do

        if found.sizes["domain"] >= FEWEST_DOMAINS_IN_PAIRS:
            save_figure("domain_pairs", found, figures, shown)
