"""Prefetching: which part of the experts that a token needs would have been loaded, had a predictor said which.

The unit is the assignment that ran a routed expert. For each token and layer a predictor puts the experts in an order;
recall at n is the part of the needed experts that are among the first n. What a predictor learns, it learns on other
documents than those it is judged on. Distance a counts the layers of the trace: all with routed experts, unless the
recording selected some.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moescope.errors import NoSuchLayer, NotRecorded
from moescope.measures import groups, statistics
from moescope.measures.schema import DIFFERENCE, FRACTION, described, labelled, layer_coordinates
from moescope.measures.statistics import Numbers
from moescope.simulation import prefetch_kernels as kernels
from moescope.tallying import Source
from moescope.tallying.counted import playable
from moescope.tallying.one_pass import layer_groups, sums_by_thread, threads_to_use
from moescope.tallying.token_sample import token_hashes
from moescope.trace import PHASES, Layer, Part, Trace

KINDS = ("lookahead", "transitions", "previous", "domain", "popularity")
"""What the predictors go by, those with hidden states first, the null last."""

DISTANCES = (1, 2, 4)
"""Distances of the transition tables, if the trace has no lookahead and none are asked for."""

NUM_GROUPS = 32
"""Groups of documents for the intervals; a trace of fewer documents has one each."""

NUM_FOLDS = 8
STRETCHES = 16
"""Parts of the only document of a trace, which then stand for documents."""

TABLE_BYTES = 2**28
"""Most that the transition tables of a thread may take before the folds are made fewer, down to two."""

LOOKAHEAD_SOURCE = "Eliseev and Mazur 2023 (arXiv 2312.17238), section 3.2"
_HOW_TO = "`moescope record … --lookahead 1,2,10` records it"

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Predictor:
    """A predictor.

    Attributes:
        kind: One of `KINDS`.
        distance: How many layers before it speaks; 0 if it needs no layer before.
    """

    kind: str
    distance: int = 0

    @property
    def label(self) -> str:
        """Name and distance, such as ``lookahead 2``."""
        return f"{self.kind} {self.distance}" if self.distance else self.kind


def prefetch(
    trace: Source,
    layers: Iterable[int] | None = None,
    *,
    distances: Sequence[int] | None = None,
    predictors: Sequence[str] | None = None,
    phase: Literal["prefill", "decode"] | None = None,
    threads: int | None = None,
) -> xr.Dataset:
    """How many of the needed experts would have been loaded, by predictor and by number of experts loaded.

    Predictors:

    * ``lookahead a``: what the layer's router chose from the hidden states that the router a layers before it read;
      recorded (`moescope.record(..., lookahead=...)`), and known up to the recorded number of experts;
    * ``transitions a``: sum over the token's experts i, a layers before, of P(e | i), counted in other documents and
      smoothed by popularity as if with E more pairs;
    * ``previous``: the experts of the token before at this layer, by rank, then the others by popularity;
    * ``domain``: popularity in other documents of the token's domain;
    * ``popularity``: popularity in other documents; the null that the others are measured against.

    Other documents are those of other folds, of at most 8. A trace of one document is cut into 16 stretches that stand
    for documents, which says nothing of other documents; `attrs["unit"]` tells.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`), if that holds all documents.
        layers: Layers to predict, or None for all.
        distances: How many layers before; None for those that were recorded, else 1, 2 and 4.
        predictors: Of `KINDS`; None for all that the trace allows.
        phase: Predict only tokens of this phase, and learn from them; needs a trace that knows phases.
        threads: Parts counted at a time; None for the number of processors.
    Returns:
        `loaded` is n, from 1 to the largest number of experts. By (predictor, layer, loaded): `recall` with its 95 %
        interval over documents, `recall_low`, `recall_high`, and `gain`, `gain_low`, `gain_high`: recall less that of
        popularity, of the same tokens. By (predictor, loaded): the same as `model_recall` … over the layers that all
        distances reach (`attrs["pooled_layers"]`). By (layer, loaded) and (loaded): `recall_uniform`,
        `model_recall_uniform`, n / E, what loading n experts at random gives. NaN: a layer that nothing lies so far
        before, n above the layer's experts, or beyond the recorded lists.
    Raises:
        NotRecorded: Lookahead is asked for and was not recorded, or the trace has no tokens, or no phases.
        NoSuchLayer: A layer was not recorded, or no two are so far apart.
        ValueError: A predictor or phase is unknown, a distance is no whole number from 1, or `threads` not positive.
    Source:
        Lookahead: Eliseev and Mazur 2023 (arXiv 2312.17238), section 3.2; the comparison, cross-fitting and intervals
        are ours.
    """
    trace = playable(trace, layers)
    trace.need_tokens()
    plan = _plan(trace, trace.select_layers(layers), distances, predictors, phase)
    threads = threads_to_use(threads, len(trace.parts))
    return _result(plan, _count(trace, plan, _learn(trace, plan, threads), threads))


@dataclass(frozen=True)
class _Units:
    """Documents, or stretches of the only one.

    Attributes:
        numbers: Document numbers, ascending, shape (document,).
        group: Group of each; of stretches, which are one each, only how many.
        num_groups: Groups.
        num_folds: Folds; that of a group is its remainder.
        stretches: Whether they are stretches of one document, of this many tokens.
        tokens: Tokens of that document.
    """

    numbers: NDArray[np.int64]
    group: NDArray[np.int64]
    num_groups: int
    num_folds: int
    stretches: bool
    tokens: int

    @classmethod
    def of(cls, trace: Trace, num_folds: int) -> _Units:
        numbers = np.sort(trace.document_numbers)
        if len(numbers) == 1:
            number = min(STRETCHES, trace.num_tokens)
            return cls(numbers, np.zeros(1, np.int64), number, min(num_folds, number), True, trace.num_tokens)
        order = np.argsort(token_hashes(numbers, np.full(len(numbers), 2**31 - 1)), kind="stable")
        number = min(NUM_GROUPS, len(numbers))
        group = np.empty(len(numbers), np.int64)
        group[order] = np.arange(len(numbers)) % max(number, 1)
        return cls(numbers, group, number, max(1, min(num_folds, number)), False, trace.num_tokens)

    def of_part(self, part: Part) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """First rows with the number of rows at the end, groups and domains of the units of a part."""
        if self.stretches:
            starts = np.arange(self.num_groups + 1) * self.tokens // self.num_groups
            return starts, np.arange(self.num_groups), np.full(self.num_groups, int(part.domain[0]))
        starts = part.document_starts()
        first = starts[:-1]
        group = self.group[np.searchsorted(self.numbers, part.document[first].astype(np.int64))]
        return starts, group, part.domain[first].astype(np.int64)


@dataclass(frozen=True)
class _Plan:
    """What is predicted, and by what.

    Attributes:
        all_layers: Layers of the trace.
        places: Places among them of the layers to predict.
        predictors: In the order of `KINDS`, then of distance.
        phase: Code of the phase, or None for all tokens.
        num_ids: Largest number of experts.
    """

    all_layers: tuple[Layer, ...]
    places: tuple[int, ...]
    predictors: tuple[Predictor, ...]
    units: _Units
    phase: int | None
    domains: tuple[str, ...]
    num_ids: int

    def sources(self, kind: str, place: int) -> list[int]:
        """Distances of the predictors of a kind that reach a layer."""
        distances = [predictor.distance for predictor in self.predictors if predictor.kind == kind]
        return [distance for distance in distances if 0 < distance <= place]

    def known(self, predictor: Predictor, place: int) -> int:
        """Experts that a predictor puts in order at a layer; 0 if it does not reach it."""
        layer = self.all_layers[place]
        if predictor.distance > place:
            return 0
        if predictor.kind == "lookahead":
            return min(layer.num_predicted, layer.num_experts) if predictor.distance in layer.lookahead else 0
        return layer.num_experts

    def complete(self, predictor: Predictor, place: int) -> bool:
        """Whether the order that a predictor gives at a layer holds all experts."""
        layer = self.all_layers[place]
        return self.known(predictor, place) > 0 and (
            predictor.kind != "lookahead" or layer.num_predicted == layer.num_ids
        )


def _plan(
    trace: Trace,
    chosen: Sequence[Layer],
    distances: Sequence[int] | None,
    kinds: Sequence[str] | None,
    phase: str | None,
) -> _Plan:
    all_layers, recorded = trace.layers, trace.header.lookahead
    if kinds is not None and (unknown := sorted(set(kinds) - set(KINDS))):
        raise ValueError(f"there is no predictor {unknown[0]!r}; there are {', '.join(KINDS)}")
    if phase is not None and phase not in PHASES:
        raise ValueError(f"phase is {' or '.join(map(repr, PHASES))}, not {phase!r}")
    if phase is not None and not trace.header.phases:
        raise NotRecorded(trace.path, "does not say which tokens were generated", "leave out the phase")
    if distances is None:
        distances = recorded or tuple(distance for distance in DISTANCES if distance < len(all_layers))
    if not all(isinstance(a, int | np.integer) and not isinstance(a, bool) and a >= 1 for a in distances):
        raise ValueError(f"distances are whole numbers from 1, not {tuple(distances)}")
    if distances and max(distances) >= len(all_layers):
        raise NoSuchLayer(
            trace.path,
            f"no layer lies {max(distances)} layers before another: the trace has {len(all_layers)}",
            f"distances go up to {len(all_layers) - 1}" if len(all_layers) > 1 else None,
        )
    if kinds is not None and "lookahead" in kinds:
        if not recorded:
            raise NotRecorded(trace.path, "holds no predictions of the routers of later layers", _HOW_TO)
        if lacking := sorted(set(distances) - set(recorded)):
            have = ", ".join(map(str, recorded))
            raise NotRecorded(
                trace.path, f"predictions over {lacking[0]} layers were not recorded; those over {have} are", _HOW_TO
            )
    predictors: list[Predictor] = []
    for kind in KINDS:
        if kinds is not None and kind not in {*kinds, "popularity"}:
            continue
        if kind in ("lookahead", "transitions"):
            usable = set(distances) & set(recorded) if kind == "lookahead" else set(distances)
            predictors += [Predictor(kind, int(distance)) for distance in sorted(usable)]
        elif kind != "domain" or kinds is not None or _domains_differ(trace):
            predictors.append(Predictor(kind))
    place_of = {layer.layer: place for place, layer in enumerate(all_layers)}
    places = tuple(place_of[layer.layer] for layer in chosen)
    cells = sum(
        all_layers[place].num_experts * all_layers[place - distance].num_experts
        for place in places
        for kind, distance in [(predictor.kind, predictor.distance) for predictor in predictors]
        if kind == "transitions" and distance <= place
    )
    num_folds = NUM_FOLDS
    while num_folds > 2 and 4 * cells * num_folds > TABLE_BYTES:
        num_folds //= 2
    return _Plan(
        all_layers,
        places,
        tuple(predictors),
        _Units.of(trace, num_folds),
        None if phase is None else PHASES.index(phase),
        trace.domains,
        max(layer.num_experts for layer in chosen),
    )


def _domains_differ(trace: Trace) -> bool:
    """Whether popularity by domain is another thing than popularity, and small enough to be kept."""
    cells = NUM_FOLDS * len(trace.domains) * sum(layer.num_experts for layer in trace.layers)
    return len(trace.domains) > 1 and 8 * cells <= TABLE_BYTES


@dataclass(frozen=True)
class _LayerRows:
    """A layer of a part, ready for the kernels.

    Attributes:
        place: Of the layer, among those of the trace.
        ids: Chosen experts of the layer and of those that predict it, by place, each of shape (choice, token).
        predicted: Recorded predictions by distance, each of shape (predicted, token).
        units: Documents or stretches of the part, with the `domain` of each.
        first: Tokens that begin a sequence.
    """

    place: int
    ids: dict[int, Ids]
    predicted: dict[int, Ids]
    units: kernels.Units
    domain: NDArray[np.int64]
    first: NDArray[np.bool_]


def _rows(trace: Trace, plan: _Plan, index: int, *, predictions: bool) -> Iterator[_LayerRows]:
    """The layers to predict of a part; those before them are kept only as long as a predictor looks back to them."""
    needed = {
        place: {place, *(place - distance for distance in plan.sources("transitions", place))} for place in plan.places
    }
    wanted = sorted(set().union(*needed.values()))
    held: dict[int, Ids] = {}
    by_layer = {plan.all_layers[place].layer: place for place in wanted}
    frame: tuple[Any, ...] | None = None
    for group in layer_groups([plan.all_layers[place] for place in wanted]):
        part = trace.with_trace_domains(
            trace.parts[index].read(group, tokens=plan.phase is not None and frame is None, predictions=predictions)
        )
        if frame is None:
            counted = np.ones(part.num_tokens, np.bool_)
            if plan.phase is not None:
                counted[:] = part.phase == plan.phase
            begins = np.zeros(part.num_tokens, np.bool_)
            begins[part.sequence_starts()[:-1]] = True
            starts, group_U, domain = plan.units.of_part(part)
            frame = kernels.Units(counted, starts, group_U, group_U % plan.units.num_folds), domain, begins
        for layer in group:
            place = by_layer[layer.layer]
            held[place] = np.ascontiguousarray(part.expert_ids[layer.layer].T, np.int32)
            if place in needed:
                predicted = {
                    distance: np.ascontiguousarray(part.predictions[layer.layer, distance].T, np.int32)
                    for distance in plan.sources("lookahead", place)
                    if (layer.layer, distance) in part.predictions
                }
                yield _LayerRows(place, held, predicted, *frame)
                del needed[place]
            for passed in held.keys() - set().union(*needed.values()):
                del held[passed]


@dataclass
class _Learnt:
    """What the predictors know of each fold's other documents.

    Attributes:
        rank: By place of the layer, the place of each expert by popularity, shape (fold, expert).
        domain_rank: The same by domain, shape (fold, domain, expert).
        table: By place of the layer and distance, P(e | i), shape (fold, source expert, expert).
    """

    rank: dict[int, NDArray[np.int64]]
    domain_rank: dict[int, NDArray[np.int64]]
    table: dict[tuple[int, int], NDArray[np.float32]]


def _learn(trace: Trace, plan: _Plan, threads: int) -> _Learnt:
    num_folds, layers = plan.units.num_folds, plan.all_layers
    by_domain = any(predictor.kind == "domain" for predictor in plan.predictors)
    num_domains = max(1, len(plan.domains)) if by_domain else 1

    def make() -> tuple[dict[int, NDArray[np.int64]], dict[tuple[int, int], NDArray[np.uint32]]]:
        popularity, transitions = {}, {}
        for place in plan.places:
            num_experts = layers[place].num_experts
            popularity[place] = np.zeros((num_folds * num_domains, num_experts), np.int64)
            for distance in plan.sources("transitions", place):
                shape = num_folds, layers[place - distance].num_experts, num_experts
                transitions[place, distance] = np.zeros(shape, np.uint32)
        return popularity, transitions

    def add(sums: tuple[dict[int, NDArray[np.int64]], dict[tuple[int, int], NDArray[np.uint32]]], index: int) -> None:
        popularity, transitions = sums
        for rows in _rows(trace, plan, index, predictions=False):
            ids, units = rows.ids[rows.place], rows.units
            row = units.fold_U * num_domains + (rows.domain if by_domain else 0)
            kernels.count_popularity(ids, units, row, popularity[rows.place])
            for distance in plan.sources("transitions", rows.place):
                source, pairs = rows.ids[rows.place - distance], transitions[rows.place, distance]
                kernels.count_transitions(source, ids, units, pairs)

    (popularity, transitions), *others = sums_by_thread(range(len(trace.parts)), threads, make, add)
    for more_popularity, more_transitions in others:
        for place in popularity:
            popularity[place] += more_popularity[place]
        for pair in transitions:
            transitions[pair] += more_transitions[pair]
    learnt = _Learnt({}, {}, {})
    for place, count in popularity.items():
        count_FDE = count.reshape(num_folds, num_domains, -1)
        others_FDE = count_FDE.sum(axis=0) - count_FDE
        others_FE = others_FDE.sum(axis=1)
        learnt.rank[place] = rank_FE = _ranks(others_FE, np.zeros_like(others_FE))
        if by_domain:
            learnt.domain_rank[place] = _ranks(others_FDE, rank_FE[:, None, :])
        total_F1 = others_FE.sum(axis=1, keepdims=True)
        num_experts = others_FE.shape[1]
        share_FE = np.where(total_F1 > 0, others_FE / np.maximum(total_F1, 1), 1 / num_experts)
        for distance in plan.sources("transitions", place):
            learnt.table[place, distance] = _table(transitions.pop((place, distance)), share_FE)
    return learnt


def _ranks(count: NDArray[np.int64], among_equals: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each expert by falling count, along the last axis; among equals by another order, then by id."""
    order = np.lexsort((np.broadcast_to(among_equals, count.shape), -count), axis=-1)
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(count.shape[-1]), count.shape), axis=-1)
    return ranks.astype(np.int64)


def _table(count_FSE: NDArray[np.uint32], share_FE: Numbers) -> NDArray[np.float32]:
    """P(e | i) in the other folds, smoothed as if with E more pairs of each source expert, spread by popularity."""
    num_experts = count_FSE.shape[2]
    total_SE = count_FSE.sum(axis=0, dtype=np.int64)
    table_FSE = np.empty(count_FSE.shape, np.float32)
    for table_SE, count_SE, share_E in zip(table_FSE, count_FSE, share_FE, strict=True):  # a fold: memory
        others_SE = total_SE - count_SE
        table_SE[:] = (others_SE + num_experts * share_E) / (others_SE.sum(axis=1, keepdims=True) + num_experts)
    return table_FSE


@dataclass
class _Hits:
    """Needed experts by group, predictor, place among the layers predicted, and place in the predictor's order."""

    hits_GPLN: NDArray[np.int64]
    needed_GL: NDArray[np.int64]


def _count(trace: Trace, plan: _Plan, learnt: _Learnt, threads: int) -> _Hits:
    num_groups, num_domains = plan.units.num_groups, max(1, len(plan.domains))
    foretold = any(predictor.kind == "lookahead" for predictor in plan.predictors)
    group_G = np.arange(num_groups)[:, None]
    fold_G = np.arange(num_groups) % plan.units.num_folds

    def make() -> _Hits:
        shape = (num_groups, len(plan.predictors), len(plan.places), plan.num_ids)
        return _Hits(np.zeros(shape, np.int64), np.zeros((num_groups, len(plan.places)), np.int64))

    def add(sums: _Hits, index: int) -> None:
        for rows in _rows(trace, plan, index, predictions=foretold):
            place, ids, number = rows.place, rows.ids[rows.place], plan.places.index(rows.place)
            layer, units, rank = plan.all_layers[place], rows.units, learnt.rank[place]
            loads_GDE = np.zeros((num_groups, num_domains, rank.shape[1]), np.int64)
            row_U = units.group_U * num_domains + rows.domain
            kernels.count_popularity(ids, units, row_U, loads_GDE.reshape(-1, rank.shape[1]))
            sums.needed_GL[:, number] += loads_GDE.sum(axis=(1, 2))
            for p, predictor in enumerate(plan.predictors):
                hits_GN, distance = sums.hits_GPLN[:, p, number], predictor.distance
                if predictor.kind in ("popularity", "domain"):
                    whole = predictor.kind == "popularity"  # one order for all domains
                    rank_FDE = rank[:, None] if whole else learnt.domain_rank[place]
                    ordered_GDE = loads_GDE.sum(axis=1, keepdims=True) if whole else loads_GDE
                    for d in range(ordered_GDE.shape[1]):
                        hits_GN[group_G, rank_FDE[fold_G, d]] += ordered_GDE[:, d]
                elif predictor.kind == "previous":
                    kernels.place_by_previous(ids, rows.first, units, rank, layer.ranked, hits_GN)
                elif predictor.kind == "transitions" and distance <= place:
                    source, table = rows.ids[place - distance], learnt.table[place, distance]
                    kernels.place_by_transitions(source, ids, units, table, rank, hits_GN)
                elif predictor.kind == "lookahead" and distance in rows.predicted:
                    kernels.place_by_prediction(rows.predicted[distance], ids, units, layer.num_experts, hits_GN)

    total, *others = sums_by_thread(range(len(trace.parts)), threads, make, add)
    for more in others:
        total.hits_GPLN += more.hits_GPLN
        total.needed_GL += more.needed_GL
    return total


def _result(plan: _Plan, counted: _Hits) -> xr.Dataset:
    layers = [plan.all_layers[place] for place in plan.places]
    predictors = plan.predictors
    null = predictors.index(Predictor("popularity"))
    loaded_N = np.arange(1, plan.num_ids + 1)
    needed_L = counted.needed_GL.sum(axis=0)
    known_PL = np.array([[plan.known(predictor, place) for place in plan.places] for predictor in predictors])
    complete_PL = np.array([[plan.complete(predictor, place) for place in plan.places] for predictor in predictors])
    reach = max(predictor.distance for predictor in predictors)
    pooled = [number for number, place in enumerate(plan.places) if place >= reach]
    names = ("recall", "recall_low", "recall_high", "gain", "gain_low", "gain_high")
    table = np.full((len(names), len(predictors), len(layers), plan.num_ids), np.nan)
    model = np.full((len(names), len(predictors), plan.num_ids), np.nan)
    for p in range(len(predictors)):
        for number in range(len(layers)):
            n = known_PL[p, number]
            hits_GPN = counted.hits_GPLN[:, :, number, :n].cumsum(axis=2)
            table[:, p, number, :n] = _judge(hits_GPN[:, p], hits_GPN[:, null], counted.needed_GL[:, number])
            if complete_PL[p, number] and needed_L[number]:
                table[:3, p, number, n - 1] = 1  # all are loaded: certain, whatever the documents
        if pooled and known_PL[p, pooled].min() > 0:
            short = ~complete_PL[p, pooled]
            n = int(known_PL[p, pooled][short].min()) if short.any() else plan.num_ids
            hits_GPN = counted.hits_GPLN[:, :, pooled, :n].cumsum(axis=3).sum(axis=2)
            model[:, p, :n] = _judge(hits_GPN[:, p], hits_GPN[:, null], counted.needed_GL[:, pooled].sum(axis=1))
            if not short.any() and needed_L[pooled].any():
                model[:3, p, max(layers[number].num_experts for number in pooled) - 1 :] = 1
    num_experts_L = np.array([layer.num_experts for layer in layers])
    uniform_LN = np.minimum(loaded_N / num_experts_L[:, None], 1.0)
    dims = ("predictor", "layer", "loaded")
    variables = labelled(dict(zip(names, table, strict=True)), dims, _MEANINGS)
    of_model = {f"model_{name}": values for name, values in zip(names, model, strict=True)}
    variables |= labelled(of_model, dims[::2], _OF_MODEL)
    uniform = "recall of experts loaded at random, n / E"
    variables["recall_uniform"] = described(
        np.where(loaded_N <= num_experts_L[:, None], uniform_LN, np.nan), dims[1:], uniform, FRACTION
    )
    variables["model_recall_uniform"] = described(
        statistics.ratio((uniform_LN * needed_L[:, None])[pooled].sum(axis=0), needed_L[pooled].sum()),
        dims[2:],
        f"{uniform}, layers together",
        FRACTION,
    )
    variables["needed"] = described(needed_L, ("layer",), "experts needed", "assignments")
    unit = "stretch of the only document" if plan.units.stretches else "document"
    return xr.Dataset(
        variables,
        {
            "predictor": [predictor.label for predictor in predictors],
            "kind": ("predictor", [predictor.kind for predictor in predictors]),
            "distance": ("predictor", [predictor.distance for predictor in predictors]),
            **layer_coordinates(layers),
            "loaded": loaded_N,
            "documents": ((), len(plan.units.numbers), {"units": "documents"}),
        },
        {
            "unit": unit,
            "folds": plan.units.num_folds,
            "lookahead_recorded": int(any(layer.lookahead for layer in plan.all_layers)),
            "pooled_layers": [layers[number].layer for number in pooled],
            "phase": "" if plan.phase is None else PHASES[plan.phase],
        },
    )


_MEANINGS: dict[str, tuple[str, ...]] = {
    "recall": ("part of the needed experts that are loaded", FRACTION, LOOKAHEAD_SOURCE),
    "gain": ("recall less that of popularity", DIFFERENCE),
}
_OF_MODEL = {f"model_{name}": (f"{words}, layers together", *unit) for name, (words, *unit) in _MEANINGS.items()}


def _judge(hits_GN: NDArray[np.int64], null_GN: NDArray[np.int64], needed_G: NDArray[np.int64]) -> Numbers:
    """Recall with its interval, and the gain over the null with its own, shape (6, n)."""
    used = int((needed_G > 0).sum())
    recall, error = groups.ratio_errors(hits_GN, needed_G)
    low, high = statistics.proportion_interval(recall, error, used)
    gain, gain_error = groups.ratio_errors(hits_GN - null_GN, needed_G)
    half = groups.student(used) * gain_error
    return np.stack([recall, low, high, gain, gain - half, gain + half])
