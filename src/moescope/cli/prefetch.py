"""``moescope prefetch``: which experts could be loaded before a token needs them."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.cli.options import figures_option, format_option, parse_integers, shown_layers_option, trace_argument

_KINDS = ("lookahead", "transitions", "previous", "domain", "popularity")


@click.command()
@trace_argument
@shown_layers_option
@click.option(
    "--predictor",
    "predictors",
    type=click.Choice(_KINDS),
    multiple=True,
    help="Only this predictor, beside popularity; may be given several times.  [default: all that the trace allows]",
)
@click.option(
    "--distances",
    callback=parse_integers,
    metavar="LIST",
    help="How many layers ahead, such as 1,2,10.  [default: those recorded by --lookahead, else 1,2,4]",
)
@click.option(
    "--loaded", callback=parse_integers, metavar="LIST", help="Experts loaded, such as 2,4,8.  [default: k, 2k, 4k … E]"
)
@click.option(
    "--phase", type=click.Choice(["prefill", "decode"]), help="Only tokens of a prompt, or only generated ones."
)
@figures_option
@format_option
def command(
    trace: Path,
    layers: tuple[int, ...] | None,
    predictors: tuple[str, ...],
    distances: tuple[int, ...] | None,
    loaded: tuple[int, ...] | None,
    phase: str | None,
    figures: Path | None,
    format: str,
) -> None:
    """Show which experts could be loaded before a token needs them.

    The part of the needed experts that are among the first 1, 2 … E that a predictor names: the router of the layer
    asked some layers ahead (recorded by `moescope record --lookahead`), transitions from layer to layer, the previous
    token's experts, popularity in the domain. Beside them popularity alone and chance. What a predictor learns, it
    learns on other documents. CSV and JSON hold all of it in one table.

    \b
    Example:
      moescope prefetch pile.moe --loaded 2,4 --figures figures/
    """
    from moescope.cli.printing import print_table, save_figure
    from moescope.reporting.prefetch_tables import prefetch_tables
    from moescope.reporting.results import shown_layers
    from moescope.simulation import prefetch
    from moescope.trace import open_trace

    if distances is not None and 0 in distances:
        raise click.BadParameter("the next layer is 1 layer ahead: expected numbers from 1.", param_hint="--distances")
    opened = open_trace(trace)
    opened.need_tokens()
    shown = shown_layers(opened, layers)
    most = max(layer.num_experts for layer in opened.layers)
    if loaded is not None and (not loaded[0] or loaded[-1] > most):
        raise click.BadParameter(
            f"a layer has {most} experts: expected numbers from 1 to {most}, found {loaded[-1] if loaded[0] else 0}.",
            param_hint="--loaded",
        )
    result = prefetch(
        opened,
        distances=distances,
        predictors=predictors or None,
        phase=phase,  # type: ignore[arg-type]  # click has checked it
    )
    tables = prefetch_tables(result, shown, loaded)
    for number, table in enumerate(tables if format in ("text", "latex") else tables[:1]):
        if number:
            click.echo()
        print_table(table, format)
    if figures is not None:
        save_figure("prefetch", result, figures)
