"""The tally: counts by domain, layer, choice and expert, and repeats, with the document moments of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moescope.tallying import kernels
from moescope.tallying.counter import Array, Arrays, Counter, CountOptions, Facts, Result, sampled, summed
from moescope.tallying.token_sample import HashSample, part_hashes
from moescope.trace import Header, Layer, Part, Trace

REPEAT_KINDS = ("first", "any", "first_in_next")
"""Same first choice; the sets share an expert; the earlier token's first choice is in the later token's set."""

MAX_PAIR_TABLE_IDS = 128
"""With two choices of at most this many ids, the tally keeps the exact table of pairs; otherwise a token sample."""


TOKENS_A_DOMAIN = 2048
"""Tokens kept of a domain: their two million pairs give a probability to a few tenths of a percentage point."""


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
    sample: HashSample | None = None
    counts_only: bool = False
    ranked: bool = True

    facts = ("counts_only", "ranked")

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
        """What it says of the trace."""
        columns = (self.data[name].values.tolist() for name in ("layer", "num_experts", "num_ids", "top_k"))
        layers = tuple(
            Layer(number, num_experts, top_k, num_null_experts=num_ids - num_experts, ranked=self.ranked)
            for number, num_experts, num_ids, top_k in zip(*columns, strict=True)
        )
        return Header(layers, token_ids=not self.counts_only, counts_only=self.counts_only)

    @classmethod
    def declared(cls, layers: Sequence[Layer], domains: Sequence[str], facts: Facts) -> dict[str, Array]:
        """The sums, and the sample of tokens of the layers that need one."""
        counts_only = facts["counts_only"]
        choices, kinds = _labels(layers, facts["ranked"], counts_only)
        num_ids = max(layer.num_ids for layer in layers)
        sizes = {
            "domain": len(domains), "layer": len(layers), "choice": len(choices), "kind": len(kinds),
            "expert": num_ids, "second_expert": num_ids,
        }  # fmt: skip
        paired = any(map(_has_pair_table, layers)) and not counts_only
        sums = summed(sizes, **{name: " ".join(dims) for name, (dims, _) in _SUMS.items() if name != "pair" or paired})
        if counts_only:
            return sums | {name: sums[name]._replace(dtypes=(np.float64,)) for name in _MOMENTS_OF_COUNTS}
        with_sample = [layer for layer in layers if _sampled(layer)]
        return sums | (sampled("sample", with_sample, "domain", len(domains), TOKENS_A_DOMAIN) if with_sample else {})

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The sums by name, and the sample."""
        return {str(name): variable.values for name, variable in self.data.data_vars.items()} | super().arrays()

    @classmethod
    def of_arrays(cls, layers: Sequence[Layer], domains: Sequence[str], facts: Facts, arrays: Arrays) -> Self:
        """The tally of these sums and this sample."""
        data = _dataset(arrays, domains, layers, *_labels(layers, facts["ranked"], facts["counts_only"]))
        return super().of_arrays(layers, domains, {**facts, "data": data}, arrays)

    def _repr_html_(self) -> str:
        return self.data._repr_html_()


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
    sums: dict[str, NDArray[np.int64]]
    sample: HashSample | None

    @classmethod
    def need(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> None:
        """Nothing: every trace has a tally."""

    @classmethod
    def prepare(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> Callable[[], Self]:
        """What makes empty counters."""
        return lambda: cls.zeros(trace.domains, layers)

    @classmethod
    def of_counts(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> Tally:
        """The tally of a trace of counts. G documents of a part; the rest as in `kernels`, C being "all" alone."""
        total = Tally.empty(layers, trace.domains, counts_only=True, ranked=False)
        sums = {
            name: array[:, :, 0] if _SUMS[name][0][2:3] == ("choice",) else array
            for name, array in total.arrays().items()
        }
        numbers, top_k_L = [layer.layer for layer in layers], np.array([layer.top_k for layer in layers])
        for counts in trace.iter_counts():
            starts_G = counts.document_starts()
            codes = np.array([trace.domains.index(name) for name in counts.domain_names])
            domain_G = codes[counts.domain[starts_G[:-1]]]
            asked = np.isin(counts.layer, numbers)
            g = np.repeat(np.arange(len(domain_G)), np.diff(starts_G))[asked]
            layer, y = np.searchsorted(numbers, counts.layer[asked]), counts.count[asked]
            made_GL = np.zeros((len(domain_G), len(layers)), np.int64)
            np.add.at(made_GL, (g, layer), y)
            np.add.at(sums["documents"], domain_G, 1)
            np.add.at(sums["tokens"], domain_G, (made_GL // top_k_L).max(axis=1))
            np.add.at(sums["made"], domain_G, made_GL)
            np.add.at(sums["made_squared"], domain_G, made_GL.astype(float) ** 2)
            cell = domain_G[g], layer, counts.expert[asked]
            np.add.at(sums["loads"], cell, y)
            np.add.at(sums["loads_squared"], cell, y.astype(float) ** 2)
            np.add.at(sums["loads_by_made"], cell, y.astype(float) * made_GL[g, layer])
        return total

    @classmethod
    def zeros(cls, domains: Sequence[str], layers: Sequence[Layer]) -> Self:
        """A counter of nothing."""
        num_ids = max(layer.num_ids for layer in layers)
        # The pairs of the layers that have a table only, and of none no table: it has the square of the ids.
        paired_ids = max((layer.num_ids for layer in layers if _has_pair_table(layer)), default=0)
        sizes = {
            "domain": len(domains), "layer": len(layers), "choice": 1 + max(layer.top_k for layer in layers),
            "kind": len(REPEAT_KINDS), "expert": num_ids, "second_expert": paired_ids,
        }  # fmt: skip
        sums = {}
        for name, (dims, _) in _SUMS.items():
            shape = [sizes["second_expert" if name == "pair" and dim == "expert" else dim] for dim in dims]
            if "layer" in dims:  # first, so that what the kernels add to is contiguous
                shape[:2] = shape[1::-1]
            sums[name] = np.zeros(shape, np.int64)
        widths = {layer.layer: layer.top_k for layer in layers if _sampled(layer)}
        sample = HashSample.empty(len(domains), TOKENS_A_DOMAIN, widths) if widths else None
        return cls(tuple(layers), tuple(domains), sums, sample)

    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count the layers of `group` in a part; what belongs to no layer is counted with the first group."""
        layers, sums = self.layers, self.sums
        starts_G = part.document_starts()
        domain_G = part.domain[starts_G[:-1]].astype(np.int64)
        starts_Q = part.sequence_starts()
        document_Q = np.searchsorted(starts_G, starts_Q[:-1], side="right") - 1
        pairs_G = np.diff(starts_G) - np.bincount(document_Q, minlength=len(domain_G))
        if group[0] == layers[0]:
            for name, made_G in (("documents", 1), ("tokens", np.diff(starts_G)), ("pairs", pairs_G)):
                np.add.at(sums[name], domain_G, made_G)
            np.add.at(sums["pairs_squared"], domain_G, pairs_G**2)
            if self.sample is not None:
                self.sample.begin(part_hashes(part), part.domain)
        for layer in group:
            place = layers.index(layer)
            ids_KT = part.expert_ids[layer.layer].T
            used = slice(None), slice(0, layer.top_k + 1), slice(0, layer.num_ids)
            loads = kernels.LoadSums(
                *(sums[name][place][used] for name in ("loads", "loads_squared", "loads_by_made")),
                *(sums[name][place][used[:2]] for name in ("made", "made_squared")),
            )
            repeats = kernels.RepeatSums(
                *(sums[name][place] for name in ("repeats", "repeats_squared", "repeats_by_pairs"))
            )
            none_dropped = ids_KT.dtype.kind == "u"  # the reader gives signed ids only if some were dropped
            if layer.top_k == 2 and layer.num_ids <= 16 and none_dropped:
                pair = sums["pair"][place][:, : layer.num_ids, : layer.num_ids]
                kernels.count_loads_and_pairs(ids_KT, starts_G, domain_G, loads, pair)
            else:
                kernels.count_loads(ids_KT, starts_G, domain_G, loads)
                if _has_pair_table(layer):
                    pair = sums["pair"][place][:, : layer.num_ids, : layer.num_ids]
                    kernels.count_pairs(ids_KT, part.domain, pair)
            if layer.top_k == 2 and none_dropped:
                kernels.count_repeats_of_two(ids_KT, starts_Q, document_Q, domain_G, pairs_G, repeats)
            else:
                kernels.count_repeats(ids_KT, layer.num_ids, starts_Q, document_Q, domain_G, pairs_G, repeats)
            if self.sample is not None and _sampled(layer):
                self.sample.take(layer.layer, part.expert_ids[layer.layer].__getitem__)
        if self.sample is not None and group[-1] == layers[-1]:
            self.sample.settle()

    def merge(self, other: Self) -> None:
        """Add the counts of other documents, in place."""
        for name, mine in self.sums.items():
            mine += other.sums[name]
        if self.sample is not None and other.sample is not None:
            self.sample.merge(other.sample)

    def result(self) -> Tally:
        """The tally of what was counted."""
        arrays = {
            name: np.ascontiguousarray(sums.swapaxes(0, 1)) if "layer" in _SUMS[name][0] else sums
            for name, sums in self.sums.items()
            if name != "pair" or sums.size  # no layer has a table
        }
        if "pair" in arrays:
            num_ids, paired = self.sums["loads"].shape[3], arrays["pair"]
            arrays["pair"] = np.zeros((*paired.shape[:2], num_ids, num_ids), np.int64)
            arrays["pair"][:, :, : paired.shape[2], : paired.shape[3]] = paired
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


def _has_pair_table(layer: Layer) -> bool:
    return layer.top_k == 2 and layer.num_ids <= MAX_PAIR_TABLE_IDS


def _sampled(layer: Layer) -> bool:
    return layer.top_k > 1 and not _has_pair_table(layer)
