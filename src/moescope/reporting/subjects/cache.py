"""What caches of experts would hit: tables, a figure, a sentence, and how large a cache to take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from math import isnan
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures.schema import total
from moescope.reporting import figures as drawn
from moescope.reporting.cells import CLUSTERED, cell, grid_of, with_interval
from moescope.reporting.chapters import WORTH
from moescope.reporting.frames import kinds, only, tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import number, percent
from moescope.reporting.options import figures_option, layers_option, one_of, parse_integers, trace_argument
from moescope.reporting.printing import layer_progress
from moescope.reporting.subject import Drawing, PageFigure, PageSection, PageTable, Recommendation, Results, Subject
from moescope.reporting.tables import Cell, Section, Table, grid
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
_UNFITTED = "{}: not simulated, for one half of the corpus has no document to fit them on."
_ENDS = (POLICY_NAMES["lru"], POLICY_NAMES["belady"])

MOST_SIZES = 6


def play(results: Results) -> Job | None:
    """Of `REPORTED`; nothing for counts, nor where every token takes all experts."""
    trace = results.trace
    if trace.header.counts_only or all(layer.top_k >= layer.num_experts for layer in trace.layers):
        return None
    policies = REPORTED if trace.num_documents > 1 else ("lru", "aged-lfu", "belady")
    return Job(partial(cache, policies=policies))


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """Hit ratios by size and by layer, and the tables."""
    yield PageFigure(
        name="cache",
        file="cache",
        draw=lambda: drawn.cache.draw_cache(result),
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
            "Seconds (“moescope cache --expert-bytes … --bandwidth …” gives tokens a second), what prefetching adds, "
            "or what other text would hit. The optimum knows the future."
        ),
        frame=cache_frame(result),
    )
    yield from PageTable.each(cache_tables(result), _FOLDED)


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
    help=f"Policies to simulate, of {', '.join(POLICY_NAMES)}.  [default: all]",
)
@click.option(
    "--sizes",
    callback=parse_integers,
    metavar="LIST",
    help="Experts a layer that the cache holds, such as 2,4.  [default: all from top-k]",
)
@one_of("--budget", ["layer", "global"], "A cache a layer, or one for all layers.")
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
    expert_bytes: float | None,
    bandwidth: float | None,
    latency: float,
    compute: float,
    overlap: float,
    figures: Path | None,
    **settings: Any,  # the arguments of `moescope.cache` that have these names
) -> Iterator[Table | Drawing]:
    """Show what caches of experts would hit.

    Simulates caches of every size on the trace: by policy beside the optimum (Belady), the tokens of each document in
    random order, and uniform routing; then by layer and by domain. With --expert-bytes and --bandwidth also the tokens
    a second that loading the misses leaves. CSV and JSON hold all hit ratios in one table.

    \b
    Example:
      moescope cache pile.moe --expert-bytes 66e6 --bandwidth 16 --compute 30
    """
    if (expert_bytes is None) != (bandwidth is None):
        raise click.UsageError("--expert-bytes and --bandwidth belong together: give both, or neither.")
    shown_layers(trace, layers)  # says so if there is nothing in it
    with layer_progress("simulating") as progress:
        try:
            result = cache(trace, layers, progress=progress, **settings)
        except ValueError as error:  # of the options together, or of an option and the trace
            raise click.UsageError(f"{error}.") from None
    speed = None
    if expert_bytes is not None and bandwidth is not None:
        speed = offloading(
            result,
            bytes_per_expert=expert_bytes,
            bandwidth=1e9 * bandwidth,
            latency=1e-6 * latency,
            compute=1e-3 * compute,
            overlap=overlap,
        )
    yield from cache_tables(result, speed)
    yield Drawing(file="cache", draw=lambda: drawn.cache.draw_cache(result))


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
    """A few sizes, evenly spread, for which every policy was simulated, and not the one that holds all experts."""
    known = total(cache)["model_hit_ratio"].sel(policy=played_policies(cache)).notnull()
    sizes = cache["size"].values[known.all("policy").values]
    if len(sizes) > 2 and sizes[-1] >= int(cache["num_experts"].max()):
        sizes = sizes[:-1]
    places = np.unique(np.rint(np.linspace(0, len(sizes) - 1, min(MOST_SIZES, len(sizes)))).astype(int))
    return [int(sizes[place]) for place in places]


def played_policies(cache: xr.Dataset) -> list[str]:
    """Policies that were simulated; those that are fitted need two documents at least."""
    known = total(cache)["model_hit_ratio"].notnull().any("size").values
    return [policy for policy, played in zip(cache["policy"].values.tolist(), known, strict=True) if played]


def cache_sentence(cache: xr.Dataset) -> str:
    """What LRU hits with a quarter of the experts, beside random order, uniform routing and the optimum, in words."""
    if "lru" not in cache["policy"].values:
        return ""
    size = quarter(cache)
    whole = total(cache).sel(size=size)
    lru = whole.sel(policy="lru")
    shared = cache.attrs["budget"] == "global"
    text = (
        f"{'One cache for all layers' if shared else 'A cache'} of {size} of {_experts(cache)} experts a layer hits "
        f"{percent(lru['model_hit_ratio'].item())} % under LRU; "
        f"uniform routing gives {percent(whole['model_hit_ratio_uniform'].item())} %"
    )
    if not isnan(lru["model_hit_ratio_null"].item()):
        text += f", the tokens of each document in any order {percent(lru['model_hit_ratio_null'].item())} %"
    if "belady" in cache["policy"].values:
        best = whole["model_hit_ratio"].sel(policy="belady").item()
        text += f"; no policy could hit more than {percent(best)} %"
    return f"{text}."


def quarter(cache: xr.Dataset) -> int:
    """The size nearest to a quarter of the experts of a layer at which there is something to evict."""
    sizes = cache["size"].values
    able = sizes[sizes > int(cache["top_k"].max())] if sizes[-1] > int(cache["top_k"].max()) else sizes
    return int(able[np.abs(able - int(cache["num_experts"].max()) / 4).argmin()])


def cache_frame(cache: xr.Dataset) -> pd.DataFrame:
    """A row a (policy, domain, size) of all layers together, then a row a (policy, domain, layer, size)."""
    model = only(cache, "policy", "domain", "size").assign(cache[["model_hit_ratio_uniform", "tokens"]])
    return kinds(
        {
            "all layers": tidy(model, "policy", "domain", "size"),
            "a layer": tidy(cache.drop_vars(model.data_vars), "policy", "domain", "layer", "size"),
        }
    )


def _policies_table(cache: xr.Dataset, sizes: Sequence[int]) -> Table:
    policies = played_policies(cache)
    data = _named(total(cache).sel(size=list(sizes), policy=policies))
    unfitted = [
        POLICY_NAMES[name]
        for name in cache["policy"].values.tolist()
        if name in _FITTED and policies and name not in policies
    ]

    sections = [Section("", grid_of(data, "policy", "size", "model_hit_ratio"))]
    sections += _baselines(data, sizes, "model_hit_ratio")
    between = data.sel(policy=[name for name in data["policy"].values.tolist() if name not in _ENDS])
    if data["closed"].notnull().any() and between.sizes["policy"]:
        sections.append(
            Section("part of the way from LRU to the optimum", grid_of(between, "policy", "size", "closed"))
        )
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
    data, name = (total(cache), "hit_ratio") if dim == "layer" else (cache, "model_hit_ratio")
    columns = [("lru", name, POLICY_NAMES["lru"])]
    if cache["model_hit_ratio_null"].notnull().any():
        columns.append(("lru", f"{name}_null", "any order"))
    columns.append(("belady", name, POLICY_NAMES["belady"]))
    columns = [column for column in columns if column[0] in cache["policy"].values]

    def of_column(key: str | int, column: tuple[int, tuple[str, str, str]]) -> Cell:
        size, (policy, variable, _) = column
        return cell(data.sel({dim: key, "size": size, "policy": policy}), variable)

    return Table(
        f"cache_{dim}s",
        f"Hit ratio by {dim}, {served(cache)}, %",
        dim,
        tuple(heading for _, _, heading in columns) * len(sizes),
        (Section("", grid(data[dim].values.tolist(), list(product(sizes, columns)), of_column)),),
        groups=tuple((f"{size} experts", len(columns)) for size in sizes),
        notes=("any order: LRU with the tokens of each document in random order.",),
        frame=cache_frame(cache),
    )


def _speed_table(speed: xr.Dataset, sizes: Sequence[int]) -> Table:
    data = total(speed).sel(size=list(sizes))
    played = data["tokens_per_second"].notnull().any("size").values
    data = _named(data.isel(policy=played))

    def with_bound(policy: str, size: int) -> Cell:
        place = data.sel(policy=policy, size=size)
        return cell(place, "tokens_per_second")._replace(mark="*" if place["link_bound"].item() else "")

    sections = [Section("", grid(data["policy"].values.tolist(), sizes, with_bound))]
    sections += _baselines(data, sizes, "tokens_per_second")
    memory = grid(["any"], sizes, lambda _, size: Cell(number(float(data["cache_bytes"].sel(size=size)) / 1e9)))
    sections.append(Section("memory of the caches, GB", memory))
    of = speed.attrs
    bound = data["link_bound"].values
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
        frame=tidy(speed, "policy", "domain", "size"),
    )


def _baselines(data: xr.Dataset, sizes: Sequence[int], name: str) -> Iterator[Section]:
    """The same value with tokens in random order, where that is known, and under uniform routing."""
    if data[f"{name}_null"].notnull().any():
        yield Section("tokens of each document in any order", grid_of(data, "policy", "size", f"{name}_null"))
    uniform = grid(["any without foresight"], sizes, lambda _, size: cell(data.sel(size=size), f"{name}_uniform"))
    yield Section("uniform independent routing", uniform)


def _named(data: xr.Dataset) -> xr.Dataset:
    """The same with policies called as tables call them."""
    return data.assign_coords(policy=[POLICY_NAMES[policy] for policy in data["policy"].values.tolist()])


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
    whole = total(cache)
    experts = cache["num_experts"].max().item()
    whole = whole.sel(size=whole["size"] < experts)
    if not whole.sizes["size"] or not whole["requests"].any():
        return Recommendation("Nothing to advise.", "No cache short of all experts was simulated.")
    uniform_Z = whole["model_hit_ratio_uniform"].values
    above_PZ = (whole["model_hit_ratio"] - uniform_Z).transpose("policy", "size")
    better = whole["closed_low"].transpose("policy", "size") > 0
    allowed = (better | (whole["policy"] == "lru")) & (whole["policy"] != "belady")
    above_PZ = above_PZ.where(allowed)
    if not above_PZ.notnull().any():
        return Recommendation("Nothing to advise.", "LRU, which others are measured against, was not simulated.")
    p, z = np.unravel_index(int(np.nanargmax(above_PZ.values)), above_PZ.shape)
    best = whole.isel(policy=p, size=z)
    policy, size = str(best["policy"].item()), int(best["size"].item())
    curve = whole.isel(policy=p)
    low_Z, high_Z = (curve[f"model_hit_ratio_{end}"].values - uniform_Z for end in ("low", "high"))
    played_Z = curve["model_hit_ratio"].notnull().values
    alike_Z = played_Z & (high_Z >= low_Z[z])
    kept = f"{size} of {_experts(cache)} experts a layer"
    kept += ", in one cache," if cache.attrs["budget"] == "global" else ""
    evidence = [
        f"{capital(served(cache))}, {kept} hit {with_interval(best, 'model_hit_ratio')} % under "
        f"{POLICY_NAMES[policy]}; uniform routing gives {percent(float(uniform_Z[z]))} %"
        + _if_known(", the tokens of each document in any order {} %", best["model_hit_ratio_null"].item())
        + _if_known("; no policy could hit more than {} %", _of(whole, "belady", size))
        + "."
    ]
    if policy != "lru":
        evidence.append(
            f"LRU hits {percent(_of(whole, 'lru', size))} %: {POLICY_NAMES[policy]} goes "
            f"{with_interval(best, 'closed')} % of the way from there to the optimum."
        )
    if isnan(best["model_hit_ratio_low"].item()):
        evidence.append("There are too few documents for an interval.")
    if low_Z[z] <= 0:
        advice = (
            "No knee: no cache is shown to hit more than its share of the experts, so each one added helps as much."
        )
    elif np.count_nonzero(played_Z) == 1:
        advice = f"{capital(kept)} was the only size simulated; whether another serves better is not known."
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
    return float(whole["model_hit_ratio"].sel(policy=policy, size=size))


def _if_known(text: str, share: float) -> str:
    return "" if isnan(share) else text.format(percent(share))


subject = Subject(play=play, blocks=blocks, section=SECTION, advise=advise, command=command)
