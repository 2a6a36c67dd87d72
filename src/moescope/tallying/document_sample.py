"""Whole documents with all their choices, in memory: for measures that go over the same tokens several times.

Unlike sums, tokens can be permuted, left out a document at a time and compared at any distance. The sample is bounded
in bytes, not in tokens: where the trace is larger, it holds the documents with the smallest hash, so that it depends
neither on the order of the parts nor on threads, and the document stays the unit of sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moescope.errors import NotRecorded
from moescope.tallying.counter import Array, Arrays, Counter, CountOptions, Facts, Places, Result, united
from moescope.tallying.token_sample import token_hashes
from moescope.trace import PHASES, Header, Layer, Part, PartFile, Trace
from moescope.trace.columns import id_dtype
from moescope.trace.part import consecutive_starts
from moescope.trace.part_file import PartContents

MAX_BYTES = 2**30
"""Memory of the largest sample, in bytes: 14 million tokens of 32 layers x 2 choices, 2 million of 60 x 8 of 256."""

_BYTES_BESIDE_CHOICES = 12  # token id and position, and what is per document or sequence


@dataclass(frozen=True)
class DocumentSample(Result):
    """Documents of a trace, or all of them. T tokens, G documents, Q sequences.

    Attributes:
        layers: Layers held.
        domain_names: RowLabels of the domains.
        document: Index of each document in the corpus, part by part, the parts by their first document, shape (G,).
        domain: Code of each document's domain, shape (G,).
        starts: Row at which each document starts, with T at the end, shape (G + 1,).
        sequence_starts: Row at which each sequence starts, with T at the end, shape (Q + 1,).
        position: Place of each token within its sequence, shape (T,).
        token_id: Vocabulary ids, shape (T,); None where the trace does not know them.
        expert_ids: For each layer the choices, rank 0 first, shape (choice, T); -1 = dropped.
        fraction: Expected part of the trace's documents that is held; 1 if it is all of them.
        trace_tokens: Tokens of the trace.
        max_bytes: Memory that was aimed at.
        parts: Documents held of each part of the trace.
        phase: Code of each token's phase, shape (T,); None where the trace does not know it.
    """

    layers: tuple[Layer, ...]
    domain_names: tuple[str, ...]
    document: NDArray[np.int64]
    domain: NDArray[np.int64]
    starts: NDArray[np.int64]
    sequence_starts: NDArray[np.int64]
    position: NDArray[np.int32]
    token_id: NDArray[np.int32] | None
    expert_ids: dict[int, NDArray[np.integer[Any]]]
    fraction: float
    trace_tokens: int = 0
    max_bytes: int = MAX_BYTES
    parts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    phase: NDArray[np.uint8] | None = None

    @property
    def header(self) -> Header:
        """What it says of the trace."""
        return Header(self.layers, token_ids=self.token_id is not None, phases=self.phase is not None)

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return int(self.starts[-1])

    @property
    def num_documents(self) -> int:
        """Documents held."""
        return len(self.document)

    def document_of_token(self) -> NDArray[np.int32]:
        """Place of each token's document among those held, shape (T,)."""
        return np.repeat(np.arange(self.num_documents, dtype=np.int32), np.diff(self.starts))

    def thinned(self, num_tokens: int) -> DocumentSample:
        """The documents with the smallest hash that hold at most so many tokens together, but two if there are two."""
        if self.num_tokens <= num_tokens:
            return self
        order = np.argsort(_hashes(self.document), kind="stable")
        fitting = int(np.searchsorted(np.cumsum(np.diff(self.starts)[order]), num_tokens, side="right"))
        keep_G = np.zeros(self.num_documents, np.bool_)
        keep_G[order[: max(2, fitting)]] = True
        return replace(self._only(keep_G), fraction=self.fraction * int(keep_G.sum()) / len(keep_G))

    def _only(self, keep_G: NDArray[np.bool_]) -> Self:
        """Some of the documents."""
        lengths = np.diff(self.starts)
        part_G = np.repeat(np.arange(len(self.parts)), self.parts)
        documents_P = np.bincount(part_G[keep_G[: len(part_G)]], minlength=len(self.parts)).astype(np.int64)
        kept = {"document": keep_G, "token": np.repeat(keep_G, lengths)}
        return self._of_pieces([(self, kept)], lengths[keep_G], documents_P[documents_P > 0])

    def _of_pieces(
        self,
        pieces: Sequence[tuple[Self, Mapping[str, Any]]],
        length_G: NDArray[np.int64],
        parts: NDArray[np.int64],
        **facts: Any,
    ) -> Self:
        """The sample of some documents and tokens of this and other samples, one piece after another."""
        declared = self.declared(self.layers, self.domain_names, self.known_facts())
        columns = {
            name: np.concatenate([piece.arrays()[name][..., rows[column.axes[-1]]] for piece, rows in pieces], -1)
            for name, column in declared.items()
            if column.axes[-1] in ("document", "token")
        }
        starts = np.concatenate([[0], np.cumsum(length_G)]).astype(np.int64)
        facts = {**self.known_facts(), **facts}
        return self.of_arrays(self.layers, self.domain_names, facts, {**columns, "starts": starts, "parts": parts})

    def added(self, other: Self, domains: Sequence[str], places: Mapping[str, Places]) -> Self:
        """The documents of both, or those with the smallest hashes, as a sample of both traces together would have."""
        if len(shared := np.intersect1d(self.document, other.document)):
            raise ValueError(f"document {shared[0]} is in both counts, which must be of different documents")
        tokens = self.trace_tokens + other.trace_tokens
        fraction = min(self.fraction, other.fraction, _fraction(self.layers, self.ranks, self.max_bytes, tokens))
        domain_names, *codes = united(self.domain_names, other.domain_names)
        sides = [
            replace(sample, domain=place_D[sample.domain], domain_names=domain_names)._only(
                _kept(sample.document, fraction)
            )
            for sample, place_D in zip((self, other), codes, strict=True)
        ]
        pieces = [
            (sample, {"document": slice(*bounds), "token": slice(*sample.starts[list(bounds)].tolist())})
            for sample in sides
            for bounds in pairwise([0, *np.cumsum(sample.parts).tolist()])
        ]
        pieces.sort(key=lambda piece: int(piece[0].document[piece[1]["document"].start]))
        lengths = [np.diff(sample.starts)[rows["document"]] for sample, rows in pieces]
        parts = np.array([len(lengths_of_part) for lengths_of_part in lengths], np.int64)
        none = (sides[0], {"document": slice(0), "token": slice(0)})
        length_G = np.concatenate([np.zeros(0, np.int64), *lengths])
        return sides[0]._of_pieces([none, *pieces], length_G, parts, fraction=fraction, trace_tokens=tokens)

    facts = ("fraction", "trace_tokens", "max_bytes", "ranks", "known")
    own_facts = ("fraction", "trace_tokens")

    @property
    def ranks(self) -> tuple[int, ...]:
        """Choices of a token that are held, by layer."""
        return tuple(len(ids_KT) for ids_KT in self.expert_ids.values())

    @property
    def known(self) -> tuple[str, ...]:
        """Columns held that not every trace has."""
        return tuple(name for name in ("token_id", "phase") if getattr(self, name) is not None)

    @classmethod
    def declared(cls, layers: Sequence[Layer], domains: Sequence[str], facts: Facts) -> dict[str, Array]:
        """The columns."""
        ranks, by_token = facts["ranks"], ("token",)
        if not all(1 <= number <= layer.top_k for layer, number in zip(layers, ranks, strict=True)):
            raise ValueError(f"{ranks} choices a token are held of layers that make {[a.top_k for a in layers]}")
        if not (0 <= facts["fraction"] <= 1 and facts["trace_tokens"] >= 0 and facts["max_bytes"] >= 0):
            raise ValueError(f"holds {facts['fraction']} of {facts['trace_tokens']} tokens, expected 0 to 1")
        columns = {
            "document": Array(("document",), (None,), most=2**32 - 1),
            "domain": Array(("document",), (None,), most=len(domains) - 1),
            "starts": Array(("document and end",), (None,)),
            "parts": Array(("part",), (None,), least=1),
            "position": Array(by_token, (None,), (np.int32,)),
            "token_id": Array(by_token, (None,), (np.int32,), least=None),
            "phase": Array(by_token, (None,), (np.uint8,), most=len(PHASES) - 1),
        }
        for layer, number in zip(layers, ranks, strict=True):
            dtype = _id_dtype(layer)
            least = -1 if dtype.kind == "i" else 0
            axes = "choice", "token"
            columns[f"expert_ids/{layer.layer}"] = Array(axes, (number, None), (dtype.type,), least, layer.num_ids - 1)
        return {
            name: column
            for name, column in columns.items()
            if name not in ("token_id", "phase") or name in facts["known"]
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The columns; where sequences start follows from the positions."""
        return {name: column for name, column in super().arrays().items() if name != "sequence_starts"}

    @classmethod
    def restored(cls, layers: Sequence[Layer], domains: Sequence[str], facts: Facts, arrays: Arrays) -> Self:
        """The sample of a file."""
        sample = super().restored(layers, domains, facts, arrays)
        document, starts, position = sample.document, sample.starts, sample.position
        ends = len(starts) == len(document) + 1 and (starts[0], starts[-1]) == (0, len(position))
        if not ends or (np.diff(starts) < 1).any():
            raise ValueError("starts do not cut the tokens into documents")
        if len(np.unique(document)) != len(document) or sample.parts.sum() != len(document):
            raise ValueError("a document comes twice, or the parts do not hold as many")
        falls = position[1:] < position[:-1]
        if (position[1:][falls & (np.isin(np.arange(1, len(position)), starts, invert=True))] != 0).any():
            raise ValueError("position does not count the tokens of sequences")
        return sample

    @classmethod
    def of_arrays(cls, layers: Sequence[Layer], domains: Sequence[str], facts: Facts, arrays: Arrays) -> Self:
        """The sample that has these columns."""
        sequence_starts = consecutive_starts(arrays["starts"], arrays["position"])
        columns = {"domain_names": tuple(domains), "sequence_starts": sequence_starts, "token_id": None}
        return super().of_arrays(layers, domains, {**facts, **columns}, arrays)

    def as_trace(self, path: Path, header: Header) -> Trace:
        """The documents as a trace whose parts are in memory, divided as those of the trace were.

        Args:
            path: What errors name.
            header: Of the trace.
        Raises:
            NotRecorded: Not all documents are held, or not all choices of a token.
        """
        if self.fraction < 1:
            raise NotRecorded(
                path,
                f"the counts hold {self.fraction:.0%} of the documents; what is simulated token by token needs all",
                "give the trace itself, or count it with a larger max_bytes",
            )
        if any(len(self.expert_ids[layer.layer]) < layer.top_k for layer in self.layers):
            raise NotRecorded(path, "the counts do not hold all choices of a token", "give the trace itself")
        layers = self.layers
        if layers != header.layers:  # a distance counts layers, so it means nothing among fewer
            layers = tuple(replace(layer, lookahead=(), num_predicted=0) for layer in layers)
        held = replace(header, layers=layers, weights=False, clusters=False, labels=False, margins=False, masses=False)
        bounds = [0, *np.cumsum(self.parts).tolist()]
        return Trace(path, held, tuple(_HeldPart(self, path, held, slice(*pair)) for pair in pairwise(bounds)), None)


class _HeldPart(PartFile):
    """Documents of a sample, read as a part of a trace is."""

    def __init__(self, sample: DocumentSample, path: Path, header: Header, documents: slice) -> None:
        self._sample, self._documents = sample, documents
        self._rows = slice(int(sample.starts[documents.start]), int(sample.starts[documents.stop]))
        self.path = path
        super().__init__(path, header, PartContents.of(self.read((), tokens=False), sample.header))

    def read(
        self,
        layers: Iterable[Layer],
        *,
        weights: bool = False,
        tokens: bool = True,
        predictions: bool = False,
        choices: bool = True,
        scores: bool = False,
    ) -> Part:
        """The rows, as `PartFile.read` gives them."""
        layers = tuple(layers) if choices else ()
        if weights or scores or (predictions and any(layer.lookahead for layer in layers)):
            what = "gate weights" if weights else "margins and masses" if scores else "predictions of later routers"
            raise NotRecorded(self.path, f"the counts hold no {what}", "give the trace itself")
        sample, rows = self._sample, self._rows
        lengths = np.diff(sample.starts)[self._documents]
        position = sample.position[rows]
        starts = np.cumsum(lengths) - lengths
        begins = np.zeros(len(position), np.int64)
        begins[consecutive_starts(starts, position)[:-1]] = 1
        begins = np.cumsum(begins)
        token_id = np.zeros(rows.stop - rows.start, np.uint32)
        if tokens and sample.token_id is not None:
            token_id = sample.token_id[rows].astype(np.uint32)
        expert_ids: dict[int, NDArray[np.integer[Any]]] = {}
        for layer in layers:
            ids_TK = sample.expert_ids[layer.layer][:, rows].T
            expert_ids[layer.layer] = ids_TK.astype(np.int32 if (ids_TK < 0).any() else id_dtype(layer), order="K")
        return Part(
            np.repeat(sample.document[self._documents], lengths),
            np.repeat(sample.domain[self._documents], lengths),
            sample.domain_names,
            begins - np.repeat(begins[starts], lengths),
            position,
            token_id,
            expert_ids,
            phase=sample.phase[rows] if tokens and sample.phase is not None else None,
        )


@dataclass
class DocumentCounter(Counter[DocumentSample]):
    """The counter that keeps documents; those of a pass share the memory of one sample, where each part has its rows.

    Attributes:
        sample: The sample; its columns are what is filled.
        first_row: By the first document of a part, kept or not, the row at which the part's kept documents start.
        document: First document of the part at hand, whose tokens that are `kept` go to `rows`.
    """

    name, result_type, reads_tokens = "documents", DocumentSample, True

    sample: DocumentSample
    first_row: dict[int, int]
    document: int = -1
    rows: slice = field(default_factory=lambda: slice(0, 0))
    kept: NDArray[np.bool_] | slice = field(default_factory=lambda: slice(None))

    @classmethod
    def prepare(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> Callable[[], Self]:
        """What makes counters that share memory for the documents, and their first choices, that fit in the bytes."""
        max_bytes = MAX_BYTES if options.max_bytes is None else options.max_bytes
        ranks = [len(range(layer.top_k)[: options.ranks]) for layer in layers]
        fraction = _fraction(layers, ranks, max_bytes, trace.num_tokens)
        number, owner, length = trace.document_numbers, trace.document_parts, trace.document_tokens
        begins = np.flatnonzero(np.diff(owner, prepend=-1))  # of each part
        parts = np.split(np.arange(len(number)), begins[1:])
        order = np.argsort(number[begins], kind="stable")
        rows = np.concatenate([np.zeros(0, np.int64), *(parts[part] for part in order.tolist())])
        kept = rows[_kept(number, fraction)[rows]]
        starts = np.concatenate([[0], np.cumsum(length[kept])]).astype(np.int64)
        num_tokens, first_P = int(starts[-1]), begins[order]
        documents_P, tokens_P = (
            np.bincount(owner[kept], weights, minlength=len(trace.parts))[owner[first_P]].astype(np.int64)
            for weights in (None, length[kept])
        )
        sample = DocumentSample(
            tuple(layers),
            trace.domains,
            number[kept],
            trace.document_domains[kept],
            starts,
            np.zeros(0, np.int64),
            np.zeros(num_tokens, np.int32),
            np.zeros(num_tokens, np.int32) if trace.header.token_ids else None,
            {a.layer: np.zeros((held, num_tokens), _id_dtype(a)) for a, held in zip(layers, ranks, strict=True)},
            fraction,
            trace.num_tokens,
            max_bytes,
            documents_P[documents_P > 0],
            np.zeros(num_tokens, np.uint8) if trace.header.phases else None,
        )
        first_row = dict(zip(number[first_P].tolist(), (np.cumsum(tokens_P) - tokens_P).tolist(), strict=True))
        return lambda: cls(sample, first_row)

    def result(self) -> DocumentSample:
        """The sample, once the pass is over."""
        return replace(self.sample, sequence_starts=consecutive_starts(self.sample.starts, self.sample.position))

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Keep the layers of `group` of a part's documents."""
        if int(part.document[0]) != self.document:
            self._start(part)
        for layer in group:
            held_KT = self.sample.expert_ids[layer.layer]
            held_KT[:, self.rows] = part.expert_ids[layer.layer].T[: len(held_KT), self.kept]

    def _start(self, part: Part) -> None:
        sample, starts = self.sample, part.document_starts()
        self.document = int(part.document[0])
        keep_G = _kept(part.document[starts[:-1]].astype(np.int64), sample.fraction)
        self.kept = slice(None) if keep_G.all() else np.repeat(keep_G, np.diff(starts))
        first = self.first_row[self.document]
        self.rows = slice(first, first + int(np.diff(starts)[keep_G].sum()))
        sample.position[self.rows] = part.position[self.kept]
        if sample.token_id is not None:
            sample.token_id[self.rows] = part.token_id[self.kept]
        if sample.phase is not None and part.phase is not None:
            sample.phase[self.rows] = part.phase[self.kept]

    def merge(self, other: Self) -> None:
        """Nothing: the memory is shared."""


def _fraction(layers: Sequence[Layer], ranks: Sequence[int], max_bytes: int, num_tokens: int) -> float:
    """Part of the documents that fits so many bytes, with so many choices of each layer."""
    choices = sum(number * _id_dtype(layer).itemsize for layer, number in zip(layers, ranks, strict=True))
    return min(1.0, max_bytes / max(1, (_BYTES_BESIDE_CHOICES + choices) * num_tokens))


def _kept(document: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    if fraction >= 1:
        return np.ones(len(document), np.bool_)
    kept: NDArray[np.bool_] = _hashes(document) < np.uint64(fraction * 2**64)
    return kept


def _hashes(document: NDArray[np.int64]) -> NDArray[np.uint64]:
    return token_hashes(document, np.full(len(document), 2**31))


def _id_dtype(layer: Layer) -> np.dtype[Any]:
    """The narrowest type that holds the ids, and -1 where assignments may be dropped."""
    if not layer.drops:
        return np.dtype(np.uint8 if layer.num_ids <= 256 else np.uint16)
    return np.dtype(np.int16 if layer.num_ids < 2**15 else np.int32)
