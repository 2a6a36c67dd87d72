"""Placing the experts of a model by what a trace says of their loads."""

from __future__ import annotations

from collections.abc import Iterable

from moescope.errors import NoSuchDomain
from moescope.simulation.batches import BatchKind
from moescope.simulation.placements import FITTED, Cluster, Placement, place
from moescope.simulation.profile import NUM_FOLDS, Cells, profile
from moescope.tallying import Source
from moescope.tallying.counted import playable

PREFILL_TOKENS = 4096
DECODE_TOKENS = 64


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
        NotRecorded: The trace holds counts only.
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
    trace.need_tokens()
    if domain is not None and domain not in trace.domains:
        raise NoSuchDomain(trace.path, f"no domain {domain!r}; the trace has {', '.join(trace.domains)}")
    code = None if domain is None else trace.domains.index(domain)
    if algorithm not in FITTED:
        return place(algorithm, cluster, chosen, {}, seed=seed)
    kind = BatchKind("prefill", batch_tokens)
    counted = profile(trace, chosen, kind, Cells(trace), pairs=algorithm == "affinity", threads=threads)
    return place(algorithm, cluster, chosen, counted.fits(range(NUM_FOLDS), code), seed=seed)
