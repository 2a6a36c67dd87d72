"""Calibration: how often intervals hold what is planted, and how often tests reject what is true.

    python benchmarks/calibration.py --again --write [--draws 200] [--processes 2] [--folder calibration-cells]
    python benchmarks/calibration.py --quick --generators even sticky --shapes 2of8 --measures repeats explain

For each generator (`planted_routing.py`) and shape, 200 draws of 60 documents of 100 to 300 tokens (some 12,000 tokens)
are written as traces and measured as a user would, all measures of the routing of layer 1. What is planted comes from
theory, or from 20,000 documents of the generator counted by the slow and obvious loops of this file; never from the
code under test. What is measured is kept in the folder, a JSON file a generator, shape and measure, so that a run that
was stopped goes on; what a changed measure left there is to be removed by hand. `--again` draws 1,000 more of every
measure that misses a bar, and judges it by these. `--write` makes docs/reference/calibration.md of it.

A 95 % interval should hold the planted value in 90 to 99 % of the draws (more where the value lies at the end of its
range, as 0 bits do: there an interval has one end). A test at 5 % should reject what is true in 5 % ± 2; 200 draws know
a rate of 5 % to ± 3.1 (two standard deviations), so a cell is marked above 10.1 %.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))

import planted_routing as planted
from planted_routing import DOMAINS, KINDS, Draw, Generator, inclusion, pair_inclusion

import moescope
from moescope.measures import divergence, repeats, schema, shares
from moescope.trace import Trace

SHAPES: dict[str, tuple[Any, ...]] = {
    "1of4": (4, 1),
    "2of8": (8, 2),
    "8of64": (64, 8),
    "8of256": (256, 8),
    "8of64short": (64, 8, (20, 100)),
    "8of256short": (256, 8, (20, 100)),
}
"""Experts, choices a token and, if they are others than usual, lengths of documents."""

KINDS_OF_SHAPE = {
    "1of4": ("even", "token", "domain", "sticky", "position", "alternating"),
    "2of8": tuple(KINDS),
    "8of64": ("even", "token", "domain", "documents", "sticky", "collapsed", "layer"),
    "8of256": ("even", "domain", "sticky", "layer"),
    "8of64short": ("even", "documents", "sticky"),
    "8of256short": ("even", "token", "domain", "sticky", "position", "collapsed", "layer"),
}
"""What is drawn in each shape, so that the whole takes half an hour of one core."""

BALANCED = {("even", "1of4"), ("even", "8of64"), ("even", "8of256"), ("collapsed", "8of64")}
BALANCED |= {(kind, "2of8") for kind in ("even", "popular", "domain", "documents", "sticky", "collapsed")}
"""Where balance is measured, which takes as long as all else."""

LEAST_HELD = 90.0
ROUNDING = 1e-6
MOST_REJECTED = 10.1
DRAWN_AGAIN = 1000
DOCUMENTS = 60
MANY_DOCUMENTS, COUNTED = 2000, 10
PERMUTATIONS = 19
LAGS = (1, 4, 16, 64)
LENGTHS = (4, 16, 64)
KEPT = 0.6
PAGE = Path(__file__).parents[1] / "docs" / "reference" / "calibration.md"
NAN = float("nan")
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Truth:
    """What is planted, and whether the null of the test is true (None: there is no test)."""

    value: ArrayLike
    null: bool | None = None


@dataclass(frozen=True)
class Found:
    """What a measure says of one draw: values, ends of their intervals, p-values; arrays of one shape.

    `truth` replaces the planted value where it depends on the draw, such as the share of the expert found on top.
    """

    value: ArrayLike
    low: ArrayLike = NAN
    high: ArrayLike = NAN
    p_value: ArrayLike = NAN
    truth: ArrayLike | None = None


@dataclass(frozen=True)
class Case:
    """One draw."""

    generator: Generator
    draw: Draw
    trace: Trace
    folder: Path
    seed: int


# What is measured


def of_tally(case: Case) -> dict[str, Found]:
    counted = moescope.tally(case.trace, [1], threads=1)
    share, rate = shares(counted).sel(layer=1), repeats(counted).sel(layer=1)
    apart = divergence(counted).sel(layer=1)
    rows = {}
    for choice, words in (("first", "first choice"), ("all", "either choice")):
        of = share.sel(choice=choice)
        rows[f"shares, {words}"] = Found(*(of[name].values for name in ("share", "share_low", "share_high")))
    for kind in ("first", "any", "first_in_next"):
        of = rate.sel(kind=kind)
        rows[f"repeats, {kind}"] = Found(*(of[name].values for name in ("rate", "rate_low", "rate_high")))
    rows["repeats, popularity null (first)"] = Found(rate["rate_null"].sel(kind="first").values)
    upper = np.triu_indices(len(DOMAINS), 1)
    names = "jsd", "jsd_low", "jsd_high", "jsd_p"
    rows["divergence, pairs of domains"] = Found(*(apart[name].values[upper] for name in names))
    names = "jsd_rest", "jsd_rest_low", "jsd_rest_high", "jsd_rest_p"
    rows["divergence, a domain from the rest"] = Found(*(apart[name].values for name in names))
    return rows


def of_balance(case: Case) -> dict[str, Found]:
    of = moescope.balance(case.trace, [1], threads=1, seed=case.seed).sel(layer=1)
    every = schema.total(of)
    rows = {
        f"balance, {name}": Found(*(float(every[f"{name}{end}"]) for end in ("", "_low", "_high")))
        for name in ("imbalance", "cv", "gini", "entropy")
    }
    for batch in (1, 16):
        at = of.sel(batch=batch)
        rows[f"balance, imbalance in batches of {batch}"] = Found(
            *(float(at[f"batch_imbalance{end}"]) for end in ("", "_low", "_high"))
        )
    if case.generator.top_k > 1:
        for statistic in ("first", "margin", "entropy"):
            at = every.sel(statistic=statistic)
            rows[f"gate weights, {statistic}"] = Found(*(float(at[f"weight{end}"]) for end in ("", "_low", "_high")))
    return rows


def of_coactivation(case: Case) -> dict[str, Found]:
    if case.generator.top_k == 1:
        return {}
    of = moescope.coactivation(case.trace, [1], threads=1).sel(layer=1)
    upper = np.triu_indices(case.generator.num_experts, 1)
    names = "lift", "lift_low", "lift_high", "lift_p"
    return {"coactivation, lift of a pair": Found(*(of[name].values[upper] for name in names))}


def of_transitions(case: Case) -> dict[str, Found]:
    of = moescope.transitions(case.trace, threads=1, seed=case.seed).sel(layer=1)
    return {
        "transitions, lift": Found(*(of[name].values for name in ("lift", "lift_low", "lift_high", "lift_p"))),
        "transitions, information": Found(*(float(of[f"information{end}"]) for end in ("", "_low", "_high"))),
    }


def of_explain(case: Case) -> dict[str, Found]:
    of = moescope.explain(case.trace, [1], permutations=PERMUTATIONS, seed=case.seed, threads=1).sel(layer=1)
    names = "bits", "bits_low", "bits_high", "bits_p"
    rows = {f"explain, {s}": Found(*(float(of[name].sel(source=s)) for name in names)) for s in of["source"].values}
    rows["explain, entropy"] = Found(*(float(of[name]) for name in ("entropy", "entropy_low", "entropy_high")))
    return rows


def of_locality(case: Case) -> dict[str, Found]:
    of = moescope.locality(case.trace, [1], lags=LAGS, seed=case.seed, threads=1)
    of = schema.total(of).sel(layer=1)
    every = of.sel(pairs="all")
    rows = {}
    for kind in ("first", "any"):
        rows[f"locality, rate ({kind})"] = Found(
            *(float(every[f"rate{end}"].sel(kind=kind)) for end in ("", "_low", "_high"))
        )
        for null in every["null"].values:
            at = every.sel(kind=kind, null=null)
            names = "excess", "excess_low", "excess_high", "excess_p"
            rows[f"locality, above {null} ({kind})"] = Found(*(float(at[name]) for name in names))
    for lag in LAGS:
        at = of.sel(kind="first", lag=lag)
        names = "lag_excess", "lag_excess_low", "lag_excess_high"
        rows[f"locality, above document, {lag} apart"] = Found(*(float(at[name]) for name in names))
    rows["locality, tokens a run"] = Found(*(float(of[f"run_mean{end}"]) for end in ("", "_low", "_high")))
    return rows


def of_consistency(case: Case) -> dict[str, Found]:
    of = moescope.consistency(case.trace, [1], lengths=LENGTHS, threads=1).sel(layer=1).isel(domain=0)
    rows = {}
    for length in LENGTHS:
        at = of.sel(length=length)
        rows[f"SRP({length})"] = Found(*(float(at[name]) for name in ("srp", "srp_low", "srp_high")))
        names = "excess", "excess_low", "excess_high", "excess_p"
        rows[f"SRP({length}), beyond any order"] = Found(*(float(at[name]) for name in names))
    return rows


def of_distinct(case: Case) -> dict[str, Found]:
    of = moescope.distinct(case.trace, [1], lengths=LENGTHS, threads=1).sel(layer=1).isel(domain=0)
    rows = {}
    for length in LENGTHS:
        at = of.sel(length=length)
        rows[f"distinct({length})"] = Found(*(float(at[f"distinct{end}"]) for end in ("", "_low", "_high")))
        names = "excess", "excess_low", "excess_high", "excess_p"
        rows[f"distinct({length}), less any order"] = Found(*(float(at[name]) for name in names))
    return rows


def of_words(case: Case) -> dict[str, Found]:
    of = moescope.words(case.trace, ["self", "Question"], layers=[1]).sel(layer=1)
    word, two = of.sel(word="self"), of.sel(word="Question")
    chances = first_of_id(case.generator)
    top = int(word["top_expert"])
    ends = "", "_low", "_high"
    return {
        "words, share of the top expert": Found(
            *(float(word[f"top_share{end}"]) for end in ends), truth=chances[planted.WORD, top]
        ),
        "words, same expert in two documents": Found(*(float(word[f"same{end}"]) for end in ends)),
        "words, all tokens together": Found(*(float(two[f"together{end}"]) for end in ends)),
    }


def of_compare(case: Case) -> dict[str, Found]:
    """B keeps the sets of A with a probability of each document's own, 0.6 on average, and else draws anew."""
    if case.generator.kind not in ("even", "popular"):
        return {}
    rng = np.random.default_rng([case.seed, 1])
    a, anew = case.draw, case.generator.draw(case.seed + 2**30, len(case.draw.domain_G))
    fresh_T = rng.permutation(anew.starts_G[-1])
    fresh_T = np.resize(fresh_T, a.starts_G[-1])
    keep_T = rng.random(a.starts_G[-1]) < rng.beta(6, 4, len(a.domain_G))[a.document_T]
    ids = {at: np.where(keep_T[:, None], a.ids[at], anew.ids[at][fresh_T]) for at in a.ids}
    b = Draw(a.starts_G, a.domain_G, a.token_id_T, ids, a.weights)
    found = moescope.compare(case.trace, b.write(case.folder / "b.moe", case.generator.num_experts), [1], threads=1)
    assert found.agreement is not None
    assert found.changes is not None
    at = found.agreement.isel(domain=0).sel(layer=1)
    change = found.changes.isel(domain=0).sel(layer=1)
    rows = {
        f"compare, kappa of the {kind}": Found(
            *(float(at[f"kappa{end}"].sel(kind=kind)) for end in ("", "_low", "_high"))
        )
        for kind in ("set", "first")
    }
    rows["compare, change of a share"] = Found(*(change[f"change{end}"].values for end in ("", "_low", "_high", "_p")))
    return rows


MEASURES: dict[str, Callable[[Case], dict[str, Found]]] = {
    "repeats": of_tally,
    "balance": of_balance,
    "coactivation": of_coactivation,
    "transitions": of_transitions,
    "explain": of_explain,
    "locality": of_locality,
    "consistency": of_consistency,
    "distinct": of_distinct,
    "words": of_words,
    "compare": of_compare,
}


# What is planted


def first_of_id(generator: Generator) -> Numbers:
    """First choices of each token id, shape (id, expert)."""
    if generator.kind == "token":
        return generator.first_CE
    return np.tile(mean_first(generator), (planted.NUM_IDS, 1))


def mean_first(generator: Generator) -> Numbers:
    """First choices of all tokens."""
    return generator.context_C @ generator.first_CE


def mean_either(generator: Generator) -> Numbers:
    """Shares of assignments of all tokens."""
    return included(generator) / generator.top_k


def included(generator: Generator) -> Numbers:
    """Probability that a token's set holds each expert."""
    beside = generator.top_k - (generator.kind in ("alternating", "collapsed"))
    by_context = inclusion(generator.weight_CE, beside) if beside else np.zeros_like(generator.weight_CE)
    forced = generator.first_CE if beside < generator.top_k else 0
    return generator.context_C @ (by_context + forced)


def by_domain(generator: Generator, of_contexts: Callable[[Generator], Numbers], by_context: Numbers) -> Numbers:
    if generator.kind == "domain":
        return by_context
    return np.tile(of_contexts(generator), (len(DOMAINS), 1))


def together(generator: Generator) -> Numbers:
    """Probability that a token's set holds both experts; 0 on the diagonal."""
    k, experts = generator.top_k, generator.num_experts
    if generator.kind in ("alternating", "collapsed"):
        q = generator.context_C
        one_forced = (q[:, None] + q) * (k - 1) / (experts - 1)
        neither = np.clip(1 - q[:, None] - q, 0, None) * (k - 1) * (k - 2) / ((experts - 1) * max(experts - 2, 1))
        pairs = one_forced + neither
        np.fill_diagonal(pairs, 0)
        return pairs
    return np.einsum("c,cij->ij", generator.context_C, [pair_inclusion(w, k) for w in generator.weight_CE])


def lifts(generator: Generator) -> Numbers:
    """Pairs of a set against sets with the same popularity."""
    if generator.kind in ONE_CONTEXT:
        return np.ones((generator.num_experts, generator.num_experts))
    expected = pair_inclusion(planted.weights_of(included(generator), generator.top_k), generator.top_k)
    np.fill_diagonal(expected, 1)
    return together(generator) / expected


def bits(generator: Generator) -> dict[str, float]:
    """Information of each source about the first choice."""
    first_CE, context_C, experts = generator.first_CE, generator.context_C, generator.num_experts
    joint = context_C[:, None] * first_CE
    found = dict.fromkeys(("domain", "token", "previous token", "previous expert", "position", "previous layer"), 0.0)
    eye = np.eye(experts)
    if generator.kind in ("token", "domain", "position"):
        found[generator.kind] = planted.information(joint)
    if generator.kind == "domain":
        found["previous expert"] = planted.information(np.einsum("c,ci,cj->ij", context_C, first_CE, first_CE))
    if generator.kind == "documents":
        weight = np.exp(np.random.default_rng(0).normal(0, 0.8, (4000, experts))) / experts
        same = float(((inclusion(weight, generator.top_k) / generator.top_k) ** 2).sum(axis=1).mean())
        found["previous expert"] = planted.information(
            eye * same / experts + (1 - eye) * (1 - same) / (experts * (experts - 1))
        )
    if generator.kind == "sticky":
        share = first_CE[0]
        kept = planted.STICKS * np.diag(share) + (1 - planted.STICKS) * np.outer(share, share)
        found["previous expert"] = planted.information(kept)
    if generator.kind == "before":
        found["previous expert"] = planted.information(joint)
    if generator.kind == "alternating":
        found["previous expert"] = 1.0
    if generator.kind == "position":
        late, early = first_CE
        pairs = np.mean(generator.lengths) - 1
        number = planted.EARLY
        neighbours = (number - 1) * np.outer(early, early) + np.outer(early, late)
        found["previous expert"] = planted.information(neighbours + (pairs - number) * np.outer(late, late))
    if generator.kind == "layer":
        found["previous layer"] = planted.information(joint)
    return found


ONE_CONTEXT = ("even", "popular", "sticky", "documents")
ANY_ORDER = ("even", "popular", "token", "domain", "documents", "collapsed", "layer")
"""Kinds whose documents are as likely in any order."""

ALIKE = ("even", "popular", "token", "collapsed", "layer")
"""Kinds whose tokens are independent, given their ids, whatever document they stand in."""


def truths(generator: Generator) -> dict[str, Truth]:
    """Everything that is planted, by the name of its row."""
    kind, k, experts = generator.kind, generator.top_k, generator.num_experts
    rows: dict[str, Truth] = {}
    either_CE = inclusion(generator.weight_CE, k) / k if kind == "domain" else generator.first_CE
    first_DE = by_domain(generator, mean_first, generator.first_CE)
    either_DE = by_domain(generator, mean_either, either_CE)
    rows["shares, first choice"], rows["shares, either choice"] = Truth(first_DE), Truth(either_DE)
    pairs = [(0, 1), (0, 2), (1, 2)]
    same = kind != "domain"
    rows["divergence, pairs of domains"] = Truth([jsd(either_DE[a], either_DE[b]) for a, b in pairs], same)
    rest = [jsd(either_DE[d], np.delete(either_DE, d, axis=0).mean(axis=0)) for d in range(len(DOMAINS))]
    rows["divergence, a domain from the rest"] = Truth(rest, same)
    share = mean_either(generator)
    rows["balance, imbalance"] = Truth(experts * share.max())
    rows["balance, cv"] = Truth(np.sqrt(np.mean((experts * share - 1) ** 2)))
    rows["balance, gini"] = Truth(np.abs(share[:, None] - share).sum() / (2 * experts))
    rows["balance, entropy"] = Truth(entropy(share) / np.log2(experts))
    if k > 1:
        rows["coactivation, lift of a pair"] = Truth(lifts(generator)[np.triu_indices(experts, 1)], kind in ONE_CONTEXT)
        harmonic = 1 / np.arange(1, k + 1)
        rows["gate weights, first"] = Truth(harmonic.sum() / k)
        rows["gate weights, margin"] = Truth(1 / k)
        rows["gate weights, entropy"] = Truth((harmonic.sum() - 1) / np.log(2))
    lift = generator.first_CE / mean_first(generator) if kind == "layer" else np.ones((experts, experts))
    found = bits(generator)
    rows["transitions, lift"] = Truth(lift, kind != "layer")
    rows["transitions, information"] = Truth(found["previous layer"])
    for source, value in found.items():
        null = kind in ANY_ORDER if source == "previous expert" else value == 0
        rows[f"explain, {source}"] = Truth(value, null)
    rows["explain, entropy"] = Truth(entropy(mean_first(generator)))
    word = first_of_id(generator)
    rows["words, share of the top expert"] = Truth(word[planted.WORD].max())
    if kind in ALIKE:
        rows["words, same expert in two documents"] = Truth((word[planted.WORD] ** 2).sum())
        rows["words, all tokens together"] = Truth(word[planted.HALF] @ word[planted.OTHER_HALF])
    rows["compare, kappa of the set"] = rows["compare, kappa of the first"] = Truth(KEPT)
    rows["compare, change of a share"] = Truth(np.zeros(experts), True)
    counted = [of_many(generator, seed) for seed in range(COUNTED)]
    for name, truth in counted[0].items():
        rows[name] = Truth(np.mean([of[name].value for of in counted], axis=0), truth.null)
    return rows


def jsd(p: Numbers, q: Numbers) -> float:
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def entropy(p: Numbers) -> float:
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


def of_many(generator: Generator, seed: int) -> dict[str, Truth]:
    """What has no simple formula, counted over many documents; zero where theory says so."""
    kind, k, experts = generator.kind, generator.top_k, generator.num_experts
    many = generator.draw(2**31 + seed, MANY_DOCUMENTS)
    ids_TK, position_T, document_T = many.ids[1], many.position_T, many.document_T
    first_T, domain_T = ids_TK[:, 0], many.domain_G[document_T]
    inner_T = position_T[1:] > 0
    kinds = {
        "first": first_T[1:] == first_T[:-1],
        "any": (ids_TK[1:, :, None] == ids_TK[:-1, None, :]).any(axis=(1, 2)),
        "first_in_next": (ids_TK[1:] == first_T[:-1, None]).any(axis=1),
    }
    rows: dict[str, Truth] = {}
    for name, repeated_T in kinds.items():
        values = [repeated_T[inner_T & (domain_T[1:] == d)].mean() for d in range(len(DOMAINS))]
        rows[f"repeats, {name}"] = Truth(values if kind == "domain" else np.full(3, repeated_T[inner_T].mean()))
    first_DE = by_domain(generator, mean_first, generator.first_CE)
    rows["repeats, popularity null (first)"] = Truth((first_DE**2).sum(axis=1))
    rate, rate_any = (float(kinds[name][inner_T].mean()) for name in ("first", "any"))
    alike = float((first_DE**2).sum(axis=1).mean())
    if kind in (*ALIKE, "domain", "sticky"):
        rate = alike if kind != "sticky" else planted.STICKS + (1 - planted.STICKS) * alike
        rows["repeats, first"] = Truth((first_DE**2).sum(axis=1) if kind == "domain" else np.full(3, rate))
    if kind == "even":
        rate_any = 1 - float(np.prod([(experts - k - i) / (experts - i) for i in range(k)]))
        rows["repeats, any"] = Truth(np.full(3, rate_any))
    rows["locality, rate (first)"], rows["locality, rate (any)"] = Truth(rate), Truth(rate_any)
    rows["locality, tokens a run"] = Truth(len(first_T) / (1 + np.count_nonzero(~(kinds["first"] & inner_T))))
    disjoint = np.prod([(experts - k - i) / (experts - i) for i in range(k)])
    rows["locality, above uniform (first)"] = Truth(rate - 1 / experts, None)
    rows["locality, above uniform (any)"] = Truth(rate_any - (1 - disjoint), None)
    rows["locality, above popularity (first)"] = Truth(rate - alike, False)
    if kind == "even":
        for row in ("above uniform (first)", "above uniform (any)"):
            rows[f"locality, {row}"] = Truth(0.0, True)
    if kind in (*ALIKE, "domain"):
        rows["locality, above popularity (first)"] = Truth(0.0, True)
        rows["locality, above popularity (any)"] = Truth(0.0, True)
    word = first_of_id(generator)
    seen = generator.chance_of_id @ word
    rows["locality, above words (first)"] = Truth(0.0 if kind in ALIKE else rate - seen @ seen, kind in ALIKE)
    if kind in ALIKE:
        rows["locality, above words (any)"] = Truth(0.0, True)
    for lag in LAGS:
        rows[f"locality, above document, {lag} apart"] = Truth(
            0.0 if kind in ANY_ORDER else above_any_order(many, first_T, experts, lag)
        )
    near = rows["locality, above document, 1 apart"].value
    rows["locality, above document (first)"] = Truth(near, kind in ANY_ORDER)
    if kind in ANY_ORDER:
        rows["locality, above document (any)"] = Truth(0.0, True)
    for length in LENGTHS:
        seen_V = activations(ids_TK, many.starts_G, experts, length)
        shuffled_V = None if kind in ANY_ORDER else activations_in_any_order(ids_TK, many.starts_G, experts, length)
        for name, value_of in (("SRP({}){}", best_f1), ("distinct({}){}", lambda v: distinct_of(v, experts))):
            value = value_of(seen_V)
            excess = 0.0 if shuffled_V is None else value - value_of(shuffled_V)
            order = ", beyond any order" if value_of is best_f1 else ", less any order"
            rows[name.format(length, "")] = Truth(value)
            rows[name.format(length, order)] = Truth(excess, kind in ANY_ORDER)
    for batch in (1, 16):
        rows[f"balance, imbalance in batches of {batch}"] = Truth(imbalance_of_batches(many, experts, batch))
    return rows


def above_any_order(many: Draw, first_T: NDArray[np.int64], experts: int, lag: int) -> float:
    repeated = expected = pairs = 0.0
    for start, end in pairwise(many.starts_G):
        first, n = first_T[start:end], end - start - lag
        if n < 1:
            continue
        load = np.bincount(first, minlength=experts)
        repeated += np.count_nonzero(first[lag:] == first[:-lag])
        expected += n * (load * (load - 1)).sum() / (len(first) * (len(first) - 1))
        pairs += n
    return (repeated - expected) / pairs


def activations(ids_TK: NDArray[np.int64], starts_G: NDArray[np.int64], experts: int, length: int) -> Numbers:
    """Pairs of a segment and an expert by how many tokens of the segment choose the expert, one segment a start."""
    number_V = np.zeros(length + 1)
    for start, end in pairwise(starts_G):
        if end - start < length:
            continue
        active = np.zeros((end - start + 1, experts), np.int64)
        active[np.arange(1, end - start + 1)[:, None], ids_TK[start:end]] = 1
        sums = np.cumsum(active, axis=0)
        number_V += np.bincount((sums[length:] - sums[:-length]).ravel(), minlength=length + 1)
    return number_V


def activations_in_any_order(
    ids_TK: NDArray[np.int64], starts_G: NDArray[np.int64], experts: int, length: int
) -> Numbers:
    """The same if each document is as likely in any order: activations in a segment are hypergeometric."""
    segments: Counter[tuple[int, int]] = Counter()
    for start, end in pairwise(starts_G):
        for load in np.bincount(ids_TK[start:end].ravel(), minlength=experts):
            segments[end - start, int(load)] += max(0, end - start - length + 1)
    number_V, v = np.zeros(length + 1), np.arange(length + 1)
    for (tokens, load), number in segments.items():
        if number:
            number_V += number * stats.hypergeom.pmf(v, tokens, load, length)
    return number_V


def distinct_of(number_V: Numbers, experts: int) -> float:
    """Experts that a segment holds at all, on average."""
    return float(experts * number_V[1:].sum() / number_V.sum())


def best_f1(number_V: Numbers) -> float:
    """The best F1 over thresholds, from the number of segments and experts with so many activations."""
    length = len(number_V) - 1
    f = np.arange(length + 1)
    return max(
        2 * (f * number_V)[a:].sum() / (length * number_V[a:].sum() + (f * number_V).sum()) for a in range(length + 1)
    )


def imbalance_of_batches(many: Draw, experts: int, batch: int) -> float:
    found = []
    for first in range(0, len(many.domain_G) - batch + 1, batch):
        rows = slice(many.starts_G[first], many.starts_G[first + batch])
        load = np.bincount(many.ids[1][rows].ravel(), minlength=experts)
        found.append(load.max() / load.mean())
    return float(np.mean(found))


# Cells


@dataclass
class Row:
    """Of the draws of a cell: how often an interval held what is planted, and a test rejected.

    A measure of many values (shares, pairs) has an entry each; rates are over all entries and draws, `planted` and
    `estimate` are of the entry with the largest planted value. `refused` entries have no interval.
    """

    planted: float = NAN
    estimate: float = 0.0
    null: bool | None = None
    held: int = 0
    intervals: int = 0
    refused: int = 0
    rejected: int = 0
    tests: int = 0
    draws: int = 0
    again: bool = False

    def add(self, found: Found, truth: Truth) -> None:
        """Judge a draw."""
        true, value, low, high, p = (
            np.ravel(a)
            for a in np.broadcast_arrays(
                np.asarray(truth.value if found.truth is None else found.truth, float),
                *(np.asarray(a, float) for a in (found.value, found.low, found.high, found.p_value)),
            )
        )
        largest = int(true.argmax())
        self.draws += 1
        self.planted = true[largest] if found.truth is None else float(np.asarray(truth.value))
        self.estimate += (value[largest] - self.estimate) / self.draws
        known = np.isfinite(low) & np.isfinite(high)
        self.held += int(((low <= true + ROUNDING) & (true <= high + ROUNDING))[known].sum())
        self.intervals += int(known.sum())
        self.refused += int((~known).sum())
        tested = np.isfinite(p)
        self.rejected += int((p[tested] <= 0.05).sum())
        self.tests += int(tested.sum())
        self.null = truth.null


@dataclass(frozen=True)
class Cell:
    """A generator and a shape, and what is asked of it."""

    kind: str
    shape: str
    draws: int
    documents: int
    measures: tuple[str, ...]
    first_seed: int = 0

    def generator(self) -> Generator:
        """The generator."""
        return Generator(self.kind, *SHAPES[self.shape])

    def file(self, measure: str, folder: Path) -> Path:
        """Where the rows of a measure are kept."""
        again = "-again" if self.first_seed else ""
        return folder / f"{self.kind}-{self.shape}-{measure}-{self.draws}x{self.documents}{again}.json"

    def drawn_again(self, measures: tuple[str, ...]) -> Cell:
        """The same with other seeds, and more of them."""
        return replace(self, draws=DRAWN_AGAIN, first_seed=self.draws, measures=measures)


def run(cell: Cell) -> dict[str, dict[str, Row]]:
    """All draws of a cell: rows by measure."""
    generator = cell.generator()
    planted_rows = truths(generator)
    rows: dict[str, dict[str, Row]] = {measure: {} for measure in cell.measures}
    for seed in range(cell.first_seed, cell.first_seed + cell.draws):
        with tempfile.TemporaryDirectory() as folder:
            draw = generator.draw(seed, cell.documents)
            trace = draw.write(Path(folder) / "t.moe", generator.num_experts)
            case = Case(generator, draw, trace, Path(folder), seed)
            for measure in cell.measures:
                for name, found in MEASURES[measure](case).items():
                    if name in planted_rows:
                        rows[measure].setdefault(name, Row()).add(found, planted_rows[name])
    return rows


def run_and_keep(cell: Cell, folder: Path) -> float:
    """Run what the folder does not hold yet; the seconds it took."""
    start = time.process_time()
    missing = tuple(measure for measure in cell.measures if not cell.file(measure, folder).exists())
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        for measure, rows in run(replace(cell, measures=missing)).items():
            file = cell.file(measure, folder)
            file.with_suffix(".part").write_text(json.dumps({name: asdict(row) for name, row in rows.items()}))
            file.with_suffix(".part").replace(file)
    return time.process_time() - start


def rows_of(cell: Cell, measure: str, folder: Path) -> dict[str, Row]:
    """What the folder holds of a measure of a cell, by name."""
    file = cell.file(measure, folder)
    return {name: Row(**row) for name, row in json.loads(file.read_text()).items()} if file.exists() else {}


def read_rows(cells: Iterable[Cell], folder: Path) -> dict[str, dict[tuple[str, str], Row]]:
    """What the folder holds: rows by name, kind and shape; of those that miss a bar what was drawn again."""
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for measure in MEASURES:
        for cell in cells:
            if measure in cell.measures:
                again = rows_of(cell.drawn_again((measure,)), measure, folder)
                for name, row in rows_of(cell, measure, folder).items():
                    if fails(row) and name in again:
                        row = replace(again[name], again=True)
                    found.setdefault(name, {})[cell.kind, cell.shape] = row
    return found


def cells_in_doubt(cells: Iterable[Cell], folder: Path) -> list[Cell]:
    """The cells with the measures of which a row misses a bar, to be drawn again."""
    found = []
    for cell in cells:
        measures = tuple(m for m in cell.measures if any(fails(row) for row in rows_of(cell, m, folder).values()))
        if measures:
            found.append(cell.drawn_again(measures))
    return found


# The page


def holds(row: Row) -> float:
    """Per cent of the intervals that hold what is planted."""
    return 100 * row.held / row.intervals if row.intervals else NAN


def rejects(row: Row) -> float:
    """Per cent of the tests that reject."""
    return 100 * row.rejected / row.tests if row.tests else NAN


def at_end(name: str, kind: str, shape: str, row: Row) -> bool:
    """Whether what is planted lies at the end of its range: no information, no or full differences, perfect balance."""
    if any(word in name for word in ("above", "beyond", "lift", "kappa", "change")):
        return False
    most = np.log2(SHAPES[shape][0]) if name == "explain, entropy" else 1  # of two experts in turn all of 1 bit is told
    return min(abs(row.planted), abs(row.planted - most)) < ROUNDING


def fails(row: Row) -> bool:
    """Whether a bar is missed."""
    return holds(row) < LEAST_HELD or (row.null is True and rejects(row) > MOST_REJECTED)


def cell_text(row: Row | None) -> str:
    """`planted / mean estimate, per cent that hold, per cent that reject`."""
    if row is None:
        return ""
    words = [f"{short(row.planted)} / {short(row.estimate)}"]
    if row.intervals:
        words.append(f"{holds(row):.1f}")
    if row.tests and row.null is not None:
        words.append(f"{'r' if row.null else 'f'} {rejects(row):.1f}")
    if row.refused and (row.intervals or row.tests):
        words.append(f"n {100 * row.refused / (row.refused + row.intervals):.0f}")
    elif row.refused:
        words.append("none")
    text = ", ".join(words) + (f" (of {row.draws:,})" if row.again else "")
    return f"**{text}**" if fails(row) else text


def short(value: float) -> str:
    """Three or four digits; 0 only if it is."""
    if value == 0 or abs(value) >= 5e-5:
        return f"{value:.4f}" if 0 < abs(value) < 1 else f"{value:.3g}"
    return "<0.0001" if value > 0 else ">-0.0001"


def page(rows: dict[str, dict[tuple[str, str], Row]], draws: int, documents: int) -> str:
    """The reference page."""
    every = [(name, *place, row) for name, by in rows.items() for place, row in by.items()]
    held = np.array([holds(row) for *_, row in every if row.intervals])
    rejected = np.array([rejects(row) for *_, row in every if row.tests and row.null])
    above = [place for place in every if holds(place[-1]) > 99]
    others = Counter(place[1] for place in above if not at_end(*place))
    failing = [(name, kind, shape) for name, kind, shape, row in every if fails(row)]
    shapes = [shape for shape in SHAPES if any(at == shape for *_, at, _ in every)]
    lines = [
        HEAD.format(
            draws=draws,
            documents=documents,
            date=datetime.date.today().isoformat(),
            version=moescope.__version__,
            generators="\n".join(f"| {kind} | {about} |" for kind, about in KINDS.items()),
            cells=len(held),
            median=f"{np.median(held):.1f}",
            least=f"{held.min():.1f}",
            inside=int(((held >= LEAST_HELD) & (held <= 99)).sum()),
            above=len(above),
            ends=sum(at_end(*place) for place in above),
            others=", ".join(f"{kind} {number}" for kind, number in others.most_common()),
            below=int((held < LEAST_HELD).sum()),
            tests=len(rejected),
            mean_rejected=f"{rejected.mean():.1f}" if len(rejected) else "–",
            near=int(((rejected >= 3) & (rejected <= 7)).sum()),
            noise=int((rejected <= MOST_REJECTED).sum()),
            most=f"{rejected.max():.1f}" if len(rejected) else "–",
            failing="; ".join(f"{name}, {kind}, {SHAPE_NAMES[shape]}" for name, kind, shape in failing) or "none",
        )
    ]
    for name, by in rows.items():
        lines += [
            "",
            f"## {name[0].upper()}{name[1:]}",
            "",
            f"| routing | {' | '.join(SHAPE_NAMES[s] for s in shapes)} |",
        ]
        lines.append("|---" * (len(shapes) + 1) + "|")
        for kind in KINDS:
            cells = [cell_text(by.get((kind, shape))) for shape in shapes]
            if any(cells):
                lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


HEAD = """# Calibration

How often the 95 % intervals of every measure hold a planted value, and how often its tests at 5 % reject what is
true. Made by `python benchmarks/calibration.py --again --write` on {date} with moescope {version}: {draws} draws of
{documents} documents a cell, seeds from 0. What is planted comes from theory, or from 20,000 documents of the
generator counted by slow loops, never from the code under test. Documents have 100 to 300 tokens (in the columns
*short* 20 to 100), in three domains in turn, with ids of a Zipf vocabulary of 40; layer 1 is measured, layer 0 is
independent of all.

| routing | layer 1 |
|---|---|
{generators}

**Reading a cell.** `planted / mean estimate`, then per cent of the intervals that hold what is planted, then `r`, per
cent of the tests that reject what is true, or `f`, that find what is planted. A measure of many values (shares,
pairs) counts all of them; the first two numbers are then of the largest planted one. `n`: per cent for which the
measure gives no interval, because the data cannot carry one; `none`: it never gives one. Bold: a bar is missed.
Of 200 draws of an interval that holds in 93 %, fewer than 90 % hold once in 25 cells; so where a bar is missed,
1,000 draws with other seeds decide instead (*of 1,000*).

**Bars.** Intervals: 90 to 99 %; more where the value lies at the end of its range (0 bits, a share of 1), where an
interval has one end; where it allows for what a trace is too short to tell; and of all domains together where they
differ, since intervals take the mix of domains for chance, too, and here it is fixed. Tests: 5 % ± 2; {draws} draws
know a rate of 5 % to ± 3.1 (two standard deviations), so up to 10.1 % is within the bar and its noise.

**Result.** Of {cells} cells with intervals, {inside} hold in 90 to 99 %, {above} in more, {below} in fewer; the
median is {median} %, the least {least} %. Of the {above}, {ends} plant a value at the end of its range, the others are
of the routing {others}. Of {tests} cells whose null is true, tests reject in {mean_rejected} % on
average, {near} lie within 3 and 7 %, {noise} below 10.1 %, the highest is {most} %. Bars missed: {failing}."""

SHAPE_NAMES = {shape: shape.replace("of", " of ").replace("short", ", short") for shape in SHAPES}


def all_cells(
    draws: int, documents: int, kinds: Iterable[str], shapes: Iterable[str], asked: Iterable[str]
) -> list[Cell]:
    """The cells, the cheap shapes first."""
    cells = []
    for shape in shapes:
        for kind in kinds:
            measures = tuple(
                m
                for m in MEASURES
                if m in asked
                and (m != "balance" or (kind, shape) in BALANCED)
                and (m != "compare" or kind in ("even", "popular"))
                and (not shape.endswith("short") or m in ("explain", "locality", "consistency", "distinct"))
            )
            if measures and kind in KINDS_OF_SHAPE[shape]:
                cells.append(Cell(kind, shape, draws, documents, measures))
    return cells


def run_all(cells: Sequence[Cell], folder: Path, processes: int) -> None:
    """Run cells side by side and say how far it is."""
    start = time.monotonic()
    with ProcessPoolExecutor(processes) as pool:
        running = {pool.submit(run_and_keep, cell, folder): cell for cell in cells}
        for done, future in enumerate(as_completed(running), 1):
            cell, minutes = running[future], (time.monotonic() - start) / 60
            took = f"{future.result():.0f} s of CPU, {minutes:.1f} min so far"
            print(f"[{done}/{len(cells)}] {cell.kind}, {cell.shape}: {took}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--quick", action="store_true", help="20 draws")
    parser.add_argument("--generators", nargs="+", default=list(KINDS), choices=KINDS, metavar="NAME")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, metavar="NAME")
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=MEASURES, metavar="NAME")
    parser.add_argument("--again", action="store_true", help="draw 1,000 more of every measure that misses a bar")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("calibration-cells"), help="what was measured is kept here")
    parser.add_argument("--write", action="store_true", help="write docs/reference/calibration.md")
    parser.add_argument("--kept", action="store_true", help="measure nothing, show what the folder holds")
    arguments = parser.parse_args()
    draws = 20 if arguments.quick else arguments.draws
    cells = all_cells(draws, arguments.documents, arguments.generators, arguments.shapes, arguments.measures)
    if not arguments.kept:
        run_all(cells, arguments.folder, arguments.processes)
    if arguments.again:
        run_all(cells_in_doubt(cells, arguments.folder), arguments.folder, arguments.processes)
    text = page(read_rows(cells, arguments.folder), draws, arguments.documents)
    if arguments.write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
