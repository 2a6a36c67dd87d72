"""Subjects of other packages: those that their entry points in the group `moescope.subjects` name.

An entry point ``name = "package.module"`` names a module that holds a `Subject` called ``subject`` and the measure
itself, a function called ``name``. One that fails, at whatever step, is named in a warning and left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

GROUP = "moescope.subjects"


@cache
def installed_plugins() -> Mapping[str, EntryPoint]:
    """Entry points by name, none imported yet, in the order of their names."""
    points: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        if not point.name.isidentifier():
            _warn(point, "its name is no identifier of Python")
        elif point.name in points:
            _warn(point, f"{describe(points[point.name])} has the same name")
        else:
            points[point.name] = point
    return points


@cache
def plugin_module(name: str) -> ModuleType:
    """The module that an entry point names, imported now.

    Raises:
        Exception: Whatever its import raises.
        TypeError: The entry point names something else.
    """
    loaded = installed_plugins()[name].load()
    if not isinstance(loaded, ModuleType):
        raise TypeError(f"an entry point names a module, not a {type(loaded).__name__}")
    return loaded


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """Leave out a plug-in that fails within the block, with a warning; what is no plug-in fails as ever."""
    try:
        yield
    except Exception as error:
        if name not in installed_plugins():
            raise
        _warn(installed_plugins()[name], f"{type(error).__name__}: {error}")


def describe(point: EntryPoint) -> str:
    """An entry point with the package that brings it."""
    package = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
    return f"the plug-in {point.name}{package}"


def _warn(point: EntryPoint, problem: str) -> None:
    warnings.warn(f"{describe(point)} is left out: {problem}", stacklevel=3)
