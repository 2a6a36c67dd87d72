"""Distinct experts: how many experts a few tokens need together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import xarray as xr

from moescope.measures import schema
from moescope.measures.distinct import LENGTHS, distinct
from moescope.reporting import figures as drawn
from moescope.reporting.cells import CLUSTERED, FDR, cell
from moescope.reporting.chapters import WORTH
from moescope.reporting.frames import tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import count
from moescope.reporting.options import figures_option, parse_integers, shown_layers_option, trace_argument
from moescope.reporting.printing import layer_progress
from moescope.reporting.subject import Drawing, PageFigure, PageSection, PageTable, Results, Subject, where_known
from moescope.reporting.tables import Row, Section, Table
from moescope.reporting.visible import visible
from moescope.trace import Trace

COLUMNS = {
    "distinct": "consecutive",
    "distinct_null": "any order",
    "excess": "difference",
    "distinct_apart": "apart",
    "distinct_uniform": "uniform",
}

SECTION = PageSection(
    WORTH,
    "distinct",
    "How many experts do a few tokens need?",
    "Working set",
    "A step that decodes several tokens, or verifies a draft of them, reads each expert that one of them chose once. "
    "The fewer experts consecutive tokens need together, the cheaper the step.",
)


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """A panel a layer, and the table."""
    yield PageFigure(
        name="distinct",
        file="distinct-experts",
        draw=lambda: drawn.distinct.draw_distinct(result, results.layers),
        label="Distinct experts",
        title="Experts of a layer that a few tokens need together",
        caption=(
            "Mean number of distinct experts, by the number of tokens; all domains together. Intervals 95 %, clustered "
            "by document. Consecutive tokens of one sequence; tokens of one document in any order; tokens drawn "
            "independently, as of so many sequences decoded together; uniform routing."
        ),
        how=(
            "The gap from the dashed line to the triangles is what the popularity of experts saves, from there to the "
            "squares what a document's own experts save, and from there to the dots what neighbours share."
        ),
        cannot=(
            "Time: what a step costs beside reading experts, and whether they are read anew at all. A few tokens later "
            "the experts may still be in a cache."
        ),
        frame=tidy(result, "domain", "layer", "length"),
    )
    yield PageTable(distinct_table(result, results.layers), folded="Distinct experts, as a table")


@trace_argument
@shown_layers_option
@click.option(
    "--tokens", callback=parse_integers, default=",".join(map(str, LENGTHS)), show_default=True, metavar="LIST",
    help="Tokens taken together.",
)  # fmt: skip
@click.option("--domain", metavar="NAME", help="Show one domain.  [default: all of them together]")
@figures_option
def command(
    trace: Trace, layers: tuple[int, ...] | None, tokens: tuple[int, ...], domain: str | None, figures: Path | None
) -> Iterator[Table | Drawing]:
    """Show how many experts a few tokens need together.

    Mean distinct experts of a layer over consecutive tokens; beside it the same tokens in any order, as many tokens of
    different sequences, and uniform routing. It decides how long a draft pays, and what a small batch reads.

    \b
    Example:
      moescope distinct pile.moe --tokens 4,8,64
    """
    if tokens[0] < 1:
        raise click.BadParameter("expected numbers of tokens from 1.", param_hint="--tokens")
    trace.need_tokens()
    shown = shown_layers(trace, layers)
    if domain is not None:
        trace.domain_code(domain)
    with layer_progress("counting distinct experts") as progress:
        result = distinct(trace, lengths=tokens, progress=progress)
    yield distinct_table(result, shown, domain)
    yield Drawing(file="distinct", draw=lambda: drawn.distinct.draw_distinct(result, shown))


def distinct_table(distinct: xr.Dataset, layers: Sequence[int], domain: str | None = None) -> Table:
    """Distinct experts of a domain or of all, and the baselines: a section a number of tokens, a row a layer."""
    data = schema.total(distinct) if domain is None else schema.by_domain(distinct).sel(domain=domain)
    sections = []
    for length in data["length"].values.tolist():
        of_length = data[list(distinct)].sel(length=length)
        rows = (
            Row(f"layer {layer}", tuple(cell(of_length.sel(layer=layer), name) for name in COLUMNS)) for layer in layers
        )
        documents = count(int(of_length["documents"]), "document")
        sections.append(Section(f"{count(length, 'token')} ({documents})", tuple(rows)))
    where = "all domains" if domain is None else visible(domain)
    return Table(
        "distinct",
        f"Distinct experts of a few tokens, {where}",
        "",
        tuple(COLUMNS.values()),
        tuple(sections),
        notes=(
            "consecutive: experts of a layer that consecutive tokens of a sequence need together, mean. any order: the "
            "same if the tokens of each document were shuffled. apart: tokens drawn independently, as of so many "
            "sequences. uniform: if tokens drew their experts at random.",
            f"difference: consecutive less any order; * not 0 ({FDR}). {CLUSTERED}",
        ),
        frame=tidy(distinct, "domain", "layer", "length"),
    )


subject = Subject(
    measure=lambda counted, _: where_known(distinct(counted), "distinct"),
    blocks=blocks,
    section=SECTION,
    command=command,
)
