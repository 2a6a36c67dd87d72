"""Vocabulary specialization: how surely a token id, or the id that follows, goes to one expert, and to which.

The unit is the token. An id that occurs often enough is as specialized as the share of its tokens that chose its most
frequent expert; a layer is as specialized as its ids on average, each id counting once. The maximum over experts is
large by chance alone where an id is rare, so beside it stands the same of routing that does not see the token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from moescope.errors import NotRecorded
from moescope.measures import explain_kernels, groups, statistics
from moescope.measures import vocabulary_kernels as kernels
from moescope.measures.schema import described
from moescope.measures.statistics import Numbers
from moescope.measures.vocabulary_ids import BY, IdRows, TokenIds
from moescope.tallying import DocumentSample, Source
from moescope.tallying.counted import documents_of, opened
from moescope.trace import Layer

MIN_COUNT = 10
"""Tokens that an id must have, as in the source."""

TOP = 10
"""Ids listed an expert."""

NULL_TOKENS = 2**20
"""Rotated copies of the choices, whose mean is the null, hold so many tokens together, or are `MOST_COPIES`."""

MOST_COPIES = 8

TEST_TOKENS = 2**17
"""Tokens, in whole documents, that the permutations of the test go over."""

OLMOE = "OLMoE (arXiv 2409.02060), equation 8"


def vocabulary(
    trace: Source,
    layers: Iterable[int] | None = None,
    *,
    choice: str = "first",
    min_count: int = MIN_COUNT,
    top: int = TOP,
    tokens: Iterable[int] = (),
    permutations: int = 99,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """How far each layer's choice of expert goes by the token, and by the token that comes next.

    The specialization of expert i for id x is N_xi / N_x: of the N_x tokens with the id, the share that chose the
    expert. `by` says which id: "input", the token's own; "next", that of the token after it in the sequence. (The
    source has the id that the model predicts, too; a trace does not hold it.)

    Memory: the sample, at most `document_sample.MAX_BYTES` (1 GiB; a larger trace is sampled by document), some 40
    bytes a token beside it, 52 MB for the tests, and for each layer measured at a time two copies of its choices. No
    table of ids by experts is held, so the size of the vocabulary does not matter.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`).
        layers: Layers to measure, or None for all.
        choice: "first", the first choice of a token, as the source has it; or "either", all of its choices: N_xi
            counts tokens that have the expert among them.
        min_count: Tokens that an id must have to be counted.
        top: Ids listed for each expert.
        tokens: Ids whose experts are asked for, however rare.
        permutations: Permutations of each test, at least 1; the smallest p-value is one over this plus one.
        seed: Of the rotations, which are the same in every layer.
        threads: Layers measured at a time; None for the number of processors.
        progress: Called with the number of layers done and of all.
    Returns:
        By (by, layer):

        * `specialization`: mean over ids of the largest share, with `low`, `high`, 95 % interval over documents;
        * `null`: the same if the choices of each document are rotated by a random number of tokens, so that they keep
          their popularity, the document's taste and their runs, but do not see the token;
        * `popularity`: the largest share of any expert among all tokens: the null of endless text;
        * `held_out`: mean over ids of the share that goes to the expert which most of the id's tokens in *other*
          documents chose: too low by as much as the maximum is too high, and without a bias if there is one expert;
        * `p_value` of the permutation test that the choices do not see the token, over documents of some 131,000
          tokens; `q_value`, with the false discovery rate controlled over layers and both ways.

        By (by, layer, expert): `expert_specialization`, mean over the ids most of whose tokens chose the expert, NaN if
        there is none, `expert_low`, `expert_high`, `expert_null`; `expert_ids`, how many ids these are;
        `expert_popularity`, its share of all tokens.

        By (by, layer, expert, place), the ids with the largest shares of the expert: `top_token`, the id, -1 where
        there are no more; `top_share`, `top_low`, `top_high`, its specialization; `top_count` of `top_tokens` tokens,
        in `top_documents` documents; `top_q_value`, of the share being no more than the expert's popularity, times all
        pairs of id and expert that were looked at (Bonferroni).

        By (by, layer, token, expert) for `tokens`: `share`, `share_low`, `share_high`; `token_tokens` (by, token).

        `ids`, `id_tokens` (by): ids that were counted, and their tokens.
    Raises:
        NotRecorded: The trace has no token ids, holds counts, or does not say which choice is the first.
        NoSuchLayer: A layer was not recorded.
        ValueError: `choice`, `min_count`, `top`, `threads` or a token id is none that could be.
    Source:
        OLMoE (arXiv 2409.02060), equation 8 and its scripts/run_moe_analysis.py: most frequent expert of each id, means
        over ids, first choice. Ties go to the expert with the lowest number. Nulls and intervals are ours.
    """
    wanted = sorted(set(tokens))
    threads = threads if threads is not None else os.cpu_count() or 1
    for name, value, least in (("min_count", min_count, 1), ("top", top, 0), ("permutations", permutations, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    if choice not in ("first", "either"):
        raise ValueError(f"choice must be 'first' or 'either', not {choice!r}")
    if wanted and not 0 <= wanted[0] <= wanted[-1] < 2**32:
        raise ValueError(f"token ids are whole numbers from 0 to 2**32 - 1, not {wanted[0]} or {wanted[-1]}")
    ranks = 1 if choice == "first" else None
    source = opened(trace)
    source.need_tokens()
    if not source.header.token_ids:
        raise NotRecorded(source.path, "has no token ids")
    chosen = source.select_layers(layers)
    if ranks == 1 and not all(layer.ranked for layer in chosen):
        raise NotRecorded(
            source.path,
            "does not say which of a token's choices is the first",
            "ask for all of the choices: --choice either, or choice='either'",
        )
    sample = documents_of(source, [layer.layer for layer in chosen], ranks=ranks, threads=threads)
    sources = _sources(sample, min_count, wanted)
    small = sample.thinned(TEST_TOKENS)
    small_sources = sources if small is sample else _sources(small, min_count, ())
    orders = _rotations(sample, min(MOST_COPIES, -(-NULL_TOKENS // max(1, sample.num_tokens))), seed)
    small_orders = _rotations(small, permutations, seed)
    found: list[list[_Found]] = [[] for _ in chosen]
    done = 0

    def measure(at: int) -> None:
        nonlocal done
        found[at] = _measure(sample, chosen[at], sources, ranks, top, orders)
        p_values = _test(small, chosen[at], small_sources, ranks, small_orders)
        for one, p_value in zip(found[at], p_values, strict=True):
            one.layer["p_value"] = p_value
        done += 1
        if progress is not None:
            progress(done, len(chosen))

    if progress is not None:
        progress(0, len(chosen))
    if threads == 1:
        for at in range(len(chosen)):
            measure(at)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(measure, range(len(chosen))))
    result = _labelled(found, sources, chosen, wanted, top)
    result.attrs = {
        "choice": choice,
        "min_count": min_count,
        "documents": sample.num_documents,
        "tokens": sample.num_tokens,
        "sampled_fraction": sample.fraction,
    }
    return result


def _sources(sample: DocumentSample, min_count: int, wanted: Sequence[int]) -> list[_Source]:
    return [_Source.of(TokenIds.of(sample, by), min_count, wanted) for by in BY]


@dataclass(frozen=True)
class _Source:
    """One way of looking: the ids, which tokens have one, and the tokens of the frequent ids and of those asked for."""

    ids: TokenIds
    counted_T: NDArray[np.bool_]
    size_G: NDArray[np.int64]
    frequent: IdRows
    asked: IdRows

    @classmethod
    def of(cls, ids: TokenIds, min_count: int, wanted: Sequence[int]) -> _Source:
        counted_T = ids.id_T >= 0
        size_G = np.bincount(ids.group_T[counted_T], minlength=ids.num_groups)
        return cls(ids, counted_T, size_G, ids.frequent(min_count), ids.rows(wanted))


@dataclass(frozen=True)
class _Found:
    """Everything about one layer, looked at in one way. E expert ids, N places, X ids asked for."""

    layer: dict[str, float]
    experts_E: dict[str, NDArray[Any]]
    top_EN: dict[str, NDArray[Any]]
    shares_XE: tuple[Numbers, Numbers, Numbers]


def _measure(
    sample: DocumentSample,
    layer: Layer,
    sources: Sequence[_Source],
    ranks: int | None,
    top: int,
    orders: Sequence[NDArray[np.int32]],
) -> list[_Found]:
    ids_KT = sample.expert_ids[layer.layer][:ranks]
    found = [_of_layer(ids_KT, layer.num_ids, source, top) for source in sources]
    copies = list(_rotated(ids_KT, layer.num_ids, sources, orders))
    for at, one in enumerate(found):
        sums_E, ids_E = (np.sum([copy[at][part] for copy in copies], axis=0) for part in (0, 1))
        one.layer["null"] = float(statistics.ratio(sums_E.sum(), ids_E.sum()))
        one.experts_E["expert_null"] = statistics.ratio(sums_E, ids_E)
    return found


def _test(
    sample: DocumentSample,
    layer: Layer,
    sources: Sequence[_Source],
    ranks: int | None,
    orders: Sequence[NDArray[np.int32]],
) -> list[float]:
    """p-values of the permutation test, one a way of looking; NaN where no id is frequent."""

    def means(tops: Sequence[tuple[Numbers, NDArray[np.int64]]]) -> Numbers:
        return statistics.ratio([sums_E.sum() for sums_E, _ in tops], [ids_E.sum() for _, ids_E in tops])

    ids_KT = sample.expert_ids[layer.layer][:ranks]
    observed = means(_tops(ids_KT, layer.num_ids, sources))
    rotated = _rotated(ids_KT, layer.num_ids, sources, orders)
    as_large = np.sum([means(tops) >= observed - 1e-12 for tops in rotated], axis=0)
    return np.where(np.isnan(observed), np.nan, (1 + as_large) / (1 + len(orders))).tolist()


def _rotations(sample: DocumentSample, copies: int, seed: int) -> list[NDArray[np.int32]]:
    """Orders of the tokens in which each document begins at a random token and its beginning stands at its end."""
    order_T, state = np.empty(sample.num_tokens, np.int32), np.array([seed], np.uint64)
    anywhere_T = np.arange(sample.num_tokens, dtype=np.int32)
    orders = []
    for _ in range(copies):
        explain_kernels.rotate_within(sample.starts, anywhere_T, order_T, state)
        orders.append(order_T.copy())
    return orders


def _rotated(
    ids_KT: NDArray[np.integer[Any]], num_ids: int, sources: Sequence[_Source], orders: Sequence[NDArray[np.int32]]
) -> Iterator[list[tuple[Numbers, NDArray[np.int64]]]]:
    """`_tops` of the choices in other orders."""
    moved_TK = np.empty(ids_KT.shape[::-1], ids_KT.dtype)
    for order_T in orders:
        kernels.gather(ids_KT, order_T, moved_TK)
        yield _tops(moved_TK.T, num_ids, sources)


def _tops(
    ids_KT: NDArray[np.integer[Any]], num_ids: int, sources: Sequence[_Source]
) -> list[tuple[Numbers, NDArray[np.int64]]]:
    """For each way of looking and expert: Σ of the shares of the ids whose most frequent expert it is, and the ids."""
    found = []
    for source in sources:
        sums_E, ids_E = np.zeros(num_ids), np.zeros(num_ids, np.int64)
        rows = source.frequent
        kernels.top_shares(_gathered(ids_KT, rows), rows.starts, rows.num_groups, sums_E, ids_E)
        found.append((sums_E, ids_E))
    return found


def _gathered(ids_KT: NDArray[np.integer[Any]], rows: IdRows) -> NDArray[np.integer[Any]]:
    ids_RK = np.empty((len(rows.rows), len(ids_KT)), ids_KT.dtype)
    kernels.gather(ids_KT, rows.rows, ids_RK)
    return ids_RK


def _of_layer(ids_KT: NDArray[np.integer[Any]], num_ids: int, source: _Source, top: int) -> _Found:
    rows = source.frequent
    num_groups = rows.num_groups
    sums_E, ids_E = np.zeros(num_ids), np.zeros(num_ids, np.int64)
    delta_GE, dropped_GE = np.zeros((num_groups, num_ids)), np.zeros((num_groups, num_ids), np.int64)
    best_EN, share_EN = np.zeros((num_ids, top), np.int32), np.zeros((num_ids, top))
    count_EN = np.zeros((num_ids, top), np.int64)
    lists = (best_EN, share_EN, count_EN)
    held_out, judged = kernels.count_ids(
        _gathered(ids_KT, rows), rows.starts, num_groups, sums_E, ids_E, delta_GE, dropped_GE, *lists
    )
    chosen_E = np.zeros(num_ids, np.int64)
    made = kernels.count_choices(ids_KT, source.counted_T, chosen_E)
    popularity_E = statistics.ratio(chosen_E, made)
    # The layer, then each expert, without each group.
    sums, ids = np.append(sums_E.sum(), sums_E), np.append(ids_E.sum(), ids_E)
    delta = np.column_stack([delta_GE.sum(axis=1), delta_GE])
    left = ids - np.column_stack([dropped_GE.sum(axis=1), dropped_GE])
    value = statistics.ratio(sums, ids)
    low, high = _interval(value, statistics.ratio(sums + delta, left), source.size_G)
    layer = {
        "specialization": float(value[0]),
        "low": float(low[0]),
        "high": float(high[0]),
        "popularity": float(popularity_E.max()),
        "held_out": held_out / judged if judged else float("nan"),
    }
    experts: dict[str, NDArray[Any]] = {
        "expert_specialization": value[1:],
        "expert_low": low[1:],
        "expert_high": high[1:],
        "expert_ids": ids_E,
        "expert_popularity": popularity_E,
    }
    return _Found(
        layer,
        experts,
        _listed(ids_KT, source, best_EN, popularity_E),
        _asked(ids_KT, source, num_ids),
    )


def _interval(value: Numbers, without_G: Numbers, size_G: NDArray[np.int64]) -> tuple[Numbers, Numbers]:
    """95 % interval of means over ids by leaving out groups of documents."""
    used = size_G > 0
    if used.sum() < 2:
        return np.full(value.shape, np.nan), np.full(value.shape, np.nan)
    without_G = np.where(np.isnan(without_G), value, without_G)[used]
    _, error = groups.leaving_out(value, without_G, size_G[used].astype(float))
    half = groups.student(int(used.sum())) * error
    return np.maximum(value - half, 0.0), np.minimum(value + half, 1.0)


def _listed(
    ids_KT: NDArray[np.integer[Any]], source: _Source, best_EN: NDArray[np.int32], popularity_E: Numbers
) -> dict[str, NDArray[Any]]:
    """The best ids of each expert with their intervals."""
    num_ids, top = best_EN.shape
    here = best_EN >= 0
    expert_P = np.repeat(np.arange(num_ids), top)[here.ravel()]
    share, low, high, moments = _shares(ids_KT, source, source.frequent, best_EN[here].astype(np.int64), expert_P)
    y, n, documents = moments[:, 0], moments[:, 1], moments[:, 5]
    pairs = num_ids * len(source.frequent.ids)
    q = np.minimum(_p_above(share, moments, popularity_E[expert_P]) * pairs, 1.0)
    listed: dict[str, NDArray[Any]] = {
        "top_token": np.full((num_ids, top), -1, np.int64),
        **{name: np.full((num_ids, top), np.nan) for name in ("top_share", "top_low", "top_high", "top_q_value")},
        **{name: np.zeros((num_ids, top), np.int64) for name in ("top_count", "top_tokens", "top_documents")},
    }
    values = (source.frequent.ids[best_EN[here]], share, low, high, q, y, n, documents)
    for name, value in zip(listed, values, strict=True):
        listed[name][here] = value
    return listed


def _asked(ids_KT: NDArray[np.integer[Any]], source: _Source, num_ids: int) -> tuple[Numbers, Numbers, Numbers]:
    """The share of each expert among the tokens of the ids asked for."""
    num_asked = len(source.asked.ids)
    x_P, e_P = np.repeat(np.arange(num_asked), num_ids), np.tile(np.arange(num_ids), num_asked)
    share, low, high, _ = _shares(ids_KT, source, source.asked, x_P, e_P)
    shape = (num_asked, num_ids)
    return share.reshape(shape), low.reshape(shape), high.reshape(shape)


def _shares(
    ids_KT: NDArray[np.integer[Any]],
    source: _Source,
    rows: IdRows,
    x_P: NDArray[np.int64],
    e_P: NDArray[np.int64],
) -> tuple[Numbers, Numbers, Numbers, NDArray[np.int64]]:
    """Share of the tokens of an id that chose an expert, with its interval and moments over documents."""
    moments = np.zeros((len(x_P), kernels.MOMENTS), np.int64)
    kernels.pair_moments(ids_KT, rows.rows, rows.starts, rows.num_groups, source.ids.document_T, x_P, e_P, moments)
    y, n, yy, yn, nn, documents = moments.T
    share = statistics.ratio(y, n)
    error = statistics.ratio_standard_error(y, n, yy, yn, nn, documents)
    return share, *statistics.proportion_interval(share, error, documents), moments


def _p_above(share_P: Numbers, moments_P6: NDArray[np.int64], popularity_P: Numbers) -> Numbers:
    """One-sided p-values of the shares being no more than the popularity.

    Student's t on the logit scale, as the interval; where every document has nothing else, the chance that so many
    documents would. Where documents do not vary otherwise, or there is one, nothing is known: 1.
    """
    y, n, yy, yn, nn, documents = moments_P6.T
    error = statistics.ratio_standard_error(y, n, yy, yn, nn, documents)
    with np.errstate(invalid="ignore", divide="ignore"):
        lead = np.log(share_P / (1 - share_P)) - np.log(popularity_P / (1 - popularity_P))
        t = lead * share_P * (1 - share_P) / error
    p = np.where(np.isfinite(t), stats.t.sf(np.nan_to_num(t), np.maximum(documents - 1, 1)), 1.0)
    return np.where(share_P == 1, popularity_P ** np.maximum(documents, 1), p)


_BY_LAYER = {
    "specialization": ("share of an id's tokens that chose its most frequent expert, mean over ids", "1", OLMOE),
    "low": ("95 % interval, low end", "1", ""),
    "high": ("95 % interval, high end", "1", ""),
    "null": ("the same with the choices of each document rotated", "1", ""),
    "popularity": ("largest share of an expert among all tokens", "1", ""),
    "held_out": ("share that chose the expert of the id's tokens in other documents, mean over ids", "1", ""),
    "p_value": ("p-value of the permutation test", "1", ""),
}
_BY_EXPERT = {
    "expert_specialization": ("specialization, mean over the ids whose most frequent expert it is", "1", OLMOE),
    "expert_low": ("95 % interval, low end", "1", ""),
    "expert_high": ("95 % interval, high end", "1", ""),
    "expert_null": ("the same with the choices of each document rotated", "1", ""),
    "expert_ids": ("ids whose most frequent expert it is", "ids", ""),
    "expert_popularity": ("share of all tokens that chose the expert", "1", ""),
}
_BY_PLACE = {
    "top_token": ("id with the largest shares of the expert", "token_id", ""),
    "top_share": ("share of the id's tokens that chose the expert", "1", OLMOE),
    "top_low": ("95 % interval, low end", "1", ""),
    "top_high": ("95 % interval, high end", "1", ""),
    "top_q_value": ("p-value of the share being no more than the popularity, times the pairs looked at", "1", ""),
    "top_count": ("tokens of the id that chose the expert", "tokens", ""),
    "top_tokens": ("tokens of the id with a choice", "tokens", ""),
    "top_documents": ("documents with such tokens", "documents", ""),
}


def _labelled(
    found: Sequence[Sequence[_Found]], sources: Sequence[_Source], layers: Sequence[Layer], wanted: list[int], top: int
) -> xr.Dataset:
    num_ids = max((layer.num_ids for layer in layers), default=0)

    def stacked(get: Callable[[_Found], NDArray[Any]]) -> NDArray[Any]:
        """By source and layer; experts that a layer lacks are missing: NaN, 0 or -1."""
        return np.array([[get(of_layer[at]) for of_layer in found] for at in range(len(sources))])

    def padded(values: NDArray[Any], axis: int = 0) -> NDArray[Any]:
        fill: Any = np.nan if values.dtype.kind == "f" else 0
        widths = [(0, num_ids - size if at == axis else 0) for at, size in enumerate(values.shape)]
        return np.pad(values, widths, constant_values=fill)

    by_layer, by_expert = ("by", "layer"), ("by", "layer", "expert")
    variables: dict[str, Any] = {
        name: described(stacked(lambda one, name=name: np.array(one.layer[name])), by_layer, *words)  # type: ignore[misc]
        for name, words in _BY_LAYER.items()
    }
    variables["q_value"] = described(
        statistics.false_discovery_rate(variables["p_value"][1]),
        by_layer,
        "p-value adjusted over layers and both ways",
        "1",
        "Benjamini and Hochberg 1995",
    )
    for name, words in _BY_EXPERT.items():
        values = stacked(lambda one, name=name: padded(one.experts_E[name]))  # type: ignore[misc]
        variables[name] = described(values, by_expert, *words)
    for name, words in _BY_PLACE.items():
        values = stacked(lambda one, name=name: padded(one.top_EN[name]))  # type: ignore[misc]
        variables[name] = described(values, (*by_expert, "place"), *words)
    if top:
        missing = variables["top_share"][1]
        variables["top_token"] = described(
            np.where(np.isnan(missing), -1, variables["top_token"][1]), (*by_expert, "place"), *_BY_PLACE["top_token"]
        )
    if wanted:
        names = ("share of the id's tokens that chose the expert", "95 % interval, low end", "95 % interval, high end")
        for at, (name, long_name) in enumerate(zip(("share", "share_low", "share_high"), names, strict=True)):
            values = stacked(lambda one, at=at: padded(one.shares_XE[at], 1))  # type: ignore[misc]
            variables[name] = described(values, ("by", "layer", "token", "expert"), long_name, "1")
        counts = np.array([source.asked.occurrences for source in sources])
        variables["token_tokens"] = described(counts, ("by", "token"), "tokens with the id", "tokens")
    ids = np.array([len(source.frequent.ids) for source in sources])
    id_tokens = np.array([len(source.frequent.rows) for source in sources])
    variables["ids"] = described(ids, ("by",), "ids that were counted", "ids")
    variables["id_tokens"] = described(id_tokens, ("by",), "their tokens", "tokens")
    coordinates: dict[str, Any] = {
        "by": list(BY),
        "layer": [layer.layer for layer in layers],
        "expert": np.arange(num_ids),
        "place": np.arange(top),
        "num_experts": ("layer", [layer.num_experts for layer in layers]),
        "num_ids": ("layer", [layer.num_ids for layer in layers]),
        "top_k": ("layer", [layer.top_k for layer in layers]),
    }
    return xr.Dataset(variables, coordinates | ({"token": wanted} if wanted else {}))
