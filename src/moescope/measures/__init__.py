"""What a tally says: a module per question; tally in, labelled result out.

Rule of the folder: no drawing, printing or paths, and no loop over tokens outside of a measure's `*_kernels`. Every
result is an `xarray.Dataset` whose variables carry their unit, definition and source in their attributes, with a null
and a 95 % interval wherever a claim could be made. `statistics` holds what they share, `schema` the form of results,
`published` the figures of the paper, to set beside one's own. A measure is the function that has the name of its
module; by that it is a name of this package, too, and nothing lists it here. So is one of another package that adds a
subject (`moescope.plugins`).
"""

import importlib
import pkgutil
from typing import Any

from moescope.plugins import installed_plugins, plugin_module

__all__: list[str] = []
for _module in pkgutil.iter_modules(__path__):
    _measure = getattr(importlib.import_module(f"{__name__}.{_module.name}"), _module.name, None)
    if callable(_measure):  # in the place of its module, at once, before anybody else imports that
        globals()[_module.name] = _measure
        __all__.append(_module.name)


def __getattr__(name: str) -> Any:
    """A measure of another package."""
    if name not in installed_plugins():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(plugin_module(name), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *installed_plugins()])
