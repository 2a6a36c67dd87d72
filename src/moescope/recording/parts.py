"""A part of a trace: what the documents say of its rows, and what an engine says was chosen for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moescope.engines.protocol import Engine, NotFinite, Routed, Unit
from moescope.errors import ModelDamaged, RouterNotFinite
from moescope.recording.portions import Portion, Window, windows
from moescope.trace import Part


def unit_of(portion: Portion, number: int, engine: Engine) -> Unit:
    """What the engine is given to read for a part.

    Raises:
        ModelDamaged: The tokenizer gives ids that the model does not know.
    """
    largest = max((int(token_ids.max()) for _, token_ids in portion.documents), default=0)
    if engine.num_embeddings is not None and largest >= engine.num_embeddings:
        raise ModelDamaged(
            engine.description["name"],
            f"its tokenizer gives id {largest}, but the model knows {engine.num_embeddings} ids",
            "is it the tokenizer of this model?",
        )
    return Unit(number, tuple(window.token_ids for window in cut(portion, engine)))


def cut(portion: Portion, engine: Engine) -> list[Window]:
    """The windows of a part, as long as the engine reads them beside the tokens that it adds."""
    return windows(portion, engine.window - len(engine.tokenizer.added_ids))


def record_part(engine: Engine, portion: Portion, number: int, advance: Callable[[int], None] = lambda _: None) -> Part:
    """Record one part; what it holds depends on nothing that was recorded before it.

    The engine is inside its ``with`` block, and `advance` called after every forward pass with the tokens it read.

    Raises:
        RouterNotFinite: A gate weight is NaN or infinite; its place in the corpus is named.
        MoescopeError: The model is at fault.
    """
    unit = unit_of(portion, number, engine)
    try:
        routed = engine.record(unit, advance)
    except NotFinite as error:
        raise not_finite(error, portion, engine) from None
    return _part(portion, engine, routed)


def not_finite(error: NotFinite, portion: Portion, engine: Engine) -> RouterNotFinite:
    """The error that says where in the corpus a gate weight is not a number."""
    part = _part(portion, engine, Routed({}, {}, {}))
    document, sequence, position = (
        int(getattr(part, name)[error.row]) for name in ("document", "sequence", "position")
    )
    return RouterNotFinite(
        f"layer {error.layer}",
        f"a gate weight is NaN or infinite in document {document}, sequence {sequence}, position {position}",
        "the model's weights are damaged, or overflow in this dtype: does --dtype float32 help?",
    )


def _part(portion: Portion, engine: Engine, routed: Routed) -> Part:
    sequences = cut(portion, engine)
    lengths = [len(token_ids) for _, token_ids in portion.documents]
    domains = {document.domain: None for document, _ in portion.documents}
    codes = {domain: code for code, domain in enumerate(domains)}
    return Part(
        document=np.repeat(np.array([document.number for document, _ in portion.documents], np.uint32), lengths),
        domain=np.repeat(np.array([codes[document.domain] for document, _ in portion.documents]), lengths),
        domain_names=tuple(domains),
        sequence=np.repeat(
            np.array([window.sequence for window in sequences], np.uint32),
            [len(window.token_ids) for window in sequences],
        ),
        position=np.concatenate([np.arange(len(window.token_ids), dtype=np.uint32) for window in sequences]),
        token_id=np.concatenate([window.token_ids for window in sequences]),
        expert_ids=routed.expert_ids,
        gate_weights=routed.gate_weights,
        predictions=routed.predictions,
    )
