"""``moescope placement``: where to put the experts, as a file that a server reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moescope.reporting.options import (
    exclude_option,
    force_option,
    layers_option,
    one_of,
    output_option,
    trace_argument,
)
from moescope.reporting.printing import say


@click.command()
@trace_argument
@click.option("--devices", type=int, required=True, help="Devices that share the experts of each layer.")
@click.option("--nodes", type=int, default=1, show_default=True, help="Nodes, of as many devices each.")
@one_of(
    "--algorithm",
    ["linear", "random", "eplb", "eplb-replicated", "affinity"],
    "How experts are placed.",
    default="eplb-replicated",
)
@click.option("--redundant-experts", type=int, help="Slots beyond one an expert.  [default: one a device]")
@click.option("--expert-groups", type=int, default=1, show_default=True, help="Groups the router chooses among first.")
@click.option("--domain", metavar="NAME", help="Fit on one domain.  [default: all of them together]")
@click.option(
    "--format",
    "format",
    type=click.Choice(["sglang", "sglang-counts", "eplb"]),
    help="How it is written.  [default: eplb if PATH ends in .npz, else sglang]",
)
@output_option(None, "File to write: .json, or .npz for eplb.")
@layers_option
@exclude_option
@force_option
def command(
    trace: Path,
    format: str | None,
    output: Path,
    exclude: tuple[str, ...],
    force: bool,
    **settings: Any,  # the arguments of `moescope.placement` that have these names
) -> None:
    """Write a placement of the experts, fitted on a trace.

    sglang: JSON with physical_to_logical_map, for --init-expert-location. sglang-counts: JSON with logical_count, the
    loads alone, from which SGLang makes its own placement. eplb: phy2log, log2phy and logcnt as vLLM and EPLB have
    them, .npz or .json. Prints the path.

    \b
    Example:
      moescope placement pile.moe --devices 8 -o placement.json
      moescope placement pile.moe --devices 16 --nodes 2 --algorithm affinity -o placement.npz
    """
    from moescope.exporting import export_placement
    from moescope.simulation import placement
    from moescope.trace import open_trace

    opened = open_trace(trace, exclude=exclude)
    try:
        placed = placement(opened, **settings)
        chosen = format or ("eplb" if output.suffix == ".npz" else "sglang")
        say(export_placement(placed, output, trace=opened, format=chosen, force=force))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
