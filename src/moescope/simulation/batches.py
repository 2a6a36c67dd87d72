"""Batches as a server forms them, as the order in which the rows of a part are taken.

Every batch has the same number of tokens. A prefill batch is a run of consecutive tokens, one prompt after the other; a
decode batch is one step of several running sequences, one token each. Consecutive parts are joined, so that each fold
has several times as many tokens, or sequences, as a batch takes; what does not fill a batch is left out at the end of
each such block. So memory is bounded, and threads change no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.jit import kernel
from moescope.trace import Trace
from moescope.trace.columns import PHASES

Rows = NDArray[np.int64]

BATCHES_A_BLOCK = 16
"""A block of parts has at least so many times the tokens of a prefill batch, and the sequences of a decode batch."""

MOST_TOGETHER = 2**20
"""Most tokens that parts are joined up to."""


@dataclass(frozen=True)
class BatchKind:
    """A way to form batches.

    Attributes:
        phase: "prefill": consecutive tokens; "decode": one token of each running sequence.
        tokens: Tokens a batch.
    """

    phase: Literal["prefill", "decode"]
    tokens: int

    @property
    def label(self) -> str:
        """Such as "prefill 4096"."""
        return f"{self.phase} {self.tokens}"


def tokens_together(trace: Trace, kinds: Sequence[BatchKind]) -> int:
    """Tokens up to which parts are joined before batches are formed of them.

    A sequence is taken to be as long as the mean document.
    """
    length = trace.num_tokens / max(1, trace.num_documents)
    needed = max((kind.tokens * (length if kind.phase == "decode" else 1) for kind in kinds), default=0)
    return min(int(BATCHES_A_BLOCK * needed), MOST_TOGETHER)


def batch_rows(
    kind: BatchKind, starts: Rows, kept_T: NDArray[np.bool_], phase_T: NDArray[np.integer] | None
) -> NDArray[np.int64]:
    """Rows of a part in the order in which batches take them, a whole number of batches.

    Args:
        kind: How batches are formed.
        starts: First row of each sequence, with the number of rows at the end.
        kept_T: Rows of whole sequences that take part.
        phase_T: Code of the phase of each row; only rows of the kind's phase take part. None if phases are not known.
    """
    if phase_T is not None:
        kept_T = kept_T & (phase_T == PHASES.index(kind.phase))
    rows = np.flatnonzero(kept_T)
    if kind.phase == "prefill":
        return rows[: len(rows) // kind.tokens * kind.tokens]
    bounds = np.searchsorted(rows, starts)
    bounds = bounds[np.concatenate([[True], np.diff(bounds) > 0])]
    return rows[decode_order(bounds, kind.tokens)]


@kernel()
def decode_order(starts: Rows, running: int) -> NDArray[np.int64]:
    """Tokens step by step: of each running sequence the next token; the next sequence takes the place of one that ends.

    It ends when a sequence has ended and none is left to take its place.

    Args:
        starts: First token of each sequence, with the number of tokens at the end; none is empty.
        running: Sequences that run at a time.

    Example:
        Sequences of 3, 1 and 2 tokens, two at a time: the third follows the second.

        >>> decode_order(np.array([0, 3, 4, 6]), 2).tolist()
        [0, 3, 1, 4, 2, 5]
    """
    order = np.empty(starts[-1], np.int64)
    if len(starts) - 1 < running:
        return order[:0]
    next_S, waiting, taken = starts[:running].copy(), running, 0
    end = starts[1 : running + 1].copy()
    while True:
        for s in range(running):
            order[taken + s] = next_S[s]
            next_S[s] += 1
        taken += running
        for s in range(running):
            if next_S[s] == end[s]:
                if waiting == len(starts) - 1:
                    return order[:taken]
                next_S[s], end[s] = starts[waiting], starts[waiting + 1]
                waiting += 1
