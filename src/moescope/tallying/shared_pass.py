"""Everything that one pass over a trace can tell, counted together: what a report is made from.

Reading takes most of the time of a counter, so the counters of several measures share it; what a trace cannot tell is
None. Peak memory is the sum of the counters' (see their modules), a copy a thread and one more, and of the sample of
documents: for 256 experts, 8 a token, 60 layers and 22 domains 0.7 GB a copy, so some 2.2 GB on two threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moescope.tallying.balance import BalanceCounters, BalanceCounts, count_balance
from moescope.tallying.document_sample import DocumentSample, SampleCounter
from moescope.tallying.joint import Coactivation, Transitions
from moescope.tallying.one_pass import one_pass
from moescope.tallying.segments import DocumentGroups, SegmentCounter, Segments
from moescope.tallying.tally import Tally, TallyCounter, tally
from moescope.trace import Trace

SEGMENT_LENGTHS = (16,)
"""Tokens of the segments counted; each length costs as much as the tally."""

SAMPLE_BYTES = 2**27
"""Memory of the documents kept: 1.7 million tokens of 32 layers x 2 choices, which two processors explain in 20 s."""


@dataclass(frozen=True)
class SharedPass:
    """What was counted.

    Attributes:
        tally: The tally.
        balance: For load balance.
        coactivation: Pairs of experts of a token; None if no layer has two choices, or the trace holds counts.
        transitions: Pairs of experts of neighbouring layers, of first choices if the trace knows which they are; None
            if there is one layer, or the trace holds counts.
        segments: For local routing consistency; None for a trace of counts.
        documents: Whole documents, as many as `SAMPLE_BYTES` hold; None for a trace of counts.
    """

    tally: Tally
    balance: BalanceCounts
    coactivation: Coactivation | None = None
    transitions: Transitions | None = None
    segments: Segments | None = None
    documents: DocumentSample | None = None


def shared_pass(trace: Trace, *, threads: int | None = None) -> SharedPass:
    """Count all layers of a trace for all measures, in one pass.

    Args:
        trace: The trace, complete or not.
        threads: Parts counted at a time; None for the number of processors.
    Raises:
        TraceDamaged: A page fails its checksum.
        ValueError: `threads` is not positive.
    """
    layers = trace.layers
    if trace.header.counts_only:
        return SharedPass(tally(trace), count_balance(trace))
    paired = [layer for layer in layers if layer.top_k > 1]
    ranked = all(layer.ranked for layer in layers)
    groups = DocumentGroups.of(trace)
    makers: dict[str, Callable[[], Any]] = {
        "tally": lambda: TallyCounter.zeros(len(trace.domains), layers),
        "balance": BalanceCounters(trace, layers),
        "segments": lambda: SegmentCounter(layers, groups, SEGMENT_LENGTHS),
        "documents": lambda: SampleCounter.empty(trace, layers, SAMPLE_BYTES),
    }
    if paired:
        makers["coactivation"] = lambda: Coactivation.empty(paired)
    if len(layers) > 1:
        makers["transitions"] = lambda: Transitions.empty(layers, "first" if ranked else "any")
    filled = one_pass(
        trace,
        layers,
        lambda: [make() for make in makers.values()],
        threads=threads,
        tokens=True,
        weights=trace.header.weights,
    )
    found: dict[str, Any] = dict(zip(makers, filled, strict=True))
    return SharedPass(
        tally=found["tally"].labelled(trace.domains, layers),
        balance=found["balance"].counts,
        coactivation=found.get("coactivation"),
        transitions=found.get("transitions"),
        segments=found["segments"].segments(trace.domains),
        documents=found["documents"].joined(trace, layers),
    )
