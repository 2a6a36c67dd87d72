"""Which tokens of two traces are the same tokens; the unit is the token.

Two rows are the same token if document, sequence and position are equal and so are the ids of it and of every token
before it in its sequence that both traces hold: then both models read the same context. Neither the sizes of the parts
nor the order of the documents matter, and memory is that of one part of each trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace import Part, Trace
from moescope.trace.counts import run_starts

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Matching:
    """What two traces have in common.

    Attributes:
        by_token_id: Whether token ids were compared; otherwise tokens are the same by place in the same corpus.
        tokens: Tokens that are the same in both.
        tokens_a: Tokens of the first trace.
        tokens_b: Tokens of the second trace.
        documents: Documents with a token that is the same in both.
        documents_a: Documents of the first trace.
        documents_b: Documents of the second trace.
        documents_differing: Documents of both in which the ids differ at some place that both have.
        documents_relabelled: Documents of both with another domain in the second trace; the first trace's is used.
    """

    by_token_id: bool
    tokens: int
    tokens_a: int
    tokens_b: int
    documents: int
    documents_a: int
    documents_b: int
    documents_differing: int
    documents_relabelled: int

    @property
    def whole(self) -> bool:
        """Whether every token of either trace is in the other."""
        return self.tokens == self.tokens_a == self.tokens_b

    @property
    def share(self) -> float:
        """Matched tokens as a part of those of the trace that has fewer."""
        return self.tokens / max(1, min(self.tokens_a, self.tokens_b))


@dataclass(frozen=True)
class PairOfParts:
    """A part of each trace and the rows that are the same tokens, whole documents together.

    Attributes:
        rows_a: Rows of the first part, shape (token,), or all of them.
        rows_b: Rows of the second part, in the same order.
        documents: Documents with a matched token.
        documents_differing: Documents in which ids differ.
        documents_relabelled: Documents with another domain.
    """

    rows_a: Rows | slice
    rows_b: Rows | slice
    documents: int
    documents_differing: int
    documents_relabelled: int


def pairs_of_parts(a: Trace, b: Trace) -> list[tuple[int, list[int]]]:
    """For each part of the trace with fewer parts, the parts of the other that share a document with it.

    Read in this order, a part of the first is read once, and one of the other once for each part it shares documents
    with: about once if both traces have their documents in one order.
    """
    outer, inner = (a, b) if len(a.parts) <= len(b.parts) else (b, a)
    owner = dict(zip(inner.document_numbers.tolist(), inner.document_parts.tolist(), strict=True))
    partners: list[set[int]] = [set() for _ in outer.parts]
    for document, part in zip(outer.document_numbers.tolist(), outer.document_parts.tolist(), strict=True):
        if document in owner:
            partners[part].add(owner[document])
    return [(index, sorted(others)) for index, others in enumerate(partners)]


def match_rows(a: Part, b: Part, *, by_token_id: bool) -> PairOfParts:
    """Find the tokens that two parts share, by token id, or else by place alone; the parts have their token columns."""
    starts_a, starts_b = _sequence_starts(a), _sequence_starts(b)
    keys_a, keys_b = _sequence_keys(a, starts_a), _sequence_keys(b, starts_b)
    _, place_a, place_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    order = np.argsort(place_a)
    place_a, place_b = place_a[order], place_b[order]
    if not by_token_id:  # then a place means a token only where both have cut the document into the same sequences
        alike = a.position[starts_a[1:] - 1][place_a] == b.position[starts_b[1:] - 1][place_b]
        place_a, place_b = place_a[alike], place_b[alike]
        odd = np.union1d(np.setdiff1d(keys_a, keys_a[place_a]), np.setdiff1d(keys_b, keys_b[place_b])) >> np.uint64(32)
        kept = ~np.isin(keys_a[place_a] >> np.uint64(32), odd)
        place_a, place_b = place_a[kept], place_b[kept]
    if _whole(a, starts_a) and _whole(b, starts_b):
        lengths = np.minimum(np.diff(starts_a)[place_a], np.diff(starts_b)[place_b])
        rows_a, rows_b = _ranges(starts_a[place_a], lengths), _ranges(starts_b[place_b], lengths)
    else:
        rows_a, rows_b, lengths = _at_same_positions(a, b, (starts_a, place_a), (starts_b, place_b))
    firsts = np.cumsum(lengths) - lengths
    documents_differing = 0
    if by_token_id and len(rows_a):
        differs = a.token_id[rows_a] != b.token_id[rows_b]
        documents_differing = len(np.unique(a.document[rows_a[differs]]))
        if documents_differing:
            before = np.cumsum(differs)  # differences up to and with each row
            before -= np.repeat(before[firsts] - differs[firsts], lengths)
            rows_a, rows_b = rows_a[before == 0], rows_b[before == 0]
    document_a, row_of_a = np.unique(a.document[rows_a], return_index=True)
    names_a, names_b = np.array(a.domain_names, object), np.array(b.domain_names, object)
    relabelled = names_a[a.domain[rows_a[row_of_a]]] != names_b[b.domain[rows_b[row_of_a]]]
    whole = (len(rows_a) == a.num_tokens == b.num_tokens) and bool((rows_a == rows_b).all())
    return PairOfParts(
        slice(None) if whole else rows_a,
        slice(None) if whole else rows_b,
        len(document_a),
        documents_differing,
        int(relabelled.sum()),
    )


def _sequence_starts(part: Part) -> Rows:
    """Row at which each sequence starts, whatever is missing within it, with the number of rows at the end."""
    return np.union1d(run_starts(part.document), run_starts(part.sequence))


def _whole(part: Part, starts: Rows) -> bool:
    """Whether no token is missing at the beginning of a sequence or within one."""
    return not part.position[starts[:-1]].any() and len(starts) == len(part.sequence_starts())


def _ranges(first: Rows, lengths: Rows) -> Rows:
    """So many rows from each first one on, one range after the other."""
    return np.arange(lengths.sum()) + np.repeat(first - (np.cumsum(lengths) - lengths), lengths)


def _at_same_positions(a: Part, b: Part, *sequences: tuple[Rows, Rows]) -> tuple[Rows, Rows, Rows]:
    """Rows that have one position in sequences that belong together, and how many each such sequence has.

    Args:
        a: Part of the first trace.
        b: Part of the second trace.
        sequences: For each, the starts of its sequences, and which of these belong together, in the same order.
    """
    rows: list[Rows] = []
    keys: list[Any] = []
    for part, (starts, place) in zip((a, b), sequences, strict=True):
        lengths = np.diff(starts)[place]
        rows.append(_ranges(starts[place], lengths))
        keys.append(np.repeat(np.arange(len(place)), lengths) << 32 | part.position[rows[-1]].astype(np.int64))
    same, in_a, in_b = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    return rows[0][in_a], rows[1][in_b], np.bincount(same >> 32, minlength=len(sequences[0][1]))


def _sequence_keys(part: Part, starts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Document and sequence of each sequence in one number."""
    rows = starts[:-1]
    return part.document[rows].astype(np.uint64) << np.uint64(32) | part.sequence[rows].astype(np.uint64)


def same_corpus(a: Trace, b: Trace) -> bool | None:
    """Whether the headers say that both traces are of one corpus; None if one does not say."""
    fingerprints = [trace.header.corpus.get("fingerprint") for trace in (a, b)]
    return None if None in fingerprints else fingerprints[0] == fingerprints[1]


def selected(columns: NDArray[Any], rows: Rows | slice) -> NDArray[Any]:
    """Rows of a table of shape (token, choice) as (choice, token), contiguous by choice."""
    by_choice = columns.T
    return by_choice if isinstance(rows, slice) else np.ascontiguousarray(by_choice[:, rows])
