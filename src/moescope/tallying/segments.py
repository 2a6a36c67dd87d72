"""How often each expert is active within segments of consecutive tokens; the unit is a pair of segment and expert.

Sums are kept for groups of documents, from which an interval of whatever is computed from them follows by leaving one
group out at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import special

from moescope.tallying import segment_kernels
from moescope.tallying.counter import Array, Counter, CountOptions, Facts, Places, Result, summed
from moescope.trace import Layer, Part, Trace

LENGTHS = (4, 16, 64, 256)
"""Tokens of a segment, those of the source."""

FIXED = 2**24
"""Units of an expected pair: whole numbers add up in any order, and 64 bits hold 5e11 pairs of a group and layer. A
part is off by at most half a unit, which no digit shown can show."""

GROUPS_A_DOMAIN = 32
"""Groups of documents; a domain of fewer documents has one a document."""


@dataclass(frozen=True)
class Segments(Result):
    """Counts of a trace by layer and group of documents.

    Memory, whatever the number of experts and tokens: 16 bytes x Σ(m + 1) x layers x groups a thread; with the four
    lengths of the source, 60 layers and 8 domains, 86 MB.

    Attributes:
        domains: Domains of the trace.
        layers: Layers counted.
        lengths: Tokens of a segment.
        domain_of_group: Place of each group's domain, shape (group,).
        documents: Documents with a segment, by domain and length, shape (domain, length).
        segments: Segments of each group and length, shape (group, length).
        at_least: By length m, pairs of segment and expert with at least v activations, v = 0 .. m, shape
            (layer, group, m + 1).
        expected: The same, expected if the tokens of each document stood in random order, in units of 1 / `FIXED`.
    """

    domains: tuple[str, ...]
    layers: tuple[Layer, ...]
    lengths: tuple[int, ...]
    domain_of_group: NDArray[np.int64]
    documents: NDArray[np.int64]
    segments: NDArray[np.int64]
    at_least: dict[int, NDArray[np.int64]]
    expected: dict[int, NDArray[np.int64]]

    facts = ("lengths",)

    @classmethod
    def declared(cls, layers: Sequence[Layer], domains: Sequence[str], facts: Facts) -> dict[str, Array]:
        """The counts; those by number of activations are a table a length."""
        check_lengths(facts["lengths"])
        sizes = {"domain": len(domains), "group": None, "length": len(facts["lengths"])}
        return {
            "domain_of_group": Array(("group",), (None,), most=len(domains) - 1),
            **summed(sizes, documents="domain length", segments="group length"),
            **{
                f"{name}/{length}": Array(("layer", "group", f"activations {length}"), (len(layers), None, length + 1))
                for name in ("at_least", "expected")
                for length in facts["lengths"]
            },
        }

    def added(self, other: Self, domains: Sequence[str], places: Mapping[str, Places]) -> Self:
        """The counts of both, group by group of each domain."""
        mine_D, theirs_D, _ = places["domain"]
        codes = mine_D[self.domain_of_group], theirs_D[other.domain_of_group]
        most_D = np.max([np.bincount(domain_R, minlength=len(domains)) for domain_R in codes], axis=0)
        first_D, num_groups = np.cumsum(most_D) - most_D, int(most_D.sum())
        groups = []
        for domain_R in codes:
            order = np.argsort(domain_R, kind="stable")
            number_R = np.empty(len(order), np.int64)
            number_R[order] = np.arange(len(order)) - np.searchsorted(domain_R[order], domain_R[order])
            groups.append(first_D[domain_R] + number_R)
        total = super().added(other, domains, {**places, "group": (groups[0], groups[1], num_groups)})
        return replace(total, domain_of_group=np.repeat(np.arange(len(domains)), most_D))

    def of_lengths(self, lengths: Sequence[int] | None) -> Segments:
        """The counts of some of the lengths; of all for None.

        Raises:
            ValueError: One was not counted.
        """
        if lengths is None:
            return self
        if missing := [length for length in lengths if length not in self.lengths]:
            have = ", ".join(map(str, self.lengths))
            raise ValueError(f"segments of {missing[0]} tokens were not counted; those of {have} were")
        places = [self.lengths.index(length) for length in lengths]
        return replace(
            self,
            lengths=tuple(lengths),
            documents=self.documents[:, places],
            segments=self.segments[:, places],
            at_least={length: self.at_least[length] for length in lengths},
            expected={length: self.expected[length] for length in lengths},
        )


def _lengths(options: CountOptions) -> tuple[int, ...]:
    return LENGTHS if options.lengths is None else options.lengths


def check_lengths(lengths: Sequence[int]) -> None:
    """Refuse lengths of segments that cannot be.

    Raises:
        ValueError: There is none, or one is out of range or comes twice.
    """
    if not lengths or len(set(lengths)) < len(lengths) or not all(2 <= length <= 2**16 for length in lengths):
        raise ValueError(f"lengths must be distinct and from 2 to 65536 tokens, not {tuple(lengths)}")


@dataclass(frozen=True)
class DocumentGroups:
    """Documents of a trace in groups of nearly equal number, a group within one domain.

    Attributes:
        numbers: Document numbers, ascending, shape (document,).
        group: Group of each.
        domain: Place of the domain of each group, shape (group,).
        domains: Domains of the trace.
    """

    numbers: NDArray[np.int64]
    group: NDArray[np.int64]
    domain: NDArray[np.int64]
    domains: tuple[str, ...]

    @classmethod
    def of(cls, trace: Trace) -> DocumentGroups:
        """The groups: documents dealt out in turn, in the order of their numbers."""
        order = np.argsort(trace.document_numbers)
        domain = trace.document_domains[order]
        group = np.zeros(len(domain), np.int64)
        domain_R: list[int] = []
        for code in range(len(trace.domains)):
            rows = np.flatnonzero(domain == code)
            number = min(GROUPS_A_DOMAIN, len(rows))
            group[rows] = len(domain_R) + np.arange(len(rows)) % max(number, 1)
            domain_R += [code] * number
        return cls(trace.document_numbers[order], group, np.array(domain_R, np.int64), tuple(trace.domains))


class SegmentCounter(Counter[Segments]):
    """The counter of `Segments`; R groups of documents, M lengths, V counts of all lengths one after the other."""

    name, result_type = "segments", Segments

    def __init__(self, layers: Sequence[Layer], groups: DocumentGroups, lengths: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.groups = groups
        self.lengths_M = np.array(lengths, np.int64)
        ends = np.cumsum(self.lengths_M + 1)
        self.offset_M = ends - self.lengths_M - 1
        num_groups = len(groups.domain)
        self.documents_DM = np.zeros((len(groups.domains), len(lengths)), np.int64)
        self.segments_RM = np.zeros((num_groups, len(lengths)), np.int64)
        self.at_least_LRV = np.zeros((len(layers), num_groups, int(ends[-1])), np.int64)
        self.exactly_LRV = np.zeros(self.at_least_LRV.shape, np.int64)
        self._log_factorial = np.zeros(0)

    @classmethod
    def need(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> None:
        """Refuse a trace of counts, and impossible lengths."""
        trace.need_tokens()
        check_lengths(_lengths(options))

    @classmethod
    def prepare(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> Callable[[], Self]:
        """What makes empty counters, of the same groups of documents."""
        groups = DocumentGroups.of(trace)
        return lambda: cls(layers, groups, _lengths(options))

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count the layers of `group` in a part."""
        starts_G, starts_Q = part.document_starts(), part.sequence_starts()
        document_Q = np.searchsorted(starts_G, starts_Q[:-1], side="right") - 1
        row_G = self.groups.group[np.searchsorted(self.groups.numbers, part.document[starts_G[:-1]].astype(np.int64))]
        segments_QM = np.maximum(np.diff(starts_Q)[:, None] - self.lengths_M + 1, 0)
        segments_GM = np.zeros((len(row_G), len(self.lengths_M)), np.int64)
        np.add.at(segments_GM, document_Q, segments_QM)
        if group[0] == self.layers[0]:
            np.add.at(self.segments_RM, row_G, segments_GM)
            np.add.at(self.documents_DM, part.domain[starts_G[:-1]], segments_GM > 0)
        longest = int(np.diff(starts_G).max())
        if longest >= len(self._log_factorial):
            self._log_factorial = special.gammaln(np.arange(longest + 1) + 1.0)
        for layer in group:
            place = self.layers.index(layer)
            ids_KT = part.expert_ids[layer.layer].T
            for m, length in enumerate(self.lengths_M.tolist()):
                sums_RV = self.at_least_LRV[place][:, self.offset_M[m] : self.offset_M[m] + length + 1]
                row_Q = row_G[document_Q]
                if layer.num_experts <= segment_kernels.FEW_IDS and length == segment_kernels.SIXTEEN:
                    segment_kernels.count_activations_in_sixteen(ids_KT, layer.num_experts, starts_Q, row_Q, sums_RV)
                else:
                    segment_kernels.count_activations(ids_KT, layer.num_experts, starts_Q, row_Q, length, sums_RV)
            exactly_RV = np.zeros(self.exactly_LRV.shape[1:])
            documents = starts_G, row_G, segments_GM
            lengths = self.lengths_M, self.offset_M, self._log_factorial
            segment_kernels.expect_activations(ids_KT, layer.num_experts, *documents, *lengths, exactly_RV)
            self.exactly_LRV[place] += np.rint(exactly_RV * FIXED).astype(np.int64)

    def merge(self, other: Self) -> None:
        """Add what another counter of the same trace and layers holds, in place."""
        self.documents_DM += other.documents_DM
        self.segments_RM += other.segments_RM
        self.at_least_LRV += other.at_least_LRV
        self.exactly_LRV += other.exactly_LRV

    def result(self) -> Segments:
        """What was counted."""
        at_least, expected = {}, {}
        num_experts_L = np.array([layer.num_experts for layer in self.layers])
        for m, length in enumerate(self.lengths_M.tolist()):
            columns = slice(int(self.offset_M[m]), int(self.offset_M[m]) + length + 1)
            all_pairs_LR = num_experts_L[:, None] * self.segments_RM[:, m]
            counted = self.at_least_LRV[:, :, columns].copy()
            tails = np.cumsum(self.exactly_LRV[:, :, columns][:, :, ::-1], axis=2)[:, :, ::-1].copy()
            counted[:, :, 0], tails[:, :, 0] = all_pairs_LR, all_pairs_LR * FIXED
            at_least[length], expected[length] = counted, tails
        sums = self.documents_DM, self.segments_RM, at_least, expected
        return Segments(self.groups.domains, self.layers, tuple(at_least), self.groups.domain, *sums)
