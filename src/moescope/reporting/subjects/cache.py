"""What caches of experts would hit: tables, a figure, a sentence, and how large a cache to take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import isnan
from pathlib import Path
from typing import Literal

import click
import numpy as np
import pandas as pd
import xarray as xr

from moescope.reporting import figures as drawn
from moescope.reporting.cells import CLUSTERED, values
from moescope.reporting.chapters import WORTH
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import number, percent, plus_minus, spread
from moescope.reporting.options import figures_option, layers_option, parse_integers, trace_argument
from moescope.reporting.progress import layer_progress
from moescope.reporting.subject import (
    Drawing,
    PageFigure,
    PageSection,
    PageTable,
    Recommendation,
    Results,
    Subject,
    folded,
)
from moescope.reporting.tables import Cell, Row, Section, Table
from moescope.reporting.visible import visible
from moescope.reporting.wording import capital
from moescope.simulation.cache import cache
from moescope.simulation.offloading import offloading
from moescope.simulation.together import Job
from moescope.trace import Trace

SECTION = PageSection(
    WORTH,
    "caches",
    "How large a cache of experts?",
    "Expert caches",
    "Experts that do not fit into fast memory are fetched when a token needs them. A cache keeps some, and "
    "hits more the longer tokens stay.",
)
_FOLDED = {
    "cache": "Hit ratios by policy, and the part of the gap to the optimum closed",
    "cache_layers": "By layer",
    "cache_domains": "By domain",
}

REPORTED = ("lru", "aged-lfu", "hot", "belady")
"""Policies of a report: what is used, the best simple one, what needs no cache at all, and the optimum."""

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

_FITTED = ("hot", "matching")
_UNFITTED = "{}: not played, for one half of the corpus has no document to fit them on."
_ENDS = (POLICY_NAMES["lru"], POLICY_NAMES["belady"])

MOST_SIZES = 6


def play(results: Results) -> Job | None:
    """Of `REPORTED`; nothing for counts, nor where every token takes all experts."""
    trace = results.trace
    if trace.header.counts_only or all(layer.top_k >= layer.num_experts for layer in trace.layers):
        return None
    policies = REPORTED if trace.num_documents > 1 else ("lru", "aged-lfu", "belady")
    return Job(partial(cache, policies=policies))


def blocks(found: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """Hit ratios by size and by layer, and the tables."""
    yield PageFigure(
        name="cache",
        file="cache",
        draw=lambda: drawn.cache.draw_cache(found),
        label="Caches",
        title="What a cache of experts would hit",
        caption=(
            "Per cent of the requests of decoding, token by token, that find their expert in a cache of each layer; "
            "left by experts it holds, all layers together; right by layer. Dashed: the tokens of each document in "
            "random order. Dotted: uniform routing. Bands and bars: 95 % over documents."
        ),
        how=(
            "From dotted to dashed is what popularity and the documents' own mix give; from dashed to the line, the "
            "order of the tokens; from LRU to the optimum, the most that a better policy could add."
        ),
        cannot=(
            "Seconds (“moescope cache --expert-bytes … --bandwidth …” tells tokens a second), what prefetching adds, "
            "or what other text would hit. The optimum knows the future."
        ),
        frame=cache_frame(found),
    )
    yield from folded(cache_tables(found), _FOLDED)


def _parse_policies(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    if value is None:
        return tuple(POLICY_NAMES)
    names = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
    if unknown := [name for name in names if name not in POLICY_NAMES]:
        raise click.BadParameter(f"no policy {unknown[0]!r}; there are {', '.join(POLICY_NAMES)}.")
    return names


@trace_argument
@layers_option
@click.option(
    "--policies",
    callback=_parse_policies,
    metavar="LIST",
    help=f"Policies to play, of {', '.join(POLICY_NAMES)}.  [default: all]",
)
@click.option(
    "--sizes",
    callback=parse_integers,
    metavar="LIST",
    help="Experts a layer that the cache holds, such as 2,4.  [default: all from top-k]",
)
@click.option(
    "--budget",
    type=click.Choice(["layer", "global"]),
    default="layer",
    show_default=True,
    help="A cache a layer, or one for all layers.",
)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Sequences decoded together."
)
@click.option("--prefill", type=click.IntRange(1), metavar="N", help="Serve chunks of N tokens instead of decoding.")
@click.option("--cold-sequences", is_flag=True, help="Empty the caches before each sequence.")
@click.option("--expert-bytes", type=click.FloatRange(0, min_open=True), metavar="N", help="Bytes of one expert.")
@click.option(
    "--bandwidth", type=click.FloatRange(0, min_open=True), metavar="GB/S", help="Of the link that loads them."
)
@click.option("--latency", type=click.FloatRange(0), default=0.0, metavar="US", help="Of one load, microseconds.")
@click.option("--compute", type=click.FloatRange(0), default=0.0, metavar="MS", help="Work a token, milliseconds.")
@click.option(
    "--overlap", type=click.FloatRange(0, 1), default=0.0, help="Part of work and loads that runs at once, 0-1."
)
@figures_option
def command(
    trace: Trace,
    layers: tuple[int, ...] | None,
    policies: tuple[str, ...],
    sizes: tuple[int, ...] | None,
    budget: Literal["layer", "global"],
    batch: int,
    prefill: int | None,
    cold_sequences: bool,
    expert_bytes: float | None,
    bandwidth: float | None,
    latency: float,
    compute: float,
    overlap: float,
    figures: Path | None,
) -> Iterator[Table | Drawing]:
    """Show what caches of experts would hit.

    Plays the trace through caches of every size: by policy beside the optimum (Belady), the tokens of each document in
    random order, and uniform routing; then by layer and by domain. With --expert-bytes and --bandwidth also the tokens
    a second that loading the misses leaves. CSV and JSON hold all hit ratios in one table.

    \b
    Example:
      moescope cache pile.moe --expert-bytes 66e6 --bandwidth 16 --compute 30
    """
    if (expert_bytes is None) != (bandwidth is None):
        raise click.UsageError("--expert-bytes and --bandwidth belong together: give both, or neither.")
    shown_layers(trace, layers)  # says so if there is nothing in it
    with layer_progress("playing") as progress:
        try:
            played = cache(
                trace,
                layers,
                policies=policies,
                sizes=sizes,
                budget=budget,
                batch=batch,
                prefill=prefill,
                cold_sequences=cold_sequences,
                progress=progress,
            )
        except ValueError as error:  # of the options together, or of an option and the trace
            raise click.UsageError(f"{error}.") from None
    speed = None
    if expert_bytes is not None and bandwidth is not None:
        speed = offloading(
            played,
            bytes_per_expert=expert_bytes,
            bandwidth=1e9 * bandwidth,
            latency=1e-6 * latency,
            compute=1e-3 * compute,
            overlap=overlap,
        )
    yield from cache_tables(played, speed)
    yield Drawing(file="cache", draw=lambda: drawn.cache.draw_cache(played))


def cache_tables(cache: xr.Dataset, speed: xr.Dataset | None = None) -> Iterator[Table]:
    """Hit ratios of all layers together by policy and size; then by layer, by domain and, if given, in tokens a second.

    The frame of the first table holds everything but the speed.
    """
    sizes = shown_sizes(cache)
    yield _policies_table(cache, sizes)
    if {"lru", "belady"} & set(cache["policy"].values.tolist()):
        yield _by(cache, "layer", sizes[:3])
        if cache.sizes["domain"] > 2:
            yield _by(cache, "domain", sizes[:3])
    if speed is not None:
        yield _speed_table(speed, sizes)


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
            CLUSTERED,
            *((_UNFITTED.format(", ".join(unfitted)),) if unfitted else ()),
            *((sentence,) if (sentence := cache_sentence(cache)) else ()),
        ),
        frame=cache_frame(cache),
    )


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
                value, *ends = values(at, "tokens_per_second", "low", "high")
                bound = "*" if bool(at["link_bound"].item()) else ""
                cells.append(Cell(_rate(value), plus_minus(value, *ends), bound))
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


def advise(cache: xr.Dataset) -> Recommendation:
    """How large a cache: the (policy, size) whose hit ratio is furthest above c/E, what uniform routing gives.

    Up to there an expert added gains more than 1/E on average, beyond it less. Sizes are those short of all experts.
    LRU may be advised anywhere, another policy only where the interval of the way it goes from LRU to the optimum lies
    above 0; the optimum never, for it knows the future. Sizes whose intervals above c/E overlap that of the advised one
    are named as not told apart; if that is all of them, or the interval reaches c/E, there is no knee, and every expert
    added helps as much. The price of memory is not known here: a larger cache never hits less but by chance.
    """
    whole = cache.isel(domain=0)
    experts = cache["num_experts"].max().item()
    whole = whole.sel(size=whole["size"] < experts)
    requests_L = whole["requests"].values
    if not whole.sizes["size"] or not requests_L.any():
        return Recommendation("Nothing to advise.", "No cache short of all experts was played.")
    uniform_Z = (whole["uniform"].values * requests_L[:, None]).sum(axis=0) / requests_L.sum()
    above_PZ = (whole["overall"] - uniform_Z).transpose("policy", "size")
    better = whole["closed_low"].transpose("policy", "size") > 0
    allowed = (better | (whole["policy"] == "lru")) & (whole["policy"] != "belady")
    above_PZ = above_PZ.where(allowed)
    if not above_PZ.notnull().any():
        return Recommendation("Nothing to advise.", "LRU, which others are measured against, was not played.")
    p, z = np.unravel_index(int(np.nanargmax(above_PZ.values)), above_PZ.shape)
    at = whole.isel(policy=p, size=z)
    policy, size = str(at["policy"].item()), int(at["size"].item())
    curve = whole.isel(policy=p)
    low_Z, high_Z = curve["overall_low"].values - uniform_Z, curve["overall_high"].values - uniform_Z
    played_Z = curve["overall"].notnull().values
    alike_Z = played_Z & (high_Z >= low_Z[z])
    value, low, high = values(at, "overall", "overall_low", "overall_high")
    kept = f"{size} of {_experts(cache)} experts a layer"
    kept += ", in one cache," if cache.attrs["budget"] == "global" else ""
    evidence = [
        f"{capital(served(cache))}, {kept} hit {percent(value)}{spread(value, low, high)} % under "
        f"{POLICY_NAMES[policy]}; uniform routing gives {percent(float(uniform_Z[z]))} %"
        + _if_known(", the tokens of each document in any order {} %", at["overall_null"].item())
        + _if_known("; no policy could hit more than {} %", _of(whole, "belady", size))
        + "."
    ]
    if policy != "lru":
        closed, closed_low, closed_high = values(at, "closed", "closed_low", "closed_high")
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
        advice = f"{capital(kept)} was the only size played; whether another serves better is not known."
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
    return Recommendation(advice, " ".join(evidence))


def _of(whole: xr.Dataset, policy: str, size: int) -> float:
    if policy not in whole["policy"].values:
        return float("nan")
    return float(whole["overall"].sel(policy=policy, size=size))


def _if_known(text: str, share: float) -> str:
    return "" if isnan(share) else text.format(percent(share))


subject = Subject(play=play, blocks=blocks, section=SECTION, advise=advise, command=command)
