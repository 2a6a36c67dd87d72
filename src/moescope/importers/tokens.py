"""Documents of tokens assembled to a trace: all checks of routing are made here, once, for all formats.

Unit: a token. Invalid input is refused; unusual input is imported with a warning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportMalformed, ImportTooLarge
from moescope.importers.assembly import MAX_LAYERS, Arrays, Assembly
from moescope.importers.documents import CountedDocument, TokenDocument
from moescope.trace import Header, Layer, Part, RowLabels
from moescope.trace.columns import DROPPED, NOT_RECORDED
from moescope.trace.header import ranges
from moescope.trace.part_file import PART_TOKENS

PART_CELLS = 1 << 24
"""Assignments after which a part is closed although it has fewer tokens: 32 MB of int16."""
MAX_DOCUMENT_CELLS = 1 << 26
"""Assignments of one document, which must be held in memory: 256 MB of int32, as much of weights."""
MAX_DOCUMENT_TOKENS = 1 << 22
MAX_PIECES = 1 << 21  # several times the largest vocabularies
REPEATED_ROWS = 1000
"""Identical tokens in a row that suggest a warm-up: text does not route so many alike."""
REPEATS_LISTED = 8  # a line that can be pasted


_OPTIONAL: Mapping[str, Callable[[TokenDocument], bool]] = {
    "token_ids": lambda document: document.token_ids is not None,
    "phases": lambda document: document.phase is not None,
    "clusters": lambda document: document.cluster is not None,
    "labels": lambda document: document.label is not None,
    "margins": lambda document: set(document.margins) >= set(document.expert_ids),
    "masses": lambda document: set(document.masses) >= set(document.expert_ids),
}
"""What a trace has if every document has it, by the field of the header that says so."""


@dataclass
class _LayerFacts:
    """What is known of a layer so far."""

    largest: int = -1  # largest id; -1 if there is none
    zero_rows: int = 0  # tokens whose ids are all zero, which is not routing
    width: int = 0  # slots used: one more than the last that holds an expert of any token
    filled: Counter[int] = field(default_factory=Counter)  # tokens by number of experts
    recorded: int = 0  # tokens whose choice in the layer was recorded, even if no expert ran


@dataclass
class Tokens(Assembly):
    """Documents of tokens."""

    _waiting: list[TokenDocument] = field(default_factory=list)
    _tokens: int = 0
    _widths: dict[int, int] = field(default_factory=dict)
    _largest_part: int = 0
    _rows: int = 0
    _layers: dict[int, _LayerFacts] = field(default_factory=dict)
    _weights: bool = True
    _any_weights: bool = False
    _all: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(_OPTIONAL, True))
    _any: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(_OPTIONAL, False))
    _labels: dict[str, dict[str, int]] = field(default_factory=lambda: {"cluster": {}, "label": {}})
    _ranked: bool = True
    _zero_everywhere: int = 0
    _run_start: int = 0
    _repeats: list[tuple[int, int]] = field(default_factory=list)
    _last: dict[int, NDArray[Any]] = field(default_factory=dict)

    def add(self, document: TokenDocument | CountedDocument) -> None:
        """Take the next document."""
        place = document.place
        if not isinstance(document, TokenDocument):
            raise ImportMalformed(place, "holds counts, but earlier documents hold tokens", "import them separately")
        self.learn(document.model, place)
        wanted = {layer: ids for layer, ids in document.expert_ids.items() if self.takes(layer, place)}
        if len(wanted) < len(document.expert_ids):
            weights = {layer: array for layer, array in document.gate_weights.items() if layer in wanted}
            document = replace(document, expert_ids=wanted, gate_weights=weights)
        shapes = {layer: ids.shape for layer, ids in wanted.items()}
        num_tokens = next(iter(shapes.values()), (0,))[0]
        if num_tokens == 0:
            self.findings.count("documents without a token were left out")
            return
        for layer, shape in shapes.items():
            if len(shape) != 2 or shape[0] != num_tokens or not 1 <= shape[1] <= 4096:
                raise ImportMalformed(
                    f"{place}, layer {layer}", f"ids have shape {shape}, expected ({num_tokens}, choices)"
                )
        cells = num_tokens * sum(width for _, width in shapes.values())
        if cells > MAX_DOCUMENT_CELLS or num_tokens > MAX_DOCUMENT_TOKENS:
            raise ImportTooLarge(
                place,
                f"is one document of {num_tokens:,} tokens and {cells:,} assignments, expected at most "
                f"{MAX_DOCUMENT_TOKENS:,} and {MAX_DOCUMENT_CELLS:,}",
            )
        for name, column in (("token ids", document.token_ids), ("phases", document.phase), ("", document.starts)):
            if column is not None and column.shape != (num_tokens,):
                raise ImportMalformed(place, f"has {num_tokens} tokens of routing, but {len(column)} {name}")
        if document.token_ids is not None and not 0 <= document.token_ids.min() <= document.token_ids.max() < 2**32:
            raise ImportMalformed(place, "a token id is below 0 or beyond 32 bits")
        for layer, array in document.gate_weights.items():
            if array.shape != shapes.get(layer):
                expected = f"ids of {shapes[layer]}" if layer in shapes else "and no ids"
                raise ImportMalformed(f"{place}, layer {layer}", f"has gate weights of shape {array.shape}, {expected}")
        if not (kept := self.kept(num_tokens)).all():
            if not kept.any():
                return
            document, num_tokens = document.only(kept), int(kept.sum())
        for piece_id, piece in document.pieces.items():
            if len(self.pieces) < MAX_PIECES:
                self.pieces.setdefault(piece_id, piece)
        self._layers.update({layer: _LayerFacts() for layer in shapes if layer not in self._layers})
        if len(self._layers) > MAX_LAYERS:
            raise ImportMalformed(place, f"has the {len(self._layers)}th layer, expected at most {MAX_LAYERS}")
        widths = {layer: max(self._widths.get(layer, 0), width) for layer, (_, width) in shapes.items()}
        joined = (self._tokens + num_tokens) * sum((self._widths | widths).values())
        if self._waiting and joined > max(2 * PART_CELLS, 2 * cells):  # documents of different layers
            self._flush()
        self._waiting.append(document)
        self._widths |= widths
        self._tokens += num_tokens
        if self._tokens >= PART_TOKENS or self._tokens * sum(self._widths.values()) >= PART_CELLS:
            self._flush()

    def _flush(self) -> None:
        """Join the waiting documents to one part, check and store it."""
        documents, self._waiting = self._waiting, []
        lengths = [len(next(iter(d.expert_ids.values()))) for d in documents]
        ends = np.cumsum(lengths)
        num_tokens = int(ends[-1])
        spans = [slice(*span) for span in pairwise([0, *ends.tolist()])]
        places = _Places([d.place for d in documents], ends)
        layers = sorted({layer for d in documents for layer in d.expert_ids})
        self._any_weights |= any(d.gate_weights for d in documents)
        self._weights &= all(set(d.gate_weights) == set(d.expert_ids) for d in documents)
        self._ranked &= all(d.ranked for d in documents)
        for what, has in _OPTIONAL.items():
            given = [has(document) for document in documents]
            self._all[what] &= all(given)
            self._any[what] |= any(given)
        zero_is_dense = all(d.zero_is_dense for d in documents)
        none_is_dropped = all(d.none_is_dropped for d in documents)

        starts = np.zeros(num_tokens, bool)
        for d, span in zip(documents, spans, strict=True):
            if d.starts is not None:
                starts[span] = d.starts
            starts[span.start] = True
        arrays: Arrays = {
            "document": np.repeat(np.arange(self.num_documents, self.num_documents + len(documents)), lengths),
            "domain": np.repeat(np.array([self.code_of(d.domain, d.place) for d in documents]), lengths),
            "starts": starts,
            "skipped": np.repeat(np.array([d.skipped for d in documents], np.int64), lengths),
        }
        if self._all["token_ids"]:
            arrays["token_id"] = np.concatenate([np.asarray(d.token_ids) for d in documents]).astype(np.uint32)
        if self._all["phases"]:
            arrays["phase"] = np.concatenate([np.asarray(d.phase) for d in documents]).astype(np.uint8)
        if self._all["clusters"]:
            arrays["cluster"] = np.repeat(self._codes("cluster", [str(d.cluster) for d in documents]), lengths)
        if self._all["labels"]:
            labels = RowLabels.joined([d.label for d in documents if d.label is not None])
            arrays["label"] = self._codes("label", labels.names)[labels.codes]
        for what, prefix in (("margins", "M"), ("masses", "S")):
            if self._all[what]:
                for layer in layers:
                    columns = [getattr(d, what)[layer] for d in documents]
                    arrays[f"{prefix}{layer}"] = np.concatenate(columns).astype(np.float32)
        zero_rows = np.ones(num_tokens, bool)
        for layer in layers:
            blocks = [d.expert_ids.get(layer) for d in documents]
            ids = self._joined(layer, blocks, spans, places, NOT_RECORDED if none_is_dropped else DROPPED)
            zero = self._check_ids(layer, ids, places, zero_is_dense, none_is_dropped)
            zero_rows &= zero
            arrays[f"L{layer}"] = ids
            if self._weights:
                weights = np.zeros(ids.shape, np.float32)
                for d, span in zip(documents, spans, strict=True):
                    if (block := d.gate_weights.get(layer)) is not None:
                        with np.errstate(over="ignore"):
                            weights[span, : block.shape[1]] = block
                weights[ids < 0] = 0
                arrays[f"W{layer}"] = weights
        self._zero_everywhere += int(zero_rows.sum())
        if self._weights:
            self._order_by_weight(arrays, layers, places)
        self._find_repeats(arrays, layers)
        self.spool.put(arrays)
        self.num_documents += len(documents)
        self._rows += num_tokens
        self._largest_part = max(self._largest_part, num_tokens)
        self._tokens, self._widths = 0, {}

    def _codes(self, column: str, labels: Sequence[str]) -> NDArray[np.int64]:
        """The number of each label of a column, in the order in which they were first seen."""
        known = self._labels[column]
        return np.array([known.setdefault(label, len(known)) for label in labels], np.int64)

    def _joined(
        self, layer: int, blocks: list[NDArray[Any] | None], spans: list[slice], places: _Places, least: int
    ) -> NDArray[Any]:
        """Ids of one layer, shape (token, choice), `NOT_RECORDED` where a document lacks it; none is out of bounds."""
        width = max(block.shape[1] for block in blocks if block is not None)
        highest = (self.model.num_experts or 2**16) - 1
        ids = np.full((spans[-1].stop, width), NOT_RECORDED, np.int16 if highest < 2**15 else np.int32)
        for block, span in zip(blocks, spans, strict=True):
            if block is None:
                continue
            if block.min() < least or block.max() > highest:
                row = int(np.flatnonzero((block < least).any(axis=1) | (block > highest).any(axis=1))[0])
                wrong_id = next(int(expert) for expert in block[row] if not least <= expert <= highest)
                raise ImportMalformed(
                    f"{places.at(span.start + row)}, layer {layer}",
                    f"has expert id {wrong_id}, expected 0 to {highest}",
                    "is the number of experts right, and do the ids include shared experts?",
                )
            ids[span] = DROPPED
            ids[span, : block.shape[1]] = block
        return ids

    def _check_ids(
        self, layer: int, ids: NDArray[Any], places: _Places, zero_is_dense: bool, none_is_dropped: bool
    ) -> NDArray[np.bool_]:
        """Refuse an expert chosen twice; return which rows are all zeros and therefore not routing.

        Rows that were not recorded become `NOT_RECORDED`.
        """
        facts = self._layers[layer]
        zero = np.zeros(len(ids), bool)
        used = np.flatnonzero((ids >= 0).any(axis=0))
        width = int(used[-1]) + 1 if len(used) else 0
        if self.model.top_k is not None and width > self.model.top_k:
            raise ImportMalformed(
                f"{places.at(int(np.flatnonzero(ids[:, width - 1] >= 0)[0]))}, layer {layer}",
                f"has {width} experts per token, expected {self.model.top_k}",
            )
        ordered = np.sort(ids[:, :width], axis=1)
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
        if zero_is_dense and twice.any():
            zero = (ids[:, :width] == 0).all(axis=1)
            twice &= ~zero
            ids[zero] = DROPPED
        if twice.any():
            row = int(np.flatnonzero(twice)[0])
            raise ImportMalformed(
                f"{places.at(row)}, layer {layer}",
                f"chooses an expert twice ({_row(ids[row])}), expected {width} different ones",
            )
        facts.zero_rows += int(zero.sum())
        facts.width = max(facts.width, width)
        facts.largest = max(facts.largest, int(ids.max()))
        facts.filled.update(dict(enumerate(np.bincount((ids >= 0).sum(axis=1)).tolist())))
        # A log has no line, or a line of padding, where a layer was not logged; arrays say themselves which is which.
        not_recorded = (ids == NOT_RECORDED).any(axis=1) if none_is_dropped else (ids < 0).all(axis=1)
        ids[not_recorded] = NOT_RECORDED
        facts.recorded += int(np.count_nonzero(~not_recorded))
        return zero

    def _order_by_weight(self, arrays: Arrays, layers: list[int], places: _Places) -> None:
        """Sort choices by gate weight, the largest first, where they are not sorted."""
        for layer in layers:
            weights, ids = arrays[f"W{layer}"], arrays[f"L{layer}"]
            if not np.isfinite(weights).all():
                self._weights = False
                row = int(np.flatnonzero(~np.isfinite(weights).all(axis=1))[0])
                self.findings.warn(
                    f"gate weights were left out: at {places.at(row)}, layer {layer}, one is NaN or infinite"
                )
                return
            if (weights < 0).any():
                self.findings.warn_of_layer(layer, "gate weights are below 0; are they router logits?")
            unordered = (weights[:, 1:] > weights[:, :-1]).any(axis=1)
            if unordered.any():
                rows = np.flatnonzero(unordered)
                order = np.argsort(-weights[rows], axis=1, kind="stable")
                weights[rows] = np.take_along_axis(weights[rows], order, axis=1)
                ids[rows] = np.take_along_axis(ids[rows], order, axis=1)
                self.findings.count("(token, layer) rows were sorted by gate weight", len(rows))

    def _find_repeats(self, arrays: Arrays, layers: list[int]) -> None:
        """Note long runs of tokens that are routed exactly like the one before them."""
        same = np.ones(len(arrays["document"]), bool)
        for layer in layers:
            ids = arrays[f"L{layer}"]
            last = self._last.get(layer)
            same[0] &= last is not None and last.shape == ids[0].shape and bool((last == ids[0]).all())
            same[1:] &= (ids[1:] == ids[:-1]).all(axis=1)
        self._last = {layer: arrays[f"L{layer}"][-1].copy() for layer in layers}
        self._end_runs(np.flatnonzero(~same) + self._rows)

    def _end_runs(self, starts: NDArray[np.int64]) -> None:
        """Note those of the runs that end where others start that are long."""
        edges = np.append(self._run_start, starts)
        long = np.flatnonzero(np.diff(edges) >= REPEATED_ROWS)
        self._repeats += [(int(edges[run]), int(edges[run + 1]) - 1) for run in long]
        self._run_start = int(edges[-1])

    def finish(self, name: str) -> Header:
        """Close the last part and return the header, now that everything is known."""
        if self._waiting:
            self._flush()
        self.check_excluded(name)
        if not self._rows:
            raise ImportMalformed(name, "holds no token")
        self._end_runs(np.array([self._rows]))
        if self._repeats:
            runs = ",".join(f"{first}-{last}" for first, last in self._repeats[:REPEATS_LISTED])
            more = f", and of {len(self._repeats) - REPEATS_LISTED} more runs" * (len(self._repeats) > REPEATS_LISTED)
            self.findings.warn(
                f"{sum(last + 1 - first for first, last in self._repeats):,} tokens are routed exactly like the one "
                f"before them, in runs of {REPEATED_ROWS:,} or more; is it a warm-up? Of any command that reads this "
                f"trace, --exclude tokens:{runs} leaves them out{more}"
            )
        kept = self._routed_layers(name)
        self.check_layers(kept, name)
        if self._any_weights and not self._weights and not any("gate weights" in m for m in self.findings.messages()):
            self.findings.warn("gate weights were left out: not every token has them")
        for what in _OPTIONAL:
            if self._any[what] and not self._all[what]:
                self.findings.warn(f"{what.replace('_', ' ')} were left out: not every document has them")
        num_experts = self.count_experts(max(self._layers[layer].largest for layer in kept))
        ranked = self._weights or self._ranked or self.options.ranked
        if not ranked:
            self.findings.warn(
                "the order of a token's choices is unknown: rank 0 need not have the largest gate weight"
            )
        layers = []
        for index in kept:
            facts = self._layers[index]
            top_k = self.model.top_k or facts.width
            if top_k > num_experts:
                raise ImportMalformed(f"{name}, layer {index}", f"has {top_k} experts per token, of {num_experts}")
            missing = self._rows - facts.filled[top_k]
            without = self._rows - facts.recorded
            if without:
                self.findings.warn_of_layer(
                    index, f"{without:,} of {self._rows:,} tokens were not recorded; no measure counts them"
                )
            if missing > without:
                self.findings.warn_of_layer(
                    index,
                    f"{missing - without:,} of {self._rows:,} tokens have fewer than {top_k} experts; "
                    "what is missing is recorded as assignments that ran no expert",
                )
            if facts.largest == 0 and num_experts > 1:
                self.findings.warn_of_layer(index, "every token goes to expert 0; is it a dense layer?")
            drops, partial = missing > without, without > 0
            layers.append(Layer(index, num_experts, top_k, ranked=ranked, drops=drops, partial=partial))
        if (cells := self._largest_part * sum(layer.top_k for layer in layers)) > 2 * MAX_DOCUMENT_CELLS:
            raise ImportTooLarge(
                name, f"has parts of {cells:,} assignments once tokens are given all {len(layers)} layers"
            )
        self.totals = {"tokens": self._rows}
        numbered = {"ids": "numbered by the importer, by first appearance"}
        return Header(
            tuple(layers),
            weights=self._weights,
            model=self.described(),
            tokenizer=numbered if self.pieces and self._all["token_ids"] else {},
            **self._all,
        )

    def _routed_layers(self, name: str) -> list[int]:
        """Layers that have routing; those of padding or zeros only are left out, with a warning."""
        unrouted = sorted(layer for layer, facts in self._layers.items() if facts.largest < 0)
        dense = [layer for layer in unrouted if self._layers[layer].zero_rows]
        empty = [layer for layer in unrouted if not self._layers[layer].zero_rows]
        if empty:
            self.findings.warn(f"layers {ranges(empty)} hold padding only and were left out as dense")
        if dense:
            self.findings.warn(
                f"layers {ranges(dense)} are zero everywhere, as these programs write dense layers, and were left out"
            )
        kept = sorted(set(self._layers) - set(unrouted))
        for layer in kept:
            extra = self._layers[layer].zero_rows - self._zero_everywhere
            if extra > 0:
                raise ImportMalformed(
                    f"{name}, layer {layer}",
                    f"has {extra:,} rows of zeros although other layers of their tokens are routed",
                )
        if self._zero_everywhere and kept:
            self.findings.warn(
                f"{self._zero_everywhere:,} tokens are zero in every layer: their routing was not recorded"
            )
        return kept

    def parts(self, header: Header) -> Iterator[tuple[Part, dict[str, Any]]]:
        """The stored parts, in the form that the header declares."""
        names = tuple(self.domains)
        for arrays in self.spool:
            starts, document = arrays["starts"], arrays["document"]
            rows = np.arange(len(document))
            begin = np.maximum.accumulate(np.where(starts, rows, 0))
            counter = np.cumsum(starts)
            first = np.append(True, document[1:] != document[:-1])
            base = np.maximum.accumulate(np.where(first, counter, 0))
            ids, weights = {}, {}
            for layer in header.layers:
                given = arrays.get(f"L{layer.layer}")
                chosen = _of_width(given, len(rows), layer.top_k, NOT_RECORDED if given is None else DROPPED)
                chosen[(chosen == NOT_RECORDED).any(axis=1)] = NOT_RECORDED
                ids[layer.layer] = chosen
                if header.weights:
                    weights[layer.layer] = _of_width(arrays.get(f"W{layer.layer}"), len(rows), layer.top_k, 0)
            part = Part(
                document.astype(np.uint32),
                arrays["domain"],
                names,
                (counter - base).astype(np.uint32),
                (rows - begin + np.where(counter == base, arrays["skipped"], 0)).astype(np.uint32),
                arrays["token_id"] if header.token_ids else np.zeros(len(rows), np.uint32),
                ids,
                weights,
                arrays["phase"] if header.phases else None,
                cluster=RowLabels(arrays["cluster"], tuple(self._labels["cluster"])) if header.clusters else None,
                label=RowLabels(arrays["label"], tuple(self._labels["label"])) if header.labels else None,
                margins={one.layer: arrays[f"M{one.layer}"] for one in header.layers if header.margins},
                masses={one.layer: arrays[f"S{one.layer}"] for one in header.layers if header.masses},
            )
            yield part, {"documents": int(document[-1]) + 1}


@dataclass(frozen=True)
class _Places:
    """The document of each row of a part."""

    names: list[str]
    ends: NDArray[np.int64]

    def at(self, row: int) -> str:
        index = int(np.searchsorted(self.ends, row, side="right"))
        return f"{self.names[index]}, token {row - (int(self.ends[index - 1]) if index else 0)}"


def _of_width(values: NDArray[Any] | None, rows: int, width: int, fill: int) -> NDArray[Any]:
    """A layer's columns, truncated or padded to `width`."""
    if values is None:
        return np.full((rows, width), fill, np.int32 if fill else np.float32)
    if values.shape[1] >= width:
        return values[:, :width]
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=fill)


def _row(ids: NDArray[Any]) -> str:
    return ", ".join(map(str, ids[:12].tolist())) + (", …" if len(ids) > 12 else "")
