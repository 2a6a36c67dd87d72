"""The one look of all figures, and how they are written: PNG, SVG and PDF, the same bytes every time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import cycle
from pathlib import Path as FilePath
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from moescope.reporting.colours import INK, MUTED, PAPER, RULE, domain_colours
from moescope.reporting.figures import fonts
from moescope.reporting.visible import shorten
from moescope.reporting.wording import capital, describe_kind

FULL_WIDTH = 6.75
"""Width of a page of text, inches."""

NARROW = 0.62 * FULL_WIDTH
"""Width of a figure of one panel."""

UNIFORM: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (4, 3))}
"""Look of the line of uniform routing."""

DASHED = (0, (4, 2))
"""Line of a null."""

MOST_LAYERS_WITH_MARKERS = 16
"""Layers up to which each has its marker, and its tick."""

PNG_DOTS_PER_INCH = 200
LONGEST_NAME = 24  # characters of a domain in a legend
_MARKERS = "osD^vPX*<>hp8"
_LINES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1.5, 1.2)))
_HATCHES = ("", "////", "....")


class Mark(NamedTuple):
    """How the bars, lines and points of a domain are drawn; its name is safe and not too long."""

    name: str
    colour: str
    marker: str
    line: Any
    hatch: str


def domain_marks(domains: Sequence[str]) -> list[Mark]:
    """A mark for each domain; no two are alike up to thirty."""
    colours = domain_colours(len(domains))
    marks = []
    for number, (domain, colour, marker) in enumerate(zip(domains, colours, cycle(_MARKERS), strict=False)):
        turn = number // len(set(colours))  # of the colours, told apart by line and hatch
        line, hatch = _LINES[turn % len(_LINES)], _HATCHES[turn % len(_HATCHES)]
        marks.append(Mark(shorten(domain, LONGEST_NAME), colour, marker, line, hatch))
    return marks


@contextmanager
def style() -> Iterator[None]:
    """Draw, or save, in the look of this module; afterwards matplotlib is as it was."""
    with mpl.rc_context(_settings()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a domain's name in a rare script
        yield


def save(figure: Figure, folder: FilePath, name: str) -> None:
    """Write the figure as ``name.png``, ``name.svg`` and ``name.pdf``, without dates, so that it is reproducible."""
    with style():
        figure.savefig(folder / f"{name}.png", dpi=PNG_DOTS_PER_INCH)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        with mpl.rc_context({"font.sans-serif": fonts.families_in_pdf()}):
            figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    return Figure(figsize=(width, height))


def place(figure: Figure, *, left: float, right: float, top: float, bottom: float, between: float, rows: int) -> None:
    """Set the margins and the space between rows of axes, all in inches."""
    width, height = figure.get_size_inches()
    row = (height - top - bottom - between * (rows - 1)) / rows
    figure.subplots_adjust(
        left=left / width, right=1 - right / width, top=1 - top / height, bottom=bottom / height, hspace=between / row
    )


def beside_names(names: Sequence[str]) -> float:
    """Space at the left for the names of rows, inches."""
    return 0.15 + 0.053 * max(map(len, names))


def legend_above(figure: Figure, handles: Sequence[Artist], *, columns: int) -> None:
    """A legend over the full width, at the top edge of the figure."""
    if not handles:
        return
    named = [str(handle.get_label()) for handle in handles]
    anchor = (0.5, 1 - 0.04 / figure.get_size_inches()[1])
    figure.legend(list(handles), named, loc="upper center", bbox_to_anchor=anchor, ncols=columns, borderaxespad=0)


def legend_rows(num_entries: int, columns: int) -> float:
    """Height of a legend with so many entries, inches."""
    return 0.15 * -(-num_entries // columns) + 0.04


def bar_handles(marks: Sequence[Mark]) -> list[Patch]:
    """Legend entries of bars."""
    return [Patch(label=mark.name, fc=mark.colour, hatch=mark.hatch, ec=PAPER, lw=0) for mark in marks]


def line_handles(marks: Sequence[Mark]) -> list[Line2D]:
    """Legend entries of lines."""
    return [
        line_handle(
            mark.name, color=mark.colour, linestyle=mark.line, marker=mark.marker, markersize=3.2, linewidth=1.2
        )
        for mark in marks
    ]


def line_handle(label: str, **look: Any) -> Line2D:
    """Legend entry of a line of another look."""
    return Line2D([], [], label=label, **look)


def band_handle(label: str) -> Patch:
    """Legend entry of a grey band."""
    return Patch(facecolor=MUTED, alpha=0.25, linewidth=0, label=label)


def add_rectangles(axes: Axes, corners: NDArray[np.float64], **look: Any) -> PathPatch:
    """Draw rectangles of one look as one patch, which is much quicker than one each.

    The corners are left, bottom, right and top in data units, shape (rectangle, 4).
    """
    left, bottom, right, top = np.asarray(corners, float).T
    points = np.stack([left, bottom, right, bottom, right, top, left, top, left, bottom], axis=1).reshape(-1, 2)
    codes = np.tile([Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY], len(left))
    return _add_path(axes, points, codes, **look)


def add_verticals(
    axes: Axes, x: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64], **look: Any
) -> None:
    """Draw vertical lines of one look, such as intervals, as one patch; where an end is NaN there is none."""
    known = np.isfinite(low) & np.isfinite(high)
    points = np.stack([x[known], low[known], x[known], high[known]], axis=1).reshape(-1, 2)
    _add_path(axes, points, np.tile([Path.MOVETO, Path.LINETO], known.sum()), facecolor="none", **look)


def add_line(
    axes: Axes,
    x: NDArray[Any],
    value: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    mark: Mark,
    alpha: float = 0.18,
) -> None:
    """Draw a line with its markers over the band of its intervals."""
    axes.fill_between(x, low, high, color=mark.colour, alpha=alpha, linewidth=0)
    look: dict[str, Any] = {"color": mark.colour, "linestyle": mark.line, "marker": mark.marker, "label": mark.name}
    axes.plot(x, value, **look, linewidth=1.2, markersize=3.2, markeredgewidth=0)


def add_intervals(axes: Axes, data: xr.Dataset, name: str, colour: str = INK, scale: float = 1, **look: Any) -> None:
    """Draw the intervals of a value of each layer."""
    low, high = (scale * data[f"{name}_{end}"].values for end in ("low", "high"))
    layers = data["layer"].values.astype(float)
    add_verticals(axes, layers, low, high, edgecolor=colour, **{"linewidth": 0.9, "alpha": 0.8} | look)


def add_spread(
    axes: Axes, x: NDArray[Any], low: NDArray[np.float64], high: NDArray[np.float64], colour: str, shade: float,
    *, few: int = MOST_LAYERS_WITH_MARKERS, **look: Any,
) -> None:  # fmt: skip
    """Draw intervals as vertical lines up to `few` of them; beyond, as a band of an opacity, `shade`."""
    if len(x) <= few:
        add_verticals(axes, x.astype(float), low, high, edgecolor=colour, **{"linewidth": 0.9} | look)
    else:
        axes.fill_between(x, low, high, color=colour, alpha=shade, linewidth=0)


def add_marked(
    axes: Axes, x: NDArray[Any], y: NDArray[np.float64], colour: str, marker: str, first: int = 0, **look: Any
) -> None:
    """Draw a line with all its markers, or with every fourth from the first where layers are many."""
    every = 1 if len(x) <= MOST_LAYERS_WITH_MARKERS else (first, 4)
    usual = {"markersize": 3.2, "linewidth": 1.2, "markevery": every, "markeredgewidth": 0}
    axes.plot(x, y, color=colour, marker=marker, **usual | look)


def _add_path(axes: Axes, points: NDArray[np.float64], codes: NDArray[np.uint8], **look: Any) -> PathPatch:
    patch = PathPatch(Path(points.reshape(-1, 2), codes.astype(np.uint8)), **look)
    patch.set_transform(axes.transData)
    patch.set_clip_path(axes.patch)
    axes.add_artist(patch)
    if len(points):
        axes.update_datalim(points)
    return patch


def panels_in_row(
    number: int, legend: Sequence[Artist] = (), *, columns: int = 1, titles: float = 0.3, height: float = 2.2,
    width: float = FULL_WIDTH, left: float = 0.5, **layout: Any,
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """A figure with panels side by side under a legend, over a line for the names of their axes.

    Sizes are in inches: `height` of a panel, `titles` the space for the titles of panels, `left` the margin. The layout
    is that of `Figure.subplots`.
    """
    top = titles + (legend_rows(len(legend), columns) if legend else 0)
    figure = new_figure(width, top + 0.42 + height)
    panels = figure.subplots(1, number, squeeze=False, **layout)[0].tolist()
    place(figure, left=left, right=0.1, top=top, bottom=0.42, between=0, rows=1)
    figure.subplots_adjust(wspace=0.16)
    legend_above(figure, legend, columns=columns)
    return figure, panels


def panels_of_kinds(
    kinds: Sequence[str], result: xr.Dataset, legend: Sequence[Artist] = (), **sizes: Any
) -> tuple[Figure, list[Axes]]:
    """A panel for each of the kinds of a result, under its title; the rest as of `panels_in_row`."""
    figure, panels = panels_in_row(len(kinds), legend, width=FULL_WIDTH if len(kinds) > 1 else NARROW, **sizes)
    for axes, kind in zip(panels, kinds, strict=True):
        panel_title(axes, capital(describe_kind(kind, result)))
    return figure, panels


def add_domain(axes: Axes, x: NDArray[Any], y: NDArray[np.float64], mark: Mark, number: int, **look: Any) -> None:
    """Draw the line of a domain by layer; where markers are few, those of neighbouring domains stand apart."""
    look |= {"linestyle": mark.line, "label": mark.name}
    add_marked(axes, x, y, mark.colour, mark.marker, number % 4, **look)


def widened(layers: NDArray[Any], *values: NDArray[np.float64]) -> tuple[NDArray[Any], ...]:
    """Values by layer, carried on to both sides so that the ends, and a single layer, can be seen."""
    reach = beside(layers) if len(layers) else 0
    x = np.concatenate([layers[:1] - reach, layers, layers[-1:] + reach])
    return x, *(np.concatenate([v[:1], v, v[-1:]]) for v in values)


def add_band(axes: Axes, layers: NDArray[Any], values_DL: NDArray[np.float64], label: str) -> None:
    """Draw a grey band by layer, from the lowest domain to the highest, where any is known."""
    known = np.isfinite(values_DL).any(axis=0)
    if known.any():
        x, *ends = widened(layers[known], *(end(values_DL[:, known], axis=0) for end in (np.nanmin, np.nanmax)))
        axes.fill_between(x, ends[0], ends[1], color=MUTED, alpha=0.25, linewidth=0, label=label)


def beside(layers: NDArray[np.integer[Any]]) -> float:
    """How far a panel by layer goes on beyond the first and the last, so that a single one can be seen."""
    reach: float = 0.03 * max(1, layers[-1] - layers[0]) + 0.12
    return reach


def layer_axis(axes: Axes, layers: NDArray[np.integer[Any]]) -> None:
    """Layers along x, each with its tick where there are few, and a little space on both sides; lines across."""
    layer_ticks(axes)
    if len(layers) <= MOST_LAYERS_WITH_MARKERS:
        axes.set_xticks(layers)
    axes.set_xlim(layers[0] - beside(layers), layers[-1] + beside(layers))


def layer_ticks(axes: Axes, most: int | Literal["auto"] = "auto") -> None:
    """Layers along x, with so many ticks at most, and lines across."""
    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("Layer", labelpad=2)
    axes.grid(axis="y")


def map_of_layers_axis(axes: Axes, layers: NDArray[np.integer[Any]], most: int | None, shift: float) -> None:
    """Layers along x of a map, a column each, its tick `shift` from where it starts: `most` ticks, or all for None."""
    columns = range(len(layers)) if most is None else MaxNLocator(most, integer=True).tick_values(0, len(layers) - 1)
    shown = [int(column) for column in columns if column < len(layers)]
    axes.set_xticks(np.array(shown) + shift, [str(layers[column]) for column in shown])
    axes.set_xlabel("Layer", labelpad=2)


def add_map(axes: Axes, *values: NDArray[Any], **look: Any) -> QuadMesh:
    """Draw squares in colours, the first row above, without ticks and spines; the values are those of `pcolormesh`."""
    mesh = axes.pcolormesh(*values, **look)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def add_scale(
    figure: Figure, mesh: ScalarMappable, words: str, left: float, bottom: float, length: float, gap: float, **look: Any
) -> Colorbar:
    """A scale of colours at the bottom with words beside it; places and sizes in inches."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, bottom / height, length / width, 0.07 / height))
    bar = figure.colorbar(mesh, cax=axes, orientation="horizontal", **look)
    bar.outline.set_linewidth(0)
    axes.tick_params(length=2, pad=2)
    figure.text((left + length + gap) / width, bottom / height, words, fontsize=7, color=MUTED, va="bottom")
    return bar


def panel_title(axes: Axes, title: str) -> None:
    """A title at the left, over the panel."""
    axes.set_title(title, loc="left", pad=4)


@cache
def _settings() -> Any:
    return {
        "font.family": "sans-serif",
        "font.sans-serif": fonts.families(),
        "font.size": 8,
        "axes.titlesize": 8.5,
        "axes.titleweight": "bold",
        "axes.labelsize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7.5,
        "text.color": INK,
        "text.hinting": "none",  # the advance of a character must not depend on the resolution
        "text.parse_math": False,  # a domain called $x$ is a name, not mathematics
        "axes.titlecolor": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.facecolor": "none",
        "axes.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "axes.formatter.use_mathtext": False,
        "grid.color": RULE,
        "grid.linewidth": 0.5,
        "hatch.linewidth": 0.6,
        "hatch.color": PAPER,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.major.size": 2.5,
        "ytick.major.size": 2.5,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
        "legend.handletextpad": 0.5,
        "legend.columnspacing": 1.4,
        "legend.labelspacing": 0.35,
        "figure.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "savefig.bbox": None,
        "svg.fonttype": "none",
        "svg.hashsalt": "moescope",
        "pdf.fonttype": 42,
    }
