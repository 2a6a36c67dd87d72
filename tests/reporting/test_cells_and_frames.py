"""What a variable's unit makes of it: a cell of a table, a column of a frame."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from moescope.measures.schema import DIFFERENCE, EXPERT_ID, FRACTION, estimate
from moescope.reporting.cells import cell, grid_of
from moescope.reporting.frames import tidy
from moescope.reporting.tables import Cell, Row

NAN = float("nan")


@pytest.fixture
def result() -> xr.Dataset:
    """Two layers, the second with one expert only."""
    dims = ("layer", "expert")
    share = np.array([[0.25, 0.75], [1.0, NAN]])
    return xr.Dataset(
        estimate(
            "share", dims, "share", FRACTION, value=share, low=share - 0.02, high=share + 0.01, q=np.full((2, 2), 0.01)
        )
        | estimate("excess", dims, "excess", DIFFERENCE, value=share - 0.5, low=share - 0.6, high=share - 0.48)
        | estimate("jsd", ("layer",), "divergence", "bits", value=[0.5, 0.00001], q=[0.5, NAN])
        | estimate("gap", ("layer",), "ratio", "1", value=[1.5, NAN], low=[1.25, NAN], high=[1.6, NAN])
        | estimate("top_expert", ("layer",), "expert", EXPERT_ID, value=[1.0, NAN])
        | estimate("ids", ("layer",), "ids", "ids", value=[1200, 3]),
        {
            "layer": [3, 4],
            "label": ("layer", ["three", "four"]),
            "num_experts": ("layer", [2, 1]),
            "documents": ((), 7, {"units": "documents"}),
        },
    )


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("share", Cell("25.0", "±2.0", "*"), Cell("100", "−2.0", "*")),
        ("excess", Cell("−25.0", "±10.0"), Cell("+50.0", "±10.0")),
        ("jsd", Cell("0.5000"), Cell("<0.0001")),
        ("gap", Cell("1.50", "±0.25"), Cell("–")),
        ("top_expert", Cell("1"), Cell("–")),
        ("ids", Cell("1,200"), Cell("3")),
    ],
)
def test_a_cell_shows_what_its_unit_asks_for(result, name, first, last):
    assert cell(result.isel(layer=0, expert=0), name) == first
    assert cell(result.isel(layer=1, expert=0), name) == last


def test_a_cell_shows_no_interval_and_no_mark_that_it_was_not_given(result):
    assert cell(result[["share"]].isel(layer=0, expert=0), "share", digits=2) == Cell("25.00")
    assert cell(result.isel(layer=1, expert=1), "excess") == Cell("–")


def test_a_grid_of_a_variable_has_the_labels_of_its_dims(result):
    rows = grid_of(result[["share"]], "layer", "expert", "share")
    assert rows == (Row("3", (Cell("25.0"), Cell("75.0"))), Row("4", (Cell("100"), Cell("–"))))


def test_a_frame_has_a_row_a_combination_that_has_a_value_and_units_in_its_names(result):
    frame = tidy(result, "layer", "expert")
    assert frame.columns.tolist() == [
        "layer",
        "expert",
        "label",
        "share_percent",
        "share_low_percent",
        "share_high_percent",
        "share_q",
        "excess_points",
        "excess_low_points",
        "excess_high_points",
        "jsd_bits",
        "jsd_q",
        "gap",
        "gap_low",
        "gap_high",
        "top_expert",
        "ids",
        "documents",
    ]
    values = result.drop_vars("share_q")  # which has one for the expert that is not there
    assert tidy(values, "layer", "expert")[["layer", "expert"]].values.tolist() == [[3, 0], [3, 1], [4, 0]]
    assert frame["share_percent"].tolist()[:3] == [25, 75, 100]
    assert frame["jsd_bits"].tolist() == [0.5, 0.5, 0.00001, 0.00001]  # of the layer, repeated
    assert frame["top_expert"].dtype == "Int64"
    assert set(frame["documents"]) == {7}


def test_a_frame_of_fewer_dims_has_what_lies_within_them(result):
    frame = tidy(result, "layer")
    assert len(frame) == 2  # the second row has values, though some are missing
    assert [name for name in frame if "share" in name] == []
    assert tidy(result[["share"]], "expert", "layer")[["expert", "layer"]].values.tolist() == [[0, 3], [0, 4], [1, 3]]
