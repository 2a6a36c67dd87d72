"""What explains the choice: by hand, against slow loops and scipy's entropies, and against planted truths."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import information as information_of
from planted import planted
from scipy import stats
from synthetic import make_part, make_trace

from moescope.errors import NotRecorded
from moescope.measures import explain_kernels as kernels
from moescope.measures.explain import SOURCES, STRENGTHS, _entropy_interval, estimate, explain
from moescope.trace import Layer


def rows(seed: int, num_values: int = 5, num_ids: int = 4, documents: int = 12):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, documents)
    n = int(lengths.sum())
    x = rng.integers(-1, num_values, n).astype(np.int32)
    e = np.where(rng.random(n) < 0.6, x % num_ids, rng.integers(-1, num_ids, n)).astype(np.int32)
    return x, e, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def slow_prediction(x, e, starts, strength: float, num_ids: int, *, leave_out: bool) -> np.ndarray:
    """Bits of each document, predicted by counting again for each of its rows."""
    valid = (x >= 0) & (e >= 0)
    document = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    bits = np.zeros(len(starts) - 1)
    for r in np.flatnonzero(valid):
        used = valid & (document != document[r]) if leave_out else valid
        total = used.sum()
        popular = max((used & (e == e[r])).sum(), 0.5) / total
        seen = used & (x == x[r])
        predicted = ((seen & (e == e[r])).sum() + strength * popular) / (seen.sum() + strength)
        bits[document[r]] += np.log2(predicted / popular)
    return bits


def test_the_estimate_is_the_mean_of_two_predictions_counted_anew_for_each_row() -> None:
    x, e, starts = rows(0)
    found = estimate(x, e, starts, 5, 4)
    valid = (x >= 0) & (e >= 0)
    held_out = {a: slow_prediction(x, e, starts, a, 4, leave_out=True).sum() for a in STRENGTHS}
    best = max(held_out, key=lambda a: held_out[a])
    left_out = slow_prediction(x, e, starts, best, 4, leave_out=True)
    fitted = slow_prediction(x, e, starts, best, 4, leave_out=False)
    n = valid.sum()
    assert found.rows == n
    assert found.held_out == pytest.approx(left_out.sum() / n)
    assert found.bits == pytest.approx((left_out.sum() + fitted.sum()) / 2 / n)
    document = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    rows_by_document = np.bincount(document[valid], minlength=len(left_out))
    residual = (left_out + fitted) / 2 - found.bits * rows_by_document
    between = len(left_out) / (len(left_out) - 1) * (residual**2).sum() / n**2
    weaker = max((a for a in STRENGTHS if a <= best / 4), default=STRENGTHS[0])
    fitted, left_out = (slow_prediction(x, e, starts, weaker, 4, leave_out=out).sum() for out in (False, True))
    assert found.variance == pytest.approx(between + ((fitted - left_out) / n) ** 2 / 12)


def test_the_plug_in_value_is_that_of_scipys_entropies() -> None:
    x, e, starts = rows(1)
    valid = (x >= 0) & (e >= 0)
    table = np.zeros((5, 4))
    np.add.at(table, (x[valid], e[valid]), 1)
    entropies = [stats.entropy(counts, base=2) for counts in (table.sum(1), table.sum(0), table.ravel())]
    plain = entropies[0] + entropies[1] - entropies[2]
    found = estimate(x, e, starts, 5, 4)
    assert found.plug_in == pytest.approx(plain)
    g_statistic = stats.chi2_contingency(table, correction=False, lambda_="log-likelihood").statistic
    assert found.plug_in == pytest.approx(g_statistic / (2 * valid.sum() * np.log(2)))
    assert found.entropy == pytest.approx(entropies[1])
    # Miller and Madow: (non-empty cells - rows - columns + 1) / 2N nats.
    cells = (table > 0).sum() - (table.sum(1) > 0).sum() - (table.sum(0) > 0).sum() + 1
    assert found.miller_madow == pytest.approx(plain - cells / (2 * valid.sum()) / np.log(2))
    xlogx = np.append(0, np.arange(1, len(x) + 1) * np.log2(np.arange(1, len(x) + 1)))
    work = np.zeros((5, 4), np.int32), np.zeros(5, np.int32), np.zeros(4, np.int32)
    assert kernels.information(x, e, xlogx, *work) == pytest.approx(plain)
    assert not any(counts.any() for counts in work)


def test_an_expert_decided_by_the_value_is_explained_whole() -> None:
    x = np.tile(np.arange(4, dtype=np.int32), 50)
    found = estimate(x, x, np.arange(0, 201, 10), 4, 4)
    assert found.plug_in == pytest.approx(2)
    assert found.bits == pytest.approx(2, abs=0.01)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_names_of_values_and_experts_and_the_order_of_rows_in_a_document_do_not_matter(seed: int) -> None:
    x, e, starts = rows(seed)
    found = estimate(x, e, starts, 5, 4)
    rng = np.random.default_rng(seed)
    values, experts = rng.permutation(5).astype(np.int32), rng.permutation(4).astype(np.int32)
    order = np.concatenate([a + rng.permutation(b - a) for a, b in pairwise(starts)])
    other = estimate(
        np.where(x < 0, -1, values[x]).astype(np.int32)[order],
        np.where(e < 0, -1, experts[e]).astype(np.int32)[order],
        starts,
        5,
        4,
    )
    assert (other.bits, other.variance, other.rows) == pytest.approx((found.bits, found.variance, found.rows))
    assert found.held_out <= found.bits + 1e-12
    assert found.plug_in <= found.entropy + 1e-12


@pytest.mark.parametrize("kind", ["independent", "documents", "token", "domain", "sticky", "layer", "position"])
def test_planted_bits_are_found_and_nothing_else(kind: str) -> None:
    truths = planted(np.random.default_rng(0), kind).bits
    inside = dict.fromkeys(truths, 0)
    estimates = {source: [] for source in truths}
    draws = 20
    for seed in range(draws):
        sample = planted(np.random.default_rng(seed), kind).sample
        found = explain(sample, [1], permutations=3, seed=seed, threads=1).sel(layer=1)
        for source, truth in truths.items():
            at = found.sel(source=source)
            inside[source] += bool(at["bits_low"] <= truth + 1e-12 and truth <= at["bits_high"])
            estimates[source].append(float(at["bits"]))
    for source, truth in truths.items():
        assert inside[source] >= 0.75 * draws, source  # of 95 %: 14 or fewer of 20 has a chance below 1e-4
        assert np.mean(estimates[source]) == pytest.approx(truth, rel=0.05, abs=0.004), source


def test_independent_routing_over_many_experts_is_explained_by_nothing() -> None:
    made = planted(np.random.default_rng(5), "independent", 256)
    found = explain(made.sample, [1], permutations=19, threads=1).sel(layer=1)
    assert (found["plug_in"].sel(source=["token", "previous expert"]) > 1).all()  # what peers print
    assert (found["bits"] < 0.05).all()
    assert (found["bits_low"] == 0).all()


def test_what_comes_before_is_of_the_same_sequence(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 2), Layer(1, 8, 2))
    part = make_part(np.random.default_rng(0), layers, [40, 37, 25], window=8)
    found = explain(make_trace(tmp_path / "t.moe", [part], layers), [1], permutations=1).sel(layer=1)
    first = part.expert_ids[1][:, 0]
    pairs = np.flatnonzero(part.position[1:] > 0)
    for source, x in (("previous token", part.token_id), ("previous expert", first)):
        table = np.zeros((50, 8))
        np.add.at(table, (x[pairs], first[pairs + 1]), 1)
        assert found["plug_in"].sel(source=source) == pytest.approx(information_of(table / table.sum())), source
    for source, x in (("previous layer", part.expert_ids[0][:, 0]), ("domain", part.domain), ("token", part.token_id)):
        table = np.zeros((50, 8))
        np.add.at(table, (x, first), 1)
        assert found["plug_in"].sel(source=source) == pytest.approx(information_of(table / table.sum())), source


@pytest.mark.parametrize(
    ("kind", "source"),
    [("token", "token"), ("domain", "domain"), ("sticky", "previous expert"), ("position", "position"),
     ("layer", "previous layer")],
)  # fmt: skip
def test_what_is_planted_is_significant(kind: str, source: str) -> None:
    made = planted(np.random.default_rng(0), kind)
    found = explain(made.sample, [1], permutations=19).sel(layer=1)
    assert found["bits_p"].sel(source=source) == 1 / 20
    assert found["bits_null"].sel(source=source) < 0.3 * found["bits"].sel(source=source)


def test_permutation_tests_reject_independent_routing_as_often_as_they_say() -> None:
    rejected = []
    for seed in range(60):
        made = planted(np.random.default_rng(seed), "independent", documents=12)
        found = explain(made.sample, [1], permutations=19, seed=seed, threads=1)
        rejected.append((found["bits_p"].values <= 0.05).ravel())
    by_source = np.mean(rejected, axis=0)
    assert np.mean(by_source) < 0.09
    assert np.mean(by_source) > 0.015
    assert (by_source < 0.2).all()


def test_a_choice_that_lasts_is_not_explained_by_the_place_it_has() -> None:
    p = []
    for seed in range(20):
        made = planted(np.random.default_rng(seed), "sticky", documents=20, strength=0.8)
        found = explain(made.sample, [1], permutations=19, seed=seed).sel(layer=1, source="position")
        p.append(float(found["bits_p"]))
    assert np.mean(np.array(p) <= 0.05) <= 0.25  # tokens put in random order reject it in nine of ten


def test_the_null_of_locality_holds_what_the_documents_own_mix_explains() -> None:
    made = planted(np.random.default_rng(1), "documents", documents=100)
    found = explain(made.sample, [1], permutations=19).sel(layer=1, source="previous expert")
    assert found["bits"] > 0.01
    assert found["bits_null"] == pytest.approx(float(found["bits"]), rel=0.5)
    assert found["bits_p"] > 0.05


def test_each_of_the_choices_is_explained_as_if_they_were_tokens_of_their_own() -> None:
    made = planted(np.random.default_rng(2), "token").sample
    found = explain(made, [1], choice="all", permutations=3).sel(layer=1, source="token")
    ids = made.expert_ids[1]
    table = np.zeros((40, 8))
    for rank in (0, 1):
        np.add.at(table, (made.token_id, ids[rank]), 1)
    assert found["plug_in"] == pytest.approx(information_of(table / table.sum()))
    assert found["bits"] < explain(made, [1], permutations=3)["bits"].sel(layer=1, source="token")


def test_seeds_threads_and_the_other_layers_change_nothing(tmp_path: Path) -> None:
    layers = tuple(Layer(n, 8, 2) for n in (0, 2, 5))
    trace = make_trace(tmp_path / "t.moe", [make_part(np.random.default_rng(0), layers, [30] * 9)], layers)
    whole = explain(trace, permutations=5, threads=2)
    assert whole["layer"].values.tolist() == [0, 2, 5]
    one = explain(trace, [5], permutations=5, threads=1)
    for name in ("bits", "bits_low", "bits_high", "bits_null", "bits_p"):
        assert np.array_equal(whole[name].sel(layer=[5]), one[name], equal_nan=True), name
    assert np.isnan(whole["bits"].sel(layer=0, source="previous layer"))
    assert whole["bits"].sel(layer=5).notnull().all()


def test_progress_counts_the_layers() -> None:
    seen = []
    made = planted(np.random.default_rng(0), "independent", documents=4)
    explain(made.sample, permutations=1, threads=1, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_what_a_trace_lacks_is_not_explained_and_the_rest_is(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 2, ranked=False), Layer(1, 8, 2, ranked=False))
    part = make_part(np.random.default_rng(0), layers, [20] * 6)
    trace = make_trace(tmp_path / "t.moe", [part], layers, token_ids=False)
    with pytest.raises(NotRecorded, match="first"):
        explain(trace)
    found = explain(trace, choice="all", permutations=3)
    known = {str(source) for source in SOURCES if found["bits"].sel(source=source).notnull().all()}
    assert known == {"domain", "position"}


@pytest.mark.parametrize("lengths", [[7], [1, 1], [1, 5]])
def test_too_few_documents_give_no_interval_and_no_error(tmp_path: Path, lengths: list[int]) -> None:
    layers = (Layer(0, 8, 2),)
    part = make_part(np.random.default_rng(1), layers, lengths, dropped=0.3)
    trace = make_trace(tmp_path / "t.moe", [part], layers)
    found = explain(trace, permutations=2)
    assert found["bits"].isnull().all() == (len(lengths) == 1)
    assert ((found["bits_low"] <= found["bits"]) | found["bits"].isnull()).all()


def test_arguments_that_cannot_be_are_refused() -> None:
    sample = planted(np.random.default_rng(0), "independent", documents=3).sample
    for wrong in ({"choice": "second"}, {"permutations": 0}, {"threads": 0}):
        with pytest.raises(ValueError, match="must be"):
            explain(sample, **wrong)


def test_a_rotation_meets_its_ends_where_the_value_changes_and_each_change_comes_up() -> None:
    starts = np.array([0, 1, 7, 9], np.int64)
    values = np.array([5, 1, 1, 2, 2, 2, 1, 3, 3], np.int32)
    order, state = np.empty(9, np.int32), np.array([3], np.uint64)
    seen = set()
    for _ in range(200):
        kernels.rotate_within(starts, values, order, state)
        assert order[0] == 0
        assert order[7:].tolist() == [7, 8]  # one value: no change to rotate to
        begins = order[1:7].tolist().index(1)
        assert order[1:7].tolist() == [1 + (t - begins) % 6 for t in range(6)]
        seen.add(begins)
    assert seen == {0, 2, 5}  # where the document begins, and before each row whose value is another than the last


def test_where_rows_are_few_a_cell_the_interval_allows_for_what_cannot_be_learned() -> None:
    held = []
    for seed in range(12):
        made = planted(np.random.default_rng(seed), "domain", 256)
        at = explain(made.sample, [1], permutations=1, seed=seed).sel(layer=1, source="previous expert")
        assert at["rows_a_cell"] < 1
        held.append(bool(at["bits_low"] <= made.bits["previous expert"] <= at["bits_high"]))
    assert sum(held) >= 10, held  # 62 % of the intervals held it before they allowed for that
    many = planted(np.random.default_rng(0), "domain", 8)
    at = explain(many.sample, [1], permutations=1).sel(layer=1, source="previous expert")
    assert at["rows_a_cell"] == pytest.approx((many.sample.num_tokens - many.sample.num_documents) / 64)
    assert at["bits_high"] < 0.1  # and where they are many it does not


def test_the_entropy_of_sticky_routing_over_many_experts_is_not_low() -> None:
    held, values = [], []
    truth = 0.0
    for seed in range(40):
        made = planted(np.random.default_rng(seed), "sticky", 256)
        base = np.random.default_rng(256).dirichlet(np.full(256, 5.0))  # as planted draws it
        truth = float(stats.entropy(base, base=2))
        experts = made.sample.expert_ids[1][:1].astype(np.int32)
        value, low, high = _entropy_interval(experts, made.sample.starts, 256)
        held.append(low <= truth <= high)
        values.append(value)
    assert np.mean(held) >= 0.85  # fewer than 34 of 40 have a chance of 3 in 1000
    assert np.mean(values) == pytest.approx(truth, abs=0.04)  # Miller's correction leaves it 0.1 low
