"""Placements: which device holds which expert, and how many replicas of it.

A slot holds one replica of one expert of a layer; every device has the same number of slots, those of device 0 first,
and nodes hold consecutive devices. Assignments to an expert with several replicas are dealt out to them in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.simulation import eplb
from moescope.simulation.batches import BatchKind
from moescope.simulation.parallel_kernels import bring_together
from moescope.simulation.profile import NUM_FOLDS, Cells, Fit, profile
from moescope.tallying import Source
from moescope.tallying.counted import playable
from moescope.trace import Layer

ALGORITHMS = {
    "linear": "experts in their order, the first device's first",
    "random": "experts in random order, another one for each layer",
    "eplb": "DeepSeek's load balancer without replicas: busy experts apart",
    "eplb-replicated": "DeepSeek's load balancer with redundant experts: busy experts several times",
    "affinity": "as eplb, then experts of the same token brought together as far as no batch's devices pay for it",
}
"""The placements there are, by name."""

FITTED = ("eplb", "eplb-replicated", "affinity")
"""Those that are fitted on loads."""

PREFILL_TOKENS = 4096
DECODE_TOKENS = 64

SLACK = 0.03
"""By what part of the mean load affinity may exceed it on a device, over all it is fitted on."""


@dataclass(frozen=True)
class Cluster:
    """Devices that share the experts of each layer; attributes as the arguments of `moescope.parallel`.

    EPLB keeps a group of experts on a node where nodes divide the groups.
    """

    devices: int
    nodes: int = 1
    redundant_experts: int | None = None
    expert_groups: int = 1

    def slots(self, layer: Layer, algorithm: str) -> int:
        """Slots of all devices together at a layer."""
        if algorithm != "eplb-replicated":
            return layer.num_experts
        if self.redundant_experts is not None:
            return layer.num_experts + self.redundant_experts
        return layer.num_experts + self.devices - layer.num_experts % self.devices

    def check(self, layers: Sequence[Layer], algorithms: Sequence[str]) -> None:
        """Refuse what cannot be shared out evenly.

        Raises:
            ValueError: It says what does not divide what, and what would.
        """
        if unknown := [name for name in algorithms if name not in ALGORITHMS]:
            raise ValueError(f"no placement {unknown[0]!r}; there are {', '.join(ALGORITHMS)}")
        if not algorithms:
            raise ValueError(f"name at least one placement of {', '.join(ALGORITHMS)}")
        for name, value, least in (
            ("devices", self.devices, 1),
            ("nodes", self.nodes, 1),
            ("redundant_experts", self.redundant_experts or 0, 0),
            ("expert_groups", self.expert_groups, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if self.devices % self.nodes:
            raise ValueError(
                f"{self.devices} devices cannot be shared out evenly on {self.nodes} nodes; "
                f"nodes that divide them: {_divisors(self.devices)}"
            )
        for layer in layers:
            experts = layer.num_experts
            if self.devices > experts:
                raise ValueError(
                    f"layer {layer.layer} has {experts} experts, too few for {self.devices} devices; "
                    f"devices that divide them: {_divisors(experts)}"
                )
            if experts % self.expert_groups:
                raise ValueError(
                    f"layer {layer.layer}: {experts} experts do not fall into {self.expert_groups} groups; "
                    f"groups that divide them: {_divisors(experts)}"
                )
            uneven = [name for name in algorithms if self.slots(layer, name) % self.devices]
            if uneven == ["eplb-replicated"]:
                filled = self.devices - experts % self.devices
                raise ValueError(
                    f"layer {layer.layer}: {experts} experts and {self.redundant_experts} redundant ones do not fill "
                    f"{self.devices} devices evenly; redundant experts that do: {filled}, {filled + self.devices}, …"
                )
            if uneven:
                raise ValueError(
                    f"layer {layer.layer}: {experts} experts cannot be shared out evenly on {self.devices} devices; "
                    f"devices that divide them: {_divisors(experts)}; or ask for the placement eplb-replicated alone, "
                    "which fills devices with replicas"
                )


@dataclass(frozen=True)
class Placement:
    """Where the experts of each layer are.

    Attributes:
        algorithm: One of `ALGORITHMS`.
        cluster: The devices.
        layers: The layers placed.
        experts: For each layer the expert of each slot, shape (slot,): EPLB's and SGLang's physical-to-logical map.
        replicas: For each layer which replica of its expert, from 0, a slot holds, shape (slot,).
    """

    algorithm: str
    cluster: Cluster
    layers: tuple[Layer, ...]
    experts: Mapping[int, NDArray[np.int64]]
    replicas: Mapping[int, NDArray[np.int64]]

    def num_replicas(self, layer: int) -> NDArray[np.int64]:
        """Replicas of each expert of a layer, shape (expert,): EPLB's logcnt."""
        (num_experts,) = (placed.num_experts for placed in self.layers if placed.layer == layer)
        return np.bincount(self.experts[layer], minlength=num_experts)

    def slots(self, layer: int, width: int | None = None) -> NDArray[np.int64]:
        """Slots of the replicas of each expert, shape (expert, replica), -1 where it has fewer: EPLB's log2phy.

        Args:
            layer: Index of the layer.
            width: Replicas to make room for; None for the most that an expert of the layer has.
        """
        count_E = self.num_replicas(layer)
        slot_EC = np.full((len(count_E), width or int(count_E.max())), -1, np.int64)
        slot_EC[self.experts[layer], self.replicas[layer]] = np.arange(len(self.experts[layer]))
        return slot_EC

    def devices(self, layer: int, width: int | None = None) -> NDArray[np.int64]:
        """Devices of the replicas of each expert, shape (expert, replica), -1 where it has fewer."""
        slot_EC = self.slots(layer, width)
        per_device = len(self.experts[layer]) // self.cluster.devices
        return np.where(slot_EC < 0, -1, slot_EC // per_device)


def placement(
    trace: Source,
    algorithm: str = "eplb-replicated",
    *,
    devices: int,
    nodes: int = 1,
    redundant_experts: int | None = None,
    expert_groups: int = 1,
    layers: Iterable[int] | None = None,
    domain: str | None = None,
    batch_tokens: int = PREFILL_TOKENS,
    seed: int = 0,
    threads: int | None = None,
) -> Placement:
    """Place the experts on devices, fitted on the whole trace; `export_placement` writes it for a server.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`), if that holds all documents.
        algorithm: "linear", "random", "eplb", "eplb-replicated" or "affinity".
        devices: Devices that share the experts of each layer.
        nodes: Nodes, of as many devices each.
        redundant_experts: Slots beyond one an expert, for eplb-replicated; None for one a device, or as many as fill
            the devices evenly where they do not divide the experts.
        expert_groups: Groups of experts among which the router chooses first (DeepSeek's n_group).
        layers: Layers of the trace to place, or None for all.
        domain: Fit on this domain only, not with affinity; None for all.
        batch_tokens: Tokens of the prefill batches in which affinity must not raise the load of the busiest device.
        seed: Of the random order.
        threads: Parts counted at a time; None for the number of processors.
    Raises:
        ValueError: The experts cannot be shared out evenly, or there is no such placement.
        NoSuchLayer: A layer was not recorded.
        NoSuchDomain: The domain is not in the trace.
        NotRecorded: The trace holds counts only, and affinity needs tokens.
    Source:
        EPLB: github.com/deepseek-ai/EPLB; affinity is ours (`simulation.parallel_kernels.bring_together`).
    """
    trace = playable(trace, layers)
    chosen = trace.select_layers(layers)
    cluster = Cluster(devices, nodes, redundant_experts, expert_groups)
    cluster.check(chosen, [algorithm])
    if batch_tokens < 1:
        raise ValueError(f"a batch holds at least one token, not {batch_tokens}")
    if domain is not None and algorithm == "affinity":
        raise ValueError("affinity is fitted on all domains together; eplb and eplb-replicated can be on one")
    code = None if domain is None else trace.domain_code(domain)
    if algorithm == "affinity":
        trace.need_tokens()
    if algorithm not in FITTED:
        return place(algorithm, cluster, chosen, {}, seed=seed)
    if trace.header.counts_only:
        loads = trace.expert_loads(chosen, domain)
        return place(algorithm, cluster, chosen, {layer: Fit(load) for layer, load in loads.items()}, seed=seed)
    kind = BatchKind("prefill", batch_tokens)
    counted = profile(trace, chosen, kind, Cells(trace), pairs=algorithm == "affinity", threads=threads)
    return place(algorithm, cluster, chosen, counted.fits(range(NUM_FOLDS), code), seed=seed)


def place(
    algorithm: str, cluster: Cluster, layers: Sequence[Layer], fits: Mapping[int, Fit], *, seed: int = 0
) -> Placement:
    """Place the experts of each layer by one of `ALGORITHMS`; `cluster.check` has passed.

    Args:
        fits: For each layer what to fit on; not looked at by linear and random.
        seed: Of the random order.
    """
    experts, replicas = {}, {}
    for layer in layers:
        n = layer.layer
        experts[n], replicas[n] = np.arange(layer.num_experts), np.zeros(layer.num_experts, np.int64)
        if algorithm == "random":
            experts[n] = np.random.default_rng([seed, n]).permutation(layer.num_experts)
        elif algorithm != "linear":
            shape = cluster.expert_groups, cluster.nodes, cluster.devices
            experts[n], replicas[n] = eplb.rebalance(fits[n].loads, cluster.slots(layer, algorithm), *shape)
        if algorithm == "affinity":
            experts[n] = _together(experts[n], cluster, fits[n])
    return Placement(algorithm, cluster, tuple(layers), experts, replicas)


def _together(experts_S: NDArray[np.int64], cluster: Cluster, fit: Fit) -> NDArray[np.int64]:
    """The placement, one slot an expert, after the swaps that bring experts of the same token together."""
    assert fit.pairs is not None
    per_device = len(experts_S) // cluster.devices
    device_E = np.empty(len(experts_S), np.int64)
    device_E[experts_S] = np.arange(len(experts_S)) // per_device
    node_D = np.arange(cluster.devices) // (cluster.devices // cluster.nodes)
    near_DD = (node_D[:, None] == node_D).astype(float) * (cluster.nodes > 1) + np.eye(cluster.devices)
    batches = fit.batches if fit.batches is not None and len(fit.batches) else fit.loads[None]
    loads, of_batches = fit.loads.astype(float), np.ascontiguousarray(batches, float)
    bring_together(fit.pairs.astype(float), loads, of_batches, device_E, near_DD, SLACK)
    return np.argsort(device_E, kind="stable")


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
