"""Co-activation and transitions as maps of the lift, experts in clustered order; and the information between layers.

A map shows the binary logarithm of the lift on a diverging scale: orange, more often together than popularity makes
them; blue, less often; white, as often. Few experts carry the lift as a number, bold if it is significantly not 1; many
are put in an order in which like stand beside like, so that groups show as blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from moescope.measures.claims import first_middle_last
from moescope.measures.groups import FEWEST_EXPECTED
from moescope.reporting.colours import INK, MUTED, PAPER
from moescope.reporting.figures import style
from moescope.reporting.figures.style import FULL_WIDTH
from moescope.reporting.tables import SIGNIFICANT

MOST_WITH_NUMBERS = 10
MOST_WITH_LABELS = 24
MOST_ORDERED_OPTIMALLY = 300  # the optimal order of leaves takes time with the square of them, or more
MOST_MAPS = 3
LIMIT = 2.0
"""Binary logarithm of the lift at which the scale ends: a quarter, four times as often."""

DIVERGING = LinearSegmentedColormap.from_list(
    "less_white_more", ["#0c2750", "#2a5f9e", "#7fb0d9", "#dbe8f3", PAPER, "#fbe3c3", "#f2a950", "#c8651a", "#6b2a05"]
).with_extremes(bad="#c9ccd1")


def draw_coactivation(coactivation: xr.Dataset, layers: Sequence[int] | None = None) -> Figure:
    """A map of the lift of each pair of experts, a panel a layer, at most three; None: first, middle and last."""

    def draw(axes: Axes, layer: int) -> ScalarMappable:
        of_layer = coactivation.sel(layer=layer)
        size = int(of_layer["num_ids"])
        lift, differs = _tested(of_layer, size, size)
        order = order_of_pairs(lift)
        mesh = _draw_map(axes, lift, differs, order, order)
        style.panel_title(axes, f"Layer {layer}")
        axes.set_xlabel("expert" if size <= MOST_WITH_NUMBERS else f"{size} experts, clustered", labelpad=3)
        excess, null = 100 * float(of_layer["deviation"]), 100 * float(of_layer["deviation_null"])
        _add_note(axes, f"{excess:.0f} % of pairs in excess" + ("" if isnan(null) else f" ({null:.0f} by chance)"))
        return mesh

    with style.style():
        return _draw_maps(_shown(coactivation, layers), draw, "pairs of experts")


def draw_transitions(transitions: xr.Dataset, layers: Sequence[int] | None = None) -> Figure:
    """Maps of the lift of each transition to `layers`, at most three, and below the information between all layers.

    Where there are many experts, those without a transition that enough tokens test are left out. None for the first,
    the middle and the last layer.
    """

    def draw(axes: Axes, layer: int) -> ScalarMappable:
        of_layer = transitions.sel(layer=layer)
        lift, differs = _tested(of_layer, int(of_layer["num_before"]), int(of_layer["num_ids"]))
        tested, before = np.isfinite(lift), int(of_layer["layer_before"])
        orders, names = [order_of_rows(lift), order_of_rows(lift.T)], []
        for axis, number in enumerate((before, layer)):
            used, size = int(tested.any(axis=1 - axis).sum()), lift.shape[axis]
            names.append(f"expert at layer {number}" + (", clustered" if size > MOST_WITH_NUMBERS else ""))
            if max(lift.shape) > MOST_WITH_NUMBERS and 0 < used < size:
                orders[axis] = orders[axis][:used]  # the others come last
                names[axis] = f"{used} of {size} experts, layer {number}"
        mesh = _draw_map(axes, lift, differs, *orders)
        style.panel_title(axes, f"Layer {before} to {layer}")
        axes.set_aspect("auto")
        axes.set_xlabel(names[1], labelpad=3)
        axes.set_ylabel(names[0], labelpad=3)
        if not tested.all():
            _add_note(axes, f"{tested.sum():,} of {tested.size:,} have enough tokens")
        return mesh

    with style.style():
        figure = _draw_maps(_shown(transitions, layers), draw, "transitions", below=1.75)
        _draw_information(figure, transitions)
    return figure


def order_of_pairs(lift: NDArray[np.float64]) -> NDArray[np.int64]:
    """Experts in an order in which those often together stand side by side; those without any pair last.

    Average linkage of limit - log2 lift, leaves ordered to be most like their neighbours (Bar-Joseph et al. 2001). The
    lift is symmetric, and its diagonal is not looked at.
    """
    logs = _logs(lift)
    np.fill_diagonal(logs, np.nan)
    used = np.flatnonzero(np.isfinite(logs).any(axis=1))
    distance = LIMIT - np.nan_to_num(logs[np.ix_(used, used)])
    np.fill_diagonal(distance, 0)
    return _leaves((distance + distance.T) / 2, used, len(lift))


def order_of_rows(lift: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rows in an order in which those with like profiles of lift stand side by side; rows without any last."""
    logs = _logs(lift)
    used = np.flatnonzero(np.isfinite(logs).any(axis=1))
    profile = np.nan_to_num(logs[used])
    return _leaves(np.sqrt(((profile[:, None] - profile[None]) ** 2).sum(axis=-1)), used, len(lift))


def _leaves(distance: NDArray[np.float64], used: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """All of `size`, those in use clustered by their distances; fewer than three have no order but their own."""
    if len(used) < 3:
        return np.arange(size)
    condensed = squareform(distance, checks=False)
    tree = hierarchy.linkage(condensed, "average", optimal_ordering=len(used) <= MOST_ORDERED_OPTIMALLY)
    order = used[hierarchy.leaves_list(tree)]
    return np.concatenate([order, np.setdiff1d(np.arange(size), order)])


def _logs(lift: NDArray[np.float64]) -> NDArray[np.float64]:
    """Binary logarithm of the lift, cut at the ends of the scale; NaN where there is no lift."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs: NDArray[np.float64] = np.clip(np.log2(lift), -LIMIT, LIMIT)
    return logs


def _tested(of_layer: xr.Dataset, rows: int, columns: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The lifts of which enough tokens are expected for a test, NaN elsewhere, and which of them differ from 1."""
    lift, p, q = (of_layer[name].values[:rows, :columns] for name in ("lift", "lift_p", "lift_q"))
    return np.where(np.isfinite(p), lift, np.nan), q < SIGNIFICANT


def _shown(data: xr.Dataset, layers: Sequence[int] | None) -> Sequence[int]:
    known = data["layer"].values.tolist()
    return first_middle_last(known) if layers is None else [layer for layer in layers if layer in known][:MOST_MAPS]


def _draw_maps(
    layers: Sequence[int], draw: Callable[[Axes, int], ScalarMappable], things: str, below: float = 0.0
) -> Figure:
    """A map a layer, side by side, the scale under them, and `below` inches more."""
    width = FULL_WIDTH if len(layers) > 1 else style.NARROW
    left, gap = 0.42, 0.42
    side = min((width - left - 0.1 - gap * (len(layers) - 1)) / len(layers), 3.4)
    top, under = 0.28, 0.95 if not below else 0.82
    height = top + side + under + below
    figure = style.new_figure(width, height)
    for place, layer in enumerate(layers):
        corner = ((left + place * (side + gap)) / width, (under + below) / height)
        mesh = draw(figure.add_axes((*corner, side / width, side / height)), layer)
    words = f"times as often as popularity alone makes {things}; grey: under {FEWEST_EXPECTED} tokens expected"
    bar = style.add_scale(figure, mesh, words, left=left, bottom=below + 0.2, length=1.5, gap=0.02 * width)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])
    return figure


def _add_note(axes: Axes, note: str) -> None:
    axes.text(0, -0.175, note, transform=axes.transAxes, fontsize=7, color=MUTED, va="top")


def _draw_map(
    axes: Axes,
    lift: NDArray[np.float64],
    differs: NDArray[np.bool_],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
) -> ScalarMappable:
    few = max(lift.shape) <= MOST_WITH_NUMBERS
    if few:
        rows, columns = map(np.arange, lift.shape)
    lift, differs = lift[np.ix_(rows, columns)], differs[np.ix_(rows, columns)]
    logs = _logs(lift)
    look = {"edgecolors": PAPER, "linewidth": 0.5} if max(lift.shape) <= MOST_WITH_LABELS else {"rasterized": True}
    mesh = style.add_map(axes, logs, cmap=DIVERGING, vmin=-LIMIT, vmax=LIMIT, **look)
    axes.set_aspect("equal")
    if few:
        for row, column in np.argwhere(np.isfinite(logs)):
            dark, bold = abs(logs[row, column]) > 1.25, differs[row, column]  # dark: black would be hard to read
            axes.text(
                column + 0.5, row + 0.5, _short(float(lift[row, column])), ha="center", va="center", fontsize=5.6,
                color="#ffffff" if dark else "#000000" if bold else MUTED, fontweight="bold" if bold else "normal",
            )  # fmt: skip
    for ids, axis in ((rows, axes.yaxis), (columns, axes.xaxis)):
        labels = [str(expert) for expert in ids] if len(ids) <= MOST_WITH_LABELS else []
        axis.set_ticks(np.arange(len(labels)) + 0.5, labels)
    axes.tick_params(pad=2, labelsize=6.5 if max(lift.shape) <= MOST_WITH_NUMBERS else 5)
    return mesh


def _draw_information(figure: Figure, transitions: xr.Dataset) -> None:
    """The panel below the maps."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((0.55 / width, 0.42 / height, (width - 0.75) / width, 1.1 / height))
    layers = transitions["layer"].values.astype(float)
    value, null = (transitions[name].values for name in ("information", "information_null"))
    style.add_intervals(axes, transitions, "information")
    axes.plot(layers, value, "-s", color=INK, markersize=3.0, linewidth=1.2, label="bias removed")
    look: dict[str, Any] = {"linestyle": style.DASHED, "linewidth": 1.0, "marker": "o", "markersize": 2.2}
    axes.plot(layers, null, color=MUTED, **look, label="sampling alone")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    if len(layers) <= style.MOST_LAYERS_WITH_MARKERS:
        axes.set_xticks(layers, [str(int(layer)) for layer in layers])
    axes.set_xlim(layers[0] - 0.3, layers[-1] + 0.3)
    axes.set_ylabel("bits", labelpad=3)
    axes.set_xlabel("Layer", labelpad=2)
    axes.grid(axis="y")
    style.panel_title(axes, "Information that a layer's choice holds of the next one's")
    axes.legend(loc="upper right", ncols=2, borderaxespad=0, bbox_to_anchor=(1, 1.2))


def _short(value: float) -> str:
    """A lift in three characters or so.

    Example:
        >>> _short(0.0), _short(0.234), _short(1.98), _short(12.3)
        ('0', '.23', '2.0', '12')
    """
    if value >= 9.95:
        return f"{value:.0f}"
    if value >= 0.995:
        return f"{value:.1f}"
    return "0" if value == 0 else f"{value:.2f}".removeprefix("0")
