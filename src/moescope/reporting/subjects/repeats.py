"""How often consecutive tokens go to the same expert: Table 5 and Figure 10."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import xarray as xr

from moescope.measures import published
from moescope.measures.repeats import repeats
from moescope.reporting import figures
from moescope.reporting.cells import CLUSTERED, cell, grid_of
from moescope.reporting.chapters import PUBLISHED
from moescope.reporting.frames import tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.options import shown_layers_option, trace_argument
from moescope.reporting.subject import PageFigure, PageSection, PageTable, Results, Subject
from moescope.reporting.tables import Cell, Row, Section, Table
from moescope.reporting.visible import visible
from moescope.reporting.wording import describe_any, describe_kind
from moescope.tallying import tally
from moescope.trace import Trace

DIMS = ("domain", "layer", "kind")
"""A row of the frame."""

SECTION = PageSection(
    PUBLISHED,
    "repeats",
    "Do consecutive tokens stay?",
    "Consecutive tokens",
    "If a token is likely to need the experts of the token before it, a cache of experts pays, and "
    "spreading experts over devices overloads some of them for a while.",
)


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """Figure 10, and Table 5."""
    yield PageFigure(
        name="repeats",
        file="figure10-repeats",
        draw=lambda: figures.repeats.draw_repeats(result),
        label="Figure 10",
        title="Repeated consecutive assignments by layer",
        caption=(
            f"Per cent of consecutive tokens {_repeated(result)}. Dashed: uniform routing. Grey: "
            "what the popularity of the experts alone predicts, from the lowest to the highest domain. Intervals "
            "95 %, clustered by document."
        ),
        how=(
            "A line above the grey band is order: a token is likelier to go where the token before it went. Within "
            "the band, compare a domain with its own null, in Table 5 and the CSV. What lies between the dashed "
            "line and the band is only unequal load, which the paper's baseline leaves out."
        ),
        cannot=(
            "It does not tell why: neighbouring tokens are alike, and like tokens go to like experts. Nor what a "
            "cache gains, for that depends on longer memory than one token."
        ),
        frame=tidy(result, *DIMS),
    )
    yield PageTable(repeats_table(result, results.layers), heading="Table 5. Repeated consecutive assignments")


@trace_argument
@shown_layers_option
def command(trace: Trace, layers: tuple[int, ...] | None) -> Iterator[Table]:
    """Show how often consecutive tokens go to the same expert.

    Table 5, and the data of Figure 10: in per cent, with the larger side of a 95 % interval clustered by document;
    below, what the popularity of the experts alone and uniform routing predict, and, for domains of the Pile, what the
    paper found for Mixtral-8x7B.

    \b
    Example:
      moescope repeats pile.moe --layers 0,15,31
    """
    shown = shown_layers(trace, layers)
    yield repeats_table(repeats(tally(trace, shown)), shown)


def repeats_table(repeats: xr.Dataset, layers: Sequence[int]) -> Table:
    """Table 5: a row a domain; first choice, then first or second choice, a column a layer.

    Below the measured rates stand what the popularity of the experts alone predicts, the uniform baseline and, if the
    corpus has domains of the paper, what the paper published.
    """
    data = repeats.sel(layer=list(layers))
    kinds = [kind for kind in ("first", "any") if kind in data["kind"].values]
    columns = data.sel(kind=kinds).stack(column=("kind", "layer"))
    uniform = tuple(cell(columns.isel(column=place), "rate_uniform") for place in range(columns.sizes["column"]))
    rate, null = (grid_of(columns, "domain", "column", name) for name in ("rate", "rate_null"))
    return Table(
        "repeats",
        "Repeated consecutive assignments, %",
        "domain",
        tuple(f"layer {layer}" for _ in kinds for layer in layers),
        (
            Section("", rate),
            Section("expected from the popularity of the experts alone", null),
            Section("expected from uniform routing", (Row("any domain", uniform),)),
            *(_published(data["domain"].values.tolist(), layers) if len(kinds) == 2 else []),
        ),
        groups=tuple((describe_kind(kind, data), len(layers)) for kind in kinds),
        notes=(f"{CLUSTERED} Pairs never cross a sequence.",),
        frame=tidy(data, *DIMS),
    )


def _published(domains: Sequence[str], layers: Sequence[int]) -> list[Section]:
    """Table 5 as the paper has it, its first, middle and last layer under ours, if a domain is the paper's."""
    known = {domain: name for domain in domains if (name := published.paper_name(domain)) is not None}
    if not known or len(layers) != len(published.LAYERS):
        return []
    table = published.table5()
    rows = tuple(
        Row(visible(domain), tuple(Cell(f"{value:.1f}") for value in table.sel(domain=name).values.ravel()))
        for domain, name in known.items()
    )
    layers_text = ", ".join(map(str, published.LAYERS))
    return [Section(f"Mixtral-8x7B on the Pile as published, layers {layers_text} of 32", rows)]


def _repeated(repeats: xr.Dataset) -> str:
    """What the panels of Figure 10 count."""
    top_k = int(repeats["top_k"].max())
    shared = f"with an expert in common among {describe_any(top_k)}"
    if "first" not in repeats["kind"].values:
        return f"{shared}; which of the choices is the first, the trace does not say"
    first = "with the same first choice"
    return first if top_k == 1 else f"{first} (left) or {shared} (right)"


subject = Subject(measure=lambda counted, _: repeats(counted), blocks=blocks, section=SECTION, command=command)
