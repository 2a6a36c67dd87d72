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
    trace: Trace, layers: Iterable[int] | None = None, *, max_bytes: int = MAX_BYTES, threads: int | None = None
) -> DocumentSample:
    """Read the documents of a trace, or as many as fit, in one pass.

    Args:
        trace: The trace, complete or not.
        layers: Layers to hold, or None for all.
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
    fraction = affordable_fraction(trace, chosen, max_bytes)
    (gathered,) = one_pass(trace, chosen, lambda: [DocumentCounter(fraction)], threads=threads, tokens=True)
    return gathered.joined(trace, chosen)


def affordable_fraction(trace: Trace, layers: Sequence[Layer], max_bytes: int = MAX_BYTES) -> float:
    """Part of the documents of a trace that fits in so many bytes."""
    a_token = _BYTES_BESIDE_CHOICES + sum(layer.top_k * _id_dtype(layer).itemsize for layer in layers)
    return min(1.0, max_bytes / max(1, a_token * trace.num_tokens))


@dataclass
class DocumentCounter:
    """The counter that keeps documents, a chunk a part."""

    fraction: float
    chunks: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    choices: list[dict[int, NDArray[np.integer[Any]]]] = field(default_factory=list)
    kept: NDArray[np.bool_] | None = None

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Keep the layers of `group` of a part's documents."""
        if not self.chunks or self._is_new(part):
            self._start(part)
        for layer in group:
            ids_KT = part.expert_ids[layer.layer].T
            rows = ids_KT if self.kept is None else ids_KT[:, self.kept]
            self.choices[-1][layer.layer] = rows.astype(_id_dtype(layer), copy=False)

    def _is_new(self, part: Part) -> bool:
        return int(part.document[0]) != int(self.chunks[-1]["first"][0])

    def _start(self, part: Part) -> None:
        starts = part.document_starts()
        document = part.document[starts[:-1]].astype(np.int64)
        keep_G = _kept(document, self.fraction)
        self.kept = None if keep_G.all() else np.repeat(keep_G, np.diff(starts))
        rows = slice(None) if self.kept is None else self.kept
        self.chunks.append(
            {
                "first": part.document[:1].copy(),
                "document": document[keep_G],
                "domain": part.domain[starts[:-1]][keep_G].astype(np.int64),
                "length": np.diff(starts)[keep_G],
                "position": part.position[rows].astype(np.int32),
                "token_id": part.token_id[rows].astype(np.int32),
            }
        )
        self.choices.append({})

    def merge(self, other: DocumentCounter) -> None:
        """Add other documents, in place."""
        self.chunks += other.chunks
        self.choices += other.choices

    def joined(self, trace: Trace, layers: tuple[Layer, ...]) -> DocumentSample:
        """The documents in their order."""
        order = sorted(range(len(self.chunks)), key=lambda at: int(self.chunks[at]["first"][0]))
        kinds = {"document": np.int64, "domain": np.int64, "length": np.int64, "position": np.int32}
        columns = {
            name: np.concatenate([np.zeros(0, kind), *(self.chunks[at][name] for at in order)])
            for name, kind in {**kinds, "token_id": np.int32}.items()
        }
        starts = np.concatenate([[0], np.cumsum(columns["length"])]).astype(np.int64)
        expert_ids = {}
        for layer in layers:  # a layer at a time, so that the choices are in memory once, and one layer twice
            empty = np.zeros((layer.top_k, 0), _id_dtype(layer))
            expert_ids[layer.layer] = np.concatenate(
                [empty, *(self.choices[at].pop(layer.layer) for at in order)], axis=1
            )
        return DocumentSample(
            layers,
            trace.domains,
            columns["document"],
            columns["domain"],
            starts,
            np.append(np.flatnonzero(columns["position"] == 0), starts[-1]).astype(np.int64),
            columns["position"],
            columns["token_id"] if trace.header.token_ids else None,
            expert_ids,
            self.fraction,
        )


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
