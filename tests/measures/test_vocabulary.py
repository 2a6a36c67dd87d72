"""Vocabulary specialization against dense slow loops, the source's own arithmetic, and routing with known answers."""

from __future__ import annotations

import importlib
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted
from scipy import stats
from synthetic import make_counts, make_part, make_trace, result_of

from moescope.errors import NotRecorded
from moescope.measures import vocabulary
from moescope.measures.vocabulary import TEST_TOKENS
from moescope.measures.vocabulary_ids import TokenIds
from moescope.tallying.document_groups import document_groups
from moescope.tallying.document_sample import DocumentCounter, DocumentSample
from moescope.trace import Layer, Trace

LAYERS = (Layer(0, 8, 2), Layer(3, 20, 4, num_null_experts=2))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    rng = np.random.default_rng(0)
    parts = [
        make_part(rng, LAYERS, [60, 1, 90, 2], dropped=0.15),
        make_part(rng, LAYERS, [130, 40, 300], first_document=4, dropped=0.15),
    ]
    parts = [replace(part, token_id=part.token_id % 37) for part in parts]
    return make_trace(tmp_path_factory.mktemp("vocabulary") / "t.moe", parts, LAYERS)


def seen(trace: Trace, layer: int, by: str, choice: str) -> dict[int, list[tuple[int, list[int]]]]:
    """For each id the document and the choices of its tokens, by a loop over the trace."""
    found: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for part in trace.iter_parts([layer]):
        for row in range(part.num_tokens):
            at = row
            if by == "next":
                at += 1
                if at == part.num_tokens or part.position[at] == 0:
                    continue
            ids = part.expert_ids[layer][row, : 1 if choice == "first" else None]
            found[int(part.token_id[at])].append((int(part.document[row]), [int(e) for e in ids if e >= 0]))
    return found


def share_of_top(tokens: list[tuple[int, list[int]]]) -> tuple[float, int]:
    """Largest share of an expert, and the first expert that has it; of tokens with a choice."""
    counts = Counter(e for _, chosen in tokens for e in chosen)
    made = sum(bool(chosen) for _, chosen in tokens)
    top = min(counts, key=lambda e: (-counts[e], e))
    return counts[top] / made, top


def test_five_tokens_counted_by_hand() -> None:
    """The worked example of docs/reference/measures/vocabulary.md."""
    a, b = 7, 8
    starts, ids = np.array([0, 5]), np.array([[0, 1, 0, 1, 2]], np.uint8)
    sample = DocumentSample(
        (Layer(0, 4, 1),),
        ("A",),
        np.zeros(1, np.int64),
        np.zeros(1, np.int64),
        starts,
        starts,
        np.arange(5, dtype=np.int32),
        np.array([a, b, a, b, a], np.int32),
        {0: ids},
        1.0,
    )
    at = vocabulary(sample, min_count=2, permutations=1, tokens=[a]).sel(layer=0)
    assert at["specialization"].values.tolist() == pytest.approx([5 / 6, 1])
    assert at["share"].sel(by="input", token=a).values.tolist() == pytest.approx([2 / 3, 0, 1 / 3, 0])
    assert at["share"].sel(by="next", token=a).values.tolist() == [0, 1, 0, 0]
    assert at["expert_ids"].sel(by="input").values.tolist() == [1, 1, 0, 0]
    assert at["top_token"].sel(by="input").values[:3, 0].tolist() == [a, b, a]
    assert at["popularity"].values.tolist() == [2 / 5, 2 / 4]


@pytest.mark.parametrize("choice", ["first", "all"])
@pytest.mark.parametrize("by", ["input", "next"])
def test_everything_equals_a_dense_slow_loop(trace: Trace, by: str, choice: str) -> None:
    result = vocabulary(trace, choice=choice, min_count=6, top=4, tokens=[5, 36], permutations=1, threads=1)
    for layer in LAYERS:
        at = result.sel(layer=layer.layer, by=by)
        tokens = seen(trace, layer.layer, by, choice)
        frequent = sorted(token for token, of in tokens.items() if len(of) >= 6)
        assert int(at["ids"]) == len(frequent)
        assert int(at["id_tokens"]) == sum(len(tokens[token]) for token in frequent)
        shares = {token: share_of_top(tokens[token]) for token in frequent}
        assert float(at["specialization"]) == pytest.approx(np.mean([share for share, _ in shares.values()]))
        everything = [one for of in tokens.values() for one in of]
        made = sum(bool(chosen) for _, chosen in everything)
        popular = np.bincount([e for _, chosen in everything for e in chosen], minlength=22) / made
        np.testing.assert_allclose(at["expert_popularity"][: layer.num_ids], popular[: layer.num_ids])
        assert at["expert_popularity"][layer.num_ids :].isnull().all()
        assert float(at["popularity"]) == pytest.approx(popular.max())
        by_expert = defaultdict(list)
        for share, top in shares.values():
            by_expert[top].append(share)
        for expert in range(layer.num_ids):
            of = at.sel(expert=expert)
            assert int(of["expert_ids"]) == len(by_expert[expert])
            value = np.mean(by_expert[expert]) if by_expert[expert] else np.nan
            assert float(of["expert_specialization"]) == pytest.approx(value, nan_ok=True)
            ranked = []
            for token in frequent:
                y = sum(expert in chosen for _, chosen in tokens[token])
                n = sum(bool(chosen) for _, chosen in tokens[token])
                ranked += [(-y / n, -y, token, n)] if y else []
            ranked = sorted(ranked)[:4]
            assert of["top_token"].values[: len(ranked)].tolist() == [token for *_, token, _ in ranked]
            assert (of["top_token"].values[len(ranked) :] == -1).all()
            np.testing.assert_allclose(of["top_share"].values[: len(ranked)], [-share for share, *_ in ranked])
            assert of["top_count"].values[: len(ranked)].tolist() == [-y for _, y, *_ in ranked]
            assert of["top_tokens"].values[: len(ranked)].tolist() == [n for *_, n in ranked]
            documents = [len({g for g, chosen in tokens[token] if chosen}) for *_, token, _ in ranked]
            assert of["top_documents"].values[: len(ranked)].tolist() == documents
        for token in (5, 36):
            n = sum(bool(chosen) for _, chosen in tokens[token])
            share = [sum(e in chosen for _, chosen in tokens[token]) / n for e in range(layer.num_ids)]
            np.testing.assert_allclose(at["share"].sel(token=token).values[: layer.num_ids], share)
            assert int(at["token_tokens"].sel(token=token)) == len(tokens[token])


@pytest.mark.parametrize("by", ["input", "next"])
def test_held_out_and_the_interval_come_from_leaving_out_groups_of_documents(trace: Trace, by: str) -> None:
    at = vocabulary(trace, min_count=6, permutations=1, threads=1).sel(layer=3, by=by)
    tokens = {token: of for token, of in seen(trace, 3, by, "first").items() if len(of) >= 6}
    group = {g: int(document_groups(np.array([g]))[0]) for g in range(7)}
    held = []
    for of in tokens.values():
        hits = judged = 0
        for g in set(group.values()):
            own = [one for one in of if group[one[0]] == g and one[1]]
            others = [one for one in of if group[one[0]] != g and one[1]]
            if own and others:
                hits += sum(chosen == [share_of_top(others)[1]] for _, chosen in own)
                judged += len(own)
        held += [hits / judged] if judged else []
    assert float(at["held_out"]) == pytest.approx(np.mean(held))

    def value(without: int | None) -> float:
        left = [[one for one in of if group[one[0]] != without and one[1]] for of in tokens.values()]
        return float(np.mean([share_of_top(of)[0] for of in left if of]))

    sizes = Counter(group[g] for of in seen(trace, 3, by, "first").values() for g, _ in of)
    whole, total, number = value(None), sum(sizes.values()), len(sizes)
    without = {g: value(g) for g in sizes}
    centre = number * whole - sum((1 - sizes[g] / total) * without[g] for g in sizes)
    variance = 0.0
    for g in sizes:
        h = total / sizes[g]
        variance += (h * whole - (h - 1) * without[g] - centre) ** 2 / (h - 1) / number
    half = stats.t.ppf(0.975, number - 1) * np.sqrt(variance)
    assert float(at["specialization_low"]) == pytest.approx(max(whole - half, 0))
    assert float(at["specialization_high"]) == pytest.approx(min(whole + half, 1))


def test_the_layers_are_what_the_source_computes() -> None:
    """The loop of OLMoE's scripts/run_moe_analysis.py, over ids seen at least ten times; no assignment dropped."""
    part = make_part(np.random.default_rng(3), LAYERS, [400, 300])
    result = vocabulary(_in_memory(part), min_count=10, permutations=1)
    tokens, experts = part.token_id.tolist(), part.expert_ids[0][:, 0].tolist()
    for by, pairs in (("input", zip(tokens, experts, strict=True)), ("next", None)):
        id_to_exp = defaultdict(list)
        for token, expert in pairs or [
            (tokens[row + 1], experts[row]) for row in range(699) if part.position[row + 1] > 0
        ]:
            id_to_exp[token].append(expert)
        kept = [Counter(of).most_common(1)[0][1] / len(of) for of in id_to_exp.values() if len(of) >= 10]
        assert float(result["specialization"].sel(layer=0, by=by)) == pytest.approx(np.mean(kept))


def _in_memory(part) -> DocumentSample:
    starts, sequences = part.document_starts(), part.sequence_starts()
    return DocumentSample(
        LAYERS,
        part.domain_names,
        part.document[starts[:-1]].astype(np.int64),
        part.domain[starts[:-1]],
        starts,
        sequences,
        part.position.astype(np.int32),
        part.token_id.astype(np.int32),
        {layer.layer: part.expert_ids[layer.layer].T.astype(np.uint8) for layer in LAYERS},
        1.0,
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.permutations(range(8)))
def test_renaming_the_experts_renames_the_results_and_shares_are_shares(seed: int, names: list[int]) -> None:
    sample = planted(np.random.default_rng(seed % 1000), "token", documents=12).sample
    new = np.array(names, np.uint8)
    renamed = replace(sample, expert_ids={layer: new[ids] for layer, ids in sample.expert_ids.items()})
    asked = {"min_count": 5, "permutations": 3, "tokens": [1, 2], "threads": 1, "seed": seed}
    one, other = vocabulary(sample, **asked), vocabulary(renamed, **asked)
    for name in (
        "specialization",
        "specialization_null",
        "popularity",
        "specialization_p",
        "specialization_low",
        "specialization_high",
    ):
        np.testing.assert_allclose(one[name], other[name], err_msg=name)  # ties go by number, but not the shares
    for name in ("share", "share_low", "expert_popularity"):
        np.testing.assert_allclose(one[name], other[name].isel(expert=new.tolist()), err_msg=name)
    assert (one["specialization"] >= one["popularity"] * 0.5).all()
    assert ((one["specialization"] <= 1) & (one["held_out"] >= 0) & (one["specialization"] >= 1 / 8)).all()
    np.testing.assert_allclose(one["share"].sum("expert"), 1)
    assert (one["expert_ids"].sum("expert") == one["ids"]).all()


def test_routing_by_the_token_alone_is_wholly_specialized_and_by_the_next_token_shows_there() -> None:
    rng = np.random.default_rng(0)
    result = vocabulary(planted(rng, "token", strength=1.0).sample, [1], permutations=19)
    at = result.sel(layer=1, by="input")
    assert float(at["specialization"]) == float(at["held_out"]) == 1
    assert float(at["specialization_null"]) < 0.6
    assert float(at["specialization_p"]) == 0.05
    best = at["top_share"].values[:, 0]
    assert ((best == 1) == (at["expert_ids"].values > 0)).all()
    sample = planted(rng, "independent").sample
    following = np.append(sample.token_id[1:], 0)
    following[sample.sequence_starts[1:] - 1] = rng.integers(0, 40, sample.num_documents)
    ids = np.stack([following % 8, (following + 1) % 8]).astype(np.uint8)
    at = vocabulary(replace(sample, expert_ids={0: ids, 1: ids}), [1], permutations=19).sel(layer=1)
    assert float(at["specialization"].sel(by="next")) == 1
    assert float(at["specialization"].sel(by="input")) < 0.5


@pytest.mark.parametrize("kind", ["independent", "documents", "sticky", "position", "collapsed"])
def test_routing_that_does_not_see_the_token_has_its_null_within_the_interval_and_is_rarely_rejected(kind: str) -> None:
    rng = np.random.default_rng(1)
    values, nulls, low, high, p_values = ([] for _ in range(5))
    for _ in range(100):
        at = vocabulary(planted(rng, kind, documents=40).sample, [1], permutations=19, top=0, threads=1).sel(layer=1)
        for into, name in (
            (values, "specialization"),
            (nulls, "specialization_null"),
            (low, "specialization_low"),
            (high, "specialization_high"),
        ):
            into.append(float(at[name].sel(by="input")))
        p_values += at["specialization_p"].values.tolist()
    assert np.mean(values) == pytest.approx(np.mean(nulls), abs=0.006)  # both as biased by rare ids
    assert sum(a <= np.mean(nulls) <= b for a, b in zip(low, high, strict=True)) >= 90
    rejected = (np.array(p_values) <= 0.05).sum()  # of 200, at a true 5 %
    assert rejected <= 20, rejected


def test_the_interval_of_routing_that_sees_the_token_holds_its_mean_at_the_nominal_rate() -> None:
    rng = np.random.default_rng(2)
    found = [
        vocabulary(planted(rng, "token", documents=40).sample, [1], permutations=1, top=0, threads=1).sel(
            layer=1, by="input"
        )
        for _ in range(200)
    ]
    mean = np.mean([float(at["specialization"]) for at in found])
    assert (
        180 <= sum(float(at["specialization_low"]) <= mean <= float(at["specialization_high"]) for at in found) <= 199
    )
    assert np.mean([float(at["held_out"]) for at in found]) <= mean


def test_a_token_is_only_marked_where_its_documents_agree_beyond_what_the_best_of_all_pairs_would() -> None:
    rng = np.random.default_rng(3)
    marked = 0
    for _ in range(100):
        at = vocabulary(planted(rng, "documents").sample, [1], permutations=1, threads=1)
        marked += bool((at["top_share_q"] < 0.05).any())
    assert marked <= 10, marked
    at = vocabulary(planted(rng, "token", strength=1.0).sample, [1], permutations=1).sel(layer=1, by="input")
    assert (at["top_share_q"].values[at["top_share"].values == 1] < 0.05).mean() > 0.8


def test_results_depend_neither_on_threads_nor_on_the_order_of_parts(trace: Trace) -> None:
    one = vocabulary(trace, permutations=3, threads=1)
    xr.testing.assert_identical(one, vocabulary(trace, permutations=3, threads=3))
    calls: list[tuple[int, int]] = []
    vocabulary(trace, permutations=1, threads=2, progress=lambda done, total: calls.append((done, total)))
    assert sorted(calls) == [(0, 2), (1, 2), (2, 2)]


def test_first_choices_alone_are_held_where_they_are_all_that_counts(trace: Trace) -> None:
    whole, firsts = result_of(DocumentCounter, trace), result_of(DocumentCounter, trace, ranks=1)
    for layer in LAYERS:
        np.testing.assert_array_equal(firsts.expert_ids[layer.layer], whole.expert_ids[layer.layer][:1])
    fitting = result_of(DocumentCounter, trace, ranks=1, max_bytes=16 * trace.num_tokens)
    assert fitting.fraction == 1
    assert result_of(DocumentCounter, trace, max_bytes=16 * trace.num_tokens).fraction < 1


def test_the_tests_go_over_a_bounded_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = planted(np.random.default_rng(0), "independent").sample
    whole = vocabulary(sample, permutations=39)
    assert sample.num_tokens < TEST_TOKENS
    monkeypatch.setattr(importlib.import_module("moescope.measures.vocabulary"), "TEST_TOKENS", 1000)
    thinned = vocabulary(sample, permutations=39)
    xr.testing.assert_equal(
        whole.drop_vars(["specialization_p", "specialization_q"]),
        thinned.drop_vars(["specialization_p", "specialization_q"]),
    )
    few = vocabulary(sample.thinned(1000), permutations=39)
    np.testing.assert_array_equal(thinned["specialization_p"], few["specialization_p"])
    assert not thinned["specialization_p"].equals(whole["specialization_p"])


def test_huge_ids_are_looked_up_as_small_ones_are() -> None:
    sample = planted(np.random.default_rng(0), "token").sample
    huge = replace(sample, token_id=(sample.token_id.astype(np.uint32) * 10**8).astype(np.int32))
    one, other = (vocabulary(each, permutations=1, tokens=[3 * f]) for each, f in ((sample, 1), (huge, 10**8)))
    for name in ("specialization", "held_out", "share"):
        np.testing.assert_array_equal(one[name].values, other[name].values)
    known = one["top_token"].values >= 0
    np.testing.assert_array_equal(np.where(known, one["top_token"] * 10**8, -1), other["top_token"])
    assert TokenIds.of(huge, "input", 1, ()).id_T.max() == 39 * 10**8


def test_ids_too_rare_are_left_out_and_without_any_there_is_nothing_to_say(trace: Trace) -> None:
    none = vocabulary(trace, min_count=10_000, permutations=1, tokens=[5, 99])
    assert none["ids"].values.tolist() == [0, 0]
    for name in (
        "specialization",
        "specialization_null",
        "held_out",
        "specialization_p",
        "expert_specialization",
        "top_share",
    ):
        assert none[name].isnull().all(), name
    assert (none["top_token"] == -1).all()
    assert none["token_tokens"].sel(token=99).values.tolist() == [0, 0]
    assert none["share"].sel(token=99).isnull().all()
    assert (none["popularity"] > 0).all()


def test_one_document_has_values_but_no_interval() -> None:
    part = make_part(np.random.default_rng(3), LAYERS, [400])
    at = vocabulary(_in_memory(part), permutations=1)
    assert at["specialization"].notnull().all()
    assert at["specialization_low"].isnull().all()
    assert at["held_out"].isnull().all()
    assert (at["top_share_q"].fillna(1) > 0.05).all()


def test_what_a_trace_cannot_tell_and_what_makes_no_sense_is_refused(tmp_path: Path, trace: Trace) -> None:
    part = make_part(np.random.default_rng(0), LAYERS[:1], [200])
    with pytest.raises(NotRecorded, match="token ids"):
        vocabulary(make_trace(tmp_path / "a.moe", [part], LAYERS[:1], token_ids=False))
    unranked = make_trace(tmp_path / "b.moe", [part], (Layer(0, 8, 2, ranked=False),))
    with pytest.raises(NotRecorded, match="the first"):
        vocabulary(unranked)
    assert vocabulary(unranked, choice="all", min_count=2)["specialization"].notnull().all()
    with pytest.raises(NotRecorded, match="no token"):
        vocabulary(make_counts(tmp_path / "c.moe", {0: {0: {1: 5}}}))
    for wrong in (
        {"choice": "any"},
        {"min_count": 0},
        {"top": -1},
        {"permutations": 0},
        {"threads": 0},
        {"tokens": [-1]},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("tokens", "token ids")):
            vocabulary(trace, **wrong)
