"""Repeats against their nulls: by hand, against loops over all pairs of tokens, and against planted truths."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from itertools import permutations as orders
from pathlib import Path

import numpy as np
import pytest
from planted import planted
from scipy import stats
from synthetic import make_part, make_trace

from moescope.measures import locality_kernels as kernels
from moescope.measures import repeats
from moescope.measures.locality import geometric_runs, locality
from moescope.measures.schema import TOTAL
from moescope.tallying import tally
from moescope.tallying.document_sample import DocumentSample
from moescope.trace import Layer


def sample_of(documents: list[list[tuple[int, tuple[int, ...]]]], num_experts: int = 8) -> DocumentSample:
    """Documents given as tokens of (token id, experts), all of one domain and one sequence each."""
    lengths = [len(tokens) for tokens in documents]
    tokens = [token for document in documents for token in document]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.array([experts for _, experts in tokens]).T
    return DocumentSample(
        (Layer(0, num_experts, len(ids)),),
        ("A",),
        np.arange(len(documents)),
        np.zeros(len(documents), np.int64),
        starts,
        starts,
        np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        np.array([token_id for token_id, _ in tokens], np.int32),
        {0: ids},
        1.0,
    )


BY_HAND = [
    [(7, (0, 1)), (7, (0, 2)), (5, (3, 0)), (5, (4, 5))],
    [(7, (0, 1)), (5, (0, 6)), (7, (1, 0))],
]


def test_neighbours_lags_and_runs_of_two_documents_counted_by_hand() -> None:
    found = locality(sample_of(BY_HAND), lags=[1, 2, 4]).sel(layer=0, domain="A")
    first = found.sel(kind="first")
    assert found["pairs_counted"].values.tolist() == [5, 2, 3]
    assert first["rate"].values.tolist() == pytest.approx([2 / 5, 1 / 2, 1 / 3])
    assert found.sel(kind="any")["rate"].values.tolist() == pytest.approx([4 / 5, 1 / 2, 1])
    assert first["lag_rate"].sel(lag=[1, 2]).values.tolist() == pytest.approx([2 / 5, 0])
    assert found["lag_rate"].sel(kind="any", lag=2) == pytest.approx(2 / 3)
    assert found["lag_rate"].sel(lag=4).isnull().all()
    # Runs: 00 3 4 and 00 1, so 5 runs, three of one token and two of two.
    assert found["runs"].values[:3].tolist() == pytest.approx([3 / 5, 2 / 5, 0])
    assert found["run_mean"] == pytest.approx(7 / 5)


def test_the_document_in_any_order_is_the_mean_over_all_orders() -> None:
    sample = sample_of(BY_HAND)
    counts = []
    for start, end in ((0, 4), (4, 7)):
        firsts = sample.expert_ids[0][0, start:end].tolist()
        counts.append(np.mean([sum(a == b for a, b in pairwise(o)) for o in orders(firsts)]))
    found = locality(sample).sel(layer=0, domain="A", pairs="all", null="document", kind="first")
    assert found["rate_null"] == pytest.approx(sum(counts) / 5)


@pytest.mark.parametrize(("layer", "dropped"), [(Layer(0, 8, 2), 0.0), (Layer(0, 130, 4), 0.2), (Layer(0, 4, 1), 0.1)])
def test_every_null_is_near_the_loop_over_all_pairs_that_it_draws_from(
    tmp_path: Path, layer: Layer, dropped: float
) -> None:
    part = make_part(np.random.default_rng(3), (layer,), [40, 30, 20, 35], domains=("A", "B"), dropped=dropped)
    trace = make_trace(tmp_path / "t.moe", [part], (layer,))
    tokens = [(set(ids) - {-1}, ids[0]) for ids in part.expert_ids[0].tolist()]
    document, domain, token_id = part.document.tolist(), part.domain.tolist(), part.token_id.tolist()

    def meets(a: int, b: int, kind: int) -> float:
        if kind == 0:
            return float(tokens[a][1] == tokens[b][1] >= 0)
        return float(bool(tokens[a][0] & tokens[b][0]))

    every = range(len(tokens))
    pairs = [t for t in every[:-1] if part.position[t + 1] == part.position[t] + 1 and document[t] == document[t + 1]]
    draws = []
    for seed in range(12):
        draws.append(locality(trace, seed=seed).sel(layer=0, domain=TOTAL, pairs="all")["rate_null"])
    found = np.mean([d.values for d in draws], axis=0)
    spread = np.std([d.values for d in draws], axis=0) / np.sqrt(12)
    for kind in range(2):
        popularity, within, words = [], [], []
        for t in pairs:
            mine = [s for s in every if domain[s] == domain[t]]
            popularity.append(np.mean([meets(a, b, kind) for a in mine for b in mine if a != b]))
            mine = [s for s in every if document[s] == document[t]]
            within.append(np.mean([meets(a, b, kind) for a in mine for b in mine if a != b]))
            others = [s for s in every if document[s] != document[t]]
            left, right = ([s for s in others if token_id[s] == token_id[t + i]] for i in range(2))
            needed = 2 if token_id[t] == token_id[t + 1] else 1
            left, right = (side if len(side) >= needed else others for side in (left, right))
            words.append(np.mean([meets(a, b, kind) for a in left for b in right if a != b]))
        for null, truth in ((1, popularity), (2, within), (3, words)):
            assert found[null, kind] == pytest.approx(np.mean(truth), abs=5 * spread[null, kind] + 0.002), (null, kind)


def test_rates_and_the_popularity_null_are_those_of_repeats(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 2), Layer(1, 64, 6))
    part = make_part(np.random.default_rng(0), layers, [50, 60, 70, 80, 90, 100], dropped=0.05)
    trace = make_trace(tmp_path / "t.moe", [part], layers)
    found, known = locality(trace), repeats(tally(trace))
    domains, kinds = known["domain"].values, ["first", "any"]
    at = found.sel(domain=domains, pairs="all")
    assert np.allclose(at["rate"], known["rate"].sel(kind=kinds))
    assert np.allclose(at["rate_low"], known["rate_low"].sel(kind=kinds))
    assert np.allclose(at["lag_rate"].sel(lag=1), known["rate"].sel(kind=kinds))
    assert np.allclose(at["rate_null"].sel(null="uniform", domain="ArXiv"), known["rate_uniform"].sel(kind=kinds))
    assert np.allclose(at["rate_null"].sel(null="popularity", kind="first"), known["rate_null"].sel(kind="first"))
    assert np.allclose(at["rate_null"].sel(null="popularity"), known["rate_null"].sel(kind=kinds), atol=0.03)


def test_stand_ins_have_the_same_ids_come_from_other_documents_and_are_two_tokens() -> None:
    made = planted(np.random.default_rng(0), "token", documents=6).sample
    document = made.document_of_token()
    order = np.argsort(made.token_id, kind="stable").astype(np.int32)
    bounds = np.concatenate([[0], np.cumsum(np.bincount(made.token_id, minlength=40))]).astype(np.int64)
    left, right = (np.empty((8, made.num_tokens), np.int32) for _ in range(2))
    state = np.array([1], np.uint64)
    kernels.draw_same_ids(made.token_id, document, order, bounds, made.sequence_starts, state, left, right)
    ends = np.isin(np.arange(made.num_tokens), made.sequence_starts[1:] - 1)
    assert (left[:, ends] == -1).all()
    assert (left[:, ~ends] >= 0).all()
    by_id = [set(document[made.token_id == x].tolist()) for x in range(40)]
    for t in np.flatnonzero(~ends):
        for stand_in, at in ((left[:, t], t), (right[:, t], t + 1)):
            assert (document[stand_in] != document[t]).all()
            elsewhere = [s for s in by_id[made.token_id[at]] if s != document[t]]
            if len(elsewhere) > 1:
                assert (made.token_id[stand_in] == made.token_id[at]).all()
    equal = np.flatnonzero(~ends[:-1] & (made.token_id[1:] == made.token_id[:-1]))
    assert len(equal) > 10
    assert (left[:, equal] != right[:, equal]).all()


@pytest.mark.parametrize("kind", ["independent", "token", "documents", "sticky", "domain", "collapsed", "alternating"])
def test_planted_rates_and_excesses_are_inside_their_intervals(kind: str) -> None:
    draws, inside, total = 40, {}, {}
    for seed in range(draws):
        made = planted(np.random.default_rng(seed), kind)
        found = locality(made.sample, [1], lags=[1], seed=seed).sel(layer=1, kind="first", domain=TOTAL)
        found = found.sel(pairs="all")
        truths = {}
        if made.first is not None:
            truths["rate"] = made.first, found["rate_low"], found["rate_high"]
            excess = found["excess_low"].sel(null="words"), found["excess_high"].sel(null="words")
            truths["words"] = made.first - made.words, *excess
        if kind not in ("sticky", "alternating", "domain", "collapsed"):
            at = found.sel(null="document")
            truths["document"] = 0.0, at["excess_low"], at["excess_high"]
        for name, (truth, low, high) in truths.items():
            total[name] = total.get(name, 0) + 1
            inside[name] = inside.get(name, 0) + bool(low <= truth + 1e-12 and truth <= high + 1e-12)
    for name in total:
        assert inside[name] >= 0.82 * draws, (name, inside)  # of 95 %: 32 or fewer of 40 has a chance below 1e-3


@pytest.mark.parametrize("null", ["popularity", "document"])
@pytest.mark.parametrize("kind", ["documents", "collapsed"])
def test_the_error_of_an_excess_is_that_of_a_jackknife_over_documents(
    null: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[locality.__module__], "FEWEST_EXPECTED", 0)  # the formula, be pairs many or few
    sample = planted(np.random.default_rng(4), kind, documents=50).sample
    one_domain = replace(sample, domain=np.zeros(50, np.int64), domain_names=("A",))
    at = {"domain": "A", "pairs": "all", "null": null, "layer": 1, "kind": "first"}
    found = locality(one_domain, [1]).sel(at)
    firsts = [sample.expert_ids[1][0, a:b].astype(int) for a, b in pairwise(sample.starts)]

    def excess(documents: list[np.ndarray]) -> float:
        pairs = sum(len(d) - 1 for d in documents)
        rate = sum((d[1:] == d[:-1]).sum() for d in documents) / pairs
        mixes = [np.bincount(d, minlength=8) for d in documents]
        chance = [(c * (c - 1)).sum() / (c.sum() * (c.sum() - 1)) for c in mixes]
        if null == "popularity":
            whole = np.sum(mixes, axis=0)
            return rate - (whole * (whole - 1)).sum() / (whole.sum() * (whole.sum() - 1))
        return rate - sum(p * (len(d) - 1) for p, d in zip(chance, documents, strict=True)) / pairs

    without = np.array([excess(firsts[:g] + firsts[g + 1 :]) for g in range(50)])
    error = np.sqrt(49 / 50 * ((without - without.mean()) ** 2).sum())
    assert found["excess"] == pytest.approx(excess(firsts))
    half = float(found["excess_high"] - found["excess"])
    assert half / stats.t.ppf(0.975, 49) == pytest.approx(error, rel=0.05)


def test_words_that_choose_for_themselves_leave_nothing_and_a_sticky_router_leaves_all() -> None:
    words = locality(planted(np.random.default_rng(0), "token", documents=200, strength=0.9).sample, [1])
    at = words.sel(layer=1, domain=TOTAL, kind="first", null="words")
    equal, different = at.sel(pairs="equal ids"), at.sel(pairs="different ids")
    assert equal["rate"] > 0.7
    assert abs(float(equal["excess"])) < 0.05
    assert abs(float(different["excess"])) < 0.01
    sticky = locality(planted(np.random.default_rng(0), "sticky", documents=200).sample, [1])
    at = sticky.sel(layer=1, domain=TOTAL, kind="first", pairs="all")
    assert at["excess"].sel(null="words") == pytest.approx(0.42, abs=0.03)
    # A repeat at distance d is d repeats in a row, or chance: (1/2)^d of the excess at none.
    curve = sticky["lag_excess"].sel(layer=1, domain=TOTAL, kind="first").values
    assert curve[1] / curve[0] == pytest.approx(0.5, abs=0.06)
    assert abs(curve[5]) < 0.04  # below zero: in short documents any order has near repeats, too


def test_runs_of_a_sticky_router_are_geometric_and_those_of_two_in_turn_are_not() -> None:
    sticky = locality(planted(np.random.default_rng(0), "sticky", 64, documents=400).sample, [1]).sel(layer=1)
    assert np.abs(sticky["runs"] - sticky["runs_null"]).max() < 0.02
    turn = locality(planted(np.random.default_rng(0), "alternating").sample, [1]).sel(layer=1)
    assert turn["runs"].sel(run=1) == 1
    assert turn["run_mean"] == 1
    # Tokens a run are 1 over the part of the tokens that begin one, and so are the ends of the interval.
    ranks_D = np.argsort(np.random.default_rng(1).random((40, 8)))
    made = sample_of([[(0, (int(e),)) for e in np.repeat(row, row + 1)] for row in ranks_D])
    of = locality(made, lags=[1]).sel(layer=0)
    low, high, _ = (1 - 1 / float(of[f"run_mean{end}"]) for end in ("_low", "_high", ""))
    logit = np.log(low / (1 - low)), np.log(high / (1 - high))
    middle = np.mean(logit)
    assert 1 / (1 - 1 / (1 + np.exp(-middle))) == pytest.approx(float(of["run_mean"]), rel=1e-9)


def test_routing_that_does_not_vary_has_an_interval_of_a_pair_either_way() -> None:
    turns = sample_of([[(0, (place % 2,)) for place in range(length)] for length in range(20, 60)])
    of = locality(turns, lags=[1]).sel(layer=0, kind="first", domain=TOTAL, pairs="all", null="popularity")
    pairs = sum(length - 1 for length in range(20, 60))
    half = stats.t.ppf(0.975, 39) / pairs
    assert float(of["excess_high"] - of["excess"]) == pytest.approx(half)
    assert float(of["excess_low"]) < -0.5 < float(of["excess_high"])
    assert float(of["excess_p"]) < 1e-10


def test_geometric_runs_are_those_of_a_simulation() -> None:
    rng = np.random.default_rng(0)
    lengths, number, rate = np.array([3, 10, 80]), np.array([4, 2, 1]), 0.7
    counts = np.zeros(64)
    for _ in range(4000):
        for length in np.repeat(lengths, number):
            breaks = np.flatnonzero(rng.random(length - 1) >= rate) + 1
            for run in np.diff([0, *breaks, length]):
                counts[min(run, 64) - 1] += 1
    assert np.abs(geometric_runs(lengths, number, rate) - counts / counts.sum()).max() < 0.003


def test_a_trace_without_ids_or_order_has_what_can_be_known(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 2, ranked=False),)
    trace = make_trace(
        tmp_path / "t.moe", [make_part(np.random.default_rng(0), layers, [20] * 6)], layers, token_ids=False
    )
    found = locality(trace).sel(layer=0, domain=TOTAL)
    assert found["rate"].sel(kind="first").isnull().all()
    assert found["rate"].sel(kind="any", pairs="all").notnull()
    assert found["rate"].sel(pairs=["equal ids", "different ids"]).isnull().all()
    assert found["excess"].sel(null="words").isnull().all()
    assert found["excess"].sel(kind="any", pairs="all", null=["popularity", "document"]).notnull().all()


@pytest.mark.parametrize("lengths", [[1], [2], [1, 1, 1], [1, 3]])
def test_documents_too_short_for_pairs_are_no_error(tmp_path: Path, lengths: list[int]) -> None:
    layers = (Layer(0, 8, 2),)
    found = locality(make_trace(tmp_path / "t.moe", [make_part(np.random.default_rng(0), layers, lengths)], layers))
    assert found["pairs_counted"].sel(domain=TOTAL, pairs="all") == sum(n - 1 for n in lengths)


def test_the_seed_decides_and_threads_do_not() -> None:
    sample = planted(np.random.default_rng(0), "documents", documents=10).sample
    a, b = locality(sample, threads=1), locality(sample, threads=2)
    assert a.equals(b)
    assert not a["rate_null"].equals(locality(sample, seed=1)["rate_null"])
    for wrong in ({"lags": []}, {"lags": [0, 1]}, {"lags": [2, 2]}, {"threads": 0}):
        with pytest.raises(ValueError, match="must"):
            locality(sample, **wrong)


def test_a_domain_called_all_is_not_taken_for_all_of_them() -> None:
    sample = planted(np.random.default_rng(0), "domain", documents=9).sample
    found = locality(replace(sample, domain_names=("(all)", "B", "C")))
    assert found["domain"].values.tolist() == ["((all))", "(all)", "B", "C"]
    counted = found["pairs_counted"].sel(pairs="all")
    assert counted.sel(domain="((all))") == counted[1:].sum()


def test_where_one_expert_takes_nearly_all_the_excess_has_no_interval_until_there_are_pairs_without_it() -> None:
    def of(documents: int):
        made = planted(np.random.default_rng(0), "collapsed", documents=documents)
        return locality(made.sample, [1], lags=[1]).sel(layer=1, kind="first", domain=TOTAL)

    # 2 % of the tokens go elsewhere: of 3,540 pairs 1.4 are to be expected with neither at the popular one; then 14
    few, many = of(60), of(600)
    for null in ("popularity", "document"):
        assert np.isnan(few["excess_low"].sel(pairs="all", null=null))
        assert np.isnan(few["excess_p"].sel(pairs="all", null=null))
        assert np.isfinite(few["excess"].sel(pairs="all", null=null))
        assert many["excess_low"].sel(pairs="all", null=null) < 0 < many["excess_high"].sel(pairs="all", null=null)
    assert np.isfinite(few["rate_low"].sel(pairs="all"))
    assert np.isnan(few["lag_excess_low"]).all()
    assert np.isfinite(many["lag_excess_low"]).all()
