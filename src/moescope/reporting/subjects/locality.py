"""Repeats of neighbours against four nulls, by distance, and in runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures import schema
from moescope.measures.locality import LONGEST_RUN, locality
from moescope.reporting import figures as drawn
from moescope.reporting.cells import CLUSTERED, FDR, cell, grid_of, values
from moescope.reporting.chapters import LOCALITY
from moescope.reporting.frames import tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import percent, points
from moescope.reporting.options import figures_option, one_of, shown_layers_option, trace_argument
from moescope.reporting.printing import layer_progress
from moescope.reporting.subject import Drawing, PageFigure, PageTable, Results, Subject
from moescope.reporting.tables import Cell, Row, Section, Table
from moescope.reporting.visible import visible
from moescope.reporting.wording import describe_kind, known_kinds
from moescope.trace import Trace

SHOWN_NULLS = {"popularity": "popularity", "document": "any order", "words": "same words"}
"""Nulls of the table with what they are called; uniform routing is in the frame."""

RUN_BINS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 8), (9, 16), (17, 32), (33, LONGEST_RUN))


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """Excess over each null by layer, then repeats by distance."""
    words = bool(result["excess"].sel(null="words").notnull().any())
    yield PageFigure(
        name="nulls",
        file="repeats-above-nulls",
        draw=lambda: drawn.locality.draw_excess(result),
        label="Nulls",
        title=f"Repeats above what loads{', document and words' if words else ' and document'} predict",
        caption=(
            "Points by which neighbours repeat an expert more often than each null predicts, by layer, all domains "
            f"together: {'four' if words else 'three'} nulls, from uniform routing to "
            f"{'the same words in other documents' if words else 'the document in any order'}. Bands: 95 % intervals "
            "of the difference, by document."
        ),
        how=(
            "Each null takes away what it explains: unequal loads; the document's own mix; the words, with no regard "
            "to the document. Near 0 above the same words, the router looks words up; what stays above 0 is context."
            if words
            else "From line to line a null takes away what it explains: unequal loads, then the document's own mix. "
            "What stays above 0 is order."
        ),
        cannot=(
            "What is left over the words need not be syntax: the topic of a document is part of it, because a word has "
            "other senses in other documents."
            if words
            else "The trace has no token ids, so it cannot be told whether the words explain what is left."
        ),
        frame=locality_frame(_total_last(result)),
    )
    yield PageTable(
        locality_table(result, results.layers),
        folded="The same as a table, by domain, and for pairs of equal token ids",
    )
    yield PageFigure(
        name="distance",
        file="repeats-by-distance",
        draw=lambda: drawn.locality.draw_lags(result, results.layers),
        label="Distance",
        title="Repeats by distance",
        caption=(
            "Per cent of the pairs of tokens so far apart, in one sequence, that repeat an expert, a line a layer. "
            "Bands: 95 % intervals, by document. Dotted: the document in any order, which knows no distance."
        ),
        how=(
            "How far a line stays above its dotted one is how far the memory of the routing reaches: a few tokens for "
            "phrases, a hundred for passages. A cache gains from the whole area between them."
        ),
        cannot=(
            "Long distances exist only in long sequences, so the points of one line are not of the same documents. Nor "
            "does a line say whether words or context return."
        ),
        frame=lags_frame(result.sel(layer=list(results.layers))),
    )
    yield PageTable(lags_table(result, results.layers), folded="Repeats by distance, as a table")
    if result["runs"].notnull().any():
        yield PageTable(runs_table(result, results.layers), folded="Runs of one first choice, by length")


@trace_argument
@shown_layers_option
@one_of("--show", ["excess", "lags", "runs"], "Neighbours against each null, repeats by distance, or lengths of runs.")
@figures_option
def command(trace: Trace, layers: tuple[int, ...] | None, show: str, figures: Path | None) -> Iterator[Table | Drawing]:
    """Show how much more often neighbours repeat an expert than their words would anyway.

    The rate of Table 5, and by how many points it exceeds what the popularity of the experts, the document in any order
    and the same words in other documents predict, each with a 95 % interval by document.

    \b
    Example:
      moescope locality pile.moe --layers 0,15,31
      moescope locality pile.moe --show lags
    """
    trace.need_tokens()
    shown = shown_layers(trace, layers)
    tables = {"excess": locality_table, "lags": lags_table, "runs": runs_table}
    with layer_progress("measuring") as progress:
        result = locality(trace, shown if figures is None else None, progress=progress)
    yield tables[show](result, shown)
    yield Drawing(file="excess", draw=lambda: drawn.locality.draw_excess(result))
    yield Drawing(file="lags", draw=lambda: drawn.locality.draw_lags(result, shown))


def locality_table(locality: xr.Dataset, layers: Sequence[int]) -> Table:
    """The rate, and by how many points it exceeds each null: a row a domain, four columns a layer."""
    data = _total_last(locality.sel(layer=list(layers)))
    domains, whole, sections = data["domain"].values.tolist(), schema.total(data), []
    for kind in known_kinds(data):
        name, near = describe_kind(kind, data), data.sel(kind=kind, pairs="all")
        sections.append(Section(name, tuple(Row(visible(d), _cells(near.sel(domain=d))) for d in domains)))
        pairs = [p for p in ("equal ids", "different ids") if data["pairs_counted"].sel(pairs=p).sum() > 0]
        if pairs:
            label = whole["domain"].item()
            rows = tuple(Row(f"{p} {label}", _cells(whole.sel(kind=kind, pairs=p))) for p in pairs)
            sections.append(Section(f"{name}, by the token ids of the pair", rows))
    return Table(
        "locality",
        "Repeats of neighbours, %, and points above what each null predicts",
        "domain",
        ("rate", *(f"above {name}" for name in SHOWN_NULLS.values())) * len(layers),
        tuple(sections),
        groups=tuple((f"layer {layer}", 1 + len(SHOWN_NULLS)) for layer in layers),
        notes=(
            "popularity: two tokens of the domain. any order: two tokens of the document. same words: tokens with the "
            "same ids in other documents.",
            f"{CLUSTERED} * not zero ({FDR}).",
            *(sentence for layer in layers if (sentence := locality_sentence(locality, layer))),
        ),
        frame=locality_frame(data),
    )


def _cells(near: xr.Dataset) -> tuple[Cell, ...]:
    """The rate and its excess over each null, by layer."""
    return tuple(
        cell(of_layer, "rate") if null is None else cell(of_layer.sel(null=null), "excess")
        for of_layer in (near.sel(layer=layer) for layer in near["layer"].values)
        for null in (None, *SHOWN_NULLS)
    )


def _total_last(locality: xr.Dataset) -> xr.Dataset:
    """The domains, then all of them together, as under a table's rule."""
    return locality.isel(domain=np.argsort(locality["total"].values, kind="stable"))


def locality_sentence(locality: xr.Dataset, layer: int) -> str:
    """How much of the repeats of a layer its words explain, in plain words; empty if the trace has no token ids."""
    kind = known_kinds(locality)[0]
    near = schema.total(locality).sel(layer=layer, pairs="all", kind=kind)
    excess, low, high = values(near.sel(null="words"), "excess", "excess_low", "excess_high")
    if isnan(excess):
        return ""
    what = "the same first choice" if kind == "first" else "an expert in common"
    less = "less" if excess < 0 else "more"
    interval = "" if isnan(low) else f" ({points(low)} to {points(high)})"
    nulls = near["rate_null"].sel(null=["uniform", "words"]).values.tolist()
    rate, uniform, words = map(percent, (near["rate"].item(), *nulls))
    return (
        f"Layer {layer}: {rate} % of neighbours have {what}; uniform routing gives {uniform} %, the "
        f"same words elsewhere {words} %: {percent(abs(excess))} points "
        f"{less} than these words would anyway{interval}."
    )


def lags_table(locality: xr.Dataset, layers: Sequence[int]) -> Table:
    """The rate by distance, above the document in any order: a row a distance, a column a layer."""
    data = locality.sel(layer=list(layers))
    whole, sections = schema.total(data), []
    for kind in known_kinds(whole):
        of_kind, name = whole.sel(kind=kind), describe_kind(kind, whole)
        sections.append(Section(name, grid_of(of_kind, "lag", "layer", "lag_rate")))
        sections.append(Section(f"{name}, points above any order", grid_of(of_kind, "lag", "layer", "lag_excess")))
    return Table(
        "lags",
        "Repeats by distance, %",
        "tokens apart",
        tuple(f"layer {layer}" for layer in layers),
        tuple(sections),
        notes=(f"any order: two tokens of the document. {CLUSTERED}",),
        frame=lags_frame(data),
    )


def runs_table(locality: xr.Dataset, layers: Sequence[int]) -> Table:
    """Lengths of the runs of one first choice, against independent repeats: a row a length, two columns a layer."""
    data = locality.sel(layer=list(layers))
    rows = []
    for start, end in RUN_BINS:
        label = str(start) if start == end else f"{start}–{end}" if end < LONGEST_RUN else f"{start} or more"
        binned = data[["runs", "runs_null"]].sel(run=slice(start, end)).sum("run", skipna=False)
        columns = [binned[name].sel(layer=layer) for layer in layers for name in ("runs", "runs_null")]
        rows.append(Row(label, tuple(Cell(percent(column.item())) for column in columns)))
    mean = [beside for layer in layers for beside in (cell(data.sel(layer=layer), "run_mean"), Cell(""))]
    return Table(
        "runs",
        "Runs of one first choice by length, % of runs",
        "tokens",
        ("measured", "independent") * len(layers),
        (Section("", tuple(rows)), Section("mean length, tokens", (Row("all", tuple(mean)),))),
        groups=tuple((f"layer {layer}", 2) for layer in layers),
        notes=("independent: each token repeats the one before with the measured rate, whatever came before that.",),
        frame=tidy(data[["runs", "runs_null"]], "layer", "run"),
    )


def locality_frame(locality: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, pairs, null, layer, kind)."""
    named = [name for name in map(str, locality) if name.split("_")[0] in ("rate", "excess", "pairs")]
    return tidy(locality[named], "domain", "pairs", "null", "layer", "kind")


def lags_frame(locality: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, layer, kind, lag)."""
    by_lag = locality[[name for name in map(str, locality) if name.startswith("lag_")]]
    return tidy(_total_last(by_lag), "domain", "layer", "kind", "lag")


subject = Subject(
    measure=lambda counted, _: locality(counted),
    blocks=blocks,
    section=LOCALITY,
    sentence=locality_sentence,
    command=command,
)
