"""What explains the choice, as a table, as a data frame, and in a sentence a layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

import pandas as pd
import xarray as xr

from moescope.reporting.numbers import MISSING, bits, percent
from moescope.reporting.tables import SIGNIFICANT, Cell, Row, Section, Table, describe_choice

TELLING = 0.05
"""Share of the entropy from which a source is named in the sentence of a layer."""

DIGITS = 3

_NAMES = {
    "domain": "the domain",
    "token": "the token",
    "previous token": "the token before",
    "previous expert": "the expert of the token before",
    "position": "the place in the sequence",
    "previous layer": "the token's expert in the layer before",
}


def explain_table(explained: xr.Dataset, layers: Sequence[int]) -> Table:
    """Bits by source: a section a layer, a row a source, and below a sentence a layer.

    Args:
        explained: Of `moescope.explain`.
        layers: Layers to show.
    """
    data = explained.sel(layer=list(layers))
    sections = []
    for layer in layers:
        at = data.sel(layer=layer)
        rows = [
            _row(at.sel(source=source), str(source))
            for source in at["source"].values
            if not isnan(at["bits"].sel(source=source))
        ]
        sections.append(Section(f"layer {layer}: {_bits(float(at['entropy']))} bits in all", tuple(rows)))
    top_k = int(data["top_k"].values.max())
    choice = describe_choice(str(explained.attrs["choice"]), top_k)
    return Table(
        "explain",
        f"Bits of the choice that each source explains, {choice}",
        "source",
        ("explained", "of all, %", "held out", "plug-in", "permuted", "p"),
        tuple(sections),
        groups=(("", 2), ("bounds", 2), ("null", 2)),
        notes=(
            f"± the larger side of a 95 % interval, by document. * more than by chance (false discovery rate "
            f"{percent(SIGNIFICANT, 0)} %). Sources overlap: their bits do not add up.",
            *(explain_sentence(explained, layer) for layer in layers),
        ),
        frame=explain_frame(data),
    )


def explain_frame(explained: xr.Dataset) -> pd.DataFrame:
    """A row a (layer, source) that the trace has."""
    names = {
        "bits": "bits",
        "low": "low_bits",
        "high": "high_bits",
        "share": "share_percent",
        "held_out": "held_out_bits",
        "plug_in": "plug_in_bits",
        "miller_madow": "miller_madow_bits",
        "null": "permuted_bits",
        "p_value": "p_value",
        "q_value": "q_value",
    }
    frame = explained[list(names)].transpose("layer", "source").to_dataframe(["layer", "source"]).reset_index()
    frame = frame[["layer", "source", *names]].rename(columns=names)
    frame["share_percent"] *= 100
    for name in ("entropy", "entropy_low", "entropy_high"):
        by_layer = dict(zip(explained["layer"].values.tolist(), explained[name].values.tolist(), strict=True))
        frame[f"{name}_bits"] = frame["layer"].map(by_layer)
    return frame[frame["bits"].notna()].reset_index(drop=True)


def explain_sentence(explained: xr.Dataset, layer: int) -> str:
    """One layer in plain words: what tells most, what tells something, what is not told from chance.

    Of what tells little, the upper end of the interval is said where that is not little.
    """
    at = explained.sel(layer=layer)
    entropy = float(at["entropy"])
    if isnan(entropy):
        return f"Layer {layer}: nothing was chosen."
    if entropy == 0:
        return f"Layer {layer}: every token makes the same choice; there is nothing to explain."
    known = [str(source) for source in at["source"].values if not isnan(at["bits"].sel(source=source))]
    by_share = sorted(known, key=lambda source: -float(at["share"].sel(source=source)))
    real = {source for source in known if float(at["q_value"].sel(source=source)) < SIGNIFICANT}

    def told(source: str) -> str:
        one = at.sel(source=source)
        return f"{_NAMES[source]} {_bits(float(one['bits']))} ({percent(float(one['share']), 0)} %)"

    def hinted(source: str) -> str:
        most = float(at["high"].sel(source=source)) / entropy
        return _NAMES[source] + (f" (up to {percent(most, 0)} %)" if most >= TELLING else "")

    strong = [source for source in by_share if source in real and float(at["share"].sel(source=source)) >= TELLING]
    weak = [source for source in by_share if source in real and source not in strong]
    none = [source for source in by_share if source not in real]
    if not known:
        return f"Layer {layer}: nothing is known of what explains the choice; that takes two documents."
    choice = "choice" if explained.attrs["choice"] == "either" else "first choice"
    sentence = f"Layer {layer}: the {choice} holds {_bits(entropy)} bits; "
    if strong:
        sentence += f"each by itself tells: {_listed([told(source) for source in strong])}."
    else:
        sentence += "no source tells much."
    if weak:
        sentence += f" A little (under {percent(TELLING, 0)} %): {_listed([hinted(source) for source in weak])}."
    if none:
        sentence += f" Not told from chance: {_listed([hinted(source) for source in none])}."
    return sentence


def _row(one: xr.Dataset, source: str) -> Row:
    value, low, high = (float(one[name]) for name in ("bits", "low", "high"))
    half = max(value - low, high - value)
    marked = float(one["q_value"]) < SIGNIFICANT
    return Row(
        source,
        (
            Cell(_bits(value), "" if isnan(half) else f"±{bits(half, DIGITS)}", "*" if marked else ""),
            Cell(percent(float(one["share"]))),
            Cell(_bits(float(one["held_out"]))),
            Cell(_bits(float(one["plug_in"]))),
            Cell(_bits(float(one["null"]))),
            Cell(_p(float(one["p_value"]))),
        ),
    )


def _bits(value: float) -> str:
    return MISSING if isnan(value) else bits(max(value, 0.0), DIGITS)


def _p(value: float) -> str:
    return MISSING if isnan(value) else f"{value:.3f}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
