"""Tokens whose choices were not recorded: kept apart from dropped ones, and in no measure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from synthetic import VOCABULARY, make_part, without_tokens

import moescope
from moescope.cli import main
from moescope.errors import NotExportable, NotRecorded
from moescope.tallying.pair_tally import tally_pair
from moescope.trace import Header, Layer, Part, Trace, TraceWriter, open_trace
from moescope.trace.columns import DROPPED, NOT_RECORDED
from moescope.trace.cover import cover, covered

LAYERS = (Layer(0, 8, 2), Layer(3, 300, 4, num_null_experts=1))
LENGTHS = [30, 41, 9, 25, 17, 33]


def write(path: Path, parts: list[Part], layers: tuple[Layer, ...]) -> Trace:
    with TraceWriter(path, Header(layers, model={"name": "synthetic"}), VOCABULARY) as writer:
        for part in parts:
            writer.write(part, {"documents_read": int(part.document.max()) + 1})
        writer.finish({"tokens": sum(part.num_tokens for part in parts)})
    return open_trace(path)


def masked(part: Part, mask: NDArray[np.bool_], layers: tuple[Layer, ...]) -> Part:
    """The part without the choices of some tokens in some layers; mask of shape (layer, token)."""
    ids = {layer.layer: part.expert_ids[layer.layer].copy() for layer in layers}
    for place, layer in enumerate(layers):
        ids[layer.layer][mask[place]] = NOT_RECORDED
    return replace(part, expert_ids=ids)


def both(folder: Path, seed: int, masks: list[NDArray[np.bool_]], dropped: float = 0.0) -> tuple[Trace, Trace]:
    """A partly recorded trace, and one of the tokens that all of its layers cover."""
    rng = np.random.default_rng(seed)
    layers = tuple(
        replace(layer, partial=any(mask[place].any() for mask in masks), drops=bool(dropped))
        for place, layer in enumerate(LAYERS)
    )
    parts = [make_part(rng, layers, LENGTHS, first_document=6 * n, dropped=dropped) for n in range(len(masks))]
    left = [without_tokens(part, mask.any(axis=0)) for part, mask in zip(parts, masks, strict=True)]
    partial = write(folder / "p.moe", [masked(*each, layers) for each in zip(parts, masks, strict=True)], layers)
    whole = tuple(replace(layer, partial=False) for layer in layers)
    return partial, write(folder / "w.moe", [part for part in left if part is not None], whole)


@st.composite
def gaps(draw: st.DrawFn) -> NDArray[np.bool_]:
    """Which tokens of a part each layer lacks: scattered, in runs, or whole documents."""
    num_tokens = sum(LENGTHS)
    mask = np.zeros((2, num_tokens), bool)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask[0] = rng.random(num_tokens) < draw(st.sampled_from([0.0, 0.1, 0.5]))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, num_tokens - 1))
        mask[draw(st.integers(0, 1)), start : start + draw(st.integers(1, 60))] = True
    return mask


MEASURES = {
    "shares": moescope.shares,
    "repeats": moescope.repeats,
    "divergence": lambda trace: moescope.divergence(trace),
    "locality": lambda trace: moescope.locality(trace),
    "consistency": lambda trace: moescope.consistency(trace, lengths=(4, 16)),
    "distinct": moescope.distinct,
    "balance": moescope.balance,
    "coactivation": moescope.coactivation,
    "transitions": moescope.transitions,
    "vocabulary": lambda trace: moescope.vocabulary(trace, permutations=2),
    "syntax": lambda trace: moescope.syntax(trace),
    "explain": lambda trace: moescope.explain(trace, permutations=9).drop_sel(source="position").drop_vars("bits_q"),
    "prefetch": lambda trace: moescope.prefetch(trace, predictors=["transitions"]),
    "claims": lambda trace: xr.Dataset({"text": ("claim", [str(claim) for claim in moescope.claims(trace)])}),
    "cache": lambda trace: moescope.cache(trace, sizes=[2, 4]),
    "parallel": lambda trace: moescope.parallel(trace, devices=2),
}


def assert_equal(found: object, expected: object, name: str) -> None:
    assert type(found) is type(expected)
    if isinstance(found, xr.Dataset):
        xr.testing.assert_identical(found.drop_attrs(), expected.drop_attrs())
        return
    for part in vars(found):
        value, other = getattr(found, part), getattr(expected, part)
        if isinstance(value, xr.Dataset):
            xr.testing.assert_identical(value.drop_attrs(), other.drop_attrs())


@pytest.mark.parametrize("name", MEASURES)
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(seed=st.integers(0, 2**32 - 1), first=gaps(), second=gaps(), dropped=st.sampled_from([0.0, 0.2]))
@pytest.mark.filterwarnings("ignore")
def test_every_measure_runs_over_the_recorded_tokens_alone(tmp_path_factory, name, seed, first, second, dropped):
    if (first.any(axis=0) & second.any(axis=0)).all():
        return
    partial, whole = both(tmp_path_factory.mktemp("cover"), seed, [first, second], dropped)
    if not whole.num_tokens:
        return
    outcomes = []
    for trace in (partial, whole):
        try:
            outcomes.append(MEASURES[name](trace))
        except (NotRecorded, ValueError) as error:
            outcomes.append(f"{type(error).__name__}: {getattr(error, 'problem', error)}")
    if isinstance(outcomes[1], str):
        assert outcomes[0] == outcomes[1]
    else:
        assert_equal(*outcomes, name)


def partly(path: Path) -> Trace:
    mask = np.zeros((2, sum(LENGTHS)), bool)
    mask[1, 10:50] = True
    return both(path, 3, [mask], 0.1)[0]


def test_not_recorded_dropped_and_null_experts_are_three_values_on_disk(tmp_path: Path) -> None:
    trace = partly(tmp_path)
    (part,) = trace.iter_parts()
    ids = part.expert_ids[3]
    assert (ids[10:50] == NOT_RECORDED).all()
    assert (ids == DROPPED).any()
    assert trace.verify() == []
    assert (trace.layers[1].partial, trace.layers[1].drops, trace.layers[0].partial) == (True, True, False)
    assert '"version": 3' in (trace.path / "trace.json").read_text()
    counted = moescope.sql(trace, "SELECT count(*) FILTER (L3_0 IS NULL) AS n FROM tokens")
    assert counted["n"].tolist() == [40]


def test_a_token_of_which_a_layer_has_some_choices_and_not_others_is_refused(tmp_path: Path) -> None:
    layers = (replace(LAYERS[0], partial=True),)
    part = make_part(np.random.default_rng(0), layers, [5])
    part.expert_ids[0][2, 1] = NOT_RECORDED
    with pytest.raises(ValueError, match=r"layer 0, row 2: .* is neither recorded nor not recorded"):
        write(tmp_path / "t.moe", [part], layers)
    part.expert_ids[0][2] = DROPPED
    with pytest.raises(ValueError, match=r"layer 0, row 2: .* is neither recorded nor not recorded"):
        write(tmp_path / "u.moe", [part], layers)


def test_cover_is_the_recorded_part_of_the_tokens_and_is_shown(tmp_path: Path) -> None:
    trace = partly(tmp_path)
    assert [cover(trace, layer) for layer in trace.layers] == [1.0, 1 - 40 / 155]
    assert covered(trace, trace.select_layers([0])) is trace
    assert covered(trace, trace.layers).num_tokens == 115
    info = CliRunner().invoke(main, ["info", str(trace.path)]).stdout
    assert "74 % of the tokens recorded" in info
    result = CliRunner().invoke(main, ["shares", str(trace.path)])
    assert "layer 3: 74 % of the tokens recorded" in result.stdout
    result = CliRunner().invoke(main, ["shares", str(trace.path), "--layers", "0"])
    assert "recorded" not in result.stdout


def test_what_was_not_recorded_is_not_exported(tmp_path: Path) -> None:
    mask = np.zeros((2, sum(LENGTHS)), bool)
    mask[1, 10:50] = True
    trace = both(tmp_path, 3, [mask])[0]
    lines = moescope.export(trace, tmp_path / "a.jsonl", format="jsonl").read_text().splitlines()
    assert len(lines) == 2 * 155 - 40
    assert not any("-2" in line for line in lines)
    with pytest.raises(NotExportable, match="layer 3 lacks a token in document 0"):
        moescope.export(trace, tmp_path / "b.npz", format="vllm", layers=[3])
    placed = moescope.placement(trace, layers=[3], devices=2)
    assert moescope.export_placement(placed, tmp_path / "p.json", trace=trace).stat().st_size > 0


def test_layers_that_have_no_token_in_common_are_refused_by_name(tmp_path: Path) -> None:
    mask = np.zeros((2, sum(LENGTHS)), bool)
    mask[0, :80], mask[1, 80:] = True, True
    layers = tuple(replace(layer, partial=True) for layer in LAYERS)
    part = masked(make_part(np.random.default_rng(0), layers, LENGTHS), mask, layers)
    trace = write(tmp_path / "t.moe", [part], layers)
    with pytest.raises(NotRecorded, match="no token was recorded in all of layers 0, 3"):
        moescope.shares(trace)
    assert moescope.shares(trace, layers=[3]).sizes["layer"] == 1


def test_a_layer_that_was_logged_for_half_of_the_tokens_shows_what_was_logged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for d in range(6):
        for t in range(20):
            lines.append({"doc_id": f"d{d}", "layer": 0, "token": t, "experts": [t % 4, 4], "weights": [0.7, 0.3]})
            if t >= 10:
                lines.append({"doc_id": f"d{d}", "layer": 1, "token": t, "experts": [2, 5], "weights": [0.7, 0.3]})
    rng.shuffle(lines)
    lines.sort(key=lambda line: (line["doc_id"], line["token"]))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.warns(UserWarning, match="layer 1: 60 of 120 tokens were not recorded"):
        trace = moescope.import_trace("jsonl", [tmp_path / "a.jsonl"], tmp_path / "t.moe", num_experts=8)
    repeats = moescope.repeats(trace, layers=[1])
    assert float(repeats["rate"].sel(kind="first", layer=1).squeeze()) == 1.0
    found = moescope.locality(trace, layers=[1])
    assert moescope.tally(trace, [1]).data["pairs"].sum() == 54
    nulls = found["excess"].sel(layer=1, null=["popularity", "document"])
    assert float(np.abs(nulls).max()) < 1e-12


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(seed=st.integers(0, 2**32 - 1), mine=gaps(), theirs=gaps(), token_ids=st.booleans(), edits=st.integers(0, 3))
@pytest.mark.filterwarnings("ignore")
def test_two_partly_recorded_traces_are_compared_over_the_tokens_that_both_recorded(
    tmp_path_factory, seed, mine, theirs, token_ids, edits
):
    """The oracle looks each token of one up in the other, by document, sequence and position."""
    folder = tmp_path_factory.mktemp("compare")
    rng = np.random.default_rng(seed)
    layers = tuple(replace(layer, partial=True) for layer in LAYERS)
    text = make_part(rng, layers, LENGTHS)
    other = make_part(rng, layers, LENGTHS)
    changed = text.token_id.copy()
    changed[rng.integers(0, len(changed), edits)] = 7
    other = replace(other, token_id=changed)
    traces = [
        write(folder / f"{name}.moe", [masked(part, mask, layers)], layers)
        for name, part, mask in (("a", text, mine), ("b", other, theirs))
    ]
    if not token_ids:
        traces = [replace(trace, header=replace(trace.header, token_ids=False)) for trace in traces]
    kept_a, kept_b = ~mine.any(axis=0), ~theirs.any(axis=0)
    places = list(zip(text.document.tolist(), text.sequence.tolist(), text.position.tolist(), strict=True))
    if not kept_a.any() or not kept_b.any():
        return
    last = [
        {place[:2]: place[2] for place, kept in zip(places, keep, strict=True) if kept} for keep in (kept_a, kept_b)
    ]
    odd = {key[0] for key in last[0].keys() | last[1].keys() if last[0].get(key) != last[1].get(key)}
    differs: set[tuple[int, int]] = set()
    rows = []
    for t, (document, sequence, _) in enumerate(places):
        if kept_a[t] and kept_b[t]:
            if token_ids and text.token_id[t] != changed[t]:
                differs.add((document, sequence))
            if (document, sequence) not in differs if token_ids else document not in odd:
                rows.append(t)
    counted = tally_pair(*(covered(trace, trace.layers) for trace in traces))
    assert counted.matching.tokens == len(rows)
    for layer in layers if rows else ():
        ids = text.expert_ids[layer.layer][rows], other.expert_ids[layer.layer][rows]
        shared = [len(set(x) & set(y)) for x, y in zip(*(of.tolist() for of in ids), strict=True)]
        assert counted.data["shared"].sel(layer=layer.layer).sum() == sum(shared)
        loads = np.bincount(ids[1].ravel(), minlength=layer.num_ids)
        found = counted.data["loads_b"].sel(layer=layer.layer).sum("domain").values
        assert found[: layer.num_ids].tolist() == loads.tolist()
