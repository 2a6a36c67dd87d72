"""How consistently tokens go to one expert, the tokens of an expert and the experts of a token.

Token text is what a corpus made up: it passes `visible` before it stands anywhere. Bytes that are no text read
``\\xe2``, so that different pieces look different.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures.vocabulary import vocabulary
from moescope.reporting import figures as drawn
from moescope.reporting.cells import BY_DOCUMENT, FDR, by_layer, cell, grid_of_pairs, mark
from moescope.reporting.chapters import VOCABULARY
from moescope.reporting.frames import kinds, only, tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import MISSING, count, percent
from moescope.reporting.options import (
    choice_option,
    figures_option,
    one_of,
    parse_integers,
    permutations_option,
    shown_layers_option,
    trace_argument,
)
from moescope.reporting.printing import layer_progress
from moescope.reporting.subject import Drawing, PageFigure, PageTable, Results, Subject, where_known
from moescope.reporting.tables import Cell, Row, Section, Table
from moescope.reporting.visible import shorten, visible
from moescope.reporting.wording import capital, choice_of, expert_name
from moescope.tallying import Counted
from moescope.trace import Trace, Vocabulary

LONGEST_TOKEN = 14
"""Characters of a token that a table shows."""

EXPERTS_LISTED = 4
"""Experts that a table lists for a token."""

BRIEF_TOP = 5
"""Tokens an expert in the table of all experts; of a few experts there are more."""

_ABOVE_POPULARITY = "* significantly above the expert's popularity, corrected for all pairs of tokens and experts."
_BY = {"input": "by the token", "next": "by the next token"}
_MEASURED = ("specialization", "specialization_null", "held_out")
_LISTED = ("share", "count", "tokens", "documents")


def measure(counted: Counted, results: Results) -> xr.Dataset | None:
    """Of the documents that bits are explained of, if an id is frequent enough."""
    return where_known(vocabulary(counted, top=BRIEF_TOP), "specialization") if results.has_text else None


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """Specialization by layer and expert, then the tokens of each expert."""
    pieces = results.trace.vocabulary
    yield PageFigure(
        name="vocabulary",
        file="vocabulary",
        draw=lambda: drawn.vocabulary.draw_vocabulary(result),
        label="Vocabulary",
        title="How consistently a token goes to one expert",
        caption=(
            "Share of an id's tokens that chose its most frequent expert, mean over ids of at least "
            f"{int(result.attrs['min_count'])} tokens; left by the token itself, right by the next token. Dashed: "
            "the same choices rotated within each document. Dotted: the most popular expert. Below: experts from the "
            "most to the least specialized."
        ),
        how=(
            "Far above the dashed line the layer goes by the token; near 100 % it looks words up. Where the right "
            "panel is the higher, the layer is about what comes next."
        ),
        cannot=(
            "Each id counts once, so rare ids weigh most. It does not say whether the token itself decides, or the "
            "words that usually stand before it."
        ),
        frame=vocabulary_frame(result, pieces),
    )
    yield PageTable(vocabulary_table(result, results.layers, pieces), folded="The same as a table")
    yield PageTable(expert_tokens_table(result, results.layers, pieces), folded="The tokens of each expert")


@trace_argument
@shown_layers_option
@one_of("--by", ["input", "next"], "List by the token itself, or by the token after it.")
@choice_option
@click.option(
    "--min-count",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Tokens that an id must have to be counted.",
)
@click.option(
    "--top",
    type=click.IntRange(0, 1000),
    metavar="N",
    help=f"Tokens listed for each expert.  [default: {BRIEF_TOP}, of chosen experts 10]",
)
@click.option(
    "--expert", "experts", callback=parse_integers, metavar="LIST", help="List the tokens of these experts in full."
)
@click.option(
    "--token",
    "tokens",
    multiple=True,
    metavar="TEXT",
    help="Show the experts of a token, with and without a space in front; repeatable.",
)
@permutations_option
@figures_option
def command(
    trace: Trace,
    layers: tuple[int, ...] | None,
    by: str,
    top: int | None,
    experts: tuple[int, ...] | None,
    tokens: tuple[str, ...],
    figures: Path | None,
    **settings: Any,  # the arguments of `moescope.vocabulary` that have these names
) -> Iterator[Table | Drawing]:
    """Show how consistently each token goes to one expert, and which tokens each expert gets.

    Vocabulary specialization (OLMoE, equation 8): of the tokens with an id, the share that chose the id's most frequent
    expert; by the token's own id and by that of the next token. (A trace does not hold the ids that the model
    predicts.) Beside it the same of choices that do not see the token. Then the tokens of each expert or, if they are
    asked for, of some experts, and the experts of some tokens. CSV and JSON hold all of it in one table.

    \b
    Example:
      moescope vocabulary pile.moe --layers 0,15,31 --expert 3 --token self
    """
    trace.need_tokens()
    shown = shown_layers(trace, layers)
    most = max(layer.num_ids for layer in trace.select_layers(shown))
    if experts and experts[-1] >= most:
        raise click.BadParameter(
            f"there is no expert {experts[-1]}; the largest is {most - 1}.", param_hint="'--expert'"
        )
    listed = top if top is not None else 10 if experts else BRIEF_TOP
    with layer_progress("looking at tokens") as progress:
        result = vocabulary(
            trace,
            shown if figures is None else None,
            top=listed,
            tokens=_token_ids(trace.vocabulary.pieces, tokens),
            progress=progress,
            **settings,
        )
    pieces = trace.vocabulary
    yield vocabulary_table(result, shown, pieces)
    if experts:
        yield expert_table(result, shown, pieces, experts, by, listed)
    elif listed and not tokens:
        yield expert_tokens_table(result, shown, pieces, by, listed)
    if tokens:
        yield token_experts_table(result, shown, pieces, by)
    yield Drawing(file="vocabulary", draw=lambda: drawn.vocabulary.draw_vocabulary(result))


def vocabulary_table(vocabulary: xr.Dataset, layers: Sequence[int], pieces: Vocabulary) -> Table:
    """Specialization by layer; the frame holds everything there is."""
    data = vocabulary.sel(layer=list(layers))
    columns = [*((by, name) for by in _BY for name in _MEASURED), ("input", "popularity")]
    sizes = "; ".join(
        f"{words}: {count(int(data['ids'].sel(by=by)))} ids, {count(int(data['id_tokens'].sel(by=by)))} tokens"
        for by, words in _BY.items()
    )
    return Table(
        "vocabulary",
        f"Vocabulary specialization, {choice_of(vocabulary)}, %",
        "layer",
        (*("measured", "rotated", "held out") * 2, "popularity"),
        (Section("", grid_of_pairs(data, "layer", "by", columns)),),
        groups=((_BY["input"], 3), (_BY["next"], 3), ("", 1)),
        notes=(
            "Share of an id's tokens that chose its most frequent expert, mean over the ids of at least "
            f"{int(vocabulary.attrs['min_count'])} tokens. {capital(sizes)}.",
            "rotated: the choices of each document rotated, so that they do not see the token; held out: the expert "
            "most frequent in other documents; popularity: the most popular expert's share of all tokens.",
            f"{BY_DOCUMENT} * the choices see it ({FDR}).{_sampled(vocabulary)}",
        ),
        frame=vocabulary_frame(data, pieces),
    )


def expert_tokens_table(
    vocabulary: xr.Dataset, layers: Sequence[int], pieces: Vocabulary, by: str = "input", top: int = 5
) -> Table:
    """The tokens of each expert, the `top` of them: a section a layer, a row an expert.

    By the token itself ("input") or by the one after it ("next").
    """
    top = min(top, vocabulary.sizes["place"])

    def rows(of_layer: xr.Dataset) -> Iterator[Row]:
        for expert in range(int(of_layer["num_ids"])):
            of_expert = of_layer.sel(expert=expert)
            sizes = (cell(of_expert, f"expert_{name}") for name in ("ids", "specialization", "specialization_null"))
            tokens = (_token_cell(of_expert.isel(place=place), pieces) for place in range(top))
            yield Row(expert_name(expert, int(of_layer["num_experts"])), (*sizes, *tokens))

    return Table(
        "expert_tokens",
        f"Tokens of each expert {_BY[by]}, {choice_of(vocabulary)}: share of the token that the expert gets, %",
        "expert",
        ("ids", "mean", "rotated", *(_ordinal(place + 1) for place in range(top))),
        by_layer(vocabulary.sel(by=by, layer=list(layers)), rows),
        notes=(
            "ids: those whose most frequent expert it is; mean: their specialization; rotated: the same of choices "
            "that do not see the token; then the tokens with the largest shares.",
            _ABOVE_POPULARITY,
        ),
        frame=vocabulary_frame(vocabulary.sel(layer=list(layers)), pieces).query("what == 'token of an expert'"),
    )


def expert_table(
    vocabulary: xr.Dataset,
    layers: Sequence[int],
    pieces: Vocabulary,
    experts: Sequence[int],
    by: str = "input",
    top: int = 10,
) -> Table:
    """The tokens of a few experts in full: a section a layer and expert, a row a token; the rest as of all experts.

    Experts that a layer lacks are left out.
    """
    data = vocabulary.sel(by=by, layer=list(layers))
    sections = []
    for layer in layers:
        of_layer = data.sel(layer=layer)
        for expert in experts:
            if expert >= int(of_layer["num_ids"]):
                continue
            of_expert = of_layer.sel(expert=expert)
            listed = [of_expert.isel(place=place) for place in range(min(top, data.sizes["place"]))]
            rows = tuple(
                Row(_quoted(pieces, int(one["top_token"])), tuple(cell(one, f"top_{name}") for name in _LISTED))
                for one in listed
                if one["top_token"] >= 0
            )
            popular = percent(float(of_expert["expert_popularity"]))
            name = expert_name(expert, int(of_layer["num_experts"]))
            title = f"layer {layer}, expert {name}: {count(int(of_expert['expert_ids']))} ids"
            sections.append(Section(f"{title}, {popular} % of all tokens", rows))
    return Table(
        "expert_tokens",
        f"Tokens of an expert {_BY[by]}, {choice_of(vocabulary)}: share of the token that the expert gets, %",
        "token",
        ("share", "went there", "of tokens", "in documents"),
        tuple(sections),
        notes=(f"{BY_DOCUMENT} {_ABOVE_POPULARITY}",),
        frame=vocabulary_frame(vocabulary.sel(layer=list(layers)), pieces).query("what == 'token of an expert'"),
    )


def token_experts_table(vocabulary: xr.Dataset, layers: Sequence[int], pieces: Vocabulary, by: str = "input") -> Table:
    """The experts of the `tokens` that were asked for: a section a layer, a row a token; the rest as of all experts."""
    listed = min(EXPERTS_LISTED, vocabulary.sizes["expert"])

    def rows(of_layer: xr.Dataset) -> Iterator[Row]:
        for token in of_layer["token"].values.tolist():
            of_token = of_layer.sel(token=token)
            share = of_token["share"].values
            cells = [cell(of_token, "token_tokens")]
            for expert in np.argsort(-np.nan_to_num(share, nan=-1.0), kind="stable")[:listed].tolist():
                pair = [Cell(str(expert)), cell(of_token.sel(expert=expert), "share")]
                cells += pair if share[expert] > 0 else [Cell(MISSING)] * 2
            yield Row(_quoted(pieces, token), tuple(cells))

    return Table(
        "token_experts",
        f"Experts of a token {_BY[by]}, {choice_of(vocabulary)}, % of its tokens",
        "token",
        ("tokens", *("expert", "share") * listed),
        by_layer(vocabulary.sel(by=by, layer=list(layers)), rows),
        groups=(("", 1), *((_ordinal(place + 1), 2) for place in range(listed))),
        notes=(f"{BY_DOCUMENT}{_sampled(vocabulary)}",),
        frame=vocabulary_frame(vocabulary.sel(layer=list(layers)), pieces).query("what == 'expert of a token'"),
    )


def vocabulary_frame(vocabulary: xr.Dataset, pieces: Vocabulary) -> pd.DataFrame:
    """A row a (by, layer), then a row an expert, then a row a token listed for it, then a row an expert of a token."""
    numbered = vocabulary.assign_coords(place=vocabulary["place"] + 1)
    exists = vocabulary["num_ids"].to_series()
    rows = {
        "layer": ("by", "layer"),
        "expert": ("by", "layer", "expert"),
        "token of an expert": ("by", "layer", "expert", "place"),
        "expert of a token": ("by", "layer", "token", "expert"),
    }
    parts = {}
    for what, dims in rows.items():
        if not set(dims) <= set(vocabulary.dims):
            continue
        sizes = {"layer": ["ids", "id_tokens"], "expert of a token": ["token_tokens"]}.get(what, [])
        part = tidy(numbered[[*only(numbered, *dims), *sizes]], *dims)
        part = part.rename(columns={"top_token": "token_id", "token": "token_id"})
        if "expert" in dims:
            part = part[part["expert"] < part["layer"].map(exists)]
        if "place" in dims:
            part = part[part["token_id"] >= 0]
        parts[what] = part
    frame = kinds(parts)
    if "token_id" in frame:
        text = [None if pd.isna(token) else visible(_text(pieces, int(token))) for token in frame["token_id"]]
        frame.insert(frame.columns.get_loc("token_id") + 1, "text", text)
    return frame


def _token_cell(listed: xr.Dataset, pieces: Vocabulary) -> Cell:
    if int(listed["top_token"]) < 0:
        return Cell("")
    share = f" {percent(float(listed['top_share']), 0)}"
    return Cell(_quoted(pieces, int(listed["top_token"])), share, mark(listed["top_share_q"]))


def _quoted(pieces: Vocabulary, token_id: int) -> str:
    return f"“{shorten(_text(pieces, token_id), LONGEST_TOKEN)}”"


def _text(pieces: Vocabulary, token_id: int) -> str:
    return pieces.piece(token_id).decode(errors="backslashreplace")


def _sampled(vocabulary: xr.Dataset) -> str:
    fraction = float(vocabulary.attrs["sampled_fraction"])
    return "" if fraction >= 1 else f" Of a sample of {percent(fraction)} % of the documents."


def _ordinal(place: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(place, f"{place}th")


def _token_ids(pieces: dict[int, bytes], texts: tuple[str, ...]) -> list[int]:
    """Ids of the pieces that are one of the texts, or one of them after a space."""
    ids: list[int] = []
    for text in texts:
        wanted = {text.encode(), f" {text}".encode()}
        if wanted.isdisjoint(pieces.values()):
            raise click.BadParameter(f"{text!r} is not one token of the trace's vocabulary.", param_hint="'--token'")
        ids += [token_id for token_id, piece in pieces.items() if piece in wanted]
    return ids


subject = Subject(measure=measure, blocks=blocks, section=VOCABULARY, command=command)
