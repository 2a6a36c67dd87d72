"""Expert parallelism against loops that follow the definitions a batch, a token and a device at a time."""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import VOCABULARY, make_counts, make_part, make_trace

import moescope
from moescope.errors import NoSuchLayer, NotRecorded
from moescope.simulation import batch_counts, parallel
from moescope.simulation import parallel_kernels as kernels
from moescope.simulation.batches import BatchKind, batch_rows, decode_order
from moescope.simulation.profile import Cells
from moescope.trace import Header, Layer, Trace, TraceWriter, open_trace

# ------------------------------------------------------------------------------------------------------ batches


def slow_decode(lengths: list[int], running: int) -> list[int]:
    """Slots that take the next waiting sequence when theirs has ended, until one stays empty."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    queues = [list(range(a, b)) for a, b in pairwise(starts)]
    slots: list[list[int]] = [[] for _ in range(running)]
    taken: list[int] = []
    while True:
        for slot in slots:
            if not slot:
                if not queues:
                    return taken
                slot.extend(queues.pop(0))
        taken += [slot.pop(0) for slot in slots]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=12), st.integers(1, 6))
def test_decode_steps_take_a_token_of_each_running_sequence(lengths: list[int], running: int) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    assert decode_order(starts, running).tolist() == slow_decode(lengths, running)


def test_batches_hold_rows_of_their_fold_and_phase_only() -> None:
    starts = np.array([0, 3, 6, 9])
    kept = np.array([1, 1, 1, 0, 0, 0, 1, 1, 1], bool)
    phase = np.array([0, 0, 1, 0, 0, 1, 0, 1, 1])
    assert batch_rows(BatchKind("prefill", 2), starts, kept, None).tolist() == [0, 1, 2, 6, 7, 8]
    assert batch_rows(BatchKind("prefill", 2), starts, kept, phase).tolist() == [0, 1]
    assert batch_rows(BatchKind("decode", 2), starts, kept, phase).tolist() == [2, 7]
    assert batch_rows(BatchKind("decode", 2), starts, kept, None).tolist() == [0, 6, 1, 7, 2, 8]
    assert batch_rows(BatchKind("decode", 3), starts, kept, None).tolist() == []


# ------------------------------------------------------------------------------------------------------- kernel


@st.composite
def kernel_cases(draw: st.DrawFn) -> dict[str, object]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    nodes = draw(st.integers(1, 3))
    devices = nodes * draw(st.integers(1, 3))
    experts = devices * draw(st.integers(1, 3))
    num_ids = experts + draw(st.integers(0, 2))
    top_k = draw(st.integers(1, min(4, num_ids)))
    size, batches = draw(st.integers(1, 9)), draw(st.integers(0, 4))
    num_tokens = size * batches + 5
    ids = np.argsort(rng.random((num_tokens, num_ids)), axis=1)[:, :top_k]
    if draw(st.booleans()):
        ids[rng.random(ids.shape) < 0.3] = -1
    spare = devices * draw(st.integers(0, 2))
    slots = []
    for extra in (0, spare):
        slots.append(rng.permutation(np.concatenate([np.arange(experts), rng.integers(0, experts, extra)])))
    return {
        "ids": ids, "rows": rng.permutation(num_tokens)[: size * batches], "size": size, "experts": experts,
        "devices": devices, "nodes": nodes, "slots": slots, "group": rng.integers(0, 32, num_tokens),
        "domain": rng.integers(0, 2, num_tokens), "position": rng.integers(0, 4, num_tokens),
        "capacity": sorted(rng.integers(0, size + 1, 3).tolist()),
    }  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(kernel_cases())
def test_a_batch_is_counted_as_a_slow_loop_counts_it(case) -> None:
    ids, rows, size, experts, devices = (case[n] for n in ("ids", "rows", "size", "experts", "devices"))
    a_node, capacity, placements = devices // case["nodes"], case["capacity"], len(case["slots"])
    batches = len(rows) // size
    bins = int(kernels.BINS_PER_E * np.log(devices)) + 2
    found = {
        "histogram": np.zeros((placements, bins), np.int64), "largest": np.zeros((placements, 32), np.int64),
        "made": np.zeros(32, np.int64), "reached": np.zeros((placements, 32, 2), np.int64),
        "tokens": np.zeros(32, np.int64), "domain": np.zeros((2, 32, 4), np.int64),
        "position": np.zeros((4, 32, 4), np.int64), "loads": np.zeros(size + 1, np.int64),
        "largest_n": np.zeros((placements, batches), np.int64), "made_n": np.zeros(batches, np.int64),
    }  # fmt: skip
    expected = {name: np.zeros_like(values) for name, values in found.items()}
    most = max(int(np.bincount(slots).max()) for slots in case["slots"])
    device_PEC = np.full((placements, experts, most), -1, np.int32)
    replicas_PE = np.array([np.bincount(slots, minlength=experts) for slots in case["slots"]], np.int32)
    for p, slots in enumerate(case["slots"]):
        for expert in range(experts):
            mine = np.flatnonzero(slots == expert) // (len(slots) // devices)
            device_PEC[p, expert, : len(mine)] = mine
    drops = np.array([sum(c <= before for c in capacity) for before in range(size + 1)], np.int64)
    kernels.count_batches(
        np.ascontiguousarray(ids.T, np.int32), rows, size, experts,
        kernels.TokenCells(case["group"], case["domain"], case["position"]),
        device_PEC, replicas_PE, devices, a_node, drops, kernels.LayerSums(*found.values()),
    )  # fmt: skip
    for n in range(batches):
        loads: Counter[int] = Counter()
        seen: list[list[tuple[int, int]]] = []
        for row in rows[n * size : (n + 1) * size]:
            g, of_token = case["group"][row], []
            expected["tokens"][g] += 1
            for expert in ids[row].tolist():
                if 0 <= expert < experts:
                    of_token.append((expert, loads[expert]))
                    dropped_by = sum(loads[expert] + 1 > c for c in capacity)
                    expected["domain"][case["domain"][row], g, dropped_by] += 1
                    expected["position"][case["position"][row], g, dropped_by] += 1
                    expected["made"][g] += 1
                    loads[expert] += 1
            seen.append(of_token)
        for expert in range(experts):
            expected["loads"][loads[expert]] += 1
        expected["made_n"][n] = made = sum(loads.values())
        for p in range(placements):
            on = [[int(device_PEC[p, e, before % replicas_PE[p, e]]) for e, before in of] for of in seen]
            device_loads = Counter(d for of in on for d in of)
            if not made:
                continue
            busiest = max(range(devices), key=lambda d: device_loads[d])
            expected["largest_n"][p, n] = device_loads[busiest]
            over = device_loads[busiest] * devices / made
            expected["histogram"][p, min(int(math.log(over) * kernels.BINS_PER_E), bins - 1)] += 1
            for row, of in zip(rows[n * size : (n + 1) * size], on, strict=True):
                g = case["group"][row]
                expected["largest"][p, g] += of.count(busiest)
                expected["reached"][p, g] += len(set(of)), len({d // a_node for d in of})
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert found["largest"].sum() == found["largest_n"].sum()


@pytest.mark.parametrize(("top_k", "num_ids"), [(1, 3), (2, 5), (5, 5)])
def test_uniform_tokens_choose_every_set_equally_often(top_k: int, num_ids: int) -> None:
    ids = kernels.draw_uniform(20_000, top_k, num_ids, np.random.default_rng(0))
    sets = Counter(tuple(sorted(token)) for token in ids.T.tolist())
    assert all(len(set(token)) == top_k for token in sets)
    number = math.comb(num_ids, top_k)
    assert len(sets) == number
    expected = 20_000 / number
    assert sum((n - expected) ** 2 / expected for n in sets.values()) <= number + 5 * math.sqrt(2 * number)


def test_pairs_are_those_of_a_slow_loop() -> None:
    rng = np.random.default_rng(5)
    ids = np.argsort(rng.random((200, 9)), axis=1)[:, :4]
    ids[rng.random(ids.shape) < 0.2] = -1
    fold = rng.integers(0, 2, 200).astype(np.int8)
    found, expected = np.zeros((2, 8, 8), np.uint32), np.zeros((2, 8, 8), np.int64)
    kernels.count_pairs(np.ascontiguousarray(ids.T, np.int32), fold, found)
    for f, token in zip(fold, ids.tolist(), strict=True):
        routed = [e for e in token if 0 <= e < 8]
        for i in routed:
            for j in routed:
                expected[f, i, j] += i != j
    np.testing.assert_array_equal(found, expected)


# -------------------------------------------------------------------------------------------------- whole traces

LAYERS = (Layer(0, 8, 2), Layer(3, 12, 3, num_null_experts=1))


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    rng = np.random.default_rng(1)
    lengths = [[35, 7, 23, 31, 18, 25], [9, 61, 30, 12, 22, 16, 28]]
    parts = [
        make_part(rng, LAYERS, of, first_document=10 * n, dropped=0.1 if n else 0.0) for n, of in enumerate(lengths)
    ]
    return make_trace(tmp_path / "t.moe", parts, LAYERS)


def slow_parallel(trace: Trace, devices: int, size: int, factor: float) -> dict[str, dict[int, float]]:
    """Linear placement, prefill batches: over-subscription, devices a token and drops."""
    cells = Cells(trace)
    largest, made, reached, tokens, dropped = (defaultdict(int) for _ in range(5))
    tokens_of = [(part, r) for part in trace.iter_parts() for r in range(part.num_tokens)]
    for fold in (0, 1):
        rows = [(part, r) for part, r in tokens_of if cells(part.document[r : r + 1])[0] % 2 == fold]
        for start in range(0, len(rows) - size + 1, size):
            for layer in trace.layers:
                at, experts = layer.layer, layer.num_experts
                capacity = math.ceil(factor * size * layer.top_k / experts)
                load, queue = Counter(), Counter()
                for part, row in rows[start : start + size]:
                    chosen = [e for e in part.expert_ids[at][row].tolist() if 0 <= e < experts]
                    load.update(e * devices // experts for e in chosen)
                    queue.update(chosen)
                    reached[at] += len({e * devices // experts for e in chosen})
                    tokens[at] += 1
                largest[at] += max(load.values())
                made[at] += sum(load.values())
                dropped[at] += sum(max(0, n - capacity) for n in queue.values())
    return {
        "over_subscription": {at: devices * largest[at] / made[at] for at in made},
        "devices_reached": {at: reached[at] / tokens[at] for at in made},
        "dropped": {at: dropped[at] / made[at] for at in made},
        "slowest": {0: devices * sum(largest.values()) / sum(made.values())},
    }


def test_a_trace_is_counted_as_a_slow_loop_counts_it(trace: Trace) -> None:
    found = parallel(trace, devices=4, prefill=20, decode=(), threads=1)
    expected = slow_parallel(trace, 4, 20, 1.25)
    at = found.sel(batch="prefill 20")
    for layer in (0, 3):
        linear = at.sel(placement="linear", layer=layer)
        assert float(linear["over_subscription"]) == pytest.approx(expected["over_subscription"][layer], rel=1e-12)
        assert float(linear["devices_reached"]) == pytest.approx(expected["devices_reached"][layer], rel=1e-12)
        dropped = at["dropped"].sel(layer=layer, domain="(all)", capacity_factor=1.25)
        assert float(dropped) == pytest.approx(expected["dropped"][layer], rel=1e-12)
    assert float(at["slowest"].sel(placement="linear")) == pytest.approx(expected["slowest"][0], rel=1e-12)


def test_the_sufficient_factor_is_the_smallest_that_drops_few(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_module(), "FEW_DROPS", 0.05)
    found = parallel(trace, devices=4, prefill=20, decode=(), placements=["linear"], threads=1)
    for layer in trace.layers:
        factor = float(found["sufficient_factor"].sel(batch="prefill 20", layer=layer.layer))
        capacity = round(factor * 20 * layer.top_k / layer.num_experts)
        assert capacity == pytest.approx(factor * 20 * layer.top_k / layer.num_experts)
        unit = layer.num_experts / (20 * layer.top_k)
        at = [slow_parallel(trace, 4, 20, c * unit - 1e-9)["dropped"][layer.layer] for c in (capacity, capacity - 1)]
        assert at[0] < 0.05 <= at[1]


def parallel_module():
    return sys.modules["moescope.simulation.parallel"]


@pytest.mark.parametrize("threads", [1, 2])
def test_neither_threads_nor_groups_of_layers_change_a_result(
    trace: Trace, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = parallel(trace, devices=4, nodes=2, prefill=20, decode=(2, 3), threads=1)
    monkeypatch.setattr("moescope.tallying.one_pass.COLUMNS_A_READ", 2)
    xr.testing.assert_identical(
        parallel(trace, devices=4, nodes=2, prefill=20, decode=(2, 3), threads=threads), expected
    )


def test_batches_go_on_from_part_to_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings have some dozen documents a part; by itself no part could fill a step of so many sequences."""
    part = make_part(np.random.default_rng(6), LAYERS, [30] * 24, window=30)
    rows_of = [np.arange(start, start + 30) for start in range(0, 720, 30)]
    whole = make_trace(tmp_path / "whole.moe", [part], LAYERS)
    cut = make_trace(tmp_path / "cut.moe", [part.rows(rows) for rows in rows_of], LAYERS)
    options = {"devices": 4, "prefill": 60, "decode": 8, "threads": 2}
    expected = parallel(whole, **options)
    assert expected["batches"].values.tolist() == [12, 60]  # of each fold: 360 tokens; 8 of 12 documents to their end
    xr.testing.assert_identical(parallel(cut, **options), expected)
    monkeypatch.setattr("moescope.simulation.batches.MOST_TOGETHER", 0)
    assert parallel(cut, **options)["batches"].values.tolist() == [0, 0]


def test_with_a_device_for_each_expert_a_token_reaches_as_many_devices_as_it_has_choices(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 3),)
    made = make_trace(tmp_path / "t.moe", [make_part(np.random.default_rng(0), layers, [30] * 8)], layers)
    names = ["linear", "random", "eplb", "affinity"]
    found = parallel(made, devices=8, nodes=8, prefill=16, decode=2, placements=names)
    for name in ("devices_reached", "nodes_reached", "devices_reached_uniform"):
        assert (found[name] == 3).all()
    for null in ("", "_own", "_null", "_uniform"):
        values = found[f"over_subscription{null}"]
        np.testing.assert_allclose(values, values.isel(placement=[0] * 4).values)  # names of devices do not matter


def test_one_device_waits_for_nobody(trace: Trace) -> None:
    found = parallel(trace, devices=1, prefill=20, decode=2)
    names = ["over_subscription", "over_subscription_null", "slowest", "slowest_uniform"]
    for name in names:
        np.testing.assert_allclose(found[name], 1)
    assert (found["devices_reached"].sel(layer=0) <= 1).all()


def sticky(tmp_path: Path, rng: np.random.Generator, strength: float, documents: int = 60) -> Trace:
    """Documents whose tokens favour the experts of one of four devices."""
    layers = (Layer(0, 16, 2),)
    part = make_part(rng, layers, [40] * documents, window=40)
    home = rng.integers(0, 4, documents)[part.document.astype(int)]
    scores = rng.gumbel(size=(part.num_tokens, 16)) + strength * (np.arange(16) // 4 == home[:, None])
    part.expert_ids[0][:] = np.argsort(-scores, axis=1)[:, :2]
    return make_trace(tmp_path / f"s{strength}.moe", [part], layers)


def test_locality_over_subscribes_devices_and_without_it_both_agree(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    local = parallel(sticky(tmp_path, rng, 3.0), devices=4, prefill=40, decode=8, placements=["linear"])
    none = parallel(sticky(tmp_path, rng, 0.0), devices=4, prefill=40, decode=8, placements=["linear"])
    prefill = {"batch": "prefill 40", "placement": "linear", "layer": 0}
    chance = float(local["over_subscription_null"].sel(prefill))
    assert float(local["over_subscription_low"].sel(prefill)) > chance + 0.5
    for name in ("null", "uniform"):
        other = float(none[f"over_subscription_{name}"].sel(prefill))
        assert float(none["over_subscription"].sel(prefill)) == pytest.approx(other, abs=0.05)
    drops = local.sel(batch="prefill 40", layer=0, capacity_factor=1.5)
    assert float(drops["dropped"].sel(domain="(all)")) > 2 * float(drops["dropped_null"])
    first, last = (float(drops["dropped_by_position"].sel(position=at)) for at in (0, 31))
    assert first == 0
    assert last > 0.2


def test_the_interval_holds_the_long_run_value_in_nineteen_of_twenty_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_counts, "NULL_TOKENS", 80)
    options = {"devices": 4, "prefill": 80, "decode": (), "placements": ["linear", "random"], "threads": 1}
    rng = np.random.default_rng(3)
    values = {
        "over_subscription": {"placement": "linear"},
        "slowest_difference": {"placement": "random", "against": "linear"},
    }
    whole = parallel(sticky(tmp_path, rng, 1.5, 4000), **options)
    inside = dict.fromkeys(values, 0)
    for draw in range(40):
        found = parallel(sticky(tmp_path / str(draw), rng, 1.5, 60), **options)
        for name, at in values.items():
            low, high = (found[f"{name}_{end}"].sel(at).item() for end in ("low", "high"))
            inside[name] += low <= whole[name].sel(at).item() <= high
    assert min(inside.values()) >= 34, inside


def test_two_placements_are_compared_in_the_same_batches(trace: Trace) -> None:
    found = parallel(trace, devices=4, prefill=20, decode=3, threads=1)
    slowest, less = found["slowest"], found["slowest_difference"]
    xr.testing.assert_allclose(less, (slowest - slowest.rename(placement="against")).transpose(*less.dims))
    low, high = found["slowest_difference_low"].values, found["slowest_difference_high"].values
    np.testing.assert_allclose(low, -high.swapaxes(0, 1), atol=1e-12)
    assert (low <= less.values).all()
    np.testing.assert_array_equal(high[range(5), range(5)], 0)


def test_replicas_and_placements_lower_what_a_skewed_router_costs(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    layers = (Layer(0, 16, 2), Layer(1, 16, 2))
    part = make_part(rng, layers, [30] * 60)
    for layer in (0, 1):
        scores = rng.gumbel(size=(part.num_tokens, 16)) + np.repeat([2.0, 0.0], [4, 12])
        part.expert_ids[layer][:] = np.argsort(-scores, axis=1)[:, :2]
    found = parallel(make_trace(tmp_path / "t.moe", [part], layers), devices=4, prefill=64, decode=8)
    slowest = found["slowest"].sel(batch="prefill 64").to_series()
    assert slowest["linear"] > 2.5
    assert slowest["eplb"] < 1.4
    assert slowest["eplb-replicated"] < slowest["linear"]
    assert slowest["affinity"] < slowest["eplb"] * 1.1


def test_a_foreign_profile_is_fitted_on_one_domain_and_judged_on_another(tmp_path: Path) -> None:
    """Each domain keeps its own four of sixteen experts busy, so what is balanced for one is not for another."""
    rng = np.random.default_rng(5)
    layers = (Layer(0, 16, 2),)
    part = make_part(rng, layers, [40] * 60)
    domain = part.domain.astype(int)
    scores = rng.gumbel(size=(part.num_tokens, 16)) + 3.0 * (np.arange(16) // 4 == domain[:, None])
    part.expert_ids[0][:] = np.argsort(-scores, axis=1)[:, :2]
    found = parallel(make_trace(tmp_path / "t.moe", [part], layers), devices=4, prefill=64, decode=8)
    matrix = found["foreign"].sel(foreign_placement="eplb")
    names = ["ArXiv", "Github", "Wikipedia (en)"]
    for judged in names:
        own = float(matrix.sel(fitted_on=judged, domain=judged))
        assert own < 1.2
        assert all(float(matrix.sel(fitted_on=other, domain=judged)) > own for other in names if other != judged)
    assert (found["foreign_low"] <= found["foreign"]).all()
    assert (found["foreign_high"] >= found["foreign"]).all()


def test_bytes_follow_from_what_a_token_reaches(trace: Trace) -> None:
    found = parallel(trace, devices=4, nodes=2, prefill=20, decode=(), hidden_size=100, bytes_per_value=2)
    within, between = 200 * found["devices_reached"] / 2, 200 * found["nodes_reached"] / 2
    np.testing.assert_allclose(found["bytes_within_nodes"], within)
    np.testing.assert_allclose(found["bytes_between_nodes"], between)
    assert "bytes_within_nodes" not in parallel(trace, devices=4, prefill=20, decode=())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"hidden_size": 96, "dtype": "bfloat16"}, 192),
        ({"hidden_size": 96, "dtype": "float32"}, 384),
        ({"hidden_size": 96, "dtype": "int3"}, 0),
        ({"hidden_size": "96", "dtype": "bfloat16"}, 0),
        ({"dtype": "bfloat16"}, 0),
    ],
)
def test_the_trace_says_how_large_a_hidden_state_is(tmp_path: Path, model: dict, expected: int) -> None:
    layers = (Layer(0, 8, 2),)
    with TraceWriter(tmp_path / "t.moe", Header(layers, model=model), VOCABULARY) as writer:
        writer.write(make_part(np.random.default_rng(0), layers, [9, 9]), {})
        writer.finish({})
    found = parallel(open_trace(tmp_path / "t.moe"), devices=2, prefill=4, decode=(), placements=["linear"])
    assert found.attrs["hidden_bytes"] == expected
    assert ("bytes_within_nodes" in found) == (expected > 0)


def test_a_trace_without_a_full_batch_says_so_with_zero_batches(trace: Trace) -> None:
    found = parallel(trace, devices=4, prefill=5000, decode=40)
    assert found["batches"].values.tolist() == [0, 0]
    assert found["over_subscription"].isnull().all()
    assert found["dropped"].isnull().all()


def test_one_document_leaves_fitted_placements_without_a_profile(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 2),)
    made = make_trace(tmp_path / "t.moe", [make_part(np.random.default_rng(0), layers, [64])], layers)
    with pytest.warns(UserWarning, match="one document: there is none to fit eplb, eplb-replicated, affinity on"):
        found = parallel(made, devices=4, prefill=16, decode=1)
    assert found["batches"].values.tolist() == [4, 64]
    known = found["over_subscription"].sel(placement=["linear", "random"])
    assert known.notnull().all()
    assert found["over_subscription"].sel(placement=["eplb", "eplb-replicated", "affinity"]).isnull().all()


def test_folds_are_even_within_every_domain(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 2),)
    part = make_part(np.random.default_rng(0), layers, [3] * 41, domains=("a", "b"), first_document=7)
    made = make_trace(tmp_path / "t.moe", [part], layers)
    cells = Cells(made)(made.document_numbers)
    for domain in (0, 1):
        folds = cells[made.document_domains == domain] % 2
        assert abs(2 * int(folds.sum()) - len(folds)) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 3}, "8 experts cannot be shared out evenly on 3 devices; devices that divide them: 1, 2, 4, 8"),
        ({"devices": 16}, "too few for 16 devices"),
        ({"devices": 4, "nodes": 3}, "nodes that divide them: 1, 2, 4"),
        ({"devices": 4, "prefill": 0}, "a prefill batch holds at least one token, not 0"),
        ({"devices": 4, "prefill": (), "decode": ()}, "at least one size"),
        ({"devices": 4, "hidden_size": 0}, "hidden_size must be at least 1"),
        ({"devices": 4, "placements": ["best"]}, "no placement 'best'"),
        ({"devices": 4, "threads": 0}, "threads must be at least 1"),
    ],
)
def test_wrong_arguments_are_told_with_what_would_be_right(trace: Trace, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallel(trace, **options)


def test_traces_that_cannot_tell_are_refused(trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(NotRecorded, match="holds counts of assignments"):
        parallel(make_counts(tmp_path / "c.moe", {0: {0: {1: 5}}}), devices=4)
    with pytest.raises(NoSuchLayer, match="layer 7 was not recorded"):
        parallel(trace, devices=4, layers=[7])


def test_positions_fall_into_bins_of_powers_of_two() -> None:
    position = np.arange(5000)
    found = batch_counts.position_bins(position)
    assert found.tolist() == [math.floor(math.log2(at + 1)) for at in position]
    assert batch_counts.position_bins(np.array([2**40])).tolist() == [batch_counts.POSITION_BINS - 1]


@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_real_routing_reaches_more_devices_the_more_there_are(name: str, shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "traces" / "bigmoeonedge" / f"{name}.route.csv"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = moescope.import_trace("bigmoeonedge", [path], tmp_path / "o.moe")
    found = [
        parallel(made, devices=devices, prefill=8, decode=1, placements=["linear"], layers=(3, 9, 21, 26), threads=1)
        for devices in (4, 16, 128)
    ]
    reached = [float(of["devices_reached"].sel(placement="linear", batch="decode 1").mean()) for of in found]
    assert reached[0] < reached[1] < reached[2]
    assert reached[2] == pytest.approx(6, abs=0.05)  # a few layers lack a token
    slowest = [float(of["slowest"].sel(placement="linear", batch="decode 1")) for of in found]
    assert slowest[0] < slowest[1] < slowest[2]
    assert slowest[2] == pytest.approx(128 / 6, rel=1e-9)
    one = found[0].sel(batch="decode 1")  # a batch of one token has no locality
    np.testing.assert_allclose(one["over_subscription"], one["over_subscription_null"], rtol=0.01)
