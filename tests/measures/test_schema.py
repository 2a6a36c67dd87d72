"""Every result has the one form that `moescope.measures.schema` describes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr
from synthetic import make_part, make_trace

import moescope
from moescope.measures import schema
from moescope.measures.compare import _distances
from moescope.trace import Layer, Trace

LAYERS = (Layer(0, 8, 2), Layer(2, 8, 2), Layer(3, 12, 3))
DOMAINS = ("A", schema.TOTAL)

RESULTS: dict[str, Callable[[Trace], xr.Dataset]] = {
    "shares": moescope.shares,
    "repeats": moescope.repeats,
    "divergence": moescope.divergence,
    "words": lambda trace: moescope.words(trace, ["w1", "w2"], indentation=True),
    "agreement": lambda trace: moescope.compare(trace, trace).agreement,
    "changes": lambda trace: moescope.compare(trace, trace).changes,
    "weights": lambda trace: moescope.compare(trace, trace).weights,
    "tokens": lambda trace: moescope.compare(trace, trace).tokens,
    "distances": lambda trace: _distances(trace, trace, None),
    "saturation": lambda trace: moescope.saturation([trace, trace]),
    "balance": moescope.balance,
    "cache": moescope.cache,
    "coactivation": moescope.coactivation,
    "consistency": lambda trace: moescope.consistency(trace, lengths=(4, 16)),
    "distinct": moescope.distinct,
    "explain": lambda trace: moescope.explain(trace, permutations=3),
    "explain, all choices": lambda trace: moescope.explain(trace, choice="all", permutations=3),
    "locality": lambda trace: moescope.locality(trace, lags=(1, 4)),
    "offloading": lambda trace: moescope.offloading(moescope.cache(trace), bytes_per_expert=1, bandwidth=2),
    "parallel": lambda trace: moescope.parallel(trace, devices=2),
    "prefetch": moescope.prefetch,
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
    part = make_part(np.random.default_rng(0), LAYERS, [40, 30, 25, 35, 20, 30], domains=DOMAINS, weights=True)
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
