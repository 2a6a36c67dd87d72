"""The subjects: a module a measure or simulation that is shown, with all that is said of it in reports and commands.

To add one, write ``subjects/<name>.py``, which holds a `Subject` called ``subject``, and name it in `SUBJECTS` where it
stands on the page; the report, its tables and figures, the table of contents and ``moescope <name>`` follow. What a
figure looks like is a module of ``figures/``, which a subject calls and does not import: matplotlib may be missing.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moescope.reporting.subject import Subject

SUBJECTS: Mapping[str, str] = {
    "shares": "Show the share of the assignments each expert receives, by domain.",
    "divergence": "Show how differently the domains use the experts.",
    "choices": "",
    "tokens": "",
    "words": "Show whether the tokens of a word go to the same expert.",
    "repeats": "Show how often consecutive tokens go to the same expert.",
    "explain": "Show how many bits of the choice domain, token, neighbours and place explain.",
    "locality": "Show how much more often neighbours repeat an expert than their words would anyway.",
    "consistency": "Show how well one set of experts would serve consecutive tokens.",
    "vocabulary": "Show how surely each token goes to one expert, and which tokens each expert gets.",
    "syntax": "Show whether indentation, punctuation, digits and the like have experts of their own.",
    "balance": "Show how evenly the experts are loaded.",
    "coactivation": "Show which experts are chosen for the same token.",
    "transitions": "Show how the choice of experts goes on from layer to layer.",
    "pairs": "",
    "cache": "Show what caches of experts would hit.",
    "prefetch": "Show which experts could be loaded before a token needs them.",
    "parallel": "Show what the routing costs on devices that share the experts.",
    "claims": "Show which claims of section 5 hold for this model, and by how much.",
    "compare": "Show how far two traces send the same tokens to the same experts.",
    "saturation": "Show how early a router settles on the experts it chooses in the end.",
}
"""Names in the order of the page, with the line of help of their command; empty where there is none."""


def load(name: str) -> Subject:
    """A subject, imported now."""
    subject: Subject = importlib.import_module(f"{__name__}.{name}").subject
    return subject
