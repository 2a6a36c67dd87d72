"""Shares, repeats, divergence and their intervals: by hand, by slow loops, against published counts, and calibrated."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon
from synthetic import make_part, make_trace

from moescope.measures import divergence, published, repeats, shares
from moescope.measures.divergence import js_divergence
from moescope.measures.repeats import sets_meet, uniform_repeats
from moescope.measures.statistics import (
    false_discovery_rate,
    noncentral_interval,
    proportion_interval,
    ratio,
    ratio_standard_error,
)
from moescope.tallying import Tally, choice_labels, tally
from moescope.trace import Layer, Part


def part_of(documents: list[tuple[str, list[list[int]]]], layer: Layer = Layer(0, 8, 2)) -> Part:  # noqa: B008
    """Documents given as (domain, the experts of each token)."""
    names = tuple(dict.fromkeys(domain for domain, _ in documents))
    lengths = [len(tokens) for _, tokens in documents]
    return Part(
        np.repeat(np.arange(len(documents)), lengths),
        np.repeat([names.index(domain) for domain, _ in documents], lengths),
        names,
        np.zeros(sum(lengths), int),
        np.concatenate([np.arange(length) for length in lengths]),
        np.zeros(sum(lengths), int),
        {layer.layer: np.array([experts for _, tokens in documents for experts in tokens])},
    )


def tally_of(path: Path, documents: list[tuple[str, list[list[int]]]], layer: Layer = Layer(0, 8, 2)) -> Tally:  # noqa: B008
    return tally(make_trace(path / "t.moe", [part_of(documents, layer)], (layer,)))


TWO_DOCUMENTS = [("A", [[0, 1], [0, 2], [3, 0]]), ("A", [[0, 1]]), ("B", [[5, 6], [6, 5]])]


def test_shares_of_three_documents_counted_by_hand(tmp_path: Path) -> None:
    found = shares(tally_of(tmp_path, TWO_DOCUMENTS)).sel(layer=0, domain="A")
    assert found["share"].sel(choice="first").values.tolist() == [0.75, 0, 0, 0.25, 0, 0, 0, 0]
    assert found["share"].sel(choice="all").values.tolist() == [0.5, 0.25, 0.125, 0.125, 0, 0, 0, 0]
    assert found["share_of_tokens"].sel(choice="all").sum() == 2
    assert found["share_null"] == 1 / 8
    # Expert 0, all: documents give 3 of 6 and 1 of 2; p = 1/2, so no residual and no error.
    assert found["share_error"].sel(choice="all", expert=0) == 0
    # Expert 1, all: 1 of 6 and 1 of 2; p = 1/4, residuals -1/2 and 1/2: 2/1 * (1/4 + 1/4) / 8².
    assert found["share_error"].sel(choice="all", expert=1) == pytest.approx(1 / 8)


def test_repeats_of_three_documents_counted_by_hand(tmp_path: Path) -> None:
    found = repeats(tally_of(tmp_path, TWO_DOCUMENTS)).sel(layer=0)
    assert found["rate"].sel(domain="A").values.tolist() == [0.5, 1.0, 1.0]
    assert found["rate"].sel(domain="B").values.tolist() == [0.0, 1.0, 1.0]
    assert found["pairs"].values.tolist() == [2, 1]
    assert np.isnan(found["rate_low"].sel(domain="B")).all()  # one document has no interval
    # Among 4 tokens of A, first choices 0 0 3 0: 6 of 12 ordered pairs agree; all sets hold expert 0.
    assert found["rate_null"].sel(domain="A").values.tolist() == pytest.approx([0.5, 1.0, 9 / 12])


def test_the_baselines_are_those_of_the_paper_and_of_other_shapes() -> None:
    percent = {
        shape: [100 * rate for rate in uniform_repeats(*shape)] for shape in [(8, 2), (64, 8), (128, 8), (256, 8)]
    }
    assert percent[8, 2] == pytest.approx([12.5, 46.43, 25], abs=0.005)
    assert percent[64, 8][:2] == pytest.approx([1.56, 67.91], abs=0.005)
    assert percent[128, 8][:2] == pytest.approx([0.78, 41.23], abs=0.005)
    assert percent[256, 8][:2] == pytest.approx([0.39, 22.71], abs=0.005)
    assert uniform_repeats(2, 2) == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("layer", "dropped"),
    [
        (Layer(0, 8, 2), 0),
        (Layer(0, 20, 2), 0.2),
        (Layer(0, 9, 1), 0.2),
        (Layer(0, 130, 2), 0.1),
        (Layer(0, 64, 6), 0.1),
    ],
)
def test_the_marginal_null_equals_a_loop_over_all_pairs_of_tokens(tmp_path: Path, layer: Layer, dropped: float) -> None:
    part = make_part(np.random.default_rng(0), (layer,), [40, 30, 20], domains=("A",), dropped=dropped)
    found = repeats(tally(make_trace(tmp_path / "t.moe", [part], (layer,))))["rate_null"].values[0, 0]
    tokens = part.expert_ids[0].tolist()
    expected = np.zeros(3)
    for i, one in enumerate(tokens):
        for j, other in enumerate(tokens):
            if i != j:
                shared = (set(one) & set(other)) - {-1}
                expected += [one[0] == other[0] >= 0, bool(shared), one[0] >= 0 and one[0] in other]
    np.testing.assert_allclose(found, expected / (len(tokens) * (len(tokens) - 1)), rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), experts=st.integers(2, 300), top_k=st.integers(1, 9))
def test_what_must_hold_for_any_routing(tmp_path_factory, seed: int, experts: int, top_k: int) -> None:
    layers = (Layer(0, experts, min(top_k, experts)), Layer(2, 8, 2))
    part = make_part(np.random.default_rng(seed), layers, [30, 25, 20, 11])
    found = tally(make_trace(tmp_path_factory.mktemp("any") / "t.moe", [part], layers))
    s, r, d = shares(found), repeats(found), divergence(found)
    known = s["top_k"] >= xr.DataArray(np.arange(s.sizes["choice"]), dims="choice")
    np.testing.assert_allclose(s["share"].sum("expert").where(known, 1), 1)
    np.testing.assert_allclose(s["share_of_tokens"].sel(choice="all").sum("expert"), [s["top_k"].values] * 3)
    for low, value, high in ((s["share_low"], s["share"], s["share_high"]), (r["rate_low"], r["rate"], r["rate_high"])):
        ok = np.isfinite(low)
        assert (low.values[ok] <= value.values[ok] + 1e-12).all()
        assert (value.values[ok] <= high.values[ok] + 1e-12).all()
    assert (r["rate"].sel(kind="first") <= r["rate"].sel(kind="first_in_next")).all()
    assert (r["rate"].sel(kind="first_in_next") <= r["rate"].sel(kind="any")).all()
    assert (d["jsd"] >= 0).all()
    assert (d["jsd"] <= 1 + 1e-12).all()
    np.testing.assert_allclose(d["jsd"], d["jsd"].transpose("other", "domain", "layer"), atol=1e-15)


def test_layers_of_different_shapes_stand_side_by_side(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 2), Layer(1, 64, 6, num_null_experts=1))
    part = make_part(np.random.default_rng(1), layers, [50, 50])
    found = shares(tally(make_trace(tmp_path / "t.moe", [part], layers)))
    assert found["share"].sel(layer=0, choice="all").notnull().sum("expert").values.tolist() == [8, 8]
    assert found["share"].sel(layer=0, choice="third").isnull().all()
    assert found["share_null"].values.tolist() == [1 / 8, 1 / 64]
    assert found["choice"].values.tolist() == choice_labels(6)


def test_the_standard_error_equals_the_slow_formula_over_documents() -> None:
    rng = np.random.default_rng(2)
    n = rng.integers(10, 100, 12)
    y = rng.binomial(n, rng.beta(2, 5, 12))
    p = y.sum() / n.sum()
    slow = np.sqrt(12 / 11 * sum((y_d - p * n_d) ** 2 for y_d, n_d in zip(y, n, strict=True)) / n.sum() ** 2)
    fast = ratio_standard_error(y.sum(), n.sum(), (y**2).sum(), (y * n).sum(), (n**2).sum(), 12)
    assert float(fast) == pytest.approx(slow)


def test_intervals_clustered_by_document_cover_the_truth_at_the_nominal_rate() -> None:
    """2,000 draws of 25 documents whose own rates vary: 95 % intervals must cover; token-wise ones would not."""
    rng = np.random.default_rng(3)
    truth, draws, documents = 0.13, 2000, 25
    n = rng.integers(100, 800, (draws, documents))
    y = rng.binomial(n, rng.beta(40 * truth, 40 * (1 - truth), (draws, documents)))
    p = ratio(y.sum(1), n.sum(1))
    error = ratio_standard_error(y.sum(1), n.sum(1), (y**2).sum(1), (y * n).sum(1), (n**2).sum(1), documents)
    low, high = proportion_interval(p, error, documents)
    assert 0.93 < ((low <= truth) & (truth <= high)).mean() < 0.97
    naive = 1.96 * np.sqrt(p * (1 - p) / n.sum(1))
    assert (np.abs(p - truth) <= naive).mean() < 0.5


def test_an_expert_no_document_chose_has_an_interval_that_depends_on_the_documents_alone() -> None:
    low, high = proportion_interval(0.0, 0.0, 20)
    assert (float(low), float(high)) == (0, pytest.approx(1 - 0.025 ** (1 / 20)))
    low, high = proportion_interval(1.0, 0.0, 20)
    assert (float(low), float(high)) == (pytest.approx(0.025 ** (1 / 20)), 1)
    assert np.isnan(proportion_interval(0.3, np.nan, 1)).all()


def test_divergence_is_scipys_squared_and_in_bits() -> None:
    rng = np.random.default_rng(4)
    p, q = rng.dirichlet(np.ones(8), (2, 50))
    expected = [jensenshannon(a, b, base=2) ** 2 for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(js_divergence(p, q), expected, atol=1e-12)


def routed_documents(rng: np.random.Generator, concentration: float, shift: float) -> list[tuple[str, list[list[int]]]]:
    """Three domains of 30 documents; a document has its own popularity of experts; `shift` moves domain C."""
    documents = []
    for domain in "ABC":
        popularity = np.full(8, 1 / 8)
        if domain == "C":
            popularity = popularity + shift * np.array([1, -1, 0, 0, 0, 0, 0, 0])
        for _ in range(30):
            own = rng.dirichlet(popularity * concentration)
            scores = np.log(own + 1e-12) + rng.gumbel(size=(60, 8))
            documents.append((domain, np.argsort(-scores, axis=1)[:, :2].tolist()))
    return documents


def test_the_test_of_equal_domains_rejects_about_5_percent_of_equal_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    p_values = []
    for n in range(100):
        (tmp_path / str(n)).mkdir()
        found = divergence(tally_of(tmp_path / str(n), routed_documents(rng, 30, 0)))
        p_values += found["jsd_rest_p"].values[:1, 0].tolist()
    # 100 draws at a true 5 % give at most 11 rejections with probability 0.99.
    assert (np.array(p_values) < 0.05).sum() <= 11
    assert stats.kstest(p_values, "uniform").pvalue > 0.001


def test_a_domain_that_differs_is_found_and_its_divergence_is_in_the_interval(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    found = divergence(tally_of(tmp_path, routed_documents(rng, 200, 0.1))).sel(layer=0)
    assert found["jsd_rest_q"].sel(domain="C") < 1e-4
    assert found["jsd_rest"].values.argmax() == 2
    at = found.sel(domain="C")
    assert at["jsd_rest_low"] < at["jsd_rest"] < at["jsd_rest_high"]
    assert at["jsd_rest_null"] < at["jsd_rest_low"]


def test_one_domain_has_no_rest_to_differ_from(tmp_path: Path) -> None:
    found = divergence(tally_of(tmp_path, [("A", [[0, 1]]), ("A", [[1, 2]])]))
    assert found["jsd_rest"].isnull().all()
    assert found["jsd_rest_q"].isnull().all()


def test_the_noncentral_interval_inverts_its_own_distribution() -> None:
    low, high = noncentral_interval(4.0, 7, 60)
    assert stats.ncf.cdf(4.0, 7, 60, low) == pytest.approx(0.975, abs=1e-4)
    assert stats.ncf.cdf(4.0, 7, 60, high) == pytest.approx(0.025, abs=1e-4)
    assert noncentral_interval(0.5, 7, 60)[0] == 0


def test_the_false_discovery_rate_leaves_unknown_values_out() -> None:
    adjusted = false_discovery_rate([[0.01, np.nan], [0.04, 0.03]])
    np.testing.assert_allclose(adjusted, [[0.03, np.nan], [0.04, 0.04]])


def test_the_sample_estimates_the_meeting_of_sets_to_a_few_tenths_of_a_point() -> None:
    rng = np.random.default_rng(7)
    ids = np.argsort(rng.random((2048, 128)), axis=1)[:, :8].astype(np.int32)
    assert sets_meet(ids, 128) == pytest.approx(uniform_repeats(128, 8)[1], abs=0.004)


def test_table_5_is_typed_in_as_published(shared_data: Path) -> None:
    table = published.table5()
    with (shared_data / "mixtral_table5.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == table.size
    for row in rows:
        kind = "first" if row["choice"] == "first" else "any"
        assert table.sel(domain=row["domain"], kind=kind, layer=int(row["layer"])) == float(row["percent"])


def olmoe_counts(shared_data: Path) -> dict[tuple[str, str, int], Counter]:
    counts: dict[tuple[str, str, int], Counter] = {}
    with (shared_data / "olmoe_repo_routing_counts.csv").open() as file:
        for row in csv.DictReader(file):
            key = row["model"], row["choice"], int(row["layer"])
            counts.setdefault(key, Counter())[row["domain"], int(row["expert"])] += int(row["count"])
    return counts


@pytest.mark.parametrize(
    ("model", "expected"),
    [("mistralai/Mixtral-8x7B-v0.1", [0.0031, 0.0037, 0.0090]), ("allenai/OLMoE-1B-7B-0924", [0.167, 0.401, 0.501])],
)
def test_the_published_counts_of_two_real_models_give_their_information_about_the_domain(
    shared_data: Path, model: str, expected: list[float]
) -> None:
    """I(domain; expert) is the Jensen-Shannon divergence of equally weighted domains: computed both ways."""
    counts = olmoe_counts(shared_data)
    assert model in {name for name, _, _ in counts}, sorted({name for name, _, _ in counts})
    for layer, bits in zip((0, 7, 15), expected, strict=True):
        cell = counts[model, "topk", layer]
        domains = sorted({domain for domain, _ in cell})
        experts = max(expert for _, expert in cell) + 1
        load = np.array([[cell[domain, expert] for expert in range(experts)] for domain in domains], float)
        p = load / load.sum(axis=1, keepdims=True)
        mean = p.mean(axis=0)
        information = (p * np.log2(np.divide(p, mean, out=np.ones_like(p), where=p > 0))).sum(axis=1).mean()
        assert information == pytest.approx(bits, abs=6e-4 if bits > 0.1 else 6e-5)


def test_the_published_counts_of_mixtral_give_the_marginal_null_of_repeats(shared_data: Path, tmp_path: Path) -> None:
    """Σp² of the first choice, through our own null, for the values that REFERENCE gives for Mixtral."""
    expected = {"arxiv": (13.27, 12.62, 13.41), "github": (13.17, 13.27, 13.74), "wikipedia": (13.25, 12.65, 13.04)}
    expected |= {"book": (14.06, 12.91, 13.82), "c4": (13.39, 12.68, 12.94)}
    counts = olmoe_counts(shared_data)
    for domain, values in expected.items():
        for layer, percent in zip((0, 7, 15), values, strict=True):
            cell = counts["mistralai/Mixtral-8x7B-v0.1", "first", layer]
            load = np.array([cell[domain, expert] for expert in range(8)])
            tokens = [[expert] for expert in range(8) for _ in range(load[expert] // 64)]
            folder = tmp_path / f"{domain}{layer}"
            folder.mkdir()
            found = repeats(tally_of(folder, [(domain, tokens)], Layer(0, 8, 1)))["rate_null"].sel(kind="first")
            assert 100 * found.item() == pytest.approx(percent, abs=0.05)
