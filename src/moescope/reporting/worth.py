"""What a routing is worth, in words: how large a cache, prefetch or not, which placement; and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isnan

import numpy as np
import xarray as xr

from moescope.reporting.cache_tables import POLICY_NAMES, served
from moescope.reporting.numbers import number, percent, spread
from moescope.reporting.prefetch_tables import default_loaded, predictor_names

_OPTIMUM = "belady"
_BY_EFFORT = ("linear", "eplb", "affinity", "eplb-replicated")
"""Placements that can be advised, what costs least first; random order is a null, not a plan."""


@dataclass(frozen=True)
class Recommendation:
    """One recommendation, in plain words.

    Attributes:
        subject: "Cache size", "Prefetch" or "Placement".
        advice: What to do, a sentence or two.
        evidence: The numbers it rests on, with their 95 % intervals, and what it leaves open.
    """

    subject: str
    advice: str
    evidence: str


def recommendations(
    cache: xr.Dataset | None, prefetch: xr.Dataset | None, parallel: xr.Dataset | None
) -> list[Recommendation]:
    """What to do about caches, prefetch and placement, one recommendation for each result that is given.

    The rules, all of the trace as a whole:

    * **Cache size.** The (policy, size) whose hit ratio is furthest above c/E, what uniform routing gives: up to there
      an expert added gains more than 1/E on average, beyond it less. Sizes are those short of all experts. LRU may be
      advised anywhere, another policy only where the interval of the way it goes from LRU to the optimum lies above 0;
      the optimum never, for it knows the future. Sizes whose intervals above c/E overlap that of the advised one are
      named as not told apart; if that is all of them, or the interval reaches c/E, there is no knee, and every expert
      added helps as much. The price of memory is not known here: a larger cache never hits less but by chance.
    * **Prefetch.** Yes if the predictor with the largest gain over popularity, with as many experts loaded as a token
      chooses, has a gain whose interval lies above 0. It is the best of several, so a gain near 0 is to be doubted.
    * **Placement.** For each kind of batches, from linear on through eplb, affinity and eplb-replicated: the next takes
      the place of the one held if the interval of the paired difference of their slowest-device factors lies below 0.
      So what is simpler is kept unless it is shown to wait longer. Fitted placements are judged on other documents.

    Args:
        cache: Of `moescope.cache`.
        prefetch: Of `moescope.prefetch`.
        parallel: Of `moescope.parallel`.
    """
    made = []
    if cache is not None:
        made.append(_cache_size(cache))
    if prefetch is not None:
        made.append(_prefetch(prefetch))
    if parallel is not None:
        made.append(_placement(parallel))
    return made


def _cache_size(cache: xr.Dataset) -> Recommendation:
    whole = cache.isel(domain=0)
    experts = sorted(set(cache["num_experts"].values.tolist()))
    of_all = f"{experts[0]}" if len(experts) == 1 else f"{experts[0]} to {experts[-1]}"
    whole = whole.sel(size=whole["size"] < experts[-1])
    requests_L = whole["requests"].values
    if not whole.sizes["size"] or not requests_L.any():
        return Recommendation("Cache size", "Nothing to advise.", "No cache short of all experts was played.")
    uniform_Z = (whole["uniform"].values * requests_L[:, None]).sum(axis=0) / requests_L.sum()
    above_PZ = (whole["overall"] - uniform_Z).transpose("policy", "size")
    better = whole["closed_low"].transpose("policy", "size") > 0
    allowed = (better | (whole["policy"] == "lru")) & (whole["policy"] != _OPTIMUM)
    above_PZ = above_PZ.where(allowed)
    if not above_PZ.notnull().any():
        return Recommendation(
            "Cache size", "Nothing to advise.", "LRU, which others are measured against, was not played."
        )
    p, z = np.unravel_index(int(np.nanargmax(above_PZ.values)), above_PZ.shape)
    at = whole.isel(policy=p, size=z)
    policy, size = str(at["policy"].item()), int(at["size"].item())
    curve = whole.isel(policy=p)
    low_Z, high_Z = curve["overall_low"].values - uniform_Z, curve["overall_high"].values - uniform_Z
    played_Z = curve["overall"].notnull().values
    alike_Z = played_Z & (high_Z >= low_Z[z])
    value, low, high = (at[f"overall{end}"].item() for end in ("", "_low", "_high"))
    kept = f"{size} of {of_all} experts a layer" + (", in one cache," if cache.attrs["budget"] == "global" else "")
    evidence = [
        f"{_upper(served(cache))}, {kept} hit {percent(value)}{spread(value, low, high)} % under "
        f"{POLICY_NAMES[policy]}; uniform routing gives {percent(float(uniform_Z[z]))} %"
        + _if_known(", the tokens of each document in any order {} %", at["overall_null"].item())
        + _if_known("; no policy could hit more than {} %", _of(whole, _OPTIMUM, size))
        + "."
    ]
    if policy != "lru":
        closed, closed_low, closed_high = (at[f"closed{end}"].item() for end in ("", "_low", "_high"))
        evidence.append(
            f"LRU hits {percent(_of(whole, 'lru', size))} %: {POLICY_NAMES[policy]} goes {percent(closed)}"
            f"{spread(closed, closed_low, closed_high)} % of the way from there to the optimum."
        )
    if isnan(low):
        evidence.append("There are too few documents to say how sure this is.")
    if low_Z[z] <= 0:
        advice = (
            "No knee: no cache is shown to hit more than its share of the experts, so each one added helps as much."
        )
    elif np.count_nonzero(played_Z) == 1:
        advice = f"{kept[0].upper()}{kept[1:]} was the only size played; whether another serves better is not known."
    elif alike_Z[played_Z].all():
        advice = "No knee: every expert added helps about as much. As many as there is memory for."
    else:
        advice = (
            f"{kept} ({POLICY_NAMES[policy]}): up to there an expert added gains more than it would under uniform "
            "routing, beyond it less."
        )
        others = curve["size"].values[alike_Z].tolist()
        if len(others) > 1:
            advice += f" Sizes from {others[0]} to {others[-1]} are not told apart."
    return Recommendation("Cache size", advice, " ".join(evidence))


def _of(whole: xr.Dataset, policy: str, size: int) -> float:
    if policy not in whole["policy"].values:
        return float("nan")
    return float(whole["overall"].sel(policy=policy, size=size))


def _prefetch(prefetch: xr.Dataset) -> Recommendation:
    loaded = default_loaded(prefetch)
    at = prefetch.sel(loaded=loaded[0])
    gain_P = at["model_gain"].where(prefetch["kind"] != "popularity").values
    if np.isnan(gain_P).all():
        return Recommendation(
            "Prefetch",
            "Nothing to advise.",
            "No predictor beside popularity reaches the layers, or no expert was needed.",
        )
    p = int(np.nanargmax(gain_P))
    one = at.isel(predictor=p)
    recall = [one[f"model_{name}"].item() for name in ("recall", "low", "high")]
    gain = [one[f"model_gain{end}"].item() for end in ("", "_low", "_high")]
    popularity = at["model_recall"].isel(predictor=prefetch["kind"].values.tolist().index("popularity")).item()
    sign = "−" if gain[0] < 0 else ""
    number_of = np.count_nonzero(~np.isnan(gain_P))
    evidence = [
        f"With {loaded[0]} experts loaded, as many as a token needs, {percent(recall[0])}{spread(*recall)} % of the "
        f"needed ones are there; by popularity alone {percent(popularity)} %. The difference is {sign}"
        f"{percent(abs(gain[0]))}{spread(*gain)} points"
        + (f", the largest of {number_of} predictors." if number_of > 1 else ".")
    ]
    wider = [float(prefetch["model_recall"].isel(predictor=p).sel(loaded=n)) for n in loaded[1:2]]
    if wider and not isnan(wider[0]) and loaded[1] < int(prefetch["num_experts"].max()):
        evidence.append(f"With {loaded[1]} loaded: {percent(wider[0])} %.")
    if prefetch.attrs["unit"] != "document":
        evidence.append("One document, in stretches: nothing is said of others.")
    if gain[1] > 0:
        by = _PREDICTORS.get(str(one["kind"].item()), predictor_names(prefetch)[p])
        advice = f"Yes, by {by.format(_ahead(int(one['distance'])))}."
    elif isnan(gain[1]):
        advice = "Not known: there are too few documents for an interval."
    else:
        advice = (
            "No: nothing is shown to predict better than a fixed list of the most popular experts, which can be kept."
        )
    if not prefetch.attrs["lookahead_recorded"]:
        evidence.append("What the routers of later layers would have said was not recorded (`--lookahead`).")
    evidence.append("Whether a load ends in time is a matter of the link.")
    return Recommendation("Prefetch", advice, " ".join(evidence))


_PREDICTORS = {
    "lookahead": "asking the router {} ahead",
    "transitions": "tables of transitions from {} before",
    "previous": "the experts of the token before, then the popular ones",
}


def _ahead(distance: int) -> str:
    return "1 layer" if distance == 1 else f"{distance} layers"


def _placement(parallel: xr.Dataset) -> Recommendation:
    names = [name for name in _BY_EFFORT if name in parallel["placement"].values]
    kept, evidence = {}, []
    compared = False
    for batch in parallel["batch"].values.tolist():
        at = parallel.sel(batch=batch)
        known = [name for name in names if not isnan(at["slowest"].sel(placement=name).item())]
        if not known:
            evidence.append(f"{_upper(batch)}: nothing is known, for no batch is full or nothing could be fitted.")
            continue
        compared = compared or len(known) > 1
        held = free = known[0]
        for name in known[1:]:
            if at["slowest_difference_high"].sel(placement=name, against=held).item() < 0:
                held = name
            free = free if name == "eplb-replicated" else held
        kept[batch] = held
        evidence.append(_of_batches(at, batch, held, free, known))
    if not compared:
        evidence.append("There is no other to compare with: fitted placements take two documents at least.")
        return Recommendation("Placement", "Nothing to advise.", " ".join(evidence))
    devices = int(parallel.attrs["devices"])
    on = f"on {devices} {'device' if devices == 1 else 'devices'}"
    if len(set(kept.values())) == 1:
        advice = f"{_upper(_advised(next(iter(kept.values()))))}, {on}."
    else:
        advice = f"{_upper(on)}: " + "; ".join(f"{batch}: {_advised(held)}" for batch, held in kept.items()) + "."
    unfitted = [name for name in names[1:] if np.isnan(parallel["slowest"].sel(placement=name)).all()]
    if unfitted:
        evidence.append(f"There was nothing to fit {', '.join(unfitted)} on.")
    return Recommendation("Placement", advice, " ".join(evidence))


def _advised(held: str) -> str:
    """A placement in words."""
    if held == "linear":
        return "experts in their order (linear), for no placement is shown to wait less"
    if held == "eplb-replicated":
        return "eplb with replicas of the busiest experts (eplb-replicated)"
    return held


def _of_batches(at: xr.Dataset, batch: str, held: str, free: str, known: list[str]) -> str:
    """What the layers wait for under the placement held, and what it and replicas take off."""
    slowest = at["slowest"]
    text = f"{_upper(batch)}: under {held} the slowest device has {_factor(at, held)} times the mean load"
    first = known[0]
    if held != first:
        text += f", {_less(at, held, first)} than {first} ({number(slowest.sel(placement=first).item())})"
    elif len(known) > 1:
        rest = min(known[1:], key=lambda name: slowest.sel(placement=name).item())
        text += f", under {rest}, the next best, {_less(at, rest, first)}"
    if "eplb-replicated" in known and free != first:
        text += f"; replicas make that {_less(at, 'eplb-replicated', free)} than {free}"
    null = at["slowest_shuffled"].sel(placement=held).item()
    return text + _if_known_factor("; without locality it would have {}", null) + "."


def _factor(at: xr.Dataset, name: str) -> str:
    value, low, high = (at[f"slowest{end}"].sel(placement=name).item() for end in ("", "_low", "_high"))
    return f"{number(value)}{_plus_minus(value, low, high)}"


def _less(at: xr.Dataset, name: str, against: str) -> str:
    """The paired difference of two placements, such as "0.19±0.01 less"."""
    value, low, high = (
        at[f"slowest_difference{end}"].sel(placement=name, against=against).item() for end in ("", "_low", "_high")
    )
    return f"{number(abs(value))}{_plus_minus(value, low, high)} {'more' if value > 0 else 'less'}"


def _plus_minus(value: float, low: float, high: float) -> str:
    half = max(value - low, high - value)
    return "" if isnan(half) or half in (0, inf) else f"±{number(half)}"


def _if_known(text: str, share: float) -> str:
    return "" if isnan(share) else text.format(percent(share))


def _if_known_factor(text: str, factor: float) -> str:
    return "" if isnan(factor) else text.format(number(factor))


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
