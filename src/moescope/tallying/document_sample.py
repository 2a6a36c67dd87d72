"""Whole documents with all their choices, in memory: for measures that go over the same tokens several times.

Unlike sums, tokens can be permuted, left out a document at a time and compared at any distance. The sample is bounded
in bytes, not in tokens: where the trace is larger, it holds the documents with the smallest hash, so that it depends
neither on the order of the parts nor on threads, and the document stays the unit of sampling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.one_pass import one_pass
from moescope.tallying.token_sample import token_hashes
from moescope.trace import Layer, Part, Trace

MAX_BYTES = 2**30
"""Memory of the largest sample, in bytes: 14 million tokens of 32 layers x 2 choices, 2 million of 60 x 8 of 256."""

_BYTES_BESIDE_CHOICES = 12  # token id and position, and what is per document or sequence


@dataclass(frozen=True)
class DocumentSample:
    """Documents of a trace, or all of them. T tokens, G documents, Q sequences.

    Attributes:
        layers: Layers held.
        domain_names: Labels of the domains.
        document: Index of each document in the corpus, ascending, shape (G,).
        domain: Code of each document's domain, shape (G,).
        starts: Row at which each document starts, with T at the end, shape (G + 1,).
        sequence_starts: Row at which each sequence starts, with T at the end, shape (Q + 1,).
        position: Place of each token within its sequence, shape (T,).
        token_id: Vocabulary ids, shape (T,); None where the trace does not know them.
        expert_ids: For each layer the choices, rank 0 first, shape (choice, T); -1 = dropped.
        fraction: Expected part of the trace's documents that is held; 1 if it is all of them.
    """

    layers: tuple[Layer, ...]
    domain_names: tuple[str, ...]
    document: NDArray[np.int64]
    domain: NDArray[np.int64]
    starts: NDArray[np.int64]
    sequence_starts: NDArray[np.int64]
    position: NDArray[np.int32]
    token_id: NDArray[np.int32] | None
    expert_ids: dict[int, NDArray[np.integer[Any]]]
    fraction: float

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return int(self.starts[-1])

    @property
    def num_documents(self) -> int:
        """Documents held."""
        return len(self.document)

    def document_of_token(self) -> NDArray[np.int32]:
        """Place of each token's document among those held, shape (T,)."""
        return np.repeat(np.arange(self.num_documents, dtype=np.int32), np.diff(self.starts))

    def thinned(self, num_tokens: int) -> DocumentSample:
        """The documents with the smallest hash that hold at most so many tokens together, but two if there are two."""
        if self.num_tokens <= num_tokens:
            return self
        order = np.argsort(_hashes(self.document), kind="stable")
        fitting = int(np.searchsorted(np.cumsum(np.diff(self.starts)[order]), num_tokens, side="right"))
        keep_G = np.zeros(self.num_documents, np.bool_)
        keep_G[order[: max(2, fitting)]] = True
        lengths = np.diff(self.starts)
        keep_T = np.repeat(keep_G, lengths)
        position = self.position[keep_T]
        starts = np.concatenate([[0], np.cumsum(lengths[keep_G])]).astype(np.int64)
        return replace(
            self,
            document=self.document[keep_G],
            domain=self.domain[keep_G],
            starts=starts,
            sequence_starts=np.append(np.flatnonzero(position == 0), starts[-1]).astype(np.int64),
            position=position,
            token_id=None if self.token_id is None else self.token_id[keep_T],
            expert_ids={layer: ids_KT[:, keep_T] for layer, ids_KT in self.expert_ids.items()},
            fraction=self.fraction * int(keep_G.sum()) / len(keep_G),
        )


def sample_documents(
    trace: Trace,
    layers: Iterable[int] | None = None,
    *,
    ranks: int | None = None,
    max_bytes: int = MAX_BYTES,
    threads: int | None = None,
) -> DocumentSample:
    """Read the documents of a trace, or as many as fit, in one pass.

    Args:
        trace: The trace, complete or not.
        layers: Layers to hold, or None for all.
        ranks: Choices of a token to hold, from the first on; None for all.
        max_bytes: Memory to aim at. A trace that needs more is sampled by document.
        threads: Parts read at a time; None for the number of processors.
    Returns:
        The sample; the same whatever the number of threads.
    Raises:
        NoSuchLayer: A layer was not recorded.
        NotRecorded: The trace holds counts only.
        TraceDamaged: A page fails its checksum.
        ValueError: `threads` is not positive.
    """
    trace.need_tokens()
    chosen = trace.select_layers(layers)
    room = DocumentRoom.for_documents(trace, chosen, max_bytes, ranks)
    one_pass(trace, chosen, lambda: [DocumentCounter(room)], threads=threads, tokens=True)
    return room.filled


@dataclass(frozen=True)
class DocumentRoom:
    """The memory of a sample, which the counters of all threads fill, each its own rows.

    Attributes:
        sample: The sample; its columns are what is filled.
        first_row: By the first document of a part, kept or not, the row at which the part's kept documents start.
    """

    sample: DocumentSample
    first_row: dict[int, int]

    @classmethod
    def for_documents(
        cls, trace: Trace, layers: tuple[Layer, ...], max_bytes: int = MAX_BYTES, ranks: int | None = None
    ) -> DocumentRoom:
        """Room for the documents of a trace, and their first `ranks` choices, that fit in so many bytes; all empty."""
        held = {layer: len(range(layer.top_k)[:ranks]) for layer in layers}
        a_token = _BYTES_BESIDE_CHOICES + sum(number * _id_dtype(layer).itemsize for layer, number in held.items())
        fraction = min(1.0, max_bytes / max(1, a_token * trace.num_tokens))
        number, owner, length = trace.document_numbers, trace.document_parts, trace.document_tokens
        begins = np.flatnonzero(np.diff(owner, prepend=-1))  # of each part
        parts = np.split(np.arange(len(number)), begins[1:])
        order = np.argsort(number[begins], kind="stable")
        rows = np.concatenate([np.zeros(0, np.int64), *(parts[at] for at in order.tolist())])
        keep = _kept(number, fraction)
        kept = rows[keep[rows]]
        starts = np.concatenate([[0], np.cumsum(length[kept])]).astype(np.int64)
        of_part = np.bincount(owner[kept], length[kept], minlength=len(trace.parts)).astype(np.int64)
        first_row, row = {}, 0
        for at in order.tolist():
            first_row[int(number[begins[at]])] = row
            row += int(of_part[owner[begins[at]]])
        sample = DocumentSample(
            layers,
            trace.domains,
            number[kept],
            trace.document_domains[kept],
            starts,
            np.zeros(0, np.int64),
            np.zeros(row, np.int32),
            np.zeros(row, np.int32) if trace.header.token_ids else None,
            {layer.layer: np.zeros((number, row), _id_dtype(layer)) for layer, number in held.items()},
            fraction,
        )
        return cls(sample, first_row)

    @property
    def filled(self) -> DocumentSample:
        """The sample, once the pass is over."""
        starts = np.append(np.flatnonzero(self.sample.position == 0), self.sample.num_tokens)
        return replace(self.sample, sequence_starts=starts.astype(np.int64))


@dataclass
class DocumentCounter:
    """The counter that keeps documents: each part goes to its place in the room that all counters share."""

    room: DocumentRoom
    document: int = -1
    rows: slice = field(default_factory=lambda: slice(0, 0))
    kept: NDArray[np.bool_] | slice = field(default_factory=lambda: slice(None))

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Keep the layers of `group` of a part's documents."""
        sample = self.room.sample
        if int(part.document[0]) != self.document:
            self._start(part)
        for layer in group:
            room_KT = sample.expert_ids[layer.layer]
            room_KT[:, self.rows] = part.expert_ids[layer.layer].T[: len(room_KT), self.kept]

    def _start(self, part: Part) -> None:
        sample, starts = self.room.sample, part.document_starts()
        self.document = int(part.document[0])
        keep_G = _kept(part.document[starts[:-1]].astype(np.int64), sample.fraction)
        self.kept = slice(None) if keep_G.all() else np.repeat(keep_G, np.diff(starts))
        first = self.room.first_row[self.document]
        self.rows = slice(first, first + int(np.diff(starts)[keep_G].sum()))
        sample.position[self.rows] = part.position[self.kept]
        if sample.token_id is not None:
            sample.token_id[self.rows] = part.token_id[self.kept]

    def merge(self, other: DocumentCounter) -> None:
        """Nothing: the room is shared."""


def _kept(document: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    if fraction >= 1:
        return np.ones(len(document), np.bool_)
    kept: NDArray[np.bool_] = _hashes(document) < np.uint64(fraction * 2**64)
    return kept


def _hashes(document: NDArray[np.int64]) -> NDArray[np.uint64]:
    return token_hashes(document, np.full(len(document), 2**31))


def _id_dtype(layer: Layer) -> np.dtype[Any]:
    """The narrowest type that holds the ids, and -1 where assignments may be dropped."""
    if not layer.drops:
        return np.dtype(np.uint8 if layer.num_ids <= 256 else np.uint16)
    return np.dtype(np.int16 if layer.num_ids < 2**15 else np.int32)
