"""The rows of a part before a model has routed them, and what must hold of what it says; the same on every road."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ModelDamaged, RouterNotFinite
from moescope.recording.batches import Portion, Window
from moescope.trace import Header, Part


def unrouted(portion: Portion, cut: Sequence[Window], header: Header) -> Part:
    """A part whose token columns are filled and whose choices are not."""
    lengths = [len(token_ids) for _, token_ids in portion.documents]
    domains = {document.domain: None for document, _ in portion.documents}
    codes = {domain: code for code, domain in enumerate(domains)}
    shapes = {layer.layer: (portion.num_tokens, layer.top_k) for layer in header.layers}
    return Part(
        document=np.repeat(np.array([document.number for document, _ in portion.documents], np.uint32), lengths),
        domain=np.repeat(np.array([codes[document.domain] for document, _ in portion.documents]), lengths),
        domain_names=tuple(domains),
        sequence=np.repeat(
            np.array([window.sequence for window in cut], np.uint32), [len(window.token_ids) for window in cut]
        ),
        position=np.concatenate([np.arange(len(window.token_ids), dtype=np.uint32) for window in cut]),
        token_id=np.concatenate([window.token_ids for window in cut]),
        expert_ids={layer: np.empty(shape, np.int16) for layer, shape in shapes.items()},
        gate_weights={layer: np.empty(shape, np.float32) for layer, shape in shapes.items()} if header.weights else {},
        predictions={
            (layer.layer, distance): np.empty((portion.num_tokens, layer.num_predicted), np.int16)
            for layer in header.layers
            for distance in layer.lookahead
        },
    )


def check_token_ids(portion: Portion, num_embeddings: int | None, model_name: str) -> None:
    """Refuse token ids that the model does not know.

    Args:
        portion: The documents.
        num_embeddings: Token ids that the model knows; None if it does not say.
        model_name: What errors call it.
    Raises:
        ModelDamaged: The tokenizer gives ids beyond the model's embeddings.
    """
    largest = max((int(token_ids.max()) for _, token_ids in portion.documents), default=0)
    if num_embeddings is not None and largest >= num_embeddings:
        raise ModelDamaged(
            model_name,
            f"its tokenizer gives id {largest}, but the model knows {num_embeddings} ids",
            "is it the tokenizer of this model?",
        )


def check_finite(layer: int, gate_weights: NDArray[np.float32], rows: NDArray[np.int64], part: Part) -> None:
    """Refuse gate weights that are not numbers.

    Args:
        layer: Index of the layer.
        gate_weights: What it gave some tokens, shape (token, choice).
        rows: Their rows in the part, shape (token,).
        part: The part, which says where in the corpus they are.
    Raises:
        RouterNotFinite: One is NaN or infinite; its place is named.
    """
    if np.isfinite(gate_weights).all():
        return
    row = rows[~np.isfinite(gate_weights).all(axis=1)].min()
    raise RouterNotFinite(
        f"layer {layer}",
        f"a gate weight is NaN or infinite in document {part.document[row]}, sequence {part.sequence[row]}, position "
        f"{part.position[row]}",
        "the model's weights are damaged, or overflow in this dtype: does --dtype float32 help?",
    )
