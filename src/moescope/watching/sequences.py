"""Sequences that a watched model reads, until each is whole and goes into a trace.

Unit: a sequence, which is one row of a batch or one piece of a packed row; what is generated after a prompt continues
its sequence as long as the same cache is used. Convention: a sequence is a document, unless a block says that all of
its sequences are windows of one document. Documents are numbered in the order in which they end.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ModelUnsupported
from moescope.trace import Part, TraceWriter
from moescope.trace.columns import PHASES

PREFILL, DECODE = range(len(PHASES))


@dataclass(frozen=True)
class Step:
    """What one forward pass adds to the sequences of its batch.

    Attributes:
        token_ids: Vocabulary ids, shape (sequence, token); zeros if they are not known.
        recorded: Which tokens are recorded, shape (sequence, token).
        starts: Where a sequence starts, shape (sequence, token).
        phase: `PREFILL` or `DECODE`.
        expert_ids: For each layer the chosen experts, rank 0 first, shape (sequence, token, choice).
        gate_weights: For each layer their weights, same shapes; empty if not recorded.
    """

    token_ids: NDArray[np.int64]
    recorded: NDArray[np.bool_]
    starts: NDArray[np.bool_]
    phase: int
    expert_ids: dict[int, NDArray[np.int32]]
    gate_weights: dict[int, NDArray[np.float32]]


@dataclass(eq=False)
class DocumentBlock:
    """Sequences that are the windows of one document, in the order read."""

    domain: str
    batches: list[SequenceBatch] = field(default_factory=list)


@dataclass(eq=False)
class SequenceBatch:
    """Sequences that were read together and may still grow.

    Attributes:
        domains: Domain of each row.
        block: The document they belong to; None if each is one.
        generation: The call of ``generate`` that makes them, so that an error of it leaves them incomplete, or None.
        ended: Whether nothing can follow.
        fed: Tokens of each row that the model has read, padding included.
        steps: What each forward pass added.
        cache: The cache they are in.
    """

    domains: Sequence[str]
    block: DocumentBlock | None
    generation: object = None
    ended: bool = False
    fed: int = 0
    steps: list[Step] = field(default_factory=list)
    cache: Callable[[], Any] = lambda: None

    def sequences(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The sequences with a recorded token, each with its domain and its columns in a part."""
        recorded, starts, token_ids = (
            np.concatenate([getattr(step, name) for step in self.steps], 1)
            for name in ("recorded", "starts", "token_ids")
        )
        phase = np.repeat([step.phase for step in self.steps], [step.recorded.shape[1] for step in self.steps])
        expert_ids = _joined([step.expert_ids for step in self.steps])
        gate_weights = _joined([step.gate_weights for step in self.steps])
        sequence = starts.cumsum(1)
        for row, domain in enumerate(self.domains):
            for number in np.unique(sequence[row, recorded[row]]):
                rows = np.flatnonzero(recorded[row] & (sequence[row] == number))
                columns = {
                    "position": np.arange(len(rows), dtype=np.uint32),
                    "token_id": token_ids[row, rows].astype(np.uint32),
                    "phase": phase[rows].astype(np.uint8),
                    "expert_ids": {layer: ids[row, rows] for layer, ids in expert_ids.items()},
                    "gate_weights": {layer: weights[row, rows] for layer, weights in gate_weights.items()},
                }
                yield domain, columns


class Labels:
    """Which domains, and which document, the sequences that begin now belong to.

    Attributes:
        domains: Domain of every sequence, or of each row of a batch.
        block: The document that is open; None if each sequence is one.
    """

    def __init__(self, domains: str | Sequence[str]) -> None:
        self.domains = domains
        self.block: DocumentBlock | None = None

    def batch(self, num_rows: int, *, generated: bool) -> SequenceBatch:
        """A batch of sequences that begin now; those that ``generate`` makes may be several of each prompt.

        Raises:
            ValueError: There is not a domain for each.
        """
        if self.block is not None:
            return SequenceBatch((self.block.domain,) * num_rows, self.block)
        if isinstance(self.domains, str):
            return SequenceBatch((self.domains,) * num_rows, None)
        copies, rest = divmod(num_rows, max(1, len(self.domains)))
        if rest or not copies or (copies > 1 and not generated):
            raise ValueError(f"{len(self.domains)} domains are given for a batch of {num_rows} sequences")
        return SequenceBatch([name for name in self.domains for _ in range(copies)], None)


class Sequences:
    """Collects sequences and writes those that are whole, in parts of at least so many tokens."""

    def __init__(self, writer: TraceWriter, part_tokens: int) -> None:
        self.writer = writer
        self._part_tokens = part_tokens
        self._batches: list[SequenceBatch] = []
        self._whole: list[Part] = []
        self._domains: dict[str, int] = {}
        self._waiting = 0
        self.documents = self.tokens = 0

    def add(
        self,
        step: Step,
        cache: Any,
        past: int,
        subject: str,
        open_batch: Callable[[int], SequenceBatch],
        generation: object,
    ) -> None:
        """Add what a forward pass read; `settle` writes it once it is due.

        Args:
            cache: The cache that holds it now; None if there is none, so that nothing can follow.
            past: Tokens that the cache held before.
            subject: What errors call the model.
            open_batch: Makes a batch of some number of rows, for sequences that begin.
            generation: The call of ``generate`` that makes the sequences; None if none does.
        Raises:
            ModelUnsupported: The cache was rewound or rearranged, so that its rows are other sequences than before.
        """
        num_rows, num_tokens = step.recorded.shape
        batch = next((known for known in self._batches if cache is not None and known.cache() is cache), None)
        if batch is not None and (past == 0 or batch.ended):
            batch.ended, batch.cache, batch = True, lambda: None, None  # the cache is used again for something new
        if batch is None:
            batch = open_batch(num_rows)
            self._batches.append(batch)
            if batch.block is not None:
                batch.block.batches.append(batch)
            batch.fed = past
            self._follow(batch, cache)
        elif batch.fed != past or len(batch.domains) != num_rows:
            raise ModelUnsupported(
                subject,
                f"its cache holds {num_rows} x {past} tokens, expected {len(batch.domains)} x {batch.fed}; a cache "
                "that is cut or rearranged on the way (assisted decoding, beam search) cannot be followed in a trace",
                "watch without a trace counts it all the same",
            )
        else:
            step.starts[:] = False
        batch.generation = generation
        batch.fed += num_tokens
        batch.steps.append(step)

    def _follow(self, batch: SequenceBatch, cache: Any) -> None:
        """End the batch with its cache; the callback may come at any moment and only leaves a mark."""
        if cache is None:
            batch.ended = True
            return

        def end(_: object) -> None:
            batch.ended = True

        try:
            batch.cache = weakref.ref(cache, end)
        except TypeError:  # an object that cannot be followed is kept to the end
            batch.cache = lambda: cache

    def settle(self) -> None:
        """Take up the sequences that have ended, and write parts that are full."""
        for batch in [batch for batch in self._batches if batch.ended and batch.block is None]:
            self._batches.remove(batch)
            for domain, columns in batch.sequences():
                self._take(domain, [columns])
        if self._waiting >= self._part_tokens:
            self._write()

    def end_block(self, block: DocumentBlock, *, whole: bool) -> None:
        """Make one document of the sequences of a block, or forget one that an error left incomplete."""
        self._batches = [batch for batch in self._batches if batch.block is not block]
        if not whole:
            return
        windows = [columns for batch in block.batches for _, columns in batch.sequences()]
        if windows:
            self._take(block.domain, windows)
        self.settle()

    def end_generation(self, generation: object, *, whole: bool) -> None:
        """What was being generated is generated, or an error left it incomplete and it is forgotten."""
        for batch in [batch for batch in self._batches if batch.generation is generation]:
            batch.generation = None
            if not whole:
                self._batches.remove(batch)
                if batch.block is not None:
                    batch.block.batches.remove(batch)
        self.settle()

    def finish(self, *, complete: bool) -> None:
        """Write what is left, and if `complete` declare the trace so."""
        for batch in self._batches:
            batch.ended = batch.ended or batch.generation is None
        self.settle()
        if self._whole:
            self._write()
        if complete:
            self.writer.finish({"documents": self.documents, "tokens": self.tokens})

    def _take(self, domain: str, windows: list[dict[str, Any]]) -> None:
        code = self._domains.setdefault(domain, len(self._domains))
        for sequence, columns in enumerate(windows):
            length = len(columns["position"])
            self._whole.append(
                Part(
                    document=np.full(length, self.documents, np.uint32),
                    domain=np.full(length, code),
                    domain_names=(),  # known once the part is full
                    sequence=np.full(length, sequence, np.uint32),
                    **columns,
                )
            )
            self._waiting += length
        self.documents += 1

    def _write(self) -> None:
        part = replace(Part.joined(self._whole), domain_names=tuple(self._domains))
        num_documents = len(part.document_starts()) - 1
        self.writer.write(part, {"documents": num_documents, "tokens": part.num_tokens})
        self._whole, self._domains, self._waiting = [], {}, 0  # only now: after an error the next part has them, too
        self.tokens += part.num_tokens


def _joined(pieces: Sequence[dict[int, NDArray[Any]]]) -> dict[int, NDArray[Any]]:
    return {layer: np.concatenate([piece[layer] for piece in pieces], 1) for layer in pieces[0]}
