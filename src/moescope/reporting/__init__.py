"""Results in; terminal tables, CSV and LaTeX, figures and one HTML page out.

Rule of the folder: it never counts. What it shows comes from `measures` and `simulation`, labelled, or, for coloured
text, from a trace as it is; what it prints is rounded here and nowhere else. All that is said of one measure is its
module in ``subjects/``; the modules beside it hold what they share: what a subject is (`subject`), tables, cells and
frames, how numbers and words print. ``figures/`` alone imports matplotlib, ``page/`` alone jinja2; `formats` and
`terminal` print, `writer` puts a report into a folder. Text from models and corpora passes `visible` on its way out.
"""

from moescope.reporting.writer import report

__all__ = ["report"]
