"""The subjects: a module a measure or simulation that is shown, with all that is said of it in reports and commands.

To add one, write ``subjects/<name>.py``, which holds a `Subject` called ``subject``, and name it in `SUBJECTS` where it
stands on the page; the report, its tables and figures, the table of contents and ``moescope <name>`` follow. What a
figure looks like is a module of ``figures/``, which a subject calls and does not import: matplotlib may be missing.
Another package adds one by an entry point (`moescope.plugins`, docs/how-to/add-a-measure.md).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

from moescope.plugins import installed_plugins, plugin_module

if TYPE_CHECKING:
    from moescope.reporting.subject import Subject

MEASURES: Mapping[str, str] = {
    "shares": "Show the share of the assignments each expert receives, by domain.",
    "divergence": "Show how differently the domains use the experts.",
    "choices": "",
    "tokens": "",
    "words": "Show whether the tokens of a word go to the same expert.",
    "repeats": "Show how often consecutive tokens go to the same expert.",
    "explain": "Show how many bits of the choice domain, token, neighbours and place explain.",
    "locality": "Show how much more often neighbours repeat an expert than their words would anyway.",
    "consistency": "Show how well one set of experts would serve consecutive tokens.",
    "vocabulary": "Show how consistently each token goes to one expert, and which tokens each expert gets.",
    "syntax": "Show whether indentation, punctuation, digits and the like have experts of their own.",
    "balance": "Show how evenly the experts are loaded.",
    "coactivation": "Show which experts are chosen for the same token.",
    "transitions": "Show how the choice of experts goes on from layer to layer.",
    "pairs": "",
    "distinct": "Show how many experts a few tokens need together.",
}
SIMULATIONS: Mapping[str, str] = {
    "cache": "Show what caches of experts would hit.",
    "prefetch": "Show which experts could be loaded before a token needs them.",
    "parallel": "Show what the routing costs on devices that share the experts.",
}
COMPARISONS: Mapping[str, str] = {
    "claims": "Show which claims of section 5 hold for this model, and by how much.",
    "compare": "Show how far two traces send the same tokens to the same experts.",
    "saturation": "Show how early a router settles on the experts it chooses in the end.",
}
SUBJECTS: Mapping[str, str] = {**MEASURES, **SIMULATIONS, **COMPARISONS}
"""Names in the order of the page, with the line of help of their command; empty where there is none."""


def names() -> list[str]:
    """All subjects in the order of the page, those of other packages last; a name that is taken stays ours."""
    return [*SUBJECTS, *(name for name in installed_plugins() if name not in SUBJECTS)]


def load(name: str) -> Subject:
    """A subject, imported now.

    Raises:
        Exception: What the import of another package's subject raises.
        TypeError: There is no `Subject` called ``subject`` in another package's module.
    """
    from moescope.reporting.subject import Subject

    module: ModuleType = importlib.import_module(f"{__name__}.{name}") if name in SUBJECTS else plugin_module(name)
    subject = getattr(module, "subject", None)
    if not isinstance(subject, Subject):
        raise TypeError(f"{module.__name__} has no Subject called subject")
    return subject
