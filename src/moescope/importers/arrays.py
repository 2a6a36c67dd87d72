"""Plain numpy arrays as a trace, for routing that is in memory."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moescope.importers.documents import ModelFacts, TokenDocument
from moescope.importers.findings import Findings, Options
from moescope.importers.writing import write
from moescope.trace import RowLabels, Trace, Vocabulary
from moescope.trace.counts import run_starts


def from_arrays(
    path: str | Path,
    expert_ids: Mapping[int, ArrayLike] | ArrayLike,
    *,
    num_experts: int,
    layers: Sequence[int] | None = None,
    gate_weights: Mapping[int, ArrayLike] | ArrayLike | None = None,
    token_ids: ArrayLike | None = None,
    documents: ArrayLike | None = None,
    sequences: ArrayLike | None = None,
    domains: str | Sequence[str] = "arrays",
    phases: ArrayLike | None = None,
    clusters: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    margins: Mapping[int, ArrayLike] | ArrayLike | None = None,
    masses: Mapping[int, ArrayLike] | ArrayLike | None = None,
    ranked: bool = False,
    model: str = "",
    vocabulary: Vocabulary | None = None,
    force: bool = False,
) -> Trace:
    """Write arrays as a trace.

    Args:
        path: Folder of the trace to write.
        expert_ids: Chosen experts, ids from 0, -1 where no expert ran, -2 where a token was not recorded in a layer:
            shape (layer, token, choice), or for each layer an array of shape (token, choice).
        num_experts: Routed experts of a layer.
        layers: Index of each layer in the whole model; by default from 0. Not with a mapping.
        gate_weights: Factors that multiplied the experts' outputs, shaped like `expert_ids`; choices are sorted by
            them, the largest first.
        token_ids: Vocabulary ids, shape (token,).
        documents: Document of each token, shape (token,); the tokens of a document are contiguous. By default, one
            document.
        sequences: Sequence of each token, shape (token,); pairs of tokens never cross sequences.
        domains: The label of all documents, or one per token.
        phases: Whether a token was generated (1) or part of a prompt (0), shape (token,).
        clusters: What the document of each token is a piece of (a book, a file, a repository), one per token.
        labels: A label per token: its role, its modality, thinking or answer.
        margins: Selection score of the last chosen expert minus that of the first not chosen, bias included, in the
            router's unit: shape (layer, token), or for each layer an array of shape (token,).
        masses: Router probability of a token's chosen experts together, from 0 to 1, shaped like `margins`.
        ranked: Whether choices are in order of gate weight; not needed with gate weights.
        model: Name of the model.
        vocabulary: Text pieces of the token ids.
        force: Replace a finished trace.
    Returns:
        The finished trace.
    Raises:
        ValueError: Shapes do not fit, or a document's tokens do not follow each other.
        ImportMalformed: A value cannot be right, such as an id beyond the experts or an expert chosen twice.
        TraceExists: There is a finished trace already.
    """
    by_layer = _by_layer(expert_ids, layers, "iu")
    shapes = {layer: ids.shape for layer, ids in by_layer.items()}
    if not shapes or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"expert_ids must be (layer, token, choice), or (token, choice) per layer, found {shapes}")
    num_tokens = next(iter(shapes.values()))[0]
    if any(shape[0] != num_tokens for shape in shapes.values()) or not num_tokens:
        raise ValueError(f"all layers must have the same tokens, at least one, found {shapes}")
    weights = {} if gate_weights is None else _by_layer(gate_weights, layers, "fiu")
    if weights and {layer: array.shape for layer, array in weights.items()} != shapes:
        raise ValueError("gate_weights must be shaped like expert_ids")
    given = {"token_ids": token_ids, "documents": documents, "sequences": sequences, "phases": phases}
    columns = {name: None if values is None else np.asarray(values) for name, values in given.items()}
    for name, column in columns.items():
        if column is not None and (column.shape != (num_tokens,) or column.dtype.kind not in "iub"):
            raise ValueError(f"{name} must be {num_tokens} whole numbers, found {column.dtype} of shape {column.shape}")
    names = {"domains": None if isinstance(domains, str) else domains, "clusters": clusters, "labels": labels}
    named = {name: None if values is None else RowLabels.of(list(map(str, values))) for name, values in names.items()}
    for name, of_tokens in named.items():
        if of_tokens is not None and len(of_tokens.codes) != num_tokens:
            raise ValueError(f"{name} must be one per token, {num_tokens}, found {len(of_tokens.codes)}")
    scores: dict[str, dict[int, NDArray[Any]]] = {}
    for name, array in (("margins", margins), ("masses", masses)):
        scores[name] = {} if array is None else _by_layer(array, layers, "fiu")
        for layer, of_layer in scores[name].items():
            if of_layer.shape != (num_tokens,) or not np.isfinite(of_layer).all():
                raise ValueError(f"{name} of layer {layer} must be {num_tokens} finite numbers")
        if scores[name] and set(scores[name]) != set(shapes):
            raise ValueError(f"{name} must be given for the layers of expert_ids")
    if any(((array < 0) | (array > 1)).any() for array in scores["masses"].values()):
        raise ValueError("masses are probabilities, from 0 to 1")
    if columns["phases"] is not None and not np.isin(columns["phases"], (0, 1)).all():
        raise ValueError("phases must be 0 (prompt) or 1 (generated)")

    sequence, phase = columns["sequences"], columns["phases"]
    whole = TokenDocument(
        "arrays",
        domains if isinstance(domains, str) else "",
        by_layer,
        weights,
        columns["token_ids"],
        None if sequence is None else np.append(True, np.diff(sequence) != 0),
        None if phase is None else phase.astype(np.uint8),
        ranked=ranked,
        none_is_dropped=True,
        model=ModelFacts(model, num_experts),
        label=named["labels"],
        margins=scores["margins"],
        masses=scores["masses"],
    )

    def read() -> Generator[TokenDocument, None, None]:
        numbers = columns["documents"]
        bounds = np.array([0, num_tokens]) if numbers is None else run_starts(numbers)
        if numbers is not None and len(np.unique(numbers[bounds[:-1]])) != len(bounds) - 1:
            raise ValueError("the tokens of a document must be contiguous")
        for start, end in pairwise(bounds.tolist()):
            own = replace(whole.rows(slice(start, end)), place=f"arrays, tokens {start} to {end - 1}")
            for name, field in (("domains", "domain"), ("clusters", "cluster")):
                if (labels := named[name]) is not None:
                    codes = labels.codes[start:end]
                    if (codes != codes[0]).any():
                        raise ValueError(f"a document has one of {name}; tokens {start} to {end - 1} have several")
                    own = replace(own, **{field: labels.names[codes[0]]})
            yield own

    corpus = {"name": "arrays", "format": "arrays", "fingerprint": None}
    run = {"importer": "arrays", "source": "numpy"}
    return write(Path(path), read(), Options(), Findings(), corpus=corpus, run=run, vocabulary=vocabulary, force=force)


def _by_layer(
    values: Mapping[int, ArrayLike] | ArrayLike, layers: Sequence[int] | None, kinds: str
) -> dict[int, NDArray[Any]]:
    if isinstance(values, Mapping):
        if layers is not None:
            raise ValueError("layers are the keys of a mapping already")
        arrays = {int(layer): np.asarray(array) for layer, array in sorted(values.items())}
    else:
        array = np.asarray(values)
        indices = range(len(array)) if layers is None else layers
        if len(indices) != len(array):
            raise ValueError(f"layers must be {len(array)} indices, found {len(indices)}")
        arrays = dict(zip(map(int, indices), array, strict=True))
    for layer, array in arrays.items():
        if array.dtype.kind not in kinds:
            raise ValueError(f"layer {layer} holds {array.dtype}, expected numbers of kind {kinds!r}")
    return arrays
