"""Vocabulary specialization: how often a token id, or the id that follows, goes to one expert, and to which.

The unit is the token. An id that occurs often enough is as specialized as the share of its tokens that chose its most
frequent expert; a layer is as specialized as its ids on average, each id counting once. The maximum over experts is
large by chance alone where an id is rare, so beside it stands the same of routing that does not see the token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from moescope.errors import NotRecorded
from moescope.measures import explain_kernels, groups, schema, statistics
from moescope.measures import vocabulary_kernels as kernels
from moescope.measures.schema import FRACTION
from moescope.measures.statistics import Numbers
from moescope.measures.vocabulary_ids import BY, IdRows, TokenIds
from moescope.tallying import DocumentSample, Source
from moescope.tallying.counted import documents_of, opened
from moescope.tallying.counter import need_choice
from moescope.tallying.one_pass import layer_by_layer, threads_to_use
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
        choice: "first", the first choice of a token, as the source has it; or "all", all of its choices: N_xi
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

        * `specialization`: mean over ids of the largest share, with `specialization_low`, `specialization_high`, 95 %
          interval over documents;
        * `specialization_null`: the same if the choices of each document are rotated by a random number of tokens, so
          that they keep their popularity, the document's taste and their runs, but do not see the token;
        * `popularity`: the largest share of any expert among all tokens: the null of endless text;
        * `held_out`: mean over ids of the share that goes to the expert which most of the id's tokens in *other*
          documents chose: too low by as much as the maximum is too high, and without a bias if there is one expert;
        * `specialization_p` of the permutation test that the choices do not see the token, over documents of some
          131,000 tokens; `specialization_q`, with the false discovery rate controlled over layers and both ways.

        By (by, layer, expert): `expert_specialization`, mean over the ids most of whose tokens chose the expert, NaN if
        there is none, `expert_specialization_low`, `_high` and `_null`; `expert_ids`, how many ids these are;
        `expert_popularity`, its share of all tokens.

        By (by, layer, expert, place), the ids with the largest shares of the expert: `top_token`, the id, -1 where
        there are no more; `top_share`, `top_share_low`, `top_share_high`, its specialization; `top_count` of
        `top_tokens` tokens, in `top_documents` documents; `top_share_q`, of the share being no more than the expert's
        popularity, times all pairs of id and expert that were looked at (Bonferroni).

        By (by, layer, token, expert) for `tokens`: `share`, `share_low`, `share_high`; `token_tokens` (by, token).

        `ids`, `id_tokens` (by): ids that were counted, and their tokens; `documents`, a coordinate, of the sample.
    Raises:
        NotRecorded: The trace has no token ids, holds counts, or does not say which choice is the first.
        NoSuchLayer: A layer was not recorded.
        ValueError: `choice`, `min_count`, `top`, `threads` or a token id is none that could be.
    Source:
        OLMoE (arXiv 2409.02060), equation 8 and its scripts/run_moe_analysis.py: most frequent expert of each id, means
        over ids, first choice. Ties go to the expert with the lowest number. Nulls and intervals are ours.
    """
    wanted = sorted(set(tokens))
    threads = threads_to_use(threads)
    for name, value, least in (("min_count", min_count, 1), ("top", top, 0), ("permutations", permutations, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if wanted and not 0 <= wanted[0] <= wanted[-1] < 2**32:
        raise ValueError(f"token ids are whole numbers from 0 to 2**32 - 1, not {wanted[0]} or {wanted[-1]}")
    ranks = 1 if choice == "first" else None
    source = opened(trace)
    source.need_tokens()
    if not source.header.token_ids:
        raise NotRecorded(source.path, "has no token ids")
    chosen = source.select_layers(layers)
    need_choice(source.path, chosen, choice)
    sample = documents_of(source, [layer.layer for layer in chosen], ranks=ranks, threads=threads)
    sources = _sources(sample, min_count, wanted)
    small = sample.thinned(TEST_TOKENS)
    small_sources = sources if small is sample else _sources(small, min_count, ())
    orders = _rotations(sample, min(MOST_COPIES, -(-NULL_TOKENS // max(1, sample.num_tokens))), seed)
    small_orders = _rotations(small, permutations, seed)

    def measure(layer: Layer) -> list[_Measured]:
        ids_KT = sample.expert_ids[layer.layer][:ranks]
        copies = list(_rotated(ids_KT, layer.num_ids, sources, orders))
        p_values = _test(small, layer, small_sources, ranks, small_orders)
        return [
            _of_layer(ids_KT, layer.num_ids, source, top, [copy[way] for copy in copies], p_value)
            for way, (source, p_value) in enumerate(zip(sources, p_values, strict=True))
        ]

    result = _labelled(layer_by_layer(measure, chosen, threads, progress), sources, chosen, wanted, top)
    attributes = {"choice": choice, "min_count": min_count, "tokens": sample.num_tokens}
    return result.assign_coords(documents=((), sample.num_documents, {"units": "documents"})).assign_attrs(
        {**attributes, "sampled_fraction": sample.fraction}
    )


def _sources(sample: DocumentSample, min_count: int, wanted: Sequence[int]) -> list[TokenIds]:
    return [TokenIds.of(sample, by, min_count, wanted) for by in BY]


class _Measured(NamedTuple):
    """Everything about one layer, looked at in one way, by name. E expert ids, N places, X ids asked for."""

    by_layer: dict[str, NDArray[Any]]
    by_expert_E: dict[str, NDArray[Any]]
    by_place_EN: dict[str, NDArray[Any]]
    by_token_XE: dict[str, NDArray[Any]]


def _test(
    sample: DocumentSample,
    layer: Layer,
    sources: Sequence[TokenIds],
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
    ids_KT: NDArray[np.integer[Any]], num_ids: int, sources: Sequence[TokenIds], orders: Sequence[NDArray[np.int32]]
) -> Iterator[list[tuple[Numbers, NDArray[np.int64]]]]:
    """`_tops` of the choices in other orders."""
    moved_TK = np.empty(ids_KT.shape[::-1], ids_KT.dtype)
    for order_T in orders:
        kernels.gather(ids_KT, order_T, moved_TK)
        yield _tops(moved_TK.T, num_ids, sources)


def _tops(
    ids_KT: NDArray[np.integer[Any]], num_ids: int, sources: Sequence[TokenIds]
) -> list[tuple[Numbers, NDArray[np.int64]]]:
    """For each way of looking and expert: Σ of the shares of the ids whose most frequent expert it is, and the ids."""
    tops = [(np.zeros(num_ids), np.zeros(num_ids, np.int64)) for _ in sources]
    for top, rows in zip(tops, (source.frequent for source in sources), strict=True):
        kernels.top_shares(_gathered(ids_KT, rows), rows.starts, rows.num_groups, *top)
    return tops


def _gathered(ids_KT: NDArray[np.integer[Any]], rows: IdRows) -> NDArray[np.integer[Any]]:
    ids_RK = np.empty((len(rows.rows), len(ids_KT)), ids_KT.dtype)
    kernels.gather(ids_KT, rows.rows, ids_RK)
    return ids_RK


def _of_layer(
    ids_KT: NDArray[np.integer[Any]],
    num_ids: int,
    source: TokenIds,
    top: int,
    rotated: Sequence[tuple[Numbers, NDArray[np.int64]]],
    p_value: float,
) -> _Measured:
    """One layer, looked at in one way; `rotated` are the `_tops` of its choices in other orders."""
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
    made = kernels.count_choices(ids_KT, source.id_T, chosen_E)
    popularity_E = statistics.ratio(chosen_E, made)
    # The layer, then each expert, without each group.
    sums, ids = np.append(sums_E.sum(), sums_E), np.append(ids_E.sum(), ids_E)
    delta = np.column_stack([delta_GE.sum(axis=1), delta_GE])
    left = ids - np.column_stack([dropped_GE.sum(axis=1), dropped_GE])
    value = statistics.ratio(sums, ids)
    low, high = _interval(value, statistics.ratio(sums + delta, left), source.size_G)
    null_sums_E, null_ids_E = (np.sum([tops[part] for tops in rotated], axis=0) for part in (0, 1))
    by_layer = {
        "specialization": value[0],
        "specialization_low": low[0],
        "specialization_high": high[0],
        "specialization_null": statistics.ratio(null_sums_E.sum(), null_ids_E.sum()),
        "specialization_p": p_value,
        "popularity": popularity_E.max(),
        "held_out": held_out / judged if judged else np.nan,
    }
    by_expert_E = {
        "expert_specialization": value[1:],
        "expert_specialization_low": low[1:],
        "expert_specialization_high": high[1:],
        "expert_specialization_null": statistics.ratio(null_sums_E, null_ids_E),
        "expert_ids": ids_E,
        "expert_popularity": popularity_E,
    }
    return _Measured(
        {name: np.array(value) for name, value in by_layer.items()},
        by_expert_E,
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
    ids_KT: NDArray[np.integer[Any]], source: TokenIds, best_EN: NDArray[np.int32], popularity_E: Numbers
) -> dict[str, NDArray[Any]]:
    """The best ids of each expert with their intervals."""
    num_ids, top = best_EN.shape
    listed_EN = best_EN >= 0
    expert_P = np.repeat(np.arange(num_ids), top)[listed_EN.ravel()]
    share, low, high, moments = _shares(ids_KT, source, source.frequent, best_EN[listed_EN].astype(np.int64), expert_P)
    y, n, documents = moments[:, 0], moments[:, 1], moments[:, 5]
    pairs = num_ids * len(source.frequent.ids)
    q = np.minimum(_p_above(share, moments, popularity_E[expert_P]) * pairs, 1.0)
    names = ("top_share", "top_share_low", "top_share_high", "top_share_q")
    listed: dict[str, NDArray[Any]] = {
        "top_token": np.full((num_ids, top), -1, np.int64),
        **{name: np.full((num_ids, top), np.nan) for name in names},
        **{name: np.zeros((num_ids, top), np.int64) for name in ("top_count", "top_tokens", "top_documents")},
    }
    values = (source.frequent.ids[best_EN[listed_EN]], share, low, high, q, y, n, documents)
    for name, value in zip(listed, values, strict=True):
        listed[name][listed_EN] = value
    return listed


def _asked(ids_KT: NDArray[np.integer[Any]], source: TokenIds, num_ids: int) -> dict[str, NDArray[Any]]:
    """The share of each expert among the tokens of the ids asked for."""
    num_asked = len(source.asked.ids)
    x_P, e_P = np.repeat(np.arange(num_asked), num_ids), np.tile(np.arange(num_ids), num_asked)
    values = _shares(ids_KT, source, source.asked, x_P, e_P)[:3]
    names = ("share", "share_low", "share_high")
    return {name: value.reshape(num_asked, num_ids) for name, value in zip(names, values, strict=True)}


def _shares(
    ids_KT: NDArray[np.integer[Any]], source: TokenIds, rows: IdRows, x_P: NDArray[np.int64], e_P: NDArray[np.int64]
) -> tuple[Numbers, Numbers, Numbers, NDArray[np.int64]]:
    """Share of the tokens of an id that chose an expert, with its interval and moments over documents."""
    moments = np.zeros((len(x_P), kernels.MOMENTS), np.int64)
    kernels.pair_moments(ids_KT, rows.rows, rows.starts, rows.num_groups, source.document_T, x_P, e_P, moments)
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


_ROTATED = "the same with the choices of each document rotated"
_MEANINGS = {
    "specialization": (
        "share of an id's tokens that chose its most frequent expert, mean over ids", FRACTION, OLMOE
    ),
    "specialization_null": (_ROTATED, FRACTION),
    "specialization_p": ("p-value of the permutation test", "1"),
    "specialization_q": ("p-value adjusted over layers and both ways", "1", "Benjamini and Hochberg 1995"),
    "popularity": ("largest share of an expert among all tokens", FRACTION),
    "held_out": ("share that chose the expert of the id's tokens in other documents, mean over ids", FRACTION),
    "expert_specialization": (
        "specialization, mean over the ids whose most frequent expert it is", FRACTION, OLMOE
    ),
    "expert_specialization_null": (_ROTATED, FRACTION),
    "expert_ids": ("ids whose most frequent expert it is", "ids"),
    "expert_popularity": ("share of all tokens that chose the expert", FRACTION),
    "top_token": ("id with the largest shares of the expert", "token_id"),
    "top_share": ("share of the id's tokens that chose the expert", FRACTION, OLMOE),
    "top_share_q": ("p-value of the share being no more than the popularity, times the pairs looked at", "1"),
    "top_count": ("tokens of the id that chose the expert", "tokens"),
    "top_tokens": ("tokens of the id with a choice", "tokens"),
    "top_documents": ("documents with such tokens", "documents"),
    "share": ("share of the id's tokens that chose the expert", FRACTION),
    "token_tokens": ("tokens with the id", "tokens"),
    "ids": ("ids that were counted", "ids"),
    "id_tokens": ("their tokens", "tokens"),
}  # fmt: skip


def _labelled(
    measured: Sequence[Sequence[_Measured]],
    sources: Sequence[TokenIds],
    layers: Sequence[Layer],
    wanted: list[int],
    top: int,
) -> xr.Dataset:
    num_ids = max(layer.num_ids for layer in layers)

    def padded(name: str, values: NDArray[Any], expert_axis: int) -> NDArray[Any]:
        """With the experts that the layer lacks, which are missing: NaN, -1 or 0."""
        fill: Any = np.nan if values.dtype.kind == "f" else -1 if name == "top_token" else 0
        if expert_axis < 0:
            return values
        widths = [(0, num_ids - size if axis == expert_axis else 0) for axis, size in enumerate(values.shape)]
        return np.pad(values, widths, constant_values=fill)

    def stacked(field: str, dims: Sequence[str]) -> dict[str, NDArray[Any]]:
        """By way of looking and layer, and by the dims."""
        axis = dims.index("expert") if "expert" in dims else -1
        by_way = [[getattr(of_layer[way], field) for of_layer in measured] for way in range(len(sources))]
        return {
            name: np.array([[padded(name, one[name], axis) for one in by_layer] for by_layer in by_way])
            for name in by_way[0][0]
        }

    variables: dict[str, Any] = {}
    dims_of = {"by_layer": (), "by_expert_E": ("expert",), "by_place_EN": ("expert", "place")}
    dims_of |= {"by_token_XE": ("token", "expert")} if wanted else {}
    for field, dims in dims_of.items():
        values = stacked(field, dims)
        if field == "by_layer":
            values["specialization_q"] = statistics.false_discovery_rate(values["specialization_p"])
        variables |= schema.labelled(values, ("by", "layer", *dims), _MEANINGS)
    sizes = {
        "ids": [len(source.frequent.ids) for source in sources],
        "id_tokens": [len(source.frequent.rows) for source in sources],
    }
    variables |= schema.labelled(sizes, ("by",), _MEANINGS)
    if wanted:
        tokens = {"token_tokens": [source.asked.occurrences for source in sources]}
        variables |= schema.labelled(tokens, ("by", "token"), _MEANINGS)
    return xr.Dataset(
        variables,
        {
            **schema.layer_coordinates(layers),
            "by": list(BY),
            "expert": np.arange(num_ids),
            "place": np.arange(top),
            **({"token": wanted} if wanted else {}),
        },
    )
