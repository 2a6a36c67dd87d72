"""Routing with known answers: samples of documents drawn from generators whose information and repeats are exact.

A generator draws two layers. Layer 0 is independent of everything; layer 1 is the one that is driven, and the truths
are about its first choice. The second choice is an expert drawn from those that are left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.document_sample import DocumentSample
from moescope.trace import Layer

NUM_IDS = 40
DOMAINS = ("A", "B", "C")
GENERATORS = ("independent", "documents", "token", "domain", "sticky", "position", "layer", "collapsed", "alternating")
"""What drives layer 1: nothing; each document's own mix of experts; the token id; the domain; the expert before; the
place in the document; the layer before; one expert takes nearly all; two experts take turns."""


@dataclass(frozen=True)
class Planted:
    """A sample and what is true of the generator.

    Attributes:
        sample: The documents, two layers.
        bits: Information by source, bits; a source that is missing is not known.
        first: Chance that neighbours have the same first choice.
        words: Chance that two tokens with their ids, from other documents, have it.
    """

    sample: DocumentSample
    bits: dict[str, float]
    first: float | None = None
    words: float | None = None


def planted(
    rng: np.random.Generator, kind: str, num_experts: int = 8, *, documents: int = 60, strength: float = 0.5
) -> Planted:
    """Draw documents of 20 to 100 tokens."""
    lengths = rng.integers(20, 101, documents)
    num_tokens = int(lengths.sum())
    document = np.repeat(np.arange(documents), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    domain = np.arange(documents) % len(DOMAINS)
    chance = 1 / np.arange(1, NUM_IDS + 1)
    chance /= chance.sum()
    token_id = rng.choice(NUM_IDS, num_tokens, p=chance)
    shape = np.random.default_rng(num_experts)  # what is planted does not change from draw to draw
    base = shape.dirichlet(np.full(num_experts, 5.0))
    before = draw(rng, np.tile(base, (num_tokens, 1)))
    zero = {"domain": 0.0, "token": 0.0, "previous token": 0.0, "position": 0.0, "previous layer": 0.0}
    bits = {**zero, "previous expert": 0.0}
    same = float((base**2).sum())
    first: float | None = same
    words: float | None = same
    mix = np.tile(base, (num_tokens, 1))
    if kind == "documents":
        mix = rng.dirichlet(base * 20, documents)[document]
        bits, first, words = zero, None, None
    elif kind == "collapsed":
        base = np.full(num_experts, 0.02 / (num_experts - 1))
        base[0] = 0.98
        mix = np.tile(base, (num_tokens, 1))
        first = words = float((base**2).sum())
    elif kind == "token":
        by_id = (1 - strength) * base + strength * np.eye(num_experts)[shape.integers(0, num_experts, NUM_IDS)]
        mix = by_id[token_id]
        bits = {**bits, "token": information(chance[:, None] * by_id)}
        first = words = float(((chance @ by_id) ** 2).sum())
    elif kind == "domain":
        by_domain = (1 - strength) * base + strength * shape.dirichlet(np.full(num_experts, 0.5), len(DOMAINS))
        mix = by_domain[domain[document]]
        each = np.full(len(DOMAINS), 1 / len(DOMAINS))
        joint = np.einsum("d,di,dj->ij", each, by_domain, by_domain)
        bits = {**zero, "domain": information(each[:, None] * by_domain), "previous expert": information(joint)}
        first, words = float(np.trace(joint)), float((by_domain.mean(axis=0) ** 2).sum())
    elif kind == "position":
        early = np.roll(base, 1) * 0.2 + 0.8 * np.eye(num_experts)[0]
        mix = np.where((position < 4)[:, None], early, base)
        share = 4 * documents / (60 * documents)  # of expected lengths
        bits = {**zero, "position": information(np.stack([share * early, (1 - share) * base]))}
        del bits["previous token"]
        first = words = None
    elif kind == "layer":
        follows = (1 - strength) * base + strength * np.eye(num_experts)[shape.permutation(num_experts)]
        mix = follows[before]
        bits = {**bits, "previous layer": information(base[:, None] * follows)}
        first = words = float(((base @ follows) ** 2).sum())
    chosen = draw(rng, mix)
    if kind == "sticky":
        keeps = (rng.random(num_tokens) < strength) & (position > 0)
        for t in np.flatnonzero(keeps):
            chosen[t] = chosen[t - 1]
        joint = base[:, None] * (strength * np.eye(num_experts) + (1 - strength) * base)
        bits["previous expert"] = information(joint)
        first = float(np.trace(joint))
    elif kind == "alternating":
        chosen = (position + rng.integers(0, 2, documents)[document]) % 2
        bits = {**zero, "previous expert": 1.0}
        first, words = 0.0, 0.5
    layers = (Layer(0, num_experts, 2), Layer(1, num_experts, 2))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    sample = DocumentSample(
        layers,
        DOMAINS,
        np.arange(documents),
        domain,
        starts,
        starts,
        position.astype(np.int32),
        token_id.astype(np.int32),
        {0: with_second(rng, before, num_experts), 1: with_second(rng, chosen, num_experts)},
        1.0,
    )
    return Planted(sample, bits, first, words)


def information(joint: NDArray[np.float64]) -> float:
    """Mutual information of a joint distribution, bits."""
    product = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    used = joint > 0
    return float((joint[used] * np.log2(joint[used] / product[used])).sum())


def draw(rng: np.random.Generator, mix: NDArray[np.float64]) -> NDArray[np.int64]:
    """An expert a row, by the chances in the row."""
    below = rng.random(len(mix))[:, None] > np.cumsum(mix, axis=1)
    return np.minimum(below.sum(axis=1), mix.shape[1] - 1)


def with_second(rng: np.random.Generator, first: NDArray[np.int64], num_experts: int) -> NDArray[np.uint8]:
    """First choices and, below them, another expert each, uniformly drawn; shape (2, token)."""
    return np.stack([first, (first + rng.integers(1, num_experts, len(first))) % num_experts]).astype(np.uint8)
