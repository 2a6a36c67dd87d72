"""Local routing consistency: whether a fixed set of experts would serve a segment of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan
from pathlib import Path

import click
import numpy as np
import pandas as pd
import xarray as xr

from moescope.errors import NoSuchDomain
from moescope.measures.consistency import consistency
from moescope.reporting import figures as drawn
from moescope.reporting.cells import BY_DOCUMENT, mark
from moescope.reporting.chapters import LOCALITY
from moescope.reporting.frames import in_percent
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import count, percent, plain, signed, spread
from moescope.reporting.options import figures_option, shown_layers_option, trace_argument
from moescope.reporting.subject import Drawing, PageFigure, PageTable, Results, Subject
from moescope.reporting.tables import SIGNIFICANT, Cell, Row, Section, Table
from moescope.reporting.visible import visible
from moescope.tallying import Counted
from moescope.trace import Trace


def measure(counted: Counted, results: Results) -> xr.Dataset | None:
    """Of all layers, if a document is long enough."""
    found = consistency(counted)
    return found if found["srp"].notnull().any() else None


def blocks(found: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """A panel a length of segments, and the table."""
    lengths = found["length"].values[found["srp"].notnull().any(["domain", "layer"]).values].tolist()
    yield PageFigure(
        name="consistency",
        file="consistency",
        draw=lambda: drawn.consistency.draw_consistency(found),
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
        frame=consistency_frame(found),
    )
    yield PageTable(consistency_table(found, results.layers), folded="Local routing consistency, as a table")


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
    if domain is not None and domain not in trace.domains:
        raise NoSuchDomain(trace.path, f"no domain {domain!r}; the trace has {', '.join(trace.domains)}")
    found = consistency(trace)
    yield consistency_table(found, shown, domain)
    yield Drawing(file="consistency", draw=lambda: drawn.consistency.draw_consistency(found))


def consistency_table(consistency: xr.Dataset, layers: Sequence[int], domain: str | None = None) -> Table:
    """SRP against random order: a section a segment length, a row a layer and one for all of them together.

    Args:
        consistency: Of `moescope.consistency`.
        layers: Layers to show.
        domain: The domain to show; None for all of them together.
    """
    domain = consistency["domain"].values.tolist()[0] if domain is None else domain
    data = consistency.sel(domain=domain)
    sections = []
    for length in data["length"].values.tolist():
        at = data.sel(length=length)
        rows = [
            _row(f"layer {layer}", at.sel(layer=layer), "", float(at["uniform"].sel(layer=layer))) for layer in layers
        ]
        rows.append(_row("all layers", at, "model_", float("nan")))
        sections.append(
            Section(f"segments of {length} tokens ({count(int(at['documents']), 'document')})", tuple(rows))
        )
    where = "all domains" if domain == consistency["domain"].values[0] else visible(domain)
    return Table(
        "consistency",
        f"Local routing consistency (SRP), {where}, %",
        "",
        ("SRP", "random order", "beyond", "uniform", "size ratio"),
        tuple(sections),
        notes=(
            "SRP: how well the best fixed set of experts serves a whole segment (F1). random order: the same if the "
            "tokens of each document were shuffled. uniform: if tokens drew their experts at random.",
            f"beyond: SRP less random order; * not 0 (false discovery rate {percent(SIGNIFICANT, 0)} %). size ratio: "
            f"experts in the fixed set over experts a token chooses. {BY_DOCUMENT}",
        ),
        frame=consistency_frame(consistency),
    )


def consistency_frame(data: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, layer, length), then a row a (domain, length) of all layers together."""
    shares = ["srp", "low", "high", "shuffled", "beyond", "beyond_low", "beyond_high"]
    names = [*shares, "size_ratio", "p_value", "q_value"]
    by_layer = data[[*names, "uniform", "documents"]].to_dataframe().reset_index()
    model = data[[*(f"model_{name}" for name in names), "documents"]].to_dataframe().reset_index()
    model = model.rename(columns={f"model_{name}": name for name in names}).assign(layer="all", uniform=np.nan)
    columns = ["domain", "layer", "length", *shares, "uniform", "size_ratio", "p_value", "q_value", "documents"]
    frame = pd.concat([by_layer[columns].astype({"layer": object}), model[columns]], ignore_index=True)
    return in_percent(frame, {name: f"{name}_percent" for name in [*shares, "uniform"]})


def _row(label: str, at: xr.Dataset, prefix: str, uniform: float) -> Row:
    def value(name: str) -> float:
        return float(at[f"{prefix}{name}"])

    beyond = 100 * value("beyond")
    half = "" if isnan(value("beyond_low")) else f"±{beyond - 100 * value('beyond_low'):.1f}"
    return Row(
        label,
        (
            Cell(percent(value("srp")), spread(value("srp"), value("low"), value("high"))),
            Cell(percent(value("shuffled"))),
            Cell(signed(beyond, 1), half, mark(value("q_value"))),
            Cell(percent(uniform)),
            Cell(plain(value("size_ratio"))),
        ),
    )


subject = Subject(measure=measure, blocks=blocks, section=LOCALITY, command=command)
