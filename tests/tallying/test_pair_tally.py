"""Two traces over the same tokens: what is matched, and what is counted, against a loop over a dictionary of tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import make_counts, make_part, make_trace

from moescope.errors import NoSuchLayer, NotRecorded
from moescope.tallying import one_pass
from moescope.tallying.pair_tally import common_layers, tally_pair
from moescope.trace import Layer, Part, Trace

LAYERS = (Layer(0, 8, 2), Layer(2, 40, 4), Layer(3, 16, 1), Layer(9, 20, 8, num_null_experts=2))
LENGTHS = [20, 7, 33, 1, 16, 48, 5, 40]


def other_choices(rng: np.random.Generator, part: Part, kept: float) -> Part:
    """The part with some choices drawn anew."""
    ids = {}
    for layer in LAYERS:
        mine = np.array(part.expert_ids[layer.layer])
        anew = np.argsort(rng.random((len(mine), layer.num_ids)), axis=1)[:, : layer.top_k]
        ids[layer.layer] = np.where(rng.random((len(mine), 1)) < kept, mine, anew)
    return replace(part, expert_ids=ids)


def in_parts(part: Part, documents: list[list[int]]) -> list[Part]:
    return [part.rows(np.concatenate([np.flatnonzero(part.document == g) for g in some])) for some in documents]


def rows_of(trace: Trace) -> dict[tuple[int, int, int], tuple[int, str, dict[int, list[int]]]]:
    """Token id, domain and choices by document, sequence and position."""
    found = {}
    for part in trace.iter_parts():
        for t in range(part.num_tokens):
            key = int(part.document[t]), int(part.sequence[t]), int(part.position[t])
            choices = {layer: ids[t].tolist() for layer, ids in part.expert_ids.items()}
            found[key] = int(part.token_id[t]), part.domain_names[part.domain[t]], choices
    return found


def matched(a: Trace, b: Trace) -> dict[tuple[int, int, int], tuple[int, str, dict, dict]]:
    """The slow, obvious matching: sequence by sequence until the first token that differs."""
    of_a, of_b = rows_of(a), rows_of(b)
    same = {}
    for key, (token_id, domain, choices) in sorted(of_a.items()):
        earlier = [(key[0], key[1], position) for position in range(key[2] + 1)]
        if all(place in of_b and of_a[place][0] == of_b[place][0] for place in earlier):
            same[key] = token_id, domain, choices, of_b[key][2]
    return same


def check_against_the_loop(a: Trace, b: Trace, **options: int) -> None:
    same = matched(a, b)
    counted = tally_pair(a, b, **options)
    assert counted.matching.tokens == len(same)
    assert counted.matching.documents == len({key[0] for key in same})
    data = counted.data
    for domain in data["domain"].values.tolist():
        tokens = [(key[0], *row) for key, row in same.items() if row[1] == domain]
        assert data["documents"].sel(domain=domain) == len({row[0] for row in tokens})
        assert data["tokens"].sel(domain=domain) == len(tokens)
        assert data["tokens_squared"].sel(domain=domain) == sum(n * n for n in Counter(r[0] for r in tokens).values())
        for layer in data["layer"].values.tolist():
            at = data.sel(domain=domain, layer=layer)
            shared, first, length = Counter(), Counter(), Counter()
            change = {expert: Counter() for expert in range(data.sizes["expert"])}
            loads_a, loads_b = Counter(), Counter()
            for document, _, _, mine, theirs in tokens:
                length[document] += 1
                shared[document] += len(set(mine[layer]) & set(theirs[layer]) - {-1})
                first[document] += mine[layer][0] == theirs[layer][0] != -1
                loads_a.update(mine[layer])
                loads_b.update(theirs[layer])
                for sign, ids in ((-1, mine[layer]), (1, theirs[layer])):
                    for expert in ids:
                        if expert >= 0:
                            change[expert][document] += sign
            for name, y in (("shared", shared), ("first", first)):
                assert at[name] == sum(y.values())
                assert at[f"{name}_squared"] == sum(v * v for v in y.values())
                assert at[f"{name}_by_tokens"] == sum(v * length[g] for g, v in y.items())
            expected = {
                "loads_a": [loads_a[expert] for expert in change],
                "loads_b": [loads_b[expert] for expert in change],
                "change_squared": [sum(v * v for v in y.values()) for y in change.values()],
                "change_by_tokens": [sum(v * length[g] for g, v in y.items()) for y in change.values()],
            }
            for name, values in expected.items():
                assert at[name].values.tolist() == values
            for side, row in (("a", 3), ("b", 4)):
                firsts = Counter(r[row][layer][0] for r in tokens)
                assert at[f"first_{side}"].values.tolist() == [firsts[e] for e in range(data.sizes["expert"])]
    assert counted.by_token is not None
    shared_by = {}
    for key, (token_id, _, mine, theirs) in same.items():
        y = sum(len(set(mine[layer]) & set(theirs[layer]) - {-1}) for layer in data["layer"].values.tolist())
        entry = shared_by.setdefault(token_id, {}).setdefault(key[0], [0, 0])
        entry[0] += y
        entry[1] += 1
    assert counted.by_token["token_id"].values.tolist() == sorted(shared_by)
    sums = np.stack([counted.by_token[name].values for name in counted.by_token.data_vars], axis=1)
    for token_id, by_document in shared_by.items():
        y, n = np.array(list(by_document.values())).T
        expected = [n.sum(), len(n), y.sum(), (y * y).sum(), (y * n).sum(), (n * n).sum()]
        assert sums[sorted(shared_by).index(token_id)].tolist() == expected


@pytest.fixture
def whole() -> Part:
    return make_part(np.random.default_rng(3), LAYERS, LENGTHS)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("parts_a", "parts_b"),
    [
        ([[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ([[0, 1, 2], [3, 4], [5, 6, 7]], [[0], [1, 2, 3, 4, 5], [6, 7]]),
        ([[0, 1, 2, 3, 4, 5, 6, 7]], [[7, 2], [0, 6], [5, 1, 4], [3]]),
        ([[5, 1], [3, 0]], [[1, 7, 3, 2], [0]]),
    ],
    ids=["one part each", "other cuts", "another order", "some documents each"],
)
def test_neither_the_parts_nor_the_order_of_documents_change_a_sum(
    tmp_path: Path, whole: Part, parts_a: list, parts_b: list, threads: int
) -> None:
    other = other_choices(np.random.default_rng(4), whole, 0.6)
    a = make_trace(tmp_path / "a.moe", in_parts(whole, parts_a), LAYERS)
    b = make_trace(tmp_path / "b.moe", in_parts(other, parts_b), LAYERS)
    check_against_the_loop(a, b, threads=threads)
    check_against_the_loop(b, a, threads=threads)


def test_groups_of_layers_change_no_sum(tmp_path: Path, whole: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pass, "COLUMNS_A_READ", 4)
    other = other_choices(np.random.default_rng(4), whole, 0.6)
    a = make_trace(tmp_path / "a.moe", in_parts(whole, [[0, 1, 2, 3], [4, 5, 6, 7]]), LAYERS)
    b = make_trace(tmp_path / "b.moe", in_parts(other, [[0, 1], [2, 3, 4, 5, 6, 7]]), LAYERS)
    check_against_the_loop(a, b)


def test_tokens_after_one_that_differs_are_left_out_to_the_end_of_their_sequence(tmp_path: Path, whole: Part) -> None:
    token_id = whole.token_id.copy()
    row = np.flatnonzero((whole.document == 2) & (whole.sequence == 1) & (whole.position == 5))[0]
    token_id[row] += 1
    other = replace(other_choices(np.random.default_rng(4), whole, 0.6), token_id=token_id)
    a = make_trace(tmp_path / "a.moe", [whole], LAYERS)
    b = make_trace(tmp_path / "b.moe", in_parts(other, [[0, 1, 2, 3, 4], [5, 6, 7]]), LAYERS)
    check_against_the_loop(a, b)
    found = tally_pair(a, b).matching
    assert found.documents_differing == 1
    assert found.tokens == sum(LENGTHS) - (16 - 5)  # positions 5 .. 15 of the second window of 16
    assert not found.whole


def test_a_sequence_whose_first_token_differs_is_left_out_whole(tmp_path: Path, whole: Part) -> None:
    token_id = whole.token_id.copy()
    token_id[(whole.document == 2) & (whole.sequence == 1) & (whole.position == 0)] += 1
    a = make_trace(tmp_path / "a.moe", [whole], LAYERS)
    b = make_trace(tmp_path / "b.moe", [replace(whole, token_id=token_id)], LAYERS)
    check_against_the_loop(a, b)
    assert tally_pair(a, b).matching.tokens == sum(LENGTHS) - 16


def test_a_document_that_is_shorter_or_has_another_domain_in_one_trace_is_matched_as_far_as_it_goes(
    tmp_path: Path, whole: Part
) -> None:
    short = whole.rows(~((whole.document == 5) & (whole.sequence * 16 + whole.position >= 21)))
    domain = short.domain.copy()
    domain[short.document == 1] = 0
    a = make_trace(tmp_path / "a.moe", [whole], LAYERS)
    b = make_trace(tmp_path / "b.moe", [replace(short, domain=domain)], LAYERS)
    check_against_the_loop(a, b)
    found = tally_pair(a, b).matching
    assert (found.tokens, found.documents_relabelled) == (sum(LENGTHS) - (48 - 21), 1)


def test_dropped_assignments_agree_with_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    whole = make_part(rng, LAYERS, LENGTHS, dropped=0.2)
    other = make_part(rng, LAYERS, LENGTHS, dropped=0.2)
    other = replace(other, token_id=whole.token_id)
    a = make_trace(tmp_path / "a.moe", [whole], LAYERS)
    b = make_trace(tmp_path / "b.moe", in_parts(other, [[0, 1, 2], [3, 4, 5, 6, 7]]), LAYERS)
    check_against_the_loop(a, b)
    check_against_the_loop(b, a)


def test_without_token_ids_a_place_counts_only_where_both_cut_the_document_alike(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    # 24 tokens in windows of 8 and of 16: the second window of each has 8 tokens, but not the same ones.
    a = make_trace(tmp_path / "a.moe", [make_part(rng, LAYERS, [24, 5], window=8)], LAYERS, token_ids=False)
    b = make_trace(tmp_path / "b.moe", [make_part(rng, LAYERS, [24, 5], window=16)], LAYERS, token_ids=False)
    counted = tally_pair(a, b)
    assert (counted.matching.tokens, counted.matching.by_token_id, counted.by_token) == (5, False, None)


def test_only_layers_of_one_shape_are_counted_and_others_refused_by_name(tmp_path: Path, whole: Part) -> None:
    a = make_trace(tmp_path / "a.moe", [whole], LAYERS)
    fewer = (Layer(0, 8, 2), Layer(2, 50, 4))
    b = make_trace(tmp_path / "b.moe", [make_part(np.random.default_rng(1), fewer, LENGTHS)], fewer)
    assert [layer.layer for layer in common_layers(a, b)] == [0]
    with pytest.raises(ValueError, match=r"layer 2 has .* \(40, 0, 4\) and \(50, 0, 4\)"):
        tally_pair(a, b, [2])
    with pytest.raises(NoSuchLayer, match="layer 9"):
        tally_pair(a, b, [9])
    with pytest.raises(ValueError, match="threads"):
        tally_pair(a, b, threads=0)


def test_a_trace_of_counts_is_refused(tmp_path: Path) -> None:
    counts = make_counts(tmp_path / "c.moe", {0: {0: {1: 5}}})
    with pytest.raises(NotRecorded, match="no token"):
        tally_pair(counts, counts)
