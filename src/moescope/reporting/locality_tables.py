"""Locality as tables and data frames: excess over each null, the curve over distance, and runs."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

import pandas as pd
import xarray as xr

from moescope.measures.locality import ALL_DOMAINS, LONGEST_RUN
from moescope.reporting.numbers import MISSING, percent, spread
from moescope.reporting.tables import SIGNIFICANT, Cell, Row, Section, Table, describe_any
from moescope.reporting.visible import visible

SHOWN_NULLS = {"popularity": "popularity", "document": "any order", "words": "same words"}
"""Nulls of the table with what they are called; uniform routing is in the frame."""

RUN_BINS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 8), (9, 16), (17, 32), (33, LONGEST_RUN))


def locality_table(locality: xr.Dataset, layers: Sequence[int]) -> Table:
    """The rate, and by how many points it exceeds each null: a row a domain, four columns a layer.

    Args:
        locality: Of `moescope.locality`.
        layers: Layers to show.
    """
    data = locality.sel(layer=list(layers))
    domains = data["domain"].values.tolist()
    sections = []
    for kind in _kinds(data):
        name = "first choice" if kind == "first" else describe_any(int(data["top_k"].values.max()))
        sections.append(
            Section(name, tuple(Row(visible(d), _cells(data.sel(domain=d, pairs="all", kind=kind))) for d in domains))
        )
        pairs = [p for p in ("equal ids", "different ids") if data["pairs_counted"].sel(pairs=p).sum() > 0]
        if pairs:
            whole = data.sel(domain=ALL_DOMAINS, kind=kind)
            rows = tuple(Row(f"{p} {ALL_DOMAINS}", _cells(whole.sel(pairs=p))) for p in pairs)
            sections.append(Section(f"{name}, by the token ids of the pair", rows))
    return Table(
        "locality",
        "Repeats of neighbours, %, and points above what each null predicts",
        "domain",
        ("rate", *(f"above {name}" for name in SHOWN_NULLS.values())) * len(layers),
        tuple(sections),
        groups=tuple((f"layer {layer}", 1 + len(SHOWN_NULLS)) for layer in layers),
        notes=(
            "popularity: two tokens of the domain. any order: two tokens of the document. same words: tokens with the "
            "same ids in other documents.",
            f"± the larger side of a 95 % interval, clustered by document. * not zero (false discovery rate "
            f"{percent(SIGNIFICANT, 0)} %).",
            *(sentence for layer in layers if (sentence := locality_sentence(locality, layer))),
        ),
        frame=locality_frame(data),
    )


def locality_sentence(locality: xr.Dataset, layer: int) -> str:
    """How much of the repeats of a layer its words explain, in plain words; empty if the trace has no token ids."""
    kind = _kinds(locality)[0]
    at = locality.sel(layer=layer, domain=ALL_DOMAINS, pairs="all", kind=kind)
    excess, low, high = (float(at[name].sel(null="words")) for name in ("excess", "excess_low", "excess_high"))
    if isnan(excess):
        return ""
    rate, uniform = float(at["rate"]), float(at["expected"].sel(null="uniform"))
    what = "the same first choice" if kind == "first" else "an expert in common"
    less = "less" if excess < 0 else "more"
    interval = "" if isnan(low) else f" ({_points(low)} to {_points(high)})"
    return (
        f"Layer {layer}: {percent(rate)} % of neighbours have {what}; uniform routing gives {percent(uniform)} %, the "
        f"same words elsewhere {percent(float(at['expected'].sel(null='words')))} %: {percent(abs(excess))} points "
        f"{less} than these words would anyway{interval}."
    )


def lags_table(locality: xr.Dataset, layers: Sequence[int]) -> Table:
    """The rate by distance, above the document in any order: a row a distance, a column a layer."""
    data = locality.sel(layer=list(layers), domain=ALL_DOMAINS)
    sections = []
    for kind in _kinds(data):
        at = data.sel(kind=kind)
        name = "first choice" if kind == "first" else describe_any(int(data["top_k"].values.max()))
        for title, value, ends in (
            (name, "lag_rate", ("lag_low", "lag_high")),
            (f"{name}, points above any order", "lag_excess", ("lag_excess_low", "lag_excess_high")),
        ):
            rows = tuple(
                Row(
                    str(lag),
                    tuple(
                        _signed(*(float(at[n].sel(layer=layer, lag=lag)) for n in (value, *ends)))
                        if value == "lag_excess"
                        else _rate(*(float(at[n].sel(layer=layer, lag=lag)) for n in (value, *ends)))
                        for layer in layers
                    ),
                )
                for lag in data["lag"].values.tolist()
            )
            sections.append(Section(title, rows))
    return Table(
        "lags",
        "Repeats by distance, %",
        "tokens apart",
        tuple(f"layer {layer}" for layer in layers),
        tuple(sections),
        notes=("any order: two tokens of the document. ± the larger side of a 95 % interval, clustered by document.",),
        frame=lags_frame(locality.sel(layer=list(layers))),
    )


def runs_table(locality: xr.Dataset, layers: Sequence[int]) -> Table:
    """Lengths of the runs of one first choice, against independent repeats: a row a length, two columns a layer."""
    data = locality.sel(layer=list(layers))
    rows = []
    for start, end in RUN_BINS:
        label = str(start) if start == end else f"{start}–{end}" if end < LONGEST_RUN else f"{start} or more"
        cells = []
        for layer in layers:
            at = data.sel(layer=layer, run=slice(start, end))
            cells += [Cell(percent(float(at[name].sum(skipna=False)))) for name in ("runs", "runs_geometric")]
        rows.append(Row(label, tuple(cells)))
    mean = []
    for layer in layers:
        value, low, high = (float(data[f"run_mean{end}"].sel(layer=layer)) for end in ("", "_low", "_high"))
        half = max(value - low, high - value)
        mean += [Cell(MISSING if isnan(value) else f"{value:.2f}", "" if isnan(half) else f"±{half:.2f}"), Cell("")]
    return Table(
        "runs",
        "Runs of one first choice by length, % of runs",
        "tokens",
        ("measured", "independent") * len(layers),
        (Section("", tuple(rows)), Section("mean length, tokens", (Row("all", tuple(mean)),))),
        groups=tuple((f"layer {layer}", 2) for layer in layers),
        notes=("independent: each token repeats the one before with the measured rate, whatever came before that.",),
        frame=runs_frame(data),
    )


def locality_frame(locality: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, pairs, null, layer, kind)."""
    names = {name: f"{name}_percent" for name in ("rate", "low", "high", "expected")}
    names |= {name: f"{name}_points" for name in ("excess", "excess_low", "excess_high")}
    frame = _tidy(locality, [*names, "p_value", "q_value"], ["domain", "pairs", "null", "layer", "kind"])
    frame[list(names)] *= 100
    return frame.rename(columns=names)[frame["rate"].notna()].reset_index(drop=True)


def lags_frame(locality: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, layer, kind, lag)."""
    names = {f"lag_{name}": f"{name}_percent" for name in ("rate", "low", "high", "expected")}
    names |= {f"lag_{name}": f"{name}_points" for name in ("excess", "excess_low", "excess_high")}
    frame = _tidy(locality, list(names), ["domain", "layer", "kind", "lag"])
    frame[list(names)] *= 100
    return frame.rename(columns=names)[frame["lag_rate"].notna()].reset_index(drop=True)


def runs_frame(locality: xr.Dataset) -> pd.DataFrame:
    """A row a (layer, run)."""
    frame = _tidy(locality, ["runs", "runs_geometric"], ["layer", "run"])
    frame[["runs", "runs_geometric"]] *= 100
    frame = frame.rename(columns={"runs": "runs_percent", "runs_geometric": "independent_percent"})
    return frame[frame["runs_percent"].notna()].reset_index(drop=True)


def _tidy(data: xr.Dataset, names: list[str], dims: list[str]) -> pd.DataFrame:
    """Variables, repeated along the dims they lack, as columns."""
    shape = {dim: data[dim].values.tolist() for dim in dims}
    full = xr.broadcast(*(data[name].drop_vars([c for c in data[name].coords if c not in dims]) for name in names))
    index = pd.MultiIndex.from_product(list(shape.values()), names=dims)
    columns = {name: values.transpose(*dims).values.ravel() for name, values in zip(names, full, strict=True)}
    return pd.DataFrame(columns, index=index).reset_index()


def _kinds(data: xr.Dataset) -> list[str]:
    """The kinds that are known, and say different things."""
    kinds = [k for k in data["kind"].values.tolist() if data["rate"].sel(kind=k).notnull().any()]
    return kinds[:1] if int(data["top_k"].values.max()) == 1 else kinds or ["any"]


def _cells(at: xr.Dataset) -> tuple[Cell, ...]:
    cells = []
    for layer in at["layer"].values.tolist():
        one = at.sel(layer=layer)
        cells.append(_rate(*(float(one[name]) for name in ("rate", "low", "high"))))
        for null in SHOWN_NULLS:
            of = one.sel(null=null)
            marked = float(of["q_value"]) < SIGNIFICANT
            cells.append(_signed(*(float(of[n]) for n in ("excess", "excess_low", "excess_high")), marked=marked))
    return tuple(cells)


def _rate(value: float, low: float, high: float) -> Cell:
    return Cell(percent(value), spread(value, low, high))


def _signed(value: float, low: float, high: float, *, marked: bool = False) -> Cell:
    if isnan(value):
        return Cell(MISSING)
    half = max(value - low, high - value)
    return Cell(_points(value), "" if isnan(half) else f"±{100 * half:.1f}", "*" if marked else "")


def _points(value: float) -> str:
    """A difference of rates, in points, with its sign."""
    text = f"{100 * abs(value):.1f}"
    return text if text == "0.0" else f"{'+' if value > 0 else '−'}{text}"
