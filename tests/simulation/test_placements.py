"""Placements: EPLB as published and as a slow loop, what fits on devices, and the one that brings experts together."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.simulation import eplb
from moescope.simulation.placements import ALGORITHMS, SLACK, Cluster, Fit, place
from moescope.trace import Layer

PUBLISHED_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED_PLACEMENT = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


@pytest.mark.parametrize(("loads", "expected"), list(zip(PUBLISHED_LOADS, PUBLISHED_PLACEMENT, strict=True)))
def test_eplb_gives_the_published_placement(loads: list[int], expected: list[int]) -> None:
    experts, replica = eplb.rebalance(loads, 16, 4, 2, 8)
    assert experts.tolist() == expected
    for expert in range(12):
        assert sorted(replica[experts == expert]) == list(range((experts == expert).sum()))


def slow_packing(weights: list[np.float32], packs: int) -> tuple[list[int], list[int]]:
    room = len(weights) // packs
    if room == 1:
        return list(range(len(weights))), [0] * len(weights)
    content: list[list[int]] = [[] for _ in range(packs)]
    total = [np.float32(0)] * packs
    for thing in sorted(range(len(weights)), key=lambda n: -weights[n]):  # stable: ties in their order
        lightest = min((p for p in range(packs) if len(content[p]) < room), key=lambda p: total[p])
        content[lightest].append(thing)
        total[lightest] = np.float32(total[lightest] + weights[thing])
    where = {thing: (pack, rank) for pack, things in enumerate(content) for rank, thing in enumerate(things)}
    return [where[n][0] for n in range(len(weights))], [where[n][1] for n in range(len(weights))]


def slow_eplb(loads: list[int], slots: int, groups: int, nodes: int, devices: int) -> list[int]:
    """The algorithm as its README tells it, on lists of experts."""
    if groups % nodes:
        groups, nodes = 1, 1
    weights = [np.float32(load) for load in loads]
    size = len(loads) // groups
    of_group = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    group_weights = []
    for experts in of_group:
        total = np.float32(0)
        for expert in experts:
            total = np.float32(total + weights[expert])
        group_weights.append(total)
    node_of, rank_of = slow_packing(group_weights, nodes)
    placed: list[int] = []
    for node in range(nodes):
        mine = sorted((rank_of[g], g) for g in range(groups) if node_of[g] == node)
        experts = [expert for _, g in mine for expert in of_group[g]]
        replicas = list(experts)
        while len(replicas) < slots // nodes:
            shared = [np.float32(weights[e] / np.float32(replicas.count(e))) for e in experts]
            replicas.append(experts[shared.index(max(shared))])
        shared = [np.float32(weights[e] / np.float32(replicas.count(e))) for e in replicas]
        pack, rank = slow_packing(shared, devices // nodes)
        order = sorted(range(len(replicas)), key=lambda n: (pack[n], rank[n]))
        placed += [replicas[n] for n in order]
    return placed


@st.composite
def eplb_cases(draw: st.DrawFn) -> tuple[list[int], int, int, int, int]:
    nodes = draw(st.integers(1, 3))
    devices = nodes * draw(st.integers(1, 4))
    groups = draw(st.integers(1, 6))
    experts = groups * draw(st.integers(1, 5))
    slots = devices * draw(st.integers(-(-experts // devices), -(-experts // devices) + 3))
    if groups % nodes == 0 and slots // nodes < experts // nodes:
        slots = experts * devices
    loads = draw(st.lists(st.sampled_from([0, 1, 2, 3, 3, 7, 10, 1000, 2**25 + 1]), min_size=experts, max_size=experts))
    return loads, slots, groups, nodes, devices


@settings(max_examples=400, deadline=None)
@given(eplb_cases())
def test_eplb_equals_a_slow_loop(case: tuple[list[int], int, int, int, int]) -> None:
    loads, slots, groups, nodes, devices = case
    assert eplb.rebalance(loads, slots, groups, nodes, devices)[0].tolist() == slow_eplb(*case)


def test_eplb_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="9 slots into devices: 2 do not divide it"):
        eplb.rebalance([1.0] * 8, 9, 1, 1, 2)
    with pytest.raises(ValueError, match="fewer than 8 experts"):
        eplb.rebalance([1.0] * 8, 6, 1, 1, 2)


def fit(rng: np.random.Generator, num_experts: int, batches: int = 20, *, top_k: int = 2) -> Fit:
    """Tokens whose experts come in pairs of neighbours, in batches that differ."""
    pairs = np.zeros((num_experts, num_experts), np.int64)
    loads = np.zeros((batches, num_experts), np.int64)
    for batch in range(batches):
        popular = rng.dirichlet(np.full(num_experts, 2.0))
        for _ in range(60):
            first = rng.choice(num_experts, p=popular)
            second = first ^ 1 if rng.random() < 0.6 else (first + rng.integers(1, num_experts)) % num_experts
            pairs[first, second] += 1
            pairs[second, first] += 1
            loads[batch, [first, second]] += 1
    return Fit(loads.sum(axis=0), pairs, loads)


def waited(experts: np.ndarray, devices: int, fit: Fit) -> float:
    """Σ over batches of the largest load of a device."""
    assert fit.batches is not None
    return fit.batches[:, experts].reshape(len(fit.batches), devices, -1).sum(axis=2).max(axis=1).sum()


def most(experts: np.ndarray, devices: int, fit: Fit) -> float:
    """The largest load of a device over all batches, over the mean."""
    load_D = fit.loads[experts].reshape(devices, -1).sum(axis=1)
    return load_D.max() / load_D.mean()


def together(experts: np.ndarray, devices: int, nodes: int, fit: Fit) -> int:
    """Pairs on one device, and once more if nodes count, those on one node."""
    assert fit.pairs is not None
    total = 0
    for parts in {devices, nodes} - {1}:
        for here in experts.reshape(parts, -1):
            total += sum(fit.pairs[i, j] for i, j in itertools.combinations(here, 2))
    return total


@pytest.mark.parametrize(("experts", "devices", "nodes"), [(8, 4, 1), (16, 4, 2), (24, 6, 3), (32, 4, 1), (8, 8, 1)])
def test_affinity_brings_experts_together_and_batches_wait_no_longer(experts: int, devices: int, nodes: int) -> None:
    rng, layer, gained = np.random.default_rng(experts), Layer(0, experts, 2), 0
    cluster = Cluster(devices, nodes)
    for _ in range(5):
        fitted = {0: fit(rng, experts)}
        plain = place("eplb", cluster, [layer], fitted).experts[0]
        near = place("affinity", cluster, [layer], fitted).experts[0]
        assert sorted(near) == list(range(experts))
        assert waited(near, devices, fitted[0]) <= waited(plain, devices, fitted[0])
        assert most(near, devices, fitted[0]) <= max(most(plain, devices, fitted[0]), 1 + SLACK) + 1e-12
        gain = together(near, devices, nodes, fitted[0]) - together(plain, devices, nodes, fitted[0])
        assert gain >= 0
        gained += gain > 0
    assert gained == 0 if devices == experts else gained >= 3 or experts < 16  # eight leave little to swap


@pytest.mark.parametrize("nodes", [1, 2])
def test_no_single_swap_that_is_allowed_brings_more_together(nodes: int) -> None:
    fitted, layer = fit(np.random.default_rng(3), 12), Layer(0, 12, 2)
    cluster = Cluster(4, nodes)
    plain = place("eplb", cluster, [layer], {0: fitted}).experts[0]
    limit, heaviest = waited(plain, 4, fitted), max(most(plain, 4, fitted), 1 + SLACK)
    found = place("affinity", cluster, [layer], {0: fitted}).experts[0]
    best = together(found, 4, nodes, fitted)
    for a, b in itertools.combinations(range(12), 2):
        swapped = found.copy()
        swapped[[a, b]] = swapped[[b, a]]
        gains = together(swapped, 4, nodes, fitted) > best
        assert not gains or waited(swapped, 4, fitted) > limit or most(swapped, 4, fitted) > heaviest


def test_every_expert_has_a_slot_and_replicas_are_counted() -> None:
    layers = (Layer(2, 12, 2), Layer(5, 8, 2))
    rng = np.random.default_rng(0)
    fits = {layer.layer: fit(rng, layer.num_experts) for layer in layers}
    for name in ALGORITHMS:
        placed = place(name, Cluster(4, 2, expert_groups=2), layers, fits)
        for layer in layers:
            experts, slots = placed.experts[layer.layer], placed.slots(layer.layer)
            count = placed.num_replicas(layer.layer)
            assert len(experts) == layer.num_experts + (4 if name == "eplb-replicated" else 0)
            assert count.min() >= 1
            for expert in range(layer.num_experts):
                mine = slots[expert][slots[expert] >= 0]
                assert sorted(mine) == np.flatnonzero(experts == expert).tolist()
                per_device = len(experts) // 4
                assert placed.devices(layer.layer)[expert, : len(mine)].tolist() == (mine // per_device).tolist()


@pytest.mark.parametrize(
    ("cluster", "algorithms", "message"),
    [
        (Cluster(0), ["linear"], "devices must be at least 1, not 0"),
        (Cluster(4, 3), ["linear"], "nodes that divide them: 1, 2, 4"),
        (Cluster(16), ["eplb-replicated"], "layer 3 has 8 experts, too few for 16 devices; devices that divide them"),
        (Cluster(3), ["linear", "eplb-replicated"], "devices that divide them: 1, 2, 4, 8; or ask for the placement"),
        (Cluster(4, redundant_experts=3), ["eplb-replicated"], "redundant experts that do: 4, 8"),
        (Cluster(3, redundant_experts=3), ["eplb-replicated"], "redundant experts that do: 1, 4"),
        (Cluster(4, expert_groups=3), ["eplb"], "groups that divide them: 1, 2, 4, 8"),
        (Cluster(4, redundant_experts=-4), ["eplb-replicated"], "redundant_experts must be at least 0"),
        (Cluster(4), ["eplbb"], "no placement 'eplbb'; there are linear"),
        (Cluster(4), [], "at least one placement"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_with_what_can(
    cluster: Cluster, algorithms: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cluster.check([Layer(3, 8, 2)], algorithms)


def test_replicas_fill_devices_that_do_not_divide_the_experts() -> None:
    cluster, layer = Cluster(3), Layer(0, 8, 2)
    cluster.check([layer], ["eplb-replicated"])
    placed = place("eplb-replicated", cluster, [layer], {0: Fit(np.arange(8))})
    assert len(placed.experts[0]) == 9
    assert placed.num_replicas(0)[7] == 2
