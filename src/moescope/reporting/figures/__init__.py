"""The figures, drawn by matplotlib: results in, a `Figure` out.

Rule of the folder: a module a figure; nothing is computed that its CSV twin does not hold. No pyplot, so no global
state and no window; `style` holds the one look and writes the files. Figures are sized for paper: 6.75 inches is the
width of a page. A module is loaded when it is first named as an attribute of this one, so that subjects can name their
figures where matplotlib is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
