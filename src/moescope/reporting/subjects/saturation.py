"""Checkpoints of a training against the last one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import xarray as xr

from moescope.measures.saturation import saturation
from moescope.measures.schema import total
from moescope.reporting import figures as drawn
from moescope.reporting.cells import BY_DOCUMENT, grid_of
from moescope.reporting.frames import tidy
from moescope.reporting.numbers import count
from moescope.reporting.options import figures_option, layers_option
from moescope.reporting.subject import Drawing, Subject
from moescope.reporting.subjects.compare import kappa_text
from moescope.reporting.tables import Cell, Row, Section, Table
from moescope.reporting.visible import visible
from moescope.reporting.wording import describe_kind
from moescope.trace import Trace


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
def command(
    traces: tuple[Trace, ...],
    steps: tuple[float, ...] | None,
    layers: tuple[int, ...] | None,
    first: bool,
    figures: Path | None,
) -> Iterator[Table | Drawing]:
    """Show how early a router settles on the experts it chooses in the end.

    Each checkpoint is compared with the last one given, on the same tokens; in per cent, with the larger side of a 95 %
    interval clustered by document, and what the popularity of the experts alone would give.

    \b
    Example:
      moescope saturation step-1000.moe step-5000.moe final.moe --steps 1000,5000,20000
    """
    if len(traces) < 2:
        raise click.BadParameter("give at least two traces, the last checkpoint last.", param_hint="'TRACE...'")
    if steps is not None and len(steps) != len(traces):
        raise click.BadParameter(
            f"{count(len(steps), 'step')} for {count(len(traces), 'trace')}.", param_hint="'--steps'"
        )
    result = saturation(traces, steps, layers)
    yield saturation_table(result, "first" if first else "set")
    yield Drawing(file="saturation", draw=lambda: drawn.saturation.draw_saturation(result))


def saturation_table(saturation: xr.Dataset, kind: str = "set") -> Table:
    """Agreement of sets or first choices with the last checkpoint: a row a checkpoint, a column a layer."""
    together = total(saturation)
    data = together.sel(kind=kind).transpose("step", "layer", ...)
    data = data.assign_coords(step=[f"{step:g}" for step in data["step"].values.tolist()])
    kappas = [
        Row(step, tuple(map(Cell, map(kappa_text, values))))
        for step, values in zip(data["step"].values.tolist(), data["kappa"].values.tolist(), strict=True)
    ]
    reference = f"{visible(saturation.attrs['reference'])} ({saturation.attrs['reference_step']:g})"
    documents, tokens = (int(together[name].min()) for name in ("documents", "tokens"))
    return Table(
        "saturation",
        f"Router saturation: agreement with {reference}, {describe_kind(kind, data)}, %",
        "step",
        tuple(f"layer {layer}" for layer in data["layer"].values.tolist()),
        (
            Section("measured", grid_of(data, "step", "layer", "agreement")),
            Section(
                "expected from the popularity of the experts alone", grid_of(data, "step", "layer", "agreement_null")
            ),
            Section("kappa: from 0, popularity alone, to 1", tuple(kappas)),
        ),
        notes=(f"{BY_DOCUMENT[:-1]}; {count(tokens, 'token')} of {count(documents, 'document')}.",),
        frame=tidy(saturation, "step", "domain", "layer", "kind"),
    )


subject = Subject(command=command)
