"""Some rows of a part, as if it held no others: what a trace with some tokens left out is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moescope.trace.columns import id_dtype
from moescope.trace.counts import COUNT_COLUMNS, Counts
from moescope.trace.header import Header, Layer
from moescope.trace.part import Part
from moescope.trace.part_file import PartContents, PartFile


class KeptRows(PartFile):
    """Some rows of a part.

    Args:
        file: The part.
        header: Of the trace that has these rows alone.
        layers: The layers as `file` has them.
        kept: Which rows, shape (row,).
    """

    def __init__(self, file: PartFile, header: Header, layers: Iterable[Layer], kept: NDArray[np.bool_]) -> None:
        super().__init__(file.path, header)
        self._file = file
        self._as_stored = {layer.layer: layer for layer in layers}
        self._bits = np.packbits(kept)

    @property
    def _kept(self) -> NDArray[np.bool_]:
        return np.unpackbits(self._bits, count=self._file.num_tokens).astype(np.bool_)

    @property
    def num_tokens(self) -> int:
        """Rows that are kept."""
        return self.contents.rows

    @cached_property
    def contents(self) -> PartContents:
        """What the kept rows hold."""
        if self._header.counts_only:
            return PartContents.of(self.read_counts(), self._header)
        partial = [layer for layer in self._header.layers if layer.partial]
        return PartContents.of(self.read(partial, tokens=False), self._header)

    def read(
        self,
        layers: Iterable[Layer],
        *,
        weights: bool = False,
        tokens: bool = True,
        predictions: bool = False,
        choices: bool = True,
        scores: bool = False,
    ) -> Part:
        """The kept rows, as `PartFile.read` gives them."""
        as_stored = [self._as_stored[layer.layer] for layer in layers]
        whole = self._file.read(
            as_stored, weights=weights, tokens=tokens, predictions=predictions, choices=choices, scores=scores
        )
        part = whole.rows(self._kept)
        narrow: dict[int, NDArray[np.integer]] = {}
        for number, ids in part.expert_ids.items():
            dtype: type[np.integer] = np.int32 if (ids < 0).any() else id_dtype(self._as_stored[number])
            narrow[number] = ids.astype(dtype, order="F")  # each rank contiguous, as a reader gives it
        return replace(part, expert_ids=narrow)

    def read_counts(self) -> Counts:
        """The kept rows of a part of a trace of counts, and the names of their domains."""
        counts, kept = self._file.read_counts(), self._kept
        columns = {name: getattr(counts, name)[kept] for name in COUNT_COLUMNS}
        used, columns["domain"] = np.unique(columns["domain"], return_inverse=True)
        return replace(counts, domain_names=tuple(counts.domain_names[code] for code in used), **columns)
