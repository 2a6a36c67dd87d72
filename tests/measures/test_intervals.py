"""Every interval of a measure against a slow loop over documents that shares no code with it."""

from __future__ import annotations

import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from routed import (
    ALL_CHOICES,
    DOMAINS,
    LAYERS,
    PIECES,
    Document,
    Token,
    clustered,
    difference,
    divergence_bits,
    ends,
    inverted,
    leaving_out,
    make_documents,
    on_logit_scale,
    proportion,
    quantile,
    same_interval,
    write,
)
from scipy import stats
from synthetic import result_of

import moescope
from moescope.measures import divergence, explain_kernels, repeats, shares
from moescope.measures.balance import _of_loads
from moescope.measures.transitions import _of_layer as _of_transitions
from moescope.tallying import tally
from moescope.tallying.balance import BalanceCounter
from moescope.tallying.document_groups import document_groups
from moescope.tallying.document_sample import DocumentCounter
from moescope.trace import Layer, Trace

CHOICES = {ALL_CHOICES: slice(None), "first": slice(0, 1), "second": slice(1, 2)}


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return make_documents()


@pytest.fixture(scope="module")
def trace(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return write(tmp_path_factory.mktemp("intervals") / "t.moe", documents)


def of_domain(documents: list[Document], domain: str | None) -> list[Document]:
    return [document for document in documents if domain in (None, document.domain)]


def groups(documents: list[Document]) -> list[list[Document]]:
    """The documents by the group their number falls into."""
    by_group = defaultdict(list)
    for document in documents:
        by_group[int(document_groups(np.array([document.number]))[0])].append(document)
    return list(by_group.values())


def tokens_of(documents: list[Document]) -> list[Token]:
    return [token for document in documents for token in document.tokens]


def loads(documents: list[Document], layer: int, num_experts: int, choice: str = ALL_CHOICES) -> list[int]:
    counts = [0] * num_experts
    for token in tokens_of(documents):
        for expert in token.experts[layer][CHOICES[choice]]:
            counts[expert] += 1
    return counts


def share_and_error(documents: list[Document], layer: int, num_experts: int) -> tuple[list[float], list[float]]:
    """Of all choices: the share of each expert and its standard error."""
    by_document = [loads([document], layer, num_experts) for document in documents]
    made = [sum(counts) for counts in by_document]
    pairs = [clustered([counts[e] for counts in by_document], made) for e in range(num_experts)]
    return [p for p, _ in pairs], [error for _, error in pairs]


# ---------------------------------------------------------------------------------------------------- proportions


def test_shares(trace: Trace, documents: list[Document]) -> None:
    found = shares(tally(trace))
    for domain in DOMAINS:
        mine = of_domain(documents, domain)
        for layer in LAYERS:
            for choice in CHOICES:
                by_document = [loads([document], layer.layer, layer.num_experts, choice) for document in mine]
                for expert in range(layer.num_experts):
                    at = found.sel(domain=domain, layer=layer.layer, choice=choice, expert=expert)
                    expected = proportion([counts[expert] for counts in by_document], list(map(sum, by_document)))
                    same_interval(at, "share", expected)


def same_first(a: Token, b: Token, layer: int) -> bool:
    return a.experts[layer][0] == b.experts[layer][0]


def share_one(a: Token, b: Token, layer: int) -> bool:
    return bool(set(a.experts[layer]) & set(b.experts[layer]))


def first_in_next(a: Token, b: Token, layer: int) -> bool:
    return a.experts[layer][0] in b.experts[layer]


def test_repeats(trace: Trace, documents: list[Document]) -> None:
    found = repeats(tally(trace))
    kinds = {"first": same_first, "any": share_one, "first_in_next": first_in_next}
    for domain in DOMAINS:
        mine = of_domain(documents, domain)
        for layer in LAYERS:
            for kind, repeat in kinds.items():
                y = [sum(repeat(a, b, layer.layer) for a, b in document.pairs()) for document in mine]
                expected = proportion(y, [len(document.pairs()) for document in mine])
                same_interval(found.sel(domain=domain, layer=layer.layer, kind=kind), "rate", expected)


# -------------------------------------------------------------------------------------------------------- divergence


def test_divergence_between_two_domains_and_from_the_others(trace: Trace, documents: list[Document]) -> None:
    found = divergence(tally(trace))
    for layer in LAYERS:
        measured = {
            domain: share_and_error(of_domain(documents, domain), layer.layer, layer.num_experts) for domain in DOMAINS
        }
        number = {domain: len(of_domain(documents, domain)) for domain in DOMAINS}
        variance = {domain: [error**2 for error in measured[domain][1]] for domain in DOMAINS}
        for a in DOMAINS:
            p = measured[a][0]
            others = [domain for domain in DOMAINS if domain != a]
            for b in others:
                q = measured[b][0]
                mean = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
                degrees = [number[a] - 1, number[b] - 1]
                expected = inverted(divergence_bits(p, q), mean, [variance[a], variance[b]], degrees)
                same_interval(found.sel(domain=a, other=b, layer=layer.layer), "jsd", expected, rel=1e-4)
            rest = [np.mean([measured[domain][0][e] for domain in others]) for e in range(layer.num_experts)]
            of_rest = [
                sum(variance[domain][e] for domain in others) / len(others) ** 2 for e in range(layer.num_experts)
            ]
            mean = [(x + y) / 2 for x, y in zip(p, rest, strict=True)]
            degrees = [number[a] - 1, sum(number[domain] - 1 for domain in others)]
            expected = inverted(divergence_bits(p, rest), mean, [variance[a], of_rest], degrees)
            same_interval(found.sel(domain=a, layer=layer.layer), "jsd_rest", expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------------ consistency


def best_f1(active: dict[int, float], length: int) -> float:
    """The best F1 over thresholds of pairs of segment and expert, by how often the expert is active there."""
    total = sum(f * number for f, number in active.items())
    scores = []
    for threshold in range(length + 1):
        taken = {f: number for f, number in active.items() if f >= threshold}
        hit = sum(f * number for f, number in taken.items())
        scores.append(2 * hit / (length * sum(taken.values()) + total))
    return max(scores)


def activations(document: Document, layer: int, num_experts: int, length: int) -> tuple[dict, dict]:
    """By number of activations the pairs of segment and expert: as recorded, and expected in random order."""
    real: dict[int, float] = defaultdict(float)
    null: dict[int, float] = defaultdict(float)
    segments = 0
    for start in range(len(document.tokens) - length + 1):
        segment = document.tokens[start : start + length]
        if segment[0].sequence == segment[-1].sequence:
            segments += 1
            for expert in range(num_experts):
                real[sum(expert in token.experts[layer] for token in segment)] += 1
    for expert in range(num_experts):
        carries = sum(expert in token.experts[layer] for token in document.tokens)
        for f in range(length + 1):
            null[f] += segments * float(stats.hypergeom.pmf(f, len(document.tokens), carries, length))
    return real, null


def stratified(without: list[float], domains: list[str]) -> tuple[float, float]:
    """Standard error from what is left without each document, by domain, and Satterthwaite's degrees of freedom."""
    squares = []
    for domain in sorted(set(domains)):
        values = [w for w, of in zip(without, domains, strict=True) if of == domain]
        mean = sum(values) / len(values)
        squares += [(len(values) - 1) / len(values) * (value - mean) ** 2 for value in values]
    variance = sum(squares)
    spread = sum((square - variance / len(squares)) ** 2 for square in squares)
    return variance**0.5, min(len(squares) - len(set(domains)), 2 * variance**2 / spread)


@pytest.mark.parametrize("length", [4, 16])
def test_consistency(trace: Trace, documents: list[Document], length: int) -> None:
    found = moescope.consistency(trace, lengths=(length,)).isel(length=0)
    counted = {
        (document.number, layer.layer): activations(document, layer.layer, layer.num_experts, length)
        for document in documents
        for layer in LAYERS
    }

    def srp(some: list[Document], layers: list[int], side: int) -> float:
        active: dict[int, float] = defaultdict(float)
        for document in some:
            for layer in layers:
                for f, number in counted[document.number, layer][side].items():
                    active[f] += number
        return best_f1(active, length)

    for domain in (None, *DOMAINS):
        mine = of_domain(documents, domain)
        by_domain = found.isel(domain=0) if domain is None else found.sel(domain=domain)
        for layers in (*([layer.layer] for layer in LAYERS), [layer.layer for layer in LAYERS]):
            prefix = "model_" if len(layers) > 1 else ""
            at = by_domain if prefix else by_domain.sel(layer=layers[0])
            names = [document.domain for document in mine]
            left = [
                [srp([other for other in mine if other is not document], layers, side) for document in mine]
                for side in (0, 1)
            ]
            whole = [srp(mine, layers, side) for side in (0, 1)]
            error, df = stratified(left[0], names)
            half = quantile(df) * error
            expected = max(whole[0] - half, 0), min(whole[0] + half, 1)
            same_interval(at, f"{prefix}srp", expected)
            error, df = stratified([a - b for a, b in zip(*left, strict=True)], names)
            beyond = whole[0] - whole[1]
            expected = beyond - quantile(df) * error, beyond + quantile(df) * error
            # Expected activations are whole numbers of 2^-24, and this is a small difference of them.
            same_interval(at, f"{prefix}excess", expected, rel=1e-7)


# ------------------------------------------------------------------------------------------------------------- words


def test_words_of_one_token_and_of_several(trace: Trace, documents: list[Document]) -> None:
    patterns = {"alpha": (b" al", b"pha"), "one": (b" one",), "beta": (b" be", b"ta")}
    found = moescope.words(trace, list(patterns))
    for word, pieces in patterns.items():
        occurrences = defaultdict(list)
        for document in documents:
            for at in range(len(document.tokens) - len(pieces) + 1):
                run = document.tokens[at : at + len(pieces)]
                after = document.tokens[at + len(pieces) : at + len(pieces) + 1]
                whole = not after or PIECES[after[0].token_id].startswith((b" ", b"\n", b"."))
                if [PIECES[token.token_id] for token in run] == list(pieces) and whole:
                    occurrences[document.number].append(run)
        for layer in LAYERS:
            at = found.sel(word=word, layer=layer.layer)
            counts = [[0] * layer.num_experts for _ in occurrences]
            for row, runs in zip(counts, occurrences.values(), strict=True):
                for run in runs:
                    for token in run:
                        row[token.experts[layer.layer][0]] += 1
            same_interval(at, "top_share", of_the_top(counts))
            same_interval(at, "same", of_agreement(counts))
            if len(pieces) > 1:
                agree = [
                    sum(len({token.experts[layer.layer][0] for token in run}) == 1 for run in runs)
                    for runs in occurrences.values()
                ]
                same_interval(at, "together", proportion(agree, [len(runs) for runs in occurrences.values()]))


def of_the_top(counts: list[list[int]]) -> tuple[float, float]:
    """The upper end for the expert on top; the lower for as many as could have been there."""
    total = list(map(sum, counts))
    shares_ = [clustered([row[e] for row in counts], total) for e in range(len(counts[0]))]
    top = int(np.argmax([p for p, _ in shares_]))
    wide = [on_logit_scale(*of, len(counts), 0.025 / len(shares_)) for of in shares_]
    contenders = sum(high >= wide[top][0] for _, high in wide)
    low, _ = on_logit_scale(*shares_[top], len(counts), 0.025 / contenders)
    return low, on_logit_scale(*shares_[top], len(counts))[1]


def of_agreement(counts: list[list[int]]) -> tuple[float, float]:
    """Two tokens of different documents agree: jackknife over documents."""

    def agreement(rows: list[list[int]]) -> float:
        agree = pairs = 0
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                if i != j:
                    agree += sum(x * y for x, y in zip(a, b, strict=True))
                    pairs += sum(a) * sum(b)
        return agree / pairs

    number = len(counts)
    without = [agreement(counts[:g] + counts[g + 1 :]) for g in range(number)]
    error = ((number - 1) / number * sum((w - np.mean(without)) ** 2 for w in without)) ** 0.5
    value, half = agreement(counts), quantile(number - 1) * error
    return max(0, value - half), min(1, value + half)


# ----------------------------------------------------------------------------------------------------------- explain


def bits_of(x: list[int], e: list[int]) -> float:
    """Plug-in mutual information, bits, of rows where both are known."""
    known = [(a, b) for a, b in zip(x, e, strict=True) if a >= 0 and b >= 0]
    joint, left, right = defaultdict(int), defaultdict(int), defaultdict(int)
    for a, b in known:
        joint[a, b] += 1
        left[a] += 1
        right[b] += 1
    total = len(known)
    return sum(n / total * np.log2(n * total / left[a] / right[b]) for (a, b), n in joint.items())


def test_what_the_domain_and_the_token_explain(trace: Trace, documents: list[Document]) -> None:
    """The variance of `estimate` has an oracle in test_explain; here what is made of it, with that of the null."""
    from moescope.measures.explain import THIN, estimate, frequent

    permutations = 7
    found = moescope.explain(trace, [2], permutations=permutations, seed=3, threads=1).isel(layer=0)
    sample = result_of(DocumentCounter, trace)
    first = sample.expert_ids[2][0].astype(np.int32)
    of_token = np.repeat(np.arange(sample.num_documents), np.diff(sample.starts))
    domain = sample.domain.astype(np.int32)[of_token]
    value, num_values = frequent(sample.token_id)
    rng, shuffled = np.random.default_rng(3), {"domain": [], "token": []}
    order, state = np.arange(sample.num_tokens, dtype=np.int32), np.array([3], np.uint64)
    for _ in range(permutations):
        permuted = rng.permutation(sample.domain)[of_token]
        shuffled["domain"].append(bits_of(permuted.tolist(), first.tolist()))
        explain_kernels.rotate_within(sample.starts, value, order, state)
        shuffled["token"].append(bits_of(value.tolist(), first[order].tolist()))
    for source, x, size in (("domain", domain, 3), ("token", value, num_values)):
        known = estimate(x, first, sample.starts, size, 5)
        assert known.rows_a_cell >= THIN
        half = quantile(len(documents) - 1) * (known.variance + np.var(shuffled[source])) ** 0.5
        expected = max(known.bits - half, 0), max(known.bits + half, 0)
        same_interval(found.sel(source=source), "bits", expected)


def test_the_entropy_of_a_choice(trace: Trace, documents: list[Document]) -> None:
    found = moescope.explain(trace, permutations=1, threads=1)
    for layer in LAYERS:
        by_document = [loads([document], layer.layer, layer.num_experts, "first") for document in documents]
        total = [sum(counts) for counts in by_document]
        load = [sum(counts[e] for counts in by_document) for e in range(layer.num_experts)]
        assert min(load) > 1
        tokens = sum(total)
        entropy = -sum(n / tokens * np.log2(n / tokens) for n in load)
        # Linearised: each token's surprise less the mean, summed by document.
        squares = 0.0
        for counts, n in zip(by_document, total, strict=True):
            squares += (sum(-c * np.log2(a / tokens) for c, a in zip(counts, load, strict=True)) - n * entropy) ** 2
        error = (len(documents) / (len(documents) - 1) * squares) ** 0.5 / tokens
        errors = [clustered([counts[e] for counts in by_document], total)[1] for e in range(layer.num_experts)]
        bias = sum(error_e**2 * tokens / n for error_e, n in zip(errors, load, strict=True)) / (2 * np.log(2))
        half = quantile(len(documents) - 1) * (error**2 + bias**2 / 12) ** 0.5
        middle = entropy + bias
        expected = max(0, middle - half), min(middle + half, np.log2(layer.num_experts))
        same_interval(found.sel(layer=layer.layer), "entropy", expected)


# ---------------------------------------------------------------------------------------------------------- locality


def test_repeats_of_neighbours_and_placedistances(trace: Trace, documents: list[Document]) -> None:
    lags = (1, 3)
    found = moescope.locality(trace, lags=lags, threads=1)
    for domain in (None, *DOMAINS):
        mine = of_domain(documents, domain)
        by_domain = found.isel(domain=0) if domain is None else found.sel(domain=domain)
        for layer in LAYERS:
            for kind, repeat in (("first", same_first), ("any", share_one)):
                at = by_domain.sel(layer=layer.layer, kind=kind)
                for name in ("all", "same id", "different ids"):
                    if name not in at["pairs"].values.tolist():
                        continue
                    pairs = [
                        [
                            (a, b)
                            for a, b in document.pairs()
                            if name == "all" or (a.token_id == b.token_id) == (name == "same id")
                        ]
                        for document in mine
                    ]
                    y = [sum(repeat(a, b, layer.layer) for a, b in some) for some in pairs]
                    same_interval(at.sel(pairs=name), "rate", proportion(y, list(map(len, pairs))))
                for lag in lags:
                    y = [sum(repeat(a, b, layer.layer) for a, b in document.pairs(lag)) for document in mine]
                    n = [len(document.pairs(lag)) for document in mine]
                    same_interval(at.sel(lag=lag), "lag_rate", proportion(y, n))


def test_the_excess_of_repeats_of_the_first_choice(trace: Trace, documents: list[Document]) -> None:
    """Over uniform choices, over the popularity in the domain, and over the document in any order."""
    lags = (1, 3)
    found = moescope.locality(trace, lags=lags, threads=1)
    for domain in (None, *DOMAINS):
        mine = of_domain(documents, domain)
        by_domain = found.isel(domain=0) if domain is None else found.sel(domain=domain)
        for layer in LAYERS:
            at = by_domain.sel(layer=layer.layer, kind="first", pairs="all")
            n = [len(document.pairs()) for document in mine]
            y = [sum(same_first(a, b, layer.layer) for a, b in document.pairs()) for document in mine]
            uniform = [pairs / layer.num_experts for pairs in n]
            same_interval(at.sel(null="uniform"), "excess", difference(y, n, uniform, n))
            chance = [chance_of_two(document, layer.layer) for document in mine]
            expected = [pairs * c for pairs, c in zip(n, chance, strict=True)]
            same_interval(at.sel(null="document"), "excess", difference(y, n, expected, n))
            same_interval(at.sel(null="popularity"), "excess", beyond_popularity(documents, mine, y, n, layer.layer))
            for lag in lags:
                n_lag = [len(document.pairs(lag)) for document in mine]
                y_lag = [sum(same_first(a, b, layer.layer) for a, b in document.pairs(lag)) for document in mine]
                expected = [pairs * c for pairs, c in zip(n_lag, chance, strict=True)]
                interval = difference(y_lag, n_lag, expected, n_lag)
                placelag = by_domain.sel(layer=layer.layer, kind="first", lag=lag)
                same_interval(placelag, "lag_excess", interval)


def chance_of_two(document: Document, layer: int) -> float:
    """The chance that two different tokens of a document have the same first choice."""
    firsts = [token.experts[layer][0] for token in document.tokens]
    same = sum(firsts.count(expert) * (firsts.count(expert) - 1) for expert in set(firsts))
    return same / (len(firsts) * (len(firsts) - 1))


def beyond_popularity(
    documents: list[Document], mine: list[Document], y: list[int], n: list[int], layer: int
) -> tuple[float, float]:
    """Repeats beyond two tokens of the domain; a document moves the domain's chance by twice its own deviation."""
    chance, influence = {}, {}
    for domain in DOMAINS:
        firsts = {d.number: [token.experts[layer][0] for token in d.tokens] for d in of_domain(documents, domain)}
        together = [expert for some in firsts.values() for expert in some]
        tokens = len(together)
        of_expert = {e: (together.count(e) - 1) / (tokens - 1) for e in set(together)}
        chance[domain] = sum(of_expert[e] for e in together) / tokens
        for number, some in firsts.items():
            influence[number] = 2 * (sum(of_expert[e] for e in some) - chance[domain] * len(some)) / tokens
    pairs_of = {domain: sum(k for d, k in zip(mine, n, strict=True) if d.domain == domain) for domain in DOMAINS}
    rate = sum(y) / sum(n)
    expected = sum(chance[d.domain] * k for d, k in zip(mine, n, strict=True)) / sum(n)
    squares = 0.0
    for document, y_G, n_G in zip(mine, y, n, strict=True):
        residual = (y_G - chance[document.domain] * n_G - (rate - expected) * n_G) / sum(n)
        squares += (residual - pairs_of[document.domain] / sum(n) * influence[document.number]) ** 2
    half = quantile(len(mine) - 1) * (len(mine) / (len(mine) - 1) * squares) ** 0.5
    return rate - expected - half, rate - expected + half


def test_the_mean_run(trace: Trace, documents: list[Document]) -> None:
    found = moescope.locality(trace, threads=1)
    for layer in LAYERS:
        goes_on, tokens = [], []
        for document in documents:
            going = sum(same_first(a, b, layer.layer) for a, b in document.pairs())
            goes_on.append(going)
            tokens.append(len(document.tokens))
        expected = tuple(1 / (1 - end) for end in proportion(goes_on, tokens))
        same_interval(found.sel(layer=layer.layer), "run_mean", expected)


# ----------------------------------------------------------------------------------------------------------- balance


def test_balance(trace: Trace, documents: list[Document]) -> None:
    """Imbalance, CV and entropy; the interval of Gini is made of draws, and pinned."""
    found = moescope.balance(trace, threads=1)
    judged = 0
    for domain in (None, *DOMAINS):
        by_group = groups(of_domain(documents, domain))
        by_domain = found.isel(domain=0) if domain is None else found.sel(domain=domain)
        for layer in LAYERS:
            size = layer.num_experts
            counts = [loads(group, layer.layer, size) for group in by_group]
            made = list(map(sum, counts))
            at = by_domain.sel(layer=layer.layer)

            def share(some: list[int], counts: list[list[int]] = counts, size: int = size) -> np.ndarray:
                load = np.array([sum(counts[g][e] for g in some) for e in range(size)])
                return load / load.sum()

            low, high = ends(at, "cv")
            if float(low) > 0:  # else perfect balance would show as much
                judged += 1
                square, error = leaving_out(
                    lambda some, size=size, share=share: size * float(((share(some) - 1 / size) ** 2).sum()), made
                )
                half = quantile(len(made) - 1) * error
                seen = float(at["cv"]) ** 2
                expected = (min(square - half, seen) ** 0.5, max(square + half, seen) ** 0.5)
                np.testing.assert_allclose([float(low), float(high)], expected, rtol=1e-9)
            low, high = ends(at, "entropy")
            if float(high) < 1:
                value, error = leaving_out(
                    lambda some, size=size, share=share: float(stats.entropy(share(some)) / np.log(size)), made
                )
                half, seen = quantile(len(made) - 1) * error, float(at["entropy"])
                expected = max(0, min(value - half, seen)), min(1, max(value + half, seen))
                np.testing.assert_allclose([float(low), float(high)], expected, rtol=1e-9)
            low, high = ends(at, "imbalance")
            if float(low) > 1:
                pairs = [clustered([of[e] for of in counts], made) for e in range(size)]
                expected = of_the_largest(pairs, len(made))
                np.testing.assert_allclose([float(low), float(high)], [size * end for end in expected], rtol=1e-9)
    assert judged >= 4


def test_what_perfect_balance_would_show_in_one_of_twenty_traces_has_an_interval_from_its_floor() -> None:
    """Drawn from eight equal experts; half of such draws show less, and the intervals by themselves lie above."""
    largest = """14 11 12 19 7 9 10 17  25 22 17 16 23 17 20 24  22 13 18 20 22 19 28 13
        23 10 19 13 28 17 23 26  17 12 7 13 14 16 18 14  11 5 15 11 14 9 7 16"""
    differing = """13 10 13 10 9 4 15 12  22 20 25 18 9 23 19 13  22 22 14 12 23 28 22 18
        23 15 17 15 19 22 16 16  25 27 20 20 21 20 24 17  23 19 23 18 25 25 29 21"""
    for name, text, floor in (("imbalance", largest, 1.0), ("gini", differing, 0.0)):
        counts = np.array(text.split(), np.int64).reshape(6, 8)
        assert _of_loads(counts, Layer(0, 8, 1), 512, np.random.default_rng(0))[f"{name}_low"] == floor


def test_the_null_of_batches_has_the_loads_of_the_whole_trace_though_it_draws_from_a_sample(
    trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample of 40 tokens has other loads than the trace; batches of all tokens show those of the trace."""
    count_of = sys.modules["moescope.tallying.balance"]
    whole = moescope.balance(result_of(BalanceCounter, trace, batch_sizes=(32,)), seed=1)
    monkeypatch.setattr(count_of, "SAMPLED_TOKENS", 40)
    few = moescope.balance(result_of(BalanceCounter, trace, batch_sizes=(32,)), seed=1)
    np.testing.assert_allclose(few["batch_imbalance_null"], whole["batch_imbalance_null"], rtol=0.04)


def of_the_largest(pairs: list[tuple[float, float]], clusters: int) -> tuple[float, float]:
    """The highest of the upper ends; the highest of the lower ends of all that may be the largest, at once."""
    high = max(p + quantile(clusters - 1) * error for p, error in pairs)
    wide = quantile(clusters - 1, 0.025 / len(pairs))
    best = max(p - wide * error for p, error in pairs)
    contenders = [(p, error) for p, error in pairs if p + wide * error >= best]
    narrow = quantile(clusters - 1, 0.025 / len(contenders))
    return max(p - narrow * error for p, error in contenders), high


def test_experts_that_are_surely_and_possibly_nearly_idle() -> None:
    """Between the two counts lie the experts whose interval holds a tenth of the uniform share."""
    rng = np.random.default_rng(0)
    size, number = 20, 12
    chance = np.array([0.0005, 0.004, 0.0055, 0.02] + [0.97 / 16] * 16)
    counts = np.array([rng.multinomial(rng.integers(200, 600), chance) for _ in range(number)])
    found = _of_loads(counts, Layer(0, size, 1), 8, rng)
    threshold, surely, possibly = 0.1 / size, 0, 0
    for e in range(size):
        low, high = proportion(counts[:, e].tolist(), counts.sum(axis=1).tolist())
        surely += counts[:, e].any() and high < threshold
        possibly += counts[:, e].any() and low < threshold
    assert (found["nearly_idle_low"], found["nearly_idle_high"]) == (surely, possibly)
    assert 0 < surely < found["nearly_idle"] + 1 <= possibly + 1


def test_imbalance_within_batches(trace: Trace, documents: list[Document]) -> None:
    found = moescope.balance(result_of(BalanceCounter, trace, batch_sizes=(2,)))
    for layer in LAYERS:
        sequences: list[list[Token]] = []
        for document in documents:
            for at, token in enumerate(document.tokens):
                if at == 0 or token.sequence != document.tokens[at - 1].sequence:
                    sequences.append([])
                sequences[-1].append(token)
        values = []
        for pair in zip(sequences[::2], sequences[1::2], strict=False):  # across documents and parts of the trace
            counts = [0] * layer.num_experts
            for token in pair[0] + pair[1]:
                for expert in token.experts[layer.layer]:
                    counts[expert] += 1
            values.append(max(counts) / (sum(counts) / layer.num_experts))
        mean, half = np.mean(values), quantile(len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
        at = found.sel(layer=layer.layer).isel(batch=0)
        assert float(at["batch_imbalance"]) == pytest.approx(mean, rel=1e-5)
        same_interval(at, "batch_imbalance", (max(mean - half, 1), mean + half), rel=1e-4)


def test_gate_weights(trace: Trace, documents: list[Document]) -> None:
    found = moescope.balance(trace, threads=1)
    statistic = {
        "first": lambda w: max(w),
        "margin": lambda w: max(w) - min(w),
        "entropy": lambda w: -sum(x * np.log2(x) for x in w),
    }
    for domain in (None, *DOMAINS):
        by_group = groups(of_domain(documents, domain))
        by_domain = found.isel(domain=0) if domain is None else found.sel(domain=domain)
        for layer in LAYERS:
            for name, of in statistic.items():
                y = [
                    sum(
                        of([x / sum(token.weights[layer.layer]) for x in token.weights[layer.layer]])
                        for token in tokens_of(group)
                    )
                    for group in by_group
                ]
                n = [len(tokens_of(group)) for group in by_group]
                mean, error = clustered(y, n)
                half = quantile(len(n) - 1) * error
                at = by_domain.sel(layer=layer.layer, statistic=name)
                same_interval(at, "weight", (max(mean - half, 0), min(mean + half, 1)), rel=1e-4)


# ---------------------------------------------------------------------------------------- co-activation, transitions


def lift_ends(lift: float, half: float) -> tuple[float, float]:
    return lift / np.exp(half / lift), lift * np.exp(half / lift)


def test_the_lift_of_a_pair(trace: Trace, documents: list[Document]) -> None:
    found = moescope.coactivation(trace, threads=1)
    judged = 0
    for layer in LAYERS:
        at = found.sel(layer=layer.layer)
        by_group = groups(documents)
        n = [len(tokens_of(group)) for group in by_group]
        tokens = sum(n)
        size = layer.num_experts
        has = [[sum(e in t.experts[layer.layer] for t in tokens_of(group)) for e in range(size)] for group in by_group]
        inclusion = [sum(of[e] for of in has) / tokens for e in range(size)]
        for i in range(size):
            for j in range(size):
                low, high = (float(end.sel(expert=i, other=j)) for end in ends(at, "lift"))
                if not np.isfinite(low):
                    continue
                judged += 1
                both = [sum({i, j} <= set(t.experts[layer.layer]) for t in tokens_of(group)) for group in by_group]
                expected = float(at["joint_null"].sel(expert=i, other=j))  # has an oracle of its own
                joint = sum(both) / tokens
                lift = joint / expected
                # Least squares of having both on having each, under the null.
                p, q = inclusion[i], inclusion[j]
                covariance = [[p * (1 - p), expected - p * q], [expected - p * q, q * (1 - q)]]
                own, other = np.linalg.solve(covariance, [expected * (1 - p), expected * (1 - q)])
                squares = 0.0
                for g in range(len(n)):
                    by_popularity = own * (has[g][i] - p * n[g]) + other * (has[g][j] - q * n[g])
                    squares += (both[g] - joint * n[g] - lift * by_popularity) ** 2
                error = (len(n) / (len(n) - 1) * squares) ** 0.5 / tokens / expected
                wanted = lift_ends(lift, quantile(len(n) - 1) * error)
                np.testing.assert_allclose([low, high], wanted, rtol=1e-7)
    assert judged > 40


def test_the_lift_of_a_transition_and_the_information_between_layers(trace: Trace, documents: list[Document]) -> None:
    found = moescope.transitions(trace, threads=1)
    judged = informed = 0
    for before, after in pairwise(LAYERS):
        at = found.sel(layer=after.layer)
        by_group = groups(documents)
        tables = []
        for group in by_group:
            table = np.zeros((before.num_experts, after.num_experts))
            for token in tokens_of(group):
                table[token.experts[before.layer][0], token.experts[after.layer][0]] += 1
            tables.append(table)
        n = [float(table.sum()) for table in tables]
        tokens, whole = sum(n), sum(tables)
        for i in range(before.num_experts):
            for j in range(after.num_experts):
                low, high = (float(end.sel(expert=i, next=j)) for end in ends(at, "lift"))
                if not np.isfinite(low):
                    continue
                judged += 1
                p, q, joint = whole[i].sum() / tokens, whole[:, j].sum() / tokens, whole[i, j] / tokens
                lift, squares = joint / (p * q), 0.0
                for g, table in enumerate(tables):
                    by_popularity = (table[i].sum() - p * n[g]) * q + p * (table[:, j].sum() - q * n[g])
                    squares += (table[i, j] - joint * n[g] - lift * by_popularity) ** 2
                error = (len(n) / (len(n) - 1) * squares) ** 0.5 / tokens / (p * q)
                np.testing.assert_allclose([low, high], lift_ends(lift, quantile(len(n) - 1) * error), rtol=1e-9)

        def information(some: list[int], tables: list[np.ndarray] = tables) -> float:
            joint = sum(tables[g] for g in some)
            product = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0) / joint.sum()
            return float(
                sum(a / joint.sum() * np.log2(a / b) for a, b in zip(joint.ravel(), product.ravel(), strict=True) if a)
            )

        value, error = leaving_out(information, n)
        half = quantile(len(n) - 1) * error
        low, high = ends(at, "information")
        assert float(high) == pytest.approx(value + half, rel=1e-9)
        if float(low) > 0 and float(at["information"]) == pytest.approx(value):
            informed += 1
            assert float(low) == pytest.approx(value - half, rel=1e-9)
    assert judged > 30
    assert informed


def test_information_that_independent_layers_would_show_has_an_interval_from_zero() -> None:
    """Drawn from independent layers, 4 by 4 experts, three groups; the jackknife by itself ends above 0.002 bits."""
    counts = """3 4 5 9 7 6 8 9 4 3 8 8 4 10 4 5  5 13 12 12 8 12 12 8 10 9 18 4 11 13 13 7
        12 12 13 11 9 14 10 18 17 6 13 12 15 13 11 5"""
    moves = np.array(counts.split(), np.uint32).reshape(3, 4, 4)
    assert _of_transitions(moves, np.random.default_rng(0))["information_low"] == 0


# ------------------------------------------------------------------------------------------------ syntax, vocabulary


def test_word_classes(trace: Trace, documents: list[Document]) -> None:
    found = moescope.syntax(trace, threads=1)

    def continues(document: Document, at: int) -> bool:
        """Whether a token goes on with a word."""
        before = PIECES[document.tokens[at - 1].token_id] if at else b""
        return document.tokens[at].token_id in (1, 3) and before[-1:].isalpha()

    classes = {
        "digits": lambda document, at: document.tokens[at].token_id in (4, 5),
        "punctuation": lambda document, at: document.tokens[at].token_id == 6,
        "newline": lambda document, at: document.tokens[at].token_id == 7,
        "continuation": continues,
    }
    ways = set()
    for name, belongs in classes.items():
        for layer in LAYERS:
            at = found.sel(word_class=name, layer=layer.layer)
            size = layer.num_experts
            own, others = [], []
            for group in groups(documents):
                y, expected = np.zeros(size), np.zeros(size)
                for document in group:
                    firsts = [token.experts[layer.layer][0] for token in document.tokens]
                    mine = [e for place, e in enumerate(firsts) if belongs(document, place)]
                    rest = [e for place, e in enumerate(firsts) if not belongs(document, place)]
                    y += [mine.count(e) for e in range(size)]
                    expected += [len(mine) * rest.count(e) / len(rest) for e in range(size)]
                if y.sum():
                    own.append(y)
                    others.append(expected)
            n = [y.sum() for y in own]
            p, q = sum(own) / sum(n), sum(others) / sum(n)
            top = int(np.argmax(p - q))
            same_interval(at, "top_share", proportion([y[top] for y in own], n))
            variance = []
            for e in range(size):
                residuals = [a[e] - b[e] - (p[e] - q[e]) * m for a, b, m in zip(own, others, n, strict=True)]
                variance.append(len(n) / (len(n) - 1) * sum(r**2 for r in residuals) / sum(n) ** 2)
            jsd = divergence_bits(p, q)
            square = sum((a - b) ** 2 / ((a + b) / 2) for a, b in zip(p, q, strict=True) if a + b) / (8 * np.log(2))
            low, high = (
                end * jsd / square for end in inverted(square, (p + q) / 2, [variance, [0.0] * size], [len(n) - 1] * 2)
            )

            def value(some: list[int], own: list[np.ndarray] = own, others: list[np.ndarray] = others) -> float:
                a, b = sum(own[g] for g in some), sum(others[g] for g in some)
                return divergence_bits(a / a.sum(), b / b.sum())

            middle, error = leaving_out(value, n)
            half = quantile(len(n) - 1) * error
            away = middle - half > float(at["jsd_null"])
            ways.add(away)
            same_interval(at, "jsd", (middle - half, middle + half) if away else (low, high), rel=1e-4)
    assert ways == {True, False}


def test_vocabulary(trace: Trace, documents: list[Document]) -> None:
    """Of experts, of the ids listed and of those asked for; that of a layer has an oracle in test_vocabulary."""
    found = moescope.vocabulary(trace, permutations=1, tokens=[0, 8], top=3, threads=1)
    by_group = groups(documents)
    for layer in LAYERS:
        for by in ("input", "next"):
            seen: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
            in_document: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
            for g, group in enumerate(by_group):
                for document in group:
                    pairs = document.pairs() if by == "next" else [(t, t) for t in document.tokens]
                    for token, named in pairs:
                        seen[named.token_id][g].append(token.experts[layer.layer][0])
                        in_document[named.token_id][document.number].append(token.experts[layer.layer][0])
            at = found.sel(by=by, layer=layer.layer)

            frequent = [of for of in seen.values() if sum(map(len, of.values())) >= 10]
            sizes = [sum(len(of.get(g, [])) for of in seen.values()) for g in range(len(by_group))]
            for expert in range(layer.num_experts):
                mine = [of for of in frequent if most_frequent([e for some in of.values() for e in some])[0] == expert]
                if not mine:
                    continue

                def specialization(some: list[int], mine: list[dict[int, list[int]]] = mine) -> float:
                    left = [[e for g in some for e in of.get(g, [])] for of in mine]
                    shares_left = [most_frequent(chosen)[1] for chosen in left if chosen]
                    return float(np.mean(shares_left)) if shares_left else np.nan

                whole = specialization(list(range(len(by_group))))

                def or_whole(some: list[int], whole: float = whole, value=specialization) -> float:
                    return whole if np.isnan(value(some)) else value(some)

                _, error = leaving_out(or_whole, sizes)
                half = quantile(len(by_group) - 1) * error
                expected = max(whole - half, 0), min(whole + half, 1)
                same_interval(at.sel(expert=expert), "expert_specialization", expected)
                for place in range(3):
                    listed = at.sel(expert=expert, place=place)
                    token = int(listed["top_token"])
                    if token >= 0:
                        of = in_document[token].values()
                        if len(of) == 1:
                            assert all(np.isnan(float(end)) for end in ends(listed, "top_share"))
                            continue
                        expected = proportion([chosen.count(expert) for chosen in of], list(map(len, of)))
                        same_interval(listed, "top_share", expected)
                for token in (0, 8):
                    of = in_document[token].values()
                    if not of:
                        continue
                    expected = proportion([chosen.count(expert) for chosen in of], list(map(len, of)))
                    low, high = (at[f"share_{end}"].sel(token=token, expert=expert) for end in ("low", "high"))
                    np.testing.assert_allclose([float(low), float(high)], expected, rtol=1e-9)


def most_frequent(chosen: list[int]) -> tuple[int, float]:
    """The expert chosen most often, of several the first, and its share."""
    counts = [chosen.count(e) for e in range(max(chosen) + 1)]
    return counts.index(max(counts)), max(counts) / len(chosen)


# ----------------------------------------------------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def changed(documents: list[Document]) -> list[Document]:
    """The same tokens, a third of them routed anew, more so in some documents."""
    rng = np.random.default_rng(9)
    other = []
    for document in documents:
        often = rng.uniform(0.1, 0.6)
        tokens = []
        for token in document.tokens:
            experts = {
                layer.layer: rng.permutation(layer.num_experts)[:2].tolist()
                if rng.random() < often
                else token.experts[layer.layer]
                for layer in LAYERS
            }
            tokens.append(Token(token.token_id, token.sequence, experts, token.weights))
        other.append(Document(document.number, document.domain, tokens))
    return other


def test_two_traces(trace: Trace, documents: list[Document], changed: list[Document], tmp_path: Path) -> None:
    found = moescope.compare(trace, write(tmp_path / "b.moe", changed))
    assert found.agreement is not None
    assert found.changes is not None
    assert found.weights is not None
    assert found.tokens is not None
    for domain in (None, *DOMAINS):
        both = [(a, b) for a, b in zip(documents, changed, strict=True) if domain in (None, a.domain)]
        tokens = [len(a.tokens) for a, _ in both]

        def at(result, domain: str | None = domain):
            return result.isel(domain=0) if domain is None else result.sel(domain=domain)

        for layer in LAYERS:
            pairs = [
                [(x.experts[layer.layer], y.experts[layer.layer]) for x, y in zip(a.tokens, b.tokens, strict=True)]
                for a, b in both
            ]
            for kind, k, same in (
                ("set", 2, lambda x, y: len(set(x) & set(y))),
                ("first", 1, lambda x, y: x[0] == y[0]),
            ):
                of = at(found.agreement).sel(layer=layer.layer, kind=kind)
                expected = proportion([sum(same(x, y) for x, y in some) for some in pairs], [k * n for n in tokens])
                same_interval(of, "agreement", expected)
                everyone = [pair for some in pairs for pair in some]
                null = 0.0
                for e in range(layer.num_experts):
                    a, b = (sum(e in side[:k] for side in sides) for sides in zip(*everyone, strict=True))
                    null += a * b / len(everyone) ** 2 / k
                same_interval(of, "kappa", tuple((end - null) / (1 - null) for end in expected))
            for e in range(layer.num_experts):
                y = [sum((e in b) - (e in a) for a, b in some) for some in pairs]
                change, error = clustered(y, [2 * n for n in tokens])
                half = quantile(len(both) - 1) * error
                of = at(found.changes).sel(layer=layer.layer, expert=e)
                same_interval(of, "change", (change - half, change + half))
            kept = [
                sum(
                    w
                    for x, y in zip(a.tokens, b.tokens, strict=True)
                    for e, w in zip(x.experts[layer.layer], x.weights[layer.layer], strict=True)
                    if e in y.experts[layer.layer]
                )
                for a, b in both
            ]
            same_interval(at(found.weights).sel(layer=layer.layer), "kept", proportion(kept, tokens), rel=1e-5)
    for token_id in found.tokens["token_id"].values.tolist():
        y, n = [], []
        for a, b in zip(documents, changed, strict=True):
            mine = [(s, t) for s, t in zip(a.tokens, b.tokens, strict=True) if s.token_id == token_id]
            if mine:
                y.append(
                    sum(len(set(s.experts[la.layer]) & set(t.experts[la.layer])) for s, t in mine for la in LAYERS)
                )
                n.append(2 * len(LAYERS) * len(mine))
        same_interval(found.tokens.sel(token_id=token_id), "agreement", proportion(y, n))


def test_the_distances_of_two_traces_of_other_tokens(trace: Trace, documents: list[Document], tmp_path: Path) -> None:
    others = make_documents(seed=5, documents=15)
    found = moescope.compare(trace, write(tmp_path / "b.moe", others)).distances
    assert found is not None
    for domain in DOMAINS:
        for layer in LAYERS:
            sides = [
                share_and_error(of_domain(some, domain), layer.layer, layer.num_experts) for some in (documents, others)
            ]
            (p, p_error), (q, q_error) = sides
            expected = inverted(
                divergence_bits(p, q),
                [(a + b) / 2 for a, b in zip(p, q, strict=True)],
                [[e**2 for e in p_error], [e**2 for e in q_error]],
                [len(of_domain(some, domain)) - 1 for some in (documents, others)],
            )
            same_interval(found.sel(domain=domain, layer=layer.layer), "jsd", expected, rel=1e-4)


def test_saturation(trace: Trace, documents: list[Document], changed: list[Document], tmp_path: Path) -> None:
    found = moescope.saturation([write(tmp_path / "b.moe", changed), trace]).isel(step=0)
    for layer in LAYERS:
        y = [
            sum(
                len(set(s.experts[layer.layer]) & set(t.experts[layer.layer]))
                for s, t in zip(a.tokens, b.tokens, strict=True)
            )
            for a, b in zip(documents, changed, strict=True)
        ]
        expected = proportion(y, [2 * len(a.tokens) for a in documents])
        same_interval(found.isel(domain=0).sel(layer=layer.layer, kind="set"), "agreement", expected)
