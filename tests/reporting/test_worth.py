"""The three recommendations: their rules on results made by hand, and what they say of routing that is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from synthetic import make_part, make_trace

import moescope
from moescope.measures.schema import DIFFERENCE, FRACTION
from moescope.reporting.subject import Recommendation
from moescope.reporting.subjects import load
from moescope.trace import Layer, Trace

NAN = float("nan")


def cache_of(
    hits: dict[str, list[float]], half: float = 0.01, closed: dict[str, list[float]] | None = None, top_k: int = 1
) -> xr.Dataset:
    """One layer of as many experts as sizes, of a whole trace; `closed` with intervals of 0.05 on both sides."""
    overall = np.array(list(hits.values()))[:, None]
    num_experts = overall.shape[-1] + top_k - 1
    way = np.array([(closed or {}).get(policy, [NAN] * overall.shape[-1]) for policy in hits])[:, None]
    flat = ("policy", "domain", "size")
    sizes = np.arange(top_k, num_experts + 1)
    return xr.Dataset(
        {
            "model_hit_ratio": (flat, overall, {"units": FRACTION}),
            "model_hit_ratio_low": (flat, overall - half),
            "model_hit_ratio_high": (flat, overall + half),
            "model_hit_ratio_null": (flat, overall - 0.04),
            "closed": (flat, way, {"units": FRACTION}),
            "closed_low": (flat, way - 0.05),
            "closed_high": (flat, way + 0.05),
            "model_hit_ratio_uniform": (("domain", "size"), sizes[None] / num_experts),
            "requests": (("domain", "layer"), [[1000]]),
            "num_experts": ("layer", [num_experts]),
            "top_k": ("layer", [top_k]),
        },
        {"policy": list(hits), "domain": ["(all)"], "total": ("domain", [True]), "layer": [0], "size": sizes},
        {"budget": "layer", "batch": 1, "prefill": 0},
    )


def recommendations(cache, prefetch, parallel) -> list[Recommendation]:
    """As a report makes them, of what is given."""
    found = {"cache": cache, "prefetch": prefetch, "parallel": parallel}
    return [load(name).advise(result) for name, result in found.items() if result is not None]


def advice(cache=None, prefetch=None, parallel=None) -> str:
    (only,) = recommendations(cache, prefetch, parallel)
    return only.advice


# ------------------------------------------------------------------------------------------------------- cache


def test_the_cache_advised_is_furthest_above_uniform_routing() -> None:
    hits = {"lru": [0.30, 0.65, 0.85, 1.0], "belady": [0.30, 0.90, 0.99, 1.0]}  # LRU above c/E: 0.05, 0.15, 0.10
    cache = cache_of(hits)
    (one,) = recommendations(cache, None, None)
    assert one.advice.startswith("2 of 4 experts a layer (LRU)")
    assert "told apart" not in one.advice
    assert "65.0±1.0 % under LRU; uniform routing gives 50.0 %" in one.evidence
    assert "any order 61.0 %" in one.evidence
    assert "no policy could hit more than 90.0 %" in one.evidence


def test_sizes_whose_intervals_overlap_that_of_the_best_are_named() -> None:
    text = advice(cache_of({"lru": [0.21, 0.55, 0.76, 0.85, 1.0]}))  # above c/E: 0.01, 0.15, 0.16, 0.05
    assert text.startswith("3 of 5 experts")
    assert text.endswith("Sizes from 2 to 3 are not told apart.")


@pytest.mark.parametrize(
    ("hits", "said"),
    [
        ([0.251, 0.501, 0.755, 1.0], "No knee: no cache is shown to hit more than its share"),
        ([0.24, 0.49, 0.74, 1.0], "No knee: no cache is shown to hit more than its share"),  # cold caches
        ([0.35, 0.605, 0.86, 1.0], "No knee: every expert added helps about as much"),
    ],
)
def test_there_is_no_knee_where_every_expert_added_helps_as_much(hits: list[float], said: str) -> None:
    assert advice(cache_of({"lru": hits})).startswith(said)


def test_another_policy_than_lru_is_advised_only_where_it_is_shown_to_be_better() -> None:
    hits = {"lru": [0.3, 0.6, 0.8, 1.0], "aged-lfu": [0.3, 0.63, 0.81, 1.0], "belady": [0.3, 0.9, 0.95, 1.0]}
    shown = cache_of(hits, closed={"aged-lfu": [NAN, 0.1, 0.1, NAN]})
    assert advice(shown).startswith("2 of 4 experts a layer (LFU, aged)")
    assert "10.0±5.0 % of the way" in recommendations(shown, None, None)[0].evidence
    unsure = cache_of(hits, closed={"aged-lfu": [NAN, 0.04, 0.04, NAN]})
    assert advice(unsure).startswith("2 of 4 experts a layer (LRU)")


def test_neither_the_optimum_nor_a_cache_of_all_experts_is_advised() -> None:
    assert advice(cache_of({"belady": [0.3, 0.9, 0.95, 1.0]})) == "Nothing to advise."
    assert advice(cache_of({"lru": [1.0]}, top_k=4)) == "Nothing to advise."


def test_a_single_size_has_no_knee_to_be_seen() -> None:
    text = advice(cache_of({"lru": [0.3, 0.65, 0.8, 1.0]}).sel(size=[2]))
    assert text == "2 of 4 experts a layer was the only size simulated; whether another serves better is not known."


# ---------------------------------------------------------------------------------------------------- prefetch


def prefetch_of(gain: float, half: float, lookahead: int = 1, unit: str = "document") -> xr.Dataset:
    loaded = np.arange(1, 9)
    popular = np.linspace(0.2, 1, 8)
    gains = np.outer([gain, 0.0], 1 - popular) / (1 - popular[1])  # as given at two loaded, of two experts a token
    flat = ("predictor", "loaded")
    return xr.Dataset(
        {
            "model_recall": (flat, popular + gains, {"units": FRACTION}),
            "model_recall_low": (flat, popular + gains - 0.02),
            "model_recall_high": (flat, popular + gains + 0.02),
            "model_gain": (flat, gains, {"units": DIFFERENCE}),
            "model_gain_low": (flat, gains - half),
            "model_gain_high": (flat, gains + half),
        },
        {
            "predictor": ["lookahead 2", "popularity"],
            "kind": ("predictor", ["lookahead", "popularity"]),
            "distance": ("predictor", [2, 0]),
            "layer": [2],
            "num_experts": ("layer", [8]),
            "top_k": ("layer", [2]),
            "loaded": loaded,
        },
        {"unit": unit, "lookahead_recorded": lookahead, "pooled_layers": [2]},
    )


def test_prefetch_is_advised_if_the_interval_of_its_gain_over_popularity_lies_above_zero() -> None:
    (yes,) = recommendations(None, prefetch_of(0.1, 0.09), None)
    assert yes.advice == "Yes, by asking the router 2 layers ahead."
    assert "41.4±2.0 % of the needed ones are there; by popularity alone 31.4 %" in yes.evidence
    assert "10.0±9.0 points" in yes.evidence
    assert "With 4 loaded: 61.0 %" in yes.evidence
    for gain, half in ((0.1, 0.11), (-0.1, 0.01)):
        assert advice(None, prefetch_of(gain, half)).startswith("No: nothing is shown to predict better")
    assert "−10.0±1.0 points" in recommendations(None, prefetch_of(-0.1, 0.01), None)[0].evidence


def test_prefetch_without_an_interval_is_not_known_and_what_the_trace_lacks_is_said() -> None:
    assert advice(None, prefetch_of(0.1, NAN)).startswith("Not known")
    assert "was not recorded" in recommendations(None, prefetch_of(0.1, 0.01, lookahead=0), None)[0].evidence
    one = recommendations(None, prefetch_of(0.1, 0.01, unit="stretch of the only document"), None)[0]
    assert "nothing is said of others" in one.evidence
    alone = prefetch_of(0.1, 0.01).isel(predictor=[1])
    assert advice(None, alone) == "Nothing to advise."


# --------------------------------------------------------------------------------------------------- placement


def parallel_of(slowest: dict[str, list[float]], half: float, batches: list[str]) -> xr.Dataset:
    names = list(slowest)
    value = np.array([slowest[name] for name in names])
    less = value[:, None] - value[None]
    flat, versus = ("placement", "batch"), ("placement", "against", "batch")
    return xr.Dataset(
        {
            "slowest": (flat, value),
            "slowest_low": (flat, value - 0.2),  # wide: what counts is the paired difference
            "slowest_high": (flat, value + 0.2),
            "slowest_null": (flat, np.full(value.shape, 1.05)),
            "slowest_difference": (versus, less),
            "slowest_difference_low": (versus, less - half),
            "slowest_difference_high": (versus, less + half),
        },
        {"placement": names, "against": names, "batch": batches},
        {"devices": 4},
    )


def test_a_placement_takes_the_place_of_a_simpler_one_only_if_it_is_shown_to_wait_less() -> None:
    slowest = {"linear": [1.5], "random": [1.1], "eplb": [1.4], "eplb-replicated": [1.33], "affinity": [1.38]}
    (one,) = recommendations(None, None, parallel_of(slowest, 0.03, ["prefill 64"]))
    assert one.advice == "Eplb with replicas of the busiest experts (eplb-replicated), on 4 devices."
    assert "1.33±0.20 times the mean load, 0.17±0.03 less than linear (1.50)" in one.evidence
    assert "replicas make that 0.07±0.03 less than eplb" in one.evidence  # affinity is not told apart from it
    assert "without locality it would have 1.05" in one.evidence
    assert advice(None, None, parallel_of(slowest, 0.08, ["prefill 64"])) == "Eplb, on 4 devices."
    text = advice(None, None, parallel_of(slowest, 0.18, ["prefill 64"]))
    assert text == "Experts in their order (linear), for no placement is shown to wait less, on 4 devices."


def test_kinds_of_batches_may_be_advised_differently_and_one_that_never_filled_is_left_out() -> None:
    slowest = {"linear": [1.5, 1.3, NAN], "eplb": [1.4, 1.3, NAN]}
    (one,) = recommendations(None, None, parallel_of(slowest, 0.03, ["prefill 64", "decode 8", "decode 99"]))
    assert one.advice.startswith("On 4 devices: prefill 64: eplb; decode 8: experts in their order (linear)")
    assert "Decode 99: nothing is known" in one.evidence


def test_a_placement_that_is_compared_with_none_is_not_advised() -> None:
    (one,) = recommendations(None, None, parallel_of({"linear": [1.5], "random": [1.4]}, 0.03, ["prefill 64"]))
    assert one.advice == "Nothing to advise."
    assert "1.50±0.20 times the mean load" in one.evidence
    assert "fitted placements take two documents at least" in one.evidence
    alone = parallel_of({"linear": [1.5], "eplb": [NAN]}, 0.03, ["prefill 64"])
    assert advice(None, None, alone) == "Nothing to advise."


# ------------------------------------------------------------------------------------------------- whole traces


def routed(path: Path, scores_of, documents: int = 40) -> Trace:
    layers = (Layer(0, 8, 2), Layer(1, 8, 2))
    rng = np.random.default_rng(7)
    part = make_part(rng, layers, [60] * documents)
    for layer in (0, 1):
        scores = rng.gumbel(size=(part.num_tokens, 8)) + scores_of(rng, part)
        part.expert_ids[layer][:] = np.argsort(-scores, axis=1)[:, :2]
    return make_trace(path, [part], layers)


def all_of(trace: Trace):
    return recommendations(
        moescope.cache(trace, threads=1),
        moescope.prefetch(trace, threads=1),
        moescope.parallel(trace, devices=4, prefill=60, decode=8, placements=["linear", "eplb", "affinity"], threads=1),
    )


def test_uniform_routing_has_no_knee_nothing_to_prefetch_and_needs_no_fitted_placement(tmp_path: Path) -> None:
    cache, prefetch, placement = all_of(routed(tmp_path / "t.moe", lambda rng, part: 0.0))
    assert cache.advice.startswith("No knee")
    assert prefetch.advice.startswith("No")
    assert placement.advice.startswith("Experts in their order (linear)")


def test_documents_that_keep_to_a_few_experts_have_a_knee_and_can_be_prefetched(tmp_path: Path) -> None:
    def scores(rng: np.random.Generator, part) -> np.ndarray:
        liked = np.argsort(rng.random((40, 8)), axis=1)[:, :3]
        of_document = np.zeros((40, 8))
        np.put_along_axis(of_document, liked, 3.0, axis=1)
        return of_document[part.document.astype(int)]

    cache, prefetch, placement = all_of(routed(tmp_path / "t.moe", scores))
    assert cache.advice[:14] in ("3 of 8 experts", "4 of 8 experts")
    assert prefetch.advice.startswith("Yes, by")
    assert "on 4 devices" in placement.advice.lower()
