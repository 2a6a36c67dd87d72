"""Co-activation and transitions: by dense loops, by enumeration, and against draws of known generators."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic import make_counts, make_part, make_trace, result_of

from moescope import from_arrays
from moescope.errors import NotRecorded
from moescope.measures import coactivation, transitions
from moescope.measures.coactivation import fit_weights, pair_probabilities
from moescope.measures.transitions import mutual_information, path_summary
from moescope.tallying import joint as module
from moescope.tallying import one_pass as passes
from moescope.tallying.document_groups import NUM_GROUPS, document_groups
from moescope.tallying.joint import Coactivation, CoactivationCounter, TransitionCounter, Transitions
from moescope.tallying.joint_kernels import draw_paths
from moescope.trace import Layer, Part, Trace

LAYERS = (Layer(0, 8, 2), Layer(2, 40, 8), Layer(3, 16, 1), Layer(9, 8, 2), Layer(10, 8, 2))


def trace_of(path: Path, dropped: float = 0.0, ranked: bool = True) -> tuple[Trace, list[Part]]:
    rng = np.random.default_rng(1)
    layers = tuple(replace(layer, ranked=ranked) for layer in LAYERS)
    parts = [make_part(rng, layers, [20, 7, 31], first_document=3 * n, dropped=dropped) for n in range(3)]
    return make_trace(path, parts, layers), parts


def tokens_of(parts: list[Part], num_groups: int) -> list[tuple[int, dict[int, list[int]]]]:
    """Group of documents and the choices by layer of every token."""
    found = []
    for part in parts:
        group = document_groups(part.document, num_groups).tolist()
        for t in range(part.num_tokens):
            found.append((group[t], {number: ids[t].tolist() for number, ids in part.expert_ids.items()}))
    return found


@pytest.mark.parametrize("dropped", [0.0, 0.1])
@pytest.mark.parametrize("threads", [1, 3])
def test_all_pairs_of_a_set_are_counted_as_a_dense_loop_counts_them(
    tmp_path: Path, dropped: float, threads: int
) -> None:
    trace, parts = trace_of(tmp_path / "t.moe", dropped)
    counts = result_of(CoactivationCounter, trace, threads=threads)
    assert [layer.layer for layer in counts.layers] == [0, 2, 9, 10]
    for layer in counts.layers:
        expected = np.zeros((NUM_GROUPS, layer.num_ids, layer.num_ids))
        for group, chosen in tokens_of(parts, NUM_GROUPS):
            if min(chosen[layer.layer]) >= 0:
                for a, b in combinations(chosen[layer.layer], 2):
                    expected[group, a, b] += 1
        np.testing.assert_array_equal(counts.pairs[layer.layer], expected)
    found = coactivation(counts)
    ids = np.concatenate([p.expert_ids[2] for p in parts])
    ids = ids[(ids >= 0).all(axis=1)]
    chosen = np.zeros((len(ids), 40))
    np.put_along_axis(chosen, ids, 1, axis=1)
    both = chosen.T @ chosen
    at = found.sel(layer=2)
    assert at["tokens"] == len(ids)
    np.testing.assert_allclose(at["inclusion"], chosen.mean(axis=0))
    off = ~np.eye(40, dtype=bool)
    conditional = at["conditional"].values
    assert (np.isnan(conditional).all(axis=1) == (np.diag(both) == 0)).all()
    np.testing.assert_allclose((np.nan_to_num(conditional) * np.diag(both)[:, None])[off], both[off])
    np.testing.assert_allclose(at["joint"].values[off], both[off] / len(ids))
    np.testing.assert_allclose(at["joint"].sum(), 8 * 7)
    np.testing.assert_allclose(at["joint_null"].sum(), 8 * 7)
    assert found["lift"].sel(layer=0, expert=9).isnull().all()


@pytest.mark.parametrize("choice", ["first", "all"])
@pytest.mark.parametrize(("threads", "columns"), [(1, 64), (3, 4)])
def test_transitions_are_counted_as_a_dense_loop_counts_them(
    tmp_path: Path, choice: module.Choice, threads: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "COLUMNS_A_READ", columns)
    trace, parts = trace_of(tmp_path / "t.moe", 0.1)
    counts = result_of(TransitionCounter, trace, choice=choice, threads=threads)
    used = 1 if choice == "first" else 99
    tokens = tokens_of(parts, NUM_GROUPS)
    for before, after in pairwise(LAYERS):
        expected = np.zeros((NUM_GROUPS, before.num_ids, after.num_ids))
        for group, chosen in tokens:
            for a in chosen[before.layer][:used]:
                for b in chosen[after.layer][:used]:
                    if a >= 0 and b >= 0:
                        expected[group, a, b] += 1
        np.testing.assert_array_equal(counts.moves[after.layer], expected)
    found = transitions(counts, choice=choice)
    pooled = counts.moves[9].sum(axis=0)
    at = found.sel(layer=9)
    assert at["layer_before"] == 3
    made = pooled.sum(axis=1, keepdims=True)
    probability = at["probability"].values[:16, :8]
    assert (np.isnan(probability).all(axis=1) == (made == 0)[:, 0]).all()
    np.testing.assert_allclose(np.nan_to_num(probability) * made, pooled)
    assert ("half" in found) == (choice == "first")


def test_paths_are_told_apart_as_sequences_of_first_choices_are(tmp_path: Path) -> None:
    trace, parts = trace_of(tmp_path / "t.moe", 0.1)
    for layers in (None, [0, 9]):
        counts = result_of(TransitionCounter, trace, layers, threads=2)
        numbers = [layer.layer for layer in counts.layers]
        true = Counter(tuple(chosen[n][0] for n in numbers) for _, chosen in tokens_of(parts, 1))
        found = np.unique(counts.paths, return_counts=True)[1]
        assert sorted(found.tolist()) == sorted(true.values())
        summary = path_summary(counts.paths)
        tokens, carried, paths = true.total(), 0, 0
        while carried < tokens / 2:
            carried += sorted(true.values(), reverse=True)[paths]
            paths += 1
        assert summary[:2].tolist() == [len(true), paths]


def test_the_sample_of_paths_depends_neither_on_threads_nor_on_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, _ = trace_of(tmp_path / "t.moe")
    everything = result_of(TransitionCounter, trace, threads=1)
    monkeypatch.setattr(module, "PATH_TOKENS", 40)
    one, three = (result_of(TransitionCounter, trace, threads=n) for n in (1, 3))
    order = np.argsort(everything.hashes)[:40]
    for counts in (one, three):
        kept = np.argsort(counts.hashes)
        np.testing.assert_array_equal(counts.hashes[kept], everything.hashes[order])
        np.testing.assert_array_equal(counts.paths[kept], everything.paths[order])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), experts=st.integers(2, 9), data=st.data())
def test_pair_probabilities_equal_those_of_all_sets_enumerated(seed: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts - 1))
    spread = data.draw(st.sampled_from([0.0, 0.5, 2.0]))
    weights = np.exp(np.random.default_rng(seed).normal(0, spread, experts))
    pair, total = np.zeros((experts, experts)), 0.0
    for members in combinations(range(experts), top_k):
        probability = np.prod(weights[list(members)])
        total += probability
        pair[np.ix_(members, members)] += probability
    pair /= total
    np.testing.assert_allclose(pair_probabilities(np.diag(pair).copy(), top_k), pair, rtol=1e-4, atol=1e-6)
    if 2 * top_k <= experts:  # of larger sets it is the experts left out whose weights are fitted
        fitted = np.log(fit_weights(np.diag(pair).copy(), top_k))
        expected = np.log(weights)
        np.testing.assert_allclose(fitted - fitted.mean(), expected - expected.mean(), atol=0.01)


def test_experts_that_are_always_or_never_chosen_have_no_say_in_the_pairs_of_the_others() -> None:
    pair = pair_probabilities(np.array([1.0, 0.5, 0.25, 0.25, 0.0]), 2)
    np.testing.assert_allclose(pair[0], [1, 0.5, 0.25, 0.25, 0])
    assert pair[1, 2] == pair[4, 1] == 0
    np.testing.assert_allclose(pair_probabilities(np.ones(3), 3), 1)


def test_the_null_is_what_permuting_choices_between_tokens_gives() -> None:
    """Swaps of experts between tokens keep how many each token and each expert has; the pairs then follow the null."""
    rng = np.random.default_rng(2)
    scores = rng.gumbel(size=(3000, 6)) + np.array([1.5, 1, 0.5, 0, 0, -1])
    ids = np.argsort(-scores, axis=1)[:, :3]
    ids[::2, 1:] = [4, 5]  # plant a pair
    ids[::2, 0] = np.where(ids[::2, 0] > 3, 0, ids[::2, 0])
    chosen = np.zeros((3000, 6), bool)
    np.put_along_axis(chosen, ids, True, axis=1)
    inclusion = chosen.mean(axis=0)
    sums, rounds = np.zeros((6, 6)), 60
    for step in range(rounds + 10):
        for _ in range(4):
            a, b = np.split(rng.permutation(3000), 2)
            i, j = rng.permutation(6)[:2]
            swap = chosen[a, i] & ~chosen[a, j] & chosen[b, j] & ~chosen[b, i]
            for rows in (a[swap], b[swap]):
                chosen[rows, i], chosen[rows, j] = ~chosen[rows, i], ~chosen[rows, j]
        if step >= 10:
            sums += chosen.T.astype(float) @ chosen
    np.testing.assert_allclose(chosen.mean(axis=0), inclusion)
    expected = pair_probabilities(inclusion, 3)
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose((sums / rounds / 3000)[off], expected[off], atol=0.02)


def draw_sets(rng: np.random.Generator, weights: np.ndarray, number: int, top_k: int = 2) -> np.ndarray:
    """Sets with P ∝ Π w: Poisson sampling, redrawn until the size is right."""
    odds = weights / (1 + weights)
    found = np.zeros((0, len(weights)), bool)
    while len(found) < number:
        drawn = rng.random((4 * number, len(weights))) < odds
        found = np.concatenate([found, drawn[drawn.sum(axis=1) == top_k]])
    return found[:number]


def pairs_by_group(sets: np.ndarray, document: np.ndarray) -> np.ndarray:
    group = document_groups(np.arange(document.max() + 1))[document]
    chosen = sets.astype(float)
    pairs = np.stack([chosen[group == g].T @ chosen[group == g] for g in range(NUM_GROUPS)])
    return np.triu(pairs, 1).astype(np.uint32)


def test_popularity_alone_is_found_to_be_nothing_else_at_the_rate_of_the_test() -> None:
    rng = np.random.default_rng(3)
    weights = np.geomspace(0.1, 0.8, 8)
    rejected, covered, tested = 0, 0, 0
    for _ in range(200):
        document = np.repeat(np.arange(100), rng.integers(3, 12, 100))
        sets = np.repeat(draw_sets(rng, weights, len(document)), 4, axis=0)  # tokens of a document come in fours
        counts = Coactivation((Layer(0, 8, 2),), {0: pairs_by_group(sets, np.repeat(document, 4))})
        found = coactivation(counts).isel(layer=0)
        upper = np.triu_indices(8, 1)
        p_value = found["lift_p"].values[upper]
        known = np.isfinite(p_value)
        rejected += int((p_value[known] < 0.05).sum())
        low, high = (found[name].values[upper][known] for name in ("lift_low", "lift_high"))
        covered += int(((low <= 1) & (high >= 1)).sum())
        tested += int(known.sum())
    assert 0.03 < rejected / tested < 0.07, rejected / tested
    assert 0.9 < covered / tested < 0.99, covered / tested


@pytest.mark.parametrize("run", [1, 5])
def test_among_many_pairs_and_transitions_of_nothing_few_are_found_and_not_only_rare_ones(
    run: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(8)
    below, above, tested, with_finds = 0, 0, 0, 0
    for draw in range(6):
        document = np.sort(rng.integers(0, 120, 20_000))
        popularity = rng.normal(size=(2, 1, 32)) * 0.6
        scores = popularity + np.repeat(rng.gumbel(size=(2, 20_000 // run, 32)), run, axis=1)
        ids = np.argsort(-scores, axis=2)[:, :, :2]
        trace = from_arrays(tmp_path / str(draw), ids, num_experts=32, ranked=True, documents=document)
        for found in (transitions(trace), coactivation(trace)):
            p_value, lift = found["lift_p"].values, found["lift"].values
            tested += int(np.isfinite(p_value).sum())
            below += int(((p_value < 0.05) & (lift < 1)).sum())
            above += int(((p_value < 0.05) & (lift > 1)).sum())
            with_finds += bool((found["lift_q"].values < 0.05).any())
    assert tested > 14_000
    assert 0.02 < (below + above) / tested < 0.06, (below, above, tested)
    assert 1 / 5 < below / above < 2.5, (below, above, tested)
    assert with_finds <= 2, with_finds


def test_pairs_and_transitions_are_tested_where_all_four_cells_are_to_hold_ten_tokens() -> None:
    rng = np.random.default_rng(2)
    before, after = rng.integers(0, 4, 4000), np.where(rng.random(4000) < 0.99, 0, rng.integers(1, 4, 4000))
    moves = np.zeros((32, 4, 4), np.uint32)
    np.add.at(moves, (rng.integers(0, 32, 4000), before, after), 1)
    of = transitions(Transitions((Layer(0, 4, 1), Layer(1, 4, 1)), "first", {1: moves}))
    tested = of["lift_p"].notnull().sel(layer=1).values
    # Of the 1,000 tokens of each expert some 10 go on to another than 0, and 3 to each of these.
    number = moves.sum(axis=0)
    few = number.sum(axis=1)[:, None] * (number.sum(axis=0) / 4000)
    rest = number.sum(axis=1)[:, None] - few
    assert (tested == (np.minimum(few, rest) >= 10)).all()
    assert tested[:, 0].any()
    assert not tested[:, 0].all()


def test_a_planted_pair_is_found_with_its_lift() -> None:
    rng = np.random.default_rng(4)
    hits, truth = 0, None
    weights = np.full(8, 0.3)
    # A third of the tokens take the pair (2, 5), the rest any: the lift follows from the mixture.
    inclusion = 2 / 3 * np.full(8, 0.25) + np.isin(np.arange(8), (2, 5)) / 3
    truth = (1 / 3 + 2 / 3 / 28) / pair_probabilities(inclusion, 2)[2, 5]
    for _ in range(200):
        document = np.repeat(np.arange(100), rng.integers(5, 30, 100))
        sets = draw_sets(rng, weights, len(document))
        planted = rng.random(len(document)) < 1 / 3
        sets[planted] = np.isin(np.arange(8), (2, 5))
        counts = Coactivation((Layer(0, 8, 2),), {0: pairs_by_group(sets, document)})
        at = coactivation(counts).isel(layer=0, expert=2, other=5)
        hits += bool(at["lift_low"] <= truth <= at["lift_high"])
        assert at["lift_q"] < 1e-4
    assert 180 <= hits <= 199, (hits, truth)


def moves_of(rng: np.random.Generator, q: float, sticky: int) -> tuple[Transitions, None]:
    """Four experts; the next is the same with probability q, else any; tokens of a document come in runs."""
    document = np.repeat(np.arange(100), rng.integers(5, 30, 100))
    a = rng.choice(4, len(document), p=[0.4, 0.3, 0.2, 0.1])
    b = np.where(rng.random(len(document)) < q, a, rng.integers(0, 4, len(document)))
    group = document_groups(np.arange(100))[document]
    moves = np.zeros((NUM_GROUPS, 4, 4), np.uint32)
    np.add.at(moves, (group, a, b), sticky)
    return Transitions((Layer(0, 4, 1), Layer(1, 4, 1)), "first", {1: moves}), None


@pytest.mark.parametrize(("q", "sticky"), [(0.0, 1), (0.0, 5), (0.1, 5), (0.5, 1), (0.5, 5), (0.9, 5)])
def test_information_between_layers_is_recovered_within_its_interval(q: float, sticky: int) -> None:
    rng = np.random.default_rng(5)
    p = np.array([0.4, 0.3, 0.2, 0.1])
    truth = mutual_information(p[:, None] * (q * np.eye(4) + (1 - q) / 4))
    hits, rejected, tested = 0, 0, 0
    for _ in range(200):
        found = transitions(moves_of(rng, q, sticky)[0]).isel(layer=0)
        hits += bool(found["information_low"] - 1e-12 <= truth <= found["information_high"])
        p_value = found["lift_p"].values
        rejected += int((p_value[np.isfinite(p_value)] < 0.05).sum())
        tested += int(np.isfinite(p_value).sum())
    assert hits >= 180, hits
    if q:
        assert hits <= 199
    else:
        assert 0.03 < rejected / tested < 0.07, rejected / tested


def test_the_bias_of_the_plug_in_is_what_the_null_says() -> None:
    rng = np.random.default_rng(6)
    found = [transitions(moves_of(rng, 0.0, 5)[0]).isel(layer=0) for _ in range(60)]
    plug_in, alone, corrected, madow = (
        np.mean([f[name].item() for f in found])
        for name in ("plug_in", "information_null", "information", "miller_madow")
    )
    assert alone == pytest.approx(plug_in, rel=0.15)
    assert corrected < 0.4 * plug_in
    assert madow > 0.6 * plug_in  # tokens in runs of five are not independent, which Miller and Madow do not know


@pytest.mark.parametrize("tokens", [2_000, 9_000, 60_000])
def test_many_experts_and_few_tokens_do_not_make_information_of_nothing(tokens: int) -> None:
    rng = np.random.default_rng(9)
    group = document_groups(np.arange(100))[rng.integers(0, 100, tokens)]
    moves = np.zeros((NUM_GROUPS, 128, 128), np.uint32)
    np.add.at(moves, (group, rng.integers(0, 128, tokens), rng.integers(0, 128, tokens)), 1)
    found = transitions(Transitions((Layer(0, 128, 1), Layer(1, 128, 1)), "first", {1: moves})).isel(layer=0)
    assert found["information"] < 0.02 * found["plug_in"]
    assert found["information_low"] == 0
    assert found["information_null"] == pytest.approx(found["plug_in"].item(), rel=0.05)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 6), columns=st.integers(1, 6))
def test_mutual_information_is_the_sum_of_the_entropies_less_that_of_both(seed: int, rows: int, columns: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 20, (rows, columns)) + np.eye(rows, columns)
    entropies = [stats.entropy(sums.ravel(), base=2) for sums in (counts.sum(axis=0), counts.sum(axis=1), counts)]
    assert mutual_information(counts) == pytest.approx(entropies[0] + entropies[1] - entropies[2], abs=1e-12)


def test_drawn_paths_follow_the_chain_they_are_drawn_from() -> None:
    cumulative = np.ones((2, 2, 2))
    cumulative[0, 0, 0] = 0.25
    cumulative[1, :, 0] = [0.5, 0.1]
    paths = np.zeros(200_000, np.uint64)
    draw_paths(cumulative, paths, 7)
    shares = np.sort(np.unique(paths, return_counts=True)[1] / len(paths))
    np.testing.assert_allclose(shares, np.sort([0.125, 0.125, 0.075, 0.675]), atol=0.005)


def test_a_chain_has_the_paths_of_its_null_and_copied_choices_have_fewer(tmp_path: Path) -> None:
    layers = tuple(Layer(n, 8, 1) for n in range(5))
    rng = np.random.default_rng(8)
    part = make_part(rng, layers, [100] * 60)
    step = rng.integers(0, 8, 8)  # noisy: stays on the map half of the time
    ids = [rng.integers(0, 8, part.num_tokens)]
    for _ in layers[1:]:
        ids.append(np.where(rng.random(part.num_tokens) < 0.5, step[ids[-1]], rng.integers(0, 8, part.num_tokens)))
    chain = replace(part, expert_ids={n: at[:, None] for n, at in enumerate(ids)})
    found = transitions(make_trace(tmp_path / "a.moe", [chain], layers))
    assert found["half"].sel(routing="trace") == pytest.approx(
        found["half"].sel(routing="markov chain").item(), rel=0.1
    )
    assert found["half"].sel(routing="trace") < found["half_low"].sel(routing="independent layers")
    two_back = replace(part, expert_ids={n: at[:, None] for n, at in enumerate([*ids[:2], ids[0], ids[1], ids[0]])})
    found = transitions(make_trace(tmp_path / "b.moe", [two_back], layers))
    assert found["distinct"].sel(routing="trace") <= 64
    assert found["half"].sel(routing="trace") < 0.5 * found["half_low"].sel(routing="markov chain")


def test_what_a_trace_cannot_tell_is_refused(tmp_path: Path) -> None:
    counted = make_counts(tmp_path / "c.moe", {0: {0: {1: 2}, 1: {2: 2}}})
    for measure in (coactivation, transitions):
        with pytest.raises(NotRecorded, match="counts"):
            measure(counted)
    trace, _ = trace_of(tmp_path / "t.moe")
    with pytest.raises(NotRecorded, match="one expert a token"):
        coactivation(trace, [3])
    with pytest.raises(NotRecorded, match="two layers"):
        transitions(trace, [3])
    unranked, _ = trace_of(tmp_path / "u.moe", ranked=False)
    with pytest.raises(NotRecorded, match="which of a token's choices is the first"):
        transitions(unranked)
    assert transitions(unranked, choice="all")["information"].notnull().all()
    assert coactivation(unranked).equals(coactivation(trace))


def test_the_worked_examples_of_the_reference_pages(tmp_path: Path) -> None:
    layers = (Layer(0, 4, 2), Layer(1, 6, 2))
    part = make_part(np.random.default_rng(0), layers, [2, 2])
    ids = {0: np.array([[0, 1], [0, 1], [2, 3], [2, 3]]), 1: np.array([[1, 0], [1, 0], [3, 0], [5, 0]])}
    ids[0][:, 0] = [0, 0, 2, 3]
    ids[0][:, 1] = [1, 1, 3, 2]
    trace = make_trace(tmp_path / "t.moe", [replace(part, expert_ids=ids)], layers)
    found = coactivation(trace, [0]).isel(layer=0)
    assert found["joint_null"].sel(expert=0, other=1).item() == pytest.approx(1 / 6)
    assert found["lift"].sel(expert=0, other=1).item() == pytest.approx(3)
    assert found["conditional"].sel(expert=0, other=1) == 1
    ids[0][:, 0], ids[0][:, 1] = [0, 0, 2, 3], [1, 1, 1, 1]  # paths (0,1) twice, (2,3), (3,5)
    trace = make_trace(tmp_path / "u.moe", [replace(part, expert_ids=ids)], layers)
    paths = transitions(trace).sel(routing="trace")
    assert [paths[name].item() for name in ("distinct", "half", "effective", "once")] == [3, 1, 6, 0.5]
