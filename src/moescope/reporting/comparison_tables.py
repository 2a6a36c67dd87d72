"""Tables of two traces and of checkpoints, and of consistency within segments; their values are the frames.

Shares and agreements are in per cent, divergences in bits; ``±`` is the larger side of a 95 % interval clustered by
document.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures import Comparison
from moescope.reporting.numbers import MISSING, bits, count, percent, spread
from moescope.reporting.tables import SIGNIFICANT, Cell, Row, Section, Table, describe_any
from moescope.reporting.visible import shorten, visible

MOST_TOKENS = 20
"""Token ids that a table shows; its frame holds all."""

NEARLY_THE_SAME = 0.98
"""Agreement from which a table shows hundredths of a per cent."""

_ABOUT_WEIGHTS = (
    "on B's experts: part of the gate weight in A on experts that B chose, too. margin: (first - second) / (first + "
    "second) gate weight in A, where the first choice is the same in B and where it is another: near 0 is a tie."
)
_KINDS = {"set": "both chose, of the choices", "first": "the same first choice"}


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
            value, low, high, null, kappa = (
                float(at[name]) for name in ("agreement", "low", "high", "popularity", "kappa")
            )
            measured = Cell(percent(value, digits), spread(value, low, high, digits))
            cells += [measured, Cell(percent(null)), Cell(_kappa(kappa, digits + 1))]
        if weights is not None:
            of = weights.sel(domain=domain, layer=layer)
            kept, low, high, same, differs = (
                float(of[name]) for name in ("kept", "kept_low", "kept_high", "margin_same", "margin_differs")
            )
            measured = Cell(percent(kept, digits), spread(kept, low, high, digits))
            cells += [measured, Cell(_plain(same)), Cell(_plain(differs, 3))]
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
        frame=_agreement_frame(data, weights),
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
            change, low, high = (100 * float(of[name]) for name in ("change", "low", "high"))
            mark = "*" if float(of["q_value"]) < SIGNIFICANT else ""
            half = "" if isnan(low) else f"±{max(change - low, high - change):.2f}"
            label = str(expert) if expert < int(at["num_experts"]) else f"{expert} (null)"
            cells = (Cell(percent(float(of["share_a"]))), Cell(percent(float(of["share_b"]))))
            rows.append(Row(label, (*cells, Cell(_signed(change), half, mark))))
        sections.append(Section(f"layer {layer}", tuple(rows)))
    names = ("share_a", "share_b", "change", "low", "high")
    frame = data[[*names, "p_value", "q_value"]].to_dataframe().reset_index()
    frame = frame[[*data["share_a"].dims, *names, "p_value", "q_value"]]
    frame = frame[frame["share_a"].notna()].rename(columns={name: f"{name}_percent" for name in names})
    frame[[f"{name}_percent" for name in names]] *= 100
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
        value, low, high = (float(of[name]) for name in ("agreement", "low", "high"))
        label = f"{int(of['token_id'])} {shorten(str(of['text'].item()), 24)}"
        sizes = (Cell(count(int(of["seen"]))), Cell(count(int(of["documents"]))))
        rows.append(Row(label, (*sizes, Cell(percent(value), spread(value, low, high)), Cell(percent(high)))))
    names = ("agreement", "low", "high")
    frame = data.to_dataframe().reset_index()[["token_id", "text", "seen", "documents", *names]]
    frame["text"] = [visible(text) for text in frame["text"]]
    frame = frame.rename(columns={name: f"{name}_percent" for name in names})
    frame[[f"{name}_percent" for name in names]] *= 100
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
        frame=frame,
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
            mark = "*" if float(at["q_value"]) < SIGNIFICANT else ""
            rows.append(
                Row(
                    visible(domain),
                    (
                        Cell(bits(float(at["jsd"])), mark=mark),
                        Cell(bits(float(at["null"]))),
                        Cell(_plain(float(at["evenness_a"]), 3)),
                        Cell(_plain(float(at["evenness_b"]), 3)),
                    ),
                )
            )
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


def saturation_table(saturation: xr.Dataset, kind: str = "set") -> Table:
    """Agreement of each checkpoint with the last, all domains together: a row a checkpoint, a column a layer.

    Args:
        saturation: Of `moescope.saturation`.
        kind: "set" or "first".
    """
    data = saturation.isel(domain=0).sel(kind=kind)
    layers = data["layer"].values.tolist()

    def rows(name: str, *, interval: bool = False) -> tuple[Row, ...]:
        found = []
        for at, step in enumerate(data["step"].values.tolist()):
            cells = []
            for layer in layers:
                of = data.isel(checkpoint=at).sel(layer=layer)
                value = float(of[name])
                if name == "kappa":
                    cells.append(Cell(_kappa(value)))
                else:
                    half = spread(value, float(of["low"]), float(of["high"])) if interval else ""
                    cells.append(Cell(percent(value), half))
            found.append(Row(f"{step:g}", tuple(cells)))
        return tuple(found)

    top_k = int(data["top_k"].values.max())
    what = describe_any(top_k) if kind == "set" else "first choice"
    reference = f"{visible(saturation.attrs['reference'])} ({saturation.attrs['reference_step']:g})"
    documents, tokens = (int(saturation[name].isel(domain=0).min()) for name in ("documents", "tokens"))
    return Table(
        "saturation",
        f"Router saturation: agreement with {reference}, {what}, %",
        "step",
        tuple(f"layer {layer}" for layer in layers),
        (
            Section("measured", rows("agreement", interval=True)),
            Section("expected from the popularity of the experts alone", rows("popularity")),
            Section("kappa: from 0, popularity alone, to 1", rows("kappa")),
        ),
        notes=(
            f"± the larger side of a 95 % interval, by document; {count(tokens, 'token')} of "
            f"{count(documents, 'document')}.",
        ),
        frame=_saturation_frame(saturation),
    )


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
            _consistency_row(f"layer {layer}", at.sel(layer=layer), "", float(at["uniform"].sel(layer=layer)))
            for layer in layers
        ]
        rows.append(_consistency_row("all layers", at, "model_", float("nan")))
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
            "experts in the fixed set over experts a token chooses. ± the larger side of a 95 % interval, by document.",
        ),
        frame=_consistency_frame(consistency),
    )


def _consistency_row(label: str, at: xr.Dataset, prefix: str, uniform: float) -> Row:
    def value(name: str) -> float:
        return float(at[f"{prefix}{name}"])

    beyond = 100 * value("beyond")
    half = "" if isnan(value("beyond_low")) else f"±{beyond - 100 * value('beyond_low'):.1f}"
    return Row(
        label,
        (
            Cell(percent(value("srp")), spread(value("srp"), value("low"), value("high"))),
            Cell(percent(value("shuffled"))),
            Cell(_signed(beyond, 1), half, "*" if value("q_value") < SIGNIFICANT else ""),
            Cell(percent(uniform)),
            Cell(_plain(value("size_ratio"))),
        ),
    )


def _agreement_frame(data: xr.Dataset, weights: xr.Dataset | None = None) -> pd.DataFrame:
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


def _saturation_frame(data: xr.Dataset) -> pd.DataFrame:
    """A row a (checkpoint, domain, layer, kind)."""
    steps = dict(zip(data["checkpoint"].values.tolist(), data["step"].values.tolist(), strict=True))
    parts = []
    for at, (name, step) in enumerate(steps.items()):
        one = data.isel(checkpoint=at).drop_vars(["checkpoint", "step"])
        frame = _agreement_frame(one)
        frame.insert(0, "step", step)
        frame.insert(0, "checkpoint", name)
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)


def _consistency_frame(data: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, layer, length), then a row a (domain, length) of all layers together."""
    shares = ["srp", "low", "high", "shuffled", "beyond", "beyond_low", "beyond_high"]
    names = [*shares, "size_ratio", "p_value", "q_value"]
    by_layer = data[[*names, "uniform", "documents"]].to_dataframe().reset_index()
    model = data[[*(f"model_{name}" for name in names), "documents"]].to_dataframe().reset_index()
    model = model.rename(columns={f"model_{name}": name for name in names}).assign(layer="all", uniform=np.nan)
    columns = ["domain", "layer", "length", *shares, "uniform", "size_ratio", "p_value", "q_value", "documents"]
    frame = pd.concat([by_layer[columns].astype({"layer": object}), model[columns]], ignore_index=True)
    frame[[*shares, "uniform"]] *= 100
    return frame.rename(columns={name: f"{name}_percent" for name in [*shares, "uniform"]})


def _plain(value: float, digits: int = 2) -> str:
    return MISSING if isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def _kappa(value: float, digits: int = 2) -> str:
    """A kappa; 1 only if it is exactly 1."""
    rounded = _plain(value, digits)
    return f">{1 - 10.0**-digits:.{digits}f}" if float(value) < 1 and rounded == f"{1:.{digits}f}" else rounded


def _signed(value: float, digits: int = 2) -> str:
    return MISSING if isnan(value) else f"{value:+.{digits}f}".replace("-", "−")
