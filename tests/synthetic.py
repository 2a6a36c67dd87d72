"""Made-up routing for tests: small parts and traces whose every number can be recomputed by a slow loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.counted import count_with
from moescope.tallying.counter import Counter, CountOptions, R
from moescope.trace import Counts, Header, Layer, Part, RowLabels, Trace, TraceWriter, Vocabulary, open_trace

VOCABULARY = Vocabulary.from_pieces([f" w{i}".encode() for i in range(50)])


def result_of(
    counter: type[Counter[R]], trace: Trace, layers: list[int] | None = None, threads: int | None = 1, **options: object
) -> R:
    """What one counter counts of a trace."""
    counts = count_with((counter,), trace, layers, CountOptions(**options), required=(counter,), threads=threads)
    return counts[counter]


def make_part(
    rng: np.random.Generator,
    layers: tuple[Layer, ...],
    lengths: list[int],
    *,
    window: int = 16,
    domains: tuple[str, ...] = ("ArXiv", "Github", "Wikipedia (en)"),
    first_document: int = 0,
    weights: bool = False,
    scores: bool = False,
    dropped: float = 0.0,
) -> Part:
    """Documents of the given lengths with random distinct experts a token; domains in turn."""
    num_tokens = sum(lengths)
    number = np.repeat(np.arange(len(lengths)), lengths)
    offset = np.concatenate([np.arange(length) for length in lengths])
    expert_ids, gate_weights = {}, {}
    for layer in layers:
        drawn = rng.random((num_tokens, layer.num_ids)) * rng.random(layer.num_ids)
        ids = np.argsort(-drawn, axis=1)[:, : layer.top_k].astype(np.int64)
        if dropped:
            ids[rng.random(ids.shape) < dropped] = -1
        expert_ids[layer.layer] = ids
        gate_weights[layer.layer] = -np.sort(-rng.random(ids.shape).astype(np.float32), axis=1)
    beside: dict[str, object] = {}
    if scores:
        numbers = [layer.layer for layer in layers]
        beside = {
            "cluster": RowLabels.of([f"book {(n + first_document) // 2}" for n in number.tolist()]),
            "label": RowLabels.of(rng.choice(["thinking", "answer", ""], num_tokens).tolist()),
            "margins": {layer: rng.normal(size=num_tokens).astype(np.float32) for layer in numbers},
            "masses": {layer: rng.random(num_tokens).astype(np.float32) for layer in numbers},
        }
    return Part(
        (number + first_document).astype(np.uint32),
        (number + first_document) % len(domains),
        domains,
        (offset // window).astype(np.uint32),
        (offset % window).astype(np.uint32),
        rng.integers(0, 50, num_tokens).astype(np.uint32),
        expert_ids,
        gate_weights if weights else {},
        **beside,
    )


def without_tokens(part: Part, mask: NDArray[np.bool_]) -> Part | None:
    """The part of the other tokens alone, as if what stands between two of them had been another window."""
    kept = ~mask
    if not kept.any():
        return None
    rows = part.rows(kept)
    sequence, position, number = [], [], -1
    for t in range(rows.num_tokens):
        new_document = t == 0 or rows.document[t] != rows.document[t - 1]
        follows = not new_document and rows.position[t] == rows.position[t - 1] + 1
        number = 0 if new_document else number + (not follows)
        sequence.append(number)
        position.append(position[-1] + 1 if follows else 0)
    return replace(rows, sequence=np.array(sequence, np.uint32), position=np.array(position, np.uint32))


def scored(part: Part) -> dict[str, bool]:
    """What a header says of the columns of `scores` that a part has."""
    given = {"clusters": part.cluster, "labels": part.label, "margins": part.margins, "masses": part.masses}
    return {name: bool(column) for name, column in given.items()}


def make_trace(
    path: Path, parts: list[Part], layers: tuple[Layer, ...], *, finish: bool = True, token_ids: bool = True
) -> Trace:
    """Write the parts as a trace; layers of which an assignment is dropped say so in the header."""
    layers = tuple(replace(a, drops=any((part.expert_ids[a.layer] == -1).any() for part in parts)) for a in layers)
    header = Header(
        layers,
        weights=bool(parts[0].gate_weights),
        token_ids=token_ids,
        phases=parts[0].phase is not None,
        **scored(parts[0]),
        model={"name": "synthetic"},
    )
    with TraceWriter(path, header, VOCABULARY) as writer:
        for part in parts:
            writer.write(part, {"documents_read": int(part.document.max()) + 1})
        if finish:
            writer.finish({"tokens": sum(part.num_tokens for part in parts)})
    return open_trace(path)


def make_counts(
    path: Path,
    loads: dict[int, dict[int, dict[int, int]]],
    layers: tuple[Layer, ...] = (),
    *,
    warnings: tuple[str, ...] = (),
) -> Trace:
    """Write a trace of counts; `loads` has document -> layer -> expert -> assignments, the domains in turn."""
    rows = [(g, layer, e, n) for g, by in loads.items() for layer, of in by.items() for e, n in of.items()]
    document, layer, expert, count = np.array(rows, np.int64).T
    names = ("ArXiv", "Github")
    layers = layers or tuple(Layer(int(at), 8, 2, ranked=False) for at in np.unique(layer))
    header = Header(layers, token_ids=False, counts_only=True, model={"name": "synthetic"})
    with TraceWriter(path, header, Vocabulary({})) as writer:
        writer.write(Counts(document, document % 2, names, layer, expert, count), {"documents_read": len(loads)})
        writer.finish({"warnings": list(warnings)} if warnings else {})
    return open_trace(path)
