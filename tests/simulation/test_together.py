"""Jobs that go through a trace together: each sees what it would see alone, and a part is decoded once a pass."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from synthetic import make_part, make_trace

import moescope
from moescope.reporting.results import gather
from moescope.simulation import together
from moescope.simulation.together import Job, run_together
from moescope.tallying import one_pass
from moescope.trace import Layer, Trace
from moescope.trace.part_file import PartFile

LAYERS = tuple(Layer(number, 8, 2) for number in (0, 3, 7))


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    rng = np.random.default_rng(0)
    parts = [make_part(rng, LAYERS, [40, 9, 33, 60], first_document=4 * n, weights=True) for n in range(9)]
    return make_trace(tmp_path / "t.moe", parts, LAYERS)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often the chosen experts of each layer of each part were read from disk."""
    times: Counter[tuple[str, int]] = Counter()
    read, lock = PartFile.read, threading.Lock()

    def counting(self: PartFile, layers, **options):
        layers = tuple(layers)
        if options.get("choices", True):
            with lock:
                times.update((self.path.name, layer.layer) for layer in layers)
        return read(self, layers, **options)

    monkeypatch.setattr(PartFile, "read", counting)
    return times


def test_a_report_decodes_each_part_at_most_three_times(trace: Trace, decoded: Counter[tuple[str, int]]) -> None:
    gather(trace)
    assert len(decoded) == 9 * len(LAYERS)
    assert set(decoded.values()) == {3}


@pytest.mark.parametrize("window", [1, 2, 100])
def test_simulations_together_are_those_alone_in_two_passes(
    trace: Trace, decoded: Counter[tuple[str, int]], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "WINDOW", window)
    monkeypatch.setattr(one_pass, "COLUMNS_A_READ", 2)  # a layer at a time, where layers are read in groups
    calls = [
        lambda view: moescope.cache(view, sizes=[2, 4]),
        lambda view: moescope.prefetch(view, threads=3),
        lambda view: moescope.parallel(view, devices=2, prefill=[16, 200], decode=4, threads=3),
        lambda view: moescope.cache(view, sizes=[3], policies="lru"),  # one pass
    ]
    alone = [call(trace) for call in calls]
    decoded.clear()
    found = run_together(trace, [Job(call) for call in calls])
    assert max(decoded.values()) == 2
    for mine, expected in zip(found, alone, strict=True):
        xr.testing.assert_identical(mine, expected)


def test_a_job_that_wants_some_parts_and_layers_holds_up_nobody(
    trace: Trace, decoded: Counter[tuple[str, int]]
) -> None:
    def some(view: Trace) -> list[np.ndarray]:
        return [view.parts[n].read(LAYERS[1:2], weights=True).gate_weights[3] for n in (1, 4)]

    jobs = [Job(lambda view: moescope.cache(view, sizes=[4])), Job(some, frozenset({3}), frozenset({1, 4}))]
    _, weights = run_together(trace, jobs)
    assert max(decoded.values()) == 2
    for n, mine in zip((1, 4), weights, strict=True):
        np.testing.assert_array_equal(mine, trace.parts[n].read(LAYERS[1:2], weights=True).gate_weights[3])


def test_what_a_job_raises_comes_out_and_the_others_come_to_their_end(trace: Trace) -> None:
    ended = []

    def failing(view: Trace) -> None:
        view.parts[0].read(LAYERS)
        raise KeyError("on the way")

    def whole(view: Trace) -> None:
        ended.append(moescope.cache(view, sizes=[4]))

    with pytest.raises(KeyError, match="on the way"):
        run_together(trace, [Job(whole), Job(failing), Job(whole)])
    assert len(ended) == 2
    assert run_together(trace, []) == []
