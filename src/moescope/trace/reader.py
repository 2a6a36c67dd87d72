"""Reading a trace: by layer, by domain, by document, a part at a time, with every page's checksum verified."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import NoSuchDocument, NoSuchDomain, NoSuchLayer, NotRecorded, TraceDamaged
from moescope.trace import checksums, vocabulary
from moescope.trace.counts import COUNTS_HINT, Counts
from moescope.trace.header import Header, Layer
from moescope.trace.part import Part
from moescope.trace.part_file import PartFile
from moescope.trace.verifying import verify
from moescope.trace.vocabulary import Vocabulary

_Column = NDArray[np.int64]


@dataclass(frozen=True)
class Trace:
    """A trace on disk.

    Attributes:
        path: Its folder.
        header: The contents of ``trace.json``.
        parts: Its finished parts, in order.
        summary: The totals of the run, or None while the trace is unfinished.
    """

    path: Path
    header: Header
    parts: tuple[PartFile, ...]
    summary: dict[str, Any] | None

    @property
    def complete(self) -> bool:
        """Whether the recording was completed."""
        return self.summary is not None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The recorded layers, ascending."""
        return self.header.layers

    @property
    def num_tokens(self) -> int:
        """Recorded tokens; in a trace of counts, the largest number of assignments of a layer over its top-k."""
        if self.header.counts_only:
            totals = {layer.layer: 0 for layer in self.layers}
            for counts in self.iter_counts():
                for layer in totals:
                    totals[layer] += int(counts.count[counts.layer == layer].sum())
            return max(totals[layer.layer] // layer.top_k for layer in self.layers)
        return sum(part.num_tokens for part in self.parts)

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """Domains in the order in which they first appear."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.contents.domains))

    @property
    def domain_documents(self) -> dict[str, int]:
        """Documents of each domain."""
        return {name: sum(part.contents.domains.get(name, (0, 0))[0] for part in self.parts) for name in self.domains}

    @property
    def domain_tokens(self) -> dict[str, int]:
        """Tokens of each domain; rows of counts in a trace of counts."""
        return {name: sum(part.contents.domains.get(name, (0, 0))[1] for part in self.parts) for name in self.domains}

    @property
    def num_documents(self) -> int:
        """Recorded documents; those without a token are not in a trace."""
        return sum(self.domain_documents.values())

    @cached_property
    def _documents(self) -> tuple[_Column, _Column, _Column, _Column]:
        """For each document its number, part, index of its domain and rows."""
        documents, owners, codes, lengths = ([np.zeros(0, np.int64)] for _ in range(4))
        for index, file in enumerate(self.parts):
            part = file.read_counts() if self.header.counts_only else file.read((), tokens=False)
            starts = part.document_starts()
            lengths.append(np.diff(starts))
            codes.append(self._trace_codes(file.path, part)[starts[:-1]])
            documents.append(part.document[starts[:-1]].astype(np.int64))
            owners.append(np.full(len(starts) - 1, index))
        numbers = np.concatenate(documents)
        if len(np.unique(numbers)) != len(numbers):
            raise TraceDamaged(self.path, "a document is in two parts")
        return numbers, np.concatenate(owners), np.concatenate(codes), np.concatenate(lengths)

    @property
    def document_numbers(self) -> NDArray[np.int64]:
        """Indices, in the corpus, of the recorded documents, in the order recorded."""
        return self._documents[0]

    @property
    def document_parts(self) -> NDArray[np.int64]:
        """Index of the part that holds each of `document_numbers`."""
        return self._documents[1]

    @property
    def document_domains(self) -> NDArray[np.int64]:
        """Index into `domains` of the domain of each of `document_numbers`."""
        return self._documents[2]

    @property
    def document_tokens(self) -> NDArray[np.int64]:
        """Tokens of each of `document_numbers`; rows of counts in a trace of counts."""
        return self._documents[3]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Text pieces by token id."""
        file = self.path / vocabulary.FILE_NAME
        expected = checksums.read(self.path).get(vocabulary.FILE_NAME, "")
        if file.is_file() and (digest := checksums.digest_file(file)) != expected:
            raise checksums.failed(self.path, vocabulary.FILE_NAME, expected, digest)
        return Vocabulary.read(file)

    def select_layers(self, layers: Iterable[int] | None) -> tuple[Layer, ...]:
        """The recorded layers with these indices, ascending; all of them for None.

        Raises:
            NoSuchLayer: An index is not among the recorded layers.
        """
        return selected_layers(self.layers, layers, self.path)

    def iter_parts(
        self,
        layers: Iterable[int] | None = None,
        *,
        domains: Iterable[str] | None = None,
        weights: bool = False,
        predictions: bool = False,
        scores: bool = False,
    ) -> Iterator[Part]:
        """Read the trace part by part, with one part in memory.

        Args:
            layers: Layers to read, or None for all.
            domains: Domains to read, or None for all.
            weights: Also read the gate weights.
            predictions: Also read the recorded predictions.
            scores: Also read what was recorded of margins and masses.
        Yields:
            Parts whose domain codes index `domains` of the trace; none is empty.
        Raises:
            NoSuchLayer: A layer was not recorded.
            NoSuchDomain: A domain is not in the trace.
            NotRecorded: Gate weights are requested but were not recorded, or the trace holds counts only.
            TraceDamaged: A page fails its checksum.
        """
        self.need_tokens(weights=weights)
        chosen = self.select_layers(layers)
        kept = None if domains is None else [self.domain_code(name) for name in domains]
        for file in self.parts:
            part = self.with_trace_domains(file.read(chosen, weights=weights, predictions=predictions, scores=scores))
            if kept is not None:
                part = part.rows(np.isin(part.domain, kept))
            if part.num_tokens:
                yield part

    def iter_counts(self) -> Iterator[Counts]:
        """Read a trace of counts part by part; domain codes index the names of each part.

        Raises:
            TraceDamaged: A page fails its checksum.
        """
        for file in self.parts:
            yield file.read_counts()

    def expert_loads(self, layers: Iterable[Layer], domain: str | None = None) -> dict[int, NDArray[np.int64]]:
        """By layer, the assignments that each routed expert received, shape (expert,); of a trace of counts, too.

        Raises:
            NoSuchDomain: The domain is not in the trace.
        """
        chosen = tuple(layers)
        loads = {layer.layer: np.zeros(layer.num_experts, np.int64) for layer in chosen}
        if domain is not None:
            self.domain_code(domain)
        if self.header.counts_only:
            for counts in self.iter_counts():
                names = np.array(counts.domain_names, object)
                kept = np.ones(len(counts.domain), np.bool_) if domain is None else names[counts.domain] == domain
                for number, load in loads.items():
                    of_layer = kept & (counts.layer == number)
                    np.add.at(load, counts.expert[of_layer], counts.count[of_layer])
            return loads
        for part in self.iter_parts(list(loads), domains=None if domain is None else [domain]):
            for layer in chosen:
                ids = part.expert_ids[layer.layer].ravel()
                ids = ids[(ids >= 0) & (ids < layer.num_experts)]
                loads[layer.layer] += np.bincount(ids, minlength=layer.num_experts)
        return loads

    def document(self, number: int, layers: Iterable[int] | None = None, *, weights: bool = False) -> Part:
        """The rows of one document.

        Args:
            number: Index of the document in the corpus.
            layers: Layers to read, or None for all.
            weights: Also read the gate weights.
        Raises:
            NoSuchDocument: The trace does not hold it.
            NotRecorded: Gate weights are requested but were not recorded, or the trace holds counts only.
        """
        self.need_tokens(weights=weights)
        numbers, owners, _, _ = self._documents
        matches = np.flatnonzero(numbers == number)
        if not len(matches):
            nearest = numbers[np.argsort(np.abs(numbers - number), kind="stable")[:3]]
            hint = f"nearest documents: {', '.join(map(str, sorted(nearest)))}" if len(nearest) else None
            raise NoSuchDocument(self.path, f"document {number} is not in the trace ({len(numbers)} are)", hint)
        part = self.parts[owners[matches[0]]].read(self.select_layers(layers), weights=weights)
        return self.with_trace_domains(part.rows(part.document == number))

    def with_trace_domains(self, part: Part) -> Part:
        """The part with domain codes that index the domains of the whole trace.

        Raises:
            TraceDamaged: It has a domain that the trace is not said to have.
        """
        if part.domain_names == self.domains:
            return part
        return replace(part, domain=self._trace_codes(self.path, part), domain_names=self.domains)

    def _trace_codes(self, where: Path, part: Part | Counts) -> NDArray[np.int64]:
        """The domain of each row as an index of the domains of the trace."""
        code_of = {name: code for code, name in enumerate(self.domains)}
        codes = np.array([code_of.get(name, -1) for name in part.domain_names], np.int64)[part.domain]
        if codes.min(initial=0) < 0:
            name = part.domain_names[part.domain[int(codes.argmin())]]
            raise TraceDamaged(where, f"has domain {name!r}, which is not among those noted of the trace")
        return codes

    def with_parts(self, parts: tuple[PartFile, ...]) -> Trace:
        """The same trace, whose parts are read in another way; they hold the same."""
        view = replace(self, parts=parts)
        view.__dict__["domains"] = self.domains
        view.__dict__["_documents"] = self._documents  # and are not looked through again
        return view

    def verify(self) -> list[TraceDamaged]:
        """Check every file against its checksum and every row against the format.

        Returns:
            One error per problem; empty if the trace is sound.
        """
        return verify(self.path)

    def need_text(self, layers: Iterable[int] | None = None) -> None:
        """Refuse a trace that does not give the text with the first choice of each token.

        Raises:
            NotRecorded: It has no tokens or no token ids, or does not state which choice is the first.
        """
        self.need_tokens()
        if not self.header.token_ids:
            raise NotRecorded(self.path, "has no token ids, so its text is unknown")
        if not all(layer.ranked for layer in self.select_layers(layers)):
            raise NotRecorded(self.path, "does not state which of a token's choices is the first")

    def need_documents(self) -> None:
        """Refuse a trace that holds none yet.

        Raises:
            NoSuchDocument: Nothing has been recorded yet.
        """
        if not self.num_tokens:
            raise NoSuchDocument(self.path, "the trace holds no document yet", "`moescope record` goes on with it")

    def need_tokens(self, *, weights: bool = False) -> None:
        """Refuse a trace of counts and, if they are needed, one without gate weights.

        Raises:
            NotRecorded: It has no tokens, or no gate weights.
        """
        if self.header.counts_only:
            raise NotRecorded(self.path, "holds counts of assignments, and no token", COUNTS_HINT)
        if weights and not self.header.weights:
            raise NotRecorded(self.path, "gate weights were not recorded", "record again with --weights")

    def domain_code(self, name: str) -> int:
        """The place of a domain among `domains`.

        Raises:
            NoSuchDomain: The domain is not in the trace.
        """
        if name not in self.domains:
            raise NoSuchDomain(self.path, f"no domain {name!r}; the trace has {', '.join(self.domains)}")
        return self.domains.index(name)


def selected_layers(layers: tuple[Layer, ...], wanted: Iterable[int] | None, path: Path) -> tuple[Layer, ...]:
    """Those of the layers that have the wanted indices, ascending; all of them for None; `path` is named in errors.

    Raises:
        NoSuchLayer: An index is not among the layers.
    """
    if wanted is None:
        return layers
    indices = set(wanted)
    if missing := sorted(indices - {layer.layer for layer in layers}):
        have = ", ".join(str(layer.layer) for layer in layers)
        raise NoSuchLayer(path, f"layer {missing[0]} was not recorded; the trace has layers {have}")
    return tuple(layer for layer in layers if layer.layer in indices)
