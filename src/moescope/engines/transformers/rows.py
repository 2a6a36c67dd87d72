"""Linear layers whose rows are filled up to whole blocks: bit for bit the same, in less time.

For bfloat16 on a CPU torch asks oneDNN, which compiles a kernel for each new shape. Experts meet a new number of tokens
on nearly every call, so a small model spends a good part of its time on kernels that are used once. Rows are filled up
with zeros to a multiple of `ROWS`, and the same few kernels serve all calls. A row of the product depends on its own
row of the input alone; that its bits do, too, is seen for each layer shape on the first `CHECKED` calls, which are
computed both ways, and a shape for which one bit differs is left to torch.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from moescope.engines.transformers.replacing import Replacing

ROWS = 64
CHECKED = 4


class FillRows(Replacing):
    """While the ``with`` block lasts, this thread's linear layers over rows of tokens fill them up."""

    name: ClassVar[str] = "linear"

    def __init__(self) -> None:
        self._checked: Counter[torch.Size] = Counter()
        self._differs: set[torch.Size] = set()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """A linear layer as torch's function of that name."""
        if kwargs or not _worth_it(*args):
            return linear(*args, **kwargs)
        rows, weight, *bias = args
        if weight.shape in self._differs:
            return linear(rows, weight, *bias)
        filled = linear(pad(rows, (0, 0, 0, -len(rows) % ROWS)), weight, *bias)[: len(rows)]
        if self._checked[weight.shape] < CHECKED:
            self._checked[weight.shape] += 1
            exact = linear(rows, weight, *bias)
            if not torch.equal(filled, exact):
                self._differs.add(weight.shape)
            return exact
        return filled


def _worth_it(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN would compile a kernel for this number of rows, and few are to be added."""
    return (
        rows.dim() == 2
        and rows.dtype == torch.bfloat16
        and rows.device.type == "cpu"
        and len(rows) >= ROWS
        and len(rows) % ROWS != 0
    )
