"""Everything a report shows, gathered from a trace: the measures, the claims, and some documents to look at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xarray as xr

from moescope.errors import NoSuchDocument
from moescope.measures import Claim, claims, divergence, repeats, shares, words
from moescope.reporting.documents import RoutedDocument, sample_documents
from moescope.tallying import tally
from moescope.trace import Layer, Trace

WORDS = ("self", "Question")
"""The words that section 5 of the paper speaks of; indentation is the third."""


@dataclass(frozen=True)
class Results:
    """What a report is made of.

    Attributes:
        trace: The trace.
        layers: Layers that tables and figures with a panel a layer show.
        words_asked: Words of the claims about words, without indentation.
        shares: Of `moescope.shares`, of all recorded layers, as are the next three.
        repeats: Of `moescope.repeats`; None for a trace of counts.
        divergence: Of `moescope.divergence`.
        words: Of `moescope.words`; None where the trace lacks token ids, or the order of the choices.
        claims: Of `moescope.claims`.
        documents: A sample of documents with the choices of `embedded_layers`; none where `words` is None.
        embedded_layers: Layers the documents hold.
    """

    trace: Trace
    layers: tuple[int, ...]
    words_asked: tuple[str, ...]
    shares: xr.Dataset
    repeats: xr.Dataset | None
    divergence: xr.Dataset
    words: xr.Dataset | None
    claims: list[Claim]
    documents: list[RoutedDocument]
    embedded_layers: tuple[Layer, ...]

    @property
    def warnings(self) -> list[str]:
        """What an importer found odd in the trace's source."""
        found = (self.trace.summary or {}).get("warnings", [])
        return [str(warning) for warning in found] if isinstance(found, list) else []


def gather(trace: Trace, layers: Iterable[int] | None = None, words_asked: Sequence[str] = WORDS) -> Results:
    """Measure a trace for a report.

    Args:
        trace: The trace.
        layers: Layers to show where each has a panel; None for the first, the middle and the last recorded.
        words_asked: Words whose experts are asked for; indentation is always asked for.
    Raises:
        NoSuchLayer: A layer was not recorded.
        TraceDamaged: A page fails its checksum.
    """
    shown = shown_layers(trace, layers)
    counts = tally(trace)
    of_shares, of_divergence = shares(counts), divergence(counts)
    of_repeats = None if counts.counts_only else repeats(counts)
    has_text = counts.ranked and trace.header.token_ids
    of_words = words(trace, list(words_asked), indentation=True, tally=counts) if has_text else None
    embedded = embedded_layers(trace, shown)
    return Results(
        trace=trace,
        layers=shown,
        words_asked=tuple(words_asked),
        shares=of_shares,
        repeats=of_repeats,
        divergence=of_divergence,
        words=of_words,
        claims=claims(of_shares, of_repeats, of_divergence, of_words),
        documents=sample_documents(trace, layers=[layer.layer for layer in embedded], words=words_asked)
        if has_text
        else [],
        embedded_layers=embedded,
    )


def shown_layers(trace: Trace, layers: Iterable[int] | None = None) -> tuple[int, ...]:
    """The layers asked for, or else the first, the middle and the last recorded one, as in the paper.

    Raises:
        NoSuchLayer: A layer was not recorded.
        NoSuchDocument: Nothing has been recorded yet.
    """
    if not trace.num_tokens:
        raise NoSuchDocument(trace.path, "the trace holds no document yet", "`moescope record` goes on with it")
    recorded = tuple(layer.layer for layer in trace.select_layers(layers))
    return recorded if layers is not None else first_middle_last(recorded)


def first_middle_last(layers: Sequence[int]) -> tuple[int, ...]:
    """Three of the layers, or all if they are fewer."""
    if len(layers) <= 3:
        return tuple(layers)
    return layers[0], layers[(len(layers) - 1) // 2], layers[-1]


MOST_EMBEDDED_CHOICES = 128
"""Choices a token that the page can hold."""


def embedded_layers(trace: Trace, shown: Iterable[int]) -> tuple[Layer, ...]:
    """Layers that the page lets a reader choose from: all, or as many as it can hold, evenly, the shown ones first."""
    by_number = {layer.layer: layer for layer in trace.layers}
    kept = list(dict.fromkeys(shown))
    others = [number for number in by_number if number not in kept]
    room = MOST_EMBEDDED_CHOICES - sum(by_number[number].top_k for number in kept)
    fitting = max(0, room // max(layer.top_k for layer in trace.layers))
    if fitting < len(others):
        others = [others[at * len(others) // fitting] for at in range(fitting)]
    return tuple(by_number[number] for number in sorted([*kept, *others]))
