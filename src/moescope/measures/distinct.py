"""Distinct experts (working set): how many experts of a layer a few consecutive tokens need together.

The unit is the window of n consecutive tokens of one sequence. Null experts are no experts here, and a dropped
assignment needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import special, stats

from moescope.errors import NotRecorded
from moescope.measures import schema, statistics
from moescope.measures.statistics import Numbers
from moescope.tallying import DocumentSample, Source
from moescope.tallying.counted import documents_of, opened
from moescope.tallying.one_pass import layer_by_layer, runs, threads_to_use
from moescope.trace import Layer
from moescope.trace.counts import run_starts

LENGTHS = (2, 4, 8, 16, 32, 64)
"""Tokens of a window: of a draft that is verified at once, of a small batch, of a short prompt."""

FEWEST_EXPECTED = 10
"""Experts that windows side by side must be expected to lack, or to have beyond those of one token, for an interval:
where nearly all windows have all experts, a few decide (calibrated: at 64 of 64 experts intervals held in 35 %)."""

BLOCK_ASSIGNMENTS = 2**20
"""Assignments sorted at a time; a document is never divided."""

SOURCE = "Denning 1968, The working set model for program behavior, Communications of the ACM 11 (of pages)"


def distinct(
    trace: Source,
    layers: Iterable[int] | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Mean number of distinct experts over n consecutive tokens, against three ways of putting n tokens together.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`).
        layers: Layers, or None for all.
        lengths: n, tokens of a window, ascending, from 1.
        threads: Layers measured at a time; None for the number of processors.
        progress: Called with the number of layers done and of all.
    Returns:
        Dims (domain, layer, length), the first domain being all of them together; in experts:

        * `distinct`, `distinct_low`, `distinct_high`: mean over all windows; 95 %, clustered by document;
        * `distinct_null`: the mean to expect if the tokens of each document stood in any order, exact;
        * `excess`, `excess_low`, `excess_high`: `distinct` less `distinct_null`, paired by document; `excess_p` that it
          is 0 and `excess_q` with the false discovery rate controlled over layers and lengths (and over domains, apart
          from all of them together);
        * `distinct_apart`: n tokens drawn independently from the domain, as of n sequences that are decoded together;
        * `distinct_uniform` (layer, length): if each token drew its experts uniformly and independently.

        `documents` (domain, length), a coordinate, are those that hold a window. NaN where none does. There is no
        interval and no p-value where fewer than ten experts are to be expected that windows lack, counted in windows
        side by side, or have beyond those of one token: few windows decide there.
    Raises:
        NoSuchLayer: A layer was not recorded.
        NotRecorded: The trace holds counts only, or what was counted does not hold all choices of a token.
        ValueError: `lengths` or `threads` is none that could be.
    Source:
        Denning 1968, the working set (of pages of memory). Nulls, intervals and tests are ours.
    """
    lengths = tuple(lengths)
    if not lengths or lengths[0] < 1 or any(b <= a for a, b in pairwise(lengths)):
        raise ValueError(f"lengths must ascend from at least 1, not {lengths}")
    threads = threads_to_use(threads)
    source = opened(trace)
    source.need_tokens()
    chosen = source.select_layers(layers)
    sample = documents_of(source, [layer.layer for layer in chosen], threads=threads)
    if any(len(sample.expert_ids[layer.layer]) < layer.top_k for layer in chosen):
        raise NotRecorded(source.path, "the counts do not hold all choices of a token", "give the trace itself")
    windows_MG = _windows(sample, lengths)
    counted = layer_by_layer(lambda layer: _count(sample, windows_MG, layer, lengths), chosen, threads, progress)
    mean, excess, expected, apart = (np.stack(tables, axis=-2) for tables in zip(*counted, strict=True))
    documents_DM = schema.add_total(_by_domain(sample, windows_MG > 0))[:, None]
    least, most = _range(chosen, lengths)
    windows_DM = schema.add_total(_by_domain(sample, windows_MG))[:, None]
    decisive = np.minimum(expected - least, most - expected) * windows_DM / lengths
    half, excess_half = (
        np.where(decisive >= FEWEST_EXPECTED, statistics.student_t(documents_DM) * each[1], np.nan)
        for each in (mean, excess)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2 * stats.t.sf(np.abs(excess[0] / excess[1]), np.maximum(documents_DM - 1, 1))
    p[np.isnan(excess_half)] = np.nan
    adjusted = (statistics.false_discovery_rate(p[some]) for some in (slice(0, 1), slice(1, None)))
    dims = ("domain", "layer", "length")
    return xr.Dataset(
        {
            **schema.estimate(
                "distinct", dims, "distinct experts of a window, mean", "experts", SOURCE,
                meanings={"null": "the same with the tokens of each document in any order"},
                value=mean[0], low=np.maximum(mean[0] - half, least), high=np.minimum(mean[0] + half, most),
                null=expected,
            ),
            **schema.estimate(
                "excess", dims, "distinct experts less those of any order", "experts",
                meanings={"q": "p-value adjusted over layers and lengths"},
                value=excess[0], low=excess[0] - excess_half, high=excess[0] + excess_half,
                p=p, q=np.concatenate(list(adjusted)),
            ),
            "distinct_apart": schema.described(
                apart, dims, "distinct experts of as many tokens drawn independently from the domain", "experts"
            ),
            "distinct_uniform": schema.described(
                [[uniform_distinct(layer, length) for length in lengths] for layer in chosen],
                ("layer", "length"), "distinct experts of uniform independent routing", "experts",
            ),
        },
        {
            **schema.total_coordinates(sample.domain_names, np.zeros(len(sample.domain_names))),
            **schema.layer_coordinates(chosen),
            "length": list(lengths),
            "documents": (("domain", "length"), documents_DM[:, 0].astype(np.int64), {"units": "documents"}),
        },
        {"sampled_fraction": sample.fraction},
    )  # fmt: skip


def uniform_distinct(layer: Layer, length: int) -> float:
    """Distinct experts of n tokens if each draws k uniformly: E · (1 - (1 - k/E)ⁿ).

    Example:
        >>> uniform_distinct(Layer(0, num_experts=8, top_k=2), 2)
        3.5
    """
    return layer.num_experts * (1 - (1 - layer.top_k / layer.num_ids) ** length)


def _range(layers: Sequence[Layer], lengths: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The fewest and the most distinct experts that there can be, shapes (layer, 1) and (layer, length)."""
    least = [[0 if layer.drops or layer.num_null_experts else layer.top_k] for layer in layers]
    most = [[min(layer.num_experts, layer.top_k * length) for length in lengths] for layer in layers]
    return np.array(least), np.array(most)


class _Counts(NamedTuple):
    """Of one layer, by domain (all of them first) and length; means and excesses with their standard errors."""

    mean_2DM: Numbers
    excess_2DM: Numbers
    expected_DM: Numbers
    apart_DM: Numbers


def _count(sample: DocumentSample, windows_MG: Numbers, layer: Layer, lengths: Sequence[int]) -> _Counts:
    distinct_MG, expected_MG = np.zeros(windows_MG.shape), np.zeros(windows_MG.shape)
    loads_DE = np.zeros((len(sample.domain_names), layer.num_experts), np.int64)
    tokens_G = np.diff(sample.starts)
    for run in runs((tokens_G * layer.top_k).tolist(), BLOCK_ASSIGNMENTS):
        documents = slice(run.start, run.stop)
        block = _Block.of(sample, layer, run)
        domain_C = sample.domain[documents][block.document_C]
        np.add.at(loads_DE, (domain_C, block.expert_C), block.load_C)
        for m, length in enumerate(lengths):
            distinct_MG[m, documents] = block.windows_by_expert(length)
            expected_MG[m, documents] = windows_MG[m, documents] * block.expected_in_any_order(length)
    tokens_D = schema.add_total(_sums(sample.domain, tokens_G, len(loads_DE)))
    share_DE = statistics.ratio(schema.add_total(loads_DE), tokens_D[:, None])
    apart = np.stack([(1 - (1 - share_DE) ** length).sum(axis=1) for length in lengths], axis=1)
    return _Counts(
        _mean(sample, distinct_MG, windows_MG),
        _mean(sample, distinct_MG - expected_MG, windows_MG, least=True),
        statistics.ratio(*(schema.add_total(_by_domain(sample, each)) for each in (expected_MG, windows_MG))),
        apart,
    )


class _Block(NamedTuple):
    """The assignments of some documents, sorted by expert and then by token.

    Attributes:
        starts_G: Token at which each document starts, with their number at the end.
        starts_Q: The same of each sequence.
        token_A: Token of each assignment.
        sequence_A: Its sequence.
        fresh_A: Whether it is the first of its expert in the sequence.
        document_C: Documents that choose an expert.
        expert_C: The expert.
        load_C: Tokens that choose it, at least 1.
    """

    starts_G: NDArray[np.int64]
    starts_Q: NDArray[np.int64]
    token_A: NDArray[np.int64]
    sequence_A: NDArray[np.int64]
    fresh_A: NDArray[np.bool_]
    document_C: NDArray[np.int64]
    expert_C: NDArray[np.int64]
    load_C: NDArray[np.int64]

    @classmethod
    def of(cls, sample: DocumentSample, layer: Layer, documents: range) -> _Block:
        starts_G = sample.starts[documents.start : documents.stop + 1]
        first, last = int(starts_G[0]), int(starts_G[-1])
        starts_Q = sample.sequence_starts[slice(*np.searchsorted(sample.sequence_starts, (first, last + 1)))] - first
        starts_G = starts_G - first
        ids_A = sample.expert_ids[layer.layer][: layer.top_k, first:last].T.ravel()
        real_A = (ids_A >= 0) & (ids_A < layer.num_experts)
        order_A = np.argsort(ids_A[real_A], kind="stable")  # of small integers: a radix sort
        token_A = np.repeat(np.arange(last - first), layer.top_k)[real_A][order_A]
        expert_A = ids_A[real_A][order_A].astype(np.int64)
        sequence_A, document_A = _owner(starts_Q, token_A), _owner(starts_G, token_A)
        cells = run_starts(expert_A * len(starts_G) + document_A)
        fresh_A = np.zeros(len(token_A), np.bool_)
        fresh_A[run_starts(expert_A * len(starts_Q) + sequence_A)[:-1]] = True
        counted = document_A[cells[:-1]], expert_A[cells[:-1]], np.diff(cells)
        return cls(starts_G, starts_Q, token_A, sequence_A, fresh_A, *counted)

    def windows_by_expert(self, length: int) -> Numbers:
        """Windows of each document, counted once for every expert in them, shape (document,).

        An expert is in all windows of a sequence but those that lie in a gap: before its first token, between two of
        its tokens, or after its last.
        """
        fresh_A = self.fresh_A
        last_A = np.append(fresh_A[1:], np.ones(min(1, len(fresh_A)), np.bool_))
        before_A = np.where(fresh_A, self.starts_Q[self.sequence_A] - 1, np.roll(self.token_A, 1))
        ends_Q, lengths_Q = self.starts_Q[1:], np.diff(self.starts_Q)
        windows_Q = np.zeros(len(lengths_Q))
        for sign, sequence, tokens in (
            (1, self.sequence_A[fresh_A], lengths_Q[self.sequence_A[fresh_A]]),
            (-1, self.sequence_A, self.token_A - before_A - 1),
            (-1, self.sequence_A[last_A], ends_Q[self.sequence_A[last_A]] - self.token_A[last_A] - 1),
        ):
            windows_Q += sign * _sums(sequence, np.maximum(tokens - length + 1, 0), len(windows_Q))
        return _sums(_owner(self.starts_G, self.starts_Q[:-1]), windows_Q, len(self.starts_G) - 1)

    def expected_in_any_order(self, length: int) -> Numbers:
        """Experts to expect of n tokens of each document in any order (hypergeometric), shape (document,)."""
        tokens_C = np.diff(self.starts_G)[self.document_C]
        others_C = tokens_C - self.load_C
        some = others_C >= length  # where fewer tokens do without the expert, any n tokens have it
        missed_C = np.zeros(len(tokens_C))
        missed_C[some] = np.exp(_log_choose(others_C[some], length) - _log_choose(tokens_C[some], length))
        return _sums(self.document_C, 1 - missed_C, len(self.starts_G) - 1)


def _owner(starts: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of the run of tokens, by the starts of all, in which each token is."""
    return np.searchsorted(starts, tokens, side="right") - 1


def _sums(places: NDArray[np.int64], values: NDArray[Any], number: int) -> Numbers:
    """Sums of the values by their places, of which there are so many."""
    sums: Numbers = np.bincount(places, values, minlength=number).astype(float, copy=False)
    return sums


def _log_choose(of: NDArray[np.int64], number: int) -> Numbers:
    logarithm: Numbers = special.gammaln(of + 1) - special.gammaln(of - number + 1) - special.gammaln(number + 1)
    return logarithm


def _windows(sample: DocumentSample, lengths: Sequence[int]) -> Numbers:
    """Windows of each document, shape (length, document)."""
    windows_MQ = np.maximum(np.diff(sample.sequence_starts) - np.array(lengths)[:, None] + 1, 0)
    document_Q = _owner(sample.starts, sample.sequence_starts[:-1])
    return np.stack([_sums(document_Q, windows_Q, sample.num_documents) for windows_Q in windows_MQ])


def _by_domain(sample: DocumentSample, values_MG: NDArray[Any]) -> Numbers:
    """Sums over the documents of each domain, shape (domain, length)."""
    return np.stack([_sums(sample.domain, values_G, len(sample.domain_names)) for values_G in values_MG], axis=1)


def _mean(sample: DocumentSample, y_MG: Numbers, windows_MG: Numbers, *, least: bool = False) -> Numbers:
    """Means over windows and their standard errors, clustered by document, shape (2, domain, length).

    With `least`, an error is one expert of one window at least: where documents do not differ at all, they say nothing.
    """
    products = (y_MG, windows_MG, y_MG**2, y_MG * windows_MG, windows_MG**2, windows_MG > 0)
    sums = [schema.add_total(_by_domain(sample, each)) for each in products]
    error = statistics.ratio_standard_error(*sums)
    if least:
        error = np.maximum(error, statistics.ratio(1, sums[1]))
    return np.stack([statistics.ratio(*sums[:2]), error])
