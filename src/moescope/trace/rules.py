"""The rules of a valid part beyond those of its columns: between its rows, between its columns, and with the header.

The writer, every reader and `verify` share them, so what one accepts all accept.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace.columns import DROPPED, MOST_TOKEN_COLUMNS, NOT_RECORDED, PHASES, columns, token_columns
from moescope.trace.counts import run_starts
from moescope.trace.header import Header, Layer
from moescope.trace.part import Part, RowLabels


def check(part: Part, header: Header) -> None:
    """Refuse a part that lacks something, has too much, or is not valid.

    Raises:
        ValueError: As `check_rows`; or the part is not what the header declares.
    """
    if part.num_tokens == 0:
        raise ValueError("a part holds at least one token")
    if header.counts_only or (part.phase is not None) != header.phases:
        raise ValueError("tokens and their phases must be given if and only if the header declares them")
    if set(part.expert_ids) != {layer.layer for layer in header.layers}:
        raise ValueError(f"expert ids are given for layers {sorted(part.expert_ids)}, the header has others")
    for name, given, declared in (
        ("gate weights", part.gate_weights, header.weights),
        ("clusters", part.cluster, header.clusters),
        ("labels", part.label, header.labels),
        ("margins", part.margins, header.margins),
        ("masses", part.masses, header.masses),
    ):
        if declared != bool(given):
            raise ValueError(f"{name} must be given if and only if the header declares them")
    if set(part.predictions) != {(layer.layer, distance) for layer in header.layers for distance in layer.lookahead}:
        raise ValueError("predictions must be given for exactly the layers and distances of the header")
    check_rows(part, header)


def check_rows(part: Part, header: Header) -> None:
    """Refuse rows that the format does not allow, in all columns that the part holds.

    Raises:
        ValueError: A number is out of range, a label has no name, an expert is chosen twice, a weight is not finite, or
            the rows are not whole documents in the order of their text.
    """
    most = {column.name: column.most for column in columns(header)[:MOST_TOKEN_COLUMNS]}
    names = {"domain": part.domain_names, "phase": PHASES}
    for name in token_columns(header):
        values = getattr(part, name)
        if isinstance(values, RowLabels):
            _check_numbers(f"column {name}", values.codes, (part.num_tokens,), 0, len(values.names) - 1)
        elif values is not None:
            highest = len(names[name]) - 1 if name in names else most[name]
            _check_numbers(f"column {name}", values, (part.num_tokens,), 0, highest)
    _check_order(part)
    for layer in header.layers:
        if layer.layer in part.expert_ids:
            _check_ids(f"layer {layer.layer}", part.expert_ids[layer.layer], layer, (part.num_tokens, layer.top_k))
        if layer.layer in part.gate_weights:
            weights = part.gate_weights[layer.layer]
            if weights.shape != (part.num_tokens, layer.top_k):
                raise ValueError(f"layer {layer.layer}: weights have shape {weights.shape}, not that of the ids")
            if not (finite := np.isfinite(weights)).all():
                row, rank = np.argwhere(~finite)[0]
                name = layer.weight_columns()[rank]
                raise ValueError(f"column {name}, row {row}: gate weight {weights[row, rank]} is not finite")
        for name, of_layer in ((layer.margin_column, part.margins), (layer.mass_column, part.masses)):
            if layer.layer in of_layer:
                _check_scores(f"column {name}", of_layer[layer.layer], part.num_tokens)
        for distance in layer.lookahead:
            if (layer.layer, distance) in part.predictions:
                shape = part.num_tokens, layer.num_predicted
                what = f"predictions of layer {layer.layer}"
                _check_ids(
                    what, part.predictions[layer.layer, distance], replace(layer, drops=False, partial=False), shape
                )


def _check_numbers(what: str, values: NDArray[Any], shape: tuple[int, ...], low: int, high: int | None) -> None:
    if values.shape != shape:
        raise ValueError(f"{what} has shape {values.shape}, expected {shape}")
    if values.dtype.kind not in "iu":
        raise ValueError(f"{what} holds {values.dtype}, expected whole numbers")
    if values.size and (values.min() < low or (high is not None and values.max() > high)):
        wrong = (values < low) | (values > (np.iinfo(values.dtype).max if high is None else high))
        row = tuple(np.argwhere(wrong)[0])
        raise ValueError(f"{what}, row {row[0]}: {values[row]} lies outside {low}..{high}")


def _check_scores(what: str, values: NDArray[Any], num_tokens: int) -> None:
    """Finite, and of a mass, which is a probability, from 0 to 1."""
    if values.shape != (num_tokens,):
        raise ValueError(f"{what} has shape {values.shape}, expected {(num_tokens,)}")
    wrong = ~np.isfinite(values) | (what.startswith("column S") & ((values < 0) | (values > 1)))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        expected = "0 to 1" if what.startswith("column S") else "a finite number"
        raise ValueError(f"{what}, row {row}: {values[row]}, expected {expected}")


def _check_ids(what: str, ids: NDArray[Any], layer: Layer, shape: tuple[int, int]) -> None:
    """Experts of the layer, none twice in a token; null experts, which run nothing, may be."""
    least = NOT_RECORDED if layer.partial else DROPPED if layer.drops else 0
    _check_numbers(what, ids, shape, least, layer.num_ids - 1)
    if layer.partial and (ids < 0).any():
        missing = ids == NOT_RECORDED
        half = missing.any(axis=1) != missing.all(axis=1)
        if not layer.drops:
            half |= (ids == DROPPED).any(axis=1)
        if half.any():
            row = int(np.flatnonzero(half)[0])
            raise ValueError(f"{what}, row {row}: {ids[row].tolist()} is neither recorded nor not recorded")
    for first, second in combinations(range(shape[1]), 2):
        if (same := ids[:, first] == ids[:, second]).any():
            expert = ids[:, first]
            same &= (expert >= 0) & (expert < layer.num_experts)
            if same.any():
                row = int(np.flatnonzero(same)[0])
                raise ValueError(
                    f"{what}, row {row}: expert {expert[row]} is chosen twice (ranks {first} and {second})"
                )


def _check_order(part: Part) -> None:
    """Documents are contiguous; in each, sequences count from 0 and so do the positions of each sequence.

    Only the first sequence may begin later: where a source left out the first tokens.
    """
    documents = part.document_starts()
    if len(np.unique(part.document[documents[:-1]])) != len(documents) - 1:
        raise ValueError("the rows of a document must be contiguous")
    if part.sequence[documents[:-1]].any():
        raise ValueError("a document starts with sequence 0")
    # Few rows do not advance by one position; only these may change the sequence or the document.
    jumps = np.flatnonzero(part.position[1:] != part.position[:-1] + 1) + 1
    sequences = run_starts(part.sequence)[1:-1]
    inner = np.setdiff1d(jumps, documents, assume_unique=True)  # where a document continues in its next sequence
    if (
        not np.isin(np.setdiff1d(sequences, documents), jumps).all()
        or part.position[inner].any()
        or (part.sequence[inner] != part.sequence[inner - 1] + 1).any()
    ):
        raise ValueError("the rows of a document must be in the order of its text")
    if not np.isin(run_starts(part.domain)[1:-1], documents).all():
        raise ValueError("a document has one domain")
    if part.cluster is not None and not np.isin(run_starts(part.cluster.codes)[1:-1], documents).all():
        raise ValueError("a document has one cluster")
