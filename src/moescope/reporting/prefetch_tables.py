"""Prefetching as tables and a data frame: recall by experts loaded, and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

import pandas as pd
import xarray as xr

from moescope.reporting.numbers import MISSING, percent, spread
from moescope.reporting.tables import Cell, Row, Section, Table

NAMES = {
    "lookahead": "router, {} ahead",
    "transitions": "transitions, {} ahead",
    "previous": "previous token",
    "domain": "popularity in the domain",
    "popularity": "popularity",
}
"""What the kinds of predictors are called, with the number of layers ahead."""

RECORD_AGAIN = (
    "No lookahead was recorded: `moescope record … --lookahead 1,2,10` adds what the routers of later layers say."
)


def predictor_names(prefetch: xr.Dataset) -> list[str]:
    """What the predictors of a result are called.

    Args:
        prefetch: Of `moescope.prefetch`.
    """
    pairs = zip(prefetch["kind"].values.tolist(), prefetch["distance"].values.tolist(), strict=True)
    return [NAMES[kind].format("1 layer" if distance == 1 else f"{distance} layers") for kind, distance in pairs]


def default_loaded(prefetch: xr.Dataset) -> tuple[int, ...]:
    """Numbers of experts to show: k, 2k, 4k … and all."""
    most, top_k = int(prefetch["loaded"].max()), int(prefetch["top_k"].max())
    return tuple(sorted({min(top_k * 2**power, most) for power in range(4)} | {most}))


def prefetch_tables(prefetch: xr.Dataset, layers: Sequence[int], loaded: Sequence[int] | None = None) -> list[Table]:
    """Recall over the layers together by experts loaded; then recall and gain at as many as a token needs, by layer.

    Args:
        prefetch: Of `moescope.prefetch`.
        layers: Layers of the second table.
        loaded: Numbers of experts loaded; None for k, 2k, 4k … and all.
    """
    return [_by_loaded(prefetch, default_loaded(prefetch) if loaded is None else loaded), _by_layer(prefetch, layers)]


def prefetch_frame(prefetch: xr.Dataset) -> pd.DataFrame:
    """A row a (predictor, layer, experts loaded); the layer is empty for all of them together."""
    values = ("recall", "low", "high", "gain", "gain_low", "gain_high")
    drop = ["num_experts", "top_k"]
    together = prefetch[[f"model_{name}" for name in (*values, "uniform")]].drop_vars(drop, errors="ignore")
    together = together.rename({f"model_{name}": name for name in (*values, "uniform")})
    parts = [together.to_dataframe().reset_index(), prefetch[[*values, "uniform"]].to_dataframe().reset_index()]
    frame = pd.concat([parts[0].assign(layer=pd.NA), parts[1]], ignore_index=True)
    frame["layer"] = frame["layer"].astype("Int64")
    columns = {}
    for name in ("kind", "distance", "layer"):
        columns[{"kind": "predictor", "distance": "layers_ahead"}.get(name, name)] = frame[name]
    columns["experts_loaded"] = frame["loaded"]
    for name in (*values, "uniform"):
        columns[f"{name}_percent"] = 100 * frame[name]
    tidy = pd.DataFrame(columns)
    return tidy[tidy["recall_percent"].notna()].reset_index(drop=True)


def _by_loaded(prefetch: xr.Dataset, loaded: Sequence[int]) -> Table:
    data = prefetch.sel(loaded=list(loaded))
    rows = [
        Row(
            name,
            tuple(
                _share(*(float(data[f"model_{v}"].isel(predictor=p, loaded=at)) for v in ("recall", "low", "high")))
                for at in range(len(loaded))
            ),
        )
        for p, name in enumerate(predictor_names(prefetch))
    ]
    rows.append(Row("at random", tuple(Cell(percent(value)) for value in data["model_uniform"].values.tolist())))
    pooled = prefetch.attrs["pooled_layers"]
    notes = [
        f"The layers that every predictor reaches, together: {_listed(pooled)}. {_intervals(prefetch)}",
        f"popularity, transitions: learnt on other {_plural(prefetch)} than they predict.",
    ]
    if prefetch.attrs["lookahead_recorded"]:
        longest = prefetch["model_recall"].where(prefetch["kind"] == "lookahead").max("predictor").notnull().sum()
        if 0 < int(longest) < int(prefetch["loaded"].max()):
            notes.append(f"router: the recorded lists end after {int(longest)} experts.")
    else:
        notes.append(RECORD_AGAIN)
    return Table(
        "prefetch",
        "Needed experts that are loaded, %, by number of experts loaded",
        "predictor",
        tuple(map(str, loaded)),
        (Section("", tuple(rows)),),
        groups=(("experts loaded", len(loaded)),),
        notes=tuple(notes),
        frame=prefetch_frame(prefetch),
    )


def _by_layer(prefetch: xr.Dataset, layers: Sequence[int]) -> Table:
    names = predictor_names(prefetch)
    recall, gain, uniform = [], [], []
    for layer in layers:
        at = prefetch.sel(layer=layer)
        at = at.sel(loaded=min(int(at["top_k"]), int(at["num_experts"])))
        recall.append(
            [_share(*map(float, v)) for v in zip(*(at[n].values for n in ("recall", "low", "high")), strict=True)]
        )
        gain.append(
            [_points(*map(float, v)) for v in zip(*(at[f"gain{n}"].values for n in ("", "_low", "_high")), strict=True)]
        )
        uniform.append(Cell(percent(float(at["uniform"]))))
    sections = [
        Section(
            "",
            (
                *(Row(name, tuple(cells[p] for cells in recall)) for p, name in enumerate(names)),
                Row("at random", tuple(uniform)),
            ),
        )
    ]
    others = [p for p, kind in enumerate(prefetch["kind"].values.tolist()) if kind != "popularity"]
    if others:
        rows = tuple(Row(names[p], tuple(cells[p] for cells in gain)) for p in others)
        sections.append(Section("points above popularity", rows))
    return Table(
        "prefetch_by_layer",
        "Needed experts that are loaded, %, if as many are loaded as a token chooses",
        "predictor",
        tuple(f"layer {layer}" for layer in layers),
        tuple(sections),
        notes=(_intervals(prefetch),),
        frame=prefetch_frame(prefetch),
    )


def _share(value: float, low: float, high: float) -> Cell:
    return Cell(percent(value), spread(value, low, high))


def _points(value: float, low: float, high: float) -> Cell:
    if isnan(value):
        return Cell(MISSING)
    sign = "+" if value > 0 else "−" if value < 0 else ""
    half = max(value - low, high - value)
    return Cell(f"{sign}{percent(abs(value))}", "" if isnan(half) or not half else f"±{percent(half)}")


def _intervals(prefetch: xr.Dataset) -> str:
    return f"± the larger side of a 95 % interval, over {_plural(prefetch)}."


def _plural(prefetch: xr.Dataset) -> str:
    return "documents" if prefetch.attrs["unit"] == "document" else "stretches of the only document"


def _listed(layers: Sequence[int]) -> str:
    if not layers:
        return "there is none"
    contiguous = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if contiguous and len(layers) > 2 else ", ".join(map(str, layers))
