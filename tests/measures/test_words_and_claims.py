"""Words against hand counts and planted routing; claims against models whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moescope.measures import Claim, claims, divergence, repeats, shares, words
from moescope.measures.words import _clustered, _share_of_the_top
from moescope.tallying import tally
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
    found = claims(
        shares(counted), repeats(counted), divergence(counted), words(trace, ["self"], indentation=True, tally=counted)
    )
    return {claim.name: claim for claim in found}


def test_planted_locality_topics_and_words_are_answered_yes(tmp_path: Path) -> None:
    found = answers(planted(tmp_path / "t.moe", sticky=0.5, topical=True, word_expert=True))
    assert found["Consecutive tokens repeat"].answer == "mixed"  # layer 0 has none
    assert found["Repetition grows with depth"].answer == "yes"
    assert found["DM Mathematics stands out"].answer == "yes"
    assert found["The word “self” has an expert"].answer in ("yes", "mixed")
    assert "go to expert 5" in found["The word “self” has an expert"].evidence


def test_independent_routing_is_answered_no(tmp_path: Path) -> None:
    found = answers(planted(tmp_path / "t.moe", sticky=0, topical=False, word_expert=False))
    for name in ("DM Mathematics stands out", "Repetition grows with depth", "The word “self” has an expert"):
        assert found[name].answer == "no", found[name]
    assert found["Consecutive tokens repeat"].answer in ("no", "mixed")
    assert found["No pattern by topic"].answer in ("yes", "not enough data")


def test_too_few_documents_are_said_to_be_too_few(tmp_path: Path) -> None:
    found = answers(planted(tmp_path / "t.moe", sticky=0.5, topical=True, word_expert=True, documents=4))
    for name in ("No pattern by topic", "DM Mathematics stands out", "Consecutive tokens repeat"):
        assert found[name].answer == "not enough data", found[name]


def test_a_corpus_without_mathematics_cannot_answer_for_it(tmp_path: Path) -> None:
    documents = [("A", ["x"] * 20)] * 3 + [("B", ["x"] * 20)] * 3
    ids = np.tile(np.array([[0, 1], [2, 3]]), (60, 1))
    found = answers(write(tmp_path / "t.moe", documents, dict.fromkeys((0, 1, 2), ids), LAYERS))
    claim = found["DM Mathematics stands out"]
    assert (claim.answer, claim.evidence) == ("not enough data", "The corpus has no domain DM Mathematics.")


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
