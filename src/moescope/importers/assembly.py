"""Documents in, a trace out: every check that routing allows is made here, once, for all formats.

Unit: a token, or an assignment in a trace of counts. What cannot be right is refused; what looks odd is imported and
noted. A trace's header comes before its parts and is known only after the last document, so parts wait in a folder
beside the trace; one part waits in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportIncomplete, ImportMalformed, ImportTooLarge
from moescope.importers.documents import NO_MODEL, CountedDocument, Model, RoutedDocument
from moescope.importers.findings import Findings, Options
from moescope.trace import Counts, Header, Layer, Part, Trace, TraceWriter, Vocabulary, open_trace

PART_TOKENS = 65_536
PART_CELLS = 1 << 24
"""Assignments after which a part is closed although it has fewer tokens."""
MAX_DOCUMENT_CELLS = 1 << 26
"""Assignments of one document, which must be held in memory."""
PART_ROWS = 1 << 19
"""Rows of a part of counts."""
MAX_LAYERS = 1024
MAX_DOMAINS = 1 << 16
MAX_PIECES = 1 << 21
REPEATED_ROWS = 1000
"""Identical tokens in a row that look like a warm-up."""

Arrays = dict[str, NDArray[Any]]


def write(
    out: Path,
    documents: Iterable[RoutedDocument | CountedDocument],
    options: Options,
    findings: Findings,
    *,
    corpus: Mapping[str, Any],
    run: Mapping[str, Any],
    vocabulary: Vocabulary | None = None,
    force: bool = False,
) -> Trace:
    """Check the documents and write them as a trace.

    Args:
        out: Folder of the trace.
        documents: All of one kind; read once, one at a time.
        options: What the user says of the model.
        findings: Where to note what is odd; told at the end, and kept in the trace.
        corpus: Provenance of the text.
        run: Provenance of the recording.
        vocabulary: Text pieces of the token ids, if known.
        force: Replace a finished trace.
    Returns:
        The finished trace.
    Raises:
        ForeignTraceError: The documents cannot be right.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", suffix=".import", dir=out.parent) as folder:
        assembly: _Routed | _Counted | None = None
        for document in documents:
            if assembly is None:
                kind = _Routed if isinstance(document, RoutedDocument) else _Counted
                assembly = kind(Path(folder), options, findings)
            assembly.add(document)  # type: ignore[arg-type]
        if assembly is None:
            raise ImportMalformed(corpus["name"], "holds no routing at all")
        header = assembly.finish(str(corpus["name"]))
        header = replace(header, corpus=dict(corpus), run=dict(run))
        pieces = vocabulary or Vocabulary(assembly.pieces if header.token_ids else {})
        totals = {"documents": assembly.num_documents, **assembly.totals}
        with TraceWriter(out, header, pieces, force=force) as writer:
            for index, (rows, note) in enumerate(assembly.parts(header)):
                if index >= len(writer.progress):  # an interrupted import was here before
                    writer.write(rows, note)
            writer.finish(totals | {"warnings": findings.messages()})
    findings.tell()
    return open_trace(out)


@dataclass
class _Spool:
    """Bundles of arrays, kept in order; all but the first on disk."""

    folder: Path
    length: int = 0
    _first: Arrays = field(default_factory=dict)

    def put(self, arrays: Arrays) -> None:
        if self.length == 0:
            self._first = arrays
        else:
            with (self.folder / f"{self.length}.npz").open("wb") as file:
                np.savez(file, **arrays)
        self.length += 1

    def __iter__(self) -> Iterator[Arrays]:
        for index in range(self.length):
            if index == 0:
                yield self._first
            else:
                with np.load(self.folder / f"{index}.npz", allow_pickle=False) as arrays:
                    yield dict(arrays)


@dataclass
class _Assembly:
    """What both kinds of documents need: the model they agree on, and their domains."""

    folder: Path
    options: Options
    findings: Findings
    num_documents: int = 0
    pieces: dict[int, bytes] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)
    _model: Model = NO_MODEL
    _domains: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._spool = _Spool(self.folder)
        given = self.options
        self._model = Model(given.model or "", given.num_experts, given.top_k, given.num_layers)

    def _learn(self, model: Model, place: str) -> None:
        """Add what a document says of the model to what is known; a contradiction is refused."""
        if model is self._model or model == NO_MODEL:
            return
        known = self._model
        merged = {}
        for name, words in (
            ("num_experts", "experts"),
            ("top_k", "experts a token"),
            ("num_layers", "layers"),
            ("num_moe_layers", "layers with routed experts"),
        ):
            here, before = getattr(model, name), getattr(known, name)
            if here is not None and before is not None and here != before:
                raise ImportMalformed(place, f"says {here} {words}; an option or an earlier file says {before}")
            merged[name] = before if here is None else here
        if model.name and known.name and model.name != known.name and not self.options.model:
            raise ImportMalformed(
                place,
                f"is of model {model.name[:80]!r}, an earlier file of {known.name[:80]!r}",
                "import them one by one",
            )
        self._model = Model(known.name or model.name[:1000], **merged)

    def _code(self, domain: str, place: str) -> int:
        if len(domain) > 1000:
            raise ImportMalformed(place, f"its domain is {len(domain)} characters long, expected a label")
        code = self._domains.setdefault(domain, len(self._domains))
        if code >= MAX_DOMAINS:
            raise ImportTooLarge(place, f"is in domain number {code + 1}", "is the right field taken for the domain?")
        return code

    def _check_layer(self, layer: int, place: str) -> None:
        if not 0 <= layer < 2**16:
            raise ImportMalformed(place, f"has layer {layer}, expected 0 to 65535")
        if self._model.num_layers is not None and layer >= self._model.num_layers:
            raise ImportMalformed(place, f"has layer {layer}, but the model has {self._model.num_layers} layers")
        if self.options.layers is not None and layer not in self.options.layers:
            raise ImportMalformed(place, f"has layer {layer}, which --layers does not name")

    def _num_experts(self, largest: int) -> int:
        if self._model.num_experts is not None:
            return self._model.num_experts
        self.findings.warn(
            f"the number of experts is not in the file and was taken to be {largest + 1}, the largest id and one; "
            "--num-experts says it"
        )
        return largest + 1

    def _check_layers(self, layers: list[int], name: str) -> None:
        if not layers:
            raise ImportMalformed(name, "has no layer with routing: every value is zero or padding")
        expected = self._model.num_moe_layers or (None if self.options.layers is None else len(self.options.layers))
        if expected is not None and expected != len(layers):
            self.findings.warn(f"{len(layers)} layers have routing, expected {expected}")
        elif expected is None and self._model.num_layers not in (None, len(layers)):
            self.findings.warn(
                f"{len(layers)} of the model's {self._model.num_layers} layers have routing; are the others dense?"
            )
        if expected is None and self._model.num_layers is None:
            gaps = sorted(set(range(layers[0], layers[-1] + 1)) - set(layers))
            steps = set(np.diff(layers).tolist())
            if gaps and len(steps) > 1:
                self.findings.warn(f"layers {_spans(gaps)} between others have no routing; are they dense?")

    def _described(self) -> dict[str, Any]:
        return {"name": self._model.name or "unknown"}


@dataclass
class _LayerFacts:
    """What was seen of a layer so far."""

    largest: int = -1
    width: int = 0
    zero_rows: int = 0
    ids_all_zero: bool = True
    nulls: int = 0
    null_rows: int = 0


@dataclass
class _Routed(_Assembly):
    """Documents of tokens."""

    _waiting: list[RoutedDocument] = field(default_factory=list)
    _tokens: int = 0
    _cells: int = 0
    _rows: int = 0
    _layers: dict[int, _LayerFacts] = field(default_factory=dict)
    _weights: bool = True
    _any_weights: bool = False
    _token_ids: bool = True
    _any_token_ids: bool = False
    _phases: bool = True
    _any_phases: bool = False
    _ranked: bool = True
    _zero_is_dense: bool = False
    _zero_everywhere: int = 0
    _run: int = 0
    _run_place: str = ""
    _repeated: int = 0
    _repeated_place: str = ""
    _last: dict[int, NDArray[Any]] = field(default_factory=dict)

    def add(self, document: RoutedDocument) -> None:
        place = document.place
        if not isinstance(document, RoutedDocument):
            raise ImportMalformed(place, "holds counts, and what came before holds tokens", "import them one by one")
        self._learn(document.model, place)
        shapes = {layer: ids.shape for layer, ids in document.expert_ids.items()}
        num_tokens = next(iter(shapes.values()), (0,))[0]
        if num_tokens == 0:
            self.findings.count("documents without a token were left out")
            return
        for layer, shape in shapes.items():
            self._check_layer(layer, place)
            if len(shape) != 2 or shape[0] != num_tokens or not 1 <= shape[1] <= 4096:
                raise ImportMalformed(
                    f"{place}, layer {layer}", f"ids have the shape {shape}, expected ({num_tokens}, choices)"
                )
        cells = sum(rows * width for rows, width in shapes.values())
        if (
            cells > MAX_DOCUMENT_CELLS
            or num_tokens * len(shapes) * max(w for _, w in shapes.values()) > 4 * PART_CELLS * 4
        ):
            raise ImportTooLarge(
                place, f"has {cells:,} assignments in one document, expected at most {MAX_DOCUMENT_CELLS:,}"
            )
        for name, column in (("token ids", document.token_ids), ("phases", document.phase), ("", document.starts)):
            if column is not None and column.shape != (num_tokens,):
                raise ImportMalformed(place, f"has {num_tokens} tokens of routing, but {len(column)} {name}")
        if document.token_ids is not None and not 0 <= document.token_ids.min() <= document.token_ids.max() < 2**32:
            raise ImportMalformed(place, "a token id is below 0 or beyond 32 bits")
        for piece_id, piece in document.pieces.items():
            if len(self.pieces) < MAX_PIECES:
                self.pieces.setdefault(piece_id, piece)
        self._layers.update({layer: _LayerFacts() for layer in shapes if layer not in self._layers})
        if len(self._layers) > MAX_LAYERS:
            raise ImportMalformed(place, f"has the {len(self._layers)}th layer, expected at most {MAX_LAYERS}")
        self._waiting.append(document)
        self._tokens += num_tokens
        self._cells += cells
        if self._tokens >= PART_TOKENS or self._cells >= PART_CELLS:
            self._flush()

    def _flush(self) -> None:
        """Join the waiting documents to one part, check it and put it aside."""
        documents, self._waiting = self._waiting, []
        lengths = np.array([next(iter(d.expert_ids.values())).shape[0] for d in documents])
        ends = np.cumsum(lengths)
        num_tokens = int(ends[-1])
        places = _Places([d.place for d in documents], ends)
        layers = sorted({layer for d in documents for layer in d.expert_ids})
        all_weights = all(set(d.gate_weights) == set(d.expert_ids) for d in documents)
        self._any_weights |= any(d.gate_weights for d in documents)
        self._weights &= all_weights
        self._ranked &= all(d.ranked for d in documents)
        self._token_ids &= all(d.token_ids is not None for d in documents)
        self._any_token_ids |= any(d.token_ids is not None for d in documents)
        self._phases &= all(d.phase is not None for d in documents)
        self._any_phases |= any(d.phase is not None for d in documents)
        zero_is_dense = all(d.zero_is_dense for d in documents)
        self._zero_is_dense |= zero_is_dense

        starts = np.zeros(num_tokens, bool)
        for d, end, length in zip(documents, ends, lengths, strict=True):
            if d.starts is not None:
                starts[end - length : end] = d.starts
            starts[end - length] = True
        arrays: Arrays = {
            "document": np.repeat(np.arange(self.num_documents, self.num_documents + len(documents)), lengths),
            "domain": np.repeat(np.array([self._code(d.domain, d.place) for d in documents]), lengths),
            "starts": starts,
        }
        if self._token_ids:
            arrays["token_id"] = np.concatenate([np.asarray(d.token_ids) for d in documents]).astype(np.uint32)
        if self._phases:
            arrays["phase"] = np.concatenate([np.asarray(d.phase) for d in documents]).astype(np.uint8)
        zero_rows = np.ones(num_tokens, bool)
        for layer in layers:
            blocks = [d.expert_ids.get(layer) for d in documents]
            ids = self._joined(layer, blocks, lengths, places)
            zero = self._check_ids(layer, ids, places, zero_is_dense)
            zero_rows &= zero
            arrays[f"L{layer}"] = ids
            if self._weights:
                weights = np.zeros(ids.shape, np.float32)
                for d, end, length in zip(documents, ends, lengths, strict=True):
                    if (block := d.gate_weights.get(layer)) is not None:
                        if block.shape != d.expert_ids[layer].shape:
                            raise ImportMalformed(
                                f"{d.place}, layer {layer}",
                                f"has gate weights of shape {block.shape}, ids of {d.expert_ids[layer].shape}",
                            )
                        with np.errstate(over="ignore"):
                            weights[end - length : end, : block.shape[1]] = block
                weights[ids < 0] = 0
                arrays[f"W{layer}"] = weights
        if not any(f"W{layer}" in arrays for layer in layers):
            self._weights = False
        self._zero_everywhere += int(zero_rows.sum()) if layers else 0
        if self._weights:
            self._order_by_weight(arrays, layers, places)
        self._find_repeats(arrays, layers, places)
        self._spool.put(arrays)
        self.num_documents += len(documents)
        self._rows += num_tokens
        self._tokens = self._cells = 0

    def _joined(
        self, layer: int, blocks: list[NDArray[Any] | None], lengths: NDArray[np.int64], places: _Places
    ) -> NDArray[Any]:
        """Ids of one layer, shape (token, choice); -1 where a document says nothing. Ids beyond bounds are refused."""
        width = max(block.shape[1] for block in blocks if block is not None)
        highest = (self._model.num_experts or 2**16) - 1
        ids = np.full((int(lengths.sum()), width), -1, np.int16 if highest < 2**15 else np.int32)
        end = 0
        for block, length in zip(blocks, lengths.tolist(), strict=True):
            end += length
            if block is None:
                continue
            if block.min() < -1 or block.max() > highest:
                row = int(np.flatnonzero((block < -1).any(axis=1) | (block > highest).any(axis=1))[0])
                bad = [int(i) for i in block[row] if not -1 <= i <= highest][0]
                raise ImportMalformed(
                    f"{places.at(end - length + row)}, layer {layer}",
                    f"has expert id {bad}, expected 0 to {highest}",
                    "is the number of experts right, and are shared experts counted among the ids?",
                )
            ids[end - length : end, : block.shape[1]] = block
        return ids

    def _check_ids(self, layer: int, ids: NDArray[Any], places: _Places, zero_is_dense: bool) -> NDArray[np.bool_]:
        """Refuse an expert chosen twice; return which rows are nothing but zeros, and were no routing."""
        facts = self._layers[layer]
        zero = np.zeros(len(ids), bool)
        used = np.flatnonzero((ids >= 0).any(axis=0))
        width = int(used[-1]) + 1 if len(used) else 0
        if self._model.top_k is not None and width > self._model.top_k:
            raise ImportMalformed(
                f"{places.at(int(np.flatnonzero(ids[:, width - 1] >= 0)[0]))}, layer {layer}",
                f"has {width} experts a token, expected {self._model.top_k}",
            )
        if ids.shape[1] > 1 and width:
            ordered = np.sort(ids[:, :width], axis=1)
            twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
            if twice.any():
                if zero_is_dense:
                    zero = (ids[:, :width] == 0).all(axis=1)
                    twice &= ~zero
                if twice.any():
                    row = int(np.flatnonzero(twice)[0])
                    raise ImportMalformed(
                        f"{places.at(row)}, layer {layer}",
                        f"chooses an expert twice ({_row(ids[row])}), expected {width} different ones",
                    )
                ids[zero] = -1
        chosen = ids[:, :width]
        facts.zero_rows += int(zero.sum())
        facts.width = max(facts.width, width)
        if width:
            facts.largest = max(facts.largest, int(chosen.max()))
            facts.ids_all_zero &= facts.largest <= 0 and not (chosen > 0).any()
        facts.null_rows += int((chosen < 0).all(axis=1).sum()) if width else len(ids)
        facts.nulls += int((chosen < 0).any(axis=1).sum()) if width else len(ids)
        return zero

    def _order_by_weight(self, arrays: Arrays, layers: list[int], places: _Places) -> None:
        """Put choices in order of gate weight, the largest first, where they are not."""
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
                self.findings.warn(f"layer {layer} has gate weights below 0; are they router logits?")
            unordered = (weights[:, 1:] > weights[:, :-1]).any(axis=1)
            if unordered.any():
                rows = np.flatnonzero(unordered)
                order = np.argsort(-weights[rows], axis=1, kind="stable")
                weights[rows] = np.take_along_axis(weights[rows], order, axis=1)
                ids[rows] = np.take_along_axis(ids[rows], order, axis=1)
                self.findings.count("(token, layer) rows were put in order of gate weight", len(rows))

    def _find_repeats(self, arrays: Arrays, layers: list[int], places: _Places) -> None:
        """Count tokens that are routed exactly like the one before them, in long runs."""
        same = np.ones(len(arrays["document"]), bool)
        for layer in layers:
            ids = arrays[f"L{layer}"]
            last = self._last.get(layer)
            same[0] &= last is not None and last.shape == ids[0].shape and bool((last == ids[0]).all())
            same[1:] &= (ids[1:] == ids[:-1]).all(axis=1)
        self._last = {layer: arrays[f"L{layer}"][-1].copy() for layer in layers}
        breaks = np.flatnonzero(~same)
        if not len(breaks):
            self._run += len(same)
            return
        self._end_run(int(breaks[0]))
        runs = np.diff(np.append(breaks, len(same)))
        for at in np.flatnonzero(runs[:-1] >= REPEATED_ROWS):
            self._run, self._run_place = 0, places.at(int(breaks[at]))
            self._end_run(int(runs[at]))
        self._run, self._run_place = int(runs[-1]), places.at(int(breaks[-1]))

    def _end_run(self, more: int = 0) -> None:
        if self._run + more >= REPEATED_ROWS:
            self._repeated += self._run + more
            self._repeated_place = self._repeated_place or self._run_place
        self._run = 0

    def finish(self, name: str) -> Header:
        """Close the last part; the header, now that everything is known."""
        if self._waiting:
            self._flush()
        if not self._rows:
            raise ImportMalformed(name, "holds no token")
        self._end_run()
        if self._repeated:
            self.findings.warn(
                f"{self._repeated:,} tokens are routed exactly like the one before them, in runs of {REPEATED_ROWS:,} or "
                f"more, the first at {self._repeated_place}; is it a warm-up?"
            )
        kept = self._routed_layers(name)
        self._check_layers(kept, name)
        if self._any_weights and not self._weights and not any("gate weights" in m for m in self.findings.messages()):
            self.findings.warn("gate weights were left out: not every token has them")
        if self._any_token_ids and not self._token_ids:
            self.findings.warn("token ids were left out: not every document has them")
        if self._any_phases and not self._phases:
            self.findings.warn("phases were left out: not every document tells prefill and decode apart")
        num_experts = self._num_experts(max(self._layers[layer].largest for layer in kept))
        ranked = self._weights or self._ranked or self.options.ranked
        if not ranked:
            self.findings.warn(
                "the order of a token's choices is unknown: rank 0 need not have the largest gate weight"
            )
        layers = []
        for index in kept:
            facts = self._layers[index]
            top_k = self._model.top_k or facts.width
            if top_k > num_experts:
                raise ImportMalformed(f"{name}, layer {index}", f"has {top_k} experts a token, of {num_experts}")
            missing = facts.nulls + self._unseen(index) + (self._rows if facts.width < top_k else 0)
            if missing:
                whole = facts.null_rows + self._unseen(index)
                self.findings.warn(
                    f"layer {index}: {min(missing, self._rows):,} of {self._rows:,} tokens have fewer than {top_k} experts"
                    + (f", {whole:,} of them none" if whole else "")
                    + "; what is missing is recorded as assignments that ran no expert"
                )
            if facts.ids_all_zero and num_experts > 1:
                self.findings.warn(
                    f"layer {index} sends every token to expert 0; is it a dense layer? --layers says so"
                )
            layers.append(Layer(index, num_experts, top_k, ranked=ranked, drops=bool(missing)))
        self.totals = {"tokens": self._rows}
        return Header(
            tuple(layers),
            weights=self._weights,
            model=self._described(),
            tokenizer={"ids": "numbered by the importer, by first appearance"}
            if self.pieces and self._token_ids
            else {},
            token_ids=self._token_ids,
            phases=self._phases,
        )

    def _unseen(self, layer: int) -> int:
        """Tokens of parts in which the layer does not occur at all."""
        return self._rows - sum(len(arrays[f"L{layer}"]) for arrays in self._spool if f"L{layer}" in arrays)

    def _routed_layers(self, name: str) -> list[int]:
        """Layers that have routing; those of nothing but padding or zeros are left out, and told of."""
        empty = [layer for layer, facts in self._layers.items() if facts.width == 0]
        dense = [
            layer for layer, facts in self._layers.items() if facts.width and facts.zero_rows and facts.largest <= 0
        ]
        if empty:
            self.findings.warn(f"layers {_spans(sorted(empty))} hold padding only and were left out as dense")
        if dense:
            self.findings.warn(
                f"layers {_spans(sorted(dense))} are zero everywhere, as these programs write dense layers, and were left out"
            )
        kept = sorted(set(self._layers) - set(empty) - set(dense))
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
        """The parts that were put aside, as the header says."""
        names = tuple(self._domains)
        for arrays in self._spool:
            starts, document = arrays["starts"], arrays["document"]
            rows = np.arange(len(document))
            begin = np.maximum.accumulate(np.where(starts, rows, 0))
            counter = np.cumsum(starts)
            first = np.append(True, document[1:] != document[:-1])
            base = np.maximum.accumulate(np.where(first, counter, 0))
            ids, weights = {}, {}
            for layer in header.layers:
                ids[layer.layer] = _of_width(arrays.get(f"L{layer.layer}"), len(rows), layer.top_k, -1)
                if header.weights:
                    weights[layer.layer] = _of_width(arrays.get(f"W{layer.layer}"), len(rows), layer.top_k, 0)
            part = Part(
                document.astype(np.uint32),
                arrays["domain"],
                names,
                (counter - base).astype(np.uint32),
                (rows - begin).astype(np.uint32),
                arrays["token_id"] if header.token_ids else np.zeros(len(rows), np.uint32),
                ids,
                weights,
                arrays["phase"] if header.phases else None,
            )
            yield part, {"documents": int(document[-1]) + 1}


@dataclass
class _Counted(_Assembly):
    """Documents of counts."""

    _rows: list[NDArray[np.int64]] = field(default_factory=list)
    _waiting: int = 0
    _totals: dict[int, int] = field(default_factory=dict)
    _largest: int = -1
    _lengths: dict[int, int] = field(default_factory=dict)
    _indivisible: int = 0
    _unequal: int = 0

    def add(self, document: CountedDocument) -> None:
        place = document.place
        if not isinstance(document, CountedDocument):
            raise ImportMalformed(place, "holds tokens, and what came before holds counts", "import them one by one")
        self._learn(document.model, place)
        rows, totals = [], {}
        code = self._code(document.domain, place)
        for layer, counts in sorted(document.counts.items()):
            self._check_layer(layer, place)
            where = f"{place}, layer {layer}"
            if counts.ndim != 1 or not 1 <= len(counts) <= 2**16:
                raise ImportMalformed(where, f"has counts of shape {counts.shape}, expected one an expert")
            if counts.min() < 0 or counts.max() >= 2**53:
                raise ImportMalformed(where, f"counts {counts.min()} to {counts.max()}, expected 0 to 2**53 - 1")
            experts = np.flatnonzero(counts)
            self._largest = max(self._largest, int(experts[-1]) if len(experts) else -1)
            if document.complete:
                if self._lengths.setdefault(layer, len(counts)) != len(counts):
                    raise ImportMalformed(where, f"counts {len(counts)} experts, earlier {self._lengths[layer]}")
                if self._model.num_experts not in (None, len(counts)):
                    raise ImportMalformed(where, f"counts {len(counts)} experts, expected {self._model.num_experts}")
            elif self._model.num_experts is not None and self._largest >= self._model.num_experts:
                raise ImportMalformed(
                    where, f"has expert id {self._largest}, expected 0 to {self._model.num_experts - 1}"
                )
            totals[layer] = int(counts.sum(dtype=np.uint64)) if len(counts) else 0
            self._totals[layer] = self._totals.get(layer, 0) + totals[layer]
            layer_rows = np.empty((4, len(experts)), np.int64)
            layer_rows[:] = self.num_documents, layer, 0, 0
            layer_rows[2], layer_rows[3] = experts, counts[experts]
            rows.append(layer_rows)
        if len(self._totals) > MAX_LAYERS:
            raise ImportMalformed(place, f"has {len(self._totals)} layers, expected at most {MAX_LAYERS}")
        counted = [total for total in totals.values() if total]
        if not counted:
            self.findings.count("documents or passes count nothing and were left out (an unfilled buffer is zero)")
            return
        top_k = self._model.top_k
        self._indivisible += bool(top_k and any(total % top_k for total in counted))
        self._unequal += len(set(counted)) > 1
        joined = np.concatenate(rows, axis=1)
        self._rows.append(np.concatenate([joined, np.full((1, joined.shape[1]), code)]))
        self._waiting += joined.shape[1]
        self.num_documents += 1
        if self._waiting >= PART_ROWS:
            self._flush()

    def _flush(self) -> None:
        self._spool.put({"rows": np.concatenate(self._rows, axis=1)})
        self._rows, self._waiting = [], 0

    def finish(self, name: str) -> Header:
        """Close the last part; the header, now that everything is known."""
        if self._rows:
            self._flush()
        dense = sorted(layer for layer, total in self._totals.items() if total == 0)
        kept = sorted(set(self._totals) - set(dense))
        if dense and kept:
            self.findings.warn(f"layers {_spans(dense)} count nothing and were left out as dense")
        self._check_layers(kept, name)
        if self._model.top_k is None:
            raise ImportIncomplete(name, "does not say how many experts a token has", "--top-k K says it")
        if self._indivisible:
            self.findings.warn(
                f"in {self._indivisible:,} documents or passes the assignments of a layer are no multiple of top-k "
                f"{self._model.top_k}; is it the right top-k, and are the counts exact and of all ranks?"
            )
        if self._unequal:
            self.findings.warn(
                f"in {self._unequal:,} documents or passes layers count different numbers of assignments"
            )
        found = max(self._largest + 1, *self._lengths.values()) if self._lengths else 0
        num_experts = self._model.num_experts or found or self._num_experts(self._largest)
        if self._model.top_k > num_experts:
            raise ImportMalformed(name, f"has {self._model.top_k} experts a token, of {num_experts}")
        layers = tuple(
            Layer(layer, self._lengths.get(layer, num_experts), self._model.top_k, ranked=False) for layer in kept
        )
        return Header(layers, model=self._described(), token_ids=False, counts_only=True)

    def parts(self, header: Header) -> Iterator[tuple[Counts, dict[str, Any]]]:
        """The parts that were put aside."""
        names = tuple(self._domains)
        for arrays in self._spool:
            document, layer, expert, count, domain = arrays["rows"]
            yield Counts(document, domain, names, layer, expert, count), {"documents": int(document[-1]) + 1}


@dataclass(frozen=True)
class _Places:
    """Which document a row of a part is of."""

    names: list[str]
    ends: NDArray[np.int64]

    def at(self, row: int) -> str:
        index = int(np.searchsorted(self.ends, row, side="right"))
        return f"{self.names[index]}, token {row - (int(self.ends[index - 1]) if index else 0)}"


def _of_width(values: NDArray[Any] | None, rows: int, width: int, fill: int) -> NDArray[Any]:
    """A layer's columns, cut or filled to `width`."""
    if values is None:
        return np.full((rows, width), fill, np.int32 if fill else np.float32)
    if values.shape[1] >= width:
        return values[:, :width]
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=fill)


def _row(ids: NDArray[Any]) -> str:
    return ", ".join(map(str, ids[:12].tolist())) + (", …" if len(ids) > 12 else "")


def _spans(numbers: list[int]) -> str:
    """Numbers in words.

    Example:
        >>> _spans([0, 1, 2, 5])
        '0-2, 5'
    """
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
