"""Samples of whole documents: all of a trace, or a bounded part that depends on nothing but the documents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import make_counts, make_part, make_trace, result_of

from moescope.errors import NotRecorded
from moescope.tallying.document_sample import DocumentCounter, DocumentSample
from moescope.trace import Layer, Trace

LAYERS = (Layer(0, 8, 2), Layer(3, 300, 1), Layer(4, 8, 2))


def trace_of_parts(path: Path, dropped: float = 0.0) -> Trace:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, 40).tolist()
    parts = [make_part(rng, LAYERS, lengths[at : at + 5], first_document=at, dropped=dropped) for at in range(0, 40, 5)]
    return make_trace(path / "t.moe", parts, LAYERS)


def equal(a: DocumentSample, b: DocumentSample) -> bool:
    same = all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("document", "domain", "starts", "sequence_starts", "position", "token_id")
    )
    return same and all(np.array_equal(a.expert_ids[layer], b.expert_ids[layer]) for layer in a.expert_ids)


@pytest.mark.parametrize("dropped", [0.0, 0.1])
def test_a_trace_that_fits_is_held_as_it_is(tmp_path: Path, dropped: float) -> None:
    trace = trace_of_parts(tmp_path, dropped)
    found = result_of(DocumentCounter, trace)
    parts = list(trace.iter_parts())
    assert found.fraction == 1
    assert found.num_documents == 40
    for layer in trace.layers:
        ids = np.concatenate([part.expert_ids[layer.layer] for part in parts])
        assert np.array_equal(found.expert_ids[layer.layer].T.astype(int), ids)
    assert np.array_equal(found.token_id, np.concatenate([part.token_id for part in parts]))
    assert np.array_equal(found.domain[found.document_of_token()], np.concatenate([part.domain for part in parts]))
    starts = np.concatenate([part.position == 0 for part in parts])
    assert np.array_equal(found.sequence_starts[:-1], np.flatnonzero(starts))


def test_threads_and_groups_of_layers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = trace_of_parts(tmp_path)
    whole = result_of(DocumentCounter, trace, threads=1)
    assert whole.document.tolist() == list(range(40))
    assert equal(whole, result_of(DocumentCounter, trace, threads=3))
    backwards = result_of(DocumentCounter, replace(trace, parts=trace.parts[::-1]), threads=1)
    names = [[found.domain_names[code] for code in found.domain] for found in (whole, backwards)]
    assert names[0] == names[1]
    assert equal(whole, replace(backwards, domain=whole.domain))  # whose codes go by the order of appearance
    monkeypatch.setattr("moescope.tallying.one_pass.COLUMNS_A_READ", 1)
    assert equal(whole, result_of(DocumentCounter, trace, threads=2))


def test_a_bound_keeps_some_whole_documents_and_the_same_ones_at_any_number_of_threads(tmp_path: Path) -> None:
    trace = trace_of_parts(tmp_path)
    whole = result_of(DocumentCounter, trace)
    half = result_of(DocumentCounter, trace, max_bytes=whole.num_tokens * (12 + 2 + 2 + 2) // 2, threads=1)
    assert half.fraction == pytest.approx(0.5)
    assert 5 < half.num_documents < 35
    for number, (start, end) in zip(half.document, zip(half.starts[:-1], half.starts[1:], strict=True), strict=True):
        at = whole.starts[number], whole.starts[number + 1]
        assert np.array_equal(half.expert_ids[3][:, start:end], whole.expert_ids[3][:, slice(*at)])
        assert np.array_equal(half.token_id[start:end], whole.token_id[slice(*at)])
    assert equal(half, result_of(DocumentCounter, trace, max_bytes=whole.num_tokens * 18 // 2, threads=2))


def test_a_thinned_sample_holds_at_most_so_many_tokens_and_at_least_two_documents(tmp_path: Path) -> None:
    whole = result_of(DocumentCounter, trace_of_parts(tmp_path))
    for bound in (1, 100, 500):
        thin = whole.thinned(bound)
        assert thin.num_documents == 2 or thin.num_tokens <= bound
        kept = np.isin(whole.document[whole.document_of_token()], thin.document)
        assert np.array_equal(thin.expert_ids[4], whole.expert_ids[4][:, kept])
        assert np.array_equal(thin.position == 0, np.isin(np.arange(thin.num_tokens), thin.sequence_starts))
    assert whole.thinned(10**6) is whole


def test_a_trace_of_counts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotRecorded):
        result_of(DocumentCounter, make_counts(tmp_path / "c.moe", {0: {0: {1: 5}}}))
