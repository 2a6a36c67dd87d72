"""How often each expert is active within segments of consecutive tokens; the unit is a pair of segment and expert.

Sums are kept for groups of documents, from which an interval of whatever is computed from them follows by leaving one
group out at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from moescope.tallying import segment_kernels
from moescope.tallying.one_pass import one_pass
from moescope.trace import Layer, Part, Trace

LENGTHS = (4, 16, 64, 256)
"""Tokens of a segment, those of the source."""

GROUPS_A_DOMAIN = 32
"""Groups of documents; a domain of fewer documents has one a document."""


@dataclass(frozen=True)
class Segments:
    """Counts of a trace by layer and group of documents.

    Attributes:
        domains: Domains of the trace.
        layers: Layers counted.
        lengths: Tokens of a segment.
        domain_of_group: Place of each group's domain, shape (group,).
        documents: Documents with a segment, by domain and length, shape (domain, length).
        segments: Segments of each group and length, shape (group, length).
        at_least: For each length m, pairs of segment and expert with at least v activations, v = 0 .. m, shape
            (layer, group, m + 1).
        expected: The same, expected if the tokens of each document stood in random order.
    """

    domains: tuple[str, ...]
    layers: tuple[Layer, ...]
    lengths: tuple[int, ...]
    domain_of_group: NDArray[np.int64]
    documents: NDArray[np.int64]
    segments: NDArray[np.int64]
    at_least: tuple[NDArray[np.int64], ...]
    expected: tuple[NDArray[np.float64], ...]


def count_segments(
    trace: Trace,
    layers: Iterable[int] | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    threads: int | None = None,
) -> Segments:
    """Count a trace in one pass.

    Memory, whatever the number of experts and tokens: 16 bytes x Σ(m + 1) x layers x groups a thread; with the four
    lengths of the source, 60 layers and 8 domains, 86 MB.

    Args:
        trace: The trace, complete or not.
        layers: Layers to count, or None for all.
        lengths: Tokens of a segment, each at least 2 and at most 65,536.
        threads: Parts counted at a time; None for the number of processors.
    Raises:
        NoSuchLayer: A layer was not recorded.
        NotRecorded: The trace holds counts only.
        TraceDamaged: A page fails its checksum.
        ValueError: `threads` is not positive, or a length is out of range or comes twice.
    """
    trace.need_tokens()
    check_lengths(lengths)
    chosen = trace.select_layers(layers)
    groups = DocumentGroups.of(trace)
    (counter,) = one_pass(trace, chosen, lambda: [SegmentCounter(chosen, groups, lengths)], threads=threads)
    return counter.segments(trace.domains)


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
        num_domains: Domains of the trace.
    """

    numbers: NDArray[np.int64]
    group: NDArray[np.int64]
    domain: NDArray[np.int64]
    num_domains: int

    @classmethod
    def of(cls, trace: Trace) -> DocumentGroups:
        """The groups: documents dealt out in turn, in the order of their numbers."""
        order = np.argsort(trace.document_numbers)
        domain = trace.document_domains[order]
        group = np.zeros(len(domain), np.int64)
        of_group: list[int] = []
        for code in range(len(trace.domains)):
            rows = np.flatnonzero(domain == code)
            number = min(GROUPS_A_DOMAIN, len(rows))
            group[rows] = len(of_group) + np.arange(len(rows)) % max(number, 1)
            of_group += [code] * number
        return cls(trace.document_numbers[order], group, np.array(of_group, np.int64), len(trace.domains))


class SegmentCounter:
    """A counter for `one_pass`; R groups of documents, M lengths, V counts of all lengths one after the other."""

    def __init__(self, layers: Sequence[Layer], groups: DocumentGroups, lengths: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.groups = groups
        self.lengths_M = np.array(lengths, np.int64)
        ends = np.cumsum(self.lengths_M + 1)
        self.offset_M = ends - self.lengths_M - 1
        num_groups = len(groups.domain)
        self.documents_DM = np.zeros((groups.num_domains, len(lengths)), np.int64)
        self.segments_RM = np.zeros((num_groups, len(lengths)), np.int64)
        self.at_least_LRV = np.zeros((len(layers), num_groups, int(ends[-1])), np.int64)
        self.exactly_LRV = np.zeros(self.at_least_LRV.shape)
        self._log_factorial = np.zeros(0)

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
        place = {layer.layer: at for at, layer in enumerate(self.layers)}
        for layer in group:
            at = place[layer.layer]
            ids_KT = part.expert_ids[layer.layer].T
            for m, length in enumerate(self.lengths_M.tolist()):
                sums_RV = self.at_least_LRV[at][:, self.offset_M[m] : self.offset_M[m] + length + 1]
                row_Q = row_G[document_Q]
                if layer.num_experts <= segment_kernels.FEW_IDS and length == segment_kernels.SIXTEEN:
                    segment_kernels.count_activations_in_sixteen(ids_KT, layer.num_experts, starts_Q, row_Q, sums_RV)
                else:
                    segment_kernels.count_activations(ids_KT, layer.num_experts, starts_Q, row_Q, length, sums_RV)
            segment_kernels.expect_activations(
                ids_KT,
                layer.num_experts,
                starts_G,
                row_G,
                segments_GM,
                self.lengths_M,
                self.offset_M,
                self._log_factorial,
                self.exactly_LRV[at],
            )

    def merge(self, other: SegmentCounter) -> None:
        """Add what another counter of the same trace and layers holds, in place."""
        self.documents_DM += other.documents_DM
        self.segments_RM += other.segments_RM
        self.at_least_LRV += other.at_least_LRV
        self.exactly_LRV += other.exactly_LRV

    def segments(self, domains: Sequence[str]) -> Segments:
        """What was counted."""
        at_least, expected = [], []
        num_experts_L = np.array([layer.num_experts for layer in self.layers])
        for m, length in enumerate(self.lengths_M.tolist()):
            columns = slice(int(self.offset_M[m]), int(self.offset_M[m]) + length + 1)
            all_pairs_LR = num_experts_L[:, None] * self.segments_RM[:, m]
            counted = self.at_least_LRV[:, :, columns].copy()
            tails = np.cumsum(self.exactly_LRV[:, :, columns][:, :, ::-1], axis=2)[:, :, ::-1].copy()
            counted[:, :, 0] = tails[:, :, 0] = all_pairs_LR
            at_least.append(counted)
            expected.append(tails)
        return Segments(
            tuple(domains),
            self.layers,
            tuple(self.lengths_M.tolist()),
            self.groups.domain,
            self.documents_DM,
            self.segments_RM,
            tuple(at_least),
            tuple(expected),
        )
