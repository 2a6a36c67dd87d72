"""Documents with the routing of their tokens: one asked for, or a bounded sample of a trace to look at.

The sample serves eyes, not statistics: it prefers documents in which the words asked about occur. It is the same for
the same trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.reporting.visible import decode_pieces
from moescope.trace import Part, Trace

CANDIDATES = 12
"""Documents a domain among which the sample is chosen."""

SHORTEST = 24
"""Documents with fewer tokens are taken only if there are no others."""


@dataclass(frozen=True)
class RoutedDocument:
    """Tokens of a document, or of its beginning, with the experts they chose.

    Attributes:
        number: Index in the corpus.
        domain: Its domain.
        token_ids: Vocabulary ids, shape (token,).
        pieces: Their bytes.
        expert_ids: For each layer the chosen experts, rank 0 first, shape (token, choice); -1 = dropped.
        gate_weights: The same for gate weights; empty if not recorded.
        num_tokens: Tokens of the whole document.
    """

    number: int
    domain: str
    token_ids: NDArray[np.integer[Any]]
    pieces: list[bytes]
    expert_ids: Mapping[int, NDArray[np.integer[Any]]]
    gate_weights: Mapping[int, NDArray[np.floating[Any]]]
    num_tokens: int

    @cached_property
    def texts(self) -> list[str]:
        """The characters of each token; empty where it is only the beginning of one."""
        return decode_pieces(self.pieces)

    def tokens(self, selected: slice) -> RoutedDocument:
        """The document that holds only the selected tokens."""
        return replace(
            self,
            token_ids=self.token_ids[selected],
            pieces=self.pieces[selected],
            expert_ids={layer: ids[selected] for layer, ids in self.expert_ids.items()},
            gate_weights={layer: weights[selected] for layer, weights in self.gate_weights.items()},
        )

    def find(self, words: Iterable[str]) -> list[int]:
        """For each word that occurs, the token in which it first does, in no case-sensitive way."""
        text = "".join(self.texts).lower()
        ends = np.cumsum([len(piece) for piece in self.texts])
        places = [text.find(word.lower()) for word in words]
        return [int(np.searchsorted(ends, place, side="right")) for place in places if place >= 0]


def read_document(trace: Trace, number: int, layers: Iterable[int] | None = None) -> RoutedDocument:
    """One document of a trace, whole.

    Raises:
        NoSuchDocument: The trace does not hold it.
        NoSuchLayer: A layer was not recorded.
        NotRecorded: The trace has no token ids, or does not say which choice is the first.
    """
    trace.need_text(layers)
    return _routed(trace, trace.document(number, layers, weights=trace.header.weights))


def choose_documents(
    trace: Trace, *, per_domain: int = 3, most_tokens: int = 600, words: Sequence[str] = ()
) -> list[Candidate]:
    """Some documents of each domain, in the order of the trace's domains, chosen by their text alone.

    Those come first in whose first `most_tokens`, the ones that will be kept, many of the words occur.
    """
    candidates = _candidates(trace)
    plain = _read(trace, [candidate for of_domain in candidates for candidate in of_domain], (), weights=False)

    def occurring(candidate: Candidate) -> int:
        return len(plain[candidate.number].tokens(slice(most_tokens)).find(words))

    return [one for of_domain in candidates for one in sorted(of_domain, key=occurring, reverse=True)[:per_domain]]


def read_chosen(
    trace: Trace, chosen: Sequence[Candidate], *, layers: Iterable[int] | None = None, most_tokens: int = 600
) -> list[RoutedDocument]:
    """The chosen documents, cut to their first tokens; each part that holds one is read once, in order."""
    kept = tuple(layer.layer for layer in trace.select_layers(layers))
    full = _read(trace, chosen, kept, weights=trace.header.weights)
    return [full[candidate.number].tokens(slice(most_tokens)) for candidate in chosen]


def example_documents(
    documents: Sequence[RoutedDocument], words: Sequence[str], number: int = 3
) -> list[RoutedDocument]:
    """A few documents of different domains: for each word the first in which it occurs, then the first of the rest."""
    by_word = [next((document for document in documents if document.find([word])), None) for word in words]
    chosen: dict[str, RoutedDocument] = {}
    for document in [*by_word, *documents]:
        if document is not None and len(chosen) < number:
            chosen.setdefault(document.domain, document)
    return list(chosen.values())


@dataclass(frozen=True)
class Candidate:
    """A document that may be shown, and the part that holds it."""

    number: int
    part: int


def _candidates(trace: Trace) -> list[list[Candidate]]:
    """For each domain a few documents, evenly over the trace, the longer half of what is too short left out."""
    tables = [np.zeros((0, 4), np.int64)]  # columns: document, domain, tokens, part
    for index, file in enumerate(trace.parts):
        part = trace.with_trace_domains(file.read((), tokens=False))
        starts = part.document_starts()
        first = starts[:-1]
        columns = [part.document[first], part.domain[first], np.diff(starts), np.full(len(first), index)]
        tables.append(np.stack(columns, axis=1))
    table = np.concatenate(tables)
    candidates = []
    for code in range(len(trace.domains)):
        rows = table[table[:, 1] == code]
        long = rows[rows[:, 2] >= SHORTEST]
        rows = long if len(long) else rows
        picked = rows[np.unique(np.linspace(0, len(rows) - 1, min(CANDIDATES, len(rows))).round().astype(int))]
        candidates.append([Candidate(int(row[0]), int(row[3])) for row in picked])
    return candidates


def _read(
    trace: Trace, wanted: Sequence[Candidate], layers: tuple[int, ...], *, weights: bool
) -> dict[int, RoutedDocument]:
    """The documents by number; each part is read once."""
    documents = {}
    for index in sorted({candidate.part for candidate in wanted}):
        part = trace.with_trace_domains(trace.parts[index].read(trace.select_layers(layers), weights=weights))
        for candidate in wanted:
            if candidate.part == index:
                rows = np.flatnonzero(part.document == candidate.number)
                documents[candidate.number] = _routed(trace, part.rows(slice(int(rows[0]), int(rows[-1]) + 1)))
    return documents


def _routed(trace: Trace, part: Part) -> RoutedDocument:
    piece = trace.vocabulary.piece
    return RoutedDocument(
        int(part.document[0]),
        part.domain_names[part.domain[0]],
        part.token_id,
        [piece(token_id) for token_id in part.token_id.tolist()],
        part.expert_ids,
        part.gate_weights,
        part.num_tokens,
    )
