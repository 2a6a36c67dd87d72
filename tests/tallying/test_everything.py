"""All counts of one pass together are those of a pass each."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from synthetic import make_counts, make_part, make_trace

import moescope
from moescope.tallying import count_everything, sample_documents, tally
from moescope.tallying import one_pass as module
from moescope.tallying.balance import count_balance
from moescope.tallying.joint import count_coactivation, count_transitions
from moescope.tallying.segments import count_segments
from moescope.trace import Layer, Trace

LAYERS = (Layer(0, 8, 2), Layer(2, 140, 4), Layer(3, 16, 1), Layer(9, 8, 2))
LENGTHS = (3, 8)


def a_trace(path: Path, layers: tuple[Layer, ...] = LAYERS) -> Trace:
    rng = np.random.default_rng(1)
    parts = [
        make_part(rng, layers, [30, 7, 41], first_document=3 * n, weights=layers[0].ranked, dropped=0.05)
        for n in range(3)
    ]
    return make_trace(path, parts, layers)


def assert_alike(a: object, b: object) -> None:
    """Frozen results, field by field."""
    for f in fields(a):  # type: ignore[arg-type]
        mine, theirs = getattr(a, f.name), getattr(b, f.name)
        if f.name.startswith("_"):
            continue
        if isinstance(mine, dict):
            assert mine.keys() == theirs.keys()
            for key in mine:
                np.testing.assert_array_equal(mine[key], theirs[key])
        elif isinstance(mine, tuple) and mine and isinstance(mine[0], np.ndarray):
            for one, other in zip(mine, theirs, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-12)
        else:
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("threads", [1, 2])
def test_one_pass_counts_what_each_counter_counts_alone(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COLUMNS_A_READ", 5)
    trace = a_trace(tmp_path / "t.moe")
    found = count_everything(trace, lengths=LENGTHS, threads=threads)
    xr.testing.assert_identical(found.tally.data, tally(trace).data)
    assert_alike(found.balance, count_balance(trace))
    assert found.coactivation is not None
    assert_alike(found.coactivation, count_coactivation(trace))
    assert found.transitions is not None
    alone = count_transitions(trace)
    order, order_alone = np.argsort(found.transitions.hashes), np.argsort(alone.hashes)
    np.testing.assert_array_equal(found.transitions.paths[order], alone.paths[order_alone])
    for layer, moves in alone.moves.items():
        np.testing.assert_array_equal(found.transitions.moves[layer], moves)
    assert_alike(found.segments, count_segments(trace, lengths=LENGTHS))
    assert_alike(found.documents, sample_documents(trace))


def test_each_measure_takes_its_count_in_the_place_of_the_trace(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 2), Layer(1, 8, 2))
    trace = a_trace(tmp_path / "t.moe", layers)
    found = count_everything(trace, lengths=LENGTHS)
    xr.testing.assert_identical(moescope.balance(found.balance), moescope.balance(trace))
    assert found.coactivation is not None
    xr.testing.assert_identical(moescope.coactivation(found.coactivation), moescope.coactivation(trace))
    srp = moescope.consistency(trace, segments=found.segments)
    xr.testing.assert_allclose(srp, moescope.consistency(trace, lengths=LENGTHS))
    xr.testing.assert_identical(moescope.locality(found.documents), moescope.locality(trace))
    xr.testing.assert_identical(
        moescope.explain(found.documents, permutations=3), moescope.explain(trace, permutations=3)
    )


def test_what_a_trace_does_not_have_is_not_counted_and_the_rest_is(tmp_path: Path) -> None:
    one = count_everything(a_trace(tmp_path / "one.moe", (Layer(3, 16, 1),)), lengths=(4,))
    assert one.coactivation is None
    assert one.transitions is None
    assert one.tally.layers == (3,)
    unranked = tuple(replace(layer, ranked=False) for layer in LAYERS)
    found = count_everything(a_trace(tmp_path / "unranked.moe", unranked), lengths=(4,))
    assert found.transitions is not None
    assert found.transitions.choice == "any"


def test_a_trace_of_counts_has_a_tally_and_a_balance(tmp_path: Path) -> None:
    found = count_everything(make_counts(tmp_path / "c.moe", {0: {0: {1: 5}}}))
    assert found.tally.counts_only
    assert int(found.tally.data["made"].sum()) == 5
    assert (found.coactivation, found.transitions, found.segments, found.documents) == (None,) * 4


def test_impossible_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lengths must be distinct"):
        count_everything(a_trace(tmp_path / "t.moe"), lengths=(4, 4))
