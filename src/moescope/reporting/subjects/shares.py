"""The share of the assignments that each expert receives, by domain: Figure 7."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import click
import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures.shares import shares
from moescope.reporting import figures
from moescope.reporting.chapters import TOPICS
from moescope.reporting.frames import in_percent, tidy_named, with_sizes
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import percent, spread
from moescope.reporting.options import shown_layers_option, trace_argument
from moescope.reporting.subject import PageFigure, Results, Subject
from moescope.reporting.tables import Cell, Row, Section, Table
from moescope.reporting.visible import visible
from moescope.reporting.wording import capital, describe_any, describe_choice, expert_name
from moescope.tallying import tally
from moescope.trace import Trace


def blocks(found: xr.Dataset, results: Results) -> Iterator[PageFigure | Table]:
    """Figure 7; the table is too long for the page."""
    layers = list(results.layers)
    bars = figures.shares.as_bars(found)
    yield PageFigure(
        name="shares",
        file="figure7-shares",
        draw=lambda: figures.shares.draw_shares(found, results.layers),
        label="Figure 7",
        title="Share of a domain's assignments that each expert receives",
        caption=(
            f"{capital(describe_any(int(found['top_k'].max())))}; the shares of a domain and layer sum to 1. "
            f"{about_uniform(found)} "
            + ("Thin lines: 95 % intervals, clustered by document." if bars else "Intervals are in the CSV.")
        ),
        how=(
            "Compare the domains above one expert. Where experts follow topics, one domain towers over the others, "
            "and where they do not, a group of bars has one height. How far a group is from the uniform line is a "
            "matter of load balance, not of topic."
            if bars
            else "Compare the rows of one panel. Where experts follow topics, a row has dark places of its own; "
            "where they do not, all rows fade alike from left to right. That common slope is a matter of load "
            "balance, not of topic."
        ),
        cannot=(
            "Equal shares do not mean equal tokens: an expert may get the verbs of one domain and the numbers of "
            "another. Experts of different layers have nothing in common but their number."
        ),
        frame=shares_frame(found.sel(choice=["either"], layer=layers)),
    )
    yield shares_table(found, layers)


def about_uniform(found: xr.Dataset) -> str:
    """How the figures of shares mark a uniform one."""
    if figures.shares.as_bars(found):
        return "Dashed: uniform, 1 over the number of experts."
    return (
        "White: uniform, 1 over the number of experts; black: exactly none. Experts in the order of their mean share."
    )


@trace_argument
@shown_layers_option
@click.option(
    "--choice",
    default="either",
    show_default=True,
    metavar="CHOICE",
    help="Which choice: first, second, third, 4th … or either, all of a token's choices together.",
)
@click.option(
    "--of",
    type=click.Choice(["assignments", "tokens"]),
    default="assignments",
    show_default=True,
    help="Of the assignments, as in Figure 7, or of the tokens, as OLMoE's domain specialization.",
)
def command(
    trace: Trace, layers: tuple[int, ...] | None, choice: str, of: Literal["assignments", "tokens"]
) -> Iterator[Table]:
    """Show the share of the assignments each expert receives, by domain.

    Figures 7 and 9 as a table: in per cent, with the larger side of a 95 % interval clustered by document. CSV and JSON
    hold the interval, the uniform share and the share of tokens, too.

    \b
    Example:
      moescope shares pile.moe --layer 15 --choice first --format csv
    """
    shown = shown_layers(trace, layers)
    result = shares(tally(trace, shown))
    known = result["choice"].values.tolist()
    if choice not in known:
        raise click.BadParameter(f"{choice!r} is not one of {', '.join(known)}.", param_hint="'--choice'")
    yield shares_table(result, shown, choice, of)


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
            tokens = at["share_of_tokens"].values
            scale = np.nansum(tokens, axis=0)  # assignments a token: top-k, or 1 for one rank, less what was dropped
            value, low, high = tokens, low * scale, high * scale
            uniform *= int(at["top_k"]) if choice == "either" else 1
        rows = tuple(
            Row(
                expert_name(expert, int(at["num_experts"])),
                tuple(
                    Cell(percent(v), spread(v, a, b))
                    for v, a, b in zip(value[expert], low[expert], high[expert], strict=True)
                ),
            )
            for expert in range(int(at["num_ids"]))
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
        frame=shares_frame(shares.sel(choice=[choice], layer=list(layers))),
    )


def shares_frame(shares: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, layer, choice, expert) that the layer has."""
    names = {"share": "share_percent", "low": "low_percent", "high": "high_percent", "uniform": "uniform_percent"}
    names["share_of_tokens"] = "share_of_tokens_percent"
    frame = in_percent(tidy_named(shares, list(names), ["domain", "layer", "choice", "expert"]), names)
    exists = frame["expert"] < frame["layer"].map(shares["num_ids"].to_series())
    rank = {choice: place for place, choice in enumerate(shares["choice"].values.tolist())}
    exists &= frame["choice"].map(rank) <= frame["layer"].map(shares["top_k"].to_series())
    return with_sizes(frame[exists], shares)


subject = Subject(measure=lambda counted, _: shares(counted), blocks=blocks, section=TOPICS, command=command)
