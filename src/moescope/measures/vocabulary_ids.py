"""Where each token id stands in a sample of documents: as the token itself, and as the token that follows.

The unit is the token. A token follows another only within a sequence. Every id's tokens are sorted once and serve all
layers, so no table of ids by experts is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.measures import vocabulary_kernels as kernels
from moescope.tallying.document_groups import document_groups
from moescope.tallying.document_sample import DocumentSample

BY = ("input", "next")
"""By what a choice is looked at: the token's own id, or the id of the token after it."""

MOST_DIRECT_ID = 2**22
"""Ids below this are looked up in a table, larger ones by bisection."""


@dataclass(frozen=True)
class TokenIds:
    """Ids of the tokens of a sample, read in one of the two ways.

    Attributes:
        id_T: The id by which each token is counted; -1 for none, shape (token,).
        group_T: Group of each token's document, shape (token,).
        document_T: Place of each token's document, shape (token,).
        num_groups: Number of groups.
    """

    id_T: NDArray[np.int64]
    group_T: NDArray[np.int32]
    document_T: NDArray[np.int32]
    num_groups: int

    @classmethod
    def of(cls, sample: DocumentSample, by: str) -> TokenIds:
        """The ids by one of `BY`; the sample must have token ids."""
        assert sample.token_id is not None
        id_T = sample.token_id.astype(np.uint32).astype(np.int64)
        if by == "next":
            id_T = np.append(id_T[1:], -1)
            id_T[sample.sequence_starts[1:] - 1] = -1
        used, place_G = np.unique(document_groups(sample.document), return_inverse=True)
        lengths = np.diff(sample.starts)
        group_T = np.repeat(place_G.astype(np.int32), lengths)
        return cls(id_T, group_T, sample.document_of_token(), max(1, len(used)))

    def frequent(self, min_count: int) -> IdRows:
        """The tokens of the ids that occur at least so often."""
        counted = self.id_T[self.id_T >= 0]
        if not len(counted):
            return self.rows(())
        if counted.max() < MOST_DIRECT_ID:
            occurrences = np.bincount(counted)
            return self.rows(np.flatnonzero(occurrences >= min_count))
        ids, occurrences = np.unique(counted, return_counts=True)
        return self.rows(ids[occurrences >= min_count])

    def rows(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> IdRows:
        """The tokens of some ids, which are different and ascending."""
        ids_X = np.asarray(ids, np.int64)
        if not len(ids_X):
            x_T = np.full(len(self.id_T), -1, np.int32)
        elif ids_X[-1] < MOST_DIRECT_ID:
            place = np.full(int(ids_X[-1]) + 2, -1, np.int32)
            place[ids_X] = np.arange(len(ids_X))
            x_T = place[np.where((self.id_T >= 0) & (self.id_T <= ids_X[-1]), self.id_T, ids_X[-1] + 1)]
        else:
            place_T = np.minimum(np.searchsorted(ids_X, self.id_T), len(ids_X) - 1)
            x_T = np.where(ids_X[place_T] == self.id_T, place_T, -1).astype(np.int32)
        starts, rows_R = kernels.sort_rows(x_T, self.group_T, len(ids_X), self.num_groups)
        return IdRows(ids_X, starts, rows_R, self.num_groups)


@dataclass(frozen=True)
class IdRows:
    """The tokens of some ids, in the order of `vocabulary_kernels.sort_rows`.

    Attributes:
        ids: The ids, ascending, shape (id,).
        starts: First row of each (id, group of documents), with the number of rows at the end.
        rows: The tokens, shape (row,).
        num_groups: Number of groups.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    rows: NDArray[np.int32]
    num_groups: int

    @property
    def occurrences(self) -> NDArray[np.int64]:
        """Tokens of each id."""
        return np.diff(self.starts[:: self.num_groups])
