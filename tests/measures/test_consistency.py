"""SRP: by hand, against the published definition looked up segment by segment, and on routing whose order is known."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_part, make_trace

import moescope
from moescope.measures.consistency import best_f1, uniform_srp
from moescope.measures.schema import TOTAL
from moescope.tallying.segments import DocumentGroups, SegmentCounter
from moescope.trace import Layer, Part


def published_f1(part: Part, layers: tuple[Layer, ...], length: int) -> tuple[float, float]:
    """Equation 6 of arXiv 2505.16056 and the size ratio, every threshold tried on every expert and segment."""
    active = []
    starts = part.sequence_starts().tolist()
    for layer in layers:
        ids = np.asarray(part.expert_ids[layer.layer])
        for start, end in pairwise(starts):
            for place in range(start, end - length + 1):
                segment = ids[place : place + length]
                active += [int((segment == expert).any(axis=1).sum()) for expert in range(layer.num_experts)]
    best = (-1.0, 0.0)
    for threshold in range(length + 1):
        taken = [f for f in active if f >= threshold]
        f1 = 2 * sum(taken) / (length * len(taken) + sum(active))
        best = max(best, (f1, -length * len(taken) / sum(active)))
    return best[0], -best[1]


def test_srp_is_the_published_one(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 2), Layer(4, 12, 3, num_null_experts=2))
    part = make_part(np.random.default_rng(0), layers, [40, 3, 25, 30], window=24, domains=("A", "B"), dropped=0.1)
    found = moescope.consistency(make_trace(tmp_path / "t.moe", [part], layers), lengths=(3, 8))
    assert found["domain"].values.tolist() == [TOTAL, "A", "B"]
    for length in (3, 8):
        for domain, rows in ((TOTAL, part), ("A", part.rows(part.domain == 0)), ("B", part.rows(part.domain == 1))):
            at = found.sel(domain=domain, length=length)
            for layer in layers:
                srp, ratio = published_f1(rows, (layer,), length)
                assert float(at["srp"].sel(layer=layer.layer)) == pytest.approx(srp, rel=1e-12)
                assert float(at["size_ratio"].sel(layer=layer.layer)) == pytest.approx(ratio, rel=1e-12)
            srp, ratio = published_f1(rows, layers, length)
            assert float(at["model_srp"]) == pytest.approx(srp, rel=1e-12)
            assert float(at["model_size_ratio"]) == pytest.approx(ratio, rel=1e-12)


def test_uniform_routing_has_the_srp_of_the_binomial_distribution() -> None:
    rng = np.random.default_rng(1)
    drawn = rng.random((200_000, 16)) < 1 / 4
    f = drawn.sum(axis=1)
    by_threshold = [2 * f[f >= a].sum() / (16 * (f >= a).sum() + f.sum()) for a in range(17)]
    assert uniform_srp(8, 2, 16) == pytest.approx(max(by_threshold), abs=0.002)
    assert uniform_srp(8, 8, 16) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=12))
def test_no_set_of_segments_does_better_than_a_threshold(counts: list[int]) -> None:
    """All experts active once: equation 4 holds because F1 is best for a threshold; try every subset of levels."""
    length = len(counts) - 1
    exactly = np.array(counts, float)
    active = exactly * np.arange(length + 1)
    if not active.sum():
        return
    best = max(
        2 * active[chosen].sum() / (length * exactly[chosen].sum() + active.sum())
        for chosen in ([v for v in range(length + 1) if subset >> v & 1] for subset in range(1, 2 ** (length + 1)))
    )
    found, _ = best_f1(exactly[::-1].cumsum()[::-1], length)
    assert float(found) == pytest.approx(best)


def routed(rng: np.random.Generator, documents: int, stay: float, layer: Layer, length: int = 60) -> Part:
    """Documents with favourite experts of their own; a token keeps the set before it with a probability."""
    document = np.repeat(np.arange(documents), length)
    taste = np.repeat(rng.normal(0, 0.8, (documents, layer.num_experts)), length, axis=0)
    ids = np.argsort(-(taste + rng.gumbel(size=taste.shape)), axis=1)[:, : layer.top_k]
    position = np.tile(np.arange(length), documents)
    anew = (rng.random(len(ids)) >= stay) | (position == 0)
    ids = ids[np.maximum.accumulate(np.where(anew, np.arange(len(ids)), 0))]
    zero = np.zeros(len(ids), np.uint32)
    return Part(document, zero, ("A",), zero, position, zero, {layer.layer: ids})


def judged(part: Part, layer: Layer, lengths: tuple[int, ...]):
    """The measure of a part in memory."""

    class Documents:
        document_numbers = np.unique(part.document)
        document_domains = np.zeros(len(document_numbers), np.int64)
        domains = ("A",)

    counter = SegmentCounter((layer,), DocumentGroups.of(Documents), lengths)  # type: ignore[arg-type]
    counter.add(part, (layer,))
    found = moescope.consistency(counter.result())
    return found.isel(domain=1).sel(layer=layer.layer)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 4)])
def test_without_order_nothing_is_found_beyond_it_in_ninety_five_of_a_hundred(num_experts: int, top_k: int) -> None:
    rng = np.random.default_rng(2)
    layer = Layer(0, num_experts, top_k)
    found = [judged(routed(rng, 40, 0.0, layer), layer, (4, 16)) for _ in range(200)]
    for length in (4, 16):
        p_values = np.array([float(at["excess_p"].sel(length=length)) for at in found])
        assert 0.01 <= (p_values < 0.05).mean() <= 0.10
        beyond = np.array([float(at["excess"].sel(length=length)) for at in found])
        assert abs(beyond.mean()) < 0.003


def test_the_interval_holds_the_true_srp_at_the_nominal_rate_and_order_is_found() -> None:
    rng = np.random.default_rng(3)
    layer = Layer(0, 8, 2)
    truth = judged(routed(rng, 6000, 0.4, layer), layer, (4, 16))
    found = [judged(routed(rng, 40, 0.4, layer), layer, (4, 16)) for _ in range(200)]
    for length in (4, 16):
        for value, low, high in (("srp", "srp_low", "srp_high"), ("excess", "excess_low", "excess_high")):
            true = float(truth[value].sel(length=length))
            held = [float(at[low].sel(length=length)) <= true <= float(at[high].sel(length=length)) for at in found]
            assert 0.90 <= np.mean(held) <= 0.99, (length, value, np.mean(held))
    assert all(float(at["excess_q"].sel(length=4)) < 0.01 for at in found)


def test_a_token_that_always_keeps_its_set_has_an_srp_of_one() -> None:
    rng = np.random.default_rng(4)
    layer = Layer(0, 8, 2)
    found = judged(routed(rng, 40, 1.0, layer), layer, (4, 16))
    assert found["srp"].values.tolist() == [1, 1]
    assert found["size_ratio"].values.tolist() == [1, 1]
    assert found["srp_null"].values.tolist() == pytest.approx([1, 1])  # in any order: each document has one set


def test_documents_shorter_than_a_segment_leave_no_value(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 2),)
    part = make_part(np.random.default_rng(5), layers, [20, 6, 20, 6], domains=("A", "B"), window=64)
    found = moescope.consistency(make_trace(tmp_path / "t.moe", [part], layers), lengths=(4, 16, 64))
    assert np.isnan(found["srp"].sel(domain="B", layer=0)).values.tolist() == [False, True, True]
    assert np.isnan(found["srp"].sel(domain=TOTAL, layer=0)).values.tolist() == [False, False, True]
    for name in ("srp_low", "srp_high", "excess_p"):
        assert np.isnan(found[name].sel(domain="B", length=16)).all()
    assert found["documents"].sel(domain="B").values.tolist() == [2, 0, 0]


def test_one_document_has_a_value_and_no_interval(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 2),)
    part = make_part(np.random.default_rng(6), layers, [40], domains=("A",), window=64)
    found = moescope.consistency(make_trace(tmp_path / "t.moe", [part], layers), lengths=(4,)).sel(layer=0, length=4)
    assert np.isfinite(found["srp"]).all()
    for name in ("srp_low", "srp_high", "excess_low", "excess_p"):
        assert np.isnan(found[name]).all()
