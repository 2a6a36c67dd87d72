"""Every interval of a simulation against a slow loop over documents that shares no code with it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import xarray as xr
from routed import (
    DOMAINS,
    LAYERS,
    Document,
    Token,
    clustered,
    difference,
    ends,
    make_documents,
    on_logit_scale,
    proportion,
    quantile,
    same_interval,
    write,
)
from test_prefetch import slow_prefetch

import moescope
from moescope.simulation.cache import _difference
from moescope.simulation.prefetch import _judge
from moescope.simulation.profile import Cells
from moescope.tallying.document_groups import document_groups
from moescope.trace import Trace


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return make_documents(seed=1, documents=24)


@pytest.fixture(scope="module")
def trace(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return write(tmp_path_factory.mktemp("intervals") / "t.moe", documents, part_documents=24)


def at_domain(result: xr.Dataset, domain: str | None) -> xr.Dataset:
    """Of all domains together, which come first, or of one."""
    return result.isel(domain=0) if domain is None else result.sel(domain=domain)


# ------------------------------------------------------------------------------------------------------------- cache

SIZE = 3


def slow_hits(document: Document, layer: int) -> tuple[int, int, int]:
    """LRU and Belady hits and requests of a document whose sequences each start with an empty cache of three."""
    lru = best = requests = 0
    for number in sorted({token.sequence for token in document.tokens}):
        wanted = [token.experts[layer] for token in document.tokens if token.sequence == number]
        recent: list[int] = []
        held: set[int] = set()
        for at, experts in enumerate(wanted):
            requests += len(experts)
            lru += sum(e in recent for e in experts)
            best += sum(e in held for e in experts)
            for e in reversed(experts):  # a token's first choice counts as used last
                if e in recent:
                    recent.remove(e)
                recent.append(e)
            recent = recent[-SIZE:]

            def next_use(e: int, wanted: list[list[int]] = wanted, at: int = at) -> int:
                return next((t for t in range(at + 1, len(wanted)) if e in wanted[t]), len(wanted))

            others = sorted(held - set(experts), key=next_use)
            held = set(experts) | set(others[: SIZE - len(set(experts))])
    return lru, best, requests


def test_hit_ratios_and_the_way_to_the_optimum(trace: Trace, documents: list[Document]) -> None:
    found = moescope.cache(trace, policies=("lru", "belady"), sizes=[SIZE], cold_sequences=True, threads=1)
    found = found.sel(size=SIZE)
    numbers = [layer.layer for layer in LAYERS]
    counted = {(d.number, layer): slow_hits(d, layer) for d in documents for layer in numbers}
    for domain in (None, *DOMAINS):
        by_group = defaultdict(list)
        for document in documents:
            if domain in (None, document.domain):
                # all domains together: a domain's groups stay apart
                key = document.domain, int(document_groups(np.array([document.number]))[0])
                by_group[key].append(document.number)
        at = at_domain(found, domain)
        for layers in (*([layer] for layer in numbers), numbers):
            sums = [
                [sum(counted[n, layer][part] for n in some for layer in layers) for part in range(3)]
                for some in by_group.values()
            ]
            lru, best, requests = ([of[part] for of in sums] for part in range(3))
            for policy, hits in (("lru", lru), ("belady", best)):
                of = at.sel(policy=policy)
                of = of if len(layers) > 1 else of.sel(layer=layers[0])
                assert float(of["model_hit_ratio" if len(layers) > 1 else "hit_ratio"]) == pytest.approx(
                    sum(hits) / sum(requests)
                )
                same_interval(of, "model_hit_ratio" if len(layers) > 1 else "hit_ratio", proportion(hits, requests))
        nearer = [0 for _ in lru]
        further = [b - a for a, b in zip(lru, best, strict=True)]
        assert sum(further) > 0
        for policy, gained in (("lru", nearer), ("belady", further)):
            value, error = clustered(gained, further)
            low, high = ends(at.sel(policy=policy), "closed")
            if error > 1e-12:
                half = quantile(len(further) - 1) * error
                np.testing.assert_allclose([float(low), float(high)], [value - half, value + half])
            else:  # the optimum itself, and LRU itself: nothing varies
                assert np.isnan([float(low), float(high)]).all()


def test_the_part_of_the_way_that_another_policy_goes(trace: Trace, documents: list[Document]) -> None:
    options = {"policies": ("lru", "lfu", "belady"), "sizes": [SIZE], "cold_sequences": True, "threads": 1}
    found = moescope.cache(trace, **options).sel(size=SIZE).isel(domain=0)
    counted = defaultdict(lambda: np.zeros(4))
    for document in documents:
        hits = [slow_hits(document, layer.layer) for layer in LAYERS]
        lfu = sum(lfu_hits(document, layer.layer) for layer in LAYERS)
        key = document.domain, int(document_groups(np.array([document.number]))[0])
        counted[key] += [*(sum(of[part] for of in hits) for part in range(3)), lfu]
    lru, best, requests, lfu = zip(*counted.values(), strict=True)
    at = found.sel(policy="lfu")
    assert float(at["model_hit_ratio"]) == pytest.approx(sum(lfu) / sum(requests), rel=1e-9)
    value, error = clustered(np.subtract(lfu, lru), np.subtract(best, lru))
    half = quantile(len(lru) - 1) * error
    same_interval(at, "closed", (value - half, value + half))


def lfu_hits(document: Document, layer: int) -> int:
    """Hits of a cache that keeps the experts used most often; of several the one used last."""
    hits = 0
    for number in sorted({token.sequence for token in document.tokens}):
        uses, last, held, time = Counter(), {}, set(), 0
        for token in document.tokens:
            if token.sequence != number:
                continue
            hits += sum(e in held for e in token.experts[layer])
            for e in reversed(token.experts[layer]):
                time += 1
                uses[e] += 1
                last[e] = time
            others = sorted(held - set(token.experts[layer]), key=lambda e: (-uses[e], -last[e]))
            held = set(token.experts[layer]) | set(others[: SIZE - 2])
    return hits


def test_what_order_is_worth_to_a_cache(trace: Trace, documents: list[Document]) -> None:
    """The gain is paired by group of documents; its null is drawn, so the groups are those of the simulation."""
    rng = np.random.default_rng(0)
    requests = rng.integers(50, 90, 12).astype(float)
    null_requests = requests - rng.integers(0, 9, 12)
    hits, null = np.rint(requests * rng.uniform(0.4, 0.7, 12)), np.rint(null_requests * rng.uniform(0.3, 0.5, 12))
    _, *interval = _difference(hits[:, None], requests[:, None], null[:, None], null_requests[:, None])
    expected = difference(hits.tolist(), requests.tolist(), null.tolist(), null_requests.tolist())
    np.testing.assert_allclose([float(end[0]) for end in interval], expected)
    found = moescope.cache(trace, policies=("lru",), sizes=[SIZE], threads=1)
    low, high = ends(found, "gain")
    np.testing.assert_allclose((low + high) / 2, found["gain"], rtol=1e-9)
    assert (high > low).all()


def test_tokens_a_second(trace: Trace) -> None:
    """The ends of the speed are the speeds at the ends of the hit ratio."""
    played = moescope.cache(trace, policies=("lru",), threads=1)
    cost = {"bytes_per_expert": 1e6, "bandwidth": 1e9, "compute": 0.002, "latency": 1e-5, "overlap": 0.5}
    found = moescope.offloading(played, **cost)
    for domain in range(4):
        for size in range(played.sizes["size"]):
            at = played.isel(policy=0, domain=domain, size=size)
            requests = float(at["requests"].sum()) / float(at["tokens"])
            speeds = []
            for end in ends(at, "model_hit_ratio"):
                seconds = (1 - float(end)) * requests * (1e6 / 1e9 + 1e-5)
                speeds.append(1 / (0.002 + seconds - 0.5 * min(0.002, seconds)))
            same_interval(found.isel(policy=0, domain=domain, size=size), "tokens_per_second", tuple(speeds))


# ---------------------------------------------------------------------------------------------------------- prefetch


def test_recall_and_what_is_gained_over_popularity(trace: Trace) -> None:
    found = moescope.prefetch(trace, distances=[1], threads=1)
    slow = slow_prefetch(trace, [1])
    pooled = [layer.layer for layer in LAYERS[1:]]  # the first has no layer before it
    for p, kind in enumerate(found["kind"].values.tolist()):
        distance = int(found["distance"][p])
        at_predictor = found.isel(predictor=p)
        of_layer = {layer.layer: slow.get((kind, distance, layer.layer)) for layer in LAYERS}
        for layer in LAYERS:
            for loaded in range(1, layer.num_experts):
                if of_layer[layer.layer] is None:
                    continue
                at = at_predictor.sel(layer=layer.layer, loaded=loaded)
                check_recall(at, "", of_layer[layer.layer], slow["popularity", 0, layer.layer], loaded)
        for loaded in range(1, 5):
            together, popular = defaultdict(list), defaultdict(list)
            for layer_number in pooled:
                for into, of in ((together, of_layer[layer_number]), (popular, slow["popularity", 0, layer_number])):
                    for group, places in of.items():
                        into[group] += places
            check_recall(at_predictor.sel(loaded=loaded), "model_", together, popular, loaded)


def check_recall(at: xr.Dataset, prefix: str, places: dict, popular: dict, loaded: int) -> None:
    """Recall and gain of one predictor; by group the places, in its order, of the experts that were needed."""

    def hits(of: dict) -> list[int]:
        return [sum(place is not None and place < loaded for place in of[group]) for group in sorted(of)]

    needed = [len(places[group]) for group in sorted(places)]
    mine, theirs = hits(places), hits(popular)
    low, high = ends(at, f"{prefix}recall")
    np.testing.assert_allclose([float(low), float(high)], proportion(mine, needed), rtol=1e-9)
    gain, error = clustered(np.subtract(mine, theirs).tolist(), needed)
    half = quantile(len(needed) - 1) * error
    same_interval(at, f"{prefix}gain", (gain - half, gain + half))


def test_documents_that_need_nothing_are_no_documents_of_the_interval() -> None:
    """As those without a decoded token are not, where decoding alone is looked at."""
    needed = np.array([30, 0, 44, 25, 0, 38])
    hits, popular = np.array([21, 0, 30, 11, 0, 29]), np.array([12, 0, 25, 12, 0, 20])
    _, low, high, gain, gain_low, gain_high = _judge(hits[:, None], popular[:, None], needed)[:, 0]
    used = needed > 0
    np.testing.assert_allclose([low, high], proportion(hits[used].tolist(), needed[used].tolist()))
    value, error = clustered((hits - popular)[used].tolist(), needed[used].tolist())
    half = quantile(3) * error
    np.testing.assert_allclose([gain, gain_low, gain_high], [value, value - half, value + half])


# ---------------------------------------------------------------------------------------------------------- parallel

DEVICES, BATCH, FACTOR = 2, 20, 1.25
EVEN = (LAYERS[0], LAYERS[2])
"""Layers whose experts two devices can share."""


def batches(trace: Trace, documents: list[Document]) -> Iterator[list[tuple[Document, Token]]]:
    """Prefill batches: consecutive tokens of the documents of each fold."""
    cells = Cells(trace)
    for fold in (0, 1):
        rows = [(d, token) for d in documents if cells(np.array([d.number]))[0] % 2 == fold for token in d.tokens]
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            yield rows[start : start + BATCH]


def test_the_most_loaded_device_the_devices_reached_and_the_drops(trace: Trace, documents: list[Document]) -> None:
    found = moescope.parallel(
        trace,
        layers=[0, 3],
        devices=DEVICES,
        nodes=2,
        prefill=BATCH,
        decode=(),
        placements=["linear", "random"],
        threads=1,
    )
    cells = Cells(trace)
    cell_of = {document.number: int(cells(np.array([document.number]))[0]) for document in documents}
    largest, made, reached, tokens = (defaultdict(int) for _ in range(4))
    dropped, made_in = defaultdict(int), defaultdict(int)
    for batch in batches(trace, documents):
        for layer in EVEN:
            size = layer.num_experts
            device = [e * DEVICES // size for e in range(size)]
            load = Counter(device[e] for _, token in batch for e in token.experts[layer.layer])
            busiest = max(range(DEVICES), key=lambda d: (load[d], -d))
            capacity, queue = math.ceil(FACTOR * BATCH * layer.top_k / size), Counter()
            for document, token in batch:
                cell = cell_of[document.number]
                experts = token.experts[layer.layer]
                largest[layer.layer, cell] += sum(device[e] == busiest for e in experts)
                made[layer.layer, cell] += len(experts)
                reached[layer.layer, cell] += len({device[e] for e in experts})
                tokens[layer.layer, cell] += 1
                for e in experts:
                    dropped[layer.layer, document.domain, cell] += queue[e] >= capacity
                    made_in[layer.layer, document.domain, cell] += 1
                    queue[e] += 1
    used = sorted({cell for _, cell in made})
    at_linear = found.isel(batch=0).sel(placement="linear")
    for layer in EVEN:
        at = at_linear.sel(layer=layer.layer)
        y, n = [largest[layer.layer, c] for c in used], [made[layer.layer, c] for c in used]
        value, error = clustered(y, n)
        half = quantile(len(used) - 1) * error
        expected = max(DEVICES * (value - half), 1), DEVICES * (value + half)
        same_interval(at, "over_subscription", expected)
        value, error = clustered([reached[layer.layer, c] for c in used], [tokens[layer.layer, c] for c in used])
        half = quantile(len(used) - 1) * error
        for name in ("devices_reached", "nodes_reached"):  # a device is a node
            same_interval(at, name, (value - half, value + half))
        for domain in (None, *DOMAINS):
            by_cell = [
                [sum(of[layer.layer, d, c] for d in DOMAINS if domain in (None, d)) for c in used]
                for of in (dropped, made_in)
            ]
            at = at_domain(found.isel(batch=0), domain).sel(layer=layer.layer, capacity_factor=FACTOR)
            if sum(by_cell[0]):
                expected = proportion(*by_cell)
            else:
                number = sum(domain in (None, document.domain) for document in documents)
                expected = 0.0, on_logit_scale(0, 0, number)[1]
            same_interval(at, "dropped", expected)
    y = [sum(largest[layer.layer, c] for layer in EVEN) for c in used]
    n = [sum(made[layer.layer, c] for layer in EVEN) for c in used]
    value, error = clustered(y, n)
    half = quantile(len(used) - 1) * error
    same_interval(at_linear, "slowest", (max(DEVICES * (value - half), 1), DEVICES * (value + half)))


def test_a_placement_fitted_on_another_domain(trace: Trace, documents: list[Document]) -> None:
    """The busiest device of a fold's documents of a domain, clustered by cells."""
    found = moescope.parallel(
        trace, layers=[0, 3], devices=DEVICES, prefill=BATCH, decode=(), placements=["eplb"], threads=1
    )
    cells = Cells(trace)
    cell_of = {document.number: int(cells(np.array([document.number]))[0]) for document in documents}
    for j, domain in enumerate((None, *DOMAINS)):
        mine = [document for document in documents if domain in (None, document.domain)]
        y, n = defaultdict(int), defaultdict(int)
        for fold in (0, 1):
            fitted = [document for document in documents if cell_of[document.number] % 2 != fold]
            for layer in EVEN:
                size = layer.num_experts
                load = [count(fitted, layer.layer, e) for e in range(size)]
                device = pack(load, DEVICES)
                here = [document for document in mine if cell_of[document.number] % 2 == fold]
                on = [sum(count(here, layer.layer, e) for e in range(size) if device[e] == d) for d in range(DEVICES)]
                busiest = on.index(max(on))
                for document in here:
                    cell = cell_of[document.number]
                    y[cell] += sum(count([document], layer.layer, e) for e in range(size) if device[e] == busiest)
                    n[cell] += layer.top_k * len(document.tokens)
        used = sorted(n)
        value, error = clustered([y[c] for c in used], [n[c] for c in used])
        half = quantile(len(used) - 1) * error
        expected = max(DEVICES * (value - half), 1), DEVICES * (value + half)
        same_interval(found.isel(foreign_placement=0, fitted_on=0, domain=j), "foreign", expected, rel=1e-6)


def count(documents: list[Document], layer: int, expert: int) -> int:
    return sum(expert in token.experts[layer] for document in documents for token in document.tokens)


def pack(load: list[int], devices: int) -> list[int]:
    """EPLB without replicas: the largest first, each to the lightest device that has room."""
    room, weight, device = [len(load) // devices] * devices, [0] * devices, [0] * len(load)
    for e in sorted(range(len(load)), key=lambda e: (-load[e], e)):
        d = min((d for d in range(devices) if room[d]), key=lambda d: (weight[d], d))
        device[e] = d
        room[d] -= 1
        weight[d] += load[e]
    return device


def test_two_placements_in_the_same_batches(trace: Trace, documents: list[Document]) -> None:
    """Paired: the interval of the difference is that of the difference of the busiest devices in each batch."""
    found = moescope.parallel(
        trace,
        layers=[0, 3],
        devices=DEVICES,
        prefill=BATCH,
        decode=(),
        placements=["linear", "random"],
        threads=1,
        seed=3,
    )
    placed = moescope.placement(trace, layers=[0, 3], devices=DEVICES, algorithm="random", seed=3)
    cells = Cells(trace)
    y, n = defaultdict(int), defaultdict(int)
    for batch in batches(trace, documents):
        for layer in EVEN:
            of_random = placed.devices(layer.layer)[:, 0].tolist()
            of_linear = [e * DEVICES // layer.num_experts for e in range(layer.num_experts)]
            for sign, device in ((1, of_random), (-1, of_linear)):
                load = Counter(device[e] for _, token in batch for e in token.experts[layer.layer])
                busiest = max(range(DEVICES), key=lambda d: (load[d], -d))
                for document, token in batch:
                    cell = int(cells(np.array([document.number]))[0])
                    y[cell] += sign * sum(device[e] == busiest for e in token.experts[layer.layer])
                    n[cell] += layer.top_k if sign == 1 else 0
    used = sorted(n)
    value, error = clustered([y[c] for c in used], [n[c] for c in used])
    half = quantile(len(used) - 1) * error
    at = found.isel(batch=0).sel(placement="random", against="linear")
    assert float(at["slowest_difference"]) == pytest.approx(DEVICES * value)
    same_interval(at, "slowest_difference", (DEVICES * (value - half), DEVICES * (value + half)))
