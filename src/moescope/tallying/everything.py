"""Everything that one pass over a trace can count, together: each page is read and decoded once for all measures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moescope.tallying.balance import BalanceCounters, BalanceCounts, count_balance
from moescope.tallying.document_sample import MAX_BYTES, DocumentCounter, DocumentRoom, DocumentSample
from moescope.tallying.joint import Coactivation, Transitions
from moescope.tallying.one_pass import one_pass
from moescope.tallying.segments import LENGTHS, DocumentGroups, SegmentCounter, Segments, check_lengths
from moescope.tallying.tally import Tally, TallyCounter, tally
from moescope.tallying.word_classes import ClassCounter, ClassCounts, Pieces
from moescope.trace import Trace


@dataclass(frozen=True)
class Everything:
    """What one pass counted; each is taken by its measure in the place of the trace.

    Attributes:
        tally: For `shares`, `repeats` and `divergence`, and as `tally` for `words`.
        balance: For `balance`.
        coactivation: For `coactivation`; None where no layer has two choices a token.
        transitions: For `transitions`, of first choices, or of all where their order is not known; None for one layer.
        segments: For `consistency`, as `segments`.
        classes: For `syntax`, of first choices; None where the trace has no token ids, or does not rank its choices.
        documents: For `explain`, `locality` and `vocabulary`: the documents themselves, or as many as fit.

    For a trace of counts all but the tally and the balance are None.
    """

    tally: Tally
    balance: BalanceCounts
    coactivation: Coactivation | None = None
    transitions: Transitions | None = None
    segments: Segments | None = None
    classes: ClassCounts | None = None
    documents: DocumentSample | None = None


def count_everything(
    trace: Trace,
    layers: Iterable[int] | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    max_bytes: int = MAX_BYTES,
    threads: int | None = None,
) -> Everything:
    """Count a trace for all measures in one pass.

    Takes the memory of all of them. With one thread, for 60 layers of 256 experts, 8 a token, a whole process peaked at
    1.3 GB for 200,000 tokens, 0.1 GB of it documents, which grow to `max_bytes` and no further; each further thread
    adds its own counts, about 0.6 GB there (docs/decisions/log.md).

    Args:
        trace: The trace, complete or not.
        layers: Layers to count, or None for all.
        lengths: Tokens of a segment.
        max_bytes: Memory of the documents to aim at.
        threads: Parts counted at a time; None for the number of processors.
    Raises:
        NoSuchLayer: A layer was not recorded.
        TraceDamaged: A page fails its checksum.
        ValueError: `threads` is not positive, or a length cannot be.
    """
    check_lengths(lengths)
    chosen = trace.select_layers(layers)
    if trace.header.counts_only:
        numbers = [layer.layer for layer in chosen]
        return Everything(tally(trace, numbers), count_balance(trace, numbers))
    paired = [layer for layer in chosen if layer.top_k > 1]
    ranked = all(layer.ranked for layer in chosen)
    groups = DocumentGroups.of(trace)
    balance = BalanceCounters(trace, chosen)
    pieces = Pieces.of(trace.vocabulary) if ranked and trace.header.token_ids else None
    room = DocumentRoom.for_documents(trace, chosen, max_bytes)

    def make() -> list[Any]:
        return [
            TallyCounter.zeros(len(trace.domains), chosen),
            balance(),
            *([Coactivation.empty(paired)] if paired else []),
            *([Transitions.empty(chosen, "first" if ranked else "any")] if len(chosen) > 1 else []),
            SegmentCounter(chosen, groups, lengths),
            *([ClassCounter(ClassCounts.empty(chosen), pieces)] if pieces is not None else []),
            DocumentCounter(room),
        ]

    weights = trace.header.weights
    counters = one_pass(trace, chosen, make, threads=threads, tokens=True, weights=weights)
    of = {type(counter): counter for counter in counters}
    return Everything(
        tally=of[TallyCounter].labelled(trace.domains, chosen),
        balance=counters[1].counts,
        coactivation=of.get(Coactivation),
        transitions=of.get(Transitions),
        segments=of[SegmentCounter].segments(trace.domains),
        classes=of[ClassCounter].counts if pieces is not None else None,
        documents=room.filled,
    )
