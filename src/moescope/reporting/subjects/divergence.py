"""How far the domains are from each other in their use of the experts: each from all others, and any two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures.divergence import divergence
from moescope.reporting import figures as drawn
from moescope.reporting.cells import bits_range_cell, grid_of, values
from moescope.reporting.chapters import TOPICS
from moescope.reporting.frames import tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import bits, percent
from moescope.reporting.options import figures_option, shown_layers_option, trace_argument
from moescope.reporting.subject import Drawing, PageFigure, PageTable, Results, Subject
from moescope.reporting.tables import SIGNIFICANT, Cell, Row, Section, Table, grid
from moescope.reporting.visible import visible
from moescope.tallying import tally
from moescope.trace import Trace

FEWEST_DOMAINS_IN_PAIRS = 3
"""With two domains, each is "the others" to the other, and the pair says nothing new."""


def blocks(found: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """A map of domains and layers; one domain diverges from nothing."""
    if found.sizes["domain"] == 1:
        return
    yield PageFigure(
        name="divergence",
        file="divergence",
        draw=lambda: drawn.divergence.draw_divergence(found),
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
        frame=divergence_frame(found),
    )
    yield PageTable(
        divergence_table(found, results.layers),
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
    found = divergence(tally(trace, shown if figures is None else None))
    yield divergence_table(found, shown)
    if found.sizes["domain"] > 1:
        yield domain_pairs_table(found, shown)
    yield Drawing(file="divergence", draw=lambda: drawn.divergence.draw_divergence(found))
    if found.sizes["domain"] >= FEWEST_DOMAINS_IN_PAIRS:
        yield Drawing(file="domain_pairs", draw=lambda: drawn.divergence.draw_domain_pairs(found, shown))


def divergence_table(divergence: xr.Dataset, layers: Sequence[int]) -> Table:
    """How far each domain's shares are from the mean of the others: a row a domain, a column a layer."""
    data = divergence.sel(layer=list(layers))

    def rows(*names: str) -> tuple[Row, ...]:
        return grid_of(data[list(names)], "domain", "layer", names[0])

    def interval(domain: str, layer: int) -> Cell:
        return bits_range_cell(data.sel(domain=domain, layer=layer), "jsd_rest")

    return Table(
        "divergence",
        "Jensen-Shannon divergence of a domain's shares from the mean of the other domains', bits",
        "domain",
        tuple(f"layer {layer}" for layer in layers),
        (
            Section("measured", rows("jsd_rest", "jsd_rest_q")),
            Section("expected from sampling documents alone", rows("jsd_rest_null")),
            Section("95 % interval of the true divergence", grid(data["domain"].values.tolist(), layers, interval)),
        ),
        notes=(
            f"* differs from the other domains (false discovery rate {percent(SIGNIFICANT, 0)} %).",
            *_largest_pairs(data),
        ),
        frame=divergence_frame(data),
    )


def domain_pairs_table(divergence: xr.Dataset, layers: Sequence[int]) -> Table:
    """Divergence of each pair of domains: a section a layer, a mark where sampling alone does not explain it."""
    data = divergence.sel(layer=list(layers))
    domains = data["domain"].values.tolist()
    sections = []
    for layer in layers:
        at = data.sel(layer=layer)
        rows = [
            row._replace(cells=(*row.cells[:place], Cell(""), *row.cells[place + 1 :]))
            for place, row in enumerate(grid_of(at[["jsd", "jsd_q"]], "domain", "other", "jsd"))
        ]
        information, null = (bits(value) for value in values(at, "information", "information_null"))
        title = f"layer {layer}: I(domain; expert) {information}, from sampling alone {null}"
        if str(at["leader"].values) and len(domains) > 2:
            how = "surely furthest" if bool(at["leader_significant"]) else "furthest, not surely,"
            title += f"; {how} from the others: {visible(str(at['leader'].values))}"
        sections.append(Section(title, tuple(rows)))
    return Table(
        "domain_pairs",
        "Jensen-Shannon divergence between the shares of two domains, bits",
        "domain",
        tuple(map(visible, domains)),
        tuple(sections),
        notes=(f"* differ (false discovery rate {percent(SIGNIFICANT, 0)} % over layers and pairs).",),
        frame=pairs_frame(data),
    )


def divergence_frame(divergence: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, layer) against the other domains, then a row a pair of domains and layer."""
    names = [name for name, of in divergence.data_vars.items() if set(of.dims) == {"domain", "layer"}]
    rest = divergence[names].rename({name: str(name).replace("jsd_rest", "jsd") for name in names})
    frame = tidy(rest, "domain", "layer")
    frame.insert(1, "other", "(the others)")
    return pd.concat([frame, pairs_frame(divergence)], ignore_index=True)


def pairs_frame(divergence: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, other domain, layer), each pair once."""
    pairs = divergence[[name for name, of in divergence.data_vars.items() if "other" in of.dims]]
    frame = tidy(pairs.drop_vars("documents"), "domain", "other", "layer")
    order = {domain: place for place, domain in enumerate(divergence["domain"].values.tolist())}
    return frame[frame["domain"].map(order) < frame["other"].map(order)].reset_index(drop=True)


def _largest_pairs(data: xr.Dataset) -> list[str]:
    """For each layer the two domains that are furthest apart."""
    found = []
    domains = data["domain"].values.tolist()
    for layer in data["layer"].values.tolist():
        pairs = data["jsd"].sel(layer=layer).values
        if len(domains) < 2 or not np.isfinite(pairs).any():
            continue
        a, b = np.unravel_index(int(np.nanargmax(pairs)), pairs.shape)
        found.append(f"layer {layer}: {visible(domains[a])} and {visible(domains[b])}, {bits(float(pairs[a, b]))} bits")
    return [f"Furthest apart: {'; '.join(found)}."] if found else []


subject = Subject(measure=lambda counted, _: divergence(counted), blocks=blocks, section=TOPICS, command=command)
