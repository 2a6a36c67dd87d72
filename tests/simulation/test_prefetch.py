"""Prefetching against slow loops, by hand, and on routing whose answer is known."""

from __future__ import annotations

import importlib
import json
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_counts, make_part, make_trace

import moescope
from moescope.cli import main
from moescope.errors import NoSuchLayer, NotRecorded
from moescope.reporting import figures
from moescope.reporting.subjects.prefetch import prefetch_frame, prefetch_tables
from moescope.simulation import prefetch
from moescope.simulation.prefetch import _Units
from moescope.trace import Layer, Part, Trace

simulation = importlib.import_module("moescope.simulation.prefetch")


def slow_prefetch(trace: Trace, distances: list[int], phase: int | None = None) -> dict[tuple[str, int, int], dict]:
    """For (predictor, distance, layer): documents' or stretches' groups -> (places of the needed experts), by loops."""
    units = _Units.of(trace, 8)
    tokens: list[dict] = []
    for part in trace.iter_parts(predictions=True):
        for t in range(part.num_tokens):
            tokens.append(
                {
                    "document": int(part.document[t]),
                    "domain": int(part.domain[t]),
                    "first": part.position[t] == 0,
                    "counted": phase is None or part.phase[t] == phase,
                    "ids": {layer: ids[t].astype(int).tolist() for layer, ids in part.expert_ids.items()},
                    "predicted": {key: ids[t].astype(int).tolist() for key, ids in part.predictions.items()},
                }
            )
    documents = sorted({token["document"] for token in tokens})
    for number, token in enumerate(tokens):
        if len(documents) == 1:
            ends = [(i + 1) * len(tokens) // units.num_groups for i in range(units.num_groups)]
            token["group"] = next(i for i, end in enumerate(ends) if number < end)
        else:
            token["group"] = int(units.group[documents.index(token["document"])])
        token["fold"] = token["group"] % units.num_folds

    found: dict[tuple[str, int, int], dict] = {}
    for place, layer in enumerate(trace.layers):
        num = layer.num_experts

        def real(ids: list[int], num: int = num) -> list[int]:
            return [e for e in ids if 0 <= e < num]

        for fold in range(units.num_folds):
            others = [token for token in tokens if token["counted"] and token["fold"] != fold]
            popular = [sum(t["ids"][layer.layer].count(e) for t in others) for e in range(num)]
            order = sorted(range(num), key=lambda e: (-popular[e], e))
            share = [c / sum(popular) if sum(popular) else 1 / num for c in popular]
            tables = {}
            for a in distances:
                if a <= place:
                    source = trace.layers[place - a]
                    table = np.zeros((source.num_experts, num))
                    for token in others:
                        for s in token["ids"][source.layer]:
                            for e in token["ids"][layer.layer]:
                                if 0 <= s < source.num_experts and 0 <= e < num:
                                    table[s, e] += 1
                    tables[a] = [
                        [np.float32((row[e] + num * share[e]) / (row.sum() + num)) for e in range(num)] for row in table
                    ]
            for t, token in enumerate(tokens):
                if token["fold"] != fold or not token["counted"]:
                    continue
                orders = {("popularity", 0): order}
                here = [o for o in others if o["domain"] == token["domain"]]
                local = [sum(o["ids"][layer.layer].count(e) for o in here) for e in range(num)]
                orders["domain", 0] = sorted(range(num), key=lambda e: (-local[e], order.index(e)))
                before = [] if token["first"] else list(dict.fromkeys(real(tokens[t - 1]["ids"][layer.layer])))
                before = before if layer.ranked else sorted(before, key=order.index)
                orders["previous", 0] = before + [e for e in order if e not in before]
                for a, table in tables.items():
                    source = trace.layers[place - a]
                    score = [np.float32(0)] * num
                    for s in token["ids"][source.layer]:
                        if 0 <= s < source.num_experts:
                            score = [np.float32(score[e] + table[s][e]) for e in range(num)]
                    orders["transitions", a] = sorted(range(num), key=lambda e: (-score[e], order.index(e)))
                for (target, a), ids in token["predicted"].items():
                    if target == layer.layer and a in distances:
                        orders["lookahead", a] = real(ids)
                for (kind, a), each in orders.items():
                    of = found.setdefault((kind, a, layer.layer), {}).setdefault(token["group"], [])
                    of += [each.index(e) if e in each else None for e in real(token["ids"][layer.layer])]
    return found


@st.composite
def traces(draw: st.DrawFn) -> tuple[list[Part], tuple[Layer, ...]]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    layers = []
    for place in range(draw(st.integers(1, 4))):
        num, nulls = draw(st.integers(2, 7)), draw(st.integers(0, 2))
        top_k = draw(st.integers(1, min(3, num)))
        back = tuple(sorted(draw(st.sets(st.integers(1, place)))) if place else ())
        layers.append(
            Layer(
                2 * place,
                num,
                top_k,
                num_null_experts=nulls,
                ranked=draw(st.booleans()),
                lookahead=back,
                num_predicted=draw(st.integers(top_k, num + nulls)) if back else 0,
            )
        )
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=11))
    cut = draw(st.integers(0, len(lengths)))
    parts, number = [], 0
    for some in (lengths[:cut], lengths[cut:]):
        if some:
            part = make_part(
                rng, tuple(layers), some, window=4, first_document=number, dropped=draw(st.sampled_from([0, 0.2]))
            )
            predictions = {
                (layer.layer, a): np.array(
                    [rng.permutation(layer.num_ids)[: layer.num_predicted] for _ in part.document]
                )
                for layer in layers
                for a in layer.lookahead
            }
            parts.append(replace(part, predictions=predictions, phase=rng.integers(0, 2, part.num_tokens)))
            number += len(some)
    return parts, tuple(layers)


@settings(max_examples=60, deadline=None)
@given(traces(), st.sampled_from([None, None, "decode"]), st.integers(1, 2))
def test_recall_is_what_slow_loops_count(tmp_path_factory, made, phase, threads) -> None:
    parts, layers = made
    trace = make_trace(tmp_path_factory.mktemp("t") / "t.moe", parts, layers)
    distances = sorted({a for layer in layers for a in layer.lookahead} | ({1} if len(layers) > 1 else set()))
    result = prefetch(trace, distances=distances, phase=phase, threads=threads)
    assert set(result["kind"].values) >= ({"lookahead"} if trace.header.lookahead else {"previous", "popularity"})
    slow = slow_prefetch(trace, distances, None if phase is None else 1)
    for p, (kind, a) in enumerate(zip(result["kind"].values, result["distance"].values, strict=True)):
        for layer in trace.layers:
            got = result["recall"].isel(predictor=p).sel(layer=layer.layer).values
            groups = slow.get((kind, int(a), layer.layer))
            places = [place for each in (groups or {}).values() for place in each]
            if not places:
                assert np.isnan(got).all()
                continue
            known = min(layer.num_predicted, layer.num_experts) if kind == "lookahead" else layer.num_experts
            for n in range(1, known + 1):
                expected = sum(place is not None and place < n for place in places) / len(places)
                assert got[n - 1] == pytest.approx(expected, abs=1e-12)
            assert np.isnan(got[known:]).all()
            if kind != "lookahead":
                assert got[known - 1] == 1


def known_routing(ids: dict[int, np.ndarray], lengths: list[int], num_experts: int, tmp_path: Path) -> Trace:
    """A trace of first choices: layer -> expert of each token, documents of the given lengths."""
    layers = tuple(Layer(layer, num_experts, 1) for layer in ids)
    part = make_part(np.random.default_rng(0), layers, lengths, window=1000)
    return make_trace(
        tmp_path / "k.moe", [replace(part, expert_ids={layer: e[:, None] for layer, e in ids.items()})], layers
    )


def test_what_a_document_alone_knows_predicts_nothing_in_it(tmp_path: Path) -> None:
    document = np.repeat(np.arange(8), 5)  # every document has an expert of its own, at both layers
    trace = known_routing({0: document, 1: document}, [5] * 8, 16, tmp_path)
    result = prefetch(trace, distances=[1])
    popularity = result["recall"].sel(predictor="popularity", layer=1)
    assert popularity.sel(loaded=7) == 0  # the experts of the seven others come first
    assert popularity.sel(loaded=8) == 1
    assert result["recall"].sel(predictor="transitions 1", layer=1, loaded=7) == 0
    assert result["recall"].sel(predictor="previous", layer=1, loaded=1) == pytest.approx(4 / 5)


def test_a_layer_that_follows_from_another_is_predicted_by_its_transitions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = rng.integers(0, 8, 4000)
    other = rng.integers(0, 8, 4000)
    target = (3 * source + 1) % 8  # layer 2 follows from layer 0, two layers before, and not from layer 1
    trace = known_routing({0: source, 1: other, 2: target}, [100] * 40, 8, tmp_path)
    result = prefetch(trace, distances=[1, 2]).sel(layer=2, loaded=1)
    assert result["recall"].sel(predictor="transitions 2") == 1
    assert result["gain_low"].sel(predictor="transitions 2") > 0.8
    near = result.sel(predictor="transitions 1")
    assert near["recall_low"] < 1 / 8 < near["recall_high"]
    assert near["gain_low"] < 0 < near["gain_high"]


def test_the_example_of_the_page_by_hand(tmp_path: Path) -> None:
    # Document 0 has after expert 0 three times expert 2 and once 3, and after expert 1 once 2 and three times 3.
    first, second = [0] * 4 + [1] * 4 + [0, 0], [2, 2, 2, 3, 2, 3, 3, 3, 2, 3]
    trace = known_routing({0: np.array(first), 1: np.array(second)}, [8, 2], 4, tmp_path)
    plan = simulation._plan(trace, trace.layers, [1], None, None)
    fold = int(plan.units.group[1])  # document 1 is judged by what document 0 shows
    learnt = simulation._learn(trace, plan, 1)
    np.testing.assert_allclose(learnt.table[1, 1][fold][0], [0, 0, 5 / 8, 3 / 8])
    np.testing.assert_allclose(learnt.table[1, 1][fold][1], [0, 0, 3 / 8, 5 / 8])
    counted = simulation._count(trace, plan, learnt, 1)
    at = [each.label for each in plan.predictors].index("transitions 1")
    assert counted.hits_GPLN[fold, at, 1].tolist() == [1, 1, 0, 0]


def test_routing_at_random_is_loaded_as_often_as_chance_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    layers = tuple(Layer(layer, 8, 2) for layer in range(3))
    part = make_part(rng, layers, [50] * 200, window=1000)
    ids = {layer: np.argsort(rng.random((10_000, 8)), axis=1)[:, :2] for layer in range(3)}
    result = prefetch(make_trace(tmp_path / "u.moe", [replace(part, expert_ids=ids)], layers), distances=[1, 2])
    inside = (result["recall_low"] <= result["recall_uniform"]) & (result["recall_uniform"] <= result["recall_high"])
    known = result["recall"].notnull() & (result["loaded"] < 8)
    # Of intervals of 95 %, which go together for neighbouring numbers of experts.
    assert float(inside.where(known).mean()) > 0.8
    assert float(abs(result["recall"] - result["recall_uniform"]).where(known).max()) < 0.02
    assert (result["model_recall"].sel(loaded=8) == 1).all()


def test_independent_documents_are_covered_by_their_intervals_as_often_as_promised(tmp_path: Path) -> None:
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        layers = (Layer(0, 4, 1),)
        part = make_part(rng, layers, [10] * 60, window=1000)
        # A document sticks to expert 0 with its own probability, 0.5 on average; expert 0 is the most popular.
        mean = np.repeat(rng.beta(2, 2, 60), 10)
        ids = np.where(rng.random(600) < mean, 0, rng.integers(1, 4, 600))[:, None]
        trace = make_trace(tmp_path / f"{seed}.moe", [replace(part, expert_ids={0: ids})], layers)
        at = prefetch(trace, predictors=["popularity"], distances=[]).sel(predictor="popularity", layer=0, loaded=1)
        covered += bool(at["recall_low"] <= 0.5 <= at["recall_high"])
    assert covered >= 34


def test_merged_parts_and_permuted_documents_change_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    layers = tuple(Layer(layer, 8, 2) for layer in range(3))
    parts = [make_part(rng, layers, [7, 9, 4], window=8, first_document=3 * at) for at in range(5)]
    one = prefetch(make_trace(tmp_path / "a.moe", parts, layers), threads=1)
    two = prefetch(make_trace(tmp_path / "b.moe", parts[::-1], layers), threads=3)
    for name in one.data_vars:
        np.testing.assert_array_equal(one[name], two[name])


def test_memory_does_not_grow_with_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = tuple(Layer(layer, 32, 4) for layer in range(4))
    peaks = []
    for number in (2, 8):
        parts = [make_part(rng, layers, [500] * 10, window=500, first_document=10 * at) for at in range(number)]
        trace = make_trace(tmp_path / f"{number}.moe", parts, layers)
        prefetch(trace, threads=1)
        tracemalloc.start()
        prefetch(trace, threads=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]  # four times the tokens; what else the process does is in it, too


def test_folds_are_fewer_where_the_tables_would_be_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = tuple(Layer(layer, 8, 2) for layer in range(3))
    trace = make_trace(tmp_path / "t.moe", [make_part(np.random.default_rng(0), layers, [9] * 20)], layers)
    assert prefetch(trace, distances=[1]).attrs["folds"] == 8
    for room, folds in ((4 * 2 * 64 * 4, 4), (4 * 2 * 64 * 4 - 1, 2), (1, 2)):
        monkeypatch.setattr(simulation, "TABLE_BYTES", room)
        assert prefetch(trace, distances=[1]).attrs["folds"] == folds


def test_layers_of_different_size_are_pooled_over_those_that_all_distances_reach(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    layers = (Layer(0, 4, 1), Layer(3, 8, 2), Layer(4, 6, 2))
    trace = make_trace(tmp_path / "t.moe", [make_part(rng, layers, [20] * 12)], layers)
    result = prefetch(trace, distances=[1])
    assert result.attrs["pooled_layers"] == [3, 4]
    weight = result["needed"].sel(layer=[3, 4]).values
    mean = (result["recall"].sel(layer=[3, 4], loaded=3).values * weight).sum(axis=1) / weight.sum()
    np.testing.assert_allclose(result["model_recall"].sel(loaded=3), mean)
    assert float(result["model_recall_uniform"].sel(loaded=8)) == 1
    assert float(result["model_recall_uniform"].sel(loaded=3)) == pytest.approx(
        (weight * [3 / 8, 3 / 6]).sum() / weight.sum()
    )
    assert np.isnan(result["recall"].sel(predictor="transitions 1", layer=0)).all()
    assert np.isnan(result["recall"].sel(layer=4, loaded=7)).all()
    assert (result["model_recall"].sel(loaded=[7, 8]) <= 1).all()
    assert prefetch(trace, distances=[2]).attrs["pooled_layers"] == [4]


@pytest.fixture
def looked(tmp_path: Path) -> Trace:
    """A trace with lookahead by 1 and 2 layers in which the nearer one is always right at its first place."""
    rng = np.random.default_rng(5)
    layers = tuple(
        Layer(layer, 12, 1, lookahead=tuple(range(1, min(layer, 2) + 1)), num_predicted=3 if layer else 0)
        for layer in range(4)
    )
    part = make_part(rng, layers, [30] * 10, window=1000)
    predictions = {}
    for layer in layers:
        for a in layer.lookahead:
            ids = np.array([rng.permutation(12)[:3] for _ in range(300)])
            if a == 1:
                ids[:, 1:] = (part.expert_ids[layer.layer] + np.array([1, 2])) % 12
                ids[:, 0] = part.expert_ids[layer.layer][:, 0]
            predictions[layer.layer, a] = ids
    return make_trace(tmp_path / "l.moe", [replace(part, predictions=predictions)], layers)


def test_recorded_lists_are_known_as_far_as_they_go(looked: Trace) -> None:
    result = prefetch(looked)
    assert result["predictor"].values.tolist() == [
        "lookahead 1", "lookahead 2", "transitions 1", "transitions 2", "previous", "domain", "popularity",
    ]  # fmt: skip
    assert (result["recall"].sel(predictor="lookahead 1", loaded=[1, 2, 3], layer=[1, 2, 3]) == 1).all()
    assert result["recall"].sel(predictor="lookahead 1", layer=0).isnull().all()
    assert result["model_recall"].sel(predictor="lookahead 1", loaded=4).isnull()
    assert (result["recall_low"].sel(predictor="lookahead 1", loaded=1, layer=[1, 2, 3]) < 1).all()
    names = result["predictor"].values.tolist()
    assert "lookahead 1" not in prefetch(looked, predictors=["previous"])["predictor"].values
    text = "\n".join(note for table in prefetch_tables(result, [0, 1, 3]) for note in table.notes)
    assert "end after 3 experts" in text
    assert len(names) == 7


def test_what_was_not_recorded_is_said_with_how_to_record_it(looked: Trace, tmp_path: Path) -> None:
    layers = tuple(replace(layer, lookahead=(), num_predicted=0) for layer in looked.layers)
    part = next(looked.iter_parts())
    plain = make_trace(tmp_path / "p.moe", [part], layers)
    with pytest.raises(NotRecorded, match="holds no predictions") as error:
        prefetch(plain, predictors=["lookahead"], distances=[1])
    assert "--lookahead" in str(error.value.render())
    with pytest.raises(NotRecorded, match="over 3 layers were not recorded; those over 1, 2 are"):
        prefetch(looked, predictors=["lookahead"], distances=[1, 3])
    assert "lookahead" not in prefetch(plain)["kind"].values
    assert "--lookahead 1,2,10" in next(prefetch_tables(prefetch(plain), [0])).notes[-1]
    with pytest.raises(NoSuchLayer, match="no layer lies 4 layers before another: the trace has 4"):
        prefetch(looked, distances=[4])
    with pytest.raises(NotRecorded, match="which tokens were generated"):
        prefetch(looked, phase="decode")
    with pytest.raises(NotRecorded, match="counts"):
        prefetch(make_counts(tmp_path / "c.moe", {0: {0: {1: 5}}}))
    for wrong in ({"distances": [0]}, {"distances": [1.5]}, {"predictors": ["oracle"]}, {"phase": "x"}, {"threads": 0}):
        with pytest.raises(ValueError, match=r"whole numbers|no predictor|phase is|threads"):
            prefetch(looked, **wrong)


def test_a_single_layer_has_popularity_and_the_token_before(tmp_path: Path) -> None:
    layers = (Layer(5, 4, 1),)
    trace = make_trace(tmp_path / "t.moe", [make_part(np.random.default_rng(0), layers, [9, 9])], layers)
    result = prefetch(trace)
    assert result["predictor"].values.tolist() == ["previous", "domain", "popularity"]
    figures.prefetch.draw_prefetch(result)


def test_a_trace_of_one_document_is_cut_into_stretches_and_says_so(tmp_path: Path) -> None:
    layers = (Layer(0, 4, 1), Layer(1, 4, 1))
    for length in (1, 5, 400):
        trace = make_trace(tmp_path / f"{length}.moe", [make_part(np.random.default_rng(0), layers, [length])], layers)
        result = prefetch(trace)
        assert result.attrs["unit"] == "stretch of the only document"
        assert result["needed"].values.tolist() == [length] * 2
    assert result["recall_low"].sel(predictor="popularity", loaded=2).notnull().all()
    assert "stretches of the only document" in next(prefetch_tables(result, [0])).notes[0]


def test_the_command_prints_tables_data_and_a_figure(looked: Trace, tmp_path: Path) -> None:
    def run(*arguments: object):
        return CliRunner().invoke(main, ["prefetch", *map(str, arguments)])

    shown = run(looked.path, "--loaded", "1,3,12", "--figures", tmp_path / "f")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert "router, 1 layer ahead" in shown.stdout
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == [f"prefetch.{e}" for e in ("pdf", "png", "svg")]
    rows = json.loads(run(looked.path, "--format", "json").stdout)
    frame = prefetch_frame(prefetch(looked))
    assert len(rows) == len(frame)
    one = next(row for row in rows if row["predictor"] == "lookahead 1" and row["layer"] == 1)
    assert (one["recall_percent"], one["recall_uniform_percent"]) == (100, pytest.approx(8.33333))
    only = json.loads(run(looked.path, "--predictor", "previous", "--format", "json").stdout)
    assert {row["predictor"] for row in only} == {"previous", "popularity"}
    for option, value, message in (
        ("--loaded", "13", "a layer has 12 experts"),
        ("--loaded", "0,2", "found 0"),
        ("--distances", "0", "from 1"),
    ):
        wrong = run(looked.path, option, value)
        assert wrong.exit_code == 2
        assert message in wrong.stderr
    far = run(looked.path, "--distances", "9")
    assert far.exit_code == 1
    assert "distances go up to 3" in far.stderr


@pytest.mark.parametrize("num_experts", [8, 128])
def test_a_figure_shows_every_predictor_against_chance(num_experts: int, tmp_path: Path) -> None:
    layers = tuple(Layer(layer, num_experts, 2) for layer in range(5))
    trace = make_trace(tmp_path / "t.moe", [make_part(np.random.default_rng(0), layers, [40] * 6)], layers)
    result = prefetch(trace, distances=[1, 2])
    figure = figures.prefetch.draw_prefetch(result)
    left, right = figure.axes
    assert len(left.lines) == len(result["predictor"]) + 2  # chance, and k
    assert left.get_xscale() == ("linear" if num_experts == 8 else "log")
    for p in range(len(result["predictor"])):
        np.testing.assert_allclose(left.lines[p + 1].get_ydata(), 100 * result["model_recall"].isel(predictor=p))
        np.testing.assert_allclose(right.lines[p + 1].get_ydata(), 100 * result["recall"].isel(predictor=p, loaded=1))


@pytest.mark.parametrize(("name", "gain", "wider"), [("qwen", 1.9, 5.9), ("gemma", -2.2, 3.9)])
def test_bigmoeonedge_is_right_at_k_experts_and_wrong_beyond(
    name: str, gain: float, wider: float, shared_data: Path, tmp_path: Path
) -> None:
    path = shared_data / "traces" / "bigmoeonedge" / f"{name}.route.csv"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = moescope.import_trace("bigmoeonedge", [path], tmp_path / "o.moe")
    layers = [layer.layer for layer in trace.layers if not layer.partial]  # llama.cpp runs the last for no prompt
    result = prefetch(trace, layers, phase="decode", distances=[]).sel(predictor="previous")
    at_k, twice = result.sel(loaded=6), result.sel(loaded=12)
    assert 100 * float(at_k["model_gain"]) == pytest.approx(gain, abs=0.3)
    assert at_k["model_gain_low"] < 0 < at_k["model_gain_high"]  # hardly better, or no better, than popularity
    assert 100 * float(twice["model_gain"]) == pytest.approx(wider, abs=0.3)
    assert twice["model_gain_low"] > 0  # the token before and the popular ones together beat the popular ones
