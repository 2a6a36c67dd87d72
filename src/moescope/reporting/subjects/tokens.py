"""Some documents with their tokens on the colours of their experts: Figure 8."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import pandas as pd

from moescope.reporting import figures
from moescope.reporting.chapters import TEXT
from moescope.reporting.documents import RoutedDocument, choose_documents, example_documents, read_chosen
from moescope.reporting.subject import PageFigure, Results, Subject
from moescope.reporting.visible import visible
from moescope.simulation.together import Job
from moescope.trace import Layer, Trace

MOST_EMBEDDED_CHOICES = 128
"""Choices a token that the page can hold."""


def play(results: Results) -> Job | None:
    """A sample of documents with the choices of `embedded_layers`."""
    if not results.has_text:
        return None
    layers = frozenset(layer.layer for layer in embedded_layers(results.trace, results.layers))
    chosen = choose_documents(results.trace, words=results.words)
    parts = frozenset(candidate.part for candidate in chosen)
    return Job(partial(read_chosen, chosen=chosen, layers=layers), layers, parts)


def blocks(found: list[RoutedDocument], results: Results) -> Iterator[PageFigure]:
    """Figure 8, which the page draws itself, from the documents."""
    layers = results.layers[:3]
    examples = example_documents(found, results.words)
    yield PageFigure(
        name="tokens",
        file="figure8-tokens",
        draw=lambda: figures.tokens.draw_tokens(examples, results.trace.select_layers(layers), results.words),
        label="Figure 8",
        title="Text on the colours of its experts",
        caption="First choice, a column a layer.",
        how="",
        cannot="",
        frame=tokens_frame(examples, layers),
    )


def embedded_layers(trace: Trace, shown: Iterable[int]) -> tuple[Layer, ...]:
    """Layers that the page lets a reader choose from: all, or as many as it can hold, evenly, the shown ones first."""
    by_number = {layer.layer: layer for layer in trace.layers}
    kept = list(dict.fromkeys(shown))
    others = [number for number in by_number if number not in kept]
    left = MOST_EMBEDDED_CHOICES - sum(by_number[number].top_k for number in kept)
    fitting = max(0, left // max(layer.top_k for layer in trace.layers))
    if fitting < len(others):
        others = [others[place * len(others) // fitting] for place in range(fitting)]
    return tuple(by_number[number] for number in sorted([*kept, *others]))


def tokens_frame(documents: Sequence[RoutedDocument], layers: Sequence[int]) -> pd.DataFrame:
    """A row a token, with the first-choice expert in each layer; -1 = dropped."""
    parts = [
        pd.DataFrame(
            {
                "document": document.number,
                "domain": document.domain,
                "token": np.arange(len(document.token_ids)),
                "token_id": document.token_ids,
                "text": [visible(text) for text in document.texts],
                **{f"layer_{layer}_expert_id": document.expert_ids[layer][:, 0] for layer in layers},
            }
        )
        for document in documents
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


subject = Subject(play=play, blocks=blocks, section=TEXT)
