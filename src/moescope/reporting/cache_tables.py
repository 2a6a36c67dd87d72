"""Expert caches as tables, as a data frame, and in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

import numpy as np
import pandas as pd
import xarray as xr

from moescope.reporting.numbers import number, percent, spread
from moescope.reporting.tables import Cell, Row, Section, Table
from moescope.reporting.visible import visible

POLICY_NAMES = {
    "lru": "LRU",
    "lfu": "LFU",
    "aged-lfu": "LFU, aged",
    "s3-fifo": "S3-FIFO",
    "hot": "hot elsewhere",
    "matching": "matched document",
    "belady": "optimum (Belady)",
}
"""Policies as tables and figures call them."""

MOST_SIZES = 6


def cache_tables(cache: xr.Dataset, speed: xr.Dataset | None = None) -> list[Table]:
    """Hit ratios of all layers together by policy and size; then by layer, by domain and, if given, in tokens a second.

    The frame of the first table holds everything but the speed.

    Args:
        cache: Of `moescope.cache`.
        speed: Of `moescope.offloading`.
    """
    sizes = shown_sizes(cache)
    tables = [_policies_table(cache, sizes)]
    if {"lru", "belady"} & set(cache["policy"].values.tolist()):
        tables.append(_by(cache, "layer", sizes[:3]))
        if cache.sizes["domain"] > 2:
            tables.append(_by(cache, "domain", sizes[:3]))
    if speed is not None:
        tables.append(_speed_table(speed, sizes))
    return tables


def shown_sizes(cache: xr.Dataset) -> list[int]:
    """A few sizes, evenly spread, for which every policy was played through, and not the one that holds all experts."""
    known = cache["overall"].isel(domain=0).sel(policy=played_policies(cache)).notnull()
    sizes = cache["size"].values[known.all("policy").values]
    if len(sizes) > 2 and sizes[-1] >= int(cache["num_experts"].max()):
        sizes = sizes[:-1]
    places = np.unique(np.rint(np.linspace(0, len(sizes) - 1, min(MOST_SIZES, len(sizes)))).astype(int))
    return [int(sizes[place]) for place in places]


def played_policies(cache: xr.Dataset) -> list[str]:
    """Policies that were played; those that are fitted need two documents at least."""
    known = cache["overall"].isel(domain=0).notnull().any("size").values
    return [policy for policy, played in zip(cache["policy"].values.tolist(), known, strict=True) if played]


def cache_sentence(cache: xr.Dataset) -> str:
    """What LRU hits with a quarter of the experts, beside random order, uniform routing and the optimum, in words."""
    if "lru" not in cache["policy"].values:
        return ""
    size = quarter(cache)
    at = cache.sel(size=size).isel(domain=0)
    lru = at.sel(policy="lru")
    shared = cache.attrs["budget"] == "global"
    text = (
        f"{'One cache for all layers' if shared else 'A cache'} of {size} of {_experts(cache)} experts a layer hits "
        f"{percent(lru['overall'].item())} % under LRU; "
        f"uniform routing gives {percent(_uniform(cache, size))} %"
    )
    if not isnan(lru["overall_null"].item()):
        text += f", the tokens of each document in any order {percent(lru['overall_null'].item())} %"
    if "belady" in cache["policy"].values:
        text += f"; no policy could hit more than {percent(at['overall'].sel(policy='belady').item())} %"
    return f"{text}."


def quarter(cache: xr.Dataset) -> int:
    """The size nearest to a quarter of the experts of a layer at which there is something to evict."""
    sizes = cache["size"].values
    able = sizes[sizes > int(cache["top_k"].max())] if sizes[-1] > int(cache["top_k"].max()) else sizes
    return int(able[np.abs(able - int(cache["num_experts"].max()) / 4).argmin()])


def cache_frame(cache: xr.Dataset) -> pd.DataFrame:
    """A row a (policy, domain, layer, size), the layer empty for all layers together."""
    by_layer = {"hit_ratio": "hit_ratio_percent", "low": "low_percent", "high": "high_percent"}
    by_layer |= {"null": "any_order_percent", "uniform": "uniform_percent"}
    of_all = {"overall": "hit_ratio_percent", "overall_low": "low_percent", "overall_high": "high_percent"}
    of_all |= {"overall_null": "any_order_percent", "gain": "gain_points", "gain_low": "gain_low_points"}
    of_all |= {"gain_high": "gain_high_points", "closed": "of_the_gap_percent", "closed_low": "of_the_gap_low_percent"}
    of_all |= {"closed_high": "of_the_gap_high_percent"}
    frames = []
    for names, dims in ((of_all, ["policy", "domain", "size"]), (by_layer, ["policy", "domain", "layer", "size"])):
        data = cache[[*names]].drop_vars(["num_experts", "top_k"], errors="ignore")
        frame = xr.broadcast(data)[0].transpose(*dims).to_dataframe().reset_index()
        frame[list(names)] *= 100
        frames.append(frame[[*dims, *names]].rename(columns=names))
        if "layer" not in dims:
            loads = cache["loads"].transpose(*dims).values.ravel()
            frames[-1] = frames[-1].assign(loads_a_token=loads)
    frame = pd.concat(frames, ignore_index=True)
    frame["layer"] = frame["layer"].astype("Int64")
    columns = ["policy", "domain", "layer", "size"]
    frame = frame[[*columns, *(name for name in frame.columns if name not in columns)]]
    return frame[frame["hit_ratio_percent"].notna()].reset_index(drop=True)


def _policies_table(cache: xr.Dataset, sizes: Sequence[int]) -> Table:
    data = cache.sel(size=list(sizes)).isel(domain=0)
    policies = played_policies(cache)
    unfitted = [
        POLICY_NAMES[name]
        for name in cache["policy"].values.tolist()
        if name in _FITTED and policies and name not in policies
    ]

    def rows(value: str, low: str | None, high: str | None) -> tuple[Row, ...]:
        made = []
        for policy in policies:
            at = data.sel(policy=policy)
            cells = []
            for size in sizes:
                one = at.sel(size=size)
                v = one[value].item()
                half = "" if low is None or high is None else spread(v, one[low].item(), one[high].item())
                cells.append(Cell(percent(v) if v >= 0 or isnan(v) else f"−{percent(-v)}", half))
            made.append(Row(POLICY_NAMES[policy], tuple(cells)))
        return tuple(made)

    uniform = tuple(Cell(percent(_uniform(cache, size))) for size in sizes)
    sections = [Section("", rows("overall", "overall_low", "overall_high"))]
    if data["overall_null"].notnull().any():
        sections.append(Section("tokens of each document in any order", rows("overall_null", None, None)))
    sections.append(Section("uniform independent routing", (Row("any without foresight", uniform),)))
    if data["closed"].notnull().any():
        kept = [row for row in rows("closed", "closed_low", "closed_high") if row.label not in _ENDS]
        if kept:
            sections.append(Section("part of the way from LRU to the optimum", tuple(kept)))
    return Table(
        "cache",
        f"Hit ratio of expert caches, all layers, {served(cache)}, %",
        "policy",
        tuple(f"{size} experts" for size in sizes),
        tuple(sections),
        groups=((_budget(cache), len(sizes)),),
        notes=(
            "± the larger side of a 95 % interval, clustered by document.",
            *((_UNFITTED.format(", ".join(unfitted)),) if unfitted else ()),
            *((sentence,) if (sentence := cache_sentence(cache)) else ()),
        ),
        frame=cache_frame(cache),
    )


_FITTED = ("hot", "matching")
_UNFITTED = "{}: not played, for one half of the corpus has no document to fit them on."
_ENDS = (POLICY_NAMES["lru"], POLICY_NAMES["belady"])


def _by(cache: xr.Dataset, dim: str, sizes: Sequence[int]) -> Table:
    """LRU, LRU in any order and the optimum, a row a layer or a domain."""
    names = {"hit_ratio": "hit_ratio", "low": "low", "high": "high", "null": "null"}
    data = cache.isel(domain=0) if dim == "layer" else cache
    if dim == "domain":
        names = {"hit_ratio": "overall", "low": "overall_low", "high": "overall_high", "null": "overall_null"}
    policies = [p for p in ("lru", "belady") if p in cache["policy"].values]
    columns, groups = [], []
    for size in sizes:
        of_size = []
        for policy in policies:
            of_size.append((size, policy, "hit_ratio", POLICY_NAMES[policy]))
            if policy == "lru" and cache["overall_null"].notnull().any():
                of_size.append((size, policy, "null", "any order"))
        columns += of_size
        groups.append((f"{size} experts", len(of_size)))
    rows = []
    for key in data[dim].values.tolist():
        cells = []
        for size, policy, what, _ in columns:
            at = data.sel({dim: key, "size": size, "policy": policy})
            value = at[names[what]].item()
            ends = [at[names[end]].item() for end in ("low", "high")]
            cells.append(Cell(percent(value), spread(value, *ends) if what == "hit_ratio" else ""))
        rows.append(Row(visible(str(key)), tuple(cells)))
    return Table(
        f"cache_{dim}s",
        f"Hit ratio by {dim}, {served(cache)}, %",
        dim,
        tuple(name for *_, name in columns),
        (Section("", tuple(rows)),),
        groups=tuple(groups),
        notes=("any order: LRU with the tokens of each document in random order.",),
        frame=cache_frame(cache),
    )


def _speed_table(speed: xr.Dataset, sizes: Sequence[int]) -> Table:
    data = speed.isel(domain=0).sel(size=list(sizes))
    policies = speed["policy"].values[data["tokens_per_second"].notnull().any("size").values].tolist()

    def rows(name: str) -> tuple[Row, ...]:
        made = []
        for policy in policies:
            cells = []
            for size in sizes:
                at = data.sel(policy=policy, size=size)
                if name == "null":
                    cells.append(Cell(_rate(at["null"].item())))
                    continue
                value, low, high = (at[end].item() for end in ("tokens_per_second", "low", "high"))
                bound = "*" if bool(at["link_bound"].item()) else ""
                cells.append(Cell(_rate(value), _half(value, low, high), mark=bound))
            made.append(Row(POLICY_NAMES[policy], tuple(cells)))
        return tuple(made)

    sections = [Section("", rows("tokens_per_second"))]
    if data["null"].notnull().any():
        sections.append(Section("tokens of each document in any order", rows("null")))
    uniform = tuple(Cell(_rate(data["uniform"].sel(size=size).item())) for size in sizes)
    sections.append(Section("uniform independent routing", (Row("any without foresight", uniform),)))
    memory = tuple(Cell(number(float(data["cache_bytes"].sel(size=size)) / 1e9)) for size in sizes)
    sections.append(Section("memory of the caches, GB", (Row("any", memory),)))
    of = speed.attrs
    bound = data["link_bound"].sel(policy=policies).values
    dominates = "everywhere" if bound.all() else "where marked *" if bound.any() else "nowhere"
    return Table(
        "cache_speed",
        "Tokens a second",
        "policy",
        tuple(f"{size} experts" for size in sizes),
        tuple(sections),
        notes=(
            f"An expert has {of['bytes_per_expert'] / 1e6:g} MB, the link {of['bandwidth'] / 1e9:g} GB/s and a latency "
            f"of {1e6 * of['latency']:g} µs a load; compute {1e3 * of['compute']:g} ms a token, overlap "
            f"{of['overlap']:g}.",
            f"The link takes longer than compute {dominates}. ± the larger side of a 95 % interval of the hit ratio.",
        ),
        frame=speed_frame(speed),
    )


def _rate(value: float) -> str:
    return "∞" if np.isinf(value) else number(value)


def _half(value: float, low: float, high: float) -> str:
    half = max(value - low, high - value)
    return f"±{number(half)}" if np.isfinite(half) and half > 0 else ""


def speed_frame(speed: xr.Dataset) -> pd.DataFrame:
    """A row a (policy, domain, size)."""
    names = ["tokens_per_second", "low", "high", "null", "uniform", "transfer", "link_bound"]
    speed = speed.assign(uniform=speed["uniform"].broadcast_like(speed["tokens_per_second"]))
    frame = speed[names].to_dataframe(["policy", "domain", "size"]).reset_index()
    frame["cache_bytes"] = frame["size"].map(speed["cache_bytes"].to_series())
    return frame.rename(columns={"transfer": "transfer_seconds", "null": "any_order"})


def _uniform(cache: xr.Dataset, size: int) -> float:
    """c/E over all requests: the mean of the layers' by their requests."""
    uniform, requests = cache["uniform"].sel(size=size).values, cache["requests"].isel(domain=0).values
    return float((uniform * requests).sum() / requests.sum()) if requests.sum() else float("nan")


def _experts(cache: xr.Dataset) -> str:
    numbers = sorted(set(cache["num_experts"].values.tolist()))
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _budget(cache: xr.Dataset) -> str:
    if cache.attrs["budget"] == "global":
        return f"one cache, experts a layer of {_experts(cache)}"
    return f"a cache a layer, of {_experts(cache)}"


def served(cache: xr.Dataset) -> str:
    """How the trace was served, in words."""
    if cache.attrs["prefill"]:
        return f"prefill in chunks of {cache.attrs['prefill']} tokens"
    batch = cache.attrs["batch"]
    return "decoding one sequence" if batch == 1 else f"decoding {batch} sequences together"
