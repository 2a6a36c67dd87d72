"""The tally of two traces over the same tokens: what both chose, and how loads changed, with document moments.

The unit is the matched token. Every sum is over the tokens that `matching` found to be the same in both; nothing else
of either trace is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moescope.tallying import matching, pair_kernels
from moescope.tallying.matching import Matching, PairOfParts
from moescope.tallying.one_pass import layer_groups, threads_to_use
from moescope.trace import Layer, Part, Trace


@dataclass(frozen=True)
class PairTally:
    """Sums over the matched documents of two traces, A and B.

    Attributes:
        data: The sums, int64:

            * `documents`, `tokens`, `tokens_squared` (domain): documents with a matched token, matched tokens, and Σ
              over documents of the square of their number;
            * `shared`, `shared_squared`, `shared_by_tokens` (domain, layer): Σ over tokens of the experts in both sets
              of choices; Σ over documents of its square and of its product with the tokens;
            * `first`, `first_squared`, `first_by_tokens` (domain, layer): tokens with one first choice in both, and the
              same moments; zero where a trace does not say which choice is the first;
            * `first_a`, `first_b` (domain, layer, expert): tokens by first choice in A and in B, if ranked;
            * `loads_a`, `loads_b` (domain, layer, expert): assignments of all ranks in A and in B;
            * `change_squared`, `change_by_tokens` (domain, layer, expert): Σ over documents of (load in B - load in A)²
              and of that difference times the tokens;
            * if asked for, float64, by the gate weights of A (domain, layer): `kept`, `kept_squared`,
              `kept_by_weighed`, `weighed`, `weighed_squared`, the part of a token's gate weight that lies on experts of
              B, too, the tokens that have weights, and their moments; `margin_same`, `num_same`, `margin_differs`,
              `num_differs`, Σ of (w0 - w1) / (w0 + w1) and tokens, where the first choice is the same and is not;
            * coordinates `num_experts`, `num_ids`, `top_k`, `ranked` (layer).
        by_token: How often the choices of each token id agree, over all layers counted: dims (token_id), `seen`,
            `documents`, `shared`, Σ over documents of their squares and product `shared_squared`, `shared_by_seen`,
            `seen_squared`; None where token ids are not known.
        matching: What was matched.
    """

    data: xr.Dataset
    by_token: xr.Dataset | None
    matching: Matching


def tally_pair(
    a: Trace, b: Trace, layers: Iterable[int] | None = None, *, weights: bool = False, threads: int | None = None
) -> PairTally:
    """Count two traces over their common tokens, in one pass over both; arguments and errors as of `moescope.compare`.

    Memory is a part of each trace, at most `one_pass.COLUMNS_A_READ` columns of it, and the sums: 48 bytes for each
    (domain, layer, expert), so 12 MB a thread for 16 domains, 60 layers and 256 experts; and 56 bytes a token id seen.

    Args:
        weights: Weigh what is shared by the gate weights of A.
    Raises:
        NotRecorded: A trace holds counts only, or gate weights are asked for and A has none.
    """
    a.need_tokens(weights=weights)
    b.need_tokens()
    chosen = common_layers(a, b, layers)
    if not chosen:
        raise ValueError("the traces have no layer with the same experts and the same top-k in common")
    by_token_id = a.header.token_ids and b.header.token_ids
    work = matching.pairs_of_parts(a, b)
    threads = threads_to_use(threads, len(work))
    groups = layer_groups(chosen)
    swapped = len(a.parts) > len(b.parts)

    def count(share: Sequence[tuple[int, list[int]]]) -> _PairSums:
        sums = _PairSums.zeros(len(a.domains), chosen)
        for outer, inners in share:
            matched: dict[int, tuple[PairOfParts, NDArray[np.int64]]] = {}  # with the experts that each token shares
            for group in groups if inners else []:
                kept = _read(b if swapped else a, outer, group, tokens=by_token_id, weights=weights and not swapped)
                for inner in inners:
                    other = _read(a if swapped else b, inner, group, tokens=by_token_id, weights=weights and swapped)
                    part_a, part_b = (other, kept) if swapped else (kept, other)
                    if inner not in matched:
                        pair = matching.match_rows(part_a, part_b, by_token_id=by_token_id)
                        matched[inner] = pair, np.zeros(len(part_a.document[pair.rows_a]), np.int64)
                    pair, shared_T = matched[inner]
                    if len(shared_T):
                        sums.add(part_a, part_b, pair, group, shared_T)
                        if by_token_id and group[-1] == chosen[-1]:
                            sums.by_token.add(part_a.document[pair.rows_a], part_a.token_id[pair.rows_a], shared_T)
            for pair, shared_T in matched.values():
                documents = pair.documents, pair.documents_differing, pair.documents_relabelled
                sums.matched_4[:] += (len(shared_T), *documents)
        return sums

    shares = [work[thread::threads] for thread in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        total, *others = pool.map(count, shares)
    for sums in others:
        total.merge(sums)
    return total.labelled(a, b, by_token_id=by_token_id, with_weights=weights)


def common_layers(a: Trace, b: Trace, layers: Iterable[int] | None = None) -> tuple[Layer, ...]:
    """The layers asked for, or those that have the same experts and top-k in both; a layer is ranked if both are.

    Raises:
        NoSuchLayer: A layer asked for was not recorded in both.
        ValueError: A layer asked for has other experts or another top-k in the second trace.
    """
    theirs = {layer.layer: layer for layer in b.select_layers(layers)}
    chosen = []
    for layer in a.select_layers(layers):
        other = theirs.get(layer.layer)
        if other is not None and shape(layer) == shape(other):
            chosen.append(replace(layer, ranked=layer.ranked and other.ranked))
        elif layers is not None:
            assert other is not None
            raise ValueError(
                f"layer {layer.layer} has (experts, null experts, top-k) {shape(layer)} and {shape(other)}"
            )
    return tuple(chosen)


def shape(layer: Layer) -> tuple[int, int, int]:
    """Experts, null experts and top-k."""
    return layer.num_experts, layer.num_null_experts, layer.top_k


def _read(trace: Trace, index: int, group: Sequence[Layer], *, tokens: bool, weights: bool) -> Part:
    by_number = {layer.layer: layer for layer in trace.layers}
    part = trace.parts[index].read([by_number[layer.layer] for layer in group], tokens=tokens, weights=weights)
    return trace.with_trace_domains(part)


@dataclass(frozen=True)
class _PairSums:
    """Arrays that are added to. L layers, D domains, E ids; moments over documents as in `PairTally`.

    `matched_4` is what `Matching` says of both: tokens, documents, those differing, those relabelled.
    """

    layers: tuple[Layer, ...]
    matched_4: NDArray[np.int64]
    by_domain_3D: NDArray[np.int64]
    agree_LD6: NDArray[np.int64]
    by_expert_L6DE: NDArray[np.int64]
    weighed_LD9: NDArray[np.float64]
    by_token: _TokenSums

    @classmethod
    def zeros(cls, num_domains: int, layers: Sequence[Layer]) -> _PairSums:
        num_layers, num_ids = len(layers), max(layer.num_ids for layer in layers)
        return cls(
            tuple(layers),
            np.zeros(4, np.int64),
            np.zeros((len(_BY_DOMAIN), num_domains), np.int64),
            np.zeros((num_layers, num_domains, len(_AGREE)), np.int64),
            np.zeros((num_layers, len(_BY_EXPERT), num_domains, num_ids), np.int64),
            np.zeros((num_layers, num_domains, len(_WEIGHED))),
            _TokenSums(),
        )

    def add(
        self, part_a: Part, part_b: Part, pair: PairOfParts, group: Sequence[Layer], shared_of_token: NDArray[np.int64]
    ) -> None:
        """Count some layers of a pair of parts; `shared_of_token` is added to, shape (token,)."""
        document = part_a.document[pair.rows_a]
        starts_G = np.append(np.flatnonzero(np.diff(document, prepend=-1)), len(document)).astype(np.int64)
        tokens_G = np.diff(starts_G)
        domain_G = part_a.domain[pair.rows_a][starts_G[:-1]].astype(np.int64)
        if group[0] == self.layers[0]:
            for sums_D, added_G in zip(self.by_domain_3D, (tokens_G**0, tokens_G, tokens_G**2), strict=True):
                np.add.at(sums_D, domain_G, added_G)
        shared_T = np.empty(len(document), np.uint8)
        for layer in group:
            place = self.layers.index(layer)
            a_KT = matching.selected(part_a.expert_ids[layer.layer], pair.rows_a)
            b_KT = matching.selected(part_b.expert_ids[layer.layer], pair.rows_b)
            pair_kernels.count_shared(a_KT, b_KT, shared_T)
            shared_of_token += shared_T
            shared_G = np.add.reduceat(shared_T, starts_G[:-1], dtype=np.int64)
            if layer.ranked:
                agree_T = (a_KT[0] == b_KT[0]) & (a_KT[0] >= 0)
                first_G = np.add.reduceat(agree_T, starts_G[:-1], dtype=np.int64)
            else:
                first_G = np.zeros_like(shared_G)
            moments_G6 = np.stack(
                [shared_G, shared_G**2, shared_G * tokens_G, first_G, first_G**2, first_G * tokens_G], axis=1
            )
            np.add.at(self.agree_LD6[place], domain_G, moments_G6)
            if part_a.gate_weights:
                weights_KT = matching.selected(part_a.gate_weights[layer.layer], pair.rows_a)
                np.add.at(self.weighed_LD9[place], domain_G, _weigh(a_KT, b_KT, weights_KT, starts_G, layer.ranked))
            sums_6DE = self.by_expert_L6DE[place][:, :, : layer.num_ids]
            pair_kernels.count_changes(a_KT, b_KT, starts_G, domain_G, sums_6DE)

    def merge(self, other: _PairSums) -> None:
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, np.ndarray):
                mine += theirs
        self.by_token.merge(other.by_token)

    def labelled(self, a: Trace, b: Trace, *, by_token_id: bool, with_weights: bool = False) -> PairTally:
        tokens, *documents = self.matched_4.tolist()
        sizes = a.num_documents, b.num_documents
        in_common = Matching(by_token_id, tokens, a.num_tokens, b.num_tokens, documents[0], *sizes, *documents[1:])
        by_domain = dict(zip(_BY_DOMAIN, self.by_domain_3D, strict=True))
        used = np.flatnonzero(by_domain["tokens"])
        dims = ("domain", "layer", "expert")
        sums = dict(zip(_AGREE, np.moveaxis(self.agree_LD6, 2, 0), strict=True))
        if with_weights:
            sums |= zip(_WEIGHED, np.moveaxis(self.weighed_LD9, 2, 0), strict=True)
        sums |= zip(_BY_EXPERT, self.by_expert_L6DE.swapaxes(0, 1), strict=True)
        data = xr.Dataset(
            {
                "documents": ("domain", by_domain["documents"][used], {"units": "documents"}),
                "tokens": ("domain", by_domain["tokens"][used], {"units": "tokens"}),
                "tokens_squared": ("domain", by_domain["tokens_squared"][used]),
                **{
                    name: (dims[: sums_LD.ndim], np.ascontiguousarray(sums_LD.swapaxes(0, 1)[used]))
                    for name, sums_LD in sums.items()
                },
            },
            {
                "domain": [a.domains[code] for code in used.tolist()],
                "layer": [layer.layer for layer in self.layers],
                "expert": np.arange(self.by_expert_L6DE.shape[3]),
                **{
                    name: ("layer", [getattr(layer, name) for layer in self.layers])
                    for name in ("num_experts", "num_ids", "top_k", "ranked")
                },
            },
        )
        return PairTally(data, self.by_token.labelled() if by_token_id else None, in_common)


def _weigh(
    a_KT: NDArray[np.integer[Any]],
    b_KT: NDArray[np.integer[Any]],
    weights_KT: NDArray[np.float32],
    starts_G: NDArray[np.int64],
    ranked: bool,
) -> NDArray[np.float64]:
    """What each document adds to `_WEIGHED`, shape (document, 9)."""
    kept_T, margin_T = np.empty(a_KT.shape[1]), np.empty(a_KT.shape[1])
    pair_kernels.weigh_shared(a_KT, b_KT, weights_KT, kept_T, margin_T)

    def by_document(values_T: NDArray[Any]) -> NDArray[np.float64]:
        return np.add.reduceat(values_T, starts_G[:-1], dtype=float)

    n = by_document(np.isfinite(kept_T))
    y = by_document(np.nan_to_num(kept_T))
    same_T = a_KT[0] == b_KT[0]
    known_T = np.isfinite(margin_T) & ranked
    margins = [
        by_document(values)
        for chosen in (known_T & same_T, known_T & ~same_T)
        for values in (np.where(chosen, margin_T, 0.0), chosen)
    ]
    return np.stack([y, y * y, y * n, n, n * n, *margins], axis=1)


_WEIGHED = (
    *("kept", "kept_squared", "kept_by_weighed", "weighed", "weighed_squared"),
    *("margin_same", "num_same", "margin_differs", "num_differs"),
)
_BY_DOMAIN = ("documents", "tokens", "tokens_squared")
_BY_EXPERT = ("first_a", "first_b", "loads_a", "loads_b", "change_squared", "change_by_tokens")
_AGREE = ("shared", "shared_squared", "shared_by_tokens", "first", "first_squared", "first_by_tokens")
_BY_TOKEN = ("seen", "documents", "shared", "shared_squared", "shared_by_seen", "seen_squared")


class _TokenSums:
    """Sums by token id; grows with the ids that occur, not with the vocabulary a hostile id might suggest."""

    def __init__(self) -> None:
        self.token_ids = np.zeros(0, np.int64)
        self.sums = np.zeros((0, len(_BY_TOKEN)), np.int64)

    def add(self, document: NDArray[np.integer], token_id: NDArray[np.integer], shared: NDArray[np.int64]) -> None:
        keys = document.astype(np.uint64) << np.uint64(32) | token_id.astype(np.uint64)
        distinct, place = np.unique(keys, return_inverse=True)
        n = np.bincount(place, minlength=len(distinct))
        y = np.bincount(place, shared.astype(float), len(distinct)).astype(np.int64)
        moments = np.stack([n, np.ones_like(n), y, y * y, y * n, n * n], axis=1)
        self._absorb((distinct & np.uint64(2**32 - 1)).astype(np.int64), moments)

    def merge(self, other: _TokenSums) -> None:
        self._absorb(other.token_ids, other.sums)

    def _absorb(self, token_ids: NDArray[np.int64], sums: NDArray[np.int64]) -> None:
        distinct, place = np.unique(np.concatenate([self.token_ids, token_ids]), return_inverse=True)
        total = np.zeros((len(distinct), len(_BY_TOKEN)), np.int64)
        np.add.at(total, place, np.concatenate([self.sums, sums]))
        self.token_ids, self.sums = distinct, total

    def labelled(self) -> xr.Dataset:
        return xr.Dataset(
            {name: ("token_id", sums) for name, sums in zip(_BY_TOKEN, self.sums.T, strict=True)},
            {"token_id": self.token_ids},
        )
