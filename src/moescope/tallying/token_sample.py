"""A sample of tokens with all their choices, for what sums over experts cannot tell: how often two sets would meet.

The kept tokens of a domain are those with the smallest hash of (document, place in it), so the sample depends neither
on the order of the parts nor on threads, and samples merge exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.tallying.counter import Stored
from moescope.trace import Layer, Part

TOKENS_A_DOMAIN = 2048
"""Tokens kept: their two million pairs give a probability to a few tenths of a percentage point."""

_NO_HASH = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class TokenSample:
    """Sampled tokens by domain.

    Attributes:
        hashes: Hash of each kept token, ascending; the largest 64-bit number where there is none, (domain, token).
        expert_ids: For each sampled layer the choices, shape (domain, token, choice); -1 = dropped.
    """

    hashes: NDArray[np.uint64]
    expert_ids: dict[int, NDArray[np.int32]]

    @classmethod
    def empty(cls, num_domains: int, layers: Sequence[Layer]) -> TokenSample:
        """A sample without tokens."""
        return cls(
            np.full((num_domains, TOKENS_A_DOMAIN), _NO_HASH),
            {layer.layer: np.full((num_domains, TOKENS_A_DOMAIN, layer.top_k), -1, np.int32) for layer in layers},
        )

    @classmethod
    def restored(cls, stored: Stored, layers: Sequence[Layer]) -> TokenSample:
        """The sample of a tally's arrays.

        Raises:
            ValueError: They are none of a sample.
        """
        shape = len(stored.domains), TOKENS_A_DOMAIN
        return cls(
            stored.take("sample/hashes", np.uint64, shape),
            {
                layer.layer: stored.take(
                    f"sample/{layer.layer}", np.int32, (*shape, layer.top_k), least=-1, most=layer.num_ids - 1
                )
                for layer in layers
            },
        )

    def tokens(self, domain: int, layer: int) -> NDArray[np.int32]:
        """Choices of the kept tokens of a domain (its code) at a layer, shape (token, choice)."""
        known: NDArray[np.bool_] = self.hashes[domain] != _NO_HASH
        tokens: NDArray[np.int32] = self.expert_ids[layer][domain, known]
        return tokens

    @classmethod
    def of_part(cls, part: Part, num_domains: int, layers: Sequence[Layer]) -> TokenSample:
        """The sample of one part; its domain codes must be those of the whole."""
        sample = cls.empty(num_domains, layers)
        starts = part.document_starts()
        offset = np.arange(part.num_tokens) - np.repeat(starts[:-1], np.diff(starts))
        hashes = token_hashes(part.document, offset)
        for domain in np.unique(part.domain):
            rows = np.flatnonzero(part.domain == domain)
            rows = rows[np.argsort(hashes[rows], kind="stable")[:TOKENS_A_DOMAIN]]
            sample.hashes[domain, : len(rows)] = hashes[rows]
            for layer in layers:
                sample.expert_ids[layer.layer][domain, : len(rows)] = part.expert_ids[layer.layer][rows]
        return sample

    def absorb(self, other: TokenSample) -> None:
        """Add another sample of the same domains and layers, in place."""
        for domain in range(len(self.hashes)):
            if other.hashes[domain, 0] >= self.hashes[domain, -1]:
                continue
            hashes = np.concatenate([self.hashes[domain], other.hashes[domain]])
            kept = np.argsort(hashes, kind="stable")[:TOKENS_A_DOMAIN]
            self.hashes[domain] = hashes[kept]
            for layer, ids in self.expert_ids.items():
                ids[domain] = np.concatenate([ids[domain], other.expert_ids[layer][domain]])[kept]

    def merge(
        self, other: TokenSample | None, mine: Sequence[str], theirs: Sequence[str], domains: Sequence[str]
    ) -> TokenSample:
        """The sample of both, over `domains`; `mine` and `theirs` name the domains of each."""
        assert other is not None
        total = self._over(mine, domains)
        total.absorb(other._over(theirs, domains))
        return total

    def _over(self, mine: Sequence[str], domains: Sequence[str]) -> TokenSample:
        place_D = [domains.index(name) for name in mine]
        hashes = np.full((len(domains), TOKENS_A_DOMAIN), _NO_HASH)
        hashes[place_D] = self.hashes
        expert_ids = {}
        for layer, ids in self.expert_ids.items():
            expert_ids[layer] = np.full((len(domains), *ids.shape[1:]), -1, np.int32)
            expert_ids[layer][place_D] = ids
        return replace(self, hashes=hashes, expert_ids=expert_ids)


def token_hashes(document: NDArray[np.integer[Any]], offset: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A hash of (document, offset within it): the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (document.astype(np.uint64) << np.uint64(32)) | offset.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
