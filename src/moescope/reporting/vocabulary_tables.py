"""Vocabulary specialization and word classes as tables and data frames.

Token text is what a corpus made up: it passes `visible` before it stands anywhere. Bytes that are no text read
``\\xe2``, so that different pieces look different.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

import numpy as np
import pandas as pd
import xarray as xr

from moescope.reporting.numbers import MISSING, bits, count, percent, spread
from moescope.reporting.tables import SIGNIFICANT, Cell, Row, Section, Table, describe_choice
from moescope.reporting.visible import shorten, visible
from moescope.trace import Vocabulary

LONGEST_TOKEN = 14
"""Characters of a token that a table shows."""

EXPERTS_LISTED = 4
"""Experts that a table lists for a token."""

_BY = {"input": "by the token", "next": "by the next token"}


def vocabulary_table(vocabulary: xr.Dataset, layers: Sequence[int], pieces: Vocabulary) -> Table:
    """Specialization by layer; the frame holds everything there is.

    Args:
        vocabulary: Of `moescope.vocabulary`.
        layers: Layers to show.
        pieces: Of the trace.
    """
    data = vocabulary.sel(layer=list(layers))
    rows = []
    for layer in layers:
        cells: list[Cell] = []
        for by in _BY:
            at = data.sel(layer=layer, by=by)
            value, low, high = (float(at[name]) for name in ("specialization", "low", "high"))
            mark = "*" if float(at["q_value"]) < SIGNIFICANT else ""
            cells.append(Cell(percent(value), spread(value, low, high), mark))
            cells += [Cell(percent(float(at[name]))) for name in ("null", "held_out")]
        popular = float(data["popularity"].sel(layer=layer, by="input"))
        rows.append(Row(str(layer), (*cells, Cell(percent(popular)))))
    minimum = int(vocabulary.attrs["min_count"])
    sizes = "; ".join(
        f"{words}: {count(int(data['ids'].sel(by=by)))} ids, {count(int(data['id_tokens'].sel(by=by)))} tokens"
        for by, words in _BY.items()
    )
    return Table(
        "vocabulary",
        f"Vocabulary specialization, {_choice(vocabulary)}, %",
        "layer",
        (*("measured", "rotated", "held out") * 2, "popularity"),
        (Section("", tuple(rows)),),
        groups=((_BY["input"], 3), (_BY["next"], 3), ("", 1)),
        notes=(
            f"Share of an id's tokens that chose its most frequent expert, mean over the ids of at least {minimum} "
            f"tokens. {sizes[0].upper()}{sizes[1:]}.",
            "rotated: the choices of each document rotated, so that they do not see the token; held out: the expert "
            "most frequent in other documents; popularity: the most popular expert's share of all tokens.",
            f"± the larger side of a 95 % interval, by document. * the choices see it (false discovery rate "
            f"{percent(SIGNIFICANT, 0)} %).{_sampled(vocabulary)}",
        ),
        frame=vocabulary_frame(data, pieces),
    )


def expert_tokens_table(
    vocabulary: xr.Dataset, layers: Sequence[int], pieces: Vocabulary, by: str = "input", top: int = 5
) -> Table:
    """The tokens of each expert, a section a layer and a row an expert.

    Args:
        vocabulary: Of `moescope.vocabulary`.
        layers: Layers to show.
        pieces: Of the trace.
        by: "input", the token itself; "next", the one after it.
        top: Tokens an expert.
    """
    data = vocabulary.sel(by=by, layer=list(layers))
    top = min(top, data.sizes["place"])
    sections = []
    for layer in layers:
        of_layer = data.sel(layer=layer)
        rows = []
        for expert in range(int(of_layer["num_ids"])):
            at = of_layer.sel(expert=expert)
            value, low, high = (float(at[f"expert_{name}"]) for name in ("specialization", "low", "high"))
            cells = [
                Cell(count(int(at["expert_ids"]))),
                Cell(percent(value), spread(value, low, high)),
                Cell(percent(float(at["expert_null"]))),
            ]
            rows.append(Row(_name(expert, of_layer), (*cells, *(_token_cell(at, p, pieces) for p in range(top)))))
        sections.append(Section(f"layer {layer}", tuple(rows)))
    return Table(
        "expert_tokens",
        f"Tokens of each expert {_BY[by]}, {_choice(vocabulary)}: share of the token that the expert gets, %",
        "expert",
        ("ids", "mean", "rotated", *(_ordinal(at + 1) for at in range(top))),
        tuple(sections),
        notes=(
            "ids: those whose most frequent expert it is; mean: their specialization; rotated: the same of choices "
            "that do not see the token; then the tokens with the largest shares.",
            "* surely above the expert's popularity, all pairs of tokens and experts allowed for.",
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
    """The tokens of a few experts in full: a section a layer and expert, a row a token.

    Args:
        vocabulary: Of `moescope.vocabulary`.
        layers: Layers to show.
        pieces: Of the trace.
        experts: Experts to show; those that a layer lacks are left out.
        by: "input", the token itself; "next", the one after it.
        top: Tokens an expert.
    """
    data = vocabulary.sel(by=by, layer=list(layers))
    sections = []
    for layer in layers:
        of_layer = data.sel(layer=layer)
        for expert in experts:
            if expert >= int(of_layer["num_ids"]):
                continue
            at = of_layer.sel(expert=expert)
            rows = []
            for place in range(min(top, data.sizes["place"])):
                one = at.isel(place=place)
                if int(one["top_token"]) < 0:
                    break
                value, low, high = (float(one[f"top_{name}"]) for name in ("share", "low", "high"))
                mark = "*" if float(one["top_q_value"]) < SIGNIFICANT else ""
                sizes = (Cell(count(int(one[f"top_{name}"]))) for name in ("count", "tokens", "documents"))
                cells = (Cell(percent(value), spread(value, low, high), mark), *sizes)
                rows.append(Row(_quoted(pieces, int(one["top_token"])), cells))
            popular = percent(float(at["expert_popularity"]))
            title = f"layer {layer}, expert {_name(expert, of_layer)}: {count(int(at['expert_ids']))} ids"
            sections.append(Section(f"{title}, {popular} % of all tokens", tuple(rows)))
    return Table(
        "expert_tokens",
        f"Tokens of an expert {_BY[by]}, {_choice(vocabulary)}: share of the token that the expert gets, %",
        "token",
        ("share", "went there", "of tokens", "in documents"),
        tuple(sections),
        notes=(
            "± the larger side of a 95 % interval, by document. * surely above the expert's popularity, all "
            "pairs of tokens and "
            "experts allowed for.",
        ),
        frame=vocabulary_frame(vocabulary.sel(layer=list(layers)), pieces).query("what == 'token of an expert'"),
    )


def token_experts_table(vocabulary: xr.Dataset, layers: Sequence[int], pieces: Vocabulary, by: str = "input") -> Table:
    """The experts of the tokens that were asked for: a section a layer, a row a token.

    Args:
        vocabulary: Of `moescope.vocabulary`, with `tokens`.
        layers: Layers to show.
        pieces: Of the trace.
        by: "input", the token itself; "next", the one after it.
    """
    data = vocabulary.sel(by=by, layer=list(layers))
    listed = min(EXPERTS_LISTED, data.sizes["expert"])
    sections = []
    for layer in layers:
        rows = []
        for token in data["token"].values.tolist():
            at = data.sel(layer=layer, token=token)
            share = at["share"].values
            cells = [Cell(count(int(at["token_tokens"])))]
            for expert in np.argsort(-np.nan_to_num(share, nan=-1.0), kind="stable")[:listed].tolist():
                if isnan(share[expert]) or share[expert] == 0:
                    cells += [Cell(MISSING), Cell(MISSING)]
                    continue
                low, high = (float(at[f"share_{end}"][expert]) for end in ("low", "high"))
                cells += [Cell(str(expert)), Cell(percent(share[expert]), spread(share[expert], low, high))]
            rows.append(Row(_quoted(pieces, token), tuple(cells)))
        sections.append(Section(f"layer {layer}", tuple(rows)))
    return Table(
        "token_experts",
        f"Experts of a token {_BY[by]}, {_choice(vocabulary)}, % of its tokens",
        "token",
        ("tokens", *("expert", "share") * listed),
        tuple(sections),
        groups=(("", 1), *((_ordinal(at + 1), 2) for at in range(listed))),
        notes=(f"± the larger side of a 95 % interval, by document.{_sampled(vocabulary)}",),
        frame=vocabulary_frame(vocabulary.sel(layer=list(layers)), pieces).query("what == 'expert of a token'"),
    )


def vocabulary_frame(vocabulary: xr.Dataset, pieces: Vocabulary) -> pd.DataFrame:
    """A row a (by, layer), then a row an expert, then a row a token listed for it, then a row an expert of a token."""
    plain = vocabulary.drop_vars(["num_experts", "num_ids", "top_k"])
    by_layer = ["specialization", "low", "high", "null", "popularity", "held_out"]
    layers = plain[[*by_layer, "p_value", "q_value"]].to_dataframe(["by", "layer"]).reset_index()
    layers = layers.rename(columns={name: f"{name}_percent" for name in by_layer})
    for name in ("ids", "id_tokens"):
        layers[name] = layers["by"].map(vocabulary[name].to_series())
    names = {f"expert_{name}": f"{name}_percent" for name in ("specialization", "low", "high", "null", "popularity")}
    exists = vocabulary["num_ids"].to_series()
    experts = plain[[*names, "expert_ids"]].to_dataframe(["by", "layer", "expert"]).reset_index()
    experts = experts.rename(columns={**names, "expert_ids": "ids"})
    names = {f"top_{name}": f"{name}_percent" for name in ("share", "low", "high")}
    names |= {"top_token": "token_id", "top_q_value": "q_value", "top_count": "count", "top_tokens": "tokens"}
    names |= {"top_documents": "documents"}
    listed = plain[list(names)].to_dataframe(["by", "layer", "expert", "place"]).reset_index().rename(columns=names)
    listed = listed[listed["token_id"] >= 0].assign(place=listed["place"] + 1)
    parts = {"layer": layers, "expert": experts, "token of an expert": listed}
    if "share" in vocabulary:
        names = {"share": "share_percent", "share_low": "low_percent", "share_high": "high_percent"}
        asked = plain[list(names)].to_dataframe(["by", "layer", "token", "expert"]).reset_index()
        asked = asked.rename(columns={**names, "token": "token_id"})
        keys = pd.MultiIndex.from_frame(asked[["by", "token_id"]])
        asked["tokens"] = vocabulary["token_tokens"].to_series().reindex(keys).values
        parts["expert of a token"] = asked
    for what, part in parts.items():
        part.insert(0, "what", what)
        for name in [name for name in part.columns if str(name).endswith("_percent")]:
            part[name] *= 100
    kept = [part[part["expert"] < part["layer"].map(exists)] if "expert" in part else part for part in parts.values()]
    frame = pd.concat(kept, ignore_index=True)
    for name in ("expert", "place", "token_id", "count", "tokens", "documents", "ids", "id_tokens"):
        frame[name] = frame[name].astype("Int64")
    text = frame["token_id"].map(lambda token: None if pd.isna(token) else visible(_text(pieces, int(token))))
    frame.insert(frame.columns.get_loc("token_id") + 1, "text", text)
    return frame


def syntax_tables(syntax: xr.Dataset, layers: Sequence[int]) -> list[Table]:
    """Divergence of each word class, a row a class and a column a layer; then the expert that stands out.

    Args:
        syntax: Of `moescope.syntax`.
        layers: Layers to show.
    """
    data = syntax.sel(layer=list(layers))
    classes = data["word_class"].values.tolist()

    def rows(name: str) -> tuple[Row, ...]:
        return tuple(
            Row(of, tuple(_class_cell(data.sel(word_class=of, layer=layer), name) for layer in layers))
            for of in classes
        )

    frame = syntax_frame(data)
    tables = [
        Table(
            "word_classes",
            f"Jensen-Shannon divergence of word classes from other tokens of their documents, {_choice(syntax)}, bits",
            "class",
            tuple(f"layer {layer}" for layer in layers),
            (
                Section("measured", rows("jsd")),
                Section("expected from sampling documents alone", rows("jsd_null")),
                Section("95 % interval of the true divergence", rows("interval")),
                Section("against all other tokens, whatever their documents", rows("jsd_all")),
            ),
            notes=(f"* differs (false discovery rate {percent(SIGNIFICANT, 0)} % over classes and layers).",),
            frame=frame,
        )
    ]
    sections = []
    for layer in layers:
        of_layer = []
        for of in classes:
            at = data.sel(word_class=of, layer=layer)
            sizes = [Cell(count(int(at[name]))) for name in ("tokens", "documents")]
            value, low, high = (float(at[f"top_{name}"]) for name in ("share", "low", "high"))
            top = float(at["top_expert"])
            cells = (
                Cell(MISSING if isnan(top) else str(int(top))),
                Cell(percent(value), spread(value, low, high)),
                Cell(percent(float(at["top_share_others"]))),
            )
            of_layer.append(Row(of, (*sizes, *cells)))
        sections.append(Section(f"layer {layer}", tuple(of_layer)))
    tables.append(
        Table(
            "word_class_experts",
            f"The expert that stands out in each word class, {_choice(syntax)}, %",
            "class",
            ("tokens", "documents", "expert", "of the class", "of the others"),
            tuple(sections),
            notes=(
                "The expert whose share of the class exceeds that of the other tokens of the same documents by most. "
                "± the larger side of a 95 % interval, by document.",
            ),
            frame=frame,
        )
    )
    return tables


def syntax_frame(syntax: xr.Dataset) -> pd.DataFrame:
    """A row a (word class, layer)."""
    names = {f"jsd{end}": f"jsd{end}_bits" for end in ("", "_low", "_high", "_null", "_all")}
    shares = {f"top_{name}": f"top_{name}_percent" for name in ("share", "low", "high", "share_others")}
    kept = syntax[["tokens", "documents", *names, "p_value", "q_value", "top_expert", *shares]]
    frame = kept.drop_vars(["num_experts", "num_ids", "top_k"]).to_dataframe(["word_class", "layer"]).reset_index()
    frame = frame.rename(columns={**names, **shares})
    frame["top_expert"] = frame["top_expert"].astype("Int64")
    frame[list(shares.values())] *= 100
    return frame


def _class_cell(at: xr.Dataset, name: str) -> Cell:
    if name == "interval":
        low, high = float(at["jsd_low"]), float(at["jsd_high"])
        return Cell(MISSING if isnan(low) or isnan(high) else f"{bits(low)}–{bits(high)}")
    return Cell(bits(float(at[name])), mark="*" if name == "jsd" and float(at["q_value"]) < SIGNIFICANT else "")


def _token_cell(at: xr.Dataset, place: int, pieces: Vocabulary) -> Cell:
    one = at.isel(place=place)
    if int(one["top_token"]) < 0:
        return Cell("")
    mark = "*" if float(one["top_q_value"]) < SIGNIFICANT else ""
    return Cell(_quoted(pieces, int(one["top_token"])), f" {percent(float(one['top_share']), 0)}", mark)


def _quoted(pieces: Vocabulary, token_id: int) -> str:
    return f"“{shorten(_text(pieces, token_id), LONGEST_TOKEN)}”"


def _text(pieces: Vocabulary, token_id: int) -> str:
    return pieces.piece(token_id).decode(errors="backslashreplace")


def _name(expert: int, of_layer: xr.Dataset) -> str:
    return str(expert) if expert < int(of_layer["num_experts"]) else f"{expert} (null)"


def _choice(data: xr.Dataset) -> str:
    return describe_choice(str(data.attrs["choice"]), int(data["top_k"].values.max()))


def _sampled(vocabulary: xr.Dataset) -> str:
    fraction = float(vocabulary.attrs["sampled_fraction"])
    return "" if fraction >= 1 else f" Of a sample of {percent(fraction)} % of the documents."


def _ordinal(place: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(place, f"{place}th")
