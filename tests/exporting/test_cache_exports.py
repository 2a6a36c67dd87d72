"""Traces for cache simulators, and profiles of heat."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_part, make_trace

import moescope
from moescope.exporting import oracle_general
from moescope.trace import Layer, Part, Trace

LAYERS = (Layer(1, 5, 2, num_null_experts=1), Layer(4, 300, 3))


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    rng = np.random.default_rng(0)
    parts = [make_part(rng, LAYERS, [9, 4]), make_part(rng, LAYERS, [17], first_document=2, dropped=0.2)]
    return make_trace(tmp_path / "t.moe", parts, LAYERS)


def slow_requests(trace: Trace) -> list[tuple[int, int]]:
    """(token, object) in the order of decoding."""
    found, token = [], 0
    for part in trace.iter_parts():
        for row in range(part.num_tokens):
            for layer in trace.layers:
                ids = part.expert_ids[layer.layer][row].tolist()
                found += [(token, 65536 * layer.layer + e) for e in ids if 0 <= e < layer.num_experts]
            token += 1
    return found


@pytest.mark.parametrize("at_a_time", [1, 40, 2**20])
def test_oracle_general_holds_every_request_with_its_next(
    trace: Trace, tmp_path: Path, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle_general, "ASSIGNMENTS_AT_A_TIME", at_a_time)
    out = moescope.export(trace, tmp_path / "t.oracleGeneral", format="oracle-general")
    records = list(struct.iter_unpack("<IQIq", out.read_bytes()))
    expected = slow_requests(trace)
    assert [(time, name) for time, name, _, _ in records] == expected
    names = [name for _, name in expected]
    for at, (_, name, size, following) in enumerate(records):
        assert size == 1
        assert following == (names.index(name, at + 1) if name in names[at + 1 :] else -1)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=8), max_size=5))
def test_next_requests_go_on_over_chunks(chunks: list[list[int]]) -> None:
    last, done, found = np.full(6, -1, np.int64), 0, []
    for chunk in chunks:
        following, firsts = oracle_general._next_requests(np.array(chunk, np.int64), done, last)
        found += following.tolist()
        for request, again in firsts:
            assert found[request] == -1
            found[request] = again
        done += len(chunk)
    everything = [each for chunk in chunks for each in chunk]
    assert found == [
        everything.index(each, at + 1) if each in everything[at + 1 :] else -1 for at, each in enumerate(everything)
    ]


def test_hot_experts_are_ordered_by_load(tmp_path: Path) -> None:
    layers = (Layer(0, 4, 1), Layer(2, 3, 1))
    zeros, ids = np.zeros(6, np.int64), {0: np.array([[1], [1], [1], [3], [3], [0]]), 2: np.array([[2]] * 5 + [[0]])}
    part = Part(zeros, zeros, ("d",), zeros, np.arange(6), zeros, ids)
    trace = make_trace(tmp_path / "t.moe", [part], layers)
    found = json.loads(moescope.export(trace, tmp_path / "hot.json", format="hot-experts").read_text())
    assert found["format"] == "moescope-hot-experts"
    assert found["tokens"] == 6
    assert [of["load"] for of in found["layers"]] == [[1, 3, 0, 2], [1, 0, 5]]
    assert [of["order"] for of in found["layers"]] == [[1, 3, 0, 2], [2, 0, 1]]
    assert found["order"] == [[2, 2], [0, 1], [0, 3], [0, 0], [2, 0], [0, 2], [2, 1]]


def test_dropped_and_null_assignments_are_no_heat(trace: Trace, tmp_path: Path) -> None:
    found = json.loads(moescope.export(trace, tmp_path / "hot.json", format="hot-experts").read_text())
    requests = [name for _, name in slow_requests(trace)]
    for of in found["layers"]:
        names = [65536 * of["layer"] + e for e in range(of["num_experts"])]
        assert of["load"] == [requests.count(name) for name in names]
