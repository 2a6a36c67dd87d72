"""What the routing costs on devices that share the experts: waiting, drops, reach; and which placement to take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures.schema import total
from moescope.reporting import figures as drawn
from moescope.reporting.cells import CLUSTERED, cell, grid_of, grid_of_pairs, values, with_interval
from moescope.reporting.chapters import WORTH
from moescope.reporting.frames import kinds, only, tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import count, number, plus_minus
from moescope.reporting.options import figures_option, parse_integers, shown_layers_option, trace_argument
from moescope.reporting.subject import Drawing, PageFigure, PageSection, PageTable, Recommendation, Results, Subject
from moescope.reporting.tables import Cell, Row, Section, Table, grid
from moescope.reporting.visible import visible
from moescope.reporting.wording import capital
from moescope.simulation.parallel import parallel
from moescope.simulation.placements import ALGORITHMS
from moescope.simulation.together import Job
from moescope.trace import Layer, Trace

SECTION = PageSection(
    WORTH,
    "devices",
    "Which placement on devices?",
    "Expert parallelism",
    "All devices wait for the busiest. Where a batch sends its tokens to few experts, it matters which of "
    "them lie together.",
)

_FOLDED = {
    "parallel": "Largest load over mean load, by placement",
    "drops": "Assignments dropped, by capacity factor",
    "drop_places": "Drops by domain and by place in the sequence",
    "reach": "Devices that a token reaches, and bytes sent",
    "foreign": "Placements fitted on one domain and judged on another",
}

SHOWN_FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
"""Capacity factors of the table; the frame has all of them."""

PLACES_FACTOR = 1.25
"""Capacity factor at which drops are shown by domain and position."""

_BY_EFFORT = ("linear", "eplb", "affinity", "eplb-replicated")
"""Placements that can be advised, what costs least first; random order is a null, not a plan."""


def play(results: Results) -> Job | None:
    """On `shared_by` devices; nothing for counts, nor where so few experts cannot be shared."""
    trace = results.trace
    devices = shared_by(trace.layers)
    if trace.header.counts_only or devices is None:
        return None
    names = tuple(ALGORITHMS) if trace.num_documents > 1 else ("linear", "random")  # others are fitted on documents
    return Job(partial(parallel, devices=devices, placements=names))


def shared_by(layers: Iterable[Layer]) -> int | None:
    """Devices among which a report shares the experts: 8, 4 or 2, as many as leave two experts each in every layer."""
    numbers = [layer.num_experts for layer in layers]
    fitting = [n for n in (8, 4, 2) if all(number % n == 0 and number >= 2 * n for number in numbers)]
    return fitting[0] if fitting else None


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """Devices, drops and reach in one figure, and the tables."""
    yield PageFigure(
        name="parallel",
        file="parallel",
        draw=lambda: drawn.parallel.draw_parallel(result),
        label="Devices",
        title=f"What this routing costs on {int(result.attrs['devices'])} devices",
        caption=(
            "Above: largest load of a device over the mean, by layer, experts placed in their order, for batches of "
            "prefill and decode (band: 5 to 95 % of the batches). Dashed: the same tokens in any order; dotted: "
            "uniform routing. Below: assignments dropped by capacity factor; what a batch waits for over all layers, "
            "and devices that a token reaches, by placement, on documents it was not fitted on."
        ),
        how=(
            "Dashed above dotted: popular experts share a device, and placement by load helps. Solid above dashed: "
            "locality, which placement by load cannot remove; replicas and more mixed batches help."
        ),
        cannot="Time, what a server mixes, and what a dropped token would do in later layers.",
        frame=parallel_frame(result),
    )
    yield from PageTable.each(parallel_tables(result, results.layers), _FOLDED)


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
def command(
    trace: Trace,
    placements: str | None,
    layers: tuple[int, ...] | None,
    figures: Path | None,
    **settings: Any,  # the arguments of `moescope.parallel` that have these names
) -> Iterator[Table | Drawing]:
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
    trace.need_tokens()
    shown = shown_layers(trace, layers)
    names = tuple(ALGORITHMS) if placements is None else tuple(name.strip() for name in placements.split(","))
    try:
        result = parallel(trace, placements=names, **settings)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    yield from parallel_tables(result, shown)
    yield Drawing(file="parallel", draw=lambda: drawn.parallel.draw_parallel(result))


def parallel_tables(parallel: xr.Dataset, layers: Sequence[int]) -> Iterator[Table]:
    """The tables of a result; the frame of the first holds everything."""
    yield devices_table(parallel, layers)
    yield drops_table(parallel, layers)
    yield reach_table(parallel, layers)
    if "foreign" in parallel:
        yield foreign_table(parallel)
    yield drop_places_table(parallel, layers)


def devices_table(parallel: xr.Dataset, layers: Sequence[int]) -> Table:
    """Over-subscription: a section a kind of batches, a row a placement; then what there would be without locality."""
    columns = [*((layer, "over_subscription") for layer in layers), *((layers[0], name) for name in _SLOWEST)]
    sections = []
    for batch in parallel["batch"].values.tolist():
        data = parallel.sel(batch=batch).isel(quantile=-1)
        rows = grid_of_pairs(data, "placement", "layer", columns)
        sections.append(Section(f"{batch}: {_batches(int(data['batches']))}", rows))
    return Table(
        "parallel",
        f"Largest load over mean load of {_cluster(parallel)}, over batches",
        "placement",
        (*(f"layer {layer}" for layer in layers), *_SLOWEST.values()),
        tuple(sections),
        groups=(("over-subscription", len(layers)), ("over all layers, each waiting for its slowest device", 5)),
        notes=(
            "Placements are fitted on one half of the documents and judged on the other; own fit: on those judged.",
            f"one in 20: exceeded by one batch in twenty. any order: the same tokens without locality. {CLUSTERED}",
            *([_TOO_LARGE] if not parallel["batches"].all() else []),
        ),
        frame=parallel_frame(parallel),
    )


_SLOWEST = {
    "slowest": "all layers",
    "slowest_quantile": "one in 20",
    "slowest_own": "own fit",
    "slowest_null": "any order",
    "slowest_uniform": "uniform",
}
_TOO_LARGE = (
    "No batch is full: neither half of the documents has as many tokens, or sequences, as it takes; "
    "choose smaller ones with --prefill and --decode."
)


def drops_table(parallel: xr.Dataset, layers: Sequence[int]) -> Table:
    """Dropped assignments: a section a kind of batches, a row a capacity factor."""
    sections = []
    for batch in parallel["batch"].values.tolist():
        data = total(parallel).sel(batch=batch)
        rows = [
            Row(f"{factor:g}", _with_null(data.sel(capacity_factor=factor), "dropped", layers, 2))
            for factor in SHOWN_FACTORS
        ]
        rows.append(Row("for < 0.1 %", _with_null(data, "sufficient_factor", layers)))
        sections.append(Section(batch, tuple(rows)))
    return Table(
        "drops",
        "Assignments dropped, %, by capacity factor",
        "factor",
        ("dropped", "any order") * len(layers),
        tuple(sections),
        groups=tuple((f"layer {layer}", 2) for layer in layers),
        notes=(
            "An expert takes ⌈factor · tokens · top-k / experts⌉ of a batch, first come first served by token.",
            "Last row: the smallest factor that drops less than 0.1 %. any order: the same tokens without locality.",
        ),
        frame=_frame(parallel, *_DROPPED),
    )


def _with_null(data: xr.Dataset, name: str, layers: Sequence[int], digits: int | None = None) -> tuple[Cell, ...]:
    """Of each layer a value, and then what it would be without locality."""
    of_layers = [data.sel(layer=layer) for layer in layers]
    return tuple(cell(of_layer, name + end, digits) for of_layer in of_layers for end in ("", "_null"))


def drop_places_table(parallel: xr.Dataset, layers: Sequence[int]) -> Table:
    """Whose assignments drop at one capacity factor: a row a domain, then a row a stretch of the sequence."""
    sections = []
    for batch in parallel["batch"].values.tolist():
        data = parallel.sel(batch=batch, capacity_factor=PLACES_FACTOR, layer=list(layers))
        sections.append(Section(f"{batch}, by domain", grid_of(data, "domain", "layer", "dropped", 2)))
        known = data[["dropped_by_position"]].dropna("position", how="all")
        stretches = [
            f"{count(first)}–{count(2 * first)}" if first else "0" for first in known["position"].values.tolist()
        ]
        if stretches:
            rows = grid_of(known.assign_coords(position=stretches), "position", "layer", "dropped_by_position", 2)
            sections.append(Section(f"{batch}, by place of the token in the sequence", rows))
    return Table(
        "drop_places",
        f"Assignments dropped at capacity factor {PLACES_FACTOR:g}, %",
        "tokens",
        tuple(f"layer {layer}" for layer in layers),
        tuple(sections),
        notes=(f"{CLUSTERED} The place of a token counts from 0.",),
        frame=_frame(parallel, *_DROPPED),
    )


def reach_table(parallel: xr.Dataset, layers: Sequence[int]) -> Table:
    """Devices, nodes and bytes: a section for each of them, a row a placement; of the first kind of batches."""
    data = parallel.isel(batch=0)
    names = parallel["placement"].values.tolist()
    reached = [("devices_reached", "devices a token")]
    if int(parallel.attrs["nodes"]) > 1:
        reached.append(("nodes_reached", "nodes a token"))
    sections = []
    for name, title in reached:
        first = data.isel(placement=[0]).assign_coords(placement=[f"uniform routing, {names[0]}"])
        rows = (*_reach_rows(data, name, layers), *_reach_rows(first, f"{name}_uniform", layers))
        sections.append(Section(title, rows))
    for name, title in (("within", "KiB within nodes"), ("between", "KiB between nodes")):
        if f"bytes_{name}_nodes" in data and (name == "within" or int(parallel.attrs["nodes"]) > 1):
            rows = _reach_rows(data[[f"bytes_{name}_nodes"]] / 1024, f"bytes_{name}_nodes", layers)
            sections.append(Section(f"{title}, a token and layer, one way", rows))
    unknown = "bytes_within_nodes" not in data
    return Table(
        "reach",
        f"What a token must reach on {_cluster(parallel)}, mean",
        "placement",
        (*(f"layer {layer}" for layer in layers), "mean of all"),
        tuple(sections),
        notes=(
            CLUSTERED,
            *(["The trace does not say how large a hidden state is: --hidden-size gives bytes."] if unknown else []),
        ),
        frame=_frame(parallel, "a layer"),
    )


def _reach_rows(data: xr.Dataset, name: str, layers: Sequence[int]) -> tuple[Row, ...]:
    """A row a placement: the layers, then the mean of all."""
    mean = data[[name]].mean("layer")

    def of_layer(placement: str, layer: int | None) -> Cell:
        of_placement = (data.sel(layer=layer) if layer is not None else mean).sel(placement=placement)
        return cell(of_placement, name)

    return grid(data["placement"].values.tolist(), [*layers, None], of_layer)


def foreign_table(parallel: xr.Dataset) -> Table:
    """What a foreign profile costs: a section a placement, a row a domain fitted on, a column a domain judged on."""
    domains = parallel["domain"].values.tolist()
    alone = parallel[["foreign"]]  # without its interval: the table is wide enough
    sections = [
        Section(name, grid_of(alone.sel(foreign_placement=name), "fitted_on", "domain", "foreign"))
        for name in parallel["foreign_placement"].values.tolist()
    ]
    return Table(
        "foreign",
        f"Largest load over mean load of {_cluster(parallel)}, all assignments of a domain together, over all layers",
        "fitted on",
        tuple(map(visible, domains)),
        tuple(sections),
        groups=(("judged on", len(domains)),),
        notes=("Fitted and judged on different documents. The diagonal is a stale profile, the rest a foreign one.",),
        frame=_frame(parallel, "foreign profile"),
    )


def parallel_frame(parallel: xr.Dataset) -> pd.DataFrame:
    """All of a result: a row a (what, placement, batch, layer …); `what` says which columns hold."""
    return _frame(parallel, *_ROWS)


_ROWS = {
    "a layer": ("placement", "batch", "layer"),
    "over all layers": ("placement", "batch"),
    "less another placement": ("placement", "against", "batch"),
    "batches": ("batch",),
    "dropped": ("batch", "domain", "layer", "capacity_factor"),
    "dropped without locality": ("batch", "layer", "capacity_factor"),
    "dropped by position": ("batch", "position", "layer", "capacity_factor"),
    "sufficient factor": ("batch", "layer"),
    "foreign profile": ("foreign_placement", "fitted_on", "domain"),
}
"""Dims of the rows of a frame."""

_DROPPED = ("dropped", "dropped without locality", "dropped by position", "sufficient factor")


def _frame(parallel: xr.Dataset, *kinds_of_rows: str) -> pd.DataFrame:
    parts = {kind: only(parallel, *_ROWS[kind]) for kind in kinds_of_rows}
    return kinds({kind: tidy(part, *_ROWS[kind]) for kind, part in parts.items() if part})


def _batches(batches: int) -> str:
    return "one batch" if batches == 1 else f"{count(batches)} batches" if batches else "no batch is full"


def _cluster(parallel: xr.Dataset) -> str:
    nodes = int(parallel.attrs["nodes"])
    return count(int(parallel.attrs["devices"]), "device") + (f" on {nodes} nodes" if nodes > 1 else "")


def advise(parallel: xr.Dataset) -> Recommendation:
    """For each kind of batches, from linear on through eplb, affinity and eplb-replicated, what waits least.

    The next takes the place of the one held if the interval of the paired difference of their slowest-device factors
    lies below 0. So what is simpler is kept unless it is shown to wait longer. Fitted placements are judged on other
    documents.
    """
    names = [name for name in _BY_EFFORT if name in parallel["placement"].values]
    kept, evidence = {}, []
    compared = False
    for batch in parallel["batch"].values.tolist():
        data = parallel.sel(batch=batch)
        known = [name for name in names if not isnan(data["slowest"].sel(placement=name).item())]
        if not known:
            evidence.append(f"{capital(batch)}: nothing is known, for no batch is full or nothing could be fitted.")
            continue
        compared = compared or len(known) > 1
        held = free = known[0]
        for name in known[1:]:
            if data["slowest_difference_high"].sel(placement=name, against=held).item() < 0:
                held = name
            free = free if name == "eplb-replicated" else held
        kept[batch] = held
        evidence.append(_of_batches(data, batch, held, free, known))
    if not compared:
        evidence.append("There is no other to compare with: fitted placements take two documents at least.")
        return Recommendation("Nothing to advise.", " ".join(evidence))
    on = f"on {count(int(parallel.attrs['devices']), 'device')}"
    if len(set(kept.values())) == 1:
        advice = f"{capital(_advised(next(iter(kept.values()))))}, {on}."
    else:
        advice = f"{capital(on)}: " + "; ".join(f"{batch}: {_advised(held)}" for batch, held in kept.items()) + "."
    unfitted = [name for name in names[1:] if np.isnan(parallel["slowest"].sel(placement=name)).all()]
    if unfitted:
        evidence.append(f"There was nothing to fit {', '.join(unfitted)} on.")
    return Recommendation(advice, " ".join(evidence))


def _advised(held: str) -> str:
    """A placement in words."""
    if held == "linear":
        return "experts in their order (linear), for no placement is shown to wait less"
    if held == "eplb-replicated":
        return "eplb with replicas of the busiest experts (eplb-replicated)"
    return held


def _of_batches(data: xr.Dataset, batch: str, held: str, free: str, known: list[str]) -> str:
    """What the layers wait for under the placement held, and what it and replicas take off."""
    slowest = data["slowest"]
    under_held = data.sel(placement=held)
    load = with_interval(under_held, "slowest")
    text = f"{capital(batch)}: under {held} the slowest device has {load} times the mean load"
    first = known[0]
    if held != first:
        text += f", {_less(data, held, first)} than {first} ({number(slowest.sel(placement=first).item())})"
    elif len(known) > 1:
        rest = min(known[1:], key=lambda name: slowest.sel(placement=name).item())
        text += f", under {rest}, the next best, {_less(data, rest, first)}"
    if "eplb-replicated" in known and free != first:
        text += f"; replicas make that {_less(data, 'eplb-replicated', free)} than {free}"
    null = under_held["slowest_null"].item()
    return text + ("" if isnan(null) else f"; without locality it would have {number(null)}") + "."


def _less(data: xr.Dataset, name: str, against: str) -> str:
    """The paired difference of two placements, such as "0.19±0.01 less"."""
    pair, variable = data.sel(placement=name, against=against), "slowest_difference"
    value, low, high = values(pair, variable, f"{variable}_low", f"{variable}_high")
    return f"{number(abs(value))}{plus_minus(value, low, high)} {'more' if value > 0 else 'less'}"


subject = Subject(play=play, blocks=blocks, section=SECTION, advise=advise, command=command)
