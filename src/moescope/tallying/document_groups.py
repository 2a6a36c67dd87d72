"""Random groups of documents, for intervals of what is no ratio: entropy, Gini, mutual information, a lift.

Every document falls into one of a few groups by a hash of its number, so counts by group merge exactly, and the
variation between groups gives the error bar of any function of the counts, with documents as the sampling unit
(Wolter 2007, Introduction to Variance Estimation, chapter 2). Groups are few whatever the number of documents.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.token_sample import token_hashes

NUM_GROUPS = 32
"""Groups where memory allows: intervals then have Student's t with at most 31 degrees of freedom."""

FEWEST_GROUPS = 8

_SALT = 2**32 - 1  # no place in a document, so a document's group says nothing of which of its tokens are sampled


def document_groups(document: NDArray[np.integer[Any]], num_groups: int = NUM_GROUPS) -> NDArray[np.int64]:
    """Group of each document number, from 0."""
    hashes = token_hashes(document, np.full(len(document), _SALT, np.int64))
    return (hashes % np.uint64(num_groups)).astype(np.int64)


def affordable_groups(cells: int, budget: int = 2**28) -> int:
    """Groups for a table of so many cells of 32 bits a group, within the budget of bytes.

    Example:
        >>> affordable_groups(32 * 8 * 8), affordable_groups(60 * 256 * 256), affordable_groups(60 * 512 * 512)
        (32, 17, 8)
    """
    return max(FEWEST_GROUPS, min(NUM_GROUPS, budget // (4 * max(cells, 1))))
