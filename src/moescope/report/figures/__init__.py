"""The figures of section 5, drawn by matplotlib: results in, a `Figure` out.

Rule of the folder: a module a figure; nothing is computed that its CSV twin does not hold. No pyplot, so no global
state and no window; `style` holds the one look and writes the files. Figures are sized for paper: 6.75 inches is the
width of a page.
"""

from moescope.report.figures.divergence import draw_divergence
from moescope.report.figures.repeats import draw_repeats
from moescope.report.figures.shares import as_bars, draw_choices, draw_shares
from moescope.report.figures.style import save
from moescope.report.figures.tokens import draw_tokens

__all__ = ["as_bars", "draw_choices", "draw_divergence", "draw_repeats", "draw_shares", "draw_tokens", "save"]
