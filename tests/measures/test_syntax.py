"""Word classes: divergence by hand and by scipy, what documents explain, and rates over draws of known generators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import draw
from scipy import stats
from scipy.spatial.distance import jensenshannon

from moescope.measures import syntax
from moescope.tallying import word_class_kernels as kernels
from moescope.tallying.document_groups import document_groups
from moescope.tallying.word_classes import CLASSES, ClassCounts
from moescope.trace import Header, Layer, Part, Trace, TraceWriter, Vocabulary, open_trace


def counted(experts: list[np.ndarray], kinds: list[np.ndarray], num_experts: int) -> ClassCounts:
    """Counts of documents given as experts and whether each token is of the first class."""
    starts = np.concatenate([[0], np.cumsum([len(of) for of in experts])])
    counts = ClassCounts.empty([Layer(0, num_experts, 1)], choice="first")
    kernels.count_classes(
        np.concatenate(experts)[None].astype(np.uint8),
        np.concatenate(kinds).astype(np.uint8),
        np.array([0, 1], np.uint16),
        starts,
        document_groups(np.arange(len(experts))),
        counts.counts_LXCE[0],
        counts.expected_LXCE[0],
        counts.totals_LCE[0],
    )
    return counts


def write(path: Path, documents: list[tuple[str, list[str], list[int]]]) -> Trace:
    """A trace of documents given as (domain, pieces, first choices), of four experts, two a token."""
    pieces = sorted({piece for _, tokens, _ in documents for piece in tokens})
    domains = tuple(dict.fromkeys(domain for domain, *_ in documents))
    lengths = [len(tokens) for _, tokens, _ in documents]
    first = np.concatenate([choices for *_, choices in documents])
    part = Part(
        np.repeat(np.arange(len(documents)), lengths),
        np.repeat([domains.index(domain) for domain, *_ in documents], lengths),
        domains,
        np.zeros(sum(lengths), int),
        np.concatenate([np.arange(length) for length in lengths]),
        np.array([pieces.index(piece) for _, tokens, _ in documents for piece in tokens]),
        {0: np.stack([first, (first + 1) % 4], axis=1)},
    )
    vocabulary = Vocabulary.from_pieces([piece.encode() for piece in pieces])
    with TraceWriter(path, Header((Layer(0, 4, 2),)), vocabulary) as writer:
        writer.write(part, {})
        writer.finish({})
    return open_trace(path)


def test_the_digits_of_two_documents_counted_by_hand(tmp_path: Path) -> None:
    trace = write(
        tmp_path / "t.moe",
        [
            ("A", ["1", " 2", "a", "b", "c", "a"], [3, 3, 0, 0, 1, 1]),  # others: half 0, half 1
            ("A", ["7", "a", "b"], [2, 1, 1]),  # others: all 1
            ("A", ["8", "9"], [0, 0]),  # no others
        ],
    )
    at = syntax(trace).sel(word_class="digits", layer=0)
    p, q = [0, 0, 1 / 3, 2 / 3], [2 * 0.5 / 3, (2 * 0.5 + 1) / 3, 0, 0]
    assert float(at["jsd"]) == pytest.approx(jensenshannon(p, q, base=2) ** 2)
    assert (int(at["top_expert"]), float(at["top_share"]), float(at["top_share_null"])) == (3, 2 / 3, 0)
    everything = [2, 0, 1, 2], [2, 4, 0, 0]
    assert float(at["jsd_all"]) == pytest.approx(jensenshannon(*everything, base=2) ** 2)
    assert (int(at["tokens"]), int(at["documents"])) == (5, 3)
    every = syntax(trace, choice="all").sel(word_class="digits", layer=0)
    p, q = [2 / 6, 0, 1 / 6, 3 / 6], [2 * 0.25 / 3, (2 * 0.5 + 0.5) / 3, (2 * 0.25 + 0.5) / 3, 0]
    assert float(every["jsd"]) == pytest.approx(jensenshannon(p, q, base=2) ** 2)


def test_a_class_without_a_token_or_without_others_beside_it_has_no_numbers(tmp_path: Path) -> None:
    trace = write(tmp_path / "t.moe", [("A", ["1", "2"], [0, 1]), ("A", ["a", " b"], [0, 1])])
    result = syntax(trace)
    assert result["jsd"].isnull().all()
    assert result["jsd_q"].isnull().all()
    assert result["tokens"].sel(word_class="digits") == 2
    assert result["jsd_all"].sel(word_class="digits").notnull().all()
    assert result["word_class"].values.tolist() == list(CLASSES)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(6)))
def test_divergences_are_within_bounds_and_do_not_depend_on_the_names_of_experts(seed: int, names: list[int]) -> None:
    rng = np.random.default_rng(seed)
    experts = [rng.integers(0, 6, rng.integers(1, 30)) for _ in range(12)]
    kinds = [rng.random(len(of)) < 0.3 for of in experts]
    one = syntax(counted(experts, kinds, 6)).isel(word_class=0, layer=0)
    other = syntax(counted([np.array(names)[of] for of in experts], kinds, 6)).isel(word_class=0, layer=0)
    for name in ("jsd", "jsd_low", "jsd_high", "jsd_null", "jsd_all", "jsd_p"):
        assert float(one[name]) == pytest.approx(float(other[name]), abs=1e-5, nan_ok=True), name
    assert 0 <= float(one["jsd"]) <= 1
    if np.isfinite(one["jsd_low"]):
        assert 0 <= float(one["jsd_low"]) <= float(one["jsd_high"]) <= 1


@pytest.mark.parametrize("num_experts", [8, 64])
@pytest.mark.parametrize("strength", [0.15, 0.5, 1.0])
def test_the_interval_holds_the_planted_divergence(num_experts: int, strength: float) -> None:
    shape = np.random.default_rng(num_experts)
    base, other = shape.dirichlet(np.full(num_experts, 3.0), 2)
    mixed = (1 - strength) * base + strength * other
    truth = jensenshannon(mixed, base, base=2) ** 2
    rng = np.random.default_rng(1)
    hits = sum(
        bool(at["jsd_low"] <= truth <= at["jsd_high"])
        for at in (_drawn(rng, base, mixed, num_experts, spread=np.inf) for _ in range(100))
    )
    assert hits >= 90, hits


@pytest.mark.parametrize(("num_experts", "spread"), [(8, np.inf), (8, 20.0), (64, 20.0)])
def test_a_class_that_chooses_like_the_others_is_found_different_at_the_rate_of_the_test(
    num_experts: int, spread: float
) -> None:
    base = np.random.default_rng(num_experts).dirichlet(np.full(num_experts, 3.0))
    rng = np.random.default_rng(2)
    found = [_drawn(rng, base, base, num_experts, spread) for _ in range(150)]
    p_values = np.array([float(at["jsd_p"]) for at in found])
    assert (p_values < 0.05).sum() <= 16  # of 150; at a true 5 % with probability 0.998
    if num_experts == 8:
        assert stats.kstest(p_values, "uniform").pvalue > 1e-4
        null, seen = (np.mean([float(at[name]) for at in found]) for name in ("jsd_null", "jsd"))
        assert null == pytest.approx(seen, rel=0.15)
    assert sum(float(at["jsd_low"]) > 0 for at in found) <= 8


def _drawn(rng: np.random.Generator, base: np.ndarray, of_class: np.ndarray, num_experts: int, spread: float):
    """Sixty documents, each with a taste of its own around `base` if `spread` is finite; the class takes part in it."""
    experts, kinds = [], []
    for _ in range(60):
        taste = base if np.isinf(spread) else rng.dirichlet(base * spread)
        kind = rng.random(rng.integers(20, 101)) < 0.3
        kinds.append(kind)
        experts.append(draw(rng, np.where(kind[:, None], of_class + taste - base, taste)))
    return syntax(counted(experts, kinds, num_experts)).isel(word_class=0, layer=0)


def test_what_the_domain_alone_explains_is_not_taken_for_syntax(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    documents = []
    for number in range(120):
        code = number % 2 == 0
        pieces = rng.choice(["x", "    ", "\n"] if code else ["the", "end", "of"], 60).tolist()
        documents.append(
            (
                "Code" if code else "Prose",
                pieces,
                rng.choice(4, 60, p=[0.7, 0.1, 0.1, 0.1] if code else [0.1, 0.1, 0.1, 0.7]),
            )
        )
    at = syntax(write(tmp_path / "t.moe", documents)).sel(word_class="newline", layer=0)
    assert float(at["jsd_all"]) > 0.1
    assert float(at["jsd"]) < 0.005
    assert float(at["jsd_p"]) > 0.01
    assert float(at["jsd_low"]) == 0
