"""Documents of counts assembled to a trace, with the checks that counts allow. Unit: an assignment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportMalformed
from moescope.importers.assembly import MAX_LAYERS, Assembly
from moescope.importers.documents import CountedDocument, TokenDocument
from moescope.importers.findings import not_stated
from moescope.trace import Counts, Header, Layer
from moescope.trace.header import ranges

PART_ROWS = 1 << 19
"""Rows of a part: 21 MB of five int64 columns while it is assembled."""
MAX_COUNT = 1 << 46  # so that the int64 sum over 2**16 experts cannot overflow
MAX_TOTAL = 1 << 53
"""Assignments of a layer, beyond which float64 sums are not exact."""


@dataclass
class AssignmentCounts(Assembly):
    """Documents of counts."""

    _rows: list[NDArray[np.int64]] = field(default_factory=list)
    _waiting: int = 0
    _totals: dict[int, int] = field(default_factory=dict)
    _largest: int = -1
    _lengths: dict[int, int] = field(default_factory=dict)
    _indivisible: int = 0
    _unequal: int = 0

    def add(self, document: TokenDocument | CountedDocument) -> None:
        """Take the next document."""
        place = document.place
        if not isinstance(document, CountedDocument):
            raise ImportMalformed(place, "holds tokens, but earlier documents hold counts", "import them separately")
        if self.exclusion.tokens:
            raise ImportMalformed(place, "holds counts, and no token to leave out", "--exclude takes documents:LIST")
        self.learn(document.model, place)
        if any(counts.any() for counts in document.counts.values()) and not self.kept(1).all():
            return
        rows, totals = [], {}
        code = self.code_of(document.domain, place)
        for layer, counts in sorted(document.counts.items()):
            if not self.takes(layer, place):
                continue
            where = f"{place}, layer {layer}"
            if counts.ndim != 1 or not 1 <= len(counts) <= 2**16:
                raise ImportMalformed(where, f"has counts of shape {counts.shape}, expected one per expert")
            if counts.min() < 0 or counts.max() >= MAX_COUNT:
                raise ImportMalformed(where, f"counts {counts.min()} to {counts.max()}, expected 0 to 2**46 - 1")
            experts = np.flatnonzero(counts)
            self._largest = max(self._largest, int(experts[-1]) if len(experts) else -1)
            if document.complete:
                if self._lengths.setdefault(layer, len(counts)) != len(counts):
                    raise ImportMalformed(where, f"counts {len(counts)} experts, earlier {self._lengths[layer]}")
                if self.model.num_experts not in (None, len(counts)):
                    raise ImportMalformed(where, f"counts {len(counts)} experts, expected {self.model.num_experts}")
            elif self.model.num_experts is not None and self._largest >= self.model.num_experts:
                raise ImportMalformed(
                    where, f"has expert id {self._largest}, expected 0 to {self.model.num_experts - 1}"
                )
            totals[layer] = int(counts.sum(dtype=np.int64))
            self._totals[layer] = self._totals.get(layer, 0) + totals[layer]
            if self._totals[layer] >= MAX_TOTAL:
                raise ImportMalformed(where, f"counts {self._totals[layer]} assignments, expected below {MAX_TOTAL}")
            number, index = np.full_like(experts, self.num_documents), np.full_like(experts, layer)
            rows.append(np.stack([number, index, experts, counts[experts].astype(np.int64)]))
        if len(self._totals) > MAX_LAYERS:
            raise ImportMalformed(place, f"has {len(self._totals)} layers, expected at most {MAX_LAYERS}")
        counted = [total for total in totals.values() if total]
        if not counted:
            self.findings.count("documents or passes contain no counts and were left out (an unfilled buffer is zero)")
            return
        top_k = self.model.top_k
        self._indivisible += bool(top_k and any(total % top_k for total in counted))
        self._unequal += len(set(counted)) > 1
        joined = np.concatenate(rows, axis=1)
        self._rows.append(np.concatenate([joined, np.full((1, joined.shape[1]), code)]))
        self._waiting += joined.shape[1]
        self.num_documents += 1
        if self._waiting >= PART_ROWS:
            self._flush()

    def _flush(self) -> None:
        self.spool.put({"rows": np.concatenate(self._rows, axis=1)})
        self._rows, self._waiting = [], 0

    def finish(self, name: str) -> Header:
        """Close the last part and return the header, now that everything is known."""
        if self._rows:
            self._flush()
        self.check_excluded(name)
        dense = sorted(layer for layer, total in self._totals.items() if total == 0)
        kept = sorted(set(self._totals) - set(dense))
        if dense and kept:
            self.findings.warn(f"layers {ranges(dense)} have no counts and were left out as dense")
        self.check_layers(kept, name)
        if self.model.top_k is None:
            raise not_stated("top_k", name)
        if self._indivisible:
            self.findings.warn(
                f"in {self._indivisible:,} documents or passes the assignments of a layer are not a multiple of top-k "
                f"{self.model.top_k}; is top-k right, and are the counts exact and from all ranks?"
            )
        if self._unequal:
            self.findings.warn(
                f"in {self._unequal:,} documents or passes layers count different numbers of assignments"
            )
        counted_experts = max(self._largest + 1, *self._lengths.values()) if self._lengths else 0
        num_experts = self.model.num_experts or counted_experts or self.count_experts(self._largest)
        if self.model.top_k > num_experts:
            raise ImportMalformed(name, f"has {self.model.top_k} experts per token, of {num_experts}")
        layers = tuple(
            Layer(layer, self._lengths.get(layer, num_experts), self.model.top_k, ranked=False) for layer in kept
        )
        return Header(layers, model=self.described(), token_ids=False, counts_only=True)

    def parts(self, header: Header) -> Iterator[tuple[Counts, dict[str, Any]]]:
        """The stored parts."""
        names = tuple(self.domains)
        for arrays in self.spool:
            document, layer, expert, count, domain = arrays["rows"]
            yield Counts(document, domain, names, layer, expert, count), {"documents": int(document[-1]) + 1}
