"""The share of the assignments that each expert receives, by domain: Figure 7."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import click
import xarray as xr

from moescope.measures.shares import shares
from moescope.reporting import figures
from moescope.reporting.cells import CLUSTERED, by_layer, grid_of
from moescope.reporting.chapters import TOPICS
from moescope.reporting.frames import tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import percent
from moescope.reporting.options import one_of, shown_layers_option, trace_argument
from moescope.reporting.subject import PageFigure, Results, Subject
from moescope.reporting.tables import Row, Table
from moescope.reporting.visible import visible
from moescope.reporting.wording import capital, describe_any, describe_choice, expert_name
from moescope.tallying import tally
from moescope.trace import Trace

DIMS = ("domain", "layer", "choice", "expert")
"""A row of the frame."""


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | Table]:
    """Figure 7; the table is too long for the page."""
    layers = list(results.layers)
    bars = figures.shares.as_bars(result)
    yield PageFigure(
        name="shares",
        file="figure7-shares",
        draw=lambda: figures.shares.draw_shares(result, results.layers),
        label="Figure 7",
        title="Share of a domain's assignments that each expert receives",
        caption=(
            f"{capital(describe_any(int(result['top_k'].max())))}; the shares of a domain and layer sum to 1. "
            f"{about_uniform(result)} "
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
        frame=tidy(result.sel(choice=["all"], layer=layers), *DIMS),
    )
    yield shares_table(result, layers)


def about_uniform(result: xr.Dataset) -> str:
    """How the figures of shares mark a uniform one."""
    if figures.shares.as_bars(result):
        return "Dashed: uniform, 1 over the number of experts."
    return (
        "White: uniform, 1 over the number of experts; black: exactly none. Experts in the order of their mean share."
    )


@trace_argument
@shown_layers_option
@click.option(
    "--choice",
    default="all",
    show_default=True,
    metavar="CHOICE",
    help="Which choice: first, second, third, 4th … or all of a token's choices together.",
)
@one_of(
    "--of",
    ["assignments", "tokens"],
    "Of the assignments, as in Figure 7, or of the tokens, as OLMoE's domain specialization.",
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
    shares: xr.Dataset, layers: Sequence[int], choice: str = "all", of: Literal["assignments", "tokens"] = "assignments"
) -> Table:
    """Share of the assignments that each expert receives: a section a layer, a row an expert, a column a domain.

    Of "tokens" it is OLMoE's domain specialization (its equation 7): the part of the tokens that have the expert among
    their choices.
    """
    data = shares.sel(choice=choice, layer=list(layers))
    if of == "tokens":
        tokens = data["share_of_tokens"]
        choices = tokens.sum("expert")  # of a token: top-k, or 1 for one rank, less what was dropped
        low, high = (data[name] * choices for name in ("share_low", "share_high"))
        null = data["share_null"] * (data["top_k"] if choice == "all" else 1)
        data = data.assign(share=tokens, share_low=low, share_high=high, share_null=null)

    def rows(of_layer: xr.Dataset) -> tuple[Row, ...]:
        names = [expert_name(expert, int(of_layer["num_experts"])) for expert in range(int(of_layer["num_ids"]))]
        return grid_of(of_layer.isel(expert=slice(len(names))).assign_coords(expert=names), "expert", "domain", "share")

    title = (
        "Share of the assignments that each expert receives" if of == "assignments" else "Tokens that have the expert"
    )
    total = "The shares of a domain and layer sum to 100 %"
    total += " times the choices of a token." if of == "tokens" and choice == "all" else "."
    return Table(
        "shares",
        f"{title}, {describe_choice(choice, int(data['top_k'].values.max()))}, %",
        "expert",
        tuple(map(visible, data["domain"].values.tolist())),
        by_layer(data, rows, lambda of_layer: f": uniform {percent(float(of_layer['share_null']))}"),
        notes=(f"{CLUSTERED} {total}",),
        frame=tidy(shares.sel(choice=[choice], layer=list(layers)), *DIMS),
    )


subject = Subject(measure=lambda counted, _: shares(counted), blocks=blocks, section=TOPICS, command=command)
