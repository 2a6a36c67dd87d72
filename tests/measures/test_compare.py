"""Comparison and saturation: hand-counted, against scipy and loops, on routing of known agreement, and refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic import VOCABULARY, make_counts, make_part, make_trace

import moescope
from moescope.errors import NoSuchLayer, NotRecorded, TracesUnlike
from moescope.measures.compare import agreement, changes
from moescope.measures.schema import total
from moescope.tallying.matching import match_rows
from moescope.tallying.pair_tally import PairTally, _PairSums
from moescope.trace import Header, Layer, Part, Trace, TraceWriter, open_trace

LAYER = Layer(0, 8, 2)
CHECKPOINTS = Path(__file__).parents[2] / "training" / "checkpoint-traces"


def part_of(
    ids: list[list[int]] | np.ndarray, lengths: list[int], token_id: np.ndarray | None = None, domains: int = 1
) -> Part:
    """Documents of the given lengths with these choices in layer 0, domains in turn."""
    document = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    return Part(
        document.astype(np.uint32),
        document % domains,
        tuple("ABCDEFGH"[:domains]),
        np.zeros(len(document), np.uint32),
        position.astype(np.uint32),
        np.arange(len(document), dtype=np.uint32) if token_id is None else token_id,
        {0: np.asarray(ids)},
    )


def pair_tally(a: Part, b: Part, layer: Layer = LAYER) -> PairTally:
    """The sums of two parts in memory."""
    sums = _PairSums.zeros(len(a.domain_names), (layer,))
    pair = match_rows(a, b, by_token_id=True)
    shared = np.zeros(a.num_tokens, np.int64)
    sums.add(a, b, pair, (layer,), shared)
    sums.by_token.add(a.document[pair.rows_a], a.token_id[pair.rows_a], shared)

    class Sizes:
        domains, num_tokens, num_documents = a.domain_names, a.num_tokens, len(np.unique(a.document))

    sums.matched_4[:] = a.num_tokens, pair.documents, pair.documents_differing, pair.documents_relabelled
    return sums.labelled(Sizes, Sizes, by_token_id=True)  # type: ignore[arg-type]


def write(path: Path, part: Part, layers: tuple[Layer, ...] = (LAYER,), **model: object) -> Trace:
    header = Header(layers, model={"name": path.stem, **model}, corpus={"fingerprint": "f"})
    with TraceWriter(path, header, VOCABULARY) as writer:
        writer.write(part, {})
        writer.finish({"tokens": part.num_tokens})
    return open_trace(path)


def test_agreement_is_what_can_be_counted_by_hand() -> None:
    a = part_of([[0, 1], [2, 3], [0, 1], [4, 5]], [2, 2])
    b = part_of([[1, 0], [2, 4], [6, 7], [4, 5]], [2, 2])
    found = agreement(pair_tally(a, b)).sel(layer=0)
    assert found["domain"].values.tolist() == ["(all)", "A"]
    assert found["agreement"].values.tolist() == [[5 / 8, 2 / 4]] * 2  # shared 2 + 1 + 0 + 2 of 8; first 0 1 0 1 of 4
    # Loads of A: 0 and 1 twice, 2 to 5 once; of B: 4 twice, 0 1 2 5 6 7 once. 2 + 2 + 1 + 2 + 1 of 4 * 4 * 2.
    assert found["agreement_null"].sel(kind="set").values.tolist() == [8 / 32] * 2
    assert found["kappa"].sel(kind="set").values[0] == pytest.approx((5 / 8 - 1 / 4) / (3 / 4))
    assert found["agreement_uniform"].values.tolist() == [1 / 4, 1 / 8]


def test_popularity_is_the_mean_agreement_over_every_way_to_deal_out_the_second_trace() -> None:
    rng = np.random.default_rng(0)
    ids_a, ids_b = (np.array([rng.permutation(5)[:2] for _ in range(6)]) for _ in range(2))
    layer = Layer(0, 5, 2)
    found = agreement(pair_tally(part_of(ids_a, [4, 2]), part_of(ids_b, [4, 2]), layer)).isel(domain=0, layer=0)
    dealt = [ids_b[list(order)] for order in permutations(range(6))]
    sets = np.mean([[len(set(x) & set(y)) / 2 for x, y in zip(ids_a, ids, strict=True)] for ids in dealt])
    firsts = np.mean([(ids_a[:, 0] == ids[:, 0]).mean() for ids in dealt])
    np.testing.assert_allclose(found["agreement_null"].values, [sets, firsts], rtol=1e-12)


def test_kappa_of_first_choices_is_cohens() -> None:
    rng = np.random.default_rng(1)
    a = np.array([rng.permutation(8)[:2] for _ in range(300)])
    b = np.where(rng.random((300, 1)) < 0.5, a, np.array([rng.permutation(8)[:2] for _ in range(300)]))
    table = np.zeros((8, 8))
    np.add.at(table, (a[:, 0], b[:, 0]), 1 / 300)
    chance = table.sum(axis=0) @ table.sum(axis=1)
    found = agreement(pair_tally(part_of(a, [100] * 3), part_of(b, [100] * 3)))
    expected = (np.trace(table) - chance) / (1 - chance)
    assert float(found["kappa"].isel(domain=0, layer=0).sel(kind="first")) == pytest.approx(expected)


def test_a_trace_agrees_with_itself_wholly_and_nothing_changed(tmp_path: Path) -> None:
    layers = (LAYER, Layer(3, 64, 8))
    part = make_part(np.random.default_rng(2), layers, [30] * 12)
    trace = make_trace(tmp_path / "t.moe", [part], layers)
    found = moescope.compare(trace, trace)
    assert found.agreement is not None
    assert found.changes is not None
    assert (found.agreement["agreement"] == 1).all()
    assert (found.agreement["agreement_high"] == 1).all()
    assert (found.agreement["agreement_low"] < 1).all()  # documents that were not drawn might differ
    assert (found.agreement["kappa"] == 1).all()
    assert (found.changes["change"].sel(layer=3) == 0).all()
    assert (found.changes["change_p"].sel(layer=3) == 1).all()
    assert np.isnan(found.changes["share_a"].sel(layer=0, expert=slice(8, None))).all()
    assert found.matching is not None
    assert found.matching.whole


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 6))
def test_renaming_the_experts_of_both_traces_changes_nothing(seed: int, k: int, documents: int) -> None:
    rng = np.random.default_rng(seed)
    layer = Layer(0, 9, k)
    a, b = (np.array([rng.permutation(9)[:k] for _ in range(5 * documents)]) for _ in range(2))
    names = rng.permutation(9)
    lengths = [5] * documents
    plain = agreement(pair_tally(part_of(a, lengths), part_of(b, lengths), layer))
    renamed = agreement(pair_tally(part_of(names[a], lengths), part_of(names[b], lengths), layer))
    swapped = agreement(pair_tally(part_of(b, lengths), part_of(a, lengths), layer))
    for other in (renamed, swapped):
        for name in ("agreement", "agreement_low", "agreement_high", "agreement_null", "kappa"):
            np.testing.assert_allclose(plain[name].values, other[name].values, rtol=1e-9)
    assert ((plain["agreement"] >= 0) & (plain["agreement"] <= 1)).all()


def test_with_documents_of_one_length_the_test_of_a_change_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(3)
    a, b = (np.array([rng.permutation(8)[:2] for _ in range(400)]) for _ in range(2))
    found = changes(pair_tally(part_of(a, [20] * 20), part_of(b, [20] * 20))).isel(domain=1, layer=0)
    for expert in range(8):
        mine, theirs = ((ids == expert).sum(axis=1).reshape(20, 20).sum(axis=1) / 40 for ids in (a, b))
        expected = stats.ttest_rel(theirs, mine)
        at = found.sel(expert=expert)
        assert float(at["change"]) == pytest.approx((theirs - mine).mean())
        assert float(at["change_p"]) == pytest.approx(expected.pvalue)
        interval = expected.confidence_interval()
        np.testing.assert_allclose([at["change_low"], at["change_high"]], [interval.low, interval.high], rtol=1e-9)


def test_intervals_hold_the_true_agreement_and_kappa_at_the_nominal_rate() -> None:
    """Each document keeps a choice of A with a probability of its own, mean 0.6; else it draws anew."""
    rng = np.random.default_rng(4)
    popularity = np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02])
    layer = Layer(0, 8, 1)
    null = float((popularity**2).sum())
    truth = 0.6 + 0.4 * null
    held = np.zeros(2)
    for _ in range(200):
        lengths = rng.integers(10, 60, 30)
        keep = np.repeat(rng.beta(6, 4, 30), lengths)
        a, anew = rng.choice(8, (2, len(keep)), p=popularity)
        b = np.where(rng.random(len(keep)) < keep, a, anew)
        found = agreement(pair_tally(part_of(a[:, None], lengths), part_of(b[:, None], lengths), layer))
        at = found.isel(domain=0, layer=0).sel(kind="set")
        held += [
            float(at["agreement_low"]) <= truth <= float(at["agreement_high"]),
            float(at["kappa_low"]) <= 0.6 <= float(at["kappa_high"]),
        ]
    assert (held >= 180).all(), held
    assert (held <= 198).all(), held


def test_a_change_that_is_not_there_is_found_in_five_of_a_hundred() -> None:
    rng = np.random.default_rng(5)
    rejected = []
    for _ in range(100):
        lengths = rng.integers(20, 60, 30)
        popularity = np.repeat(rng.dirichlet(np.full(8, 2.0), 30), lengths, axis=0)  # of the document, in both traces
        a, b = (np.argmax(np.log(popularity) + rng.gumbel(size=popularity.shape), axis=1)[:, None] for _ in range(2))
        found = changes(pair_tally(part_of(a, lengths), part_of(b, lengths), Layer(0, 8, 1)))
        rejected += (found["change_p"].isel(domain=0).values.ravel() < 0.05).tolist()
    assert 0.03 <= np.mean(rejected) <= 0.07, np.mean(rejected)


def test_with_documents_of_one_length_the_interval_is_that_of_their_mean_on_the_logit_scale() -> None:
    rng = np.random.default_rng(18)
    layer = Layer(0, 8, 3)
    a, b = (np.array([rng.permutation(8)[:3] for _ in range(240)]) for _ in range(2))
    found = agreement(pair_tally(part_of(a, [20] * 12), part_of(b, [20] * 12), layer)).isel(domain=0, layer=0)
    sets = np.array([len(set(x) & set(y)) / 3 for x, y in zip(a, b, strict=True)])
    for kind, values in (("set", sets), ("first", (a[:, 0] == b[:, 0]).astype(float))):
        rates = values.reshape(12, 20).mean(axis=1)
        mean = rates.mean()
        half = stats.t.ppf(0.975, 11) * stats.sem(rates) / (mean * (1 - mean))
        ends = 1 / (1 + np.exp(-(np.log(mean / (1 - mean)) + np.array([-half, half]))))
        at = found.sel(kind=kind)
        np.testing.assert_allclose([at["agreement_low"], at["agreement_high"]], ends, rtol=1e-9)


def test_the_false_discovery_rate_of_all_domains_does_not_pay_for_the_single_ones() -> None:
    rng = np.random.default_rng(19)
    a, b = (np.array([rng.permutation(8)[:2] for _ in range(480)]) for _ in range(2))
    found = changes(pair_tally(part_of(a, [20] * 24, domains=4), part_of(b, [20] * 24, domains=4)))
    for part in (slice(1), slice(1, None)):
        p_values = found["change_p"].isel(domain=part).values
        expected = stats.false_discovery_control(p_values.ravel()).reshape(p_values.shape)
        np.testing.assert_allclose(found["change_q"].isel(domain=part).values, expected)


def test_a_share_that_moved_is_found_with_its_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    a = np.array([rng.permutation(8)[:2] for _ in range(4000)])
    b = np.where((a == 3) & (rng.random((4000, 1)) < 0.3) & ~(a == 6).any(axis=1, keepdims=True), 6, a)
    moved = float((b == 6).mean() - (a == 6).mean())
    found = changes(pair_tally(part_of(a, [100] * 40), part_of(b, [100] * 40))).isel(domain=0, layer=0)
    assert np.flatnonzero(found["change_q"].values < 0.05).tolist() == [3, 6]
    assert found["change"].values[[3, 6]] == pytest.approx([-moved, moved])


def test_the_tokens_that_agree_least_come_first_and_rare_ones_are_not_judged() -> None:
    rng = np.random.default_rng(7)
    token_id = np.tile(np.arange(10, dtype=np.uint32), 60)
    token_id[::97] = 4_000_000_000  # seven times
    token_id[100:112] = 33  # in one document
    a = np.array([rng.permutation(8)[:2] for _ in range(600)])
    anew = np.array([rng.permutation(8)[:2] for _ in range(600)])
    b = np.where((token_id == 7)[:, None] | (rng.random((600, 1)) < 0.1), anew, a)
    counted = pair_tally(part_of(a, [50] * 12, token_id), part_of(b, [50] * 12, token_id))
    from moescope.measures.compare import lowest_agreement

    found = lowest_agreement(counted, VOCABULARY)
    assert sorted(found["token_id"].values.tolist()) == list(range(10))
    assert int(found["token_id"][0]) == 7
    assert str(found["text"].values[0]) == " w7"
    rows = token_id == 7
    mine = np.mean([len(set(x) & set(y)) / 2 for x, y in zip(a[rows], b[rows], strict=True)])
    assert float(found["agreement"][0]) == pytest.approx(mine)
    assert (np.diff(found["agreement_high"].values) >= 0).all()


def test_documents_of_equal_agreement_by_chance_give_no_interval_and_come_last() -> None:
    token_id = np.tile(np.arange(2, dtype=np.uint32), 20)
    a = np.tile([[0, 1]], (40, 1))
    b = a.copy()
    b[::4, 1] = 5  # id 0: half agrees in each document; id 1 agrees wholly
    from moescope.measures.compare import lowest_agreement

    found = lowest_agreement(pair_tally(part_of(a, [20, 20], token_id), part_of(b, [20, 20], token_id)), VOCABULARY)
    assert found["token_id"].values.tolist() == [1, 0]
    assert np.isnan(found["agreement_high"].values).tolist() == [False, True]


def test_gate_weight_on_shared_experts_and_margins_are_those_of_a_loop(tmp_path: Path) -> None:
    rng = np.random.default_rng(17)
    layers = (Layer(0, 8, 3), Layer(2, 8, 1))
    mine = make_part(rng, layers, [20, 30, 9, 40, 11, 16], weights=True, dropped=0.1)
    theirs = make_part(rng, layers, [20, 30, 9, 40, 11, 16])
    weights = np.array(mine.gate_weights[0])
    weights[5] = 0
    mine = replace(mine, gate_weights={**mine.gate_weights, 0: weights})
    theirs = replace(theirs, token_id=mine.token_id)
    halves = [mine.rows(mine.document < 2), mine.rows(mine.document >= 2)]
    a = make_trace(tmp_path / "a.moe", halves, layers)
    b = make_trace(tmp_path / "b.moe", [theirs], layers)
    found = moescope.compare(a, b).weights
    assert found is not None
    assert moescope.compare(b, a).weights is None
    for layer in (0, 2):
        kept, margins = [], {True: [], False: []}
        columns = (mine.expert_ids[layer], theirs.expert_ids[layer], mine.gate_weights[layer])
        for x, y, w in zip(*(np.asarray(column).tolist() for column in columns), strict=True):
            made = {e: weight for e, weight in zip(x, w, strict=True) if e >= 0}
            if sum(made.values()) > 0:
                kept.append(sum(weight for e, weight in made.items() if e in y) / sum(made.values()))
            if len(w) > 1 and min(x[:2]) >= 0 and w[0] + w[1] > 0:
                margins[x[0] == y[0]].append((w[0] - w[1]) / (w[0] + w[1]))
        at = found.isel(domain=0).sel(layer=layer)
        assert float(at["kept"]) == pytest.approx(np.mean(kept))
        assert float(at["kept_low"]) < np.mean(kept) < float(at["kept_high"])
        for name, same in (("margin_same", True), ("margin_differs", False)):
            value = float(at[name])
            assert value == pytest.approx(np.mean(margins[same])) if margins[same] else np.isnan(value)


def test_unranked_choices_have_no_first(tmp_path: Path) -> None:
    layers = (replace(LAYER, ranked=False),)
    trace = make_trace(tmp_path / "t.moe", [make_part(np.random.default_rng(8), layers, [9] * 6)], layers)
    found = moescope.compare(trace, trace).agreement
    assert found is not None
    assert np.isnan(found["agreement"].sel(kind="first")).all()
    assert np.isnan(found["agreement_null"].sel(kind="first")).all()
    assert (found["agreement"].sel(kind="set") == 1).all()


def test_other_tokens_are_compared_by_distribution_only_and_it_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    a = write(tmp_path / "a.moe", make_part(rng, (LAYER,), [60] * 18))
    b = write(tmp_path / "b.moe", make_part(rng, (LAYER,), [60] * 18))
    found = moescope.compare(a, b)
    assert (found.agreement, found.changes, found.tokens) == (None, None, None)
    assert found.remarks[0].startswith("Only distributions are compared, not tokens: fewer than half")
    assert found.distances is not None
    from scipy.spatial.distance import jensenshannon

    shares = [moescope.shares(moescope.tally(trace)).sel(choice="all", layer=0)["share"] for trace in (a, b)]
    for domain in a.domains:
        p, q = (side.sel(domain=domain).values for side in shares)
        assert float(found.distances["jsd"].sel(domain=domain, layer=0)) == pytest.approx(jensenshannon(p, q, 2) ** 2)
        evenness = stats.entropy(p, base=8)
        assert float(found.distances["evenness_a"].sel(domain=domain, layer=0)) == pytest.approx(evenness)


def test_draws_of_one_distribution_are_told_apart_in_five_of_a_hundred(tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    p_values = []
    for number in range(20):
        sides = []
        for side in "ab":
            lengths = rng.integers(20, 60, 100)
            popularity = np.repeat(rng.dirichlet(np.full(8, 3.0), 100), lengths, axis=0)
            ids = np.argsort(-(np.log(popularity) + rng.gumbel(size=popularity.shape)), axis=1)[:, :2]
            token_id = rng.integers(0, 50, len(ids)).astype(np.uint32)
            sides.append(write(tmp_path / f"{number}{side}.moe", part_of(ids, lengths, token_id, domains=5)))
        found = moescope.compare(*sides).distances
        assert found is not None
        p_values += found["jsd_p"].values.ravel().tolist()
    assert len(p_values) == 100
    assert np.mean(np.array(p_values) < 0.05) <= 0.12


def test_another_architecture_is_not_compared_by_expert_id(tmp_path: Path) -> None:
    part = make_part(np.random.default_rng(11), (LAYER,), [30] * 6)
    a = write(tmp_path / "a.moe", part, architecture="MixtralForCausalLM")
    b = write(tmp_path / "b.moe", part, architecture="PhimoeForCausalLM")
    found = moescope.compare(a, b)
    assert found.agreement is None
    assert "differ in architecture" in found.remarks[0]
    assert found.distances is not None
    assert np.isnan(found.distances["jsd"]).all()
    assert np.isfinite(found.distances["evenness_a"]).all()


def test_the_headers_decide_what_is_said_on_the_meaning_of_expert_ids(tmp_path: Path) -> None:
    part = make_part(np.random.default_rng(12), (LAYER,), [30] * 6)
    a = write(tmp_path / "a.moe", part, fingerprint="1", dtype="float32")
    b = write(tmp_path / "b.moe", part, fingerprint="1", dtype="bfloat16")
    c = write(tmp_path / "c.moe", part, fingerprint="2")
    assert moescope.compare(a, b).remarks[0] == "Both traces are of the same weights."
    assert "cannot tell" in moescope.compare(a, c).remarks[0]
    assert "The headers differ in model.dtype (float32, bfloat16), model.name (a, b)." in moescope.compare(a, b).remarks
    assert not [remark for remark in moescope.compare(a, a).remarks if "headers differ" in remark]


def test_every_key_of_the_headers_that_differs_is_named(tmp_path: Path) -> None:
    part = make_part(np.random.default_rng(12), (LAYER,), [30] * 6)
    model = {"dtype": "float32", "expert_widths": [24], "router": "MixtralTopKRouter", "hidden_size": 32}
    run = {"device": "cpu", "torch": "2.5", "watch": "a", "moescope": "0.1.0"}
    changes = {
        "model": {"dtype": "bfloat16", "expert_widths": [48], "router": "PhimoeTopKRouter", "not_recorded": ["x"]},
        "tokenizer": {"fingerprint": "b" * 64},
        "run": {"device": "cuda", "watch": "b", "torch": None},
    }
    sides: dict[str, dict[str, Any]] = {"model": model, "tokenizer": {"fingerprint": "a" * 64}, "run": run}
    others = {name: sides[name] | changes[name] for name in sides}
    for name, header in (("a", Header((LAYER,), **sides)), ("b", Header((LAYER,), **others))):
        with TraceWriter(tmp_path / name, header, VOCABULARY) as writer:
            writer.write(part, {})
    a, b = moescope.open_trace(tmp_path / "a"), moescope.open_trace(tmp_path / "b")
    assert (
        "The headers differ in model.dtype (float32, bfloat16), model.expert_widths ([24], [48]), "
        "model.router (MixtralTopKRouter, PhimoeTopKRouter), run.device (cpu, cuda), "
        "tokenizer.fingerprint (aaaaaaaaaaaa…, bbbbbbbbbbbb…)."
    ) in moescope.compare(a, b).remarks


def test_other_experts_in_every_layer_leave_distributions_and_in_some_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(13)
    layers = (LAYER, Layer(1, 16, 2))
    a = make_trace(tmp_path / "a.moe", [make_part(rng, layers, [30] * 6)], layers)
    other = (LAYER, Layer(1, 32, 2), Layer(2, 8, 2))
    part = make_part(rng, other, [30] * 6)
    part = replace(part, token_id=next(a.iter_parts()).token_id)
    b = make_trace(tmp_path / "b.moe", [part], other)
    found = moescope.compare(a, b)
    assert found.agreement is not None
    assert found.agreement["layer"].values.tolist() == [0]
    assert "not compared: layers 1, 2, which are not alike in both traces" in found.remarks
    only = (Layer(1, 64, 4),)
    c = make_trace(tmp_path / "c.moe", [make_part(rng, only, [30] * 6)], only)
    apart = moescope.compare(a, c)
    assert "no layer has the same number of experts" in apart.remarks[0]
    assert apart.distances is not None
    assert apart.distances["layer"].values.tolist() == [1]
    with pytest.raises(NoSuchLayer):
        moescope.compare(a, c, [0])


def test_counts_are_compared_by_distribution(tmp_path: Path) -> None:
    loads = {g: {0: {0: 10 + g, 1: 20, 2: 10 * (g + 1)}} for g in range(8)}
    a = make_counts(tmp_path / "a.moe", loads)
    b = make_counts(tmp_path / "b.moe", {g: {0: {0: 11, 1: 20 + g, 3: 9}} for g in range(8)})
    found = moescope.compare(a, b)
    assert (found.agreement, found.matching) == (None, None)
    assert "holds counts and no tokens" in found.remarks[0]
    assert found.distances is not None
    assert (found.distances["jsd"] > 0).all()


def test_without_token_ids_the_corpus_must_be_said_to_be_the_same(tmp_path: Path) -> None:
    part = make_part(np.random.default_rng(14), (LAYER,), [30] * 6)
    a = make_trace(tmp_path / "a.moe", [part], (LAYER,), token_ids=False)
    found = moescope.compare(a, a)
    assert found.agreement is None
    assert "no token ids" in found.remarks[0]
    header = Header((LAYER,), token_ids=False, corpus={"fingerprint": "f"})
    with TraceWriter(tmp_path / "b.moe", header, VOCABULARY) as writer:
        writer.write(part, {})
    b = open_trace(tmp_path / "b.moe")
    same = moescope.compare(b, b)
    assert same.agreement is not None
    assert same.tokens is None
    assert "place in the same corpus" in same.remarks[1]


def test_a_trace_without_a_document_is_compared_with_nothing(tmp_path: Path) -> None:
    part = make_part(np.random.default_rng(14), (LAYER,), [30] * 6)
    with TraceWriter(tmp_path / "empty.moe", Header((LAYER,)), VOCABULARY):
        pass
    found = moescope.compare(open_trace(tmp_path / "empty.moe"), write(tmp_path / "b.moe", part))
    assert found.agreement is None


def test_all_domains_are_named_as_no_domain_is(tmp_path: Path) -> None:
    part = make_part(np.random.default_rng(15), (LAYER,), [30] * 6, domains=("A", "(all)"))
    trace = write(tmp_path / "t.moe", part)
    for found in (moescope.compare(trace, trace).agreement, moescope.saturation([trace, trace])):
        assert found is not None
        assert found["domain"].values.tolist() == ["((all))", "A", "(all)"]
        assert total(found)["tokens"].max() == 180


# ------------------------------------------------------------------------------------------------------- saturation


def test_saturation_finds_the_planted_agreement_of_each_checkpoint(tmp_path: Path) -> None:
    rng = np.random.default_rng(15)
    layers = (Layer(0, 16, 2), Layer(1, 16, 2))
    last = make_part(rng, layers, [100] * 30)
    traces = []
    for number, kept in enumerate((0.0, 0.5, 0.9)):
        ids = {}
        for layer in (0, 1):
            mine = np.asarray(last.expert_ids[layer])
            dealt = mine[rng.permutation(len(mine))]
            ids[layer] = np.where(rng.random((len(mine), 1)) < kept, mine, dealt)
        traces.append(make_trace(tmp_path / f"{number}.moe", [replace(last, expert_ids=ids)], layers))
    traces.append(make_trace(tmp_path / "last.moe", [last], layers))
    found = moescope.saturation(traces, [10, 20, 40, 80])
    assert found["step"].values.tolist() == [10, 20, 40]
    assert found.attrs == {"reference": "last.moe", "reference_step": 80}
    kappa = found.isel(domain=0)
    for layer in (0, 1):
        for number, kept in enumerate((0.0, 0.5, 0.9)):
            at = kappa.isel(step=number).sel(layer=layer, kind="set")
            assert float(at["kappa_low"]) <= kept <= float(at["kappa_high"])
    one = agreement_of(traces[1], traces[-1])
    np.testing.assert_array_equal(found["agreement"].isel(step=1).values, one["agreement"].values)


def agreement_of(a: Trace, b: Trace):
    found = moescope.compare(a, b).agreement
    assert found is not None
    return found


def test_saturation_refuses_what_are_no_checkpoints_of_one_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(16)
    layers = (Layer(0, 8, 2), Layer(1, 8, 2))
    a = make_trace(tmp_path / "a.moe", [make_part(rng, layers, [30] * 6)], layers)
    other = make_trace(tmp_path / "b.moe", [make_part(rng, layers, [30] * 6)], layers)
    fewer = make_trace(tmp_path / "c.moe", [make_part(rng, layers[:1], [30] * 6)], layers[:1])
    with pytest.raises(TracesUnlike, match="expected at least half"):
        moescope.saturation([a, other])
    with pytest.raises(TracesUnlike, match="layers are not those of"):
        moescope.saturation([fewer, a])
    with pytest.raises(ValueError, match="at least two"):
        moescope.saturation([a])
    with pytest.raises(ValueError, match="steps must ascend"):
        moescope.saturation([a, a], [2, 1])
    counts = make_counts(tmp_path / "d.moe", {0: {0: {1: 5}}}, (layers[0], layers[1]))
    with pytest.raises(NotRecorded):
        moescope.saturation([counts, counts])


def test_the_routers_of_the_mini_model_settle_over_training_the_first_layer_first() -> None:
    traces = [open_trace(path) for path in sorted(CHECKPOINTS.glob("pct-*.moe"))]
    found = moescope.saturation(traces, [1, 2, 5, 10, 20, 40, 70, 100])
    value = found["agreement"].isel(domain=0).sel(kind="set")
    assert (np.diff(value.values[1:], axis=0) > 0).all()
    assert (value.sel(layer=0).values > value.sel(layer=slice(1, None)).max("layer").values).all()
    # The same from the columns themselves, without any of our reading.
    import pyarrow.parquet as pq

    early, late = (
        pq.read_table(CHECKPOINTS / f"{name}.moe" / "parts" / "000000.parquet").to_pandas()
        for name in ("pct-010", "pct-100")
    )
    assert (early[["document", "position", "token_id"]] == late[["document", "position", "token_id"]]).all().all()
    shared = sum((early[f"L3_{i}"] == late[f"L3_{j}"]).sum() for i in (0, 1) for j in (0, 1))
    assert float(value.isel(step=3).sel(layer=3)) == shared / (2 * len(early))
