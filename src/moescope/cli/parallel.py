"""``moescope parallel``: what the routing of a trace costs on devices that share the experts."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.cli.options import figures_option, format_option, parse_integers, shown_layers_option, trace_argument


@click.command()
@trace_argument
@click.option("--devices", type=int, required=True, help="Devices that share the experts of each layer.")
@click.option("--nodes", type=int, default=1, show_default=True, help="Nodes, of as many devices each.")
@click.option(
    "--prefill",
    callback=parse_integers,
    default="4096",
    show_default=True,
    metavar="LIST",
    help="Tokens of prefill batches: consecutive tokens, one prompt after the other.",
)
@click.option(
    "--decode",
    callback=parse_integers,
    default="64",
    show_default=True,
    metavar="LIST",
    help="Tokens of decode batches: one of each running sequence.",
)
@click.option(
    "--placements", metavar="LIST", help="Such as linear,eplb; see below.  [default: linear,random,eplb,…: all five]"
)
@click.option("--redundant-experts", type=int, help="Slots beyond one an expert.  [default: one a device]")
@click.option("--expert-groups", type=int, default=1, show_default=True, help="Groups the router chooses among first.")
@click.option("--hidden-size", type=int, help="Values of a hidden state, for bytes.  [default: as the trace says]")
@click.option("--bytes-per-value", type=int, help="Of a hidden state that travels.  [default: of the model's dtype]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random placement and the nulls.")
@shown_layers_option
@figures_option
@format_option
def command(
    trace: Path,
    devices: int,
    nodes: int,
    prefill: tuple[int, ...],
    decode: tuple[int, ...],
    placements: str | None,
    redundant_experts: int | None,
    expert_groups: int,
    hidden_size: int | None,
    bytes_per_value: int | None,
    seed: int,
    layers: tuple[int, ...] | None,
    figures: Path | None,
    format: str,
) -> None:
    """Show what the routing costs on devices that share the experts.

    How much more than the mean the most loaded device of a batch gets, beside batches of the same tokens in any order
    and of uniform routing; which assignments exceed the capacity of an expert; how many devices a token must reach; and
    what a placement costs that was fitted on another domain. Placements: linear; random; eplb, DeepSeek's load balancer
    without replicas; eplb-replicated, with redundant experts; affinity, which brings experts of the same token
    together. They are fitted on one half of the documents and judged on the other. CSV and JSON hold all of it in one
    table.

    \b
    Example:
      moescope parallel pile.moe --devices 8
      moescope parallel pile.moe --devices 16 --nodes 2 --prefill 1024,8192 --decode 32,256 --figures figures/
    """
    from moescope.cli.printing import print_table, save_figure
    from moescope.reporting.parallel_tables import parallel_tables
    from moescope.reporting.results import shown_layers
    from moescope.simulation import parallel
    from moescope.simulation.placements import ALGORITHMS
    from moescope.trace import open_trace

    opened = open_trace(trace)
    opened.need_tokens()
    shown = shown_layers(opened, layers)
    names = tuple(ALGORITHMS) if placements is None else tuple(name.strip() for name in placements.split(","))
    try:
        result = parallel(
            opened,
            devices=devices,
            nodes=nodes,
            prefill=prefill,
            decode=decode,
            placements=names,
            redundant_experts=redundant_experts,
            expert_groups=expert_groups,
            hidden_size=hidden_size,
            bytes_per_value=bytes_per_value,
            seed=seed,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    tables = parallel_tables(result, shown)
    for number, table in enumerate(tables if format in ("text", "latex") else tables[:1]):
        if number:
            click.echo()
        print_table(table, format)
    if figures is not None:
        save_figure("parallel", result, figures)
