"""A record as read from a file, and access to its fields.

A field is named as in the record, or by a dotted path into it: ``meta.pile_set_name``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class Unreadable(NamedTuple):
    """Takes the place of a record that cannot be read.

    Attributes:
        problem: Why it cannot be read.
    """

    problem: str


Record = dict[str, Any] | Unreadable | None
"""None represents a blank line: it holds no record, but counts as a line."""

MISSING = object()
"""What ``find`` returns for a field that the record lacks; None is a value in its own right."""

_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    bytes: "bytes",
    list: "a list",
    dict: "an object",
}


def find(record: object, path: str) -> object:
    """The value of a field, or ``MISSING``.

    Example:
        >>> find({"text": "x", "meta": {"pile_set_name": "ArXiv"}}, "meta.pile_set_name")
        'ArXiv'
    """
    if not isinstance(record, dict):
        return MISSING
    if path in record:
        return record[path]
    head, _, rest = path.partition(".")
    return find(record.get(head), rest) if rest else MISSING


def names(record: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The paths of all fields that hold a value, in the order of the record.

    Example:
        >>> list(names({"text": "x", "meta": {"pile_set_name": "ArXiv"}}))
        ['text', 'meta.pile_set_name']
    """
    for name, value in record.items():
        if isinstance(value, dict) and value:
            yield from names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def kind(value: object) -> str:
    """The type of a value, in the terms of JSON: ``a number``, ``null``."""
    return _KINDS.get(type(value), f"a value of type {type(value).__name__}")
