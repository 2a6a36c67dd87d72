"""The tally: counts by domain, layer, choice and expert, and repeats, with the document moments of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moescope.tallying import kernels
from moescope.tallying.counter import Counter, Options, Result, Stored, spread, united
from moescope.tallying.one_pass import one_pass
from moescope.tallying.token_sample import TokenSample
from moescope.trace import Header, Layer, Part, Trace, as_trace

REPEAT_KINDS = ("first", "any", "first_in_next")
"""Same first choice; the sets share an expert; the earlier token's first choice is in the later token's set."""

MAX_PAIR_TABLE_IDS = 128
"""With two choices of at most this many ids, the tally keeps the exact table of pairs; otherwise a token sample."""


@dataclass(frozen=True)
class Tally(Result):
    """Sums over documents from which the measures are computed; add two of disjoint documents with ``+``.

    Attributes:
        data: The sums, int64:

            * `documents`, `tokens`, `pairs`, `pairs_squared` (domain): documents with a token, tokens, pairs of
              consecutive tokens of a sequence, and Σ over documents of the square of its pairs;
            * `made`, `made_squared` (domain, layer, choice): assignments made, and Σn²;
            * `loads`, `loads_squared`, `loads_by_made` (domain, layer, choice, expert): assignments received, Σy²,
              Σy·n;
            * `repeats`, `repeats_squared`, `repeats_by_pairs` (domain, layer, kind): pairs that repeat, Σy², Σy·n;
            * `pair` (domain, layer, expert, second_expert), where layers have two choices of few experts: tokens by
              first and second choice, those with one choice dropped at (e, e);
            * coordinates `num_experts`, `num_ids`, `top_k` (layer).
        sample: Tokens kept for what sums cannot tell where there is no `pair`; None where it is not needed.
        counts_only: Whether it comes from a trace of counts. Then `choice` is only "all", there are no repeats, no
            pairs and no `pair`, `tokens` is the most assignments of a layer over its top-k, and the sums of squares and
            products are float64.
        ranked: Whether the choices of every layer are in the order of their gate weights. If not, nobody knows which is
            the first: `choice` is only "all", `kind` only "any".
    """

    data: xr.Dataset
    sample: TokenSample | None = None
    counts_only: bool = False
    ranked: bool = True

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains counted."""
        return tuple(self.data["domain"].values.tolist())

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers counted."""
        return tuple(self.data["layer"].values.tolist())

    @property
    def header(self) -> Header:
        """What it tells of the trace."""
        columns = (self.data[name].values.tolist() for name in ("layer", "num_experts", "num_ids", "top_k"))
        layers = tuple(
            Layer(number, num_experts, top_k, num_null_experts=num_ids - num_experts, ranked=self.ranked)
            for number, num_experts, num_ids, top_k in zip(*columns, strict=True)
        )
        return Header(layers, token_ids=not self.counts_only, counts_only=self.counts_only)

    def __add__(self, other: Tally) -> Tally:
        """The tally of both; their documents must be disjoint.

        Raises:
            ValueError: The layers, or their shapes, differ, or only one has nothing but counts.
        """
        if not isinstance(other, Tally):
            return NotImplemented
        mine, theirs = self.data, other.data
        for name in ("layer", "num_experts", "num_ids", "top_k"):
            if mine[name].values.tolist() != theirs[name].values.tolist():
                raise ValueError(f"tallies of different layers cannot be added: {name} differs")
        if self.counts_only != other.counts_only:
            raise ValueError("a tally of counts and one of tokens cannot be added")
        if self.ranked != other.ranked:
            raise ValueError("a tally that knows the order of the choices and one that does not cannot be added")
        domains, mine_D, theirs_D = united(self.domains, other.domains)
        total = mine.isel(domain=[0] * len(domains)).assign_coords(domain=list(domains))
        for name in map(str, mine.data_vars):
            sums = spread(mine[name].values, mine_D, len(domains)) + spread(theirs[name].values, theirs_D, len(domains))
            total[name] = (mine[name].dims, sums, mine[name].attrs)
        sample = self.sample and self.sample.merge(other.sample, self.domains, other.domains, domains)
        return Tally(total, sample, self.counts_only, self.ranked)

    def stored(self) -> dict[str, NDArray[Any]]:
        """The sums by name, and the sample as ``sample/hashes`` and ``sample/LAYER``."""
        arrays = {str(name): variable.values for name, variable in self.data.data_vars.items()}
        if self.sample is not None:
            arrays["sample/hashes"] = self.sample.hashes
            arrays |= {f"sample/{layer}": ids for layer, ids in self.sample.expert_ids.items()}
        return arrays

    @classmethod
    def restored(cls, stored: Stored) -> Self:
        """The tally of the arrays of `stored`."""
        layers, domains = stored.layers, stored.domains
        choices, kinds = _labels(layers, stored.ranked, stored.counts_only)
        num_ids = max(layer.num_ids for layer in layers)
        sizes = {
            "domain": len(domains), "layer": len(layers), "choice": len(choices), "kind": len(kinds),
            "expert": num_ids, "second_expert": num_ids,
        }  # fmt: skip
        arrays = {}
        for name, (dims, _) in _SUMS.items():
            if name != "pair" or name in stored:
                rounded = stored.counts_only and name in _MOMENTS_OF_COUNTS
                arrays[name] = stored.take(name, np.float64 if rounded else np.int64, tuple(sizes[dim] for dim in dims))
        sampled = [] if stored.counts_only else [layer for layer in layers if _sampled(layer)]
        return cls(
            _dataset(arrays, domains, layers, choices, kinds),
            TokenSample.restored(stored, sampled) if sampled else None,
            stored.counts_only,
            stored.ranked,
        )

    def _repr_html_(self) -> str:
        return self.data._repr_html_()


def tally(trace: Trace | Path | str, layers: Iterable[int] | None = None, *, threads: int | None = None) -> Tally:
    """Count a trace in one pass.

    Args:
        trace: The trace, complete or not, or its folder.
        layers: Layers to count, or None for all.
        threads: Parts counted at a time; None for the number of processors.
    Returns:
        The tally; its memory does not depend on the number of tokens.
    Raises:
        NoSuchLayer: A layer was not recorded.
        TraceDamaged: A page fails its checksum.
        ValueError: `threads` is not positive.
    """
    trace = as_trace(trace)
    chosen = trace.select_layers(layers)
    if trace.header.counts_only:
        return _tally_counts(trace, chosen)
    make = TallyCounter.prepare(trace, chosen, Options())
    (total,) = one_pass(trace, chosen, lambda: [make()], threads=threads)
    return total.result()


def choice_labels(top_k: int) -> list[str]:
    """Names of the choices: all ranks together, then each rank.

    Example:
        >>> choice_labels(4)
        ['all', 'first', 'second', 'third', '4th']
    """
    return ["all", "first", "second", "third", *(f"{n}th" for n in range(4, top_k + 1))][: top_k + 1]


@dataclass(frozen=True)
class TallyCounter(Counter[Tally]):
    """The counter of the tally: arrays that the kernels add to. L layers; the rest as in `kernels`."""

    name, result_type = "tally", Tally

    layers: tuple[Layer, ...]
    domains: tuple[str, ...]
    documents_D: NDArray[np.int64]
    tokens_D: NDArray[np.int64]
    pairs_D: NDArray[np.int64]
    pairs_squared_D: NDArray[np.int64]
    made_LDC: NDArray[np.int64]
    made_squared_LDC: NDArray[np.int64]
    loads_LDCE: NDArray[np.int64]
    loads_squared_LDCE: NDArray[np.int64]
    loads_by_made_LDCE: NDArray[np.int64]
    repeats_LDM: NDArray[np.int64]
    repeats_squared_LDM: NDArray[np.int64]
    repeats_by_pairs_LDM: NDArray[np.int64]
    pair_LDEE: NDArray[np.int64]
    sample: TokenSample | None
    sampled: dict[int, NDArray[np.int32]]

    @classmethod
    def need(cls, trace: Trace, layers: Sequence[Layer], options: Options) -> None:
        """Nothing: every trace has a tally."""

    @classmethod
    def prepare(cls, trace: Trace, layers: Sequence[Layer], options: Options) -> Callable[[], Self]:
        """What makes empty counters."""
        return lambda: cls.zeros(trace.domains, layers)

    @classmethod
    def of_counts(cls, trace: Trace, layers: Sequence[Layer], options: Options) -> Tally:
        """The tally of a trace of counts."""
        return _tally_counts(trace, layers)

    @classmethod
    def zeros(cls, domains: Sequence[str], layers: Sequence[Layer]) -> Self:
        """A counter of nothing."""
        num_domains = len(domains)
        num_choices = 1 + max(layer.top_k for layer in layers)
        num_ids = max(layer.num_ids for layer in layers)
        paired = [layer for layer in layers if _has_pair_table(layer)]
        paired_ids = max((layer.num_ids for layer in paired), default=0)
        sampled = [layer for layer in layers if _sampled(layer)]

        def zeros(*shape: int) -> NDArray[np.int64]:
            return np.zeros(shape, np.int64)

        loads = (len(layers), num_domains, num_choices, num_ids)
        repeats = (len(layers), num_domains, len(REPEAT_KINDS))
        return cls(
            layers=tuple(layers),
            domains=tuple(domains),
            documents_D=zeros(num_domains),
            tokens_D=zeros(num_domains),
            pairs_D=zeros(num_domains),
            pairs_squared_D=zeros(num_domains),
            made_LDC=zeros(*loads[:3]),
            made_squared_LDC=zeros(*loads[:3]),
            loads_LDCE=zeros(*loads),
            loads_squared_LDCE=zeros(*loads),
            loads_by_made_LDCE=zeros(*loads),
            repeats_LDM=zeros(*repeats),
            repeats_squared_LDM=zeros(*repeats),
            repeats_by_pairs_LDM=zeros(*repeats),
            pair_LDEE=zeros(len(layers) if paired else 0, num_domains, paired_ids, paired_ids),
            sample=TokenSample.empty(num_domains, sampled) if sampled else None,
            sampled={},
        )

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count the layers of `group` in a part; what belongs to no layer is counted with the first group."""
        layers = self.layers
        starts_G = part.document_starts()
        domain_G = part.domain[starts_G[:-1]].astype(np.int64)
        starts_Q = part.sequence_starts()
        document_Q = np.searchsorted(starts_G, starts_Q[:-1], side="right") - 1
        pairs_G = np.diff(starts_G) - np.bincount(document_Q, minlength=len(domain_G))
        if group[0] == layers[0]:
            num_domains = len(self.documents_D)
            self.documents_D[:] += np.bincount(domain_G, minlength=num_domains)
            np.add.at(self.tokens_D, domain_G, np.diff(starts_G))
            np.add.at(self.pairs_D, domain_G, pairs_G)
            np.add.at(self.pairs_squared_D, domain_G, pairs_G**2)
        place_of = {layer.layer: place for place, layer in enumerate(layers)}
        for layer in group:
            place = place_of[layer.layer]
            ids_KT = part.expert_ids[layer.layer].T
            used = slice(0, layer.top_k + 1), slice(0, layer.num_ids)
            loads = (
                *(sums[place][(slice(None), *used)] for sums in (self.loads_LDCE, self.loads_squared_LDCE)),
                self.loads_by_made_LDCE[place][(slice(None), *used)],
                self.made_LDC[place][:, used[0]],
                self.made_squared_LDC[place][:, used[0]],
            )
            repeats = (self.repeats_LDM[place], self.repeats_squared_LDM[place], self.repeats_by_pairs_LDM[place])
            none_dropped = ids_KT.dtype.kind == "u"  # the reader gives signed ids only if some were dropped
            if layer.top_k == 2 and layer.num_ids <= 16 and none_dropped:
                pair = self.pair_LDEE[place][:, : layer.num_ids, : layer.num_ids]
                kernels.count_loads_and_pairs(ids_KT, starts_G, domain_G, *loads, pair)
            else:
                kernels.count_loads(ids_KT, starts_G, domain_G, *loads)
                if _has_pair_table(layer):
                    pair = self.pair_LDEE[place][:, : layer.num_ids, : layer.num_ids]
                    kernels.count_pairs(ids_KT, part.domain, pair)
            if layer.top_k == 2 and none_dropped:
                kernels.count_repeats_of_two(ids_KT, starts_Q, document_Q, domain_G, pairs_G, *repeats)
            else:
                kernels.count_repeats(ids_KT, layer.num_ids, starts_Q, document_Q, domain_G, pairs_G, *repeats)
        if self.sample is not None:
            fresh = TokenSample.of_part(part, len(self.documents_D), [layer for layer in group if _sampled(layer)])
            self.sampled.update(fresh.expert_ids)
            if group[-1] == layers[-1]:  # the sample of this part is whole
                self.sample.absorb(TokenSample(fresh.hashes, dict(self.sampled)))
                self.sampled.clear()

    def merge(self, other: Self) -> None:
        """Add the counts of other documents, in place."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, np.ndarray):
                mine += theirs
        if self.sample is not None and other.sample is not None:
            self.sample.absorb(other.sample)

    def result(self) -> Tally:
        """The tally of what was counted."""
        arrays = {name: getattr(self, f"{name}_D") for name in ("documents", "tokens", "pairs", "pairs_squared")}
        by_layer = {
            "made": self.made_LDC,
            "made_squared": self.made_squared_LDC,
            "loads": self.loads_LDCE,
            "loads_squared": self.loads_squared_LDCE,
            "loads_by_made": self.loads_by_made_LDCE,
            "repeats": self.repeats_LDM,
            "repeats_squared": self.repeats_squared_LDM,
            "repeats_by_pairs": self.repeats_by_pairs_LDM,
        }
        if self.pair_LDEE.size:
            num_ids, num_paired = self.loads_LDCE.shape[3], self.pair_LDEE.shape[3]
            by_layer["pair"] = np.zeros((*self.pair_LDEE.shape[:2], num_ids, num_ids), np.int64)
            by_layer["pair"][:, :, :num_paired, :num_paired] = self.pair_LDEE
        arrays |= {name: np.ascontiguousarray(sums_LD.swapaxes(0, 1)) for name, sums_LD in by_layer.items()}
        ranked = all(layer.ranked for layer in self.layers)
        data = _dataset(arrays, self.domains, self.layers, *_labels(self.layers, True, False))
        return Tally(data if ranked else data.sel(choice=["all"], kind=["any"]), self.sample, ranked=ranked)


_SUMS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "documents": (("domain",), "documents"),
    "tokens": (("domain",), "tokens"),
    "pairs": (("domain",), "pairs of consecutive tokens"),
    "pairs_squared": (("domain",), None),
    "made": (("domain", "layer", "choice"), "assignments"),
    "made_squared": (("domain", "layer", "choice"), None),
    "loads": (("domain", "layer", "choice", "expert"), "assignments"),
    "loads_squared": (("domain", "layer", "choice", "expert"), None),
    "loads_by_made": (("domain", "layer", "choice", "expert"), None),
    "repeats": (("domain", "layer", "kind"), "pairs of consecutive tokens"),
    "repeats_squared": (("domain", "layer", "kind"), None),
    "repeats_by_pairs": (("domain", "layer", "kind"), None),
    "pair": (("domain", "layer", "expert", "second_expert"), "tokens"),
}
"""Dims and unit of each sum of a tally."""

_MOMENTS_OF_COUNTS = ("made_squared", "loads_squared", "loads_by_made")
"""Sums that are float64 in a trace of counts, whose documents may hold more assignments than squares fit 64 bits."""


def _labels(layers: Sequence[Layer], ranked: bool, counts_only: bool) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """Labels of the choices and of the kinds of repeats that a tally has."""
    choices, kinds = np.array(choice_labels(max(layer.top_k for layer in layers))), np.array(REPEAT_KINDS)
    if counts_only:
        return np.array(choice_labels(0)), kinds
    return (choices, kinds) if ranked else (choices[:1], kinds[1:2])


def _dataset(
    arrays: Mapping[str, NDArray[Any]],
    domains: Sequence[str],
    layers: Sequence[Layer],
    choices: NDArray[np.str_],
    kinds: NDArray[np.str_],
) -> xr.Dataset:
    return xr.Dataset(
        {
            name: (dims, arrays[name], {"units": unit} if unit else {})
            for name, (dims, unit) in _SUMS.items()
            if name in arrays
        },
        {
            "domain": list(domains),
            "layer": [layer.layer for layer in layers],
            "choice": choices,
            "expert": np.arange(max(layer.num_ids for layer in layers)),
            "kind": kinds,
            "num_experts": ("layer", [layer.num_experts for layer in layers]),
            "num_ids": ("layer", [layer.num_ids for layer in layers]),
            "top_k": ("layer", [layer.top_k for layer in layers]),
        },
    )


def _tally_counts(trace: Trace, layers: Sequence[Layer]) -> Tally:
    """The tally of a trace of counts. G documents of a part; the rest as in `kernels`, C being "all" alone."""
    num_domains, num_layers, num_ids = len(trace.domains), len(layers), max(layer.num_ids for layer in layers)
    documents_D, tokens_D = np.zeros(num_domains, np.int64), np.zeros(num_domains, np.int64)
    made_DL = np.zeros((num_domains, num_layers), np.int64)
    loads_DLE = np.zeros((num_domains, num_layers, num_ids), np.int64)
    made_squared_DL = np.zeros(made_DL.shape)
    loads_squared_DLE, loads_by_made_DLE = np.zeros(loads_DLE.shape), np.zeros(loads_DLE.shape)
    place_of_layer = np.full(max(layer.layer for layer in trace.layers) + 1, -1)
    place_of_layer[[layer.layer for layer in layers]] = np.arange(num_layers)
    top_k_L = np.array([layer.top_k for layer in layers])
    for counts in trace.iter_counts():
        starts_G = counts.document_starts()
        codes = np.array([trace.domains.index(name) for name in counts.domain_names])
        domain_G = codes[counts.domain[starts_G[:-1]]]
        g = np.repeat(np.arange(len(domain_G)), np.diff(starts_G))
        layer = place_of_layer[counts.layer]
        asked = layer >= 0
        g, layer, expert, y = g[asked], layer[asked], counts.expert[asked], counts.count[asked]
        made_GL = np.zeros((len(domain_G), num_layers), np.int64)
        np.add.at(made_GL, (g, layer), y)
        np.add.at(documents_D, domain_G, 1)
        np.add.at(tokens_D, domain_G, (made_GL // top_k_L).max(axis=1))
        np.add.at(made_DL, domain_G, made_GL)
        np.add.at(made_squared_DL, domain_G, made_GL.astype(float) ** 2)
        cell = (domain_G[g], layer, expert)
        np.add.at(loads_DLE, cell, y)
        np.add.at(loads_squared_DLE, cell, y.astype(float) ** 2)
        np.add.at(loads_by_made_DLE, cell, y.astype(float) * made_GL[g, layer])
    arrays = {
        "documents": documents_D,
        "tokens": tokens_D,
        "made": made_DL[:, :, None],
        "made_squared": made_squared_DL[:, :, None],
        "loads": loads_DLE[:, :, None],
        "loads_squared": loads_squared_DLE[:, :, None],
        "loads_by_made": loads_by_made_DLE[:, :, None],
        **dict.fromkeys(("pairs", "pairs_squared"), np.zeros(num_domains, np.int64)),
        **dict.fromkeys(
            ("repeats", "repeats_squared", "repeats_by_pairs"),
            np.zeros((num_domains, num_layers, len(REPEAT_KINDS)), np.int64),
        ),
    }
    data = _dataset(arrays, trace.domains, layers, *_labels(layers, False, True))
    return Tally(data, counts_only=True, ranked=False)


def _has_pair_table(layer: Layer) -> bool:
    return layer.top_k == 2 and layer.num_ids <= MAX_PAIR_TABLE_IDS


def _sampled(layer: Layer) -> bool:
    return layer.top_k > 1 and not _has_pair_table(layer)
