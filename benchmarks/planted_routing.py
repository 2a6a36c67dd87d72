"""Routing with known answers, as traces: what generators draw, and what is true of them by theory.

A generator draws documents of 100 to 300 tokens, three domains in turn, token ids of a Zipf vocabulary, and two layers.
Layer 0 is independent of everything; layer 1 is driven. A token's set of k experts is drawn in a *context* (its id, its
domain, the expert before …) from the conditional Bernoulli distribution P(set) ∝ Π w_e, and its ranks stand in random
order; so every share, every pair of experts and every bit of information has an exact value. Nothing here uses moescope
but the writer of traces.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numba
import numpy as np
from numpy.typing import NDArray

from moescope.trace import Header, Layer, Part, Trace, TraceWriter, Vocabulary, open_trace

KINDS = {
    "even": "all experts alike, independent",
    "popular": "some experts popular, independent",
    "token": "the token id decides",
    "domain": "the domain decides",
    "documents": "each document has a mix of its own, experts alike over all",
    "sticky": "half of the tokens keep the set of the one before",
    "before": "the first choice of the token before decides",
    "alternating": "two experts take turns",
    "position": "the first four tokens of a document are routed differently",
    "collapsed": "one expert takes 98 % of the first choices",
    "layer": "the first choice of the layer before decides",
}
DOMAINS = ("A", "B", "C")
NUM_IDS = 40
WORD, HALF, OTHER_HALF = 0, 1, 2
"""Ids whose pieces are a word, and the two halves of another."""

LENGTHS = (100, 300)
STICKS = 0.5
EARLY = 4
COLLAPSED = 0.98

Numbers = NDArray[np.float64]


@numba.njit(cache=True)
def _draw(
    rng: np.random.Generator,
    weight_CE: Numbers,
    rest_CEJ: Numbers,
    context_T: NDArray[np.int64],
    forced_T: NDArray[np.int64],
    keeps_T: NDArray[np.bool_],
    ids_TK: NDArray[np.int64],
) -> None:
    """Draw the set of each token, expert by expert, and put it in random order, a forced first choice in front.

    A context of -1 is the first choice of the token before. `rest_CEJ` holds the elementary symmetric polynomials of
    degree J of the weights from E on.
    """
    num_tokens, top_k = ids_TK.shape
    for t in range(num_tokens):
        if keeps_T[t]:
            ids_TK[t] = ids_TK[t - 1]
            continue
        c = context_T[t] if context_T[t] >= 0 else ids_TK[t - 1, 0]
        begin = 0
        if forced_T[t] >= 0:
            ids_TK[t, 0] = forced_T[t]
            begin = 1
        left = top_k - begin
        for e in range(weight_CE.shape[1]):
            if left == 0:
                break
            if rng.random() * rest_CEJ[c, e, left] < weight_CE[c, e] * rest_CEJ[c, e + 1, left - 1]:
                left -= 1
                ids_TK[t, begin + left] = e
        for last in range(top_k - 1, begin, -1):
            other = begin + rng.integers(0, last + 1 - begin)
            ids_TK[t, last], ids_TK[t, other] = ids_TK[t, other], ids_TK[t, last]


def symmetric(weight_CE: Numbers, top_k: int) -> tuple[Numbers, Numbers]:
    """Elementary symmetric polynomials of degree 0 .. k of the weights before and from each expert on."""
    contexts, experts = weight_CE.shape
    before, rest = (np.zeros((contexts, experts + 1, top_k + 1)) for _ in range(2))
    before[:, 0, 0] = rest[:, experts, 0] = 1
    for e in range(experts):
        before[:, e + 1] = before[:, e]
        before[:, e + 1, 1:] += weight_CE[:, e, None] * before[:, e, :-1]
    for e in reversed(range(experts)):
        rest[:, e] = rest[:, e + 1]
        rest[:, e, 1:] += weight_CE[:, e, None] * rest[:, e + 1, :-1]
    return before, rest


def inclusion(weight_CE: Numbers, top_k: int) -> Numbers:
    """Probability that a set drawn in each context holds each expert."""
    if top_k == 0:
        return np.zeros_like(weight_CE)
    before, rest = symmetric(weight_CE, top_k)
    without = sum(before[:, :-1, i] * rest[:, 1:, top_k - 1 - i] for i in range(top_k))
    return weight_CE * without / rest[:, :1, top_k]


def pair_inclusion(weight_E: Numbers, top_k: int) -> Numbers:
    """Probability that a set holds both experts; 0 on the diagonal."""
    without_each = np.tile(weight_E, (len(weight_E), 1))
    np.fill_diagonal(without_each, 0.0)
    return inclusion(weight_E[None], top_k)[0][:, None] * inclusion(without_each, top_k - 1)


def weights_of(included_E: Numbers, top_k: int) -> Numbers:
    """Weights of sets that hold each expert so often, by iterative fitting."""
    weight_E = included_E / included_E.sum()
    for _ in range(5000):
        found = inclusion(weight_E[None], top_k)[0]
        if np.abs(found - included_E).max() < 1e-12:
            break
        weight_E = weight_E * included_E / found
        weight_E /= weight_E.sum()
    return weight_E


def information(joint: Numbers) -> float:
    """Mutual information of a joint distribution, bits."""
    joint = joint / joint.sum()
    product = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    used = joint > 0
    return float((joint[used] * np.log2(joint[used] / product[used])).sum())


@dataclass(frozen=True)
class Draw:
    """Documents drawn. T tokens, K choices, G documents.

    Attributes:
        starts_G: First row of each document, with T at the end.
        domain_G: Domain of each document.
        token_id_T: Ids.
        ids: Choices of both layers, shape (T, K).
        weights: Gate weights of both layers, shape (T, K), descending.
    """

    starts_G: NDArray[np.int64]
    domain_G: NDArray[np.int64]
    token_id_T: NDArray[np.int64]
    ids: dict[int, NDArray[np.int64]]
    weights: dict[int, NDArray[np.float32]]

    @property
    def document_T(self) -> NDArray[np.int64]:
        """Document of each token."""
        return np.repeat(np.arange(len(self.domain_G)), np.diff(self.starts_G))

    @property
    def position_T(self) -> NDArray[np.int64]:
        """Place of each token in its document."""
        return np.arange(self.starts_G[-1]) - np.repeat(self.starts_G[:-1], np.diff(self.starts_G))

    def write(self, path: Path, num_experts: int) -> Trace:
        """The documents as a trace."""
        layers = tuple(Layer(at, num_experts, ids.shape[1]) for at, ids in self.ids.items())
        document, position = self.document_T, self.position_T
        zero = np.zeros(len(document), np.int64)
        domain = self.domain_G[document]
        part = Part(document, domain, DOMAINS, zero, position, self.token_id_T, self.ids, self.weights)
        with TraceWriter(path, Header(layers, weights=True), VOCABULARY) as writer:
            writer.write(part, {})
            writer.finish({})
        return open_trace(path)


_PIECES = {WORD: b" self", HALF: b" Ques", OTHER_HALF: b"tion"}
VOCABULARY = Vocabulary({i: _PIECES.get(i, f" w{i}".encode()) for i in range(NUM_IDS)})


@dataclass(frozen=True)
class Generator:
    """A kind of routing over so many experts, `top_k` a token."""

    kind: str
    num_experts: int
    top_k: int
    lengths: tuple[int, int] = LENGTHS
    chance_of_id: Numbers = field(
        default_factory=lambda: (1 / np.arange(1, NUM_IDS + 1)) / (1 / np.arange(1, NUM_IDS + 1)).sum()
    )

    @cached_property
    def popular_E(self) -> Numbers:
        """Weights of layer 0, and what layer 1 is built on."""
        return np.exp(np.random.default_rng(self.num_experts).normal(0, 0.6, self.num_experts)) / self.num_experts

    @cached_property
    def weight_CE(self) -> Numbers:
        """Weights of each context of layer 1."""
        shape = np.random.default_rng(self.num_experts + 1)  # what is planted does not change from draw to draw
        experts, base = self.num_experts, self.popular_E
        even = np.full((1, experts), 1 / experts)
        if self.kind in ("popular", "sticky"):
            return base[None]
        if self.kind == "token":
            return base * np.exp(shape.normal(0, 1.5, (NUM_IDS, experts)))
        if self.kind == "domain":
            return base * np.exp(shape.normal(0, 0.5, (len(DOMAINS), experts)))
        if self.kind == "position":
            return base * np.exp(np.outer([0, 1], shape.normal(0, 2.5, experts)))
        if self.kind in ("before", "layer"):
            liked = np.exp(2.5 * (np.arange(experts)[:, None] == shape.permutation(experts)))
            return base * liked
        if self.kind in ("alternating", "collapsed"):
            return np.tile(even, (experts, 1)) * (1 - np.eye(experts))  # what stands beside a forced first choice
        return even

    @cached_property
    def first_CE(self) -> Numbers:
        """Probability of each first choice in each context."""
        if self.kind in ("alternating", "collapsed"):
            return np.eye(self.num_experts)
        return inclusion(self.weight_CE, self.top_k) / self.top_k

    @cached_property
    def context_C(self) -> Numbers:
        """How often each context of layer 1 occurs."""
        experts = self.num_experts
        if self.kind == "token":
            return self.chance_of_id
        if self.kind == "domain":
            return np.full(len(DOMAINS), 1 / len(DOMAINS))
        if self.kind == "position":
            early = EARLY / np.mean(self.lengths)
            return np.array([1 - early, early])
        if self.kind == "layer":
            return self.layer_0_E
        if self.kind == "before":
            share = np.full(experts, 1 / experts)
            for _ in range(5000):
                share = share @ self.first_CE
            return share
        if self.kind == "alternating":
            return np.where(np.arange(experts) < 2, 0.5, 0.0)
        if self.kind == "collapsed":
            return np.where(np.arange(experts) == 0, COLLAPSED, (1 - COLLAPSED) / (experts - 1))
        return np.ones(1)

    @cached_property
    def layer_0_E(self) -> Numbers:
        """Probability of each first choice of layer 0."""
        return inclusion(self.popular_E[None], self.top_k)[0] / self.top_k

    def draw(self, seed: int, documents: int) -> Draw:
        """Draw documents; domains in turn, lengths uniform."""
        rng = np.random.default_rng([seed, self.num_experts, self.top_k])
        low, high = self.lengths
        length_G = rng.integers(low, high + 1, documents)
        starts_G = np.concatenate([[0], np.cumsum(length_G)])
        num_tokens = int(starts_G[-1])
        domain_G = np.arange(documents) % len(DOMAINS)
        document_T = np.repeat(np.arange(documents), length_G)
        position_T = np.arange(num_tokens) - np.repeat(starts_G[:-1], length_G)
        token_id_T = rng.choice(NUM_IDS, num_tokens, p=self.chance_of_id)
        none_T, never_T = np.full(num_tokens, -1), np.zeros(num_tokens, np.bool_)
        before = self._sets(rng, self.popular_E[None], np.zeros(num_tokens, np.int64), none_T, never_T)
        weight_CE, context_T, forced_T, keeps_T = self.weight_CE, np.zeros(num_tokens, np.int64), none_T, never_T
        if self.kind == "token":
            context_T = token_id_T
        elif self.kind == "domain":
            context_T = domain_G[document_T]
        elif self.kind == "documents":
            weight_CE = np.exp(rng.normal(0, 0.8, (documents, self.num_experts))) / self.num_experts
            context_T = document_T
        elif self.kind == "sticky":
            keeps_T = (rng.random(num_tokens) < STICKS) & (position_T > 0)
        elif self.kind == "before":
            context_T = np.where(position_T > 0, -1, rng.choice(self.num_experts, num_tokens, p=self.context_C))
        elif self.kind == "alternating":
            context_T = forced_T = (position_T + rng.integers(0, 2, documents)[document_T]) % 2
        elif self.kind == "position":
            context_T = (position_T < EARLY).astype(np.int64)
        elif self.kind == "collapsed":
            context_T = forced_T = rng.choice(self.num_experts, num_tokens, p=self.context_C)
        elif self.kind == "layer":
            context_T = before[:, 0]
        driven = self._sets(rng, weight_CE, context_T, forced_T, keeps_T)
        gates = {layer: _descending(rng, num_tokens, self.top_k) for layer in range(2)}
        return Draw(starts_G, domain_G, token_id_T, {0: before, 1: driven}, gates)

    def _sets(
        self,
        rng: np.random.Generator,
        weight_CE: Numbers,
        context_T: NDArray[np.int64],
        forced_T: NDArray[np.int64],
        keeps_T: NDArray[np.bool_],
    ) -> NDArray[np.int64]:
        ids_TK = np.zeros((len(context_T), self.top_k), np.int64)
        _, rest = symmetric(weight_CE, self.top_k)
        _draw(rng, weight_CE, rest, context_T, forced_T, keeps_T, ids_TK)
        return ids_TK


def _descending(rng: np.random.Generator, num_tokens: int, top_k: int) -> NDArray[np.float32]:
    """Gate weights that are uniform on the simplex, the largest first."""
    gaps = rng.exponential(size=(num_tokens, top_k))
    return -np.sort(-gaps / gaps.sum(axis=1, keepdims=True), axis=1).astype(np.float32)
