"""Rows of a trace in memory, one a token: whole documents, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.trace.counts import run_starts

_NUMBERS = ("document", "domain", "sequence", "position", "token_id")
_BY_LAYER = ("expert_ids", "gate_weights", "predictions", "margins", "masses")
_LABELS = ("cluster", "label")


@dataclass(frozen=True)
class RowLabels:
    """A label of each row.

    Attributes:
        codes: Index into `names`, shape (row,).
        names: The labels.

    Example:
        >>> RowLabels.of(["b", "a", "b"])
        RowLabels(codes=array([0, 1, 0]), names=('b', 'a'))
    """

    codes: NDArray[np.integer[Any]]
    names: tuple[str, ...]

    @classmethod
    def of(cls, labels: Sequence[str]) -> RowLabels:
        """The labels of rows."""
        code = {name: place for place, name in enumerate(dict.fromkeys(labels))}
        return cls(np.array([code[name] for name in labels], np.int64), tuple(code))

    @classmethod
    def joined(cls, several: Sequence[RowLabels]) -> RowLabels:
        """Those of several parts, one after the other."""
        code = {name: place for place, name in enumerate(dict.fromkeys(n for labels in several for n in labels.names))}
        codes = [np.array([code[name] for name in labels.names], np.int64)[labels.codes] for labels in several]
        return cls(np.concatenate(codes), tuple(code))

    def rows(self, selected: slice | NDArray[Any]) -> RowLabels:
        """Those of the selected rows."""
        return replace(self, codes=self.codes[selected])


@dataclass(frozen=True)
class Part:
    """Rows of a trace, one per token; a document's rows are contiguous, in the order of its text.

    Attributes:
        document: Index of the record in the corpus, shape (token,).
        domain: Code of the domain, an index into `domain_names`, shape (token,).
        domain_names: RowLabels of the domains.
        sequence: Window within the document, from 0, shape (token,).
        position: Place within the window, from 0, tokens added by the tokenizer not counted, shape (token,).
        token_id: Vocabulary id, shape (token,); all zero if the header says that they are unknown.
        expert_ids: For each layer the chosen experts, rank 0 first, shape (token, choice); -1 = dropped.
        gate_weights: For each layer the gate weights, shape (token, choice), dimensionless; empty if not recorded.
        phase: Code of the phase, an index into `PHASES`, shape (token,); None if the header says that it is unknown.
        predictions: For each layer and distance the experts predicted at that distance, rank 0 first, shape
            (token, predicted); empty if not recorded, or not read.
        cluster: What each document is a piece of; None if the header says that it is unknown.
        label: Label of each token; None if there is none, or not read.
        margins: For each layer the selection score of the last chosen expert minus that of the first not chosen, bias
            included, in the router's unit, shape (token,); empty if not recorded, or not read.
        masses: For each layer the router probability of the chosen experts together, shape (token,); empty if not
            recorded, or not read.
    """

    document: NDArray[np.integer[Any]]
    domain: NDArray[np.integer[Any]]
    domain_names: tuple[str, ...]
    sequence: NDArray[np.integer[Any]]
    position: NDArray[np.integer[Any]]
    token_id: NDArray[np.integer[Any]]
    expert_ids: Mapping[int, NDArray[np.integer[Any]]]
    gate_weights: Mapping[int, NDArray[np.floating[Any]]] = field(default_factory=dict)
    phase: NDArray[np.integer[Any]] | None = None
    predictions: Mapping[tuple[int, int], NDArray[np.integer[Any]]] = field(default_factory=dict)
    cluster: RowLabels | None = None
    label: RowLabels | None = None
    margins: Mapping[int, NDArray[np.floating[Any]]] = field(default_factory=dict)
    masses: Mapping[int, NDArray[np.floating[Any]]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Rows of the part."""
        return len(self.document)

    def document_starts(self) -> NDArray[np.int64]:
        """Row at which each document starts, with the number of rows at the end, shape (document + 1,)."""
        return run_starts(self.document)

    def sequence_starts(self) -> NDArray[np.int64]:
        """Row at which each run of consecutive tokens starts, with the number of rows at the end, shape (run + 1,).

        A run is a sequence, or what is left of one between tokens that were not recorded.
        """
        return consecutive_starts(self.document_starts(), self.position)

    @classmethod
    def joined(cls, parts: Sequence[Part]) -> Part:
        """The rows of several parts, one after the other; they have the same domain names, layers and columns."""
        first = parts[0]
        if len(parts) == 1:
            return first

        def column(name: str) -> NDArray[Any]:
            return np.concatenate([getattr(part, name) for part in parts])

        def columns(name: str) -> dict[Any, NDArray[Any]]:
            return {key: np.concatenate([getattr(part, name)[key] for part in parts]) for key in getattr(first, name)}

        phase = None if first.phase is None else column("phase")
        joined: dict[str, Any] = {name: column(name) for name in _NUMBERS} | {name: columns(name) for name in _BY_LAYER}
        for name in _LABELS:
            if getattr(first, name) is not None:
                joined[name] = RowLabels.joined([getattr(part, name) for part in parts])
        return replace(first, **joined, phase=phase)

    def rows(self, selected: slice | NDArray[Any]) -> Part:
        """The part that holds only the selected rows."""
        chosen: dict[str, Any] = {name: getattr(self, name)[selected] for name in _NUMBERS}
        for name in _BY_LAYER:
            chosen[name] = {key: column[selected] for key, column in getattr(self, name).items()}
        for name in _LABELS:
            if (labels := getattr(self, name)) is not None:
                chosen[name] = labels.rows(selected)
        return replace(self, **chosen, phase=None if self.phase is None else self.phase[selected])


def consecutive_starts(document_starts: NDArray[np.int64], position: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Rows at which a document starts or the position does not go on by one, with the number of rows at the end.

    Example:
        >>> consecutive_starts(np.array([0, 4, 6]), np.array([0, 1, 0, 1, 2, 4])).tolist()
        [0, 2, 4, 5, 6]
    """
    jumps = np.flatnonzero(np.diff(position.astype(np.int64)) != 1) + 1
    return np.union1d(document_starts, jumps).astype(np.int64)
