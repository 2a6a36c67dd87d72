"""The one look of all figures, and how they are written: PNG, SVG and PDF, the same bytes every time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import cycle, islice
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from moescope.reporting.colours import INK, MUTED, PAPER, RULE, domain_colours
from moescope.reporting.visible import shorten

FULL_WIDTH = 6.75
"""Width of a page of text, inches."""

MOST_LAYERS_WITH_MARKERS = 16
"""Layers up to which each has its marker, and its tick."""

PNG_DOTS_PER_INCH = 200
LONGEST_NAME = 24
_MARKERS = "osD^vPX*<>hp8"
_LINES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1.5, 1.2)))
_HATCHES = ("", "////", "....")


class Mark(NamedTuple):
    """How a domain is drawn.

    Attributes:
        name: Its label, safe and not too long.
        colour: Of its bars and lines.
        marker: Of its points.
        line: Its line style.
        hatch: Of its bars.
    """

    name: str
    colour: str
    marker: str
    line: Any
    hatch: str


def domain_marks(domains: Sequence[str]) -> list[Mark]:
    """A mark for each domain; no two are alike up to thirty."""
    colours = domain_colours(len(domains))
    distinct = max(1, len(set(colours)))
    return [
        Mark(
            shorten(domain, LONGEST_NAME),
            colour,
            marker,
            _LINES[at // distinct % len(_LINES)],
            _HATCHES[at // distinct % len(_HATCHES)],
        )
        for at, (domain, colour, marker) in enumerate(
            zip(domains, colours, islice(cycle(_MARKERS), len(domains)), strict=True)
        )
    ]


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


def legend_above(figure: Figure, handles: Sequence[Artist], labels: Sequence[str], *, columns: int) -> None:
    """A legend over the full width, at the top edge of the figure."""
    height = figure.get_size_inches()[1]
    if not handles:
        return
    figure.legend(
        handles=list(handles),
        labels=list(labels),
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - 0.04 / height),
        ncols=columns,
        borderaxespad=0,
    )


def legend_rows(num_entries: int, columns: int) -> float:
    """Height of a legend with so many entries, inches."""
    return 0.15 * -(-num_entries // columns) + 0.04


def bar_handles(marks: Sequence[Mark]) -> list[Patch]:
    """Legend entries of bars."""
    return [Patch(facecolor=mark.colour, hatch=mark.hatch, edgecolor=PAPER, linewidth=0) for mark in marks]


def line_handles(marks: Sequence[Mark]) -> list[Line2D]:
    """Legend entries of lines."""
    return [
        Line2D([], [], color=mark.colour, linestyle=mark.line, marker=mark.marker, markersize=3.2, linewidth=1.2)
        for mark in marks
    ]


def add_rectangles(axes: Axes, corners: NDArray[np.float64], **look: Any) -> PathPatch:
    """Draw rectangles of one look as one patch, which is much quicker than one each.

    Args:
        axes: Where.
        corners: Left, bottom, right and top in data units, shape (rectangle, 4).
        look: Properties of the patch.
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
    axes.plot(
        x,
        value,
        color=mark.colour,
        linestyle=mark.line,
        linewidth=1.2,
        marker=mark.marker,
        markersize=3.2,
        markeredgewidth=0,
        label=mark.name,
    )


def _add_path(axes: Axes, points: NDArray[np.float64], codes: NDArray[np.uint8], **look: Any) -> PathPatch:
    patch = PathPatch(Path(points.reshape(-1, 2), codes.astype(np.uint8)), **look)
    patch.set_transform(axes.transData)
    patch.set_clip_path(axes.patch)
    axes.add_artist(patch)
    if len(points):
        axes.update_datalim(points)
    return patch


def beside(layers: NDArray[np.integer[Any]]) -> float:
    """How far a panel by layer goes on beyond the first and the last, so that a single one can be seen."""
    reach: float = 0.03 * max(1, layers[-1] - layers[0]) + 0.12
    return reach


def layer_axis(axes: Axes, layers: NDArray[np.integer[Any]]) -> None:
    """Layers along x, each with its tick where there are few, and lines across."""
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    if len(layers) <= MOST_LAYERS_WITH_MARKERS:
        axes.set_xticks(layers)
    axes.set_xlim(layers[0] - beside(layers), layers[-1] + beside(layers))
    axes.grid(axis="y")


def panel_title(axes: Axes, title: str) -> None:
    """A title at the left, over the panel."""
    axes.set_title(title, loc="left", pad=4)


@cache
def _settings() -> Any:
    installed = set(font_manager.get_font_names())
    sans = [name for name in ("Helvetica", "Arial", "Liberation Sans") if name in installed][:1]
    return {
        "font.family": [*sans, "DejaVu Sans"],
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
