"""Expert caches: hit ratio by size, a line a policy, and by layer at one size.

Left, all layers together: the policies, the optimum, LRU and the optimum with the tokens of each document in random
order (dashed), and uniform routing (dotted). Right, LRU, the same in random order and the optimum by layer.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from moescope.reporting.colours import INK, MUTED, domain_colours
from moescope.reporting.figures import style
from moescope.reporting.figures.style import FULL_WIDTH
from moescope.reporting.subjects.cache import POLICY_NAMES, played_policies, quarter

MOST_SIZES_WITH_MARKERS = 16
_LOOK = {
    "lru": (0, "o"),
    "lfu": (1, "s"),
    "aged-lfu": (2, "D"),
    "s3-fifo": (3, "^"),
    "hot": (4, "v"),
    "matching": (6, "P"),
}
_ANY_ORDER, _UNIFORM = (0, (4, 2)), (0, (1, 1.6))


def draw_cache(cache: xr.Dataset, size: int | None = None) -> Figure:
    """Hit ratio of expert caches by size and by layer.

    Args:
        cache: Of `moescope.cache`.
        size: Experts a layer of the panel by layer; None for about a quarter of them.
    """
    size = quarter(cache) if size is None else size
    policies = played_policies(cache)
    with style.style():
        handles = [_handle(policy) for policy in policies]
        if cache["overall_null"].notnull().any():
            handles.append(
                Line2D([], [], color=MUTED, linewidth=1.0, linestyle=_ANY_ORDER, label="tokens in any order")
            )
        handles.append(Line2D([], [], color=MUTED, linewidth=1.2, linestyle=_UNIFORM, label="uniform routing, c/E"))
        top = style.legend_rows(len(handles), 5) + 0.3
        figure = style.new_figure(FULL_WIDTH, top + 0.42 + 2.5)
        left, right = figure.subplots(1, 2, squeeze=False, width_ratios=[1.35, 1], sharey=True)[0]
        style.place(figure, left=0.5, right=0.1, top=top, bottom=0.42, between=0, rows=1)
        figure.subplots_adjust(wspace=0.08)
        _draw_sizes(left, cache, size)
        _draw_layers(right, cache, size)
        style.legend_above(figure, handles, [str(handle.get_label()) for handle in handles], columns=5)
    return figure


def _colour(policy: str) -> str:
    return INK if policy == "belady" else domain_colours(10)[_LOOK[policy][0]]


def _handle(policy: str) -> Line2D:
    look = (
        {"linewidth": 1.7} if policy == "belady" else {"linewidth": 1.2, "marker": _LOOK[policy][1], "markersize": 3.4}
    )
    return Line2D([], [], color=_colour(policy), label=POLICY_NAMES[policy], **look)


def _draw_sizes(axes: Axes, cache: xr.Dataset, size: int) -> None:
    sizes = cache["size"].values
    few = len(sizes) <= MOST_SIZES_WITH_MARKERS
    data = cache.isel(domain=0)
    requests = data["requests"].values
    uniform = (data["uniform"].values * requests[:, None]).sum(axis=0) / max(requests.sum(), 1)
    axes.plot(sizes, 100 * uniform, color=MUTED, linewidth=1.2, linestyle=_UNIFORM, label="uniform")
    for policy in played_policies(cache):
        at, colour = data.sel(policy=policy), _colour(policy)
        value = 100 * at["overall"].values
        known = np.isfinite(value)
        if policy in ("lru", "belady"):
            low, high = 100 * at["overall_low"].values, 100 * at["overall_high"].values
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(
                sizes, 100 * at["overall_null"].values, color=colour, linewidth=1.0, linestyle=_ANY_ORDER, label="null"
            )
        marked = policy != "belady" and (few or known.sum() < len(sizes))
        axes.plot(
            sizes[known],
            value[known],
            color=colour,
            linewidth=1.7 if policy == "belady" else 1.1,
            linestyle="-" if known.sum() * 2 > len(sizes) else "",  # between sizes that were not played is no line
            marker=_LOOK[policy][1] if marked else "",
            markersize=3.4,
            markeredgewidth=0,
            label=POLICY_NAMES[policy],
        )
    if not few:
        _mark_apart(axes, cache, sizes)
    axes.axvline(size, color=MUTED, linewidth=0.6)
    axes.set_ylim(0, 102)
    axes.set_ylabel("Hit ratio (%)")
    axes.set_xlabel(f"Cache, experts a layer of {int(cache['num_experts'].max())}", labelpad=2)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if few:
        axes.set_xticks(sizes)
    axes.grid(axis="y")
    style.panel_title(axes, "All layers")


def _mark_apart(axes: Axes, cache: xr.Dataset, sizes: np.ndarray) -> None:
    """A marker now and then on each smooth line, at sizes of its own, so that lines are not told by colour only."""
    smooth = [line for line in axes.lines if str(line.get_label()) in POLICY_NAMES.values()]
    apart = max(1, len(sizes) // 8)
    for at, line in enumerate(smooth):
        policy = next(key for key, name in POLICY_NAMES.items() if name == line.get_label())
        if policy != "belady" and line.get_marker() in ("", "None", None):
            line.set_marker(_LOOK[policy][1])
            line.set_markevery((at * apart // len(smooth), apart))


def _draw_layers(axes: Axes, cache: xr.Dataset, size: int) -> None:
    layers = cache["layer"].values.astype(float)
    data = cache.isel(domain=0).sel(size=size)
    few = len(layers) <= style.MOST_LAYERS_WITH_MARKERS
    axes.plot(layers, 100 * data["uniform"].values, color=MUTED, linewidth=1.2, linestyle=_UNIFORM, label="uniform")
    for policy in (p for p in ("lru", "belady") if p in cache["policy"].values):
        at, colour = data.sel(policy=policy), _colour(policy)
        low, high = 100 * at["low"].values, 100 * at["high"].values
        style.add_verticals(axes, layers, low, high, edgecolor=colour, linewidth=0.9, alpha=0.8)
        axes.plot(layers, 100 * at["null"].values, color=colour, linewidth=1.0, linestyle=_ANY_ORDER, label="null")
        axes.plot(
            layers,
            100 * at["hit_ratio"].values,
            color=colour,
            linewidth=1.7 if policy == "belady" else 1.1,
            marker=_LOOK[policy][1] if policy != "belady" else "",
            markersize=3.4,
            markevery=1 if few else 4,
            markeredgewidth=0,
            label=POLICY_NAMES[policy],
        )
    style.layer_axis(axes, layers)
    axes.set_xlabel("Layer", labelpad=2)
    style.panel_title(axes, f"By layer, {size} experts")
