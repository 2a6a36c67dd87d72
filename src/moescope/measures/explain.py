"""What explains the choice: how many bits of it the domain, the token, its neighbours, its place and its past tell.

The unit is the token and its first choice (or each of its choices). A source explains I bits if knowing it shortens the
description of a choice by so much: their mutual information. A plug-in value is far above zero for sources of many
values even if they tell nothing, so what is shown is the mean of two predictions of the choice, one from all documents
and one from all *other* documents: their errors are equal and opposite. Sources overlap; their bits do not add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moescope.measures import explain_kernels as kernels
from moescope.measures import schema, statistics
from moescope.measures.schema import FRACTION
from moescope.tallying import DocumentSample, Source
from moescope.tallying.counted import documents_of, opened
from moescope.tallying.counter import need_choice
from moescope.tallying.one_pass import layer_by_layer, threads_to_use
from moescope.trace import Layer

SOURCES = ("domain", "token", "previous token", "previous expert", "position", "previous layer")
"""What may explain a choice: the document's domain; the token's id; the id of the token before; the first choice of the
token before; the place in the sequence; the token's own first choice in the layer before."""

_ROTATED = ("token", "previous token", "position", "previous layer")

MAX_TOKEN_IDS = 16_384
"""Ids told apart, the most frequent ones; the others are one value, so that a layer's table stays under 32 MB."""

TEST_TOKENS = 2**17
"""Tokens, in whole documents, that the permutations go over."""

TEST_DOCUMENTS = 2**15
"""Documents whose domains are permuted."""

NULL_COPIES = 2
"""Permuted copies through which the estimator itself is sent, for the null that is shown."""

STRENGTHS = 2.0 ** np.array([-5, -3, -1, 0, 1, 2, 3, 4, 5, 6, 8, 11, 15, 20])
"""Shrinkage tried, in tokens; with the last, popularity alone predicts."""

LESS_SHRINKAGE = 4
"""The bounds that the interval allows for are those of so much less shrinkage."""

THIN = 5
"""Rows a cell, of the values and experts that occur, below which shrinking may hide what there is to know."""

STRENGTH_ROWS = 2**16
"""About so many rows, of documents spread over the trace, choose the shrinkage."""

COVER = "Cover and Thomas 2006, Elements of Information Theory, chapter 2"


def explain(
    trace: Source,
    layers: Iterable[int] | None = None,
    *,
    choice: str = "first",
    permutations: int = 99,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Bits of each layer's choice that each source explains.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`).
            Layers follow one another as they were recorded or counted.
        layers: Layers to explain, or None for all.
        choice: "first", the first choice of a token; or "all", each of its choices, all ranks alike.
        permutations: Permutations of each test, at least 1; the smallest p-value is one over this plus one.
        seed: Of the permutations, which are the same in every layer.
        threads: Layers measured at a time; None for the number of processors.
        progress: Called with the number of layers done and of all.
    Returns:
        Dims (layer, source):

        * `bits`, `bits_low`, `bits_high`: bits explained, with a 95 % interval: the sampling of documents, and what the
          trace is too short to learn; 0 where less;
        * `share`: bits over the entropy of the choice;
        * `held_out`, `plug_in`: a lower and an upper bound of the truth, both but for sampling: bits saved on documents
          left out, and the plain mutual information of the counts; `miller_madow`, the latter less its bias if every
          pair of value and expert that occurs occurred often;
        * `bits_null`: `bits` of permuted routing: for the domain, domains permuted over documents; for the expert
          before, tokens permuted within the document; else, the choices of each document rotated to a random change of
          the source's value, so that they last as long as they do. What a document's own mix of experts explains is
          left in the last two;
        * `rows_a_cell`: rows over the pairs of a value and an expert that could be. Below 5 the trace is short for the
          source, and the interval allows for all that could hide there;
        * `bits_p` of the permutation test on the plug-in value, `bits_q` with the false discovery rate controlled over
          layers and sources.

        And `entropy` (layer), bits of the choice in all, with `entropy_low`, `entropy_high`; `documents`, a coordinate.
        A source that a trace does not have (token ids, a layer before, the order of the choices) is NaN.
    Raises:
        NotRecorded: The first choice is asked for and not known, or the trace holds counts.
        NoSuchLayer: A layer was not recorded.
        ValueError: `choice`, `permutations` or `threads` is none that could be.
    Source:
        Mutual information: Cover and Thomas 2006. Miller 1955 and Madow 1948 (bias). Estimator, nulls and interval are
        ours; docs/reference/measures/explain.md has their calibration.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, not {permutations}")
    threads = threads_to_use(threads)
    source = opened(trace)
    source.need_tokens()
    chosen = source.select_layers(layers)
    need_choice(source.path, chosen, choice)
    befores = {layer: before for before, layer in pairwise(source.layers)}
    needed = {*chosen, *(befores[layer] for layer in chosen if layer in befores)}
    sample = documents_of(source, [layer.layer for layer in needed], threads=threads)
    rows = _Rows.of(sample, choice)
    small = _Rows.of(sample.thinned(TEST_TOKENS), choice)

    def measure(layer: Layer) -> _Explained:
        return _explain_layer(rows, small, layer, befores.get(layer), permutations, seed)

    return _labelled(sample, chosen, choice, layer_by_layer(measure, chosen, threads, progress))


@dataclass(frozen=True)
class Estimate:
    """Bits that a source explains, before any null. See `explain`."""

    bits: float
    held_out: float
    plug_in: float
    miller_madow: float
    variance: float
    between: float
    entropy: float
    rows: int
    rows_a_cell: float


def estimate(
    x_R: NDArray[np.int32], e_R: NDArray[np.int32], starts_G: NDArray[np.int64], num_values: int, num_ids: int
) -> Estimate:
    """Mutual information of values and experts, -1 = none, bias-corrected at the level of documents.

    Returns:
        The estimate. `variance` is of `bits`: `between` documents, and a twelfth of the squared distance between the
        fitted and the held-out prediction with a quarter of the shrinkage, between which the truth lies; where rows are
        fewer than five a cell, with no more shrinkage than a value has rows.
    """
    joint_XE = np.zeros((num_values, num_ids), np.int32)
    kernels.count_joint(x_R, e_R, joint_XE)
    value_X = joint_XE.sum(axis=1, dtype=np.int64)
    load_E = joint_XE.sum(axis=0, dtype=np.int64)
    total = int(load_E.sum())
    num_documents = len(starts_G) - 1
    if total == 0 or num_documents < 2:
        return Estimate(*(float("nan"),) * 7, rows=total, rows_a_cell=float("nan"))
    fitted_A, held_out_A = np.zeros(len(STRENGTHS)), np.zeros(len(STRENGTHS))
    step = 1 + total // STRENGTH_ROWS
    tried = kernels.bits_by_strength(
        x_R, e_R, starts_G, joint_XE, value_X, load_E, step, STRENGTHS, fitted_A, held_out_A
    )
    strength = float(STRENGTHS[held_out_A.argmax()])
    cells, values, experts = (int(np.count_nonzero(counts)) for counts in (joint_XE, value_X, load_E))
    rows_a_cell = total / (values * experts)
    # What shrinking hides both predictions hide; with less of it they part, and the truth lies between.
    less = strength / LESS_SHRINKAGE
    if rows_a_cell < THIN:  # nothing can be learned: all may be shrunk away, and there may be something all the same
        less = min(less, total / values)
    weaker = max(0, int(np.searchsorted(STRENGTHS, less, side="right")) - 1)
    apart = (fitted_A[weaker] - held_out_A[weaker]) / max(1, tried)
    fitted_G, held_out_G = np.zeros(num_documents), np.zeros(num_documents)
    rows_G = np.zeros(num_documents, np.int64)
    kernels.bits_by_document(x_R, e_R, starts_G, joint_XE, value_X, load_E, strength, fitted_G, held_out_G, rows_G)
    fitted, held_out = fitted_G.sum() / total, held_out_G.sum() / total
    bits = (fitted + held_out) / 2
    residual_G = (fitted_G + held_out_G) / 2 - bits * rows_G
    between = num_documents / (num_documents - 1) * float((residual_G**2).sum()) / total**2
    entropy = _entropy(load_E)
    plug_in = entropy + _entropy(value_X) - _entropy(joint_XE)
    bias = (cells - values - experts + 1) / (2 * total * np.log(2))
    variance = between + apart**2 / 12
    return Estimate(
        float(bits), float(held_out), plug_in, plug_in - bias, variance, between, entropy, total, rows_a_cell
    )


@dataclass(frozen=True)
class _Rows:
    """What all layers share: rows of (token, choice) in whole documents, and the sources that are no choices."""

    sample: DocumentSample
    ranks: int
    document_T: NDArray[np.int32]
    sources: dict[str, tuple[NDArray[np.int32], int]]

    @classmethod
    def of(cls, sample: DocumentSample, choice: str) -> _Rows:
        document_T = sample.document_of_token()
        sources = {"domain": (sample.domain.astype(np.int32)[document_T], len(sample.domain_names))}
        if sample.token_id is not None:
            value_T, num_values = frequent(sample.token_id)
            sources["token"] = value_T, num_values
            sources["previous token"] = _before(value_T, sample), num_values
        sources["position"] = position_bins(sample.position), 33
        return cls(sample, 0 if choice == "all" else 1, document_T, sources)

    def experts(self, layer: Layer) -> NDArray[np.int32]:
        """The choices to explain, shape (rank, T)."""
        ids_KT = self.sample.expert_ids[layer.layer]
        return ids_KT[: self.ranks or layer.top_k].astype(np.int32)

    def firsts(self, layer: Layer) -> NDArray[np.int32]:
        """The first choices, shape (T,)."""
        return self.sample.expert_ids[layer.layer][0].astype(np.int32)


def frequent(token_id: NDArray[np.int32], most: int = MAX_TOKEN_IDS) -> tuple[NDArray[np.int32], int]:
    """Token ids as values from 0, the most frequent first; those beyond the `most` frequent are one value.

    Example:
        >>> frequent(np.array([9, 7, 9, 8, 9, 7], np.int32), most=2)
        (array([0, 1, 0, 1, 0, 1], dtype=int32), 2)
    """
    ids, inverse, counts = np.unique(token_id, return_inverse=True, return_counts=True)
    rank = np.empty(len(ids), np.int32)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(ids), dtype=np.int32)
    return np.minimum(rank, most - 1)[inverse].astype(np.int32), max(1, min(len(ids), most))


def position_bins(position: NDArray[np.int32]) -> NDArray[np.int32]:
    """Positions by powers of two: 0, 1, 2-3, 4-7, 8-15, …

    Example:
        >>> position_bins(np.array([0, 1, 2, 3, 4, 7, 8], np.int32)).tolist()
        [0, 1, 2, 2, 3, 3, 4]
    """
    return np.frexp(position.astype(np.float64))[1].astype(np.int32)


def _before(value_T: NDArray[np.int32], sample: DocumentSample) -> NDArray[np.int32]:
    """The value of the token before in the sequence; -1 for the first."""
    before = np.roll(value_T, 1)
    before[sample.sequence_starts[:-1]] = -1
    return before


class _Explained(NamedTuple):
    """Entropy of a layer's choice with its interval, and the values of `_BY_SOURCE` of each source."""

    entropy: tuple[float, float, float]
    by_source: dict[str, dict[str, float]]


def _explain_layer(
    rows: _Rows, small: _Rows, layer: Layer, before: Layer | None, permutations: int, seed: int
) -> _Explained:
    experts_KT, few_KT = rows.experts(layer), small.experts(layer)
    sources = _sources(rows, layer, before)
    nulls = _permuted_choices(small, few_KT, _sources(small, layer, before), layer, permutations, seed)
    nulls["domain"] = _permuted_domains(rows, small, few_KT, layer, permutations, seed)
    by_source = {}
    for name, (x_T, num_values) in sources.items():
        explained = estimate(*_flat(x_T, experts_KT, rows.sample.starts), num_values, layer.num_ids)
        null = nulls[name]
        # Where a source tells nothing the variance between documents vanishes, and what is left is that of the null,
        # which falls as one over the number of tokens.
        tested = rows.sample.num_tokens if name == "domain" else small.sample.num_tokens
        spread = float(null.permuted.std()) * tested / max(1, rows.sample.num_tokens)
        t = float(statistics.student_t(rows.sample.num_documents))
        half = t * np.sqrt(explained.variance + spread**2)
        low = explained.bits - half
        if explained.rows_a_cell < THIN:  # wide; but what is saved on documents left out is there
            low = max(low, explained.held_out - t * np.sqrt(explained.between + spread**2))
        bits = float(np.maximum(explained.bits, 0.0))  # which keeps NaN
        by_source[name] = {
            "bits": bits,
            "bits_low": float(np.maximum(low, 0.0)),
            "bits_high": float(np.maximum(explained.bits + half, 0.0)),
            "bits_null": null.bits,
            "bits_p": null.p_value,
            "share": bits / explained.entropy if explained.entropy > 0 else float("nan"),
            "held_out": explained.held_out,
            "plug_in": explained.plug_in,
            "miller_madow": explained.miller_madow,
            "rows_a_cell": explained.rows_a_cell,
        }
    return _Explained(_entropy_interval(experts_KT, rows.sample.starts, layer.num_ids), by_source)


def _sources(rows: _Rows, layer: Layer, before: Layer | None) -> dict[str, tuple[NDArray[np.int32], int]]:
    sources = dict(rows.sources)
    if layer.ranked:
        sources["previous expert"] = _before(rows.firsts(layer), rows.sample), layer.num_ids
    if before is not None and before.ranked:
        sources["previous layer"] = rows.firsts(before), before.num_ids
    return sources


def _flat(
    x_T: NDArray[np.int32], experts_KT: NDArray[np.int32], starts_G: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """Rows of (token, choice), a token's choices side by side."""
    ranks = len(experts_KT)
    if ranks == 1:
        return x_T, np.ascontiguousarray(experts_KT[0]), starts_G
    return np.repeat(x_T, ranks), np.ascontiguousarray(experts_KT.T).ravel(), starts_G * ranks


@dataclass(frozen=True)
class _Null:
    """What permuted routing gives: the plug-in value as recorded and permuted, and the mean of the estimate."""

    observed: float
    permuted: NDArray[np.float64]
    bits: float

    @property
    def p_value(self) -> float:
        as_large = int(np.count_nonzero(self.permuted >= self.observed - 1e-12))
        return (1 + as_large) / (1 + len(self.permuted))


def _permuted_choices(
    rows: _Rows,
    experts_KT: NDArray[np.int32],
    sources: dict[str, tuple[NDArray[np.int32], int]],
    layer: Layer,
    permutations: int,
    seed: int,
) -> dict[str, _Null]:
    """The null of each source but the domain: the choices of a document, moved.

    Against the expert before they are put in random order, which is what locality is measured against. Against all else
    they are rotated: neighbours stay neighbours, so a choice that merely lasts is not taken for one that something else
    explains. The ends of the document meet where the value of the source changes.
    """
    num_tokens, ranks = experts_KT.shape[1], len(experts_KT)
    starts_G = rows.sample.starts
    xlogx = _xlogx(num_tokens * ranks)
    firsts_T = rows.firsts(layer)
    fixed = {name: np.repeat(x_T, ranks) for name, (x_T, _) in sources.items() if name in _ROTATED}
    names = [*fixed, *(["previous expert"] if "previous expert" in sources else [])]
    tables = {name: _workspace(sources[name][1], layer.num_ids) for name in names}

    def values(name: str, order_T: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        moved_KT = experts_KT[:, order_T]
        if name == "previous expert":
            return _flat(_before(firsts_T[order_T], rows.sample), moved_KT, starts_G)[:2]
        return fixed[name], np.ascontiguousarray(moved_KT.T).ravel()

    text_T = np.arange(num_tokens, dtype=np.int32)
    observed = {name: kernels.information(*values(name, text_T), xlogx, *tables[name]) for name in names}
    permuted = {name: np.zeros(permutations) for name in names}
    copies: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        order_T, state = text_T.copy(), np.array([seed], np.uint64)
        for at in range(permutations):
            if name == "previous expert":
                kernels.shuffle_within(starts_G, order_T, state)
            else:
                kernels.rotate_within(starts_G, sources[name][0], order_T, state)
            xe = values(name, order_T)
            permuted[name][at] = kernels.information(*xe, xlogx, *tables[name])
            if at < NULL_COPIES:
                bits = estimate(*xe, starts_G * ranks, sources[name][1], layer.num_ids).bits
                copies[name].append(float(np.maximum(bits, 0.0)))
    return {name: _Null(observed[name], permuted[name], float(np.mean(copies[name]))) for name in names}


def _permuted_domains(
    rows: _Rows, small: _Rows, few_KT: NDArray[np.int32], layer: Layer, permutations: int, seed: int
) -> _Null:
    """The null of the domain: the domains of whole documents in random order."""
    sample, num_domains = rows.sample, len(rows.sample.domain_names)
    kept = min(sample.num_documents, TEST_DOCUMENTS)
    chosen_G = np.linspace(0, sample.num_documents - 1, kept).astype(np.int64)
    joint_GE = np.zeros((sample.num_documents, layer.num_ids), np.int32)
    for e_T in rows.experts(layer):
        kernels.count_joint(rows.document_T, e_T, joint_GE)
    counts_GE = joint_GE[chosen_G].astype(np.float64)
    domain_G = sample.domain[chosen_G]

    def plug_in(label_G: NDArray[np.int64]) -> float:
        joint_DE = np.eye(num_domains)[:, label_G] @ counts_GE
        return _entropy(joint_DE.sum(axis=0)) + _entropy(joint_DE.sum(axis=1)) - _entropy(joint_DE)

    random = np.random.default_rng(seed)
    permuted = np.array([plug_in(random.permutation(domain_G)) for _ in range(permutations)])
    copies = []
    for _ in range(min(permutations, NULL_COPIES)):
        x_T = random.permutation(small.sample.domain)[small.document_T].astype(np.int32)
        bits = estimate(*_flat(x_T, few_KT, small.sample.starts), num_domains, layer.num_ids).bits
        copies.append(float(np.maximum(bits, 0.0)))
    return _Null(plug_in(domain_G), permuted, float(np.mean(copies)))


def _entropy_interval(
    experts_KT: NDArray[np.int32], starts_G: NDArray[np.int64], num_ids: int
) -> tuple[float, float, float]:
    """Entropy of the choice, bits, with its 95 % interval over documents.

    The plug-in value is low by Σ var(p) / 2p nats. That is Miller's correction if tokens are independent; here the
    variance is that between documents, whose tokens are alike. Where it is large, what it leaves out is not small: the
    interval allows for a twelfth of its square, and its upper end for experts that were not seen.
    """
    _, e_R, starts_G = _flat(experts_KT[0], experts_KT, starts_G)
    made = e_R >= 0
    load_E = np.bincount(e_R[made], minlength=num_ids)
    total = int(load_E.sum())
    if not total:
        return (float("nan"),) * 3
    with np.errstate(divide="ignore"):
        surprise_E = -np.log2(load_E / total)
    value = _entropy(load_E)
    surprise_R = np.where(made, surprise_E[np.where(made, e_R, 0)] - value, 0.0)
    residual_G = np.add.reduceat(surprise_R, starts_G[:-1])
    num_documents = len(residual_G)
    if num_documents < 2:
        return value, float("nan"), float("nan")
    error = np.sqrt(num_documents / (num_documents - 1) * float((residual_G**2).sum())) / total
    squared_E, by_made_E = np.zeros(num_ids, np.int64), np.zeros(num_ids, np.int64)
    made_squared = kernels.count_moments(e_R, starts_G, squared_E, by_made_E)
    used = load_E > 0
    error_E = statistics.ratio_standard_error(load_E, total, squared_E, by_made_E, made_squared, num_documents)
    bias = float((error_E[used] ** 2 * total / load_E[used]).sum()) / (2 * np.log(2))
    value += bias
    half = float(statistics.student_t(num_documents)) * float(np.sqrt(error**2 + bias**2 / 12))
    most = float(np.log2(num_ids))
    # Experts not seen have about the share of those seen once (Good 1953), and that much of at most log E bits.
    unseen = int(np.count_nonzero(load_E == 1)) / total * most
    return min(value, most), max(0.0, value - half), min(value + half + unseen, most)


def _entropy(counts: NDArray[np.integer | np.floating]) -> float:
    """Plug-in entropy of counts, bits."""
    c = counts[counts > 0].astype(np.float64)
    n = c.sum()
    return float(np.log2(n) - (c * np.log2(c)).sum() / n) if len(c) else 0.0


def _xlogx(most: int) -> NDArray[np.float64]:
    c = np.arange(most + 1, dtype=np.float64)
    c[1:] *= np.log2(c[1:])
    return c


def _workspace(num_values: int, num_ids: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    return np.zeros((num_values, num_ids), np.int32), np.zeros(num_values, np.int32), np.zeros(num_ids, np.int32)


_BY_SOURCE = {
    "bits": ("bits of the choice that the source explains", "bits", COVER),
    "bits_null": ("bits that the source explains of permuted routing", "bits"),
    "bits_p": ("p-value of the permutation test", "1"),
    "bits_q": ("p-value adjusted over layers and sources", "1", "Benjamini and Hochberg 1995"),
    "share": ("bits explained over the entropy of the choice", FRACTION),
    "held_out": ("bits saved on documents left out", "bits"),
    "plug_in": ("mutual information of the counts, without correction", "bits", COVER),
    "miller_madow": ("mutual information less its first-order bias", "bits", "Miller 1955; Madow 1948"),
    "rows_a_cell": ("rows over the pairs of a value and an expert that could be", "rows"),
}


def _labelled(
    sample: DocumentSample, layers: Sequence[Layer], choice: str, explained: Sequence[_Explained]
) -> xr.Dataset:
    values = {
        name: np.array([[one.by_source.get(s, {}).get(name, np.nan) for s in SOURCES] for one in explained])
        for name in ("bits", "bits_low", "bits_high", *_BY_SOURCE)
    }
    values["bits_q"] = statistics.false_discovery_rate(values["bits_p"])
    entropy, low, high = np.array([one.entropy for one in explained]).T
    return xr.Dataset(
        {
            **schema.labelled(values, ("layer", "source"), _BY_SOURCE),
            **schema.estimate(
                "entropy", ("layer",), "entropy of the choice", "bits", COVER, value=entropy, low=low, high=high
            ),
        },
        {
            **schema.layer_coordinates(layers),
            "source": list(SOURCES),
            "documents": ((), sample.num_documents, {"units": "documents"}),
        },
        {"choice": choice, "tokens": sample.num_tokens, "sampled_fraction": sample.fraction},
    )
