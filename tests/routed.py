"""Routing of documents as plain lists, for oracles: each token a record, so that a slow loop says what it means.

The documents differ in length, domain, taste and stickiness, so that no interval is that of another by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from scipy import optimize, stats

from moescope.trace import Header, Layer, Part, Trace, TraceWriter, Vocabulary, open_trace

LAYERS = (Layer(0, 6, 2), Layer(2, 5, 2), Layer(3, 6, 2))
DOMAINS = ("A", "B", "C")
WINDOW = 24
PIECES = [b" al", b"pha", b" be", b"ta", b"7", b" 42", b".", b"\n", b" one", b" two", b" three", b" four", b" five"]
"""The last occurs in one document only, so that nothing is left of it without that."""
ALL_CHOICES = "all"


@dataclass(frozen=True)
class Token:
    """A token: its id, the sequence of the document it stands in, its experts and gate weights by layer."""

    token_id: int
    sequence: int
    experts: dict[int, list[int]]
    weights: dict[int, list[float]]


@dataclass(frozen=True)
class Document:
    """A document: its number, its domain, its tokens."""

    number: int
    domain: str
    tokens: list[Token]

    def pairs(self, distance: int = 1) -> list[tuple[Token, Token]]:
        """Pairs of tokens of one sequence so far apart."""
        pairs = zip(self.tokens, self.tokens[distance:], strict=False)
        return [(a, b) for a, b in pairs if a.sequence == b.sequence]


def make_documents(seed: int = 0, documents: int = 21, lengths: tuple[int, int] = (20, 61)) -> list[Document]:
    """Documents whose tokens keep the experts before them now and then, and else follow id, domain and document."""
    rng = np.random.default_rng(seed)
    by_id = {
        layer.layer: np.vstack([rng.normal(0, 1.0, (12, layer.num_experts)), np.zeros(layer.num_experts)])
        for layer in LAYERS
    }
    by_domain = {layer.layer: rng.normal(0, 0.7, (len(DOMAINS), layer.num_experts)) for layer in LAYERS}
    made = []
    for number in range(documents):
        length = int(rng.integers(*lengths))
        ids = rng.choice(12, length, p=np.arange(12, 0, -1) / sum(range(13)))
        for at in np.flatnonzero((ids[:-1] == 0) | (ids[:-1] == 2)):  # " al" goes on as "alpha", " be" as "beta"
            ids[at + 1] = ids[at] + 1
        if number == 4:
            ids[1 : 3 * 12 : 3] = 12
        taste = {layer.layer: rng.normal(0, 0.8, layer.num_experts) for layer in LAYERS}
        tokens: list[Token] = []
        for at in range(length):
            experts, weights = {}, {}
            for layer in LAYERS:
                scores = by_id[layer.layer][ids[at]] + by_domain[layer.layer][number % 3] + taste[layer.layer]
                scores = scores + rng.gumbel(size=layer.num_experts)
                if layer.layer == 3:  # which hangs on the layer before
                    scores[experts[2][0]] += 2
                chosen = np.argsort(-scores)[: layer.top_k].tolist()
                if at and rng.random() < 0.3:
                    chosen = tokens[-1].experts[layer.layer]
                first = float(rng.uniform(0.5, 1))
                experts[layer.layer], weights[layer.layer] = chosen, [first, 1 - first]
            tokens.append(Token(int(ids[at]), at // WINDOW, experts, weights))
        made.append(Document(number, DOMAINS[number % 3], tokens))
    return made


def write(path: Path, documents: Sequence[Document], part_documents: int = 8) -> Trace:
    """The documents as a trace of several parts."""
    header = Header(LAYERS, weights=True, model={"name": "made up"})
    with TraceWriter(path, header, Vocabulary.from_pieces(PIECES)) as writer:
        for start in range(0, len(documents), part_documents):
            some = documents[start : start + part_documents]
            tokens = [token for document in some for token in document.tokens]
            lengths = [len(document.tokens) for document in some]
            place = np.concatenate([np.arange(length) for length in lengths])
            writer.write(
                Part(
                    np.repeat([document.number for document in some], lengths).astype(np.uint32),
                    np.repeat([DOMAINS.index(document.domain) for document in some], lengths),
                    DOMAINS,
                    (place // WINDOW).astype(np.uint32),
                    (place % WINDOW).astype(np.uint32),
                    np.array([token.token_id for token in tokens], np.uint32),
                    {layer.layer: np.array([token.experts[layer.layer] for token in tokens]) for layer in LAYERS},
                    {
                        layer.layer: np.array([token.weights[layer.layer] for token in tokens], np.float32)
                        for layer in LAYERS
                    },
                ),
                {"documents_read": some[-1].number + 1},
            )
        writer.finish({"tokens": sum(len(document.tokens) for document in documents)})
    return open_trace(path)


_OLD_ENDS = {"top_share": "top", "expert_specialization": "expert"}
"""Values whose ends do not begin with their name."""


def ends(result: xr.Dataset, name: str) -> tuple[xr.DataArray, xr.DataArray]:
    """The interval of a variable, wherever the result has it: here alone a test knows how ends are called."""
    for start in (f"{name}_", f"{_OLD_ENDS.get(name, name)}_", ""):
        if f"{start}low" in result:
            return result[f"{start}low"], result[f"{start}high"]
    raise KeyError(name)


def same_interval(result: xr.Dataset, name: str, expected: tuple[float, float], rel: float = 1e-9) -> None:
    """Whether the interval of a single value is the one expected."""
    low, high = ends(result, name)
    np.testing.assert_allclose(
        [float(low), float(high)], expected, rtol=rel, atol=rel * max(map(abs, expected)), err_msg=name
    )


# ------------------------------------------------------------------------------------ intervals by slow, obvious loops


def quantile(df: float, tail: float = 0.025) -> float:
    """Student's t that only `tail` exceeds."""
    return float(stats.t.ppf(1 - tail, df))


def clustered(y: Sequence[float], n: Sequence[float]) -> tuple[float, float]:
    """Σy / Σn of clusters and its standard error, by Cochran's formula."""
    ratio = sum(y) / sum(n)
    squares = 0.0
    for mine, could in zip(y, n, strict=True):
        squares += (mine - ratio * could) ** 2
    return ratio, (len(y) / (len(y) - 1) * squares) ** 0.5 / sum(n)


def on_logit_scale(p: float, error: float, clusters: int, tail: float = 0.025) -> tuple[float, float]:
    """Student's t interval of a proportion between 0 and 1, on the logit scale; Clopper and Pearson's at the ends."""
    if p in (0, 1):
        far = 1 - tail ** (1 / clusters)
        return (0.0, far) if p == 0 else (1 - far, 1.0)
    half = quantile(clusters - 1, tail) * error / (p * (1 - p))
    logit = np.log(p / (1 - p))
    return tuple(float(1 / (1 + np.exp(-(logit + sign * half)))) for sign in (-1, 1))


def proportion(y: Sequence[float], n: Sequence[float]) -> tuple[float, float]:
    """The interval of a proportion of document totals; documents that could have nothing do not count."""
    used = [(a, b) for a, b in zip(y, n, strict=True) if b]
    y, n = [a for a, _ in used], [b for _, b in used]
    return on_logit_scale(*clustered(y, n), len(n))


def difference(
    y: Sequence[float], n: Sequence[float], other_y: Sequence[float], other_n: Sequence[float]
) -> tuple[float, float]:
    """The interval of Σy / Σn less that of others, of the same clusters (paired), Student's t."""
    a, b = sum(y) / sum(n), sum(other_y) / sum(other_n)
    squares = 0.0
    for y_G, n_G, other_y_G, other_n_G in zip(y, n, other_y, other_n, strict=True):
        squares += ((y_G - a * n_G) / sum(n) - (other_y_G - b * other_n_G) / sum(other_n)) ** 2
    half = quantile(len(y) - 1) * (len(y) / (len(y) - 1) * squares) ** 0.5
    return a - b - half, a - b + half


def leaving_out(value: Callable[[list[int]], float], sizes: Sequence[float]) -> tuple[float, float]:
    """Value and standard error by leaving out a group at a time, groups of unequal size (Busing et al. 1999)."""
    everyone = list(range(len(sizes)))
    whole = value(everyone)
    without = [value([other for other in everyone if other != group]) for group in everyone]
    h = [sum(sizes) / size for size in sizes]
    centre = len(sizes) * whole - sum((1 - 1 / a) * w for a, w in zip(h, without, strict=True))
    variance = 0.0
    for a, w in zip(h, without, strict=True):
        pseudo = a * whole - (a - 1) * w
        variance += (pseudo - centre) ** 2 / (a - 1) / len(sizes)
    return centre, variance**0.5


def divergence_bits(p: Sequence[float], q: Sequence[float]) -> float:
    """Jensen-Shannon divergence, bits."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2
        total += (a * np.log2(a / m) if a else 0) / 2 + (b * np.log2(b / m) if b else 0) / 2
    return total


def inverted(
    observed: float, mean: Sequence[float], variances: Sequence[Sequence[float]], degrees: Sequence[float]
) -> tuple[float, float]:
    """Interval of a divergence by inverting the F test, Satterthwaite's degrees of freedom (Rao and Scott 1984)."""
    used = [e for e, m in enumerate(mean) if m > 0]
    weights = [[variance[e] / mean[e] / (8 * np.log(2)) for e in used] for variance in variances]
    expected = sum(map(sum, weights))
    by_expert = [sum(of[e] for of in weights) for e in range(len(used))]
    df = max(1.0, expected**2 / sum(w**2 for w in by_expert) * (len(used) - 1) / len(used))
    by_side = sum(sum(of) ** 2 / max(d, 1) for of, d in zip(weights, degrees, strict=True))
    df_error = max(1.0, expected**2 / by_side)
    statistic = observed / expected

    def end(level: float) -> float:
        if stats.ncf.cdf(statistic, df, df_error, 0.0) <= level:
            return 0.0
        most = 10.0 * df * statistic + 100
        found = optimize.brentq(lambda nc: stats.ncf.cdf(statistic, df, df_error, nc) - level, 0, most, xtol=1e-9)
        return float(found) / df * expected

    return end(0.975), end(0.025)
