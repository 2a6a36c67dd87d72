"""``moescope compare``: two traces, token by token where they hold the same tokens."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.cli.options import figures_option, format_option, layers_option

SHOWN = ("agreement", "changes", "tokens")


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@layers_option
@click.option(
    "--show",
    type=click.Choice(SHOWN),
    default="agreement",
    show_default=True,
    help="How often they agree, which shares changed, or on which tokens they agree least.",
)
@figures_option
@format_option
def command(a: Path, b: Path, layers: tuple[int, ...] | None, show: str, figures: Path | None, format: str) -> None:
    """Show how far two traces send the same tokens to the same experts.

    For checkpoints, fine-tunings, dtypes and quantisations of one model over the same tokens. Where the tokens are not
    the same, or expert ids can have no common meaning, only distances of the distributions are shown, and it says so.

    \b
    Example:
      moescope compare bf16.moe int4.moe
      moescope compare bf16.moe int4.moe --show tokens --layers 31
    """
    from moescope.cli.printing import print_table, save_figure
    from moescope.measures import compare
    from moescope.measures.claims import first_middle_last
    from moescope.reporting import comparison_tables as tables
    from moescope.trace import open_trace

    try:
        comparison = compare(open_trace(a), open_trace(b), layers)
    except ValueError as error:
        raise click.BadParameter(f"{error}.", param_hint="'--layers'") from None
    if comparison.agreement is None:
        assert comparison.distances is not None
        shown = layers or first_middle_last(comparison.distances["layer"].values.tolist())
        print_table(tables.distances_table(comparison, shown), format)
        return
    shown = layers or first_middle_last(comparison.agreement["layer"].values.tolist())
    if show == "tokens" and comparison.tokens is None:
        raise click.BadParameter("the traces have no token ids.", param_hint="'--show'")
    table = {
        "agreement": lambda: tables.agreement_table(comparison, shown),
        "changes": lambda: tables.changes_table(comparison, shown),
        "tokens": lambda: tables.tokens_table(comparison),
    }[show]()
    print_table(table, format)
    if figures is not None:
        save_figure("agreement", comparison.agreement, figures)
