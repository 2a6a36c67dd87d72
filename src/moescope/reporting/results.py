"""Everything a report shows, gathered from a trace: the measures, the claims, and some documents to look at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import xarray as xr

from moescope.measures import (
    Claim,
    balance,
    coactivation,
    consistency,
    divergence,
    explain,
    locality,
    repeats,
    shares,
    syntax,
    transitions,
    vocabulary,
    words,
)
from moescope.measures.claims import SAMPLE_BYTES, answered, claims, first_middle_last
from moescope.reporting.documents import RoutedDocument, choose_documents, read_chosen
from moescope.simulation import cache, parallel, prefetch
from moescope.simulation.together import Job, run_together
from moescope.tallying import INDENTATION, WORDS, count
from moescope.tallying.joint import CoactivationCounter, TransitionCounter
from moescope.trace import Layer, Trace

SEGMENT_LENGTHS = (16,)
"""Tokens of the segments counted for consistency; each length costs as much as the tally."""

CACHE_POLICIES = ("lru", "aged-lfu", "hot", "belady")
"""Cache policies of a report: what is used, the best simple one, what needs no cache at all, and the optimum."""


@dataclass(frozen=True)
class Results:
    """What a report is made of. Where the trace cannot tell, a result is None; all are of all recorded layers.

    Attributes:
        trace: The trace.
        layers: Layers that tables and figures with a panel a layer show.
        words_asked: Words of the claims about words, without indentation.
        shares: Of `moescope.shares`.
        repeats: Of `moescope.repeats`; None for a trace of counts, as is all else that needs tokens.
        divergence: Of `moescope.divergence`.
        words: Of `moescope.words`; None where the trace lacks token ids, or the order of the choices.
        explained: Of `moescope.explain`, of a sample of documents.
        locality: Of `moescope.locality`, of the same documents.
        vocabulary: Of `moescope.vocabulary`, of the same documents; None, too, if no id is frequent enough.
        syntax: Of `moescope.syntax`; None, too, if no word class stands beside other tokens.
        consistency: Of `moescope.consistency`; None, too, if no document is long enough.
        balance: Of `moescope.balance`.
        coactivation: Of `moescope.coactivation`; None, too, if no layer has two choices.
        transitions: Of `moescope.transitions`; None, too, if there is one layer.
        cache: Of `moescope.cache`, of `CACHE_POLICIES`; None, too, if every token takes all experts.
        prefetch: Of `moescope.prefetch`.
        parallel: Of `moescope.parallel`, on `shared_by` devices; None, too, if so few experts cannot be shared.
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
    explained: xr.Dataset | None
    locality: xr.Dataset | None
    vocabulary: xr.Dataset | None
    syntax: xr.Dataset | None
    consistency: xr.Dataset | None
    balance: xr.Dataset
    coactivation: xr.Dataset | None
    transitions: xr.Dataset | None
    cache: xr.Dataset | None
    prefetch: xr.Dataset | None
    parallel: xr.Dataset | None
    claims: list[Claim]
    documents: list[RoutedDocument]
    embedded_layers: tuple[Layer, ...]

    @property
    def warnings(self) -> list[str]:
        """What an importer found odd in the trace's source."""
        found = (self.trace.summary or {}).get("warnings", [])
        return [str(warning) for warning in found] if isinstance(found, list) else []

    @property
    def paired_layers(self) -> tuple[int, ...]:
        """Layers whose pairs of experts are shown."""
        return () if self.coactivation is None else _among(self.layers, self.coactivation["layer"].values.tolist())

    @property
    def later_layers(self) -> tuple[int, ...]:
        """Layers for which the transitions from the layer before are shown."""
        return () if self.transitions is None else _among(self.layers, self.transitions["layer"].values.tolist())


def _among(shown: Sequence[int], known: Sequence[int]) -> tuple[int, ...]:
    """The shown layers that are known; if that leaves some out, the first, the middle and the last known."""
    kept = tuple(layer for layer in shown if layer in known)
    return kept if len(kept) >= min(len(shown), len(known)) else first_middle_last(known)


def gather(trace: Trace, layers: Iterable[int] | None = None, words_asked: Sequence[str] = WORDS) -> Results:
    """Measure a trace for a report: one pass for all counters, the words, and some documents to look at.

    Args:
        trace: The trace.
        layers: Layers to show where each has a panel; None for the first, the middle and the last recorded.
        words_asked: Words whose experts are asked for; indentation is always asked for.
    Raises:
        NoSuchLayer: A layer was not recorded.
        TraceDamaged: A page fails its checksum.
    """
    shown = shown_layers(trace, layers)
    asked = (*words_asked, INDENTATION)
    has_tokens, has_order = not trace.header.counts_only, all(layer.ranked for layer in trace.layers)
    has_text = has_order and trace.header.token_ids
    counts = count(trace, words=asked if has_text else (), lengths=SEGMENT_LENGTHS, max_bytes=SAMPLE_BYTES)
    of_divergence = divergence(counts)
    of_words = words(counts, list(words_asked), indentation=True) if has_text else None
    explained = explain(counts, choice="first" if has_order else "either") if has_tokens else None
    of_locality = locality(counts) if has_tokens else None
    embedded = embedded_layers(trace, shown)
    chosen = choose_documents(trace, words=words_asked) if has_text else []
    numbers = frozenset(layer.layer for layer in embedded)
    jobs = [
        *([Job(_cache), Job(prefetch), Job(_parallel)] if has_tokens else []),
        *(
            [Job(partial(read_chosen, chosen=chosen, layers=numbers), numbers, frozenset(c.part for c in chosen))]
            if chosen
            else []
        ),
    ]
    played = run_together(trace, jobs)
    of_cache, of_prefetch, of_parallel = played[:3] if has_tokens else (None, None, None)
    documents = played[-1] if chosen else []
    return Results(
        trace=trace,
        layers=shown,
        words_asked=tuple(words_asked),
        shares=shares(counts),
        repeats=repeats(counts) if has_tokens else None,
        divergence=of_divergence,
        words=of_words,
        explained=explained,
        locality=of_locality,
        vocabulary=_known(vocabulary(counts, top=5), "specialization") if has_text else None,
        syntax=_known(syntax(counts), "jsd") if has_text else None,
        consistency=_known(consistency(counts), "srp") if has_tokens else None,
        balance=balance(counts),
        coactivation=coactivation(counts) if CoactivationCounter in counts else None,
        transitions=transitions(counts, choice="first" if has_order else "any")
        if TransitionCounter in counts
        else None,
        cache=of_cache,
        prefetch=of_prefetch,
        parallel=of_parallel,
        claims=answered(of_divergence, of_words, of_locality, explained),
        documents=documents,
        embedded_layers=embedded,
    )


def answer_claims(trace: Trace, words_asked: Sequence[str] = WORDS) -> list[Claim]:
    """The claims of section 5, answered for a trace as in its report.

    Args:
        trace: The trace.
        words_asked: Words whose experts are asked for; indentation is always asked for.
    Raises:
        NoSuchDocument: Nothing has been recorded yet.
        TraceDamaged: A page fails its checksum.
    """
    return claims(trace, words_asked)


def _known(result: xr.Dataset, name: str) -> xr.Dataset | None:
    """The result, if a value of the variable is known."""
    return result if result[name].notnull().any() else None


def _cache(trace: Trace) -> xr.Dataset | None:
    if all(layer.top_k >= layer.num_experts for layer in trace.layers):
        return None
    return cache(trace, policies=CACHE_POLICIES if trace.num_documents > 1 else ("lru", "aged-lfu", "belady"))


def _parallel(trace: Trace) -> xr.Dataset | None:
    devices = shared_by(trace.layers)
    if devices is None:
        return None
    if trace.num_documents > 1:
        return parallel(trace, devices=devices)
    return parallel(trace, devices=devices, placements=("linear", "random"))  # the others are fitted on documents


def shared_by(layers: Iterable[Layer]) -> int | None:
    """Devices among which a report shares the experts: 8, 4 or 2, as many as leave two experts each in every layer."""
    numbers = [layer.num_experts for layer in layers]
    fitting = [n for n in (8, 4, 2) if all(number % n == 0 and number >= 2 * n for number in numbers)]
    return fitting[0] if fitting else None


def shown_layers(trace: Trace, layers: Iterable[int] | None = None) -> tuple[int, ...]:
    """The layers asked for, or else the first, the middle and the last recorded one, as in the paper.

    Raises:
        NoSuchLayer: A layer was not recorded.
        NoSuchDocument: Nothing has been recorded yet.
    """
    trace.need_documents()
    recorded = tuple(layer.layer for layer in trace.select_layers(layers))
    return recorded if layers is not None else first_middle_last(recorded)


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
