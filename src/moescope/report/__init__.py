"""Results in; terminal tables, CSV and LaTeX, figures and one HTML page out.

Rule of the room: it never counts. What it shows comes from `measures`, labelled, or, for coloured text, from a trace as
it is; what it prints is rounded here and nowhere else. `tables` and `figures` say what is shown, `formats`, `terminal`
and `page` how; `writer` puts everything into a folder. Text from models and corpora passes `visible` on its way out.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from moescope.report.writer import report

__all__ = ["report"]


class _Room(ModuleType):
    """Lets ``moescope.report(...)`` be the function although the room, its module, bears the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return report(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
