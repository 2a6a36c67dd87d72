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
    np.testing.assert_array_equal(whole.sample.rows[2], by_layer.sample.rows[2])


def test_weights_that_were_not_recorded_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    part = make_part(np.random.default_rng(1), LAYERS, [20])
    with pytest.raises(NotRecorded, match="gate weights"):
        one_pass(make_trace(tmp_path / "t.moe", [part], LAYERS), LAYERS, lambda: [Seen()], weights=True)


class Documents:
    """Notes the documents of each part, its first and last choice, and whether its domains are those of the trace."""

    def __init__(self, domains: tuple[str, ...]) -> None:
        self.domains = domains
        self.parts: list[tuple[list[int], list[int], list[str]]] = []

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        if group[0].layer == 0:
            assert part.domain_names == self.domains
            names = [self.domains[code] for code in part.domain[part.document_starts()[:-1]].tolist()]
            ids = part.expert_ids[0][part.document_starts()[:-1], 0].tolist()
            self.parts.append((np.unique(part.document).tolist(), ids, names))

    def merge(self, other: Documents) -> None:
        self.parts += other.parts


@pytest.mark.parametrize("threads", [1, 2])
def test_parts_that_are_joined_hold_the_rows_of_each_in_turn(tmp_path: Path, threads: int) -> None:
    rng = np.random.default_rng(0)
    domains = [("A", "B"), ("C",), ("B", "A"), ("A",)]
    parts = [
        make_part(rng, LAYERS, lengths, domains=names, first_document=10 * n)
        for n, (lengths, names) in enumerate(zip([[5, 4], [3], [6, 6], [30]], domains, strict=True))
    ]
    trace = make_trace(tmp_path / "t.moe", parts, LAYERS)
    found = {}
    for together in (0, 12):
        (seen,) = one_pass(trace, LAYERS, lambda: [Documents(trace.domains)], threads=threads, together=together)
        found[together] = sorted(seen.parts)
    assert [documents for documents, _, _ in found[0]] == [[0, 1], [10], [20, 21], [30]]
    assert [documents for documents, _, _ in found[12]] == [[0, 1, 10], [20, 21], [30]]  # 12, 12 and 30 tokens
    for at in (1, 2):
        flat = [[value for part in found[together] for value in part[at]] for together in (0, 12)]
        assert flat[0] == flat[1]
