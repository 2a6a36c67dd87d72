"""Results as tidy data frames, a row a value with its interval and null: the CSV and JSON of each table and figure.

Column names carry the unit. Values keep six significant digits (`csv`, `json`), enough for any error bar.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures.schema import DIFFERENCE, EXPERT_ID, FRACTION

DIGITS = 6
SIZES = ("documents", "tokens", "pairs")
"""What a row rests on: the last columns."""

SHAPES = ("num_experts", "num_ids", "top_k", "total")
"""Coordinates that have no column: the metadata of a trace has them."""


def tidy(result: xr.Dataset, *dims: str) -> pd.DataFrame:
    """A result as rows: a row a combination of the dims, the first the slowest, a column a variable within them.

    Columns are the dims, coordinates that name a row in another way, the variables in the order of the result, those
    with fewer dims repeated, and `SIZES`. The unit is in the name: a fraction is in per cent, a difference of fractions
    in points, `_bits` are bits. A row without any value, such as that of an expert beyond the layer's, is left out.
    """
    result = _quantiles_apart(result, dims)
    shape = {dim: result.sizes[dim] for dim in dims}
    columns, filled = {}, []
    for name in _columns(result, dims):
        variable = result[name].variable
        column, scale = _in_unit(name, variable.attrs.get("units", ""))
        ordered = variable.transpose(*(dim for dim in dims if dim in variable.dims))
        repeated = ordered.values.reshape([size if dim in variable.dims else 1 for dim, size in shape.items()])
        values = pd.Series(np.broadcast_to(repeated, list(shape.values())).ravel())
        columns[column] = values if scale == 1 else scale * values
        if variable.attrs.get("units") == EXPERT_ID:
            columns[column] = values.astype("Int64")  # a whole number, or missing
        if name in result.data_vars and set(variable.dims) == set(dims):
            filled.append(column)
    index = pd.MultiIndex.from_product([result[dim].values.tolist() for dim in dims], names=list(dims))
    frame = pd.concat([index.to_frame(index=False), pd.DataFrame(columns)], axis=1)
    return frame.dropna(how="all", subset=filled or None).reset_index(drop=True)


def only(result: xr.Dataset, *dims: str) -> xr.Dataset:
    """The variables that have these dims, no fewer and no more, but for quantiles, which `tidy` sets apart."""
    return result[[name for name, variable in result.data_vars.items() if {*variable.dims} - {"quantile"} == {*dims}]]


def kinds(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Rows of several kinds in one frame, whose first column, `what`, says which; whole numbers stay whole."""
    whole = [
        frame.astype({name: "Int64" for name, kind in frame.dtypes.items() if kind.kind == "i"}).assign(what=what)
        for what, frame in frames.items()
    ]
    frame = pd.concat(whole, ignore_index=True)
    return frame[["what", *frame.columns.drop("what")]]


def _quantiles_apart(result: xr.Dataset, dims: Sequence[str]) -> xr.Dataset:
    """A variable a quantile, such as `x_quantile_95`, in place of those by quantile, unless rows are by quantile."""
    if "quantile" not in result.dims or "quantile" in dims:
        return result
    apart: dict[str, xr.DataArray] = {}
    for name, variable in result.data_vars.items():
        if "quantile" in variable.dims:
            by_quantile = zip(result["quantile"].values.tolist(), variable.transpose("quantile", ...), strict=True)
            apart |= {f"{name}_{100 * part:g}": values.drop_vars("quantile") for part, values in by_quantile}
        else:
            apart[str(name)] = variable
    return xr.Dataset(apart, {name: values for name, values in result.coords.items() if name != "quantile"})


def _columns(result: xr.Dataset, dims: Sequence[str]) -> list[str]:
    """Coordinates that name a row, variables, sizes."""
    within = [str(name) for name, variable in result.variables.items() if set(variable.dims) <= set(dims)]
    names = [name for name in within if name in result.coords and result[name].dims]
    values = [name for name in within if name in result.data_vars and name not in SIZES]
    sizes = [name for name in SIZES if name in within and name not in dims]
    return [*(name for name in names if name not in {*dims, *SHAPES, *SIZES}), *values, *sizes]


def _in_unit(name: str, unit: str) -> tuple[str, int]:
    """Name of a column, and what its values are multiplied by."""
    if unit in (FRACTION, DIFFERENCE):
        return f"{name}_{'percent' if unit == FRACTION else 'points'}", 100
    return (f"{name}_bits" if unit == "bits" and "bits" not in name.split("_") else name), 1


def csv(frame: pd.DataFrame) -> str:
    """The frame as CSV, RFC 4180, numbers to six digits, empty where a value is missing."""
    text: str = frame.to_csv(index=False, float_format=f"%.{DIGITS}g", lineterminator="\n")
    return text


def json(frame: pd.DataFrame) -> str:
    """The frame as a JSON list of objects, ``null`` where a value is missing."""
    rows = [
        {name: _plain(value) for name, value in row.items()} for row in frame.astype(object).to_dict(orient="records")
    ]
    return json_module.dumps(rows, indent=1, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    if value is None or value is pd.NA or (isinstance(value, float) and not np.isfinite(value)):
        return None
    if isinstance(value, float | np.floating):
        return float(f"{value:.{DIGITS}g}")
    return value.item() if isinstance(value, np.generic) else value
