"""Expert caches: hit ratio by size, a line a policy, and by layer at one size.

Left, all layers together: the policies, the optimum, LRU and the optimum with the tokens of each document in random
order (dashed), and uniform routing (dotted). Right, LRU, the same in random order and the optimum by layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from moescope.measures.schema import total
from moescope.reporting.colours import INK, MUTED, domain_colours
from moescope.reporting.figures import style
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
_UNIFORM_LOOK: dict[str, Any] = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (1, 1.6))}


def draw_cache(cache: xr.Dataset) -> Figure:
    """Hit ratios of a `moescope.cache` by size, and by layer at the size of about a quarter of the experts."""
    size = quarter(cache)
    policies = played_policies(cache)
    with style.style():
        handles = [_handle(policy) for policy in policies]
        if cache["model_hit_ratio_null"].notnull().any():
            any_order = style.line_handle("tokens in any order", color=MUTED, linewidth=1.0, linestyle=style.DASHED)
            handles.append(any_order)
        handles.append(style.line_handle("uniform routing, c/E", **_UNIFORM_LOOK))
        figure, (left, right) = style.panels_in_row(
            2, handles, columns=5, height=2.5, width_ratios=[1.35, 1], sharey=True
        )
        figure.subplots_adjust(wspace=0.08)
        _draw_sizes(left, cache, size)
        _draw_layers(right, cache, size)
    return figure


def _colour(policy: str) -> str:
    return INK if policy == "belady" else domain_colours(10)[_LOOK[policy][0]]


def _handle(policy: str) -> Line2D:
    look = (
        {"linewidth": 1.7} if policy == "belady" else {"linewidth": 1.2, "marker": _LOOK[policy][1], "markersize": 3.4}
    )
    return style.line_handle(POLICY_NAMES[policy], color=_colour(policy), **look)


def _draw_sizes(axes: Axes, cache: xr.Dataset, size: int) -> None:
    sizes = cache["size"].values
    few = len(sizes) <= MOST_SIZES_WITH_MARKERS
    data = total(cache)
    axes.plot(sizes, 100 * data["model_hit_ratio_uniform"].values, label="uniform", **_UNIFORM_LOOK)
    for policy in played_policies(cache):
        of_policy = data.sel(policy=policy)
        known = of_policy["model_hit_ratio"].notnull().values
        if policy in ("lru", "belady"):
            low, high = (100 * of_policy[f"model_hit_ratio_{end}"].values for end in ("low", "high"))
            axes.fill_between(sizes, low, high, color=_colour(policy), alpha=0.15, linewidth=0)
        marked = policy != "belady" and (few or known.sum() < len(sizes))
        line = "-" if known.sum() * 2 > len(sizes) else ""  # between sizes that were not simulated is no line
        marker = _LOOK[policy][1] if marked else ""
        _draw_policy(axes, of_policy, "size", "model_hit_ratio", marker, linestyle=line, markevery=None)
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


def _draw_policy(axes: Axes, data: xr.Dataset, dim: str, name: str, marker: str, **look: Any) -> None:
    """The line of a policy, and dashed that of tokens in random order under LRU and the optimum."""
    policy, values = data["policy"].item(), data[name].values
    known = np.isfinite(values)
    if policy in ("lru", "belady"):
        null = 100 * data[f"{name}_null"].values
        axes.plot(data[dim].values, null, color=_colour(policy), linewidth=1.0, linestyle=style.DASHED, label="null")
    look |= {"linewidth": 1.7 if policy == "belady" else 1.1, "markersize": 3.4, "label": POLICY_NAMES[policy]}
    style.add_marked(axes, data[dim].values[known], 100 * values[known], _colour(policy), marker, **look)


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
    few = len(layers) <= style.MOST_LAYERS_WITH_MARKERS
    data = total(cache).sel(size=size)
    axes.plot(layers, 100 * data["hit_ratio_uniform"].values, label="uniform", **_UNIFORM_LOOK)
    for policy in (p for p in ("lru", "belady") if p in cache["policy"].values):
        of_policy = data.sel(policy=policy)
        style.add_intervals(axes, of_policy, "hit_ratio", _colour(policy), scale=100)
        marker = _LOOK[policy][1] if policy != "belady" else ""
        _draw_policy(axes, of_policy, "layer", "hit_ratio", marker, markevery=1 if few else 4)
    style.layer_axis(axes, layers)
    style.panel_title(axes, f"By layer, {size} experts")
