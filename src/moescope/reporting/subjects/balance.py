"""How evenly the experts are loaded, over the trace, by domain and within batches; and the gate weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import xarray as xr

from moescope.measures.balance import balance
from moescope.measures.schema import by_domain, total
from moescope.reporting import figures as drawn
from moescope.reporting.cells import BY_DOCUMENT, cell, grid_of, grid_of_pairs
from moescope.reporting.chapters import STRUCTURE
from moescope.reporting.frames import kinds, only, tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import count
from moescope.reporting.options import figures_option, shown_layers_option, trace_argument
from moescope.reporting.subject import Drawing, PageFigure, PageSection, PageTable, Results, Subject
from moescope.reporting.tables import Cell, Row, Section, Table, grid
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


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """Imbalance by layer, and the tables."""
    batches = bool(batch_sizes(result))
    coloured = (
        " Coloured: batches of consecutive sequences (mean; band from 5 to 95 % of the batches); dashed: as many "
        "tokens drawn at random from the whole trace."
        if batches
        else ""
    )
    beside = (
        "Right: the largest gate weight of a token and its lead over the second (bands: 5 to 95 % of the tokens)."
        if "weight" in result
        else "Right: the entropy of the loads over that of equal ones."
    )
    yield PageFigure(
        name="balance",
        file="balance",
        draw=lambda: drawn.balance.draw_balance(result),
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
        frame=balance_frame(result),
    )
    yield from PageTable.each(balance_tables(result, results.layers), _FOLDED)


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
    result = balance(trace, shown if figures is None else None)
    yield from balance_tables(result, shown)
    yield Drawing(file="balance", draw=lambda: drawn.balance.draw_balance(result))


def balance_tables(balance: xr.Dataset, layers: Sequence[int]) -> Iterator[Table]:
    """Load balance, a row a layer: the loads, then batches and gate weights where there are any.

    The frame of the first table holds everything.
    """
    data = balance.sel(layer=list(layers))
    whole = total(data)

    def loads(one: xr.Dataset) -> tuple[Row, ...]:
        return grid(layers, _COLUMNS, lambda layer, name: _load_cell(one.sel(layer=layer), name))

    def of_balance(layer: int, name: str) -> Cell:
        null = f"{name}_null"
        return cell(whole.sel(layer=layer), null, _DIGITS[name]) if null in whole else Cell("")

    yield Table(
        "balance",
        "Load balance of the routed experts",
        "layer",
        tuple(_COLUMNS.values()),
        (
            Section("the whole trace", loads(whole)),
            Section("perfect balance, with documents like these", grid(layers, _COLUMNS, of_balance)),
            *(
                Section(visible(domain), loads(data.sel(domain=domain)))
                for domain in by_domain(data)["domain"].values.tolist()
            ),
        ),
        notes=(
            "imbalance: largest load over mean load, 1 if all are equal (MaxVio is this minus 1).",
            "idle: no assignment at all; nearly idle: others with less than a tenth of the uniform share (in "
            "brackets, significantly and possibly).",
            BY_DOCUMENT,
        ),
        frame=balance_frame(data),
    )
    if sizes := batch_sizes(data):
        yield _batches_table(data, sizes)
    if "weight" in data:
        weights = grid_of(whole.sel(statistic=list(_WEIGHTS)), "layer", "statistic", "weight", digits=3)
        yield Table(
            "weights",
            "Gate weights of a token, normalised to sum 1; mean over the tokens of the trace",
            "layer",
            tuple(_WEIGHTS.values()),
            (Section("", weights),),
            notes=(BY_DOCUMENT,),
            frame=tidy(only(data, "domain", "layer", "statistic"), "domain", "layer", "statistic"),
        )


_COLUMNS = {
    "imbalance": "imbalance",
    "cv": "CV",
    "gini": "Gini",
    "entropy": "H / log E",
    "busiest": "busiest expert",
    "idle": "idle",
    "nearly_idle": "nearly idle",
}
_DIGITS = {"cv": 3, "gini": 3, "entropy": 4, "imbalance": 2}
_WEIGHTS = {"first": "the largest", "margin": "its lead over the second", "entropy": "entropy, bits"}


def _load_cell(place: xr.Dataset, name: str) -> Cell:
    """A cell of the loads; that of experts nearly idle says how many there are significantly and possibly."""
    if name != "nearly_idle":
        return cell(place, name, _DIGITS.get(name))
    number, least, most = (int(place[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return Cell(str(number), "" if least == most else f" ({least}–{most})")


def _batches_table(data: xr.Dataset, sizes: Sequence[int]) -> Table:
    """Imbalance within batches, three columns a size."""
    columns = [(size, f"batch_imbalance{end}") for size in sizes for end in ("", "_quantile", "_null")]
    rows = grid_of_pairs(data.isel(quantile=-1), "layer", "batch", columns)
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
        (Section("", rows),),
        groups=titles,
        notes=(
            "95 %: the quantile over batches; by chance: the mean of batches of as many tokens drawn independently "
            "from the whole trace.",
            f"± the larger side of a 95 % interval of the mean, over batches. Full batches: {held}.",
        ),
        frame=tidy(data, "layer", "batch"),
    )


def batch_sizes(balance: xr.Dataset) -> list[int]:
    """Sizes of batches, in sequences, of which the trace holds one."""
    if "batch_imbalance" not in balance:
        return []
    return [size for size in balance["batch"].values.tolist() if balance["batches"].sel(batch=size)]


def balance_frame(balance: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, layer), a (layer, batch), the batch in sequences, and a (domain, layer, statistic)."""
    frames = {"loads": tidy(balance, "domain", "layer")}
    if "batch_imbalance" in balance:
        frames["loads within a batch"] = tidy(balance, "layer", "batch")
    if "weight" in balance:
        frames["gate weights"] = tidy(only(balance, "domain", "layer", "statistic"), "domain", "layer", "statistic")
        frames["quantiles of gate weights"] = tidy(balance[["weight_quantile"]], "layer", "statistic")
    return kinds(frames)


subject = Subject(measure=lambda counted, _: balance(counted), blocks=blocks, section=SECTION, command=command)
