"""The JSON of GPT-OSS-MoE-ExpertFingerprinting: text pieces, and the experts of generated tokens with probabilities.

A document is an example, one sequence of generated tokens. The files hold pieces of text and no vocabulary ids; pieces
are numbered in order of appearance, if there are as many as the rows require.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from moescope.errors import ImportMalformed
from moescope.importers.documents import ExpertId, TokenDocument
from moescope.importers.files import find, number, objects, stem
from moescope.importers.findings import Findings, Options


class _LayerChoice(msgspec.Struct):
    selected_experts: list[ExpertId]
    selected_probs: list[float] = []


class _Example(msgspec.Struct):
    router_data: list[dict[str, dict[str, _LayerChoice]]]
    full_text: list[str] | str = []
    category: str = ""


def read(paths: Sequence[Path], options: Options, findings: Findings) -> Generator[TokenDocument, None, None]:
    """One document per example."""
    numbers: dict[str, int] = {}
    for path in find(paths):
        for place, example in objects(path, _Example):
            document = _document(place, example, options.domain or example.category or stem(path), numbers, findings)
            if document is not None:
                yield document


def _document(
    place: str, example: _Example, domain: str, numbers: dict[str, int], findings: Findings
) -> TokenDocument | None:
    table: list[tuple[int, dict[int, _LayerChoice]]] = []
    for index, entry in enumerate(example.router_data):
        if len(entry) != 1:
            raise ImportMalformed(f"{place}, row {index}", f"has {len(entry)} tokens, expected one")
        ((name, layers),) = entry.items()
        token = number(name.removeprefix("token_"), f"{place}, row {index}", "token")
        by_layer = {
            number(key.removeprefix("layer_"), f"{place}, {name[:40]}", "layer", high=65535): choice
            for key, choice in layers.items()
        }
        table.append((token, by_layer))
    if not table:
        findings.count("examples without routing were left out")
        return None
    expected_layers = set(table[0][1])
    tokens = np.array([token for token, _ in table], np.int64)
    if (np.diff(tokens) <= 0).any():
        raise ImportMalformed(place, "has tokens out of order")
    ids, weights = {}, {}
    has_weights = all(choice.selected_probs for _, layers in table for choice in layers.values())
    for layer in sorted(expected_layers):
        top_k = len(table[0][1][layer].selected_experts)
        if not top_k:
            raise ImportMalformed(f"{place}, layer {layer}", "has no experts")
        ids[layer] = np.full((len(table), top_k), -1, np.int32)
        weights[layer] = np.zeros((len(table), top_k), np.float32)
        for row, (token, choices) in enumerate(table):
            choice = choices.get(layer)
            if choice is None or set(choices) != expected_layers:
                raise ImportMalformed(
                    f"{place}, token {token}", f"has layers {sorted(choices)[:8]}…, expected {len(expected_layers)}"
                )
            if len(choice.selected_experts) != top_k or (has_weights and len(choice.selected_probs) != top_k):
                raise ImportMalformed(
                    f"{place}, token {token}, layer {layer}",
                    f"has {len(choice.selected_experts)} experts and {len(choice.selected_probs)} probabilities, "
                    f"expected {top_k}",
                )
            ids[layer][row] = choice.selected_experts
            if has_weights:
                weights[layer][row] = choice.selected_probs
    token_ids, pieces = None, {}
    text = example.full_text
    if isinstance(text, list) and len(text) == tokens[-1] + 2:  # the last token was never an input
        token_ids = np.array([numbers.setdefault(text[token], len(numbers)) for token in tokens], np.int64)
        pieces = {numbers[text[token]]: text[token].encode(errors="replace") for token in tokens}
    else:
        findings.count("examples have a different number of text pieces than tokens, so their token ids are unknown")
    return TokenDocument(
        place,
        domain,
        ids,
        weights if has_weights else {},
        token_ids,
        np.append(True, np.diff(tokens) != 1),
        np.ones(len(table), np.uint8),
        ranked=True,
        pieces=pieces,
    )
