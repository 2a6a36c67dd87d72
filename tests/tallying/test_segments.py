"""Segments: counted and expected activations against every segment looked at, and every order tried."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, permutations
from math import factorial
from pathlib import Path

import numpy as np
import pytest
from synthetic import make_counts, make_part, make_trace, result_of

from moescope.errors import NotRecorded
from moescope.tallying import one_pass, segment_kernels, segments
from moescope.tallying.segments import FIXED, SegmentCounter
from moescope.trace import Layer, Part

LAYERS = (Layer(0, 8, 2), Layer(4, 20, 3, num_null_experts=2), Layer(5, 40, 8))


def looked_at(part: Part, layer: Layer, length: int, documents: set[int]) -> np.ndarray:
    """Pairs of segment and expert with exactly v activations, by going to every place."""
    exactly = np.zeros(length + 1, np.int64)
    starts = part.sequence_starts()
    for start, end in pairwise(starts.tolist()):
        if int(part.document[start]) not in documents:
            continue
        for place in range(start, end - length + 1):
            ids = part.expert_ids[layer.layer][place : place + length]
            for expert in range(layer.num_experts):
                exactly[int((ids == expert).any(axis=1).sum())] += 1
    return exactly


@pytest.mark.parametrize("dropped", [0.0, 0.2])
@pytest.mark.parametrize("threads", [1, 2])
def test_activations_are_those_of_every_segment(
    tmp_path: Path, dropped: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_pass, "COLUMNS_A_READ", 5)
    rng = np.random.default_rng(0)
    lengths = [40, 3, 25, 70, 16, 9]
    part = make_part(rng, LAYERS, lengths, window=32, dropped=dropped)
    halves = [part.rows(part.document < 3), part.rows(part.document >= 3)]
    trace = make_trace(tmp_path / "t.moe", halves, LAYERS)
    counted = result_of(SegmentCounter, trace, lengths=(2, 5, 16), threads=threads)
    assert counted.domain_of_group.tolist() == [0, 0, 1, 1, 2, 2]  # two documents of each domain, a group each
    for m, length in enumerate((2, 5, 16)):
        for at, layer in enumerate(LAYERS):
            for group, document in enumerate([0, 3, 1, 4, 2, 5]):
                exactly = looked_at(part, layer, length, {document})
                at_least = exactly[::-1].cumsum()[::-1]
                assert counted.at_least[length][at, group].tolist() == at_least.tolist()
                assert counted.segments[group, m] * layer.num_experts == exactly.sum()
        has = [sum(min(n - w, 32) >= length for w in range(0, n, 32)) > 0 for n in lengths]
        assert counted.documents[:, m].tolist() == [has[d] + has[d + 3] for d in range(3)]


def test_the_expected_activations_are_the_mean_over_every_order_of_a_document(tmp_path: Path) -> None:
    layer = Layer(0, 4, 2)
    part = make_part(np.random.default_rng(1), (layer,), [6], window=4)
    trace = make_trace(tmp_path / "t.moe", [part], (layer,))
    counted = result_of(SegmentCounter, trace, lengths=(2, 3))
    for length in (2, 3):
        total = np.zeros(length + 1)
        for order in permutations(range(6)):
            total += looked_at(replace(part, expert_ids={0: part.expert_ids[0][list(order)]}), layer, length, {0})
        mean = (total / factorial(6))[::-1].cumsum()[::-1]
        np.testing.assert_allclose(counted.expected[length][0, 0] / FIXED, mean, atol=1e-6)


def test_long_documents_and_long_segments_expect_what_scipy_does(tmp_path: Path) -> None:
    from scipy import stats

    layer = Layer(0, 64, 8)
    part = make_part(np.random.default_rng(2), (layer,), [3000], window=4096)
    trace = make_trace(tmp_path / "t.moe", [part], (layer,))
    counted = result_of(SegmentCounter, trace, lengths=(256,))
    chosen = np.bincount(np.asarray(part.expert_ids[0]).ravel(), minlength=64)
    tails = stats.hypergeom.sf(np.arange(-1, 256)[:, None], 3000, chosen, 256).sum(axis=1) * (3000 - 255)
    np.testing.assert_allclose(counted.expected[256][0, 0] / FIXED, tails, rtol=1e-8, atol=1e-5)


def test_documents_are_dealt_out_to_groups_of_nearly_equal_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "GROUPS_A_DOMAIN", 4)
    part = make_part(np.random.default_rng(4), LAYERS[:1], [8] * 29, domains=("A", "B"))
    counted = result_of(SegmentCounter, make_trace(tmp_path / "t.moe", [part], LAYERS[:1]), lengths=(4,))
    assert (counted.segments[:, 0] / 5).tolist() == [4, 4, 4, 3, 4, 4, 3, 3]


@pytest.mark.parametrize("lengths", [(), (4, 4), (1,), (2**17,)])
def test_lengths_that_make_no_sense_are_refused(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    trace = make_trace(tmp_path / "t.moe", [make_part(np.random.default_rng(5), LAYERS, [8])], LAYERS)
    with pytest.raises(ValueError, match="lengths"):
        result_of(SegmentCounter, trace, lengths=lengths)


def test_a_trace_of_counts_has_no_segments(tmp_path: Path) -> None:
    with pytest.raises(NotRecorded, match="no token"):
        result_of(SegmentCounter, make_counts(tmp_path / "c.moe", {0: {0: {1: 5}}}))


@pytest.mark.parametrize(("num_experts", "top_k", "dropped"), [(8, 2, 0.0), (8, 8, 0.0), (7, 2, 0.2), (3, 1, 0.0)])
def test_sixteen_tokens_counted_by_bits_are_those_counted_one_by_one(
    num_experts: int, top_k: int, dropped: float
) -> None:
    rng = np.random.default_rng(num_experts)
    lengths = np.concatenate([[15, 16, 17, 63, 64, 65, 79, 80, 128], rng.integers(1, 400, 30)])
    ids = np.argsort(rng.random((lengths.sum(), 8)), axis=1)[:, :top_k].T.astype(np.int32)  # some are null experts
    ids[rng.random(ids.shape) < dropped] = -1
    starts, rows = np.concatenate([[0], np.cumsum(lengths)]), np.arange(len(lengths)) % 5
    slow, fast = np.zeros((5, 17), np.int64), np.zeros((5, 17), np.int64)
    segment_kernels.count_activations(ids, num_experts, starts, rows, 16, slow)
    segment_kernels.count_activations_in_sixteen(ids, num_experts, starts, rows, fast)
    np.testing.assert_array_equal(fast, slow)
