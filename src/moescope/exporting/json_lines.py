"""JSON lines, one per token and layer, with the field names of routing loggers.

    {"domain": "ArXiv", "document": 17, "sequence": 0, "token_idx": 0, "token_id": 1169, "layer": 3, "num_experts": 8,
     "experts": [5, 2], "gating_probs": [0.61, 0.39]}

``token_idx`` is the position in the document, from 0, over all its sequences; ``experts`` are ordered by gate weight;
``gating_probs`` are gate weights as executed, which need not sum to 1, and missing if none were recorded. An id of
``num_experts`` or above is a null expert, -1 an assignment that was dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moescope.trace import Layer, Part, Trace
from moescope.trace.columns import NOT_RECORDED

ROWS_AT_A_TIME = 1024  # tokens whose lines are in memory at once: with 60 layers, some 10 MB of text


def write(trace: Trace, layers: tuple[Layer, ...], path: Path, _: str) -> None:
    """Write the layers of a trace to a file, token by token, those ascending in which the token was recorded."""
    weights = trace.header.weights
    with path.open("w", encoding="ascii", newline="\n") as file:
        for part in trace.iter_parts([layer.layer for layer in layers], weights=weights):
            starts = part.document_starts()
            positions = np.arange(part.num_tokens) - np.repeat(starts[:-1], np.diff(starts))
            for start in range(0, part.num_tokens, ROWS_AT_A_TIME):
                rows = slice(start, start + ROWS_AT_A_TIME)
                file.writelines(_lines(part.rows(rows), positions[rows], layers))


def _lines(part: Part, positions: NDArray[np.int64], layers: tuple[Layer, ...]) -> Iterator[str]:
    domains = [json.dumps(name) for name in part.domain_names]
    tokens = [
        f'{{"domain": {domains[domain]}, "document": {document}, "sequence": {sequence}, "token_idx": {position}, '
        f'"token_id": {token_id}, '
        for domain, document, sequence, position, token_id in zip(
            part.domain.tolist(),
            part.document.tolist(),
            part.sequence.tolist(),
            positions.tolist(),
            part.token_id.tolist(),
            strict=True,
        )
    ]
    columns: list[list[str]] = []
    for layer in layers:
        head = f'"layer": {layer.layer}, "num_experts": {layer.num_experts}, "experts": '
        ends = [f"{head}{ids}" if NOT_RECORDED not in ids else "" for ids in part.expert_ids[layer.layer].tolist()]
        if part.gate_weights:
            texts = _numbers(part.gate_weights[layer.layer])
            ends = [end and f'{end}, "gating_probs": [{text}]' for end, text in zip(ends, texts, strict=True)]
        columns.append(ends)
    for token, layers_of_token in zip(tokens, zip(*columns, strict=True), strict=True):
        for end in filter(None, layers_of_token):
            yield f"{token}{end}}}\n"


def _numbers(weights: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> list[str]:
    """Rows of weights, each as the shortest decimal that reads back as the same float32."""
    return [", ".join(row) for row in weights.astype(np.float32).astype("U32").tolist()]
