"""Cells made of a result: a value, the larger side of its interval, and a mark where it differs from its null."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from math import isnan, nan
from typing import Any

import xarray as xr

from moescope.measures.schema import DIFFERENCE, EXPERT_ID, FRACTION
from moescope.reporting.numbers import MISSING, bits, count, number, percent, plus_minus, points, spread
from moescope.reporting.tables import SIGNIFICANT, Cell, Row, Section, grid
from moescope.reporting.visible import visible

BY_DOCUMENT = "± the larger side of a 95 % interval, by document."
CLUSTERED = "± the larger side of a 95 % interval, clustered by document."

FDR = f"false discovery rate {percent(SIGNIFICANT, 0)} %"
"""Of what a star, a dot or bold print marks."""

_DIGITS = {FRACTION: 1, DIFFERENCE: 1, "bits": 4}


def values(place: xr.Dataset, *names: str) -> list[float]:
    """Variables of one place of a result, as numbers."""
    return [float(place[name]) for name in names]


def mark(q_value: xr.DataArray | float) -> str:
    """``*`` where a test found something."""
    return "*" if float(q_value) < SIGNIFICANT else ""


def cell(place: xr.Dataset, name: str, digits: int | None = None) -> Cell:
    """A value in its unit, with the larger side of its interval and the mark of its test, of which some may be missing.

    The place has no dims left; there are `digits` after the point, None for as many as its unit usually has.
    """
    beside = (place[f"{name}_{end}"].item() if f"{name}_{end}" in place else nan for end in ("low", "high", "q"))
    return _in_unit(place[name].attrs.get("units", "1"), digits, place[name].item(), *beside)


def with_interval(place: xr.Dataset, name: str) -> str:
    """A value and the larger side of its interval, as a sentence has them."""
    shown = cell(place, name)
    return shown.value + shown.spread


def rows_of(data: xr.Dataset, dim: str, names: Sequence[str]) -> tuple[Row, ...]:
    """A row a label of the one dim left, and in it a cell a variable."""
    return grid(data[dim].values.tolist(), names, lambda label, name: cell(data.sel({dim: label}), name))


def grid_of_pairs(data: xr.Dataset, row: str, column: str, pairs: Collection[tuple[Any, str]]) -> tuple[Row, ...]:
    """A row a label of one dim, in it a cell for each pair of a label of another dim and a variable."""
    labels = data[row].values.tolist()
    return grid(labels, pairs, lambda label, pair: cell(data.sel({row: label, column: pair[0]}), pair[1]))


def by_layer(
    data: xr.Dataset,
    rows: Callable[[xr.Dataset], Iterable[Row]],
    title: Callable[[xr.Dataset], str] = lambda of_layer: "",
) -> tuple[Section, ...]:
    """A section a layer, with the rows and the rest of the title that are made of it."""
    layers = (data.sel(layer=layer) for layer in data["layer"].values)
    return tuple(Section(f"layer {int(one['layer'])}{title(one)}", tuple(rows(one))) for one in layers)


def grid_of(data: xr.Dataset, row: str, column: str, name: str, digits: int | None = None) -> tuple[Row, ...]:
    """A row a label of one dim, in it the cell of a variable a label of another dim."""
    unit = data[name].attrs.get("units", "1")
    tables = [data[name].transpose(row, column).values.tolist()]
    for ending in ("low", "high", "q"):
        beside = data.get(f"{name}_{ending}", data[name] * nan)
        tables.append(beside.transpose(row, column).values.tolist())
    return tuple(
        Row(visible(str(label)), tuple(_in_unit(unit, digits, *numbers) for numbers in zip(*columns, strict=True)))
        for label, *columns in zip(data[row].values.tolist(), *tables, strict=True)
    )


def _in_unit(unit: str, digits: int | None, value: float, low: float, high: float, q: float) -> Cell:
    digits = _DIGITS.get(unit, 2) if digits is None else digits
    if isinstance(value, int):
        return Cell(count(value))
    if isnan(value) and unit in (DIFFERENCE, EXPERT_ID):
        return Cell(MISSING)
    if unit == FRACTION:
        text, beside = percent(value, digits), spread(value, low, high, digits)
    elif unit == DIFFERENCE:
        half = 100 * max(value - low, high - value)
        text, beside = points(value, digits), "" if isnan(half) else f"±{half:.{digits}f}"
    else:
        text = number(value, 0 if unit == EXPERT_ID else digits)
        beside = plus_minus(value, low, high, digits)
    return Cell(text, beside, mark(q))


def divergence_sections(data: xr.Dataset, row: str, name: str) -> tuple[Section, Section, Section]:
    """A divergence by label and layer, what sampling alone would give, and the interval of the true divergence."""
    measured = data.drop_vars([f"{name}_low", f"{name}_high"])  # they do not lie around it

    def interval(label: object, layer: int) -> Cell:
        low, high = values(data.sel({row: label, "layer": layer}), f"{name}_low", f"{name}_high")
        return Cell(MISSING if isnan(low) or isnan(high) else f"{bits(low)}–{bits(high)}")

    return (
        Section("measured", grid_of(measured, row, "layer", name)),
        Section("expected from sampling documents alone", grid_of(measured, row, "layer", f"{name}_null")),
        Section(
            "95 % interval of the true divergence",
            grid(data[row].values.tolist(), data["layer"].values.tolist(), interval),
        ),
    )
