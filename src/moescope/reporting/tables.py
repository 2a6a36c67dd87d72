"""Tables as people read them: cells of text in rows, sections and columns, built once and printed in any format.

Shares are in per cent, divergences in bits; ``±`` is the larger side of a 95 % interval clustered by document. The same
values unrounded are the table's `frame`, which is what CSV and JSON hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures import published
from moescope.measures.groups import FEWEST_EXPECTED
from moescope.reporting import frames
from moescope.reporting.numbers import MISSING, bits, count, number, percent, spread
from moescope.reporting.visible import visible

SIGNIFICANT = 0.05
"""False discovery rate below which a divergence is marked."""


class Cell(NamedTuple):
    """What one cell says.

    Attributes:
        value: The number, rounded.
        spread: Half of its interval with its sign, such as ``±0.8``; empty if there is none.
        mark: ``*`` beside a value that differs from its null.
    """

    value: str
    spread: str = ""
    mark: str = ""


class Row(NamedTuple):
    """A label and its cells, one a column."""

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Section:
    """Rows under a common title; the title may be empty. The note, a sentence or two, stands between them."""

    title: str
    rows: tuple[Row, ...]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table to print.

    Attributes:
        name: File name without ending.
        title: What is counted, and the unit.
        stub: Heading of the labels of rows.
        columns: Headings of the columns.
        sections: The rows.
        groups: Headings that span columns, with the number of columns each spans; may be empty.
        notes: What a reader needs to know.
        frame: The values, tidy and unrounded.
    """

    name: str
    title: str
    stub: str
    columns: tuple[str, ...]
    sections: tuple[Section, ...]
    groups: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    frame: pd.DataFrame = field(default_factory=pd.DataFrame)


def shares_table(
    shares: xr.Dataset,
    layers: Sequence[int],
    choice: str = "either",
    of: Literal["assignments", "tokens"] = "assignments",
) -> Table:
    """Share of the assignments that each expert receives: a section a layer, a row an expert, a column a domain.

    Args:
        shares: Of `moescope.shares`.
        layers: Layers to show.
        choice: A coordinate of `shares`: "either", "first", …
        of: "assignments", as in Figure 7, or "tokens", OLMoE's domain specialization (its equation 7): the part of the
            tokens that have the expert among their choices.
    """
    data = shares.sel(choice=choice, layer=list(layers))
    domains = data["domain"].values.tolist()
    sections = []
    for layer in layers:
        at = data.sel(layer=layer).transpose("expert", "domain")
        value, low, high = (at[name].values for name in ("share", "low", "high"))
        uniform = float(at["uniform"])
        if of == "tokens":
            tokens = at["share_of_tokens"].values
            scale = np.nansum(tokens, axis=0)  # assignments a token: top-k, or 1 for one rank, less what was dropped
            value, low, high, uniform = tokens, low * scale, high * scale, uniform * _choices(choice, int(at["top_k"]))
        num_experts, num_ids = int(at["num_experts"]), int(at["num_ids"])
        rows = tuple(
            Row(
                str(expert) if expert < num_experts else f"{expert} (null)",
                tuple(
                    Cell(percent(v), spread(v, a, b))
                    for v, a, b in zip(value[expert], low[expert], high[expert], strict=True)
                ),
            )
            for expert in range(num_ids)
        )
        sections.append(Section(f"layer {layer}: uniform {percent(uniform)}", rows))
    top_k = int(data["top_k"].values.max())
    title = (
        "Share of the assignments that each expert receives" if of == "assignments" else "Tokens that have the expert"
    )
    total = "The shares of a domain and layer sum to 100 %"
    total += " times the choices of a token." if of == "tokens" and choice == "either" else "."
    return Table(
        "shares",
        f"{title}, {describe_choice(choice, top_k)}, %",
        "expert",
        tuple(map(visible, domains)),
        tuple(sections),
        notes=(f"± the larger side of a 95 % interval, clustered by document. {total}",),
        frame=frames.shares_frame(shares.sel(choice=[choice], layer=list(layers))),
    )


def repeats_table(repeats: xr.Dataset, layers: Sequence[int]) -> Table:
    """Table 5: a row a domain; first choice, then first or second choice, a column a layer.

    Below the measured rates stand what the popularity of the experts alone predicts, the uniform baseline and, if the
    corpus has domains of the paper, what the paper published.
    """
    data = repeats.sel(layer=list(layers))
    kinds = [kind for kind in ("first", "any") if kind in data["kind"].values]
    domains = data["domain"].values.tolist()

    def rows(name: str, *, interval: bool = False) -> tuple[Row, ...]:
        return tuple(
            Row(
                visible(domain),
                tuple(
                    _share_cell(
                        data, name, ("low", "high") if interval else None, domain=domain, kind=kind, layer=layer
                    )
                    for kind in kinds
                    for layer in layers
                ),
            )
            for domain in domains
        )

    uniform = tuple(
        Cell(percent(data["uniform"].sel(kind=kind, layer=layer).item())) for kind in kinds for layer in layers
    )
    top_k = int(data["top_k"].values.max())
    return Table(
        "repeats",
        "Repeated consecutive assignments, %",
        "domain",
        tuple(f"layer {layer}" for _ in kinds for layer in layers),
        (
            Section("", rows("rate", interval=True)),
            Section("expected from the popularity of the experts alone", rows("marginal")),
            Section("expected from uniform routing", (Row("any domain", uniform),)),
            *(_published(domains, layers) if len(kinds) == 2 else []),
        ),
        groups=tuple(("first choice" if kind == "first" else describe_any(top_k), len(layers)) for kind in kinds),
        notes=("± the larger side of a 95 % interval, clustered by document. Pairs never cross a sequence.",),
        frame=frames.repeats_frame(data),
    )


def domain_pairs_table(divergence: xr.Dataset, layers: Sequence[int]) -> Table:
    """Divergence of each pair of domains: a section a layer, with the bits above sampling alone and a mark where found.

    Args:
        divergence: Of `moescope.divergence`.
        layers: Layers to show.
    """
    data = divergence.sel(layer=list(layers))
    domains = data["domain"].values.tolist()
    sections = []
    for layer in layers:
        at = data.sel(layer=layer)
        value, q_value = at["jsd"].values, at["pair_q_value"].values
        rows = tuple(
            Row(
                visible(domain),
                tuple(
                    Cell("") if row == column else Cell(bits(float(value[row, column])), mark="*" if found else "")
                    for column, found in enumerate(q_value[row] < SIGNIFICANT)
                ),
            )
            for row, domain in enumerate(domains)
        )
        information, null = (bits(float(at[name])) for name in ("information", "information_null"))
        title = f"layer {layer}: I(domain; expert) {information}, from sampling alone {null}"
        if str(at["leader"].values) and len(domains) > 2:
            how = "surely furthest" if bool(at["leads_surely"]) else "furthest, not surely,"
            title += f"; {how} from the others: {visible(str(at['leader'].values))}"
        sections.append(Section(title, rows))
    return Table(
        "domain_pairs",
        "Jensen-Shannon divergence between the shares of two domains, bits",
        "domain",
        tuple(map(visible, domains)),
        tuple(sections),
        notes=(f"* differ (false discovery rate {percent(SIGNIFICANT, 0)} % over layers and pairs).",),
        frame=frames.divergence_frame(data).query("other != '(the others)'"),
    )


def words_table(words: xr.Dataset, layers: Sequence[int]) -> Table:
    """Words and indentation: a section a layer, a row a word."""
    data = words.sel(layer=list(layers))
    same, together = ("same_low", "same_high"), ("together_low", "together_high")
    sections = []
    for layer in layers:
        rows = []
        for word in data["word"].values.tolist():
            at = {"word": word, "layer": layer}
            top = float(data["top_expert"].sel(at))
            rows.append(
                Row(
                    visible(word),
                    (
                        Cell(count(int(data["occurrences"].sel(word=word)))),
                        Cell(MISSING if isnan(top) else str(int(top))),
                        _share_cell(data, "top_share", ("top_share_low", "top_share_high"), **at),
                        _share_cell(data, "top_share_null", None, **at),
                        _share_cell(data, "same", same, **at),
                        _share_cell(data, "same_null", None, **at),
                        _share_cell(data, "together", together, **at),
                        _share_cell(data, "together_null", None, **at),
                    ),
                )
            )
        sections.append(Section(f"layer {layer}", tuple(rows)))
    return Table(
        "words",
        "First-choice expert of words, %",
        "word",
        ("occurrences", "expert", "of the word", "of all tokens", "measured", "any tokens", "measured", "token ids"),
        tuple(sections),
        groups=(("", 1), ("most frequent expert", 3), ("two documents agree", 2), ("within a word", 2)),
        notes=(
            "two documents agree: two tokens of the word from different documents have the same first choice, against "
            "any two tokens of the trace.",
            "within a word: all tokens of an occurrence that the tokenizer cut have the same first choice, against "
            "what their token ids do elsewhere.",
            "± the larger side of a 95 % interval, by document.",
        ),
        frame=frames.words_frame(data),
    )


def divergence_table(divergence: xr.Dataset, layers: Sequence[int]) -> Table:
    """How far each domain's shares are from the mean of the others: a row a domain, a column a layer."""
    data = divergence.sel(layer=list(layers))
    domains = data["domain"].values.tolist()

    def rows(cell: Sequence[str]) -> tuple[Row, ...]:
        return tuple(
            Row(visible(domain), tuple(_bits_cell(data.sel(domain=domain, layer=layer), cell) for layer in layers))
            for domain in domains
        )

    return Table(
        "divergence",
        "Jensen-Shannon divergence of a domain's shares from the mean of the other domains', bits",
        "domain",
        tuple(f"layer {layer}" for layer in layers),
        (
            Section("measured", rows(("jsd_rest",))),
            Section("expected from sampling documents alone", rows(("jsd_rest_null",))),
            Section("95 % interval of the true divergence", rows(("jsd_rest_low", "jsd_rest_high"))),
        ),
        notes=(
            f"* differs from the other domains (false discovery rate {percent(SIGNIFICANT, 0)} %).",
            *_largest_pairs(data),
        ),
        frame=frames.divergence_frame(data),
    )


def balance_tables(balance: xr.Dataset, layers: Sequence[int]) -> list[Table]:
    """Load balance, a row a layer: the loads, then batches and gate weights where there are any.

    The frame of the first table holds everything.

    Args:
        balance: Of `moescope.balance`.
        layers: Layers to show.
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
            rows.append(Row(str(layer), (*(_number_cell(at, name, digits) for name, digits in kept.items()), *experts)))
        return tuple(rows)

    def null(layer: int) -> tuple[Cell, ...]:
        at = data.sel(domain=domains[0], layer=layer)
        return *(Cell(number(float(at[f"{name}_null"]), digits)) for name, digits in kept.items()), *[Cell("")] * 3

    tables = [
        Table(
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
                "± the larger side of a 95 % interval, by document.",
            ),
            frame=frames.balance_frame(data),
        )
    ]
    if "batch_imbalance" in data:
        sizes = [size for size in data["batch"].values.tolist() if data["batches"].sel(batch=size)]
        tables += [_batches_table(data, layers, sizes)] if sizes else []
    if "weight" in data:
        everything = data.sel(domain=domains[0])
        rows = tuple(
            Row(
                str(layer),
                tuple(_number_cell(everything.sel(layer=layer, statistic=name), "weight", 3) for name in _WEIGHTS),
            )
            for layer in layers
        )
        tables.append(
            Table(
                "weights",
                "Gate weights of a token, normalised to sum 1; mean over the tokens of the trace",
                "layer",
                tuple(_WEIGHTS.values()),
                (Section("", rows),),
                notes=("± the larger side of a 95 % interval, by document.",),
                frame=tables[0].frame.query("what == 'gate weights'").dropna(axis=1, how="all"),
            )
        )
    return tables


_WEIGHTS = {"first": "the largest", "margin": "its lead over the second", "entropy": "entropy, bits"}


def _batches_table(data: xr.Dataset, layers: Sequence[int], sizes: Sequence[int]) -> Table:
    """Imbalance within batches, three columns a size."""
    rows = []
    for layer in layers:
        cells: list[Cell] = []
        for size in sizes:
            at = data.sel(layer=layer, batch=size)
            worst = Cell(number(float(at["batch_quantile"].isel(quantile=-1)), 2))
            cells += [_number_cell(at, "batch_imbalance", 2), worst, Cell(number(float(at["batch_null"]), 2))]
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
        frame=frames.balance_frame(data).query("what == 'loads within a batch'").dropna(axis=1, how="all"),
    )


def coactivation_table(coactivation: xr.Dataset, layers: Sequence[int]) -> Table:
    """Co-activation: a section a layer, a row a pair; those most and least often together among those that differ.

    Args:
        coactivation: Of `moescope.coactivation`.
        layers: Layers to show.
    """
    data = coactivation.sel(layer=[layer for layer in layers if layer in coactivation["layer"].values])
    sections = []
    for layer in data["layer"].values.tolist():
        at = data.sel(layer=layer)
        size = int(at["num_ids"])
        upper = np.triu(np.ones((size, size), bool), 1)
        lift = np.where(upper, at["lift"].values[:size, :size], np.nan)
        found = np.where(upper, at["q_value"].values[:size, :size], np.nan) < SIGNIFICANT
        tested = int((np.isfinite(at["p_value"].values[:size, :size]) & upper).sum())
        rows = tuple(
            Row(
                f"{i} and {j}",
                (
                    _share_cell(at, "joint", None, expert=i, other=j),
                    _share_cell(at, "expected", None, expert=i, other=j),
                    _lift_cell(at.sel(expert=i, other=j)),
                    _share_cell(at, "conditional", None, expert=i, other=j),
                    _share_cell(at, "conditional", None, expert=j, other=i),
                ),
            )
            for i, j in _extremes(lift, found)
        )
        excess, chance = (percent(float(at[name])) for name in ("deviation", "deviation_null"))
        title = (
            f"layer {layer}: {count(int(found.sum()))} of {count(tested)} pairs differ from popularity alone; "
            f"{excess} % of the pairs in excess, {chance} by chance"
        )
        sections.append(Section(title, rows))
    return Table(
        "coactivation",
        "Experts chosen for the same token, % of the tokens",
        "experts",
        ("together", "popularity alone", "lift", "second given first", "first given second"),
        tuple(sections),
        notes=(
            f"Of the pairs that differ, the {MOST_LISTED} most and the {MOST_LISTED} least often together (false "
            f"discovery rate {percent(SIGNIFICANT, 0)} % over pairs and layers).",
            "popularity alone: sets of the same size in which nothing but the popularity of each expert counts.",
            "± the larger side of a 95 % interval, by document.",
        ),
        frame=frames.coactivation_frame(data),
    )


def _untested(transitions: xr.Dataset) -> list[str]:
    """How many of the transitions shown have too few tokens, if any do."""
    of_all = int((transitions["num_before"] * transitions["num_after"]).sum())
    tested = int(transitions["p_value"].notnull().sum())
    if tested == of_all:
        return []
    return [
        f"{count(of_all - tested)} of these {count(of_all)} transitions are not tested, and grey in the figure: "
        f"independent layers would give them fewer than {FEWEST_EXPECTED} tokens, or leave fewer to other experts, and "
        "too few tell nothing. A longer trace tests more, and so do all assignments instead of first choices (--choice "
        "any)."
    ]


def transitions_tables(transitions: xr.Dataset, layers: Sequence[int] | None = None) -> list[Table]:
    """Transitions: the information from layer to layer, the strongest transitions, and, if counted, the paths.

    The frame of the first table holds everything.

    Args:
        transitions: Of `moescope.transitions`.
        layers: Later layers of which transitions are listed, here and in the frames; None lists those of the first, the
            middle and the last, and all in the frames.
    """
    known = transitions["layer"].values.tolist()
    shown = layers if layers is not None else list(dict.fromkeys([known[0], known[(len(known) - 1) // 2], known[-1]]))
    name_of = {layer: f"{int(transitions['layer_before'].sel(layer=layer))} to {layer}" for layer in known}
    what = "first choices" if str(transitions["choice"].values) == "first" else "all assignments"
    information = []
    for layer in known:
        at = transitions.sel(layer=layer)
        q_value = at["q_value"].values
        cells = (
            _number_cell(at, "information", 4),
            Cell(percent(float(at["information"]) / max(float(at["entropy"]), 1e-12))),
            *(Cell(bits(float(at[name]))) for name in ("plug_in", "miller_madow", "sampling_alone")),
            Cell(f"{count(int((q_value < SIGNIFICANT).sum()))} of {count(int(np.isfinite(q_value).sum()))}"),
        )
        information.append(Row(name_of[layer], cells))
    tables = [
        Table(
            "information_between_layers",
            f"Information that the expert of a token at one layer holds of the next layer's, {what}, bits",
            "layers",
            ("bias removed", "% of the entropy", "as counted", "Miller-Madow", "sampling alone", "transitions differ"),
            (Section("", tuple(information)),),
            notes=(
                "sampling alone: what would be counted if the layers were independent. ± the larger side of a "
                "95 % interval, by "
                "document.",
            ),
            frame=frames.transitions_frame(transitions, layers),
        )
    ]
    sections = []
    for layer in shown:
        at = transitions.sel(layer=layer)
        rows = tuple(
            Row(
                f"{i} to {j}",
                (
                    _share_cell(at, "joint", None, expert=i, next=j),
                    _share_cell(at, "expected", None, expert=i, next=j),
                    _lift_cell(at.sel(expert=i, next=j)),
                    _share_cell(at, "probability", None, expert=i, next=j),
                ),
            )
            for i, j in _extremes(at["lift"].values, at["q_value"].values < SIGNIFICANT)
        )
        sections.append(Section(f"layer {name_of[layer]}", rows))
    tables.append(
        Table(
            "transitions",
            f"Transitions from layer to layer, {what}, %",
            "experts",
            ("of the tokens", "independent layers", "lift", "of those from the first"),
            tuple(sections),
            notes=(
                f"Of the transitions that differ, the {MOST_LISTED} most and the {MOST_LISTED} least frequent for the "
                f"popularity of the experts (false discovery rate {percent(SIGNIFICANT, 0)} %).",
                *_untested(transitions.sel(layer=list(shown))),
            ),
            frame=tables[0].frame.query("what == 'transition'").dropna(axis=1, how="all"),
        )
    )
    if "half" in transitions:
        of_paths = []
        number = int(transitions["path_tokens"])
        for routing in transitions["routing"].values.tolist():
            at = transitions.sel(routing=routing)
            values = [float(at[name]) for name in ("distinct", "half", "effective")]
            counts = [Cell(MISSING if not np.isfinite(value) else count(round(value))) for value in values]
            if values[-1] > number:
                counts[-1] = Cell(f">{count(number)}")  # rests on a few pairs of tokens
            of_paths.append(Row(routing, (*counts, Cell(percent(float(at["once"]))))))
        tables.append(
            Table(
                "paths",
                f"Paths (first choices at all {len(known) + 1} layers) of {count(number)} tokens",
                "",
                ("different", "carry half of the tokens", "effective", "% of tokens alone on theirs"),
                (Section("", tuple(of_paths)),),
                notes=(
                    "markov chain, independent layers: as many tokens drawn with these transitions, and with these "
                    "popularities only. effective: one over the probability that two tokens share a path.",
                ),
                frame=tables[0].frame.query("what == 'paths'").dropna(axis=1, how="all"),
            )
        )
    return tables


MOST_LISTED = 5
"""Pairs at either end that a table lists; the frame has all."""


def _extremes(lift: np.ndarray, found: np.ndarray) -> list[tuple[int, int]]:
    """The found cells with the largest lifts, then those with the smallest, each once."""
    cells = [(int(i), int(j)) for i, j in np.argwhere(found & np.isfinite(lift))]
    cells.sort(key=lambda cell: -float(lift[cell]))
    if len(cells) <= 2 * MOST_LISTED:
        return cells
    return [*cells[:MOST_LISTED], *cells[-MOST_LISTED:]]


def _lift_cell(at: xr.Dataset) -> Cell:
    value, low, high = (float(at[name]) for name in ("lift", "low", "high"))
    half = max(value - low, high - value)
    return Cell(number(value, 2), "" if isnan(half) else f"±{number(half, 2)}")


def describe_choice(choice: str, top_k: int) -> str:
    """Words for a coordinate of choice.

    Example:
        >>> describe_choice("either", 2), describe_choice("either", 8), describe_choice("4th", 8)
        ('first or second choice', 'any of the 8 choices', '4th choice')
    """
    return describe_any(top_k) if choice == "either" else f"{choice} choice"


def describe_any(top_k: int) -> str:
    """Words for all choices of a token taken together."""
    return {1: "the one choice", 2: "first or second choice"}.get(top_k, f"any of the {top_k} choices")


def _choices(choice: str, top_k: int) -> int:
    """Choices of a token that a coordinate of choice stands for."""
    return top_k if choice == "either" else 1


def _published(domains: Sequence[str], layers: Sequence[int]) -> list[Section]:
    """Table 5 as the paper has it, its first, middle and last layer under ours, if a domain is the paper's."""
    known = {domain: name for domain in domains if (name := published.paper_name(domain)) is not None}
    if not known or len(layers) != len(published.LAYERS):
        return []
    table = published.table5()
    rows = tuple(
        Row(visible(domain), tuple(Cell(f"{value:.1f}") for value in table.sel(domain=name).values.ravel()))
        for domain, name in known.items()
    )
    layers_text = ", ".join(map(str, published.LAYERS))
    return [Section(f"Mixtral-8x7B on the Pile as published, layers {layers_text} of 32", rows)]


def _number_cell(at: xr.Dataset, name: str, digits: int) -> Cell:
    value, low, high = (float(at[f"{name}{end}"]) for end in ("", "_low", "_high"))
    if isnan(low) or isnan(high):
        return Cell(number(value, digits))
    return Cell(number(value, digits), f"±{number(max(value - low, high - value), digits)}")


def _share_cell(data: xr.Dataset, name: str, ends: tuple[str, str] | None, **at: object) -> Cell:
    value = float(data[name].sel(at))
    if ends is None:
        return Cell(percent(value))
    low, high = (float(data[end].sel(at)) for end in ends)
    return Cell(percent(value), spread(value, low, high))


def _bits_cell(at: xr.Dataset, names: Sequence[str]) -> Cell:
    values = [float(at[name]) for name in names]
    if len(values) == 2:
        low, high = values
        return Cell(MISSING if isnan(low) or isnan(high) else f"{bits(low)}–{bits(high)}")
    marked = names[0] == "jsd_rest" and float(at["q_value"]) < SIGNIFICANT
    return Cell(bits(values[0]), mark="*" if marked else "")


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
