"""The time model by hand, and what it leaves of the published table."""

from __future__ import annotations

import math

import pytest
import xarray as xr

import moescope
from moescope.simulation.offloading import TWO_BIT_EXPERT_BYTES, table_2


def counted(hit_ratio: float) -> xr.Dataset:
    """One policy, domain and size; four requests a token in two layers."""
    names = ("model_hit_ratio", "model_hit_ratio_low", "model_hit_ratio_high", "model_hit_ratio_null")
    values = {name: (("policy", "domain", "size"), [[[hit_ratio]]]) for name in names}
    layers = {"requests": (("domain", "layer"), [[200.0, 200.0]]), "num_experts": ("layer", [8, 3])}
    values["model_hit_ratio_uniform"] = (("domain", "size"), [[0.75]])  # of 8 experts a half, of 3 all
    coords = {"policy": ["lru"], "domain": ["(all)"], "size": [4]}
    return xr.Dataset(values | layers | {"tokens": ("domain", [100])}, coords)


def speed(hit_ratio: float, **of: float) -> xr.Dataset:
    return moescope.offloading(counted(hit_ratio), bytes_per_expert=10, bandwidth=100, **of).squeeze()


def test_a_token_takes_its_work_and_its_loads() -> None:
    """Half of four requests miss: two loads of 0.1 s beside 0.3 s of work."""
    assert speed(0.5)["transfer"].item() == pytest.approx(0.2)
    assert speed(0.5)["tokens_per_second"].item() == pytest.approx(5)
    assert speed(0.5, compute=0.3)["tokens_per_second"].item() == pytest.approx(2)
    assert speed(0.5, compute=0.3, overlap=0.5)["tokens_per_second"].item() == pytest.approx(1 / 0.4)
    assert speed(0.5, compute=0.3, overlap=1)["tokens_per_second"].item() == pytest.approx(1 / 0.3)
    assert speed(0.5, latency=0.05)["transfer"].item() == pytest.approx(0.3)


def test_uniform_routing_loads_what_its_share_of_each_layer_misses() -> None:
    """Of two requests in the layer of 8 one misses; all 3 experts of the other are there: one load of 0.1 s."""
    assert speed(0.9)["tokens_per_second_uniform"].item() == pytest.approx(10)
    assert speed(0.9, compute=0.4)["tokens_per_second_uniform"].item() == pytest.approx(2)


def test_the_longer_term_dominates() -> None:
    assert bool(speed(0.5, compute=0.1)["link_bound"])
    assert not bool(speed(0.5, compute=0.3)["link_bound"])


def test_a_cache_that_holds_all_leaves_the_work() -> None:
    assert speed(1.0, compute=0.25)["tokens_per_second"].item() == 4
    assert math.isinf(speed(1.0)["tokens_per_second"].item())


def test_a_layer_takes_no_more_memory_than_its_experts() -> None:
    assert speed(0.5)["cache_bytes"].item() == 10 * (4 + 3)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bandwidth": 0.0}, "bytes and bandwidth must be positive"),
        ({"bandwidth": math.inf}, "bytes and bandwidth must be positive"),
        ({"latency": -1.0}, "latency and compute must be seconds from 0"),
        ({"compute": math.nan}, "latency and compute must be seconds from 0"),
        ({"overlap": 1.5}, "overlap must be from 0 to 1"),
    ],
)
def test_quantities_that_cannot_be_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        moescope.offloading(counted(0.5), **{"bytes_per_expert": 10, "bandwidth": 100, **wrong})


def test_table_2_keeps_what_the_link_does_not_explain() -> None:
    table = table_2({2: 0.3, 4: 0.6}).set_index(["gpu", "setting"])
    t4 = table.loc["T4"]
    assert t4["loads_a_token"].tolist() == pytest.approx([64 * 0.4, 64, 256])
    assert t4.loc["naive: every expert", "link_seconds"] == pytest.approx(256 * TWO_BIT_EXPERT_BYTES / 15.75e9)
    total = table["link_seconds"] + table["residual_seconds"]
    assert (1 / total).tolist() == pytest.approx(table["measured_tokens_per_second"].tolist())
    assert (table["residual_seconds"] > 0).all()  # no host is faster than its interface
    assert table.loc[("RTX 3060", "LRU"), "loads_a_token"] == pytest.approx(64 * 0.7)
    uniform = table_2().set_index(["gpu", "setting"])["loads_a_token"]
    assert uniform["T4", "LRU"] == 32
    assert uniform["RTX 3060", "LRU"] == 48
