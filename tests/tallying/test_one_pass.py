"""The pass that fills counters: groups of layers, threads, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from synthetic import make_part, make_trace

from moescope.errors import NotRecorded
from moescope.tallying import one_pass as module
from moescope.tallying import tally
from moescope.tallying.one_pass import one_pass
from moescope.trace import Layer, Part, Trace

LAYERS = (Layer(0, 8, 2), Layer(2, 140, 4), Layer(3, 16, 1), Layer(9, 8, 2))


class Seen:
    """Notes each layer's first document with the layers that lay beside it."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        self.calls.append((int(part.document[0]), tuple(part.expert_ids), tuple(layer.layer for layer in group)))

    def merge(self, other: Seen) -> None:
        self.calls += other.calls


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    rng = np.random.default_rng(1)
    parts = [make_part(rng, LAYERS, [20, 7], first_document=2 * n, weights=True) for n in range(3)]
    return make_trace(tmp_path / "t.moe", parts, LAYERS)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_part_gives_each_layer_once_with_the_layer_before_it(
    trace: Trace, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COLUMNS_A_READ", 4)
    (seen,) = one_pass(trace, LAYERS, lambda: [Seen()], threads=threads)
    groups = [((0,), (0,)), ((0, 2), (2,)), ((2, 3, 9), (3, 9))]
    assert sorted(seen.calls) == [(document, *group) for document in (0, 2, 4) for group in groups]


def test_the_groups_of_layers_change_no_count(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tally(trace)
    monkeypatch.setattr(module, "COLUMNS_A_READ", 2)
    by_layer = tally(trace)
    xr.testing.assert_identical(whole.data, by_layer.data)
    assert whole.sample is not None
    assert by_layer.sample is not None
    np.testing.assert_array_equal(whole.sample.expert_ids[2], by_layer.sample.expert_ids[2])


def test_weights_that_were_not_recorded_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    part = make_part(np.random.default_rng(1), LAYERS, [20])
    with pytest.raises(NotRecorded, match="gate weights"):
        one_pass(make_trace(tmp_path / "t.moe", [part], LAYERS), LAYERS, lambda: [Seen()], weights=True)
