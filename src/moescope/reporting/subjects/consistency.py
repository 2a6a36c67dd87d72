"""Local routing consistency: whether a fixed set of experts would serve a segment of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures import schema
from moescope.measures.consistency import consistency
from moescope.measures.schema import FRACTION
from moescope.reporting import figures as drawn
from moescope.reporting.cells import BY_DOCUMENT, FDR, cell
from moescope.reporting.chapters import LOCALITY
from moescope.reporting.frames import tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import count
from moescope.reporting.options import figures_option, shown_layers_option, trace_argument
from moescope.reporting.subject import Drawing, PageFigure, PageTable, Results, Subject, where_known
from moescope.reporting.tables import Row, Section, Table
from moescope.reporting.visible import visible
from moescope.trace import Trace


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """A panel a length of segments, and the table."""
    lengths = result["length"].values[result["srp"].notnull().any(["domain", "layer"]).values].tolist()
    yield PageFigure(
        name="consistency",
        file="consistency",
        draw=lambda: drawn.consistency.draw_consistency(result),
        label="Consistency",
        title=f"How well one fixed set of experts would serve {' or '.join(map(str, lengths))} consecutive tokens",
        caption=(
            "Local routing consistency (SRP): the best F1 score of one set of experts for a whole segment, by layer. "
            "Intervals 95 %, by document. Grey: the tokens of each document in random order. Dashed: uniform routing."
        ),
        how=(
            "Only the gap to the grey line is local: the grey line itself is what the document's favourite experts "
            "give without any order."
        ),
        cannot=(
            "It is not the hit rate of a cache of a given size: the set may have any size, and is chosen knowing the "
            "segment."
        ),
        frame=consistency_frame(result),
    )
    yield PageTable(consistency_table(result, results.layers), folded="Local routing consistency, as a table")


@trace_argument
@shown_layers_option
@click.option("--domain", metavar="NAME", help="Show one domain.  [default: all of them together]")
@figures_option
def command(
    trace: Trace, layers: tuple[int, ...] | None, domain: str | None, figures: Path | None
) -> Iterator[Table | Drawing]:
    """Show how well one set of experts would serve consecutive tokens.

    Local routing consistency (SRP) over segments of 4, 16, 64 and 256 tokens; beside it what the documents' favourite
    experts give without any order, and uniform routing. The row of all layers is the number that is published.

    \b
    Example:
      moescope consistency pile.moe --layers 0,15,31
    """
    trace.need_tokens()
    shown = shown_layers(trace, layers)
    if domain is not None:
        trace.domain_code(domain)
    result = consistency(trace)
    yield consistency_table(result, shown, domain)
    yield Drawing(file="consistency", draw=lambda: drawn.consistency.draw_consistency(result))


def consistency_table(consistency: xr.Dataset, layers: Sequence[int], domain: str | None = None) -> Table:
    """SRP against random order, of a domain or of all: a section a segment length, a row a layer, and one for all."""
    data = schema.total(consistency) if domain is None else schema.by_domain(consistency).sel(domain=domain)
    together = _together(data)
    sections = []
    for length in data["length"].values.tolist():
        of_length = data.sel(length=length)
        rows = [_row(f"layer {layer}", of_length.sel(layer=layer)) for layer in layers]
        rows.append(_row("all layers", together.sel(length=length)))
        documents = count(int(of_length["documents"]), "document")
        sections.append(Section(f"segments of {length} tokens ({documents})", tuple(rows)))
    where = "all domains" if domain is None else visible(domain)
    return Table(
        "consistency",
        f"Local routing consistency (SRP), {where}, %",
        "",
        ("SRP", "random order", "beyond", "uniform", "size ratio"),
        tuple(sections),
        notes=(
            "SRP: how well the best fixed set of experts serves a whole segment (F1). random order: the same if the "
            "tokens of each document were shuffled. uniform: if tokens drew their experts at random.",
            f"beyond: SRP less random order; * not 0 ({FDR}). size ratio: "
            f"experts in the fixed set over experts a token chooses. {BY_DOCUMENT}",
        ),
        frame=consistency_frame(consistency),
    )


def _row(label: str, place: xr.Dataset) -> Row:
    return Row(label, tuple(cell(place, name) for name in ("srp", "srp_null", "excess", "srp_uniform", "size_ratio")))


def _together(consistency: xr.Dataset) -> xr.Dataset:
    """What is of all layers together, under the names of what is of each."""
    names = {name: name.removeprefix("model_") for name in map(str, consistency) if name.startswith("model_")}
    return consistency[list(names)].rename(names).assign(srp_uniform=((), np.nan, {"units": FRACTION}))


def consistency_frame(consistency: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, layer, length), then a row a (domain, length) of all layers together."""
    alone = consistency.drop_vars([name for name in map(str, consistency) if name.startswith("model_")])
    by_layer = tidy(alone, "domain", "layer", "length").astype({"layer": object})
    together = tidy(_together(consistency), "domain", "length").assign(layer="all")
    return pd.concat([by_layer, together], ignore_index=True)


subject = Subject(
    measure=lambda counted, _: where_known(consistency(counted), "srp"),  # a document may be too short
    blocks=blocks,
    section=LOCALITY,
    command=command,
)
