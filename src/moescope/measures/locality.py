"""Locality: how much more often tokens repeat an expert than each of four nulls says, near by and far apart.

The unit is the pair of tokens of one sequence, `lag` apart. Two kinds: `first`, both have the same first choice; `any`,
their sets share an expert. The nulls: uniform routing; the popularity of the experts in the domain; the tokens of the
document in any order; the same words elsewhere. Of the first three each knows more than the one before. The last, which
turns "more than chance" into "more than these words would do anyway", knows the words and nothing of the document, so
it may explain more than the others or less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from moescope.measures import locality_kernels as kernels
from moescope.measures import schema, statistics
from moescope.measures.explain import frequent
from moescope.measures.repeats import uniform_repeats
from moescope.measures.schema import DIFFERENCE, FRACTION, described, estimate
from moescope.tallying import DocumentSample, Source
from moescope.tallying.counted import documents_of, opened
from moescope.tallying.one_pass import layer_by_layer, threads_to_use
from moescope.trace import Layer

TABLE_5 = "arXiv 2401.04088, Table 5"
KINDS = ("first", "any")
NULLS = ("uniform", "popularity", "document", "words")
"""Every token draws uniformly; two tokens of the domain; two tokens of the document; two tokens with the same ids in
other documents."""

PAIRS = ("all", "equal ids", "different ids")
"""All pairs of neighbours; those of two equal token ids; the others."""

FEWEST_EXPECTED = 10
"""Pairs expected to repeat, or in which neither token goes to the most popular expert, below which an excess above the
popularity or the document has no interval."""

LAGS = (1, 2, 4, 8, 16, 32, 64, 128)
LONGEST_RUN = 64
MOST_DRAWS, DRAWN_TOKENS = 16, 2**22
"""Stand-ins drawn for each token: as many as hold this many tokens in all, from 1 to 16."""


def locality(
    trace: Source,
    layers: Iterable[int] | None = None,
    *,
    lags: Sequence[int] = LAGS,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Repeats against real nulls, by distance, and the runs of one expert.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`).
        layers: Layers, or None for all.
        lags: Distances of the lag curve, in tokens, ascending, from 1.
        seed: Of the draws of stand-ins, which are the same in every layer.
        threads: Layers measured at a time; None for the number of processors.
        progress: Called with the number of layers done and of all.
    Returns:
        `domain`: all of them together first (the coordinate `total` says so), then each.

        * `rate`, `rate_low`, `rate_high` (domain, pairs, layer, kind): repeats over pairs of neighbours;
        * `rate_null`, `excess`, `excess_low`, `excess_high`, `excess_p`, `excess_q` (domain, pairs, null, layer, kind):
          the rate the null predicts; the rate less that, with its interval, the p-value of no excess, and the same with
          the false discovery rate controlled;
        * `lag_rate`, `lag_rate_low`, `lag_rate_high`, `lag_rate_null`, `lag_excess`, `lag_excess_low`,
          `lag_excess_high` (domain, layer, kind, lag): the same by distance, against the document in any order, which
          knows no distance;
        * `runs`, `runs_null` (layer, run): share of the runs of one first choice that have so many tokens (the last: or
          more), and the same if each token repeated the one before with the chance `rate`, independently; `run_mean`,
          `run_mean_low`, `run_mean_high` (layer): tokens a run;
        * `pairs_counted` (domain, pairs); `documents` (domain), a coordinate; `known` (attribute): part of the pairs of
          which both ids occur in other documents.

        All intervals are 95 %, clustered by document; those of an excess are of paired differences. NaN where a trace
        lacks what it takes: token ids, or the order of the choices. Above the popularity and the document, there is no
        interval and no p-value where fewer than ten pairs are to be expected to repeat, or, where nearly all tokens go
        to one expert, to have neither token there: they decide.
    Raises:
        NotRecorded: The trace holds counts.
        NoSuchLayer: A layer was not recorded.
        ValueError: `lags` or `threads` is none that could be.
    Source:
        Mixtral of Experts, section 5, Table 5 (the rates). Nulls, lag curve and intervals are ours.
    """
    lags = tuple(lags)
    if not lags or lags[0] < 1 or any(b <= a for a, b in pairwise(lags)):
        raise ValueError(f"lags must ascend from at least 1, not {lags}")
    threads = threads_to_use(threads)
    source = opened(trace)
    source.need_tokens()
    chosen = source.select_layers(layers)
    sample = documents_of(source, [layer.layer for layer in chosen], threads=threads)
    drawn = _Drawn.of(sample, seed)
    counts = layer_by_layer(lambda layer: _count(sample, drawn, layer, lags), chosen, threads, progress)
    return _labelled(sample, drawn, chosen, lags, counts)


@dataclass(frozen=True)
class _Drawn:
    """Stand-ins, drawn once for all layers. R draws, T tokens; the rest as in `locality_kernels`."""

    document_T: NDArray[np.int32]
    document_Q: NDArray[np.int64]
    value_T: NDArray[np.int32]
    in_document_RT: NDArray[np.int32]
    in_domain_RT: NDArray[np.int32]
    left_RT: NDArray[np.int32]
    right_RT: NDArray[np.int32]
    known: float

    @classmethod
    def of(cls, sample: DocumentSample, seed: int) -> _Drawn:
        num_tokens = sample.num_tokens
        document_T = sample.document_of_token()
        document_Q = np.searchsorted(sample.starts, sample.sequence_starts[:-1], side="right") - 1
        draws = int(np.clip(DRAWN_TOKENS // max(1, num_tokens), 1, MOST_DRAWS))
        state = np.array([seed], np.uint64)

        def others(group_T: NDArray[np.int32], num_groups: int) -> NDArray[np.int32]:
            order_T, bounds = _sorted(group_T, num_groups)
            other_RT = np.empty((draws, num_tokens), np.int32)
            kernels.draw_others(group_T, order_T, bounds, state, other_RT)
            return other_RT

        in_document_RT = others(document_T, sample.num_documents)
        in_domain_RT = others(sample.domain.astype(np.int32)[document_T], len(sample.domain_names))
        value_T = np.zeros(num_tokens, np.int32)
        left_RT = right_RT = np.full((0, num_tokens), -1, np.int32)
        known = float("nan")
        if sample.token_id is not None and num_tokens:
            value_T, num_values = frequent(sample.token_id, most=num_tokens)
            left_RT, right_RT = (np.empty((draws, num_tokens), np.int32) for _ in range(2))
            order_T, bounds = _sorted(value_T, num_values)
            pairs = num_tokens - len(document_Q)
            known = kernels.draw_same_ids(
                value_T, document_T, order_T, bounds, sample.sequence_starts, state, left_RT, right_RT
            ) / max(1, pairs)
        return cls(document_T, document_Q, value_T, in_document_RT, in_domain_RT, left_RT, right_RT, known)


def _sorted(group_T: NDArray[np.int32], num_groups: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    order_T = np.argsort(group_T, kind="stable").astype(np.int32)
    return order_T, np.concatenate([[0], np.cumsum(np.bincount(group_T, minlength=num_groups))]).astype(np.int64)


@dataclass(frozen=True)
class _Counted:
    """What one layer's documents count. S kinds, I classes of pairs (different, equal ids), A lags; see `_excess`."""

    layer: Layer
    repeat_GIS: NDArray[np.int64]
    pair_GI: NDArray[np.int64]
    words_GIS: NDArray[np.float64]
    in_document_GS: NDArray[np.float64]
    in_domain_GS: NDArray[np.float64]
    elsewhere_DS: NDArray[np.float64]
    repeat_GAS: NDArray[np.int64]
    pair_GA: NDArray[np.int64]
    run_N: NDArray[np.int64]
    runs_G: NDArray[np.int64]
    run_tokens_G: NDArray[np.int64]


def _count(sample: DocumentSample, drawn: _Drawn, layer: Layer, lags: Sequence[int]) -> _Counted:
    ids_KT = sample.expert_ids[layer.layer]
    num_documents, num_tokens = sample.num_documents, sample.num_tokens
    first_T = ids_KT[0].astype(np.int32)
    mask_TW = np.zeros((num_tokens, -(-layer.num_ids // 64)), np.uint64)
    kernels.set_masks(ids_KT, layer.num_ids, mask_TW)
    lengths_G = np.diff(sample.starts)

    def zeros(*shape: int) -> NDArray[np.int64]:
        return np.zeros(shape, np.int64)

    repeat_GIS, pair_GI, words_GIS = zeros(num_documents, 2, 2), zeros(num_documents, 2), zeros(num_documents, 2, 2)
    rows = sample.sequence_starts, drawn.document_Q
    kernels.count_neighbours(first_T, mask_TW, drawn.value_T, *rows, repeat_GIS, pair_GI)
    repeat_GAS, pair_GA = zeros(num_documents, len(lags), 2), zeros(num_documents, len(lags))
    kernels.count_lags(first_T, mask_TW, *rows, np.array(lags, np.int64), repeat_GAS, pair_GA)
    stand_ins = drawn.left_RT, drawn.right_RT
    kernels.count_stand_ins(first_T, mask_TW, *stand_ins, drawn.document_T, drawn.value_T, words_GIS)
    have_stand_ins = len(drawn.left_RT) and num_documents > 1  # they come from other documents
    words = words_GIS / len(drawn.left_RT) if have_stand_ins else np.full(words_GIS.shape, np.nan)
    equal_G, in_document_G, in_domain_G = (zeros(num_documents) for _ in range(3))
    kernels.count_equal_firsts(first_T, sample.starts, layer.num_ids, equal_G)
    kernels.count_sharing(mask_TW, drawn.in_document_RT, drawn.document_T, in_document_G)
    kernels.count_sharing(mask_TW, drawn.in_domain_RT, drawn.document_T, in_domain_G)
    draws = len(drawn.in_document_RT)
    in_document_GS = np.stack(
        [statistics.ratio(equal_G, lengths_G * (lengths_G - 1)), statistics.ratio(in_document_G, draws * lengths_G)],
        axis=1,
    )
    same_first_G = _same_first_in_domain(sample, drawn, first_T, layer.num_ids)
    run_N, runs_G, run_tokens_G = zeros(LONGEST_RUN), zeros(num_documents), zeros(num_documents)
    kernels.count_runs(first_T, *rows, run_N, runs_G, run_tokens_G)
    in_domain_GS = np.stack([same_first_G, in_domain_G / draws], axis=1)
    elsewhere_DS = _elsewhere(sample, drawn, ids_KT, layer.num_ids)
    nulls = words, np.nan_to_num(in_document_GS), in_domain_GS, elsewhere_DS
    return _Counted(layer, repeat_GIS, pair_GI, *nulls, repeat_GAS, pair_GA, run_N, runs_G, run_tokens_G)


def _same_first_in_domain(
    sample: DocumentSample, drawn: _Drawn, first_T: NDArray[np.int32], num_ids: int
) -> NDArray[np.float64]:
    """For each document, Σ over its tokens of the chance that another token of its domain has the same first choice."""
    load_DE = np.zeros((len(sample.domain_names), num_ids), np.int64)
    domain_T = sample.domain[drawn.document_T]
    made = first_T >= 0
    np.add.at(load_DE, (domain_T[made], first_T[made]), 1)
    tokens_D = np.bincount(domain_T, minlength=len(load_DE))
    chance_T = np.zeros(len(first_T))
    chance_T[made] = (load_DE[domain_T[made], first_T[made]] - 1) / np.maximum(tokens_D[domain_T[made]] - 1, 1)
    sums_G = np.zeros(sample.num_documents)
    np.add.at(sums_G, drawn.document_T, chance_T)
    return sums_G


def _elsewhere(
    sample: DocumentSample, drawn: _Drawn, ids_KT: NDArray[np.integer[Any]], num_ids: int
) -> NDArray[np.float64]:
    """Part of the tokens of all domains and of each, not at the most popular expert: by first choice, by set.

    Shape (1 + domain, kind).
    """
    num_domains = len(sample.domain_names)
    code_T = sample.domain[drawn.document_T] * num_ids
    loads = []
    for ids_T in ids_KT:
        made = ids_T >= 0
        cells = np.bincount(code_T[made] + ids_T[made], minlength=num_domains * num_ids)
        loads.append(schema.add_total(cells.reshape(num_domains, num_ids)))
    tokens_D = schema.add_total(np.bincount(sample.domain, np.diff(sample.starts), minlength=num_domains))
    load_SDE = np.stack([loads[0], np.sum(loads, axis=0)])
    return 1 - (load_SDE.max(axis=2) / np.maximum(tokens_D, 1)).T


class _Excess(NamedTuple):
    """A rate with its standard error, what a null expects, and the standard error of the difference."""

    rate: float
    error: float
    expected: float
    excess_error: float


def _excess(
    y_G: NDArray[np.float64],
    n_G: NDArray[np.float64],
    expected_G: NDArray[np.float64],
    correction_G: NDArray[np.float64] | float = 0.0,
) -> _Excess:
    """Compare what documents count with what a null expects of each; the correction is what each document adds to the
    excess through a null that was estimated from it.

    The standard error of the difference is at least one pair: routing that does not vary between documents (experts
    that take turns) would otherwise have an interval of no width.
    """
    n, documents = float(n_G.sum()), int(np.count_nonzero(n_G))
    if not n:
        return _Excess(*(float("nan"),) * 4)
    rate, expected = float(y_G.sum() / n), float(expected_G.sum() / n)

    def error(residual_G: NDArray[np.float64]) -> float:
        return float(np.sqrt(documents / (documents - 1) * (residual_G**2).sum())) if documents > 1 else float("nan")

    difference_G = (y_G - expected_G - (rate - expected) * n_G) / n - correction_G
    return _Excess(rate, error((y_G - rate * n_G) / n), expected, float(np.maximum(error(difference_G), 1 / n)))


def _labelled(
    sample: DocumentSample, drawn: _Drawn, layers: Sequence[Layer], lags: Sequence[int], counted: Sequence[_Counted]
) -> xr.Dataset:
    num_domains = len(sample.domain_names)
    shape = (1 + num_domains, len(PAIRS), len(NULLS), len(layers), len(KINDS))
    rate, expected, error, rate_error = (np.full(shape, np.nan) for _ in range(4))
    lag_shape = (1 + num_domains, len(layers), len(KINDS), len(lags))
    lag_rate, lag_expected, lag_error, lag_rate_error = (np.full(lag_shape, np.nan) for _ in range(4))
    documents, lag_documents = np.zeros(shape[:2]), np.zeros((1 + num_domains, len(lags)))
    counted_pairs = np.zeros(shape[:2])
    lengths_G = np.diff(sample.starts).astype(float)
    for d in range(1 + num_domains):
        mine_G = sample.domain == d - 1 if d else np.ones(sample.num_documents, np.bool_)
        for place, counts in enumerate(counted):
            kinds = range(len(KINDS)) if counts.layer.ranked else [kernels.ANY]
            uniform = uniform_repeats(counts.layer.num_ids, counts.layer.top_k)[: len(KINDS)]
            for s in kinds:
                chance_G, influence_G = _popularity(sample, counts.in_domain_GS[:, s], lengths_G)
                for p, classes in enumerate(([0, 1], [1], [0])):
                    if p and sample.token_id is None:
                        continue
                    y_G = counts.repeat_GIS[:, classes, s].sum(axis=1) * mine_G
                    n_G = counts.pair_GI[:, classes].sum(axis=1) * mine_G
                    documents[d, p], counted_pairs[d, p] = np.count_nonzero(n_G), n_G.sum()
                    weight_D = np.bincount(sample.domain, n_G, minlength=num_domains) / max(1.0, n_G.sum())
                    by_null = (
                        (uniform[s] * n_G, 0.0),
                        (chance_G * n_G, weight_D[sample.domain] * influence_G * mine_G),
                        (counts.in_document_GS[:, s] * n_G, 0.0),
                        (counts.words_GIS[:, classes, s].sum(axis=1) * mine_G, 0.0),
                    )
                    elsewhere = n_G.sum() * counts.elsewhere_DS[d, s] ** 2
                    for null, (expected_G, correction_G) in enumerate(by_null):
                        cell = d, p, null, place, s
                        rate[cell], rate_error[cell], expected[cell], error[cell] = _excess(
                            y_G, n_G, expected_G, correction_G
                        )
                        fewest = min(elsewhere, float(expected_G.sum()))
                        if NULLS[null] in ("popularity", "document") and fewest < FEWEST_EXPECTED:
                            error[cell] = np.nan
                for a in range(len(lags)):
                    n_G = counts.pair_GA[:, a] * mine_G
                    lag_documents[d, a] = np.count_nonzero(n_G)
                    at_lag = d, place, s, a
                    lag_rate[at_lag], lag_rate_error[at_lag], lag_expected[at_lag], lag_error[at_lag] = _excess(
                        counts.repeat_GAS[:, a, s] * mine_G, n_G, counts.in_document_GS[:, s] * n_G
                    )
                    if n_G.sum() * min(counts.elsewhere_DS[d, s] ** 2, lag_expected[at_lag]) < FEWEST_EXPECTED:
                        lag_error[at_lag] = np.nan
    low, high = statistics.proportion_interval(rate[:, :, 0], rate_error[:, :, 0], documents[:, :, None, None])
    lag_low, lag_high = statistics.proportion_interval(lag_rate, lag_rate_error, lag_documents[:, None, None, :])
    half = statistics.student_t(documents[:, :, None, None, None]) * error
    lag_half = statistics.student_t(lag_documents[:, None, None, :]) * lag_error
    excess, lag_excess = rate - expected, lag_rate - lag_expected
    with np.errstate(invalid="ignore", divide="ignore"):
        p_value = 2 * stats.t.sf(np.abs(excess) / error, np.maximum(documents[:, :, None, None, None] - 1, 1))
    p_value[~(error > 0)] = np.nan
    q_value = np.stack([statistics.false_discovery_rate(p_value[:, :, null]) for null in range(len(NULLS))], axis=2)
    against, by_lag = ("domain", "pairs", "null", "layer", "kind"), ("domain", "layer", "kind", "lag")
    return xr.Dataset(
        {
            **estimate(
                "rate", ("domain", "pairs", "layer", "kind"), "neighbours that repeat", FRACTION, TABLE_5,
                value=rate[:, :, 0], low=low, high=high,
            ),
            "rate_null": described(expected, against, "rate that the null predicts", FRACTION),
            **estimate(
                "excess", against, "rate less what the null predicts", DIFFERENCE,
                meanings={"q": "p-value adjusted over all pairs against the same null"},
                value=excess, low=excess - half, high=excess + half, p=p_value, q=q_value,
            ),
            **estimate(
                "lag_rate", by_lag, "pairs so far apart that repeat", FRACTION,
                meanings={"null": "the same of the document in any order"},
                value=lag_rate, low=lag_low, high=lag_high, null=lag_expected,
            ),
            **estimate(
                "lag_excess", by_lag, "rate less that of the document in any order", DIFFERENCE,
                value=lag_excess, low=lag_excess - lag_half, high=lag_excess + lag_half,
            ),
            **_runs(sample, counted),
            "pairs_counted": described(
                counted_pairs.astype(np.int64), ("domain", "pairs"), "pairs of neighbours", "pairs"
            ),
        },
        {
            **schema.total_coordinates(sample.domain_names, documents[1:, 0].astype(np.int64)),
            **schema.layer_coordinates(layers),
            "pairs": list(PAIRS),
            "null": list(NULLS),
            "kind": list(KINDS),
            "lag": list(lags),
            "run": np.arange(1, LONGEST_RUN + 1),
        },
        {"known": drawn.known, "tokens": sample.num_tokens, "sampled_fraction": sample.fraction},
    )  # fmt: skip


def _popularity(
    sample: DocumentSample, chance_sum_G: NDArray[np.float64], tokens_G: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The chance that two tokens of a document's domain agree, and what the document adds to its estimate.

    The chance is a mean over pairs of tokens, so a document moves it twice as much as a mean over tokens (Hoeffding).
    """
    num_domains = len(sample.domain_names)
    tokens_D = np.bincount(sample.domain, tokens_G, minlength=num_domains)
    chance_D = np.bincount(sample.domain, chance_sum_G, minlength=num_domains) / np.maximum(tokens_D, 1)
    chance_G = chance_D[sample.domain]
    return chance_G, 2 * (chance_sum_G - chance_G * tokens_G) / np.maximum(tokens_D[sample.domain], 1)


def _runs(sample: DocumentSample, counted: Sequence[_Counted]) -> dict[str, tuple[Any, ...]]:
    lengths, number = np.unique(np.diff(sample.sequence_starts), return_counts=True)
    share, geometric = (np.full((len(counted), LONGEST_RUN), np.nan) for _ in range(2))
    mean, low, high = (np.full(len(counted), np.nan) for _ in range(3))
    for place, counts in enumerate(counted):
        runs, tokens = counts.runs_G.sum(), counts.run_tokens_G.sum()
        if not counts.layer.ranked or not runs:
            continue
        pairs = float(counts.pair_GI.sum())
        share[place] = counts.run_N / runs
        rate = counts.repeat_GIS[:, :, 0].sum() / pairs if pairs else 0.0
        geometric[place] = geometric_runs(lengths, number, rate)
        mean[place] = tokens / runs
        # Tokens that go on with a run are a proportion, c; there are 1 / (1 - c) tokens a run.
        n = counts.run_tokens_G[counts.run_tokens_G > 0]
        y = n - counts.runs_G[counts.run_tokens_G > 0]
        error = statistics.ratio_standard_error(y.sum(), tokens, (y * y).sum(), (y * n).sum(), (n * n).sum(), len(n))
        ends = statistics.proportion_interval(y.sum() / tokens, error, len(n))
        low[place], high[place] = (1 / (1 - float(end)) for end in ends)
    alone = {"null": "the same if repeats were independent"}
    return {
        **estimate(
            "runs", ("layer", "run"), "share of the runs of one first choice", FRACTION,
            meanings=alone, value=share, null=geometric,
        ),
        **estimate(
            "run_mean", ("layer",), "length of a run of one first choice", "tokens", value=mean, low=low, high=high
        ),
    }  # fmt: skip


def geometric_runs(lengths: NDArray[np.int64], number: NDArray[np.int64], rate: float) -> NDArray[np.float64]:
    """Share of runs by length if every token repeats the one before with the chance `rate`, in sequences that end.

    Args:
        lengths: Lengths of sequences, in tokens.
        number: Sequences of each length.
        rate: Chance of a repeat.
    Returns:
        Shares of the runs of 1 … 64 tokens, the last or more, shape (64,).

    Example:
        >>> geometric_runs(np.array([2]), np.array([5]), 0.5)[:3].round(3).tolist()
        [0.667, 0.333, 0.0]
    """
    run = np.arange(1, LONGEST_RUN)[:, None]
    n = lengths[None, :].astype(float)
    inside = np.maximum(n - run - 1, 0) * (1 - rate) ** 2 + 2 * (1 - rate)
    of_length = np.where(run < n, inside * rate ** (run - 1), np.where(run == n, rate ** (n - 1), 0.0))
    counts = (of_length * number).sum(axis=1)
    total = ((n[0] - (n[0] - 1) * rate) * number).sum()
    return np.append(counts, max(0.0, total - counts.sum())) / total
