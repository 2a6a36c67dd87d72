"""How far the domains are from each other in their use of the experts: each from all others, and any two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures.divergence import divergence
from moescope.reporting import figures as drawn
from moescope.reporting.cells import FDR, by_layer, divergence_sections, grid_of, values
from moescope.reporting.chapters import TOPICS
from moescope.reporting.frames import only, tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import bits
from moescope.reporting.options import figures_option, shown_layers_option, trace_argument
from moescope.reporting.subject import Drawing, PageFigure, PageTable, Results, Subject
from moescope.reporting.tables import Cell, Row, Table
from moescope.reporting.visible import visible
from moescope.tallying import tally
from moescope.trace import Trace

FEWEST_DOMAINS_IN_PAIRS = 3
"""With two domains, each is "the others" to the other, and the pair says nothing new."""


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """A map of domains and layers; one domain diverges from nothing."""
    if result.sizes["domain"] == 1:
        return
    yield PageFigure(
        name="divergence",
        file="divergence",
        draw=lambda: drawn.divergence.draw_divergence(result),
        label="Divergence",
        title="How far each domain is from the others, layer by layer",
        caption=(
            "Jensen-Shannon divergence, bits, between a domain's shares and the mean of the other domains'. Not in "
            "the paper, which judged by eye."
        ),
        how=(
            "A dark row is a domain with experts of its own; dark columns at both ends are what the paper says of "
            "the first and the last layer. A dot marks what sampling documents alone does not explain (false "
            "discovery rate 5 %)."
        ),
        cannot=(
            "With many documents even a trifle gets its dot: read the dot for whether, the bits for how much. Nor "
            "does it say which experts make the difference, or whether topic, style or script is behind it."
        ),
        frame=divergence_frame(result),
    )
    yield PageTable(
        divergence_table(result, results.layers),
        folded="The same as a table, with intervals and what sampling alone would give",
    )


@trace_argument
@shown_layers_option
@figures_option
def command(trace: Trace, layers: tuple[int, ...] | None, figures: Path | None) -> Iterator[Table | Drawing]:
    """Show how differently the domains use the experts.

    The Jensen-Shannon divergence of each domain's shares from the mean of the others', and of each pair of domains, in
    bits, beside what sampling documents alone would give; and the domain that stands out. CSV and JSON hold both.

    \b
    Example:
      moescope divergence pile.moe --layers 0,15,31
    """
    shown = shown_layers(trace, layers)
    result = divergence(tally(trace, shown if figures is None else None))
    yield divergence_table(result, shown)
    if result.sizes["domain"] > 1:
        yield domain_pairs_table(result, shown)
    yield Drawing(file="divergence", draw=lambda: drawn.divergence.draw_divergence(result))
    if result.sizes["domain"] >= FEWEST_DOMAINS_IN_PAIRS:
        yield Drawing(file="domain_pairs", draw=lambda: drawn.divergence.draw_domain_pairs(result, shown))


def divergence_table(divergence: xr.Dataset, layers: Sequence[int]) -> Table:
    """How far each domain's shares are from the mean of the others: a row a domain, a column a layer."""
    data = divergence.sel(layer=list(layers))
    return Table(
        "divergence",
        "Jensen-Shannon divergence of a domain's shares from the mean of the other domains', bits",
        "domain",
        tuple(f"layer {layer}" for layer in layers),
        divergence_sections(data, "domain", "jsd_rest"),
        notes=(f"* differs from the other domains ({FDR}).", *_largest_pairs(data)),
        frame=divergence_frame(data),
    )


def domain_pairs_table(divergence: xr.Dataset, layers: Sequence[int]) -> Table:
    """Divergence of each pair of domains: a section a layer, a mark where sampling alone does not explain it."""
    data = divergence.sel(layer=list(layers))
    domains = data["domain"].values.tolist()

    def rows(of_layer: xr.Dataset) -> Iterator[Row]:
        for place, row in enumerate(grid_of(of_layer[["jsd", "jsd_q"]], "domain", "other", "jsd")):
            yield row._replace(cells=(*row.cells[:place], Cell(""), *row.cells[place + 1 :]))

    def title(of_layer: xr.Dataset) -> str:
        information, null = (bits(value) for value in values(of_layer, "information", "information_null"))
        text = f": I(domain; expert) {information}, from sampling alone {null}"
        if (leader := str(of_layer["leader"].values)) and len(domains) > 2:
            how = "significantly furthest" if of_layer["leader_significant"] else "furthest, not significantly,"
            text += f"; {how} from the others: {visible(leader)}"
        return text

    return Table(
        "domain_pairs",
        "Jensen-Shannon divergence between the shares of two domains, bits",
        "domain",
        tuple(map(visible, domains)),
        by_layer(data, rows, title),
        notes=(f"* differ ({FDR} over layers and pairs).",),
        frame=pairs_frame(data),
    )


def divergence_frame(divergence: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, layer) against the other domains, then a row a pair of domains and layer."""
    rest = only(divergence, "domain", "layer")
    frame = tidy(rest.rename({name: str(name).replace("jsd_rest", "jsd") for name in rest}), "domain", "layer")
    frame.insert(1, "other", "(the others)")
    return pd.concat([frame, pairs_frame(divergence)], ignore_index=True)


def pairs_frame(divergence: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, other domain, layer), each pair once."""
    place = np.arange(divergence.sizes["domain"])
    once = xr.DataArray(place[:, None] < place, dims=("domain", "other"))
    pairs = only(divergence, "domain", "other", "layer").drop_vars("documents")
    return tidy(pairs.where(once), "domain", "other", "layer")


def _largest_pairs(data: xr.Dataset) -> list[str]:
    """For each layer the two domains that are furthest apart."""
    furthest = []
    domains = data["domain"].values.tolist()
    for layer in data["layer"].values.tolist():
        pairs = data["jsd"].sel(layer=layer).values
        if len(domains) < 2 or not np.isfinite(pairs).any():
            continue
        a, b = np.unravel_index(int(np.nanargmax(pairs)), pairs.shape)
        names = f"{visible(domains[a])} and {visible(domains[b])}"
        furthest.append(f"layer {layer}: {names}, {bits(float(pairs[a, b]))} bits")
    return [f"Furthest apart: {'; '.join(furthest)}."] if furthest else []


subject = Subject(measure=lambda counted, _: divergence(counted), blocks=blocks, section=TOPICS, command=command)
