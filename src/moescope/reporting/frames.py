"""Results as tidy data frames, a row a value with its interval and null: the CSV and JSON of each table and figure.

Column names carry the unit. Values keep six significant digits (`csv`, `json`), enough for any error bar.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

DIGITS = 6


def tidy(data: xr.Dataset, names: Sequence[str], dims: Sequence[str]) -> pd.DataFrame:
    """Variables, repeated along the dims they lack, as columns; a row a combination of the dims."""
    full = xr.broadcast(*(data[name].drop_vars([c for c in data[name].coords if c not in dims]) for name in names))
    index = pd.MultiIndex.from_product([data[dim].values.tolist() for dim in dims], names=list(dims))
    columns = {name: values.transpose(*dims).values.ravel() for name, values in zip(names, full, strict=True)}
    return pd.DataFrame(columns, index=index).reset_index()


def in_percent(frame: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """The frame with these columns in per cent, under their new names."""
    frame[list(names)] *= 100
    return frame.rename(columns=names)


def with_sizes(frame: pd.DataFrame, data: xr.Dataset) -> pd.DataFrame:
    """The frame with what is known of the size of each domain: documents, tokens, pairs."""
    sizes = {
        name: frame["domain"].map(dict(zip(data["domain"].values.tolist(), data[name].values.tolist(), strict=True)))
        for name in ("documents", "tokens", "pairs")
        if name in data.variables
    }
    return frame.assign(**sizes).reset_index(drop=True)


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
