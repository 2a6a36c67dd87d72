"""Write `docs/reference/errors.md` from the classes of `moescope.errors`: python docs/make_errors_page.py."""

from __future__ import annotations

import inspect
from pathlib import Path

from moescope import errors

PAGE = Path(__file__).parent / "reference" / "errors.md"


def page() -> str:
    """The text of the page: one heading per code, with its meaning."""
    classes = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.MoescopeError) and not value.__subclasses__()
    ]
    lines = [
        "# Errors",
        "",
        "Every error about files, models and data reads `error[code]: subject: problem`, with a hint if there is one;",
        "in Python it is a subclass of `moescope.errors.MoescopeError`. The exit code is 1. A wrong command line exits",
        "with 2, a wrong argument from Python is a `ValueError`.",
    ]
    for value in sorted(classes, key=lambda value: value.code):
        lines += ["", f"## `{value.code}`", "", f"`{value.__name__}`. {' '.join(inspect.getdoc(value).split())}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
