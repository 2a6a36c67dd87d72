"""``moescope explain``: how many bits of the choice each source explains."""

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
@click.option(
    "--permutations",
    type=click.IntRange(1, 99_999),
    default=99,
    show_default=True,
    help="Permutations of each test.",
)
@figures_option
@format_option
def command(
    trace: Path, layers: tuple[int, ...] | None, choice: str, permutations: int, figures: Path | None, format: str
) -> None:
    """Show how many bits of the choice domain, token, neighbours and place explain.

    For each layer: the entropy of the choice, and how much of it is told by the domain, the token, the token before,
    its expert, the place in the sequence, and the token's expert in the layer before; each with a 95 % interval by
    document, what permuted routing gives, and a p-value. Below, a sentence a layer.

    \b
    Example:
      moescope explain pile.moe --layers 0,15,31
    """
    from moescope.cli.printing import layer_progress, print_table, save_figure, warn_of_few_permutations
    from moescope.measures import explain
    from moescope.reporting.explain_tables import explain_table
    from moescope.reporting.results import shown_layers
    from moescope.trace import open_trace

    opened = open_trace(trace)
    opened.need_tokens()
    shown = shown_layers(opened, layers)
    warn_of_few_permutations(permutations)
    with layer_progress("explaining") as progress:
        wanted = shown if figures is None else None
        explained = explain(opened, wanted, choice=choice, permutations=permutations, progress=progress)
    print_table(explain_table(explained, shown), format)
    if figures is not None:
        save_figure("explained", explained, figures, shown)
        save_figure("explained_by_layer", explained, figures)
