"""``moescope saturation``: checkpoints of a training against the last one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import click

from moescope.cli.options import figures_option, format_option, layers_option
from moescope.reporting.numbers import count


def _parse_steps(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Read ``34,68,340``: ascending numbers."""
    if value is None:
        return None
    try:
        steps = tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(
            f"expected numbers with commas between them, such as 34,68; found {value!r}."
        ) from None
    if not all(a < b for a, b in pairwise(steps)) or not all(abs(step) < 1e18 for step in steps):
        raise click.BadParameter(f"expected finite numbers that ascend; found {value!r}.")
    return steps


@click.command()
@click.argument("traces", nargs=-1, required=True, metavar="TRACE...", type=click.Path(path_type=Path))
@click.option(
    "--steps",
    callback=_parse_steps,
    metavar="LIST",
    help="Step, token or per cent of each trace, such as 34,68,340.  [default: 1,2,3 …]",
)
@layers_option
@click.option("--first", is_flag=True, help="Show the agreement of first choices instead of sets.")
@figures_option
@format_option
def command(
    traces: tuple[Path, ...],
    steps: tuple[float, ...] | None,
    layers: tuple[int, ...] | None,
    first: bool,
    figures: Path | None,
    format: str,
) -> None:
    """Show how early a router settles on the experts it chooses in the end.

    Each checkpoint is compared with the last one given, on the same tokens; in per cent, with the larger side of a 95 %
    interval clustered by document, and what the popularity of the experts alone would give.

    \b
    Example:
      moescope saturation step-1000.moe step-5000.moe final.moe --steps 1000,5000,20000
    """
    from moescope.cli.printing import print_table, save_figure
    from moescope.measures import saturation
    from moescope.reporting.comparison_tables import saturation_table
    from moescope.trace import open_trace

    if len(traces) < 2:
        raise click.BadParameter("give at least two traces, the last checkpoint last.", param_hint="'TRACE...'")
    if steps is not None and len(steps) != len(traces):
        raise click.BadParameter(
            f"{count(len(steps), 'step')} for {count(len(traces), 'trace')}.", param_hint="'--steps'"
        )
    result = saturation([open_trace(path) for path in traces], steps, layers)
    print_table(saturation_table(result, "first" if first else "set"), format)
    if figures is not None:
        save_figure("saturation", result, figures)
