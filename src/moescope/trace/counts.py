"""Counts without tokens, from a source that kept only loads; the unit is the assignment.

A row is the number of assignments that one expert of one layer received in one document. For a source without
documents, a document is the unit in which it counted: a forward pass, a file. Experts without assignments have no row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace.header import Header

COUNT_COLUMNS = ("document", "domain", "layer", "expert", "count")
COUNTS_HINT = (
    "`moescope shares`, `divergence`, `balance`, `claims`, `report`, `placement` and `export hot-experts` work on "
    "counts; what needs tokens, their order or their words does not"
)


@dataclass(frozen=True)
class Counts:
    """Rows of a trace of counts; a document's rows are contiguous.

    Attributes:
        document: The unit of counting, from 0, shape (row,).
        domain: Code of the domain, an index into `domain_names`, shape (row,).
        domain_names: RowLabels of the domains.
        layer: Index in the whole model, shape (row,).
        expert: Expert id, shape (row,).
        count: Assignments that it received, at least 1, shape (row,).
    """

    document: NDArray[np.int64]
    domain: NDArray[np.integer]
    domain_names: tuple[str, ...]
    layer: NDArray[np.int64]
    expert: NDArray[np.int64]
    count: NDArray[np.int64]

    def document_starts(self) -> NDArray[np.int64]:
        """Row at which each document starts, with the number of rows at the end, shape (document + 1,)."""
        return run_starts(self.document)


def check_counts(counts: Counts, header: Header) -> None:
    """Refuse counts that contradict the header or the format.

    Raises:
        ValueError: A layer or an expert does not exist, a number is not positive, or a row occurs twice.
    """
    columns = (counts.document, counts.domain, counts.layer, counts.expert, counts.count)
    if not header.counts_only or not len(counts.document) or len({column.shape for column in columns}) != 1:
        raise ValueError("counts need a header of counts, at least one row, and columns of one length")
    if counts.document.min() < 0 or counts.domain.min() < 0 or counts.domain.max() >= len(counts.domain_names):
        raise ValueError("document or domain is below 0, or the domain has no name")
    if counts.count.min() < 1 or counts.count.max() >= 2**53:
        raise ValueError(f"a count is {counts.count.min()} or {counts.count.max()}, expected 1 to 2**53 - 1")
    num_ids = {layer.layer: layer.num_ids for layer in header.layers}
    if unknown := set(np.unique(counts.layer).tolist()) - set(num_ids):
        raise ValueError(f"layer {min(unknown)} is not in the header")
    limits = np.zeros(max(num_ids) + 1, np.int64)
    limits[list(num_ids)] = list(num_ids.values())
    if counts.expert.min() < 0 or (counts.expert >= limits[counts.layer]).any():
        raise ValueError("an expert id is outside those of its layer")
    starts = counts.document_starts()[:-1]
    if len(np.unique(counts.document[starts])) != len(starts):
        raise ValueError("the rows of a document must be contiguous")
    if not np.isin(np.flatnonzero(np.diff(counts.domain)) + 1, starts).all():
        raise ValueError("a document has one domain")
    keys = np.stack([counts.document, counts.layer, counts.expert])
    if len(np.unique(keys, axis=1).T) != len(counts.document):
        raise ValueError("an expert of a layer has two rows in one document")


def run_starts(values: NDArray[Any]) -> NDArray[np.int64]:
    """Indices at which a new run of equal values starts, with the length at the end."""
    if not len(values):
        return np.zeros(1, np.int64)
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    return np.concatenate([[0], changes, [len(values)]]).astype(np.int64)
