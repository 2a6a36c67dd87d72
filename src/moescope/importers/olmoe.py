"""The JSON lines of OLMoE's routing analysis: ``input_ids, predicted_token_ids, exp_ids[token][choice][layer]``.

A document is a line, one sequence; choices are in order of router logit.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from moescope.errors import ImportMalformed
from moescope.importers.assembly import MAX_LAYERS
from moescope.importers.documents import ExpertId, TokenDocument, TokenId, integers
from moescope.importers.files import decode, find, lines, stem
from moescope.importers.findings import Findings, Options


class _Line(msgspec.Struct):
    input_ids: list[TokenId]
    exp_ids: list[list[list[ExpertId]]]


def read(paths: Sequence[Path], options: Options, findings: Findings) -> Generator[TokenDocument, None, None]:
    """One document per line."""
    for path in find(paths):
        for place, text in lines(path):
            line = decode(text, _Line, place)
            ids = integers(line.exp_ids, place, "exp_ids", ndim=3)
            tokens = np.array(line.input_ids, np.int64)
            if len(ids) != len(tokens):
                raise ImportMalformed(place, f"has {len(tokens)} input_ids, but {len(ids)} tokens of exp_ids")
            if ids.shape[2] > MAX_LAYERS:
                raise ImportMalformed(place, f"has {ids.shape[2]} layers, expected at most {MAX_LAYERS}")
            indices = options.layers if options.layers is not None else range(ids.shape[2])
            if len(ids) and len(indices) != ids.shape[2]:
                raise ImportMalformed(place, f"has {ids.shape[2]} layers, --layers names {len(indices)}")
            by_layer = {layer: ids[:, :, index].astype(np.int32) for index, layer in enumerate(indices)}
            yield TokenDocument(place, options.domain or stem(path), by_layer, token_ids=tokens, ranked=True)
