"""Words against hand counts and planted routing; claims against models whose answers are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from synthetic import result_of

from moescope.measures import divergence, explain, locality, words
from moescope.measures.claims import Claim, Effect, answered, welch
from moescope.measures.words import _clustered, _share_of_the_top
from moescope.tallying import tally
from moescope.tallying.document_sample import DocumentCounter
from moescope.trace import Header, Layer, Part, Trace, TraceWriter, Vocabulary, open_trace

LAYERS = (Layer(0, 8, 2), Layer(1, 8, 2), Layer(2, 8, 2))


def write(
    path: Path, documents: list[tuple[str, list[str]]], choices: dict[int, np.ndarray], layers: tuple[Layer, ...]
) -> Trace:
    """A trace of documents given as (domain, pieces) and the choices of all their tokens."""
    pieces = sorted({piece for _, tokens in documents for piece in tokens})
    place = {piece: token_id for token_id, piece in enumerate(pieces)}
    domains = tuple(dict.fromkeys(domain for domain, _ in documents))
    lengths = [len(tokens) for _, tokens in documents]
    part = Part(
        np.repeat(np.arange(len(documents)), lengths),
        np.repeat([domains.index(domain) for domain, _ in documents], lengths),
        domains,
        np.zeros(sum(lengths), int),
        np.concatenate([np.arange(length) for length in lengths]),
        np.array([place[piece] for _, tokens in documents for piece in tokens]),
        choices,
    )
    with TraceWriter(path, Header(layers), Vocabulary.from_pieces([piece.encode() for piece in pieces])) as writer:
        writer.write(part, {})
        writer.finish({})
    return open_trace(path)


def test_the_words_of_three_documents_counted_by_hand(tmp_path: Path) -> None:
    documents = [
        ("A", ["Quest", "ion", " x"]),  # 1 1
        ("A", ["Quest", "ion", " x", " Quest", "ion"]),  # 1 1 and 1 2
        ("A", ["Quest", "ion"]),  # 1 1
    ]
    first = [1, 1, 0, 1, 1, 0, 1, 2, 1, 1]
    trace = write(tmp_path / "t.moe", documents, {0: np.array([[e, 7] for e in first])}, LAYERS[:1])
    row = words(trace, ["Question"]).sel(word="Question", layer=0)
    assert [int(row[name]) for name in ("occurrences", "tokens", "documents", "multi_token")] == [4, 8, 3, 4]
    assert (row["top_expert"], row["top_share"], row["top_share_null"]) == (1, 7 / 8, 7 / 10)
    # Tokens by document: 2 of expert 1; 3 of 1 and 1 of 2; 2 of 1: agreeing ordered pairs across documents.
    assert row["same"] == pytest.approx((50 - 4 - 10 - 4) / (64 - 4 - 16 - 4))
    assert row["same_null"] == pytest.approx((2 * 1 + 7 * 6 + 0) / (10 * 9))
    assert row["together"] == pytest.approx(3 / 4)
    # "ion" elsewhere: seen from documents 0 and 2, 1 1 2 of 3 or 1 1 2; "Quest" and " Quest": always 1.
    assert row["together_null"] == pytest.approx(np.nanmean([2 / 3, 1.0, np.nan, 2 / 3]))


def test_a_word_that_does_not_occur_has_no_numbers_but_a_row(tmp_path: Path) -> None:
    trace = write(tmp_path / "t.moe", [("A", ["x", "y"])], {0: np.array([[0, 1], [2, 3]])}, LAYERS[:1])
    row = words(trace, ["absent"], indentation=True)
    assert row["occurrences"].values.tolist() == [0, 0]
    assert row["same"].isnull().all()
    assert row["top_expert"].isnull().all()


def planted(path: Path, *, sticky: float, topical: bool, word_expert: bool, documents: int = 40) -> Trace:
    """Four domains, of which one is DM Mathematics; routing with planted locality, topics and a word with an expert."""
    rng = np.random.default_rng(0)
    texts: list[tuple[str, list[str]]] = []
    for number in range(documents):
        domain = ("ArXiv", "Github", "Wikipedia (en)", "DM Mathematics")[number % 4]
        texts.append((domain, rng.choice([" self", " a", " b", " c", "\n    "], 120).tolist()))
    tokens = [(domain, piece, at == 0) for domain, pieces in texts for at, piece in enumerate(pieces)]
    choices = {}
    for layer in LAYERS:
        scores = rng.gumbel(size=(len(tokens), 8))
        for row, (domain, piece, starts) in enumerate(tokens):
            if topical and domain == "DM Mathematics":
                scores[row, layer.layer] += 2
            if word_expert and piece == " self":
                scores[row, 5] += 8
            if not starts and layer.layer > 0 and rng.random() < sticky:
                scores[row] = scores[row - 1]
        choices[layer.layer] = np.argsort(-scores, axis=1)[:, :2]
    return write(path, texts, choices, LAYERS)


def answers(trace: Trace) -> dict[str, Claim]:
    counted = tally(trace)
    of_words = words(trace, ["self"], indentation=True)
    kept = result_of(DocumentCounter, trace, threads=1)
    found = answered(
        divergence(counted), of_words, locality(kept, threads=1), explain(kept, permutations=19, threads=1)
    )
    return {claim.name: claim for claim in found}


def test_planted_locality_topics_and_words_are_answered_yes(tmp_path: Path) -> None:
    found = answers(planted(tmp_path / "t.moe", sticky=0.5, topical=True, word_expert=True))
    assert found["Consecutive tokens repeat"].answer == "mixed"  # layer 0 has none
    assert found["Repetition grows with depth"].answer == "yes"
    assert found["DM Mathematics stands out"].answer == "yes"
    assert found["The word “self” has an expert"].answer == "mixed"  # half of its tokens repeat the one before
    assert "go to expert 5" in found["The word “self” has an expert"].evidence


def test_independent_routing_is_answered_no(tmp_path: Path) -> None:
    found = answers(planted(tmp_path / "t.moe", sticky=0, topical=False, word_expert=False))
    for name in ("DM Mathematics stands out", "Repetition grows with depth", "The word “self” has an expert"):
        assert found[name].answer == "no", found[name]
    assert found["Consecutive tokens repeat"].answer in ("no", "mixed")
    assert found["No pattern by topic"].answer in ("yes", "not enough data")


def test_too_few_documents_are_said_to_be_too_few(tmp_path: Path) -> None:
    found = answers(planted(tmp_path / "t.moe", sticky=0.5, topical=True, word_expert=True, documents=4))
    for name in ("No pattern by topic", "DM Mathematics stands out", "Repetition depends on the domain"):
        assert found[name].answer == "not enough data", found[name]
    alone = answers(planted(tmp_path / "one.moe", sticky=0.5, topical=True, word_expert=True, documents=1))
    assert {claim.answer for claim in alone.values()} == {"not enough data"}
    assert all(not claim.effects for claim in alone.values())


def test_a_corpus_without_mathematics_cannot_answer_for_it(tmp_path: Path) -> None:
    documents = [("A", ["x"] * 20)] * 3 + [("B", ["x"] * 20)] * 3
    ids = np.tile(np.array([[0, 1], [2, 3]]), (60, 1))
    found = answers(write(tmp_path / "t.moe", documents, dict.fromkeys((0, 1, 2), ids), LAYERS))
    claim = found["DM Mathematics stands out"]
    assert (claim.answer, claim.evidence) == ("not enough data", "The corpus has no domain DM Mathematics.")


def in_runs(path: Path, *, sticky: bool, documents: int = 40) -> Trace:
    """Each word stands three times in a row and has an expert of its own; or tokens keep the expert before instead."""
    rng = np.random.default_rng(1)
    words = [f" w{n}" for n in range(30)]
    texts = [("AB"[at % 2], np.repeat(rng.choice(words, 40), 3).tolist()) for at in range(documents)]
    pieces = [piece for _, tokens in texts for piece in tokens]
    choices = {}
    for layer in LAYERS:
        expert = {f" w{n}": int(e) for n, e in enumerate(rng.integers(0, 8, 30))}
        first = [expert[piece] for piece in pieces]
        if sticky:
            first = rng.integers(0, 8, len(pieces)).tolist()
            for row in range(1, len(first)):
                if row % 120 and rng.random() < 0.4:
                    first[row] = first[row - 1]
        choices[layer.layer] = np.array([[e, (e + 1) % 8] for e in first])
    return write(path, texts, choices, LAYERS)


def test_repeats_that_the_words_explain_are_repeats_but_not_beyond_the_words(tmp_path: Path) -> None:
    found = answers(in_runs(tmp_path / "t.moe", sticky=False))
    assert found["Consecutive tokens repeat"].answer == "yes"
    assert found["They repeat beyond their words"].answer == "no"
    for effect in found["They repeat beyond their words"].effects:
        assert effect.value == pytest.approx(0, abs=1e-9)
        assert effect.null == "same words elsewhere"


def test_repeats_beyond_the_words_are_found_and_their_size_is_the_planted_one(tmp_path: Path) -> None:
    claim = answers(in_runs(tmp_path / "t.moe", sticky=True))["They repeat beyond their words"]
    assert claim.answer == "yes"
    truth = 100 * (0.4 + 0.6 / 8 - 1 / 8)
    for effect in claim.effects:
        assert effect.low is not None
        assert effect.high is not None
        assert effect.low - 2 < truth < effect.high + 2
        assert effect.found


def test_repeats_are_set_against_uniform_routing_as_a_slow_loop_counts_them(tmp_path: Path) -> None:
    trace = in_runs(tmp_path / "t.moe", sticky=True)
    effects = answers(trace)["Consecutive tokens repeat"].effects
    for layer in LAYERS:
        same = pairs = 0
        for part in trace.iter_parts():
            first = part.expert_ids[layer.layer][:, 0].tolist()
            for row in range(1, part.num_tokens):
                if part.position[row]:
                    pairs, same = pairs + 1, same + (first[row] == first[row - 1])
        of_layer = {e.null: e for e in effects if e.what == f"repeats at layer {layer.layer}"}
        assert list(of_layer) == ["uniform routing", "popularity in the domain", "document in any order"]
        assert of_layer["uniform routing"].null_value == pytest.approx(12.5)
        assert of_layer["uniform routing"].value == pytest.approx(100 * same / pairs - 12.5)


def test_p_values_are_corrected_over_the_effects_of_all_claims(tmp_path: Path) -> None:
    found = answers(planted(tmp_path / "t.moe", sticky=0.1, topical=True, word_expert=True, documents=12))
    effects = [effect for claim in found.values() for effect in claim.effects]
    tested = [effect for effect in effects if effect.p_value is not None]
    assert len(tested) > 20
    p_values = [effect.p_value for effect in tested]
    for effect in tested:  # Benjamini and Hochberg: the least m p / rank of this p-value or a larger one
        larger = [p for p in p_values if p >= effect.p_value]
        expected = min(len(p_values) * p / sum(other <= p for other in p_values) for p in larger)
        assert effect.q_value == pytest.approx(min(1, expected))
    assert all(effect.q_value is None for effect in effects if effect.p_value is None)


def test_the_test_of_several_domains_is_welchs_t_test_for_two() -> None:
    expected = stats.ttest_ind_from_stats(0.2, 0.03 * 7**0.5, 7, 0.3, 0.05 * 12**0.5, 12, equal_var=False).pvalue
    assert welch(np.array([0.2, 0.3]), np.array([0.03, 0.05]), np.array([7, 12])) == pytest.approx(expected)


def test_the_test_of_several_domains_rejects_one_in_twenty_of_equal_ones() -> None:
    rng = np.random.default_rng(0)
    documents = np.array([8, 15, 30, 12])
    spread = np.array([1.0, 3.0, 0.5, 2.0])
    rejected = 0
    for _ in range(2000):
        groups = [rng.normal(0, s, n) for s, n in zip(spread, documents, strict=True)]
        value = np.array([group.mean() for group in groups])
        error = np.array([group.std(ddof=1) / len(group) ** 0.5 for group in groups])
        rejected += welch(value, error, documents) < 0.05
    assert 0.035 < rejected / 2000 < 0.065


@pytest.mark.parametrize(("inner", "answer"), [(0.0, "yes"), (1.0, "not enough data"), (2.0, "no")])
def test_the_first_and_the_last_layer_differ_most_only_if_they_do(inner: float, answer: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    layers = tuple(Layer(number, 8, 2) for number in range(5))
    texts = [("ABCD"[number % 4], ["x"] * 80) for number in range(60)]
    domain = np.repeat(np.arange(60) % 4, 80)
    taste = rng.normal(size=(4, 8)) * 0.6
    choices = {}
    for layer in layers:
        strength = 1.0 if layer.layer in (0, 4) else inner
        scores = rng.gumbel(size=(len(domain), 8)) + strength * taste[:, rng.permutation(8)][domain]
        choices[layer.layer] = np.argsort(-scores, axis=1)[:, :2]
    found = answered(divergence(tally(write(tmp_path / "t.moe", texts, choices, layers))))
    claim = next(claim for claim in found if claim.name == "First and last layer differ most")
    assert claim.answer == answer, claim
    if answer == "yes":
        for effect in claim.effects:
            assert effect.low is not None
            assert effect.low > 0


def test_nothing_is_said_of_neighbours_where_no_order_is_known(tmp_path: Path) -> None:
    trace = planted(tmp_path / "t.moe", sticky=0.5, topical=True, word_expert=True)
    found = {claim.name: claim for claim in answered(divergence(tally(trace)))}
    for name in ("Consecutive tokens repeat", "They repeat beyond their words", "Repetition grows with depth"):
        assert (found[name].answer, found[name].effects) == ("not enough data", ())
    assert not [name for name in found if "self" in name]


def test_where_no_choice_is_the_first_the_sets_are_compared(tmp_path: Path) -> None:
    trace = in_runs(tmp_path / "t.moe", sticky=True)
    unranked = replace(trace, header=replace(trace.header, layers=tuple(replace(a, ranked=False) for a in LAYERS)))
    kept = result_of(DocumentCounter, unranked, threads=1)
    explained = explain(kept, choice="all", permutations=19)
    found = answered(divergence(tally(unranked)), None, locality(kept, threads=1), explained)
    claim = next(claim for claim in found if claim.name == "Consecutive tokens repeat")
    assert claim.answer == "yes"
    assert "an expert in common" in claim.evidence


def test_a_word_that_agrees_a_little_more_than_others_has_no_expert(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    texts = [("ArXiv", rng.choice([" self", " a", " b"], 120).tolist()) for _ in range(40)]
    pieces = [piece for _, of in texts for piece in of]
    choices = {}
    for layer in LAYERS:
        scores = rng.gumbel(size=(len(pieces), 8))
        scores[np.array(pieces) == " self", 3] += 1.5  # expert 3 gets 39 % of it: two tokens agree in 21 % of the cases
        choices[layer.layer] = np.argsort(-scores, axis=1)[:, :2]
    trace = write(tmp_path / "t.moe", texts, choices, LAYERS)
    counted = tally(trace)
    found = answered(divergence(counted), words(trace, ["self"]))
    claim = next(claim for claim in found if "self" in claim.name)
    assert all(effect.found for effect in claim.effects)
    assert claim.answer == "mixed"
    assert "in significantly more than half of the cases at 0" in claim.evidence


def test_the_effect_that_leads_is_the_one_the_answer_hangs_on(tmp_path: Path) -> None:
    found = answers(planted(tmp_path / "t.moe", sticky=0.5, topical=True, word_expert=True))
    led = {name: claim.effects[claim.lead] for name, claim in found.items() if claim.lead is not None}
    mixed = found["Consecutive tokens repeat"]  # nothing at the first layer: led by what there is
    over_popularity = [effect for effect in mixed.effects if effect.null == "popularity in the domain"]
    assert mixed.answer == "mixed"
    assert led[mixed.name] == max(over_popularity, key=lambda effect: effect.value)
    assert led[mixed.name].found
    grows = found["Repetition grows with depth"]  # needs both, so hangs on the smaller
    assert led[grows.name] == min(grows.effects[:2], key=lambda effect: effect.value)
    word = answers(planted(tmp_path / "w.moe", sticky=0, topical=False, word_expert=True))[
        "The word “self” has an expert"
    ]
    assert (word.answer, word.lead is None) == ("yes", False)  # needs most layers
    assert word.effects[word.lead or 0].value == sorted(effect.value for effect in word.effects)[1]
    nothing = answers(planted(tmp_path / "n.moe", sticky=0, topical=False, word_expert=False))
    claim = nothing["Repetition grows with depth"]
    assert claim.answer == "no"
    assert claim.lead is not None
    assert claim.effects[claim.lead].value == max(effect.value for effect in claim.effects[:2])
    assert {claim.lead for claim in nothing.values() if not claim.effects} <= {None}


def test_an_effect_is_found_only_if_it_is_positive_and_sure() -> None:
    effect = Effect("x", 1.0, "points", 0.5, 1.5, "y", 12.5, 0.001, 0.01)
    assert effect.found
    assert not replace(effect, value=-1.0).found
    assert not replace(effect, q_value=0.05).found
    assert not replace(effect, q_value=None).found


def test_the_share_of_the_top_expert_is_held_although_it_was_picked_as_the_largest() -> None:
    rng = np.random.default_rng(0)
    held, pointwise = [], []
    for _ in range(300):
        counts = rng.multinomial(12, np.full(8, 1 / 8), 60).astype(float)
        top = int(counts.sum(axis=0).argmax())
        _, low, high = _share_of_the_top(counts, top)
        held.append(low <= 1 / 8 <= high)
        _, low, high = _clustered(counts[:, top], counts.sum(axis=1))
        pointwise.append(low <= 1 / 8 <= high)
    assert np.mean(held) >= 0.93
    assert np.mean(pointwise) < 0.88
    ahead = rng.multinomial(12, [0.65, *np.full(7, 0.05)], 60).astype(float)
    found, alone = _share_of_the_top(ahead, 0), _clustered(ahead[:, 0], ahead.sum(axis=1))
    assert found == pytest.approx(alone)  # nobody else could have come out on top
