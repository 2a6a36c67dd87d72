"""Sequences grouped into batches that go through a model together.

Batches are formed within a unit, so a unit comes out the same whether or not the same process recorded those before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Batching = Literal["padded", "equal", "alone"]


@dataclass(frozen=True)
class Batch:
    """Sequences that go through the model together, padded on the right to the longest.

    Attributes:
        input_ids: Added tokens, tokens and padding, shape (sequence, token).
        attention_mask: 0 for padding, shape (sequence, token); None if there is no padding.
        places: Places of the tokens to record in the flattened `input_ids`, shape (token,).
        rows: Their rows in the unit, shape (token,).
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64] | None
    places: NDArray[np.int64]
    rows: NDArray[np.int64]


def batches(
    sequences: Sequence[NDArray[np.uint32]],
    added_ids: Sequence[int],
    batch_tokens: int,
    batching: Batching = "padded",
) -> Iterator[Batch]:
    """Group sequences of similar length into batches, the longest first.

    Args:
        sequences: Token ids of the sequences of one unit, each of shape (token,).
        added_ids: Ids to put in front of each sequence.
        batch_tokens: Most tokens of a batch, padding included; a single longer sequence is a batch of its own.
        batching: Which sequences may go together without a change of a choice: any, ``padded`` to one length; those of
            ``equal`` length; or none, each ``alone``.
    """
    lengths = np.array([len(token_ids) for token_ids in sequences], np.int64)
    first_rows = lengths.cumsum() - lengths
    order = np.argsort(-lengths, kind="stable")  # equal lengths stay in corpus order
    if batching == "equal":  # lengths in the order in which they first appear
        groups = [np.flatnonzero(lengths == length) for length in dict.fromkeys(lengths.tolist())]
    else:
        groups = [order]
    batch_tokens = 1 if batching == "alone" else batch_tokens
    for group in groups:
        start = 0
        while start < len(group):
            length = len(added_ids) + int(lengths[group[start]])
            chosen = group[start : start + max(1, batch_tokens // length)]
            yield _pad([sequences[index] for index in chosen], first_rows[chosen], added_ids, length)
            start += len(chosen)


def _pad(
    sequences: Sequence[NDArray[np.uint32]], first_rows: NDArray[np.int64], added_ids: Sequence[int], length: int
) -> Batch:
    num_added = len(added_ids)
    input_ids = np.zeros((len(sequences), length), np.int64)
    input_ids[:, :num_added] = added_ids
    ends = np.array([num_added + len(token_ids) for token_ids in sequences])
    for index, token_ids in enumerate(sequences):
        input_ids[index, num_added : ends[index]] = token_ids
    columns = np.arange(length)
    recorded = (columns >= num_added) & (columns < ends[:, None])
    rows = first_rows[:, None] + columns - num_added
    mask = (columns < ends[:, None]).astype(np.int64) if ends.min() < length else None
    return Batch(input_ids, mask, np.flatnonzero(recorded), rows[recorded])
