"""Figures that the paper prints, to set beside one's own: Table 5 of Mixtral of Experts."""

from __future__ import annotations

import xarray as xr

SOURCE = "Mixtral of Experts (arXiv 2401.04088), Table 5; Mixtral-8x7B, validation set of the Pile"
LAYERS = (0, 15, 31)

_TABLE5 = {  # percent: first choice at layers 0, 15, 31, then first or second choice at the same
    "ArXiv": (14.0, 27.9, 22.7, 46.5, 62.3, 52.9),
    "DM Mathematics": (14.1, 28.4, 19.7, 44.9, 67.0, 44.5),
    "Github": (14.9, 28.1, 19.7, 49.9, 66.9, 49.2),
    "Gutenberg": (13.9, 26.1, 26.3, 49.5, 63.1, 52.2),
    "PhilPapers": (13.6, 25.3, 22.1, 46.9, 61.9, 51.3),
    "PubMed Abstracts": (14.2, 24.6, 22.0, 48.6, 61.6, 51.8),
    "StackExchange": (13.6, 27.2, 23.6, 48.2, 64.6, 53.6),
    "Wikipedia (en)": (14.4, 23.6, 25.3, 49.8, 62.1, 51.8),
}

_NAMES = {"Gutenberg (PG-19)": "Gutenberg"}
"""The Pile's names of domains that the paper calls otherwise."""


def table5() -> xr.DataArray:
    """Repeated consecutive assignments of Mixtral-8x7B.

    Returns:
        Percent, dims (domain, kind, layer); kinds are "first" and "any", as in `repeats`.
    """
    values = [[row[:3], row[3:]] for row in _TABLE5.values()]
    return xr.DataArray(
        values,
        {"domain": list(_TABLE5), "kind": ["first", "any"], "layer": list(LAYERS)},
        ("domain", "kind", "layer"),
        "rate",
        {"units": "%", "source": SOURCE},
    )


def paper_name(domain: str) -> str | None:
    """The paper's name of a domain of the Pile; None if Table 5 does not have it.

    Example:
        >>> paper_name("Gutenberg (PG-19)"), paper_name("Enron Emails")
        ('Gutenberg', None)
    """
    name = _NAMES.get(domain, domain)
    return name if name in _TABLE5 else None
