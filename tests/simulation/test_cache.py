"""Caches of experts against slow ones, all choices of evictions, another simulator and what theory says."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import slow_caches
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_caches import InMemory, Key, Ranked, S3Fifo, Sequenced
from synthetic import make_counts, make_part, make_trace

import moescope
from moescope.errors import NotRecorded
from moescope.simulation import POLICIES
from moescope.simulation.playing import AGEING, LIBRARY, LIBRARY_TOKENS
from moescope.simulation.serving import document_folds
from moescope.trace import Layer, Part

EVERYTHING = "(all)"


def slow_hits(
    parts: list[Part],
    layers: list[Layer],
    policy: str,
    size: int,
    *,
    budget: str = "layer",
    batch: int = 1,
    prefill: int | None = None,
    cold: bool = False,
) -> tuple[Counter[tuple[int, int]], Counter[tuple[int, int]]]:
    """Hits and requests by (document, place of the layer)."""
    sequences = slow_caches.sequences_of(parts, layers)
    steps = slow_caches.steps_of(sequences, batch, prefill, cold)
    hits: Counter[tuple[int, int]] = Counter()
    requests: Counter[tuple[int, int]] = Counter()
    matches = _matches(sequences, layers) if policy == "matching" else {}
    worths: dict[frozenset[int], dict[Key, int]] = {}
    for places in [range(len(layers))] if budget == "global" else [[at] for at in range(len(layers))]:
        capacity = min(size * len(places), sum(layers[at].num_experts for at in places))
        cache = S3Fifo(capacity) if policy == "s3-fifo" else Ranked(policy, capacity, AGEING)
        groups = list(slow_caches.groups_of(sequences, steps, list(places)))
        for at, (owners, fresh, step, last_layer) in enumerate(groups):
            group = [key for key, _ in owners]
            if fresh:
                cache.empty()
            worth: dict[Key, int] = {}
            if policy == "belady":
                worth = _negative_next_uses(groups, at)
            if policy in ("hot", "matching"):
                worth = _sum_of_worths(sequences, layers, step, matches, worths)
            for (key, q), hit in zip(owners, cache.serve(group, worth, last_layer), strict=True):
                cell = sequences[q].document, key[0]
                requests[cell] += 1
                hits[cell] += hit
    return hits, requests


def _negative_next_uses(groups: list, at: int) -> dict[Key, int]:
    found: dict[Key, int] = {}
    for later in range(at + 1, len(groups)):
        for key, _ in groups[later][0]:
            found.setdefault(key, -later)
    return {key: found.get(key, -(10**9)) for group, *_ in groups for key, _ in group}


def _loads(sequences: list[Sequenced], keep: frozenset[int], place: int, num_experts: int) -> np.ndarray:
    chosen = [e for s in sequences if s.document in keep for token in s.tokens for e in token[place]]
    return np.bincount(chosen, minlength=num_experts)[:num_experts]


def _shares(loads: np.ndarray) -> list[int]:
    return np.rint(2**40 * loads / max(loads.sum(), 1)).astype(np.int64).tolist()


@cache
def _fold(document: int) -> int:
    return int(document_folds(np.array([document]))[0])


def _other_half(sequences: list[Sequenced], document: int) -> frozenset[int]:
    return frozenset(s.document for s in sequences if _fold(s.document) != _fold(document))


def _matches(sequences: list[Sequenced], layers: list[Layer]) -> dict[tuple[int, int], int | None]:
    """The document that each token's sequence so far is most like."""
    long_enough = Counter[int]()
    for s in sequences:
        long_enough[s.document] += len(s.tokens)
    all_loads = {
        d: np.concatenate([_loads(sequences, frozenset([d]), at, a.num_experts) for at, a in enumerate(layers)])
        for d, n in long_enough.items()
        if n >= LIBRARY_TOKENS
    }
    assert len(all_loads) <= LIBRARY
    from moescope.tallying.token_sample import token_hashes

    order = {d: int(token_hashes(np.array([d]), np.array([2**31]))[0]) for d in all_loads}
    found: dict[tuple[int, int], int | None] = {}
    offsets = np.cumsum([0, *(a.num_experts for a in layers)])
    for q, s in enumerate(sequences):
        others = sorted((d for d in _other_half(sequences, s.document) if d in all_loads), key=order.__getitem__)
        units = [slow_caches.unit(all_loads[d]) for d in others]
        so_far = np.zeros(offsets[-1], np.int64)
        for t, token in enumerate(s.tokens):
            likeness = [int((u * so_far).sum()) for u in units]
            found[q, t] = others[int(np.argmax(likeness))] if others and so_far.any() else None
            for at, experts in enumerate(token):
                for e in experts:
                    so_far[offsets[at] + e] += 1
    return found


def _sum_of_worths(
    sequences: list[Sequenced],
    layers: list[Layer],
    step: slow_caches.Step,
    matches: dict[tuple[int, int], int | None],
    worths: dict[frozenset[int], dict[Key, int]],
) -> dict[Key, int]:
    """The worths of the tokens of a step; `worths` remembers those of a set of documents."""
    total: Counter[Key] = Counter()
    for q, t in step.tokens:
        matched = matches.get((q, t))
        keep = _other_half(sequences, sequences[q].document) if matched is None else frozenset([matched])
        if keep not in worths:
            worths[keep] = {
                (at, e): share
                for at, layer in enumerate(layers)
                for e, share in enumerate(_shares(_loads(sequences, keep, at, layer.num_experts)))
            }
        for key, worth in worths[keep].items():
            total[key] += worth
    return dict(total)


def compare(parts: list[Part], layers: list[Layer], policies: tuple[str, ...], **how: object) -> None:
    """Every policy and size against the slow cache, by domain and layer."""
    sizes = None if how.pop("all_sizes", False) else [max(a.top_k for a in layers), max(a.num_experts for a in layers)]
    found = moescope.cache(
        InMemory(parts, layers),
        policies=policies,
        sizes=sizes,
        null=False,
        threads=1,
        cold_sequences=bool(how.get("cold")),
        **{name: value for name, value in how.items() if name != "cold"},
    )
    domain_of = {int(d): int(c) for part in parts for d, c in zip(part.document, part.domain, strict=True)}
    ratio_PDLZ, requests_DL = found["hit_ratio"].values, found["requests"].values
    for (p, policy), (z, size) in product(enumerate(policies), enumerate(found["size"].values.tolist())):
        if np.isnan(ratio_PDLZ[p, ..., z]).all():
            continue
        hits, requests = slow_hits(parts, layers, policy, size, **how)
        for (d, domain), at in product(enumerate([None, *range(len(parts[0].domain_names))]), range(len(layers))):
            mine = [c for c in requests if c[1] == at and domain in (None, domain_of[c[0]])]
            total = sum(requests[c] for c in mine)
            assert requests_DL[d, at] == total
            value = ratio_PDLZ[p, d, at, z]
            if total:
                assert abs(value * total - sum(hits[c] for c in mine)) < 1e-6, (policy, size, domain, at)
            else:
                assert np.isnan(value)


@st.composite
def traces(draw: st.DrawFn, longest: int = 12) -> tuple[list[Part], list[Layer]]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    top_k = draw(st.integers(1, 3))
    layers = [
        Layer(2 * at, top_k + draw(st.integers(0, 4)), top_k, num_null_experts=draw(st.integers(0, 1)), drops=True)
        for at in range(draw(st.integers(1, 2)))
    ]
    lengths = [draw(st.lists(st.integers(1, longest), min_size=1, max_size=4)) for _ in range(draw(st.integers(1, 2)))]
    firsts = np.cumsum([0, *(len(each) for each in lengths)])
    window = draw(st.integers(1, 8))
    dropped = draw(st.sampled_from([0.0, 0.2]))
    parts = [
        make_part(rng, tuple(layers), each, window=window, first_document=int(first), dropped=dropped)
        for each, first in zip(lengths, firsts[:-1], strict=True)
    ]
    return parts, layers


RANKED = ("lru", "lfu", "aged-lfu", "belady")


@settings(max_examples=100, deadline=None)
@given(traces())
def test_every_size_of_every_policy_hits_as_often_as_a_slow_cache(drawn: tuple[list[Part], list[Layer]]) -> None:
    compare(*drawn, ("lru", "lfu", "belady", "s3-fifo"), all_sizes=True)


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(2, 3))
def test_sequences_decoded_together_share_a_cache(drawn: tuple[list[Part], list[Layer]], batch: int) -> None:
    compare(*drawn, ("lru", "belady", "s3-fifo", "hot"), batch=batch, all_sizes=True)


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(1, 5), st.booleans())
def test_prefill_serves_a_chunk_at_a_time(drawn: tuple[list[Part], list[Layer]], chunk: int, cold: bool) -> None:
    compare(*drawn, RANKED, prefill=chunk, cold=cold, all_sizes=True)


@settings(max_examples=60, deadline=None)
@given(traces(), st.booleans())
def test_one_budget_is_shared_by_all_layers(drawn: tuple[list[Part], list[Layer]], cold: bool) -> None:
    compare(*drawn, (*RANKED, "s3-fifo", "hot"), budget="global", cold=cold, all_sizes=True)


@settings(max_examples=50, deadline=None)
@given(traces(), st.booleans())
def test_caches_start_cold_for_each_sequence_if_asked(drawn: tuple[list[Part], list[Layer]], cold: bool) -> None:
    compare(*drawn, ("lru", "lfu", "belady", "s3-fifo", "hot"), cold=cold)


@settings(max_examples=30, deadline=None)
@given(traces(longest=50), st.integers(1, 2))
def test_policies_fitted_on_other_documents_equal_slow_ones(drawn: tuple[list[Part], list[Layer]], batch: int) -> None:
    compare(*drawn, ("hot", "matching"), batch=batch)


def test_counts_are_halved_as_the_steps_pass() -> None:
    layers = [Layer(0, 6, 2)]
    parts = [make_part(np.random.default_rng(3), tuple(layers), [100, 90], window=64)]
    compare(parts, layers, ("aged-lfu",), all_sizes=True)
    aged, lfu = (
        moescope.cache(InMemory(parts, layers), policies=(p,), null=False)["model_hit_ratio"] for p in RANKED[2:0:-1]
    )
    assert not np.allclose(aged.values, lfu.values)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_no_choice_of_evictions_hits_more_often_than_belady(capacity: int, seed: int) -> None:
    """Forty sequences a time, each with a cache of its own, of groups that are chunks of up to three tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 25, 40)
    position = np.concatenate([np.arange(length) for length in lengths])
    sequence, zeros = np.repeat(np.arange(40), lengths), np.zeros(len(position), np.int64)
    ids = rng.choice(5, (len(position), 1), p=rng.dirichlet(np.ones(5)))
    trace = InMemory([Part(zeros, zeros, ("d",), sequence, position, zeros, {0: ids})], [Layer(0, 5, 1)])
    how = {"prefill": 3, "cold_sequences": True, "null": False, "threads": 1}
    found = moescope.cache(trace, policies=("belady",), sizes=[capacity], **how).isel(domain=0)
    best = 0
    for of in np.split(ids[:, 0], np.cumsum(lengths)[:-1]):
        groups = [frozenset(of[start : start + 3].tolist()) for start in range(0, len(of), 3)]
        best += slow_caches.most_hits(groups, capacity)
    assert found["model_hit_ratio"].item() * found["requests"].item() == pytest.approx(best)


def test_a_trace_in_many_parts_is_the_same_trace(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    layers = (Layer(0, 8, 2), Layer(1, 6, 2))
    part = make_part(rng, layers, [40, 3, 70, 1, 55, 20, 34], window=32)
    cuts = np.split(np.arange(part.num_tokens), part.document_starts()[[1, 2, 5]])
    whole = make_trace(tmp_path / "a.moe", [part], layers)
    parted = make_trace(tmp_path / "b.moe", [part.rows(rows) for rows in cuts], layers)
    for how in ({}, {"batch": 3}, {"prefill": 16}, {"budget": "global"}):
        found = moescope.cache(whole, threads=1, **how)
        assert found.identical(moescope.cache(parted, threads=2, **how)), how


def test_no_policy_beats_belady_and_more_room_never_hurts_those_that_rank() -> None:
    rng = np.random.default_rng(6)
    layers = [Layer(0, 16, 2), Layer(1, 16, 4)]
    trace = InMemory([make_part(rng, tuple(layers), [90, 150, 60, 80], window=64)], layers)
    for how in ({}, {"batch": 2}, {"prefill": 8}, {"budget": "global"}, {"cold_sequences": True}):
        found = moescope.cache(trace, sizes=range(4, 17), threads=1, **how)
        of_all = found.sel(domain=EVERYTHING)  # it is the best for the whole, which another may beat in a domain
        for name in (
            ("model_hit_ratio", "model_hit_ratio_null")
            if "budget" in how
            else ("hit_ratio", "hit_ratio_null", "model_hit_ratio")
        ):
            worse = of_all[name].isnull() | (of_all[name] <= of_all[name].sel(policy="belady") + 1e-12)
            assert worse.all(), how
        ranked = found.drop_sel(policy="s3-fifo")
        assert (ranked["hit_ratio"].diff("size") >= -1e-12).all(), how


def test_of_uniform_independent_routing_every_policy_that_cannot_foresee_hits_c_of_e() -> None:
    rng = np.random.default_rng(7)
    layers = [Layer(at, 8, 2) for at in range(3)]
    lengths = [100] * 60
    parts = [make_part(rng, tuple(layers), lengths, window=100)]
    for layer in layers:
        parts[0].expert_ids[layer.layer][:] = np.argsort(rng.random((6000, 8)), axis=1)[:, :2]
    found = moescope.cache(InMemory(parts, layers), sizes=range(2, 8), threads=1).sel(domain=EVERYTHING)
    uniform = found["hit_ratio_uniform"].isel(layer=0).values
    for policy in POLICIES[:-1]:
        of = found.sel(policy=policy)
        inside = (of["model_hit_ratio_low"] < uniform + 0.004) & (uniform < of["model_hit_ratio_high"] + 0.004)
        assert inside.all(), policy  # caches that start empty miss a few times; fitted ones are fitted to noise
        assert (np.abs(of["gain"]) < 0.01).all(), policy


def test_runs_of_one_expert_are_worth_what_order_is_worth() -> None:
    """Runs of ten tokens: LRU misses one in ten; in random order, with eight experts alike, seven in eight."""
    rng = np.random.default_rng(8)
    lengths, layer = [400] * 20, Layer(0, 8, 1)
    part = make_part(rng, (layer,), lengths, window=400)
    runs = rng.permuted(np.tile(np.arange(8), (20, 5)), axis=1)
    distinct = runs.copy()
    part.expert_ids[0][:, 0] = np.repeat(distinct.ravel(), 10)
    found = moescope.cache(InMemory([part], [layer]), policies=("lru",), sizes=[1], threads=1)
    of = found.sel(domain=EVERYTHING, policy="lru", size=1)
    changes = int((np.diff(distinct.ravel()) != 0).sum()) + 1
    assert of["model_hit_ratio"].item() == pytest.approx(1 - changes / 8000)
    assert of["model_hit_ratio_null"].item() == pytest.approx(1 / 8, abs=0.01)
    assert of["gain_low"].item() < of["model_hit_ratio"].item() - 1 / 8 + 0.01
    assert of["gain_low"].item() > 0.7
    assert of["loads"].item() == pytest.approx(changes / 8000)


def test_matching_finds_the_documents_that_use_the_same_experts() -> None:
    """Two kinds of documents with experts of their own: their mixture helps neither, a match does."""
    rng = np.random.default_rng(9)
    layers = [Layer(0, 16, 2), Layer(1, 16, 2)]
    part = make_part(rng, tuple(layers), [100] * 40, window=100)
    kind = np.repeat(np.arange(40) // 3 % 2, 100)
    for layer in layers:
        ids = np.argsort(rng.random((4000, 8)), axis=1)[:, :2] + 8 * kind[:, None]
        part.expert_ids[layer.layer][:] = ids
    found = moescope.cache(InMemory([part], layers), policies=("hot", "matching"), sizes=[9], null=False, threads=1)
    of = found["model_hit_ratio"].sel(domain=EVERYTHING, size=9)
    assert of.sel(policy="matching").item() > 0.95
    assert of.sel(policy="hot").item() < 0.85


def test_the_part_of_the_way_to_the_optimum_is_a_ratio_of_hits() -> None:
    layers = [Layer(0, 8, 2)]
    parts = [make_part(np.random.default_rng(10), tuple(layers), [60, 80, 50, 70], window=64)]
    found = moescope.cache(InMemory(parts, layers), sizes=[2, 4], null=False, threads=1).sel(domain=EVERYTHING)
    lru, hot, best = (found["model_hit_ratio"].sel(policy=p, size=4).item() for p in ("lru", "hot", "belady"))
    assert found["closed"].sel(policy="hot", size=4).item() == pytest.approx((hot - lru) / (best - lru))
    assert found["closed"].sel(policy="belady", size=4).item() == 1
    assert found["closed"].sel(size=2).isnull().all()  # two of two slots are taken by the token being served


def test_intervals_come_from_the_variation_between_documents() -> None:
    """Documents that hit always or never: the spread of their means, not the number of their tokens."""
    layer = Layer(0, 4, 1)
    part = make_part(np.random.default_rng(11), (layer,), [1000] * 12, window=1000)
    for document in range(12):
        rows = slice(1000 * document, 1000 * (document + 1))
        part.expert_ids[0][rows, 0] = 0 if document % 2 else np.arange(1000) % 4
    found = moescope.cache(InMemory([part], [layer]), policies=("lru",), sizes=[1], null=False, threads=1)
    of = found.sel(domain=EVERYTHING, policy="lru", size=1)
    assert of["model_hit_ratio"].item() == pytest.approx(0.5, abs=0.01)
    assert of["model_hit_ratio_high"].item() - of["model_hit_ratio_low"].item() > 0.4


def test_what_could_not_be_a_cache_is_refused(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 2), Layer(3, 16, 4))
    trace = make_trace(tmp_path / "t.moe", [make_part(np.random.default_rng(0), layers, [5, 6])], layers)
    with pytest.raises(
        ValueError, match="a cache of 3 cannot hold the 4 experts that a token needs at once in layer 3"
    ):
        moescope.cache(trace, sizes=[3])
    with pytest.raises(ValueError, match="a cache of 17 is larger than a layer's 16 experts; choose sizes up to 16"):
        moescope.cache(trace, sizes=[8, 17])
    with pytest.raises(ValueError, match="policies must be distinct and of lru, lfu"):
        moescope.cache(trace, policies=("fifo",))
    with pytest.raises(ValueError, match="budget must be 'layer' or 'global'"):
        moescope.cache(trace, budget="device")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose a batch to decode or a chunk of prefill"):
        moescope.cache(trace, batch=2, prefill=8)
    with pytest.raises(ValueError, match="cannot start cold"):
        moescope.cache(trace, batch=2, cold_sequences=True)
    with pytest.raises(ValueError, match="at least 1"):
        moescope.cache(trace, batch=0)
    counts = make_counts(tmp_path / "c.moe", {0: {0: {1: 5}}})
    with pytest.raises(NotRecorded, match="holds counts of assignments, and no token"):
        moescope.cache(counts)


def test_one_document_has_no_interval_and_nothing_to_be_fitted_on() -> None:
    layers = [Layer(0, 8, 2)]
    parts = [make_part(np.random.default_rng(1), tuple(layers), [50], window=64)]
    found = moescope.cache(InMemory(parts, layers), sizes=[4], threads=1).sel(domain=EVERYTHING, size=4)
    assert found["model_hit_ratio_low"].isnull().all()
    assert found["model_hit_ratio"].sel(policy=["hot", "matching"]).isnull().all()
    assert found["model_hit_ratio_null"].sel(policy=["hot", "matching"]).isnull().all()
    assert found["model_hit_ratio"].sel(policy=["lru", "lfu", "aged-lfu", "s3-fifo", "belady"]).notnull().all()


def test_the_worked_example_of_the_page() -> None:
    part = make_part(np.random.default_rng(0), (Layer(0, 4, 2),), [4])
    part.expert_ids[0][:] = [[0, 1], [2, 3], [1, 3], [0, 1]]
    trace = InMemory([part], [Layer(0, 4, 2)])
    found = moescope.cache(trace, policies=("lru", "belady"), sizes=[3], null=False, threads=1)
    assert (8 * found["model_hit_ratio"].isel(domain=0)).values.ravel().tolist() == [2, 3]


@pytest.mark.parametrize("name", ["qwen", "gemma"])
@pytest.mark.filterwarnings("ignore")
def test_recorded_routing_of_128_experts_gives_plausible_curves(shared_data: Path, tmp_path: Path, name: str) -> None:
    """Real decoding on a phone, some hundred tokens: locality that is surely there, and an order among the policies."""
    source = shared_data / "traces" / "bigmoeonedge" / f"{name}.route.csv"
    trace = moescope.import_trace("bigmoeonedge", [source], tmp_path / "o.moe")
    found = moescope.cache(trace, sizes=[6, 16, 32, 64, 96, 128], threads=1).sel(domain=EVERYTHING)
    of = {policy: found["model_hit_ratio"].sel(policy=policy).values for policy in POLICIES}
    uniform = found["hit_ratio_uniform"].isel(layer=0).values
    assert (of["lru"][:-1] > uniform[:-1] + 0.05).all()
    assert (of["belady"] >= np.nanmax([of[p] for p in POLICIES], axis=0) - 1e-12).all()
    assert (np.diff(of["lru"]) > 0).all()
    assert (found["gain"].sel(policy="lru").values[:3] > 0.02).all()  # tokens in order, of one document as a whole


def test_memory_does_not_grow_with_tokens(tmp_path: Path) -> None:
    layers = (Layer(0, 16, 2), Layer(1, 16, 2))
    peaks = []
    for number in (3, 12):
        parts = [
            make_part(np.random.default_rng(at), layers, [400] * 10, window=400, first_document=10 * at)
            for at in range(number)
        ]
        trace = make_trace(tmp_path / f"{number}.moe", parts, layers)
        del parts
        _ = trace.num_documents  # what a trace keeps of its documents is not the caches'
        tracemalloc.start()
        moescope.cache(trace, threads=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
