"""Words that several subjects use: for choices and experts, and how lists and sentences are put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import xarray as xr

from moescope.reporting.numbers import count
from moescope.reporting.visible import visible
from moescope.tallying import Counted
from moescope.trace import Trace
from moescope.trace.cover import cover
from moescope.trace.excluding import excluded


def describe_choice(choice: str, top_k: int) -> str:
    """Words for a coordinate of choice.

    Example:
        >>> describe_choice("all", 2), describe_choice("all", 8), describe_choice("4th", 8)
        ('first or second choice', 'any of the 8 choices', '4th choice')
    """
    return describe_any(top_k) if choice == "all" else f"{choice} choice"


def describe_any(top_k: int) -> str:
    """Words for all choices of a token taken together."""
    return {1: "the one choice", 2: "first or second choice"}.get(top_k, f"any of the {top_k} choices")


def choice_of(result: xr.Dataset) -> str:
    """Words for the choice that a result is of, which its attributes name."""
    return describe_choice(str(result.attrs["choice"]), int(result["top_k"].values.max()))


def first_or_all(counted: Counted) -> Literal["first", "all"]:
    """The choice to measure: the first, or all where a layer does not say which is the first."""
    return "first" if all(layer.ranked for layer in counted.layers) else "all"


def describe_kind(kind: str, result: xr.Dataset) -> str:
    """Words for a coordinate of kind."""
    return "first choice" if kind == "first" else describe_any(int(result["top_k"].values.max()))


def known_kinds(result: xr.Dataset, name: str = "rate") -> list[str]:
    """The kinds of repeats, or of agreement, that are known, and say different things."""
    kinds = [kind for kind in result["kind"].values.tolist() if result[name].sel(kind=kind).notnull().any()]
    return kinds[:1] if int(result["top_k"].values.max()) == 1 else kinds or ["any"]


def expert_name(expert: int, num_experts: int) -> str:
    """What an expert id is called; those from `num_experts` on are null experts."""
    return str(expert) if expert < num_experts else f"{expert} (null)"


def capital(text: str) -> str:
    """The text with a capital in front."""
    return text[:1].upper() + text[1:]


def listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them.

    Example:
        >>> listed(["a"]), listed(["a", "b", "c"])
        ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def describe_size(trace: Trace) -> str:
    """What a trace holds, in numbers."""
    tokens = "" if trace.header.counts_only else f"{count(trace.num_tokens, 'token')} of "
    documents, domains = count(trace.num_documents, "document"), count(len(trace.domains), "domain")
    return f"{tokens}{documents} in {domains}, {count(len(trace.layers), 'layer')}"


def describe_cover(fraction: float) -> str:
    """Words for the fraction of the tokens that a layer covers; all and none are said of all and none only.

    Example:
        >>> describe_cover(0.5), describe_cover(0.9999)
        ('50 % of the tokens recorded', '99 % of the tokens recorded')
    """
    percent = round(100 * fraction)
    return f"{percent if fraction in (0, 1) else min(99, max(1, percent))} % of the tokens recorded"


def cover_notes(trace: Trace, layers: Iterable[int] | None = None) -> Iterator[str]:
    """What to know of a trace of which tokens were left out, or of whose layers some cover only some of the tokens."""
    if items := excluded(trace.header):
        yield f"Left out: {', '.join(map(visible, items))}."
    partial = [layer for layer in trace.select_layers(layers) if layer.partial]
    if partial:
        covers = "; ".join(f"layer {layer.layer}: {describe_cover(cover(trace, layer))}" for layer in partial)
        yield f"{covers}. A token that one of the layers lacks is in none of the numbers; --layers leaves layers out."
