"""Every result has the form that `measures.schema` describes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import xarray as xr
from reporting.conftest import write_trace

import moescope
from moescope.measures import schema
from moescope.measures.compare import _distances
from moescope.trace import Trace

RESULTS: dict[str, Callable[[Trace], xr.Dataset]] = {
    "shares": moescope.shares,
    "repeats": moescope.repeats,
    "divergence": moescope.divergence,
    "words": lambda trace: moescope.words(trace, ["self", "the"], indentation=True),
    "agreement": lambda trace: moescope.compare(trace, trace).agreement,
    "changes": lambda trace: moescope.compare(trace, trace).changes,
    "weights": lambda trace: moescope.compare(trace, trace).weights,
    "tokens": lambda trace: moescope.compare(trace, trace).tokens,
    "distances": lambda trace: _distances(trace, trace, None),
    "saturation": lambda trace: moescope.saturation([trace, trace]),
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A trace with text and gate weights, and a domain called as all of them together."""
    folder: Path = tmp_path_factory.mktemp("schema")
    return write_trace(folder / "t.moe", layers=(0, 3, 7), tokens=80, domains=("(all)", "Github", "ArXiv"))


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_keeps_to_the_schema(trace: Trace, name: str) -> None:
    schema.check(RESULTS[name](trace))


def test_the_total_has_a_label_of_its_own_and_is_found_by_its_coordinate() -> None:
    domains = ["(all)", "Code"]
    result = xr.Dataset({"n": ("domain", [3, 1, 2])}, schema.total_coordinates(domains, [10, 20]))
    assert result["domain"].values.tolist() == ["((all))", "(all)", "Code"]
    assert schema.total(result)["n"].item() == 3
    assert schema.total(result)["documents"].item() == 30
    assert schema.by_domain(result)["domain"].values.tolist() == domains


@pytest.mark.parametrize(
    ("variables", "wrong"),
    [
        ({"low": schema.described([0.1], ("layer",), "an end", "1")}, "does not say of what"),
        ({"x_low": schema.described([0.1], ("layer",), "an end", "1")}, "stands beside no x"),
        ({"x": ("layer", [0.1])}, "lacks its definition"),
        ({"x": schema.described([0.1], ("depth",), "a value", "1")}, "not in DIMS"),
        ({"x": schema.described([0.1], ("layer",), "a value", "1")}, "without the coordinates"),
    ],
)
def test_what_does_not_keep_to_it_is_named(variables: dict[str, object], wrong: str) -> None:
    with pytest.raises(AssertionError, match=wrong):
        schema.check(xr.Dataset(variables))
