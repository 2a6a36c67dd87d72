"""Two traces, token by token where they hold the same tokens; A and B in all tables are the first and the second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan
from pathlib import Path

import click
import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures.claims import first_middle_last
from moescope.measures.compare import Comparison, compare
from moescope.reporting import figures as drawn
from moescope.reporting.cells import mark, percent_cell, share_cell, values
from moescope.reporting.frames import in_percent
from moescope.reporting.numbers import bits, count, percent, plain, signed
from moescope.reporting.options import figures_option, layers_option
from moescope.reporting.subject import Drawing, Subject
from moescope.reporting.tables import SIGNIFICANT, Cell, Row, Section, Table
from moescope.reporting.visible import shorten, visible
from moescope.reporting.wording import describe_any, expert_name
from moescope.trace import Trace

MOST_TOKENS = 20
"""Token ids that a table shows; its frame holds all."""

NEARLY_THE_SAME = 0.98
"""Agreement from which a table shows hundredths of a per cent."""

_ABOUT_WEIGHTS = (
    "on B's experts: part of the gate weight in A on experts that B chose, too. margin: (first - second) / (first + "
    "second) gate weight in A, where the first choice is the same in B and where it is another: near 0 is a tie."
)
_KINDS = {"set": "both chose, of the choices", "first": "the same first choice"}


@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@layers_option
@click.option(
    "--show",
    type=click.Choice(["agreement", "changes", "tokens"]),
    default="agreement",
    show_default=True,
    help="How often they agree, which shares changed, or on which tokens they agree least.",
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
    """How often two traces agree: all domains by layer, then the domains at some layers.

    Args:
        comparison: Of `moescope.compare`, token by token.
        layers: Layers at which the domains are shown.
    """
    data, changes, weights = comparison.agreement, comparison.changes, comparison.weights
    assert data is not None
    assert changes is not None
    domains = data["domain"].values.tolist()
    kinds = [kind for kind in _KINDS if np.isfinite(data["agreement"].sel(kind=kind)).any()]

    # Dtypes and good quantisations differ in tenths of a per cent.
    digits = 2 if float(data["agreement"].min()) > NEARLY_THE_SAME else 1

    def row(label: str, domain: str, layer: int) -> Row:
        cells = []
        for kind in kinds:
            at = data.sel(domain=domain, layer=layer, kind=kind)
            kappa = kappa_text(float(at["kappa"]), digits + 1)
            cells += [share_cell(at, "agreement", digits=digits), percent_cell(at, "popularity"), Cell(kappa)]
        if weights is not None:
            of = weights.sel(domain=domain, layer=layer)
            same, differs = values(of, "margin_same", "margin_differs")
            cells += [
                share_cell(of, "kept", "kept_low", "kept_high", digits),
                Cell(plain(same)),
                Cell(plain(differs, 3)),
            ]
        changed = int((changes["q_value"].sel(domain=domain, layer=layer) < SIGNIFICANT).sum())
        return Row(label, (*cells, Cell(f"{changed} of {int(data['num_ids'].sel(layer=layer))}")))

    sections = [
        Section("all domains", tuple(row(f"layer {at}", domains[0], at) for at in data["layer"].values.tolist()))
    ]
    sections += [
        Section(f"layer {layer}", tuple(row(visible(domain), domain, layer) for domain in domains[1:]))
        for layer in layers
        if len(domains) > 2
    ]
    top_k = int(data["top_k"].values.max())
    titles = {"set": describe_any(top_k), "first": "first choice"}
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
            *((titles[kind], 3) for kind in kinds),
            *(() if weights is None else (("gate weight of A", 3),)),
            ("experts", 1),
        ),
        notes=(
            "measured: chosen in both traces, of the choices of a token; ± the larger side of a 95 % interval, "
            "by document. "
            "popularity: the same if B were dealt to the tokens at random. kappa: from 0, popularity alone, to 1.",
            f"shares changed: experts whose share of the assignments differs between A and B (paired by document, "
            f"false discovery rate {percent(SIGNIFICANT, 0)} %).",
            *(() if weights is None else (_ABOUT_WEIGHTS,)),
            *comparison.remarks,
        ),
        frame=agreement_frame(data, weights),
    )


def changes_table(comparison: Comparison, layers: Sequence[int]) -> Table:
    """How the share of each expert changed, all domains together: a section a layer, a row an expert."""
    data = comparison.changes
    assert data is not None
    total = data.isel(domain=0)
    sections = []
    for layer in layers:
        at = total.sel(layer=layer)
        rows = []
        for expert in range(int(at["num_ids"])):
            of = at.sel(expert=expert)
            change, low, high = (100 * value for value in values(of, "change", "low", "high"))
            half = "" if isnan(low) else f"±{max(change - low, high - change):.2f}"
            shares = (percent_cell(of, "share_a"), percent_cell(of, "share_b"))
            cells = (*shares, Cell(signed(change), half, mark(of["q_value"])))
            rows.append(Row(expert_name(expert, int(at["num_experts"])), cells))
        sections.append(Section(f"layer {layer}", tuple(rows)))
    names = ("share_a", "share_b", "change", "low", "high")
    frame = data[[*names, "p_value", "q_value"]].to_dataframe().reset_index()
    frame = frame[[*data["share_a"].dims, *names, "p_value", "q_value"]]
    frame = in_percent(frame[frame["share_a"].notna()].copy(), {name: f"{name}_percent" for name in names})
    return Table(
        "changes",
        f"Share of the assignments in A, {visible(comparison.names[0])}, and B, {visible(comparison.names[1])}, %",
        "expert",
        ("A", "B", "B - A"),
        tuple(sections),
        notes=(
            f"± the larger side of a 95 % interval, paired by document; * not 0 (false discovery rate "
            f"{percent(SIGNIFICANT, 0)} % over layers and experts).",
            *comparison.remarks,
        ),
        frame=frame.reset_index(drop=True),
    )


def tokens_table(comparison: Comparison) -> Table:
    """The token ids with the surely lowest agreement."""
    data = comparison.tokens
    assert data is not None
    shown = data.isel(token_id=slice(MOST_TOKENS))
    rows = []
    for at in range(shown.sizes["token_id"]):
        of = shown.isel(token_id=at)
        label = f"{int(of['token_id'])} {shorten(str(of['text'].item()), 24)}"
        sizes = (Cell(count(int(of["seen"]))), Cell(count(int(of["documents"]))))
        rows.append(Row(label, (*sizes, share_cell(of, "agreement"), percent_cell(of, "high"))))
    names = ("agreement", "low", "high")
    frame = data.to_dataframe().reset_index()[["token_id", "text", "seen", "documents", *names]]
    frame["text"] = [visible(text) for text in frame["text"]]
    return Table(
        "tokens",
        f"Token ids on which A, {visible(comparison.names[0])}, and B, {visible(comparison.names[1])}, agree least, %",
        "token id",
        ("seen", "documents", "agreement", "at most"),
        (Section("", tuple(rows)),),
        notes=(
            "agreement: chosen in both, of the choices in all layers compared; ± the larger side of a 95 % "
            "interval, by document. "
            "Ordered by its upper end, of ids seen at least 10 times in two documents or more.",
            *comparison.remarks,
        ),
        frame=in_percent(frame, {name: f"{name}_percent" for name in names}),
    )


def distances_table(comparison: Comparison, layers: Sequence[int]) -> Table:
    """Distances between the distributions of two traces whose tokens are not compared."""
    data = comparison.distances
    assert data is not None
    data = data.sel(layer=[layer for layer in layers if layer in data["layer"].values])
    sections = []
    for layer in data["layer"].values.tolist():
        rows = []
        for domain in data["domain"].values.tolist():
            at = data.sel(domain=domain, layer=layer)
            evenness = (Cell(plain(value, 3)) for value in values(at, "evenness_a", "evenness_b"))
            jsd, null = (bits(value) for value in values(at, "jsd", "null"))
            rows.append(Row(visible(domain), (Cell(jsd, mark=mark(at["q_value"])), Cell(null), *evenness)))
        sections.append(Section(f"layer {layer}", tuple(rows)))
    assert comparison.distances is not None
    frame = comparison.distances.to_dataframe().reset_index()
    bits_names = ("jsd", "null", "low", "high")
    return Table(
        "distances",
        f"Distance between the shares of A, {visible(comparison.names[0])}, and B, {visible(comparison.names[1])}",
        "domain",
        ("bits", "sampling alone", "A", "B"),
        tuple(sections),
        groups=(("divergence", 2), ("evenness", 2)),
        notes=(
            "divergence: Jensen-Shannon, bits; * more than sampling documents alone explains (false discovery rate "
            f"{percent(SIGNIFICANT, 0)} %). evenness: entropy of the shares over that of equal shares.",
            *comparison.remarks,
        ),
        frame=frame.rename(columns={name: f"{name}_bits" for name in bits_names}),
    )


def agreement_frame(data: xr.Dataset, weights: xr.Dataset | None = None) -> pd.DataFrame:
    """A row a (domain, layer, kind); what is known of gate weights stands in both kinds."""
    shares = ["agreement", "low", "high", "popularity", "uniform"]
    kappas = ["kappa", "kappa_low", "kappa_high"]
    dims = [str(dim) for dim in data["agreement"].dims]
    columns = [*shares, *kappas, "documents", "tokens"]
    frame = data[columns[:-2]].to_dataframe().reset_index()
    for name in ("documents", "tokens"):
        if name not in frame:  # a coordinate of the domain
            sizes = data[name].to_dataframe()[name].reset_index()
            keys = [key for key in sizes if key in dims]
            frame = frame.merge(sizes, on=keys, how="left")
    frame = frame[[*dims, *columns]]
    frame[shares] *= 100
    if weights is not None:
        kept = ["kept", "kept_low", "kept_high"]
        more = weights[[*kept, "margin_same", "margin_differs"]].to_dataframe().reset_index()
        more[kept] *= 100
        more = more[["domain", "layer", *kept, "margin_same", "margin_differs"]]
        more = more.rename(columns={name: f"weight_{name}_percent" for name in kept})
        frame = frame.merge(more, on=["domain", "layer"], how="left")
    return frame.rename(columns={name: f"{name}_percent" for name in shares})


def kappa_text(value: float, digits: int = 2) -> str:
    """A kappa; 1 only if it is exactly 1."""
    rounded = plain(value, digits)
    return f">{1 - 10.0**-digits:.{digits}f}" if float(value) < 1 and rounded == f"{1:.{digits}f}" else rounded


subject = Subject(command=command)
