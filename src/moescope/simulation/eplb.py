"""EPLB, DeepSeek's expert-parallelism load balancer: replicas for busy experts, packed on devices by load.

As published, in float32. Of equal candidates the first is taken; where the published code sorts, which leaves equal
loads (such as two replicas of one expert) in any order, they stay in theirs. A slot holds one replica of one expert;
slots are counted over all devices, those of a device one after the other.

Shape suffixes: N things to pack, E experts, S slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moescope.tallying.jit import kernel

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


def rebalance(
    loads: ArrayLike, num_slots: int, num_groups: int, num_nodes: int, num_devices: int
) -> tuple[Integers, Integers]:
    """Place the experts of one layer by their loads.

    Args:
        loads: Load of each expert, shape (expert,).
        num_slots: Replicas over all devices.
        num_groups: Groups of experts among which the router of the model chooses first; groups stay on one node if they
            can be shared out evenly, otherwise nodes are ignored.
        num_nodes: Nodes.
        num_devices: Devices over all nodes.
    Returns:
        Expert of each slot, and which replica of that expert, from 0, it is; both of shape (slot,).
    Raises:
        ValueError: Experts, groups, slots, nodes or devices cannot be shared out evenly.
    Source:
        github.com/deepseek-ai/EPLB, `rebalance_experts`.

    Example:
        Experts with loads 6, 1, 1, 1 and five slots on one device: the first one has two replicas.

        >>> experts, replica = rebalance([6, 1, 1, 1], 5, 1, 1, 1)
        >>> experts.tolist(), replica.tolist()
        ([0, 0, 1, 2, 3], [0, 1, 0, 0, 0])
    """
    weight = np.asarray(loads, np.float32)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    for whole, part, what in (
        (len(weight), num_groups, "experts into groups"),
        (num_devices, num_nodes, "devices into nodes"),
        (num_slots, num_devices, "slots into devices"),
    ):
        if whole % part:
            raise ValueError(f"{whole} {what}: {part} do not divide it")
    if num_slots < len(weight):
        raise ValueError(f"{num_slots} slots are fewer than {len(weight)} experts")
    experts, replica = np.empty(num_slots, np.int64), np.empty(num_slots, np.int64)
    _rebalance(weight, num_groups, num_nodes, num_devices, experts, replica)
    return experts, replica


@kernel()
def balanced_packing(weight_N: Floats, num_packs: int, pack_N: Integers, rank_N: Integers) -> None:
    """Put things into packs of equal number: the heaviest first, each into the lightest pack with room.

    Sets the pack of each thing and its place in the pack; packs divide the number of things.
    """
    room = weight_N.size // num_packs
    if room == 1:
        for n in range(weight_N.size):
            pack_N[n] = n
            rank_N[n] = 0
        return
    weights = np.zeros(num_packs, np.float32)
    held = np.zeros(num_packs, np.int64)
    for n in np.argsort(-weight_N, kind="mergesort"):
        lightest = -1
        for pack in range(num_packs):
            if held[pack] < room and (lightest < 0 or weights[pack] < weights[lightest]):
                lightest = pack
        pack_N[n] = lightest
        rank_N[n] = held[lightest]
        weights[lightest] += weight_N[n]
        held[lightest] += 1


@kernel()
def replicate(weight_E: Floats, expert_S: Integers, replica_S: Integers, count_E: Integers) -> None:
    """Give each slot beyond the number of experts to the expert with the largest load a replica.

    Sets the expert of each slot, in no order of devices, which of its replicas, and the replicas of each expert.
    """
    count_E[:] = 1
    for s in range(expert_S.size):
        if s < weight_E.size:
            expert_S[s] = s
            replica_S[s] = 0
            continue
        busiest = 0
        most = np.float32(-1)
        for e in range(weight_E.size):
            load = np.float32(weight_E[e] / np.float32(count_E[e]))
            if load > most:
                busiest, most = e, load
        expert_S[s] = busiest
        replica_S[s] = count_E[busiest]
        count_E[busiest] += 1


@kernel()
def _rebalance(
    weight_E: Floats, num_groups: int, num_nodes: int, num_devices: int, expert_S: Integers, replica_S: Integers
) -> None:
    """Groups to nodes, replicas within a node, slots to its devices."""
    group_size = weight_E.size // num_groups
    per_node = weight_E.size // num_nodes
    slots = expert_S.size // num_nodes
    group_weight = np.zeros(num_groups, np.float32)
    for e in range(weight_E.size):
        group_weight[e // group_size] += weight_E[e]
    node, place = np.empty(num_groups, np.int64), np.empty(num_groups, np.int64)
    balanced_packing(group_weight, num_nodes, node, place)
    here_E = np.empty(weight_E.size, np.int64)  # experts, node by node
    for e in range(weight_E.size):
        group = e // group_size
        here_E[node[group] * per_node + place[group] * group_size + e % group_size] = e
    expert, replica, count = np.empty(slots, np.int64), np.empty(slots, np.int64), np.empty(per_node, np.int64)
    pack, rank = np.empty(slots, np.int64), np.empty(slots, np.int64)
    devices = num_devices // num_nodes
    for n in range(num_nodes):
        of_node = here_E[n * per_node : (n + 1) * per_node]
        weight = weight_E[of_node]
        replicate(weight, expert, replica, count)
        shared = np.empty(slots, np.float32)
        for s in range(slots):
            shared[s] = np.float32(weight[expert[s]] / np.float32(count[expert[s]]))
        balanced_packing(shared, devices, pack, rank)
        for s in range(slots):
            slot = n * slots + pack[s] * (slots // devices) + rank[s]
            expert_S[slot] = of_node[expert[s]]
            replica_S[slot] = replica[s]
