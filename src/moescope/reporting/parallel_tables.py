"""Expert parallelism as tables and one data frame: devices, drops, what tokens reach, and foreign profiles."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

import numpy as np
import pandas as pd
import xarray as xr

from moescope.reporting.numbers import MISSING, count, number, percent, spread
from moescope.reporting.tables import Cell, Row, Section, Table
from moescope.reporting.visible import visible

SHOWN_FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
"""Capacity factors of the table; the frame has all of them."""

PLACES_FACTOR = 1.25
"""Capacity factor at which drops are shown by domain and position."""


def parallel_tables(parallel: xr.Dataset, layers: Sequence[int]) -> tuple[Table, ...]:
    """The tables of a result; the frame of the first holds everything.

    Args:
        parallel: Of `moescope.parallel`.
        layers: Layers to show.
    """
    tables = [devices_table(parallel, layers), drops_table(parallel, layers), reach_table(parallel, layers)]
    if "foreign" in parallel:
        tables.append(foreign_table(parallel))
    return (*tables, drop_places_table(parallel, layers))


def devices_table(parallel: xr.Dataset, layers: Sequence[int]) -> Table:
    """Over-subscription: a section a kind of batches, a row a placement; then what there would be without locality."""
    sections = []
    for batch in parallel["batch"].values.tolist():
        data = parallel.sel(batch=batch)
        rows = []
        for name in parallel["placement"].values.tolist():
            at = data.sel(placement=name)
            cells = [_with_interval(at.sel(layer=layer), "over_subscription") for layer in layers]
            cells.append(_with_interval(at, "slowest"))
            cells.append(Cell(_factor(float(at["slowest_quantile"].isel(quantile=-1)))))
            cells += [Cell(_factor(float(at[f"slowest_{null}"]))) for null in ("own", "shuffled", "uniform")]
            rows.append(Row(name, tuple(cells)))
        sections.append(Section(f"{batch}: {_batches(int(data['batches']))}", tuple(rows)))
    return Table(
        "parallel",
        f"Largest load over mean load of {_cluster(parallel)}, over batches",
        "placement",
        (*(f"layer {layer}" for layer in layers), "all layers", "one in 20", "own fit", "any order", "uniform"),
        tuple(sections),
        groups=(("over-subscription", len(layers)), ("over all layers, each waiting for its slowest device", 5)),
        notes=(
            "Placements are fitted on one half of the documents and judged on the other; own fit: on those judged.",
            "one in 20: exceeded by one batch in twenty. any order: the same tokens without locality. "
            "± the larger side of a 95 % interval, clustered by document.",
            *([_TOO_LARGE] if not parallel["batches"].all() else []),
        ),
        frame=parallel_frame(parallel),
    )


_TOO_LARGE = (
    "No batch is full: neither half of the documents has as many tokens, or sequences, as it takes; "
    "choose smaller ones with --prefill and --decode."
)


def drops_table(parallel: xr.Dataset, layers: Sequence[int]) -> Table:
    """Dropped assignments: a section a kind of batches, a row a capacity factor."""
    sections = []
    for batch in parallel["batch"].values.tolist():
        data = parallel.sel(batch=batch).isel(domain=0)
        rows = []
        for factor in SHOWN_FACTORS:
            cells = []
            for layer in layers:
                at = data.sel(layer=layer, capacity_factor=factor)
                value, low, high = (float(at[f"dropped{end}"]) for end in ("", "_low", "_high"))
                cells.append(Cell(percent(value, 2), spread(value, low, high, 2)))
                cells.append(Cell(percent(float(at["dropped_shuffled"]), 2)))
            rows.append(Row(f"{factor:g}", tuple(cells)))
        needed = [
            Cell(_factor(float(data[name].sel(layer=layer))))
            for layer in layers
            for name in ("sufficient_factor", "sufficient_factor_shuffled")
        ]
        rows.append(Row("for < 0.1 %", tuple(needed)))
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
        frame=drops_frame(parallel),
    )


def drop_places_table(parallel: xr.Dataset, layers: Sequence[int]) -> Table:
    """Whose assignments drop at one capacity factor: a row a domain, then a row a stretch of the sequence."""
    sections = []
    for batch in parallel["batch"].values.tolist():
        data = parallel.sel(batch=batch, capacity_factor=PLACES_FACTOR, layer=list(layers))
        rows = []
        for domain in parallel["domain"].values.tolist():
            ends = [data[f"dropped{end}"].sel(domain=domain).values.tolist() for end in ("", "_low", "_high")]
            cells = [
                Cell(percent(value, 2), spread(value, low, high, 2)) for value, low, high in zip(*ends, strict=True)
            ]
            rows.append(Row(visible(domain), tuple(cells)))
        sections.append(Section(f"{batch}, by domain", tuple(rows)))
        rows = []
        for first in parallel["position"].values.tolist():
            shares = data["dropped_by_position"].sel(position=first).values.tolist()
            if not all(map(isnan, shares)):
                label = f"{count(first)}" if first == 0 else f"{count(first)}–{count(2 * first)}"
                rows.append(Row(label, tuple(Cell(percent(share, 2)) for share in shares)))
        if rows:
            sections.append(Section(f"{batch}, by place of the token in the sequence", tuple(rows)))
    return Table(
        "drop_places",
        f"Assignments dropped at capacity factor {PLACES_FACTOR:g}, %",
        "tokens",
        tuple(f"layer {layer}" for layer in layers),
        tuple(sections),
        notes=("± the larger side of a 95 % interval, clustered by document. The place of a token counts from 0.",),
        frame=drops_frame(parallel),
    )


def reach_table(parallel: xr.Dataset, layers: Sequence[int]) -> Table:
    """Devices, nodes and bytes: a section for each of them, a row a placement; of the first kind of batches."""
    data = parallel.isel(batch=0)
    names = parallel["placement"].values.tolist()
    kinds = [("devices_reached", "devices a token")]
    if int(parallel.attrs["nodes"]) > 1:
        kinds.append(("nodes_reached", "nodes a token"))
    sections = []
    for name, title in kinds:
        rows = []
        for placement in names:
            at = data.sel(placement=placement)
            cells = [_with_interval(at.sel(layer=layer), name) for layer in layers]
            rows.append(Row(placement, (*cells, Cell(_factor(float(at[name].mean()))))))
        uniform = data[f"{name}_uniform"].isel(placement=0)
        cells = [Cell(_factor(float(uniform.sel(layer=layer)))) for layer in layers]
        rows.append(Row(f"uniform routing, {names[0]}", (*cells, Cell(_factor(float(uniform.mean()))))))
        sections.append(Section(title, tuple(rows)))
    for name, title in (("within", "KiB within nodes"), ("between", "KiB between nodes")):
        if f"bytes_{name}_nodes" in data and (name == "within" or int(parallel.attrs["nodes"]) > 1):
            kibibytes = data[f"bytes_{name}_nodes"] / 1024
            rows = [
                Row(
                    placement,
                    (
                        *(Cell(number(float(kibibytes.sel(placement=placement, layer=layer)))) for layer in layers),
                        Cell(number(float(kibibytes.sel(placement=placement).mean()))),
                    ),
                )
                for placement in names
            ]
            sections.append(Section(f"{title}, a token and layer, one way", tuple(rows)))
    unknown = "bytes_within_nodes" not in data
    return Table(
        "reach",
        f"What a token must reach on {_cluster(parallel)}, mean",
        "placement",
        (*(f"layer {layer}" for layer in layers), "mean of all"),
        tuple(sections),
        notes=(
            "± the larger side of a 95 % interval, clustered by document.",
            *(["The trace does not say how large a hidden state is: --hidden-size gives bytes."] if unknown else []),
        ),
        frame=reach_frame(parallel),
    )


def foreign_table(parallel: xr.Dataset) -> Table:
    """What a foreign profile costs: a section a placement, a row a domain fitted on, a column a domain judged on."""
    domains = parallel["domain"].values.tolist()
    sections = []
    for name in parallel["foreign_placement"].values.tolist():
        data = parallel.sel(foreign_placement=name)
        rows = tuple(
            Row(
                visible(fitted),
                tuple(Cell(_factor(float(data["foreign"].sel(fitted_on=fitted, domain=domain)))) for domain in domains),
            )
            for fitted in domains
        )
        sections.append(Section(name, rows))
    return Table(
        "foreign",
        f"Largest load over mean load of {_cluster(parallel)}, all assignments of a domain together, over all layers",
        "fitted on",
        tuple(map(visible, domains)),
        tuple(sections),
        groups=(("judged on", len(domains)),),
        notes=("Fitted and judged on different documents. The diagonal is a stale profile, the rest a foreign one.",),
        frame=foreign_frame(parallel),
    )


def parallel_frame(parallel: xr.Dataset) -> pd.DataFrame:
    """All of a result: a row a (what, placement, batch, layer …); `what` says which columns hold."""
    parts = {
        "over-subscription": _with_quantiles(
            _frame(parallel, "over_subscription", ("", "_low", "_high", "_own", "_shuffled", "_uniform")),
            parallel,
            "over_subscription",
            ["placement", "batch", "layer"],
        ),
        "over all layers": _with_quantiles(
            _frame(parallel, "slowest", ("", "_low", "_high", "_own", "_shuffled", "_uniform")),
            parallel,
            "slowest",
            ["placement", "batch"],
        ),
        "reached": reach_frame(parallel),
        "dropped": drops_frame(parallel),
        "foreign profile": foreign_frame(parallel),
    }
    for what, part in parts.items():
        part.insert(0, "what", what)
    return pd.concat([part for part in parts.values() if len(part)], ignore_index=True)


def drops_frame(parallel: xr.Dataset) -> pd.DataFrame:
    """A row a (batch, domain, layer, capacity factor), then a row a (batch, position, layer, capacity factor), then a
    row a (batch, layer) with the sufficient factor.
    """
    names = ["dropped", "dropped_low", "dropped_high"]
    keys = ["batch", "domain", "layer", "capacity_factor"]
    by_domain = _tidy(parallel, names, keys)
    whole = _tidy(parallel, ["dropped_shuffled", "dropped_uniform"], ["batch", "layer", "capacity_factor"])
    whole["domain"] = parallel["domain"].values[0]
    by_domain = by_domain.merge(whole, on=keys, how="left")
    by_position = _tidy(parallel, ["dropped_by_position"], ["batch", "position", "layer", "capacity_factor"])
    by_position = by_position.rename(columns={"dropped_by_position": "dropped", "position": "first_position"})
    frame = pd.concat([by_domain, by_position[by_position["dropped"].notna()]], ignore_index=True)
    columns = [name for name in frame.columns if name.startswith("dropped")]
    frame[columns] *= 100
    frame = frame.rename(columns={name: f"{name}_percent" for name in columns})
    needed = _tidy(parallel, ["sufficient_factor", "sufficient_factor_shuffled"], ["batch", "layer"])
    return pd.concat([frame, needed], ignore_index=True)


def reach_frame(parallel: xr.Dataset) -> pd.DataFrame:
    """A row a (placement, batch, layer)."""
    names = [f"{what}_reached{end}" for what in ("devices", "nodes") for end in ("", "_low", "_high", "_uniform")]
    names += [name for name in ("bytes_within_nodes", "bytes_between_nodes") if name in parallel]
    return _tidy(parallel, names, ["placement", "batch", "layer"])


def foreign_frame(parallel: xr.Dataset) -> pd.DataFrame:
    """A row a (placement, domain fitted on, domain judged on); empty if nothing of the kind was asked for."""
    if "foreign" not in parallel:
        return pd.DataFrame()
    names = ["foreign", "foreign_low", "foreign_high"]
    frame = _tidy(parallel, names, ["foreign_placement", "fitted_on", "domain"])
    new = {"foreign_placement": "placement", "foreign": "slowest", "foreign_low": "slowest_low"}
    return frame.rename(columns=new | {"foreign_high": "slowest_high"})


def _frame(parallel: xr.Dataset, name: str, ends: Sequence[str]) -> pd.DataFrame:
    dims = [str(dim) for dim in parallel[name].dims]
    return _tidy(parallel, [f"{name}{end}" for end in ends], dims)


def _with_quantiles(frame: pd.DataFrame, parallel: xr.Dataset, name: str, dims: list[str]) -> pd.DataFrame:
    for end in ("", "_shuffled"):
        if f"{name}{end}_quantile" in parallel:
            values = parallel[f"{name}{end}_quantile"].transpose(*dims, "quantile").values
            for at, quantile in enumerate(parallel["quantile"].values.tolist()):
                frame[f"{name}{end}_quantile_{100 * quantile:g}"] = values[..., at].ravel()
    frame["batches"] = frame["batch"].map(parallel["batches"].to_series())
    return frame


def _tidy(parallel: xr.Dataset, names: list[str], dims: list[str]) -> pd.DataFrame:
    index = pd.MultiIndex.from_product([parallel[dim].values.tolist() for dim in dims], names=dims)
    columns = {name: parallel[name].transpose(*dims).values.ravel() for name in names}
    return pd.DataFrame(columns, index=index).reset_index()


def _with_interval(at: xr.Dataset, name: str) -> Cell:
    value, low, high = (float(at[f"{name}{end}"]) for end in ("", "_low", "_high"))
    half = np.fmax(value - low, high - value)
    return Cell(_factor(value), "" if isnan(half) or half == 0 else f"±{number(half)}")


def _factor(value: float) -> str:
    return MISSING if isnan(value) else f"{value:.2f}"


def _batches(batches: int) -> str:
    return "one batch" if batches == 1 else f"{count(batches)} batches" if batches else "no batch is full"


def _cluster(parallel: xr.Dataset) -> str:
    devices, nodes = int(parallel.attrs["devices"]), int(parallel.attrs["nodes"])
    on = f" on {nodes} nodes" if nodes > 1 else ""
    return f"{devices} {'device' if devices == 1 else 'devices'}{on}"
