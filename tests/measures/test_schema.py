"""Every result has the one form that `moescope.measures.schema` describes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr
from synthetic import make_part, make_trace

import moescope
from moescope.measures import schema
from moescope.trace import Layer, Trace

LAYERS = (Layer(0, 8, 2), Layer(2, 8, 2), Layer(3, 12, 3))
DOMAINS = ("A", schema.TOTAL)

RESULTS: dict[str, Callable[[Trace], xr.Dataset]] = {
    "balance": moescope.balance,
    "coactivation": moescope.coactivation,
    "consistency": lambda trace: moescope.consistency(trace, lengths=(4, 16)),
    "explain": lambda trace: moescope.explain(trace, permutations=3),
    "explain, all choices": lambda trace: moescope.explain(trace, choice="all", permutations=3),
    "locality": lambda trace: moescope.locality(trace, lags=(1, 4)),
    "syntax": moescope.syntax,
    "syntax, all choices": lambda trace: moescope.syntax(trace, choice="all"),
    "transitions": moescope.transitions,
    "transitions, all choices": lambda trace: moescope.transitions(trace, choice="all"),
    "vocabulary": lambda trace: moescope.vocabulary(trace, permutations=3, tokens=[1], top=2),
    "vocabulary, all choices": lambda trace: moescope.vocabulary(trace, choice="all", permutations=3, top=0),
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """One domain is called as all of them together are."""
    part = make_part(np.random.default_rng(0), LAYERS, [40, 30, 25, 35, 20, 30], domains=DOMAINS)
    return make_trace(tmp_path_factory.mktemp("schema") / "t.moe", [part], LAYERS)


@pytest.mark.parametrize("name", RESULTS)
def test_every_result_has_the_one_form(name: str, trace: Trace) -> None:
    result = RESULTS[name](trace)
    schema.check(result)
    if "total" in result.coords:
        assert result["domain"].values.tolist() == ["((all))", *trace.domains]
        assert schema.total(result)["domain"] == "((all))"
        assert schema.by_domain(result)["domain"].values.tolist() == list(trace.domains)


@pytest.mark.parametrize("measure", ["explain", "syntax", "vocabulary"])
def test_the_old_word_for_all_choices_is_refused(measure: str, trace: Trace) -> None:
    with pytest.raises(ValueError, match="choice must be 'first' or 'all', not 'either'"):
        getattr(moescope, measure)(trace, choice="either")


def test_what_stands_beside_a_value_follows_it_in_its_unit() -> None:
    values = {"x": [0.5], "x_low": [0.4], "y": [1.0], "x_high": [0.6], "x_q": [0.1]}
    result = xr.Dataset(schema.labelled(values, ("by",), {"x": ("part", schema.FRACTION), "y": ("sum", "bits", "us")}))
    assert list(result) == ["x", "x_low", "x_high", "x_q", "y"]
    assert [result[name].attrs["units"] for name in result] == [*["fraction"] * 3, "1", "bits"]
    assert result["x_low"].attrs["long_name"] == schema.ENDINGS["low"]
    assert result["y"].attrs["source"] == "us"
