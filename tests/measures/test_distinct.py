"""Distinct experts: by hand, against windows gone through one by one, and on routing without an order."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_part, make_trace

import moescope
from moescope.errors import NotRecorded
from moescope.measures import schema
from moescope.measures.statistics import ratio_standard_error, student_t
from moescope.tallying.counted import count_with
from moescope.tallying.counter import CountOptions
from moescope.tallying.document_sample import DocumentCounter
from moescope.trace import Layer, Part, Trace

LAYERS = (Layer(0, 8, 2), Layer(4, 12, 3, num_null_experts=2))
SHORT = (1, 2, 5)


def windows(part: Part, layer: Layer, length: int) -> dict[int, list[int]]:
    """Distinct experts of every window, by document."""
    found: dict[int, list[int]] = {int(document): [] for document in part.document}
    for start, end in pairwise(part.sequence_starts().tolist()):
        for place in range(start, end - length + 1):
            ids = set(part.expert_ids[layer.layer][place : place + length].ravel().tolist())
            found[int(part.document[place])].append(sum(0 <= expert < layer.num_experts for expert in ids))
    return found


def any_order(part: Part, layer: Layer, length: int, document: int) -> float:
    """Distinct experts to expect of tokens of a document in any order, an expert and a token at a time."""
    ids = part.expert_ids[layer.layer][part.document == document]
    expected = 0.0
    for expert in range(layer.num_experts):
        without = int((ids != expert).all(axis=1).sum())
        missed = 1.0
        for drawn in range(length):
            missed *= max(0, without - drawn) / (len(ids) - drawn)
        expected += 1 - missed
    return expected


def of_documents(values: list[float], sizes: list[int]) -> tuple[float, float]:
    """A mean of windows from the sums of documents, with half its interval."""
    y, n = np.array(values), np.array(sizes, float)
    error = float(ratio_standard_error(y.sum(), n.sum(), (y * y).sum(), (y * n).sum(), (n * n).sum(), len(n)))
    return float(y.sum() / n.sum()), float(student_t(len(n)) * error)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.2]))
def test_every_number_is_that_of_the_windows_gone_through_one_by_one(
    tmp_path_factory, seed: int, dropped: float
) -> None:
    lengths = [40, 3, 25, 1, 30, 18]
    part = make_part(np.random.default_rng(seed), LAYERS, lengths, window=24, domains=("A", "B"), dropped=dropped)
    trace = make_trace(tmp_path_factory.mktemp("distinct") / "t.moe", [part], LAYERS)
    found = moescope.distinct(trace, lengths=SHORT)
    schema.check(found)
    for domain, rows in ((None, part), ("A", part.rows(part.domain == 0)), ("B", part.rows(part.domain == 1))):
        data = schema.total(found) if domain is None else found.sel(domain=domain)
        for layer in LAYERS:
            for length in SHORT:
                at = data.sel(layer=layer.layer, length=length)
                counted = {document: some for document, some in windows(rows, layer, length).items() if some}
                sums, sizes = [float(sum(some)) for some in counted.values()], [len(some) for some in counted.values()]
                expected = [len(some) * any_order(rows, layer, length, document) for document, some in counted.items()]
                mean, half = of_documents(sums, sizes)
                assert int(at["documents"]) == len(counted)
                shares = [(rows.expert_ids[layer.layer] == e).any(axis=1).mean() for e in range(layer.num_experts)]
                assert float(at["distinct_apart"]) == pytest.approx(sum(1 - (1 - p) ** length for p in shares))
                assert float(at["distinct"]) == pytest.approx(mean, rel=1e-12)
                assert float(at["distinct_null"]) == pytest.approx(sum(expected) / sum(sizes), rel=1e-9)
                less, less_half = of_documents(list(np.array(sums) - expected), sizes)
                assert float(at["excess"]) == pytest.approx(less, abs=1e-9)
                least = 0 if dropped or layer.num_null_experts else layer.top_k
                most, null = min(layer.num_experts, layer.top_k * length), sum(expected) / sum(sizes)
                decisive = min(most - null, null - least) * sum(sizes) / length
                if abs(decisive - 10) < 1e-6:  # rounding decides
                    continue
                if decisive < 10 or len(sizes) < 2:
                    assert at[["distinct_low", "distinct_high", "excess_low", "excess_p"]].to_array().isnull().all()
                    continue
                assert float(at["distinct_low"]) == pytest.approx(max(least, mean - half), rel=1e-9)
                assert float(at["distinct_high"]) == pytest.approx(min(most, mean + half), rel=1e-9)
                less_half = max(less_half, float(student_t(len(sizes))) / sum(sizes))  # at least an expert of a window
                assert float(at["excess_high"]) == pytest.approx(less + less_half, abs=1e-9)


def test_by_hand(tmp_path: Path) -> None:
    """One expert a token, 0 0 1 1: three windows of two hold 1, 2 and 1; in any order two of three pairs differ."""
    part = make_part(np.random.default_rng(0), (Layer(0, 4, 1),), [4, 4])
    part = replace(part, expert_ids={0: np.array([0, 0, 1, 1] * 2)[:, None]})
    at = schema.total(
        moescope.distinct(make_trace(tmp_path / "t.moe", [part], (Layer(0, 4, 1),)), lengths=[2])
    ).squeeze()
    assert float(at["distinct"]) == pytest.approx(4 / 3)
    orders = [sum(a != b for a, b in pairwise(order)) / 3 for order in permutations([0, 0, 1, 1])]
    assert float(at["distinct_null"]) == pytest.approx(1 + np.mean(orders))
    assert float(at["distinct_apart"]) == pytest.approx(1.5)
    assert float(at["distinct_uniform"]) == pytest.approx(4 * (1 - (3 / 4) ** 2))
    assert at[["distinct_low", "excess_high", "excess_p"]].to_array().isnull().all()  # of six windows


def test_documents_that_do_not_differ_leave_an_error_all_the_same(tmp_path: Path) -> None:
    layers = (Layer(0, 4, 1),)
    part = make_part(np.random.default_rng(0), layers, [60] * 8, window=60)
    part = replace(part, expert_ids={0: np.array([0, 0, 1, 1] * 120)[:, None]})
    at = schema.total(moescope.distinct(make_trace(tmp_path / "t.moe", [part], layers), lengths=[3])).squeeze()
    width = float(at["excess_high"] - at["excess_low"])
    assert width == pytest.approx(2 * float(student_t(8)) / (8 * 58))


def test_random_routing_has_the_working_set_of_independent_tokens_and_no_excess(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    layers, held, seen = (Layer(0, 16, 2),), 0, []
    for draw in range(100):
        part = make_part(rng, layers, rng.integers(20, 80, 30).tolist(), window=64, domains=("A",))
        found = schema.total(moescope.distinct(make_trace(tmp_path / f"{draw}.moe", [part], layers), lengths=[8]))
        at = found.sel(layer=0, length=8)
        held += bool(at["excess_low"] <= 0 <= at["excess_high"])
        seen.append(float(at["distinct"] - at["distinct_apart"]))
    assert 88 <= held <= 100
    assert abs(np.mean(seen)) < 4 * np.std(seen) / 10


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    rng = np.random.default_rng(2)
    parts = [make_part(rng, LAYERS, [30, 9, 41], first_document=first) for first in (0, 3)]
    return make_trace(tmp_path_factory.mktemp("distinct") / "t.moe", parts, LAYERS)


def test_what_was_counted_says_the_same_and_so_do_threads_and_small_blocks(trace: Trace, monkeypatch) -> None:
    whole = moescope.distinct(trace, threads=1)
    xr.testing.assert_identical(whole, moescope.distinct(moescope.count(trace), threads=2))
    monkeypatch.setattr(sys.modules["moescope.measures.distinct"], "BLOCK_ASSIGNMENTS", 50)
    xr.testing.assert_identical(whole, moescope.distinct(trace))


def test_lengths_that_cannot_be_are_refused_and_counts_say_what_they_lack(trace: Trace) -> None:
    for lengths in ([], [0, 2], [4, 2], [2, 2]):
        with pytest.raises(ValueError, match="lengths must ascend"):
            moescope.distinct(trace, lengths=lengths)
    firsts = count_with((DocumentCounter,), trace, options=CountOptions(ranks=1))
    with pytest.raises(NotRecorded, match="all choices"):
        moescope.distinct(firsts)


def test_windows_that_no_document_holds_have_no_number(trace: Trace) -> None:
    at = moescope.distinct(trace, lengths=[2, 42]).sel(length=42)
    assert not at[["distinct", "distinct_null", "excess", "excess_low", "excess_q"]].to_array().notnull().any()
    assert not at["documents"].any()
