"""How evenly the experts are loaded, over the trace, by domain and within batches; and the gate weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures.balance import balance
from moescope.reporting import figures as drawn
from moescope.reporting.cells import BY_DOCUMENT, number_cell
from moescope.reporting.chapters import STRUCTURE
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import MISSING, count, number
from moescope.reporting.options import figures_option, shown_layers_option, trace_argument
from moescope.reporting.subject import Drawing, PageFigure, PageSection, PageTable, Results, Subject, folded
from moescope.reporting.tables import Cell, Row, Section, Table
from moescope.reporting.visible import visible
from moescope.trace import Trace

SECTION = PageSection(
    STRUCTURE,
    "balance",
    "How evenly are the experts loaded?",
    "Load balance",
    "Training balances the load over everything it reads. What a device sees is one batch, and a batch is "
    "of few documents.",
)
_FOLDED = {
    "balance": "Loads of the whole trace and by domain, idle experts",
    "batches": "Imbalance within batches",
    "weights": "Gate weights",
}


def blocks(found: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """Imbalance by layer, and the tables."""
    batches = "batch_imbalance" in found and bool(found["batches"].values.any())
    coloured = (
        " Coloured: batches of consecutive sequences (mean; band from 5 to 95 % of the batches); dashed: as many "
        "tokens drawn at random from the whole trace."
        if batches
        else ""
    )
    beside = (
        "Right: the largest gate weight of a token and its lead over the second (bands: 5 to 95 % of the tokens)."
        if "weight" in found
        else "Right: the entropy of the loads over that of equal ones."
    )
    yield PageFigure(
        name="balance",
        file="balance",
        draw=lambda: drawn.balance.draw_balance(found),
        label="Balance",
        title="The busiest expert over the mean load",
        caption=(
            f"Left, squares: the whole trace, 1 being perfect balance, with 95 % interval by document.{coloured} "
            f"{beside}"
        ),
        how=(
            "The squares are what training balanced. A solid line above its dashed one: sequences favour some "
            "experts, beyond what so few tokens show by chance; that is what a batch of such sequences must wait for."
            if batches
            else "The squares are what training balanced; 2 means that the busiest expert has twice its part."
        ),
        cannot=(
            "It is of experts, not devices: how long a device waits depends on which experts lie together on it, and "
            "on capacity. It does not say that the busiest expert is the same in each batch."
        ),
        frame=balance_frame(found),
    )
    yield from folded(balance_tables(found, results.layers), _FOLDED)


@trace_argument
@shown_layers_option
@figures_option
def command(trace: Trace, layers: tuple[int, ...] | None, figures: Path | None) -> Iterator[Table | Drawing]:
    """Show how evenly the experts are loaded.

    The largest load over the mean (MaxVio is this minus 1), the coefficient of variation, Gini, entropy, idle experts:
    over the whole trace and by domain, beside what perfect balance would show with such documents; the imbalance within
    batches of 1, 16 and 256 consecutive sequences, beside that of tokens drawn independently; and, if they were
    recorded, the gate weights. CSV and JSON hold all of it in one table.

    \b
    Example:
      moescope balance pile.moe --layers 0,15,31
    """
    shown = shown_layers(trace, layers)
    found = balance(trace, shown if figures is None else None)
    yield from balance_tables(found, shown)
    yield Drawing(file="balance", draw=lambda: drawn.balance.draw_balance(found))


def balance_tables(balance: xr.Dataset, layers: Sequence[int]) -> Iterator[Table]:
    """Load balance, a row a layer: the loads, then batches and gate weights where there are any.

    The frame of the first table holds everything.
    """
    data = balance.sel(layer=list(layers))
    domains = data["domain"].values.tolist()
    kept = {"imbalance": 2, "cv": 3, "gini": 3, "entropy": 4}

    def loads(domain: str) -> tuple[Row, ...]:
        rows = []
        for layer in layers:
            at = data.sel(domain=domain, layer=layer)
            busiest, nearly = float(at["busiest"]), (int(at["nearly_idle_low"]), int(at["nearly_idle_high"]))
            experts = (
                Cell(MISSING if isnan(busiest) else str(int(busiest))),
                Cell(str(int(at["idle"]))),
                Cell(str(int(at["nearly_idle"])), "" if nearly[0] == nearly[1] else f" ({nearly[0]}–{nearly[1]})"),
            )
            rows.append(Row(str(layer), (*(number_cell(at, name, digits) for name, digits in kept.items()), *experts)))
        return tuple(rows)

    def null(layer: int) -> tuple[Cell, ...]:
        at = data.sel(domain=domains[0], layer=layer)
        return *(Cell(number(float(at[f"{name}_null"]), digits)) for name, digits in kept.items()), *[Cell("")] * 3

    frame = balance_frame(data)
    yield Table(
        "balance",
        "Load balance of the routed experts",
        "layer",
        ("imbalance", "CV", "Gini", "H / log E", "busiest expert", "idle", "nearly idle"),
        (
            Section("the whole trace", loads(domains[0])),
            Section("perfect balance, with documents like these", tuple(Row(str(n), null(n)) for n in layers)),
            *(Section(visible(domain), loads(domain)) for domain in domains[1:]),
        ),
        notes=(
            "imbalance: largest load over mean load, 1 if all are equal (MaxVio is this minus 1).",
            "idle: no assignment at all; nearly idle: others with less than a tenth of the uniform share (in "
            "brackets, surely and possibly).",
            BY_DOCUMENT,
        ),
        frame=frame,
    )
    if "batch_imbalance" in data:
        sizes = [size for size in data["batch"].values.tolist() if data["batches"].sel(batch=size)]
        if sizes:
            yield _batches_table(data, layers, sizes, frame)
    if "weight" in data:
        whole = data.sel(domain=domains[0])
        rows = tuple(
            Row(
                str(layer),
                tuple(number_cell(whole.sel(layer=layer, statistic=name), "weight", 3) for name in _WEIGHTS),
            )
            for layer in layers
        )
        yield Table(
            "weights",
            "Gate weights of a token, normalised to sum 1; mean over the tokens of the trace",
            "layer",
            tuple(_WEIGHTS.values()),
            (Section("", rows),),
            notes=(BY_DOCUMENT,),
            frame=frame.query("what == 'gate weights'").dropna(axis=1, how="all"),
        )


_WEIGHTS = {"first": "the largest", "margin": "its lead over the second", "entropy": "entropy, bits"}


def _batches_table(data: xr.Dataset, layers: Sequence[int], sizes: Sequence[int], frame: pd.DataFrame) -> Table:
    """Imbalance within batches, three columns a size."""
    rows = []
    for layer in layers:
        cells: list[Cell] = []
        for size in sizes:
            at = data.sel(layer=layer, batch=size)
            worst = Cell(number(float(at["batch_quantile"].isel(quantile=-1)), 2))
            cells += [number_cell(at, "batch_imbalance", 2), worst, Cell(number(float(at["batch_null"]), 2))]
        rows.append(Row(str(layer), tuple(cells)))
    titles = tuple(
        (f"{count(size, 'sequence')}, {count(round(float(data['batch_tokens'].sel(batch=size))), 'token')}", 3)
        for size in sizes
    )
    held = ", ".join(f"{count(int(data['batches'].sel(batch=size)))} of {size}" for size in sizes)
    return Table(
        "batches",
        "Imbalance within batches",
        "layer",
        ("mean", "95 %", "by chance") * len(sizes),
        (Section("", tuple(rows)),),
        groups=titles,
        notes=(
            "95 %: the quantile over batches; by chance: the mean of batches of as many tokens drawn independently "
            "from the whole trace.",
            f"± the larger side of a 95 % interval of the mean, over batches. Full batches: {held}.",
        ),
        frame=frame.query("what == 'loads within a batch'").dropna(axis=1, how="all"),
    )


def balance_frame(balance: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, layer, batch), the batch in sequences and empty for the whole trace; then a row a statistic of
    the gate weights.
    """
    shapes = ["imbalance", "cv", "gini", "entropy"]
    names = [f"{name}{end}" for name in shapes for end in ("", "_low", "_high", "_null")]
    names += ["max_vio", "busiest", "idle", "nearly_idle", "nearly_idle_low", "nearly_idle_high"]
    drop = ["num_experts", "top_k", "documents"]
    parts = [balance[names].drop_vars(drop, errors="ignore").to_dataframe().reset_index()]
    parts[0].insert(0, "what", "loads")
    everything = balance["domain"].values[0]
    if "batch_imbalance" in balance:
        renamed = {"batch_imbalance": "imbalance", "batch_imbalance_low": "imbalance_low"}
        renamed |= {"batch_imbalance_high": "imbalance_high", "batch_null": "imbalance_null"}
        rows = balance[list(renamed)].drop_vars(drop, errors="ignore").to_dataframe().reset_index()
        for at, quantile in enumerate(balance["quantile"].values.tolist()):
            for source, name in (("batch_quantile", "quantile"), ("batch_null_quantile", "null_quantile")):
                rows[f"{name}_{100 * quantile:g}"] = balance[source].isel(quantile=at).values.ravel()
        rows.insert(0, "what", "loads within a batch")
        rows.insert(1, "domain", everything)
        rows["batches"] = rows["batch"].map(balance["batches"].to_series())
        rows["tokens_a_batch"] = rows["batch"].map(balance["batch_tokens"].to_series())
        parts.append(rows.rename(columns={**renamed, "batch": "sequences_a_batch"}))
    if "weight" in balance:
        names = ["weight", "weight_low", "weight_high"]
        rows = balance[names].drop_vars(drop, errors="ignore").to_dataframe().reset_index()
        rows.insert(0, "what", "gate weights")
        for at, quantile in enumerate(balance["quantile"].values.tolist()):
            by_token = balance["weight_quantile"].isel(quantile=at, drop=True).to_series()
            keys = pd.MultiIndex.from_frame(rows[["layer", "statistic"]])
            rows[f"quantile_{100 * quantile:g}"] = by_token.reindex(keys).values
            rows.loc[rows["domain"] != everything, f"quantile_{100 * quantile:g}"] = np.nan
        parts.append(rows)
    return pd.concat(parts, ignore_index=True)


subject = Subject(measure=lambda counted, _: balance(counted), blocks=blocks, section=SECTION, command=command)
