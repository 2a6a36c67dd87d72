"""Two traces, token by token where they hold the same tokens; A and B in all tables are the first and the second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan
from pathlib import Path

import click
import numpy as np
import xarray as xr

from moescope.measures.claims import first_middle_last
from moescope.measures.compare import Comparison, compare
from moescope.measures.schema import by_domain, total
from moescope.reporting import figures as drawn
from moescope.reporting.cells import BY_DOCUMENT, FDR, by_layer, cell, mark, values
from moescope.reporting.frames import tidy
from moescope.reporting.numbers import percent, plain, signed
from moescope.reporting.options import figures_option, layers_option, one_of
from moescope.reporting.subject import Drawing, Subject
from moescope.reporting.tables import SIGNIFICANT, Cell, Row, Section, Table
from moescope.reporting.visible import shorten, visible
from moescope.reporting.wording import describe_kind, expert_name
from moescope.trace import Trace

MOST_TOKENS = 20
"""Token ids that a table shows; its frame holds all."""

NEARLY_THE_SAME = 0.98
"""Agreement from which a table shows hundredths of a per cent."""

_ABOUT_WEIGHTS = (
    "on B's experts: part of the gate weight in A on experts that B chose, too. margin: (first - second) / (first + "
    "second) gate weight in A, where the first choice is the same in B and where it is another: near 0 is a tie."
)


@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@layers_option
@one_of(
    "--show",
    ["agreement", "changes", "tokens"],
    "How often they agree, which shares changed, or on which tokens they agree least.",
)
@figures_option
def command(
    a: Trace, b: Trace, layers: tuple[int, ...] | None, show: str, figures: Path | None
) -> Iterator[Table | Drawing]:
    """Show how far two traces send the same tokens to the same experts.

    For checkpoints, fine-tunings, dtypes and quantisations of one model over the same tokens. Where the tokens are not
    the same, or expert ids can have no common meaning, only distances of the distributions are shown, and it says so.

    \b
    Example:
      moescope compare bf16.moe int4.moe
      moescope compare bf16.moe int4.moe --show tokens --layers 31
    """
    try:
        comparison = compare(a, b, layers)
    except ValueError as error:
        raise click.BadParameter(f"{error}.", param_hint="'--layers'") from None
    agreement = comparison.agreement
    if agreement is None:
        assert comparison.distances is not None
        shown = layers or first_middle_last(comparison.distances["layer"].values.tolist())
        yield distances_table(comparison, shown)
        return
    shown = layers or first_middle_last(agreement["layer"].values.tolist())
    if show == "tokens" and comparison.tokens is None:
        raise click.BadParameter("the traces have no token ids.", param_hint="'--show'")
    if show == "tokens":
        yield tokens_table(comparison)
    else:
        yield agreement_table(comparison, shown) if show == "agreement" else changes_table(comparison, shown)
    yield Drawing(file="agreement", draw=lambda: drawn.agreement.draw_agreement(agreement))


def agreement_table(comparison: Comparison, layers: Sequence[int]) -> Table:
    """How often two traces agree, token by token: all domains together by layer, then each at some layers."""
    data, changes, weights = comparison.agreement, comparison.changes, comparison.weights
    assert data is not None
    assert changes is not None
    kinds = [kind for kind in ("set", "first") if np.isfinite(data["agreement"].sel(kind=kind)).any()]

    # Dtypes and good quantisations differ in tenths of a per cent.
    digits = 2 if float(data["agreement"].min()) > NEARLY_THE_SAME else 1

    def row(label: str, domain: str, layer: int) -> Row:
        of_domain = data.sel(domain=domain, layer=layer)
        cells = []
        for kind in kinds:
            of_kind = of_domain.sel(kind=kind)
            cells += [cell(of_kind, "agreement", digits), cell(of_kind, "agreement_null")]
            cells += [Cell(kappa_text(float(of_kind["kappa"]), digits + 1))]
        if weights is not None:
            of_weights = weights.sel(domain=domain, layer=layer)
            same, differs = values(of_weights, "margin_same", "margin_differs")
            cells += [cell(of_weights, "kept", digits), Cell(plain(same)), Cell(plain(differs, 3))]
        changed = int((changes["change_q"].sel(domain=domain, layer=layer) < SIGNIFICANT).sum())
        return Row(label, (*cells, Cell(f"{changed} of {int(of_domain['num_ids'])}")))

    label = str(total(data)["domain"].values)
    sections = [
        Section("all domains", tuple(row(f"layer {layer}", label, layer) for layer in data["layer"].values.tolist()))
    ]
    domains = by_domain(data)["domain"].values.tolist()
    sections += [
        Section(f"layer {layer}", tuple(row(visible(domain), domain, layer) for domain in domains))
        for layer in layers
        if len(domains) > 1
    ]
    return Table(
        "agreement",
        f"Agreement of A, {visible(comparison.names[0])}, and B, {visible(comparison.names[1])}, %",
        "",
        (
            *(name for _ in kinds for name in ("measured", "popularity", "kappa")),
            *(() if weights is None else ("on B's experts", "margin, same first", "margin, other first")),
            "shares changed",
        ),
        tuple(sections),
        groups=(
            *((describe_kind(kind, data), 3) for kind in kinds),
            *(() if weights is None else (("gate weight of A", 3),)),
            ("experts", 1),
        ),
        notes=(
            f"measured: chosen in both traces, of the choices of a token; {BY_DOCUMENT} popularity: the same if B were "
            "dealt to the tokens at random. kappa: from 0, popularity alone, to 1.",
            "shares changed: experts whose share of the assignments differs between A and B (paired by document, "
            f"{FDR}).",
            *(() if weights is None else (_ABOUT_WEIGHTS,)),
            *comparison.remarks,
        ),
        frame=tidy(data if weights is None else data.assign(weights.data_vars), "domain", "layer", "kind"),
    )


def changes_table(comparison: Comparison, layers: Sequence[int]) -> Table:
    """How the share of each expert changed, all domains together: a section a layer, a row an expert."""
    data = comparison.changes
    assert data is not None

    def rows(of_layer: xr.Dataset) -> Iterator[Row]:
        for expert in range(int(of_layer["num_ids"])):
            place = of_layer.sel(expert=expert)
            change, low, high = (100 * value for value in values(place, "change", "change_low", "change_high"))
            half = "" if isnan(low) else f"±{max(change - low, high - change):.2f}"
            shares = (cell(place, "share_a"), cell(place, "share_b"))
            cells = (*shares, Cell(signed(change), half, mark(place["change_q"])))
            yield Row(expert_name(expert, int(of_layer["num_experts"])), cells)

    return Table(
        "changes",
        f"Share of the assignments in A, {visible(comparison.names[0])}, and B, {visible(comparison.names[1])}, %",
        "expert",
        ("A", "B", "B - A"),
        by_layer(total(data).sel(layer=list(layers)), rows),
        notes=(
            f"± the larger side of a 95 % interval, paired by document; * not 0 ({FDR} over layers and experts).",
            *comparison.remarks,
        ),
        frame=tidy(data, "domain", "layer", "expert"),
    )


def tokens_table(comparison: Comparison) -> Table:
    """The token ids of the lowest agreement, by the upper end of its interval."""
    data = comparison.tokens
    assert data is not None
    rows = []
    for place in range(min(MOST_TOKENS, data.sizes["token_id"])):
        token = data.isel(token_id=place)
        label = f"{int(token['token_id'])} {shorten(str(token['text'].item()), 24)}"
        at_most = Cell(percent(float(token["agreement_high"])))
        rows.append(Row(label, (*(cell(token, name) for name in ("seen", "documents", "agreement")), at_most)))
    frame = tidy(data, "token_id")
    return Table(
        "tokens",
        f"Token ids on which A, {visible(comparison.names[0])}, and B, {visible(comparison.names[1])}, agree least, %",
        "token id",
        ("seen", "documents", "agreement", "at most"),
        (Section("", tuple(rows)),),
        notes=(
            f"agreement: chosen in both, of the choices in all layers compared; {BY_DOCUMENT} Ordered by its upper "
            "end, of ids seen at least 10 times in two documents or more.",
            *comparison.remarks,
        ),
        frame=frame.assign(text=frame["text"].map(visible)),
    )


def distances_table(comparison: Comparison, layers: Sequence[int]) -> Table:
    """Distances between the distributions of two traces whose tokens are not compared."""
    distances = comparison.distances
    assert distances is not None
    data = distances.sel(layer=[layer for layer in layers if layer in distances["layer"].values])
    data = data.drop_vars(["jsd_low", "jsd_high"])  # of the true divergence, not around the measured one

    def rows(of_layer: xr.Dataset) -> Iterator[Row]:
        for domain in data["domain"].values.tolist():
            place = of_layer.sel(domain=domain)
            evenness = (Cell(plain(value, 3)) for value in values(place, "evenness_a", "evenness_b"))
            yield Row(visible(domain), (cell(place, "jsd"), cell(place, "jsd_null"), *evenness))

    return Table(
        "distances",
        f"Distance between the shares of A, {visible(comparison.names[0])}, and B, {visible(comparison.names[1])}",
        "domain",
        ("bits", "sampling alone", "A", "B"),
        by_layer(data, rows),
        groups=(("divergence", 2), ("evenness", 2)),
        notes=(
            f"divergence: Jensen-Shannon, bits; * more than sampling documents alone explains ({FDR}). evenness: "
            "entropy of the shares over that of equal shares.",
            *comparison.remarks,
        ),
        frame=tidy(distances, "domain", "layer"),
    )


def kappa_text(value: float, digits: int = 2) -> str:
    """A kappa; 1 only if it is exactly 1."""
    rounded = plain(value, digits)
    return f">{1 - 10.0**-digits:.{digits}f}" if float(value) < 1 and rounded == f"{1:.{digits}f}" else rounded


subject = Subject(command=command)
