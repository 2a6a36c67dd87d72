"""Where each token id stands in a sample of documents: as the token itself, and as the token that follows.

The unit is the token. A token follows another only within a sequence. Every id's tokens are sorted once and serve all
layers, so no table of ids by experts is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """Ids of the tokens of a sample, read in one of the two ways, and the tokens of those that are looked at.

    Attributes:
        id_T: The id by which each token is counted; -1 for none, shape (token,).
        document_T: Place of each token's document, shape (token,).
        size_G: Tokens that have an id, by group of documents, shape (group,).
        frequent: The tokens of the frequent ids.
        asked: The tokens of the ids asked for.
    """

    id_T: NDArray[np.int64]
    document_T: NDArray[np.int32]
    size_G: NDArray[np.int64]
    frequent: IdRows
    asked: IdRows

    @classmethod
    def of(cls, sample: DocumentSample, by: str, min_count: int, wanted: Sequence[int]) -> TokenIds:
        """The ids by one of `BY`: those that occur at least so often, and those asked for, different and ascending."""
        assert sample.token_id is not None
        id_T = sample.token_id.astype(np.uint32).astype(np.int64)
        if by == "next":
            id_T = np.append(id_T[1:], -1)
            id_T[sample.sequence_starts[1:] - 1] = -1
        used, place_G = np.unique(document_groups(sample.document), return_inverse=True)
        num_groups = max(1, len(used))
        group_T = np.repeat(place_G.astype(np.int32), np.diff(sample.starts))
        size_G = np.bincount(group_T[id_T >= 0], minlength=num_groups)
        rows = (IdRows.of(id_T, ids_X, group_T, num_groups) for ids_X in (_frequent(id_T, min_count), wanted))
        return cls(id_T, sample.document_of_token(), size_G, *rows)


def _frequent(id_T: NDArray[np.int64], min_count: int) -> NDArray[np.int64]:
    counted = id_T[id_T >= 0]
    if counted.max(initial=0) < MOST_DIRECT_ID:
        return np.flatnonzero(np.bincount(counted) >= min_count)
    ids, occurrences = np.unique(counted, return_counts=True)
    return ids[occurrences >= min_count]


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

    @classmethod
    def of(
        cls,
        id_T: NDArray[np.int64],
        ids: Sequence[int] | NDArray[np.int64],
        group_T: NDArray[np.int32],
        num_groups: int,
    ) -> IdRows:
        """The tokens of some ids, which are different and ascending."""
        ids_X = np.asarray(ids, np.int64)
        if not len(ids_X):
            x_T = np.full(len(id_T), -1, np.int32)
        elif ids_X[-1] < MOST_DIRECT_ID:
            place = np.full(int(ids_X[-1]) + 2, -1, np.int32)
            place[ids_X] = np.arange(len(ids_X))
            x_T = place[np.where((id_T >= 0) & (id_T <= ids_X[-1]), id_T, ids_X[-1] + 1)]
        else:
            place_T = np.minimum(np.searchsorted(ids_X, id_T), len(ids_X) - 1)
            x_T = np.where(ids_X[place_T] == id_T, place_T, -1).astype(np.int32)
        starts, rows_R = kernels.sort_rows(x_T, group_T, len(ids_X), num_groups)
        return cls(ids_X, starts, rows_R, num_groups)

    @property
    def occurrences(self) -> NDArray[np.int64]:
        """Tokens of each id."""
        return np.diff(self.starts[:: self.num_groups])
