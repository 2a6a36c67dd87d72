"""The divergence again, of any two domains."""

from __future__ import annotations

from collections.abc import Iterator

import xarray as xr

from moescope.reporting import figures
from moescope.reporting.chapters import DOMAINS
from moescope.reporting.subject import PageFigure, PageSection, PageTable, Results, Subject
from moescope.reporting.subjects.divergence import FEWEST_DOMAINS_IN_PAIRS, domain_pairs_table, pairs_frame
from moescope.tallying import Counted

SECTION = PageSection(
    DOMAINS,
    "pairs",
    "Which domains are alike?",
    "Pairs of domains",
    "Domains that share their experts need no experts of their own, whatever their names.",
)


def measure(counted: Counted, results: Results) -> xr.Dataset | None:
    """The divergence, where there are enough domains."""
    result: xr.Dataset = results.found["divergence"]
    return result if result.sizes["domain"] >= FEWEST_DOMAINS_IN_PAIRS else None


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """A map a layer."""
    yield PageFigure(
        name="pairs",
        file="domain-pairs",
        draw=lambda: figures.divergence.draw_domain_pairs(result, results.layers),
        label="Pairs of domains",
        title="Divergence of any two domains",
        caption=(
            "Jensen-Shannon divergence between the shares of two domains, bits. Dot: not explained by sampling "
            "documents (false discovery rate 5 % over layers and pairs)."
        ),
        how=(
            "Light squares are groups of domains that share their experts, such as kinds of prose; a dark row and "
            "column is a domain unlike all others."
        ),
        cannot=(
            "It cannot tell topic from vocabulary or format: two domains in one notation look alike whatever they are "
            "about. With many documents even a trifle has its dot."
        ),
        frame=pairs_frame(result.sel(layer=list(results.layers))),
    )
    yield PageTable(
        domain_pairs_table(result, results.layers), folded="The same as a table, with the domain that stands out"
    )


subject = Subject(measure=measure, blocks=blocks, section=SECTION)
