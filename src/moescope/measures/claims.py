"""The claims of section 5 of Mixtral of Experts, answered for the model of a trace.

An answer is "yes" or "no" only where an interval or a corrected test decides; "mixed" where layers or domains disagree;
"not enough data" where nothing decides. The evidence names the numbers the answer rests on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr

from moescope.tallying import INDENTATION

Answer = Literal["yes", "no", "mixed", "not enough data"]

SIGNIFICANT = 0.05
"""False discovery rate at which a difference counts as found."""

TOPIC_BITS = 0.01
"""Divergence from the other domains, bits, below which shares look alike in a figure: of eight experts, two would have
to differ by some four points each. Mixtral's own published counts lie below (I(domain; expert) 0.003 to 0.009 bits at
layers 0, 15 and 31 as counted by OLMoE's authors), OLMoE's far above (0.17 to 0.50)."""

MATHEMATICS = "DM Mathematics"


@dataclass(frozen=True)
class Claim:
    """One claim and what this trace says of it.

    Attributes:
        name: Short name.
        statement: The paper's claim, in our words.
        answer: Whether it holds for this model on this corpus.
        evidence: The numbers behind the answer, with interval and null.
    """

    name: str
    statement: str
    answer: Answer
    evidence: str


def claims(
    shares: xr.Dataset, repeats: xr.Dataset | None, divergence: xr.Dataset, words: xr.Dataset | None = None
) -> list[Claim]:
    """Answer each claim of section 5 from the results of the measures.

    Args:
        shares: Of `moescope.shares`.
        repeats: Of `moescope.repeats`; None if the trace does not tell what token follows what.
        divergence: Of `moescope.divergence`.
        words: Of `moescope.words`; None leaves out the claims about words.
    Returns:
        The claims in the order of the paper.
    """
    found = [
        _topic(divergence),
        _mathematics(divergence),
        _first_and_last(divergence),
        *([] if words is None else [_word(words, name) for name in words["word"].values.tolist()]),
        *(_about_first(name, statement, repeats, judge) for name, statement, judge in _LOCALITY),
    ]
    return found


def _topic(divergence: xr.Dataset) -> Claim:
    statement = "The choice of experts shows no obvious pattern by topic: the domains use them alike."
    value, q = divergence["jsd_rest"], divergence["q_value"]
    known = np.isfinite(q.values)
    if not known.any():
        return Claim("No pattern by topic", statement, "not enough data", _too_few_documents())
    different = (q.values < SIGNIFICANT) & known
    large = divergence["jsd_rest_low"].values > TOPIC_BITS
    small = divergence["jsd_rest_high"].values < TOPIC_BITS
    top = _largest(value)
    evidence = (
        f"{int(different.sum())} of {int(known.sum())} domain-layer pairs differ from the other domains (false "
        f"discovery rate {SIGNIFICANT:.0%}); {int((large & known).sum())} of them by surely more than {TOPIC_BITS} "
        f"bits, the size that shows in a figure. Largest: {_divergence_at(divergence, *top)}."
    )
    if (large & known).mean() > 0.5:
        return Claim("No pattern by topic", statement, "no", evidence)
    if (small | ~known).all():
        return Claim("No pattern by topic", statement, "yes", evidence)
    if not (large & known).any():
        return Claim("No pattern by topic", statement, "not enough data", evidence)
    return Claim("No pattern by topic", statement, "mixed", evidence)


def _mathematics(divergence: xr.Dataset) -> Claim:
    statement = "Only DM Mathematics uses the experts a little differently from the other domains."
    name = "DM Mathematics stands out"
    value = divergence["jsd_rest"]
    if MATHEMATICS not in value["domain"].values:
        return Claim(name, statement, "not enough data", f"The corpus has no domain {MATHEMATICS}.")
    if not np.isfinite(divergence["q_value"].sel(domain=MATHEMATICS)).any():
        return Claim(name, statement, "not enough data", _too_few_documents())
    leader = value.fillna(-1).argmax("domain").values
    leads = value["domain"].values[leader] == MATHEMATICS
    different = divergence["q_value"].sel(domain=MATHEMATICS).values < SIGNIFICANT
    rank = (value.values > value.sel(domain=MATHEMATICS).values[None]).sum(axis=0) + 1
    evidence = (
        f"It differs from the others at {int(different.sum())} of {len(leads)} layers (false discovery rate "
        f"{SIGNIFICANT:.0%}) and is the most different domain at {int(leads.sum())} (its rank among "
        f"{value.sizes['domain']} domains, by layer: {', '.join(map(str, rank.tolist()))}). Most: "
        f"{_divergence_at(divergence, MATHEMATICS, _top_layer(value.sel(domain=MATHEMATICS)))}."
    )
    stands_out = leads & different
    answer: Answer = "yes" if stands_out.mean() > 0.5 else "mixed" if stands_out.any() else "no"
    return Claim(name, statement, answer, evidence)


def _first_and_last(divergence: xr.Dataset) -> Claim:
    statement = "Domains differ most at the first and last layer, whose states are close to input and output."
    name = "First and last layer differ most"
    value = divergence["jsd_rest"]
    if value.sizes["layer"] < 3:
        return Claim(name, statement, "not enough data", "Fewer than three layers were recorded.")
    if not np.isfinite(value.values).any():
        return Claim(name, statement, "not enough data", "There is one domain.")
    mean = value.mean("domain")
    order = mean["layer"].values[np.argsort(-mean.values, kind="stable")]
    ends = {int(mean["layer"].values[0]), int(mean["layer"].values[-1])}
    top_two = set(order[:2].tolist())
    listed = ", ".join(f"{layer}: {mean.sel(layer=layer).item():.4f}" for layer in mean["layer"].values.tolist())
    evidence = f"Mean divergence of a domain from the others, bits, by layer: {listed}."
    answer: Answer = "yes" if top_two == ends else "mixed" if top_two & ends else "no"
    return Claim(name, statement, answer, evidence)


def _word(words: xr.Dataset, name: str) -> Claim:
    row = words.sel(word=name)
    what = "Indentation" if name == INDENTATION else f"The word “{name}”"
    statement = f"{what} goes to the same expert wherever it stands."
    title = f"{what} has an expert"
    if not np.isfinite(row["same_low"]).any():
        found = f"{int(row['occurrences'])} occurrences in {int(row['documents'])} documents"
        return Claim(title, statement, "not enough data", f"{found}; at least three documents are needed.")
    above = row["same_low"].values > row["same_null"].values
    layer = _top_layer(row["same"])
    at = row.sel(layer=layer)
    evidence = (
        f"In {int(row['occurrences'])} occurrences ({int(row['tokens'])} tokens, {int(row['documents'])} documents), "
        "two "
        f"of its tokens from different documents have the same first choice more often than any two tokens do at "
        f"{int(above.sum())} of {len(above)} layers. Most at layer {layer}: {at['same'].item():.1%} "
        f"({at['same_low'].item():.1%} to {at['same_high'].item():.1%}) against {at['same_null'].item():.1%}; "
        f"{at['top_share'].item():.1%} go to expert {int(at['top_expert'])}."
    )
    several = int(row["multi_token"])
    if several and np.isfinite(at["together"]):
        evidence += (
            f" Of its {several} occurrences of several tokens, {at['together'].item():.1%} stay with one expert there; "
            f"token ids alone predict {at['together_null'].item():.1%}."
        )
    answer: Answer = "yes" if above.mean() > 0.5 else "mixed" if above.any() else "no"
    return Claim(title, statement, answer, evidence)


def _about_first(name: str, statement: str, repeats: xr.Dataset | None, judge: Judge) -> Claim:
    """A claim about repeated first choices, which not every trace can tell."""
    if repeats is None:
        return Claim(name, statement, "not enough data", "The trace holds counts, not the order of tokens.")
    if "first" not in repeats["kind"].values:
        return Claim(name, statement, "not enough data", "The trace does not say which choice is a token's first.")
    return judge(name, statement, repeats)


def _locality(name: str, statement: str, repeats: xr.Dataset) -> Claim:
    rate, marginal = repeats.sel(kind="first"), repeats["marginal"].sel(kind="first")
    known = np.isfinite(rate["low"].values)
    if not known.any():
        return Claim(name, statement, "not enough data", _too_few_documents())
    above = (rate["low"].values > marginal.values) & known
    below = (rate["high"].values < marginal.values) & known
    excess = rate["rate"] - marginal
    domain, layer = _largest(excess)
    at = rate.sel(domain=domain, layer=layer)
    evidence = (
        f"The first choice repeats above the marginal null in {int(above.sum())} and below it in {int(below.sum())} of "
        f"{int(known.sum())} domain-layer pairs (95 % intervals). Largest excess: {domain}, layer {layer}: "
        f"{at['rate'].item():.1%} ({at['low'].item():.1%} to {at['high'].item():.1%}), marginal null "
        f"{marginal.sel(domain=domain, layer=layer).item():.1%}, uniform {at['uniform'].item():.1%}."
    )
    share = above.sum() / known.sum()
    answer: Answer = "yes" if share > 0.9 else "mixed" if above.any() else "no"
    return Claim(name, statement, answer, evidence)


def _locality_grows(name: str, statement: str, repeats: xr.Dataset) -> Claim:
    if repeats.sizes["layer"] < 3:
        return Claim(name, statement, "not enough data", "Fewer than three layers were recorded.")
    first = repeats.sel(kind="first")
    layers = first["layer"].values.tolist()
    places = [layers[0], layers[(len(layers) - 1) // 2], layers[-1]]
    excess = (first["rate"] - first["marginal"]).mean("domain")
    if not np.isfinite(excess.sel(layer=places)).all() or not np.isfinite(first["low"]).any():
        return Claim(name, statement, "not enough data", _too_few_documents())
    start, middle, end = (excess.sel(layer=layer).item() for layer in places)
    surely = [
        bool((first["low"].sel(layer=layer) > first["high"].sel(layer=layers[0])).mean() > 0.5) for layer in places[1:]
    ]
    evidence = (
        f"Excess of the repeated first choice over the marginal null, mean of the domains, percentage points: layer "
        f"{places[0]} {100 * start:+.1f}, layer {places[1]} {100 * middle:+.1f}, layer {places[2]} {100 * end:+.1f}."
    )
    answer: Answer = "yes" if all(surely) else "mixed" if any(surely) else "no"
    return Claim(name, statement, answer, evidence)


def _locality_by_domain(name: str, statement: str, repeats: xr.Dataset) -> Claim:
    first = repeats.sel(kind="first")
    if first.sizes["domain"] < 2 or not np.isfinite(first["low"]).any():
        return Claim(name, statement, "not enough data", "At least two domains of several documents are needed.")
    spread = first["rate"].max("domain") - first["rate"].min("domain")
    apart = first["low"].max("domain").values > first["high"].min("domain").values
    layer = _top_layer(spread)
    at = first.sel(layer=layer)
    high, low = (at.isel(domain=int(index)) for index in (at["rate"].values.argmax(), at["rate"].values.argmin()))
    evidence = (
        f"The intervals of the most and the least repeating domain are apart at {int(apart.sum())} of {len(apart)} "
        "layers. "
        f"Most at layer {layer}: {high['domain'].item()} {high['rate'].item():.1%} "
        f"({high['low'].item():.1%} to {high['high'].item():.1%}), {low['domain'].item()} {low['rate'].item():.1%} "
        f"({low['low'].item():.1%} to {low['high'].item():.1%})."
    )
    answer: Answer = "yes" if apart.mean() > 0.5 else "mixed" if apart.any() else "no"
    return Claim(name, statement, answer, evidence)


Judge = Callable[[str, str, xr.Dataset], Claim]
_LOCALITY: tuple[tuple[str, str, Judge], ...] = (
    (
        "Consecutive tokens repeat",
        "Consecutive tokens are sent to the same expert more often than at random.",
        _locality,
    ),
    (
        "Repetition grows with depth",
        "Repetition is close to random at the first layer and far above it at the middle and the last.",
        _locality_grows,
    ),
    (
        "Repetition depends on the domain",
        "How often assignments repeat depends on the domain; code and mathematics differ from prose in it.",
        _locality_by_domain,
    ),
)


def _largest(values: xr.DataArray) -> tuple[str, int]:
    """Domain and layer of the largest value."""
    domain, layer = np.unravel_index(int(np.nanargmax(values.values)), values.shape)
    return str(values["domain"].values[domain]), int(values["layer"].values[layer])


def _top_layer(by_layer: xr.DataArray) -> int:
    return int(by_layer["layer"].values[int(np.nanargmax(by_layer.values))])


def _divergence_at(divergence: xr.Dataset, domain: str, layer: int) -> str:
    at = divergence.sel(domain=domain, layer=layer)
    return (
        f"{domain}, layer {layer}: {at['jsd_rest'].item():.4f} bits ({at['jsd_rest_low'].item():.4f} to "
        f"{at['jsd_rest_high'].item():.4f}; {at['jsd_rest_null'].item():.4f} expected from sampling alone)"
    )


def _too_few_documents() -> str:
    return "Intervals need at least two documents a domain."
