"""JSON of a trace's own files: an object of plain values, or one clear reason why it is none."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The object that a text holds.

    Raises:
        ValueError: It is not JSON, not an object, nested beyond all use, or holds a number that JSON does not have.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"holds no object but {str(value)[:40]!r}")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")
