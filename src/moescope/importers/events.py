"""Routing as one event per row, in any order: gathered into documents, with bounded memory.

An event is one assignment: a document's token chose an expert in a layer. Many events are stored in a
temporary folder, and read back one bucket of documents at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportMalformed, ImportTooLarge
from moescope.importers.documents import NO_MODEL, ModelFacts, TokenDocument
from moescope.importers.findings import Findings
from moescope.trace.columns import DROPPED, NOT_RECORDED

MAX_DOCUMENTS = 1 << 20  # each has a key, a label and a place in memory
MAX_DOCUMENT_EVENTS = 1 << 24
"""Assignments of one document, which must be held in memory: 550 MB at 33 bytes each."""
BUCKET_EVENTS = 1 << 22
"""Assignments that are sorted at a time: 138 MB, and as much again while they are."""

EVENT = np.dtype(
    [
        ("document", "<u4"),
        ("token", "<i8"),
        ("layer", "<u2"),
        ("slot", "<u2"),
        ("expert", "<i4"),
        ("weight", "<f4"),
        ("token_id", "<i8"),
        ("phase", "i1"),
    ]
)
UNKNOWN = -1
"""In `token_id` and `phase`: not in the file."""

Event = tuple[int, int, int, int, int, float, int, int]
"""The fields of `EVENT` in order; an unknown weight is NaN."""


@dataclass
class DocumentNumbers:
    """The documents that events belong to, numbered by the keys of the file."""

    places: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    clusters: list[str | None] = field(default_factory=list)
    _numbers: dict[tuple[object, ...], int] = field(default_factory=dict)

    def number(self, key: tuple[object, ...], domain: str, place: str, cluster: str | None = None) -> int:
        """The number of a document, from 0 in order of appearance."""
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._numbers)
            if number >= MAX_DOCUMENTS:
                raise ImportTooLarge(
                    place, f"begins document number {number + 1:,}", "is it read from the right field?"
                )
            self.places.append(place)
            self.domains.append(domain)
            self.clusters.append(cluster)
        return number


@dataclass(frozen=True)
class Meaning:
    """What holds for all events of a file.

    Attributes:
        weights: Whether there are gate weights.
        ranked: Whether slots are in order of gate weight.
        model: What the file states about the model.
    """

    weights: bool
    ranked: bool
    model: ModelFacts = NO_MODEL


def gather(
    batches: Iterable[NDArray[Any]], documents: DocumentNumbers, meaning: Meaning, findings: Findings
) -> Generator[TokenDocument, None, None]:
    """Convert batches of events, dtype `EVENT`, to documents, in order of appearance.

    Raises:
        ImportMalformed: A token's choice in a layer occurs twice.
        ImportTooLarge: A document has more assignments than can be held in memory.
    """
    with tempfile.TemporaryDirectory(prefix="moescope-events-") as folder:
        spool = _EventSpool(Path(folder))
        for batch in batches:
            spool.put(batch)
        for bucket in spool.buckets(documents):
            starts = np.flatnonzero(np.diff(bucket["document"], prepend=-1))
            for events in np.split(bucket, starts[1:]):
                number = int(events["document"][0])
                document = _document(events, documents.domains[number], documents.places[number], meaning, findings)
                yield replace(document, cluster=documents.clusters[number])


def batches(events: Iterable[Event]) -> Iterator[NDArray[Any]]:
    """Events as arrays, a hundred thousand at a time."""
    remaining = iter(events)
    while taken := list(islice(remaining, 100_000)):  # 3 MB as an array
        with np.errstate(over="ignore"):  # a weight beyond float32 becomes infinite and is reported as such
            batch = np.array(taken, EVENT)
        yield batch


class _EventSpool:
    """Events in order of arrival, in memory up to a bucket and on disk beyond."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._memory: list[NDArray[Any]] = []
        self._length = 0
        self._file = folder / "events"
        self._sizes = np.zeros(1024, np.int64)

    def put(self, batch: NDArray[Any]) -> None:
        sizes = np.bincount(batch["document"])
        if len(sizes) > len(self._sizes):
            self._sizes = np.concatenate([self._sizes, np.zeros(2 * len(sizes), np.int64)])
        self._sizes[: len(sizes)] += sizes
        self._memory.append(batch)
        self._length += len(batch)
        if self._length > BUCKET_EVENTS:
            self._spill(self._file, np.concatenate(self._memory))
            self._memory = []
            self._length = 0

    def buckets(self, documents: DocumentNumbers) -> Iterator[NDArray[Any]]:
        """Events of whole documents, sorted by document, token, layer and slot."""
        largest = int(self._sizes.argmax())
        if self._sizes[largest] > MAX_DOCUMENT_EVENTS:
            raise ImportTooLarge(
                documents.places[largest],
                f"begins a document of {self._sizes[largest]:,} assignments, expected at most {MAX_DOCUMENT_EVENTS:,}",
                "is there a field that separates documents?",
            )
        if not self._file.exists():
            if self._memory:
                yield _sorted(np.concatenate(self._memory))
            return
        if self._memory:
            self._spill(self._file, np.concatenate(self._memory))
            self._memory = []
        bucket_of = np.cumsum(self._sizes) // BUCKET_EVENTS
        with self._file.open("rb") as file:
            while len(events := np.frombuffer(file.read(EVENT.itemsize << 20), EVENT)):
                buckets = bucket_of[events["document"]]
                order = np.argsort(buckets, kind="stable")
                for part in np.split(order, np.flatnonzero(np.diff(buckets[order])) + 1):
                    self._spill(self._folder / f"bucket{buckets[part[0]]}", events[part])
        self._file.unlink()
        for bucket in range(int(bucket_of[-1]) + 1):
            path = self._folder / f"bucket{bucket}"
            if path.exists():
                yield _sorted(np.fromfile(path, EVENT))
                path.unlink()

    @staticmethod
    def _spill(path: Path, events: NDArray[Any]) -> None:
        with path.open("ab") as file:
            events.tofile(file)


def _sorted(events: NDArray[Any]) -> NDArray[Any]:
    return events[np.lexsort((events["slot"], events["layer"], events["token"], events["document"]))]


def _document(events: NDArray[Any], domain: str, place: str, meaning: Meaning, findings: Findings) -> TokenDocument:
    """The routing of one document from its sorted events; a gap in the token numbers begins a sequence."""
    token, layer, slot = events["token"], events["layer"], events["slot"]
    twice = (token[1:] == token[:-1]) & (layer[1:] == layer[:-1]) & (slot[1:] == slot[:-1])
    if twice.any():
        first_twice = int(np.flatnonzero(twice)[0])
        raise ImportMalformed(
            f"{place}, token {token[first_twice]}, layer {layer[first_twice]}",
            "occurs twice in one document",
            "if the numbers of tokens start again for each document, --restarts begins one there; or does a field "
            "separate documents?",
        )
    new_token = np.append(True, token[1:] != token[:-1])
    row = np.cumsum(new_token) - 1
    tokens = token[new_token]
    starts = np.append(True, np.diff(tokens) != 1)
    if starts[1:].any():
        findings.count("gaps in the numbers of tokens begin a new sequence", int(starts[1:].sum()))
    ids, weights = {}, {}
    layers = np.unique(layer).tolist()
    if len(layers) * len(tokens) > 1 << 26:  # 256 MB of int32, before any choice
        raise ImportTooLarge(place, f"begins a document of {len(tokens):,} tokens and {len(layers)} layers")
    for index in layers:
        of_layer = layer == index
        rows, slots = row[of_layer], slot[of_layer]
        first = np.append(True, rows[1:] != rows[:-1])
        rank = np.arange(len(rows)) - np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))
        if (slots != rank).any():
            findings.count("assignments are in slots that are not numbered from 0", int((slots != rank).sum()))
        width = int(rank.max()) + 1
        if len(tokens) * width > 1 << 26:
            raise ImportTooLarge(place, f"begins a document with a token of {width} choices in layer {index}")
        ids[index] = np.full((len(tokens), width), NOT_RECORDED, np.int32)
        ids[index][np.unique(rows)] = DROPPED  # has a row in the log, if not for each choice
        ids[index][rows, rank] = events["expert"][of_layer]
        if meaning.weights:
            weights[index] = np.zeros((len(tokens), width), np.float32)
            weights[index][rows, rank] = events["weight"][of_layer]
    token_ids = events["token_id"][new_token]
    differs = events["token_id"] != token_ids[row]
    if differs.any():
        event = int(np.flatnonzero(differs)[0])
        both = f"{token_ids[row[event]]} and {events['token_id'][event]}"
        raise ImportMalformed(f"{place}, token {token[event]}", f"has token ids {both}, expected one")
    phase = events["phase"][new_token]
    return TokenDocument(
        place,
        domain,
        ids,
        weights,
        token_ids if (token_ids != UNKNOWN).all() else None,
        starts,
        phase.astype(np.uint8) if (phase != UNKNOWN).all() else None,
        ranked=meaning.ranked,
        none_is_dropped=True,
        model=meaning.model,
    )
