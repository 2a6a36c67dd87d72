"""Load balance: by hand, by slow loops, against draws of known generators."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic import make_counts, make_part, make_trace, result_of

from moescope.measures import balance
from moescope.measures.balance import NEARLY_IDLE, summaries
from moescope.measures.groups import interval_of_largest, ratio_errors
from moescope.tallying.balance import BalanceCounter, BalanceCounts
from moescope.tallying.document_groups import NUM_GROUPS, document_groups
from moescope.trace import Layer, Part

LAYERS = (Layer(0, 8, 2), Layer(2, 20, 4, num_null_experts=3), Layer(3, 300, 1))


def parts_of(seed: int, dropped: float = 0.0) -> list[Part]:
    rng = np.random.default_rng(seed)
    shape = {"window": 7, "dropped": dropped, "weights": True}
    return [
        make_part(rng, LAYERS, [5, 40, 1, 17, 33], **shape),
        make_part(rng, LAYERS, [3], first_document=5, **shape),
        make_part(rng, LAYERS, [2, 1, 64, 30], first_document=6, **shape),
    ]


def with_loads(loads_GE: np.ndarray) -> BalanceCounts:
    """Counts of one layer and domain with these loads by group of documents."""
    num_groups, num_experts = loads_GE.shape
    empty = BalanceCounts.empty([Layer(0, num_experts, 1)], ["A"], batch_sizes=(), has_weights=False)
    loads = np.zeros((1, 1, NUM_GROUPS, num_experts), np.int64)
    loads[0, 0, :num_groups] = loads_GE
    return replace(empty, loads_LDGE=loads)


def slow_gini(p: np.ndarray) -> float:
    return sum(abs(a - b) for a in p for b in p) / (2 * len(p) ** 2 * p.mean())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=40).filter(any))
def test_the_summaries_equal_their_definitions(loads: list[int]) -> None:
    values = np.array(loads, float)
    imbalance, squared_cv, gini, deficit = summaries(values)
    assert imbalance == pytest.approx(values.max() / values.mean())
    assert np.sqrt(squared_cv) == pytest.approx(stats.variation(values), abs=1e-7)
    assert gini == pytest.approx(slow_gini(values), abs=1e-9)
    assert 1 - deficit == pytest.approx(stats.entropy(values) / np.log(len(values)), abs=1e-9)


@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_loads_batches_and_weights_equal_a_slow_loop(tmp_path: Path, dropped: float) -> None:
    parts = parts_of(1, dropped)
    trace = make_trace(tmp_path / "t.moe", parts, LAYERS)
    sizes = (1, 4, 6)
    counts = result_of(BalanceCounter, trace, batch_sizes=sizes, threads=1)
    for at, layer in enumerate(LAYERS):
        loads = np.zeros_like(counts.loads_LDGE[at])
        weights, weighed = np.zeros(3), 0
        sequences: list[np.ndarray] = []
        lengths: list[int] = []
        for part in parts:
            for row in range(part.num_tokens):
                if part.position[row] == 0:
                    sequences.append(np.zeros(layer.num_experts))
                    lengths.append(0)
                lengths[-1] += 1
                group = document_groups(part.document[row : row + 1])[0]
                pairs = zip(part.expert_ids[layer.layer][row], part.gate_weights[layer.layer][row], strict=True)
                ran = [(e, w) for e, w in pairs if e >= 0]
                for e, _ in ran:
                    loads[counts.domains.index(part.domain_names[part.domain[row]]), group, e] += 1
                    if e < layer.num_experts:
                        sequences[-1][e] += 1
                if ran:
                    p = np.sort([w for _, w in ran])[::-1] / sum(w for _, w in ran)
                    weights += [p[0], p[0] - (p[1] if len(p) > 1 else 0), stats.entropy(p, base=2)]
                    weighed += 1
        np.testing.assert_array_equal(counts.loads_LDGE[at], loads)
        np.testing.assert_allclose(counts.weights_LDGW[at].sum(axis=(0, 1)) / 2**30, weights, rtol=1e-6, atol=1e-6)
        assert counts.weighed_LDG[at].sum() == weighed
        assert (counts.weight_histogram_LWB[at].sum(axis=1) == weighed).all()
        for s, size in enumerate(sizes):
            batches = [sum(sequences[b : b + size]) for b in range(0, len(sequences) - size + 1, size)]
            values = np.array([b.max() * layer.num_experts / b.sum() for b in batches if b.sum()])
            assert counts.imbalances_LSB[at, s].sum() == len(values)
            assert counts.imbalance_LS[at, s] / 2**20 == pytest.approx(values.sum(), abs=1e-5 * len(values))
            assert counts.imbalance_squared_LS[at, s] / 2**20 == pytest.approx((values**2).sum(), abs=1e-4)
            tokens = [sum(lengths[b : b + size]) for b in range(0, len(sequences) - size + 1, size)]
            assert counts.token_sums_SB[s].sum() == sum(tokens)


def test_neither_threads_nor_parts_change_a_count(tmp_path: Path) -> None:
    parts = parts_of(2, 0.1)
    one = result_of(BalanceCounter, make_trace(tmp_path / "a.moe", parts, LAYERS), batch_sizes=(1, 5), threads=1)
    three = result_of(BalanceCounter, make_trace(tmp_path / "b.moe", parts, LAYERS), batch_sizes=(1, 5), threads=3)
    for name, value in vars(one).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(three, name), name)
    np.testing.assert_array_equal(one.sample.rows[2], three.sample.rows[2])


def test_a_batch_without_load_and_a_tiny_trace_have_no_imbalance_but_do_not_fail(tmp_path: Path) -> None:
    layer = Layer(0, 4, 1, drops=True)
    part = make_part(np.random.default_rng(0), (layer,), [5], dropped=1.0)
    found = balance(make_trace(tmp_path / "t.moe", [part], (layer,)))
    assert found["idle"].values.tolist() == [[4], [4]]
    assert found["imbalance"].isnull().all()
    assert found["batch_imbalance"].isnull().all()


def test_dead_and_rare_experts_are_told_apart() -> None:
    loads = np.tile([1000, 1000, 998, 2, 0], (20, 1))
    found = balance(with_loads(loads)).isel(domain=0, layer=0)
    assert found["imbalance"].item() == pytest.approx(5 / 3)
    assert found["max_vio"].item() == pytest.approx(2 / 3)
    assert (found["idle"], found["nearly_idle"], found["nearly_idle_low"], found["nearly_idle_high"]) == (1, 1, 1, 1)
    assert found["busiest"] == 0
    assert NEARLY_IDLE / 5 > 2 / 3000


def generate(rng: np.random.Generator, p: np.ndarray, documents: int, taste: float) -> np.ndarray:
    """Loads by group: documents of unequal length with tastes of their own around p."""
    tastes = rng.dirichlet(p * taste, documents)
    lengths = rng.integers(50, 400, documents)
    loads = rng.multinomial(lengths, tastes)
    grouped = np.zeros((NUM_GROUPS, len(p)), np.int64)
    np.add.at(grouped, document_groups(np.arange(documents)), loads)
    return grouped


@pytest.mark.parametrize(
    "p",
    [
        np.full(8, 1 / 8),
        np.array([0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]),
        np.array([0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05]),
        np.linspace(1, 3, 64) / np.linspace(1, 3, 64).sum(),
        np.append(0.12, np.full(63, 0.88 / 63)),
    ],
    ids=["balanced", "one expert ahead", "three experts ahead", "64 in a line", "one of 64 ahead"],
)
def test_intervals_cover_the_truth_of_known_generators(p: np.ndarray) -> None:
    rng = np.random.default_rng(11)
    imbalance, squared_cv, gini, deficit = summaries(p)
    truth = {"imbalance": imbalance, "cv": np.sqrt(squared_cv), "gini": gini, "entropy": 1 - deficit}
    hits = dict.fromkeys(truth, 0)
    for _ in range(200):
        found = balance(with_loads(generate(rng, p, 150, 60.0))).isel(domain=0, layer=0)
        for name, value in truth.items():
            hits[name] += bool(found[f"{name}_low"] - 1e-9 <= value <= found[f"{name}_high"] + 1e-9)
    assert min(hits.values()) >= 180, hits


def test_the_interval_of_the_largest_share_is_as_narrow_as_that_of_a_share_if_one_is_ahead() -> None:
    p, error = np.array([0.5, 0.2, 0.2, 0.1]), np.full(4, 0.01)
    half = stats.t.ppf(0.975, 29) * 0.01
    assert interval_of_largest(p, error, 30) == pytest.approx((0.5 - half, 0.5 + half))
    low, high = interval_of_largest(np.full(4, 0.25), error, 30)
    assert low == pytest.approx(0.25 - stats.t.ppf(1 - 0.025 / 4, 29) * 0.01)
    assert high == pytest.approx(0.25 + half)


def test_the_error_of_a_ratio_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(3)
    y, n = rng.integers(0, 9, (12, 1)), rng.integers(10, 30, 12)
    y, n = np.vstack([y, [[0]]]), np.append(n, 0)  # an empty group counts for nothing
    p, error = ratio_errors(y, n)
    residual = y[:12, 0] - p * n[:12]
    assert p == y.sum() / n.sum()
    assert error == pytest.approx(np.sqrt(12 / 11 * (residual**2).sum()) / n.sum())


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (40, 6)])
def test_batches_of_independent_tokens_are_as_imbalanced_as_their_null_says(
    tmp_path: Path, experts: int, top_k: int
) -> None:
    layers = (Layer(0, experts, top_k),)
    rng = np.random.default_rng(4)
    scores = rng.gumbel(size=(40 * 600, experts)) + np.linspace(0, 1, experts)
    part = make_part(rng, layers, [40] * 600, window=40, domains=("A",))
    part = replace(part, expert_ids={0: np.argsort(-scores, axis=1)[:, :top_k]})
    found = balance(make_trace(tmp_path / "t.moe", [part], layers)).isel(layer=0)
    assert found["batches"].values.tolist() == [600, 37, 2]
    for size in (1, 16):
        at = found.sel(batch=size)
        assert at["batch_imbalance"] == pytest.approx(at["batch_imbalance_null"].item(), abs=0.03)
        np.testing.assert_allclose(at["batch_imbalance_quantile"], at["batch_imbalance_null_quantile"], atol=0.12)
    # Against batches drawn from all tokens by a plain loop.
    one_hot = np.zeros((len(scores), experts))
    np.put_along_axis(one_hot, part.expert_ids[0], 1, axis=1)
    drawn = [one_hot[rng.integers(0, len(scores), 640)].sum(axis=0) for _ in range(400)]
    expected = np.mean([load.max() / load.mean() for load in drawn])
    assert found["batch_imbalance_null"].sel(batch=16).item() == pytest.approx(expected, abs=0.02)


def test_documents_with_tastes_make_batches_more_imbalanced_than_independent_tokens(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 1),)
    rng = np.random.default_rng(5)
    part = make_part(rng, layers, [50] * 200, window=50, domains=("A",))
    favourite = rng.integers(0, 8, 200)[part.document.astype(int)]
    chosen = np.where(rng.random(part.num_tokens) < 0.5, favourite, rng.integers(0, 8, part.num_tokens))
    part = replace(part, expert_ids={0: chosen[:, None]})
    found = balance(make_trace(tmp_path / "t.moe", [part], layers)).isel(layer=0).sel(batch=1)
    assert found["batch_imbalance_low"] > 2 * found["batch_imbalance_null"]


def test_a_trace_of_counts_has_a_balance_and_no_batches(tmp_path: Path) -> None:
    loads = {g: {0: {g % 3: 5 + g, 7: 1}} for g in range(40)}
    found = balance(make_counts(tmp_path / "c.moe", loads))
    whole = np.zeros(8)
    for of in loads.values():
        for e, n in of[0].items():
            whole[e] += n
    assert found["imbalance"].sel(domain="(all)").item() == pytest.approx(whole.max() / whole.mean())
    assert found["idle"].sel(domain="(all)").item() == 4
    assert "batch_imbalance" not in found
    assert "weight" not in found


def test_the_statistics_of_weights_have_intervals_around_hand_counted_means(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 2),)
    part = make_part(np.random.default_rng(6), layers, [3] * 10, weights=True, domains=("A",))
    part = replace(part, gate_weights={0: np.tile(np.float32([[0.6, 0.2]]), (30, 1))})
    found = balance(make_trace(tmp_path / "t.moe", [part], layers)).isel(layer=0).sel(domain="(all)")
    expected = [0.75, 0.5, stats.entropy([0.75, 0.25], base=2)]
    for name in ("weight", "weight_low", "weight_high"):
        np.testing.assert_allclose(found[name], expected, atol=1e-6)
    np.testing.assert_allclose(found["weight_quantile"].sel(quantile=0.5), expected, atol=0.006)
