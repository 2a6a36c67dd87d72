"""Attention without the blocks that its mask excludes: bit for bit the same, in less time.

On a CPU torch computes masked attention block by block and throws away what the mask excludes. Where a mask excludes
whole blocks, as that of a sliding window does in every longer sequence, they need not be computed: their weights are
exactly zero. Queries are taken `QUERIES` at a time, with the keys that any of them may see, rounded outwards to whole
blocks of the kernel, so that what is computed is computed in the same order. A kernel chooses its code, and with it the
order in which it adds, by the shapes alone; so the first call with some shapes is computed both ways and compared, and
shapes for which a single bit differs (remainders of a few queries, in float32) are left to torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moescope.engines.transformers.replacing import Replacing

QUERIES = 512
KEYS = 512
"""Keys of a block in torch's kernel (kvSplitSize of FlashAttentionKernel.cpp)."""

Span = tuple[int, int, int, int]


class SkipMaskedBlocks(Replacing):
    """While the ``with`` block lasts, attention of this thread skips what its mask excludes."""

    name: ClassVar[str] = "scaled_dot_product_attention"

    def __init__(self) -> None:
        self._known: deque[tuple[Tensor, list[Span] | None]] = deque(maxlen=4)
        self._same: dict[tuple[Any, ...], bool] = {}

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Attention as torch's function of that name."""
        mask = kwargs.get("attn_mask")
        if len(args) == 3 and mask is not None and not kwargs.get("is_causal") and not kwargs.get("dropout_p"):
            spans = self._spans_of(mask, args[0], args[1])
            if spans is not None:
                return self._by_spans(args, kwargs, spans)
        return scaled_dot_product_attention(*args, **kwargs)

    def _spans_of(self, mask: Tensor, query: Tensor, key: Tensor) -> list[Span] | None:
        """What to compute, found once a mask: the layers of a pass, or those of a kind, share it."""
        if query.device.type != "cpu" or query.dim() != 4 or mask.shape[-2:] != (query.shape[2], key.shape[2]):
            return None
        for known, spans in self._known:
            if known is mask:
                return spans
        self._known.append((mask, masked_spans(mask)))
        return self._known[-1][1]

    def _by_spans(self, tensors: tuple[Tensor, ...], kwargs: Mapping[str, Any], spans: Sequence[Span]) -> Tensor:
        """Attention by spans where it is known to be the same, else by torch, the first time both."""
        query, key, value = tensors
        shapes = (query.dtype, query.shape, key.shape, value.shape, *spans)
        if self._same.get(shapes) is False:
            return scaled_dot_product_attention(query, key, value, **kwargs)
        rest = {name: argument for name, argument in kwargs.items() if name != "attn_mask"}
        mask = kwargs["attn_mask"]
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)
        for start, end, low, high in spans:
            out[:, :, start:end] = scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, low:high],
                value[:, :, low:high],
                attn_mask=mask[:, :, start:end, low:high],
                **rest,
            )
        if shapes not in self._same:
            whole = scaled_dot_product_attention(query, key, value, **kwargs)
            self._same[shapes] = torch.equal(out, whole)
            return whole
        return out


def masked_spans(mask: Tensor) -> list[Span] | None:
    """The blocks of queries, each with the keys that it may see.

    Args:
        mask: True where a query sees a key, shape (sequence, head, query, key), the same for all sequences and heads.
    Returns:
        First query, end of queries, first key, end of keys; None if nothing can be left out or the mask is another.
    """
    if mask.dtype != torch.bool or mask.dim() != 4:
        return None
    if any(size > 1 and stride for size, stride in zip(mask.shape[:2], mask.stride()[:2], strict=True)):
        return None
    shared = mask[0, 0]
    num_queries, num_keys = shared.shape
    spans = []
    for start in range(0, num_queries, QUERIES):
        end = min(start + QUERIES, num_queries)
        seen = shared[start:end].any(0).nonzero()
        if not len(seen):
            return None
        low = int(seen[0]) // KEYS * KEYS
        high = min(-(-(int(seen[-1]) + 1) // KEYS) * KEYS, num_keys)
        spans.append((start, end, low, high))
    computed = sum((end - start) * (high - low) for start, end, low, high in spans)
    return spans if computed < num_queries * num_keys else None
