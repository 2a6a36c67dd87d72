"""Which tokens of a trace some of its layers cover, where a source did not record the choices of all of them.

Nothing can be said of a token whose choice is not known, and what follows it is not its next token. So what is measured
is the trace of the tokens that all asked-for layers cover, in which a run of them ends where one is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from moescope.errors import NotRecorded
from moescope.trace.columns import NOT_RECORDED
from moescope.trace.header import Layer
from moescope.trace.kept_rows import KeptRows
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
    parts = []
    for file in trace.parts:
        first_choices = file.read(partial, tokens=False).expert_ids.values()
        kept = np.all([ids[:, 0] != NOT_RECORDED for ids in first_choices], axis=0)
        if kept.any():
            parts.append(KeptRows(file, header, trace.layers, kept))
    if trace.parts and not parts:
        numbers = ", ".join(str(layer.layer) for layer in partial)
        raise NotRecorded(trace.path, f"no token was recorded in all of layers {numbers}", "choose fewer with --layers")
    return replace(trace, header=header, parts=tuple(parts))


def cover(trace: Trace, layer: Layer) -> float:
    """Fraction of the tokens of a trace whose choices in a layer were recorded."""
    if not layer.partial or not trace.num_tokens:
        return 1.0
    return sum(part.contents.recorded.get(layer.layer, 0) for part in trace.parts) / trace.num_tokens
