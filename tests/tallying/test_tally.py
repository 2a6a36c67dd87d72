"""The tally against slow loops, and what must hold for any routing."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import VOCABULARY, make_part, make_trace, result_of

from moescope.tallying import INDENTATION, Tally, kernels, tally
from moescope.tallying.occurrences import WordCounter
from moescope.trace import Header, Layer, Part, TraceWriter, open_trace

LAYERS = (Layer(0, 8, 2), Layer(1, 8, 1), Layer(2, 60, 2), Layer(3, 300, 4, num_null_experts=2), Layer(4, 512, 16))


def slow_tally(parts: list[Part], layer: Layer, domain: str) -> dict[str, np.ndarray]:
    """Everything the tally holds of one layer and domain, by loops over documents and tokens."""
    documents: dict[int, list[tuple[int, list[int]]]] = {}
    for part in parts:
        for row in range(part.num_tokens):
            if part.domain_names[part.domain[row]] == domain:
                token = (int(part.sequence[row]), part.expert_ids[layer.layer][row].tolist())
                documents.setdefault(int(part.document[row]), []).append(token)
    num_choices = layer.top_k + 1
    sums = {
        "loads": np.zeros((num_choices, layer.num_ids), int),
        "loads_squared": np.zeros((num_choices, layer.num_ids), int),
        "loads_by_made": np.zeros((num_choices, layer.num_ids), int),
        "made": np.zeros(num_choices, int),
        "made_squared": np.zeros(num_choices, int),
        "repeats": np.zeros(3, int),
        "repeats_squared": np.zeros(3, int),
        "repeats_by_pairs": np.zeros(3, int),
        "pairs": np.int64(0),
        "pairs_squared": np.int64(0),
        "tokens": np.int64(sum(map(len, documents.values()))),
        "documents": np.int64(len(documents)),
    }
    for tokens in documents.values():
        y = np.zeros((num_choices, layer.num_ids), int)
        for _, experts in tokens:
            for rank, expert in enumerate(experts):
                if expert >= 0:
                    y[rank + 1, expert] += 1
                    y[0, expert] += 1
        n = y.sum(axis=1)
        sums["loads"] += y
        sums["loads_squared"] += y**2
        sums["loads_by_made"] += y * n[:, None]
        sums["made"] += n
        sums["made_squared"] += n**2
        pairs, repeated = 0, np.zeros(3, int)
        for (s, before), (t, after) in pairwise(tokens):
            if s == t:
                pairs += 1
                repeated[0] += before[0] == after[0] >= 0
                repeated[1] += bool((set(before) & set(after)) - {-1})
                repeated[2] += before[0] in after and before[0] >= 0
        sums["repeats"] += repeated
        sums["repeats_squared"] += repeated**2
        sums["repeats_by_pairs"] += repeated * pairs
        sums["pairs"] += pairs
        sums["pairs_squared"] += pairs**2
    return sums


def assert_equal_to_slow(found: Tally, parts: list[Part], layers: tuple[Layer, ...]) -> None:
    for layer in layers:
        for domain in found.domains:
            at = found.data.sel(layer=layer.layer, domain=domain)
            for name, expected in slow_tally(parts, layer, domain).items():
                values = at[name].values
                here = tuple(slice(0, size) for size in expected.shape)
                np.testing.assert_array_equal(values[here], expected, f"{name}, {layer}, {domain}")
                assert values.sum() == expected.sum(), f"{name} has counts beyond the layer's own shape"


@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_every_sum_equals_a_slow_loop(tmp_path: Path, dropped: float) -> None:
    rng = np.random.default_rng(3)
    parts = [
        make_part(rng, LAYERS, [5, 40, 1, 17, 33], dropped=dropped),
        make_part(rng, LAYERS, [2, 1, 64], first_document=5),
    ]
    found = tally(make_trace(tmp_path / "t.moe", parts, LAYERS))
    assert_equal_to_slow(found, parts, LAYERS)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    window=st.sampled_from([1, 2, 3, 129, 257, 1000]),
    experts=st.sampled_from([2, 3, 8, 16, 17, 64, 128, 129, 256, 257]),
    top_k=st.sampled_from([1, 2, 3]),
    dropped=st.sampled_from([0.0, 0.5]),
)
def test_any_shape_equals_a_slow_loop(tmp_path_factory, seed, lengths, window, experts, top_k, dropped) -> None:
    layers = (Layer(0, experts, min(top_k, experts)),)
    part = make_part(np.random.default_rng(seed), layers, lengths, window=window, dropped=dropped)
    found = tally(make_trace(tmp_path_factory.mktemp("any") / "t.moe", [part], layers), threads=1)
    assert_equal_to_slow(found, [part], layers)


def test_threads_do_not_change_a_single_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    parts = [make_part(rng, LAYERS, [20, 30], first_document=2 * n) for n in range(6)]
    trace = make_trace(tmp_path / "t.moe", parts, LAYERS)
    one, four = tally(trace, threads=1), tally(trace, threads=4)
    xr.testing.assert_identical(one.data, four.data)
    assert_same_sample(one, four)


def assert_same_sample(one: Tally, other: Tally) -> None:
    assert one.sample is not None
    assert other.sample is not None
    np.testing.assert_array_equal(one.sample.hashes, other.sample.hashes)
    for layer, ids in one.sample.rows.items():
        np.testing.assert_array_equal(ids, other.sample.rows[layer])


def test_tallies_of_the_halves_of_a_corpus_add_up_to_that_of_the_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    first = make_part(rng, LAYERS, [20, 30, 10], domains=("ArXiv", "Github"))
    second = make_part(rng, LAYERS, [15, 25], domains=("Github", "Books3"), first_document=4)
    whole = tally(make_trace(tmp_path / "whole.moe", [first, second], LAYERS))
    halves = [tally(make_trace(tmp_path / f"{n}.moe", [p], LAYERS)) for n, p in enumerate((first, second))]
    total = halves[0] + halves[1]
    xr.testing.assert_identical(total.data, whole.data)
    assert_same_sample(total, whole)
    other = tally(make_trace(tmp_path / "o.moe", [first], LAYERS), layers=[0])
    with pytest.raises(ValueError, match="different layers"):
        total + other


def test_permuting_the_experts_permutes_the_loads_and_keeps_the_repeats(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    layers = (Layer(0, 8, 2),)
    part = make_part(rng, layers, [50, 60])
    permutation = rng.permutation(8)
    permuted = Part(**{**part.__dict__, "expert_ids": {0: permutation[part.expert_ids[0]]}})
    before = tally(make_trace(tmp_path / "a.moe", [part], layers)).data
    after = tally(make_trace(tmp_path / "b.moe", [permuted], layers)).data
    np.testing.assert_array_equal(before["loads"].values, after["loads"].values[..., permutation])
    np.testing.assert_array_equal(before["repeats"].values, after["repeats"].values)


def test_an_expert_nobody_picked_keeps_its_column(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 1),)
    part = make_part(np.random.default_rng(7), layers, [40])
    part = Part(**{**part.__dict__, "expert_ids": {0: np.minimum(part.expert_ids[0], 5)}})
    loads = tally(make_trace(tmp_path / "t.moe", [part], layers)).data["loads"].sel(choice="all")
    assert loads.sizes["expert"] == 8
    assert loads.sel(expert=[6, 7]).sum() == 0


def test_no_pair_crosses_a_sequence_or_a_document() -> None:
    ids = np.zeros((2, 10), np.uint8)  # the same pair of experts everywhere: every pair of tokens repeats
    starts = np.array([0, 4, 7, 10])
    sums = kernels.RepeatSums(*(np.zeros((1, 3), np.int64) for _ in range(3)))
    kernels.count_repeats_of_two(ids, starts, np.array([0, 0, 1]), np.zeros(2, np.int64), np.array([5, 2]), sums)
    np.testing.assert_array_equal(sums.repeats_DM, [[7, 7, 7]])
    np.testing.assert_array_equal(sums.repeats_squared_DM, [[29, 29, 29]])


def test_the_token_sample_does_not_depend_on_how_the_trace_is_cut_into_parts(tmp_path: Path) -> None:
    layers = (Layer(0, 256, 4),)
    rng = np.random.default_rng(8)
    part = make_part(rng, layers, [3000, 3000, 2000], domains=("A",))
    cut = int(part.document_starts()[1])
    split = [part.rows(slice(0, cut)), part.rows(slice(cut, None))]
    whole = tally(make_trace(tmp_path / "a.moe", [part], layers))
    parts = tally(make_trace(tmp_path / "b.moe", split, layers))
    assert_same_sample(whole, parts)
    assert len(whole.sample.kept(0, 0)) == 2048


def text_trace(path: Path, documents: list[list[str]], first: list[list[int]]):
    """A trace of the given pieces, in which each token's first choice is given and the second is expert 7."""
    pieces = sorted({piece for document in documents for piece in document})
    lengths = [len(document) for document in documents]
    count = sum(lengths)
    part = Part(
        np.repeat(np.arange(len(documents)), lengths),
        np.zeros(count, int),
        ("text",),
        np.zeros(count, int),
        np.concatenate([np.arange(length) for length in lengths]),
        np.array([pieces.index(piece) for document in documents for piece in document]),
        {0: np.array([[expert, 7] for document in first for expert in document])},
    )
    header = Header((Layer(0, 8, 2),))
    vocabulary = type(VOCABULARY).from_pieces([piece.encode() for piece in pieces])
    with TraceWriter(path, header, vocabulary) as writer:
        writer.write(part, {})
        writer.finish({})
    return open_trace(path)


def test_a_word_is_found_whole_and_with_all_the_tokens_it_was_cut_into(tmp_path: Path) -> None:
    trace = text_trace(
        tmp_path / "t.moe",
        [["Quest", "ion", ":", " ", "Questionable", " Quest", "ion"], ["self", ".", "my", "self", " self"]],
        [[1, 2, 0, 0, 3, 1, 1], [4, 0, 5, 4, 6]],
    )
    question, self_ = result_of(WordCounter, trace, words=("Question", "self")).of_word.values()
    assert question.occurrence.tolist() == [0, 0, 1, 1]
    assert question.first_choice.tolist() == [[1, 2, 1, 1]]
    assert self_.first_choice.tolist() == [[4, 6]]
    assert self_.document.tolist() == [1, 1]


def test_indentation_is_the_space_at_the_start_of_lines_that_hold_something(tmp_path: Path) -> None:
    trace = text_trace(
        tmp_path / "t.moe",
        [["class", " A", ":\n", "    ", "    ", "x", " = ", "1\n", "  \n", "\t", "y\n    ", "z"]],
        [[0, 0, 0, 1, 2, 0, 0, 0, 0, 3, 4, 0]],
    )
    (indentation,) = result_of(WordCounter, trace, words=(INDENTATION,)).of_word.values()
    assert indentation.first_choice.tolist() == [[1, 2, 3, 4]]
    assert indentation.occurrence.tolist() == [0, 0, 1, 2]


def test_an_empty_word_is_refused(tmp_path: Path) -> None:
    trace = text_trace(tmp_path / "t.moe", [["a"]], [[0]])
    with pytest.raises(ValueError, match="besides spaces"):
        result_of(WordCounter, trace, words=(" ",))
