"""Which tokens of a trace some of its layers cover, where a source did not record the choices of all of them.

Nothing can be said of a token whose choice is not known, and what follows it is not its next token. So what is measured
is the trace of the tokens that all asked-for layers cover, in which a run of them ends where one is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import NotRecorded
from moescope.trace.columns import NOT_RECORDED, id_dtype
from moescope.trace.header import Header, Layer
from moescope.trace.part import Part
from moescope.trace.part_file import PartContents, PartFile
from moescope.trace.reader import Trace


def covered(trace: Trace, layers: Iterable[Layer]) -> Trace:
    """The tokens of a trace whose choices in all of some layers were recorded.

    Args:
        trace: The trace.
        layers: The layers to be looked at; the others must not be read.
    Returns:
        The trace itself if it lacks none; else one that reads the others away.
    Raises:
        NotRecorded: No token is covered by all of the layers.
        TraceDamaged: A page fails its checksum.
    """
    partial = [layer for layer in layers if layer.partial]
    if not partial:
        return trace
    whole = tuple(replace(layer, partial=layer.partial and layer not in partial) for layer in trace.layers)
    header = replace(trace.header, layers=whole)
    parts = [_CoveredPart(file, header, trace.layers, partial) for file in trace.parts]
    if not (kept := tuple(part for part in parts if part.kept.any())) and parts:
        numbers = ", ".join(str(layer.layer) for layer in partial)
        raise NotRecorded(trace.path, f"no token was recorded in all of layers {numbers}", "choose fewer with --layers")
    return replace(trace, header=header, parts=kept)


def cover(trace: Trace, layer: Layer) -> float:
    """Fraction of the tokens of a trace whose choices in a layer were recorded."""
    if not layer.partial or not trace.num_tokens:
        return 1.0
    return sum(part.contents.recorded.get(layer.layer, 0) for part in trace.parts) / trace.num_tokens


class _CoveredPart(PartFile):
    """The rows of a part that some layers cover."""

    def __init__(self, file: PartFile, header: Header, layers: Sequence[Layer], partial: Sequence[Layer]) -> None:
        super().__init__(file.path, header)
        self._file = file
        self._layers = {layer.layer: layer for layer in layers}
        first_choices = file.read(partial, tokens=False).expert_ids.values()
        self._bits = np.packbits(np.all([ids[:, 0] != NOT_RECORDED for ids in first_choices], axis=0))

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Which rows are covered."""
        return np.unpackbits(self._bits, count=self._file.num_tokens).astype(np.bool_)

    @property
    def num_tokens(self) -> int:
        """Rows that are covered."""
        return self.contents.rows

    @cached_property
    def contents(self) -> PartContents:
        """What the covered rows hold."""
        return PartContents.of(self.read((), tokens=False), self._header)

    def read(
        self,
        layers: Iterable[Layer],
        *,
        weights: bool = False,
        tokens: bool = True,
        predictions: bool = False,
        choices: bool = True,
    ) -> Part:
        """The covered rows, as `PartFile.read` gives them."""
        as_stored = [self._layers[layer.layer] for layer in layers]
        whole = self._file.read(as_stored, weights=weights, tokens=tokens, predictions=predictions, choices=choices)
        part = whole.rows(self.kept)
        narrow: dict[int, NDArray[np.integer[Any]]] = {}
        for number, ids in part.expert_ids.items():
            dtype: type[np.integer[Any]] = np.int32 if (ids < 0).any() else id_dtype(self._layers[number])
            narrow[number] = ids.astype(dtype, order="F")  # each rank contiguous, as a reader gives it
        return replace(part, expert_ids=narrow)
