"""``moescope cache``: what caches of experts would hit."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from moescope.cli.options import figures_option, format_option, layers_option, parse_integers, trace_argument

_POLICIES = ("lru", "lfu", "aged-lfu", "s3-fifo", "hot", "matching", "belady")  # those of moescope.simulation


def _parse_policies(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    if value is None:
        return _POLICIES
    names = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
    if unknown := [name for name in names if name not in _POLICIES]:
        raise click.BadParameter(f"no policy {unknown[0]!r}; there are {', '.join(_POLICIES)}.")
    return names


@click.command()
@trace_argument
@layers_option
@click.option(
    "--policies",
    callback=_parse_policies,
    metavar="LIST",
    help=f"Policies to play, of {', '.join(_POLICIES)}.  [default: all]",
)
@click.option(
    "--sizes",
    callback=parse_integers,
    metavar="LIST",
    help="Experts a layer that the cache holds, such as 2,4.  [default: all from top-k]",
)
@click.option(
    "--budget",
    type=click.Choice(["layer", "global"]),
    default="layer",
    show_default=True,
    help="A cache a layer, or one for all layers.",
)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Sequences decoded together."
)
@click.option("--prefill", type=click.IntRange(1), metavar="N", help="Serve chunks of N tokens instead of decoding.")
@click.option("--cold-sequences", is_flag=True, help="Empty the caches before each sequence.")
@click.option("--expert-bytes", type=click.FloatRange(0, min_open=True), metavar="N", help="Bytes of one expert.")
@click.option(
    "--bandwidth", type=click.FloatRange(0, min_open=True), metavar="GB/S", help="Of the link that loads them."
)
@click.option("--latency", type=click.FloatRange(0), default=0.0, metavar="US", help="Of one load, microseconds.")
@click.option("--compute", type=click.FloatRange(0), default=0.0, metavar="MS", help="Work a token, milliseconds.")
@click.option(
    "--overlap", type=click.FloatRange(0, 1), default=0.0, help="Part of work and loads that runs at once, 0-1."
)
@figures_option
@format_option
def command(
    trace: Path,
    layers: tuple[int, ...] | None,
    policies: tuple[str, ...],
    sizes: tuple[int, ...] | None,
    budget: Literal["layer", "global"],
    batch: int,
    prefill: int | None,
    cold_sequences: bool,
    expert_bytes: float | None,
    bandwidth: float | None,
    latency: float,
    compute: float,
    overlap: float,
    figures: Path | None,
    format: str,
) -> None:
    """Show what caches of experts would hit.

    Plays the trace through caches of every size: by policy beside the optimum (Belady), the tokens of each document in
    random order, and uniform routing; then by layer and by domain. With --expert-bytes and --bandwidth also the tokens
    a second that loading the misses leaves. CSV and JSON hold all hit ratios in one table.

    \b
    Example:
      moescope cache pile.moe --expert-bytes 66e6 --bandwidth 16 --compute 30
    """
    from moescope.cli.printing import layer_progress, print_table, save_figure
    from moescope.reporting.cache_tables import cache_tables
    from moescope.reporting.results import shown_layers
    from moescope.simulation import cache, offloading
    from moescope.trace import open_trace

    if (expert_bytes is None) != (bandwidth is None):
        raise click.UsageError("--expert-bytes and --bandwidth belong together: give both, or neither.")
    opened = open_trace(trace)
    shown_layers(opened, layers)  # says so if there is nothing in it
    with layer_progress("playing") as progress:
        try:
            played = cache(
                opened,
                layers,
                policies=policies,
                sizes=sizes,
                budget=budget,
                batch=batch,
                prefill=prefill,
                cold_sequences=cold_sequences,
                progress=progress,
            )
        except ValueError as error:  # of the options together, or of an option and the trace
            raise click.UsageError(f"{error}.") from None
    speed = None
    if expert_bytes is not None and bandwidth is not None:
        speed = offloading(
            played,
            bytes_per_expert=expert_bytes,
            bandwidth=1e9 * bandwidth,
            latency=1e-6 * latency,
            compute=1e-3 * compute,
            overlap=overlap,
        )
    tables = cache_tables(played, speed)
    for number, table in enumerate(tables if format in ("text", "latex") else tables[:1]):
        if number:
            click.echo()
        print_table(table, format)
    if figures is not None:
        save_figure("cache", played, figures)
