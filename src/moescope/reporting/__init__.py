"""Results in; terminal tables, CSV and LaTeX, figures and one HTML page out.

Rule of the room: it never counts. What it shows comes from `measures`, labelled, or, for coloured text, from a trace as
it is; what it prints is rounded here and nowhere else. `tables` and `figures` say what is shown, `formats`, `terminal`
and `page` how; `writer` puts everything into a folder. Text from models and corpora passes `visible` on its way out.
"""

from moescope.reporting.writer import report

__all__ = ["report"]
