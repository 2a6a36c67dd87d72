"""The words around each figure: what is drawn, how to read it, what it cannot tell; and the values behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import xarray as xr

from moescope.reporting import frames
from moescope.reporting.documents import RoutedDocument
from moescope.reporting.figures import as_bars
from moescope.reporting.page import PageFigure
from moescope.reporting.results import Results
from moescope.reporting.tables import describe_any


def page_figures(results: Results, examples: Sequence[RoutedDocument]) -> Iterator[PageFigure]:
    """The figures of the page, not drawn yet, in its order: those that the trace can tell.

    Args:
        results: What the report is of.
        examples: The documents of Figure 8.
    """
    top_k = max(layer.top_k for layer in results.trace.layers)
    either = describe_any(top_k)
    bars = as_bars(results.shares)
    uniform = (
        "Dashed: uniform, 1 over the number of experts."
        if bars
        else "White: uniform, 1 over the number of experts; black: exactly none. Experts in the order of their mean "
        "share."
    )
    layers = list(results.layers)
    shown = results.shares.sel(layer=layers)
    known = shown["choice"].values.tolist()
    yield PageFigure(
        name="shares",
        file="figure7-shares",
        label="Figure 7",
        title="Share of a domain's assignments that each expert receives",
        caption=(
            f"{_capital(either)}; the shares of a domain and layer sum to 1. {uniform} "
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
        frame=frames.shares_frame(shown.sel(choice=["either"])),
    )
    if results.shares.sizes["domain"] > 1:
        yield PageFigure(
            name="divergence",
            file="divergence",
            label="Divergence",
            title="How far each domain is from the others, layer by layer",
            caption=(
                "Jensen-Shannon divergence, bits, between a domain's shares and the mean of the other domains'. Not in "
                "the paper, which judged by eye."
            ),
            how=(
                "A dark row is a domain with experts of its own; dark columns at both ends are what the paper says of "
                "the first and the last layer. A dot marks what sampling documents alone does not explain (false "
                "discovery rate 5 %)."
            ),
            cannot=(
                "With many documents even a trifle gets its dot: read the dot for whether, the bits for how much. Nor "
                "does it say which experts make the difference, or whether topic, style or script is behind it."
            ),
            frame=frames.divergence_frame(results.divergence),
        )
    if len(known) > 1:
        choices = list(dict.fromkeys(["either", "first", known[top_k]]))
        yield PageFigure(
            name="choices",
            file="figure9-choices",
            label="Figure 9",
            title="The same by choice",
            caption=(
                f"{_capital(either)}, and the choices with the largest and the smallest gate weight apart. {uniform}"
            ),
            how=(
                "If the first choice carries the topic and the last fills up, the first row differs by domain and the "
                "last does not. If all rows look alike, the choices are exchangeable in this respect."
            ),
            cannot="It does not show which choices go together, nor how much weight each has in the output.",
            frame=frames.shares_frame(shown.sel(choice=choices)),
        )
    if results.words is not None:
        yield PageFigure(
            name="tokens",
            file="figure8-tokens",
            label="Figure 8",
            title="Text on the colours of its experts",
            caption="First choice, a column a layer.",
            how="",
            cannot="",
            frame=frames.tokens_frame(examples, layers[:3]),
        )
    if results.repeats is not None:
        yield PageFigure(
            name="repeats",
            file="figure10-repeats",
            label="Figure 10",
            title="Repeated consecutive assignments by layer",
            caption=(
                f"Per cent of consecutive tokens {_repeated(results.repeats, either)}. Dashed: uniform routing. Grey: "
                "what the popularity of the experts alone predicts, from the lowest to the highest domain. Intervals "
                "95 %, clustered by document."
            ),
            how=(
                "A line above the grey band is order: a token is likelier to go where the token before it went. Within "
                "the band, compare a domain with its own null, in Table 5 and the CSV. What lies between the dashed "
                "line and the band is only unequal load, which the paper's baseline leaves out."
            ),
            cannot=(
                "It does not tell why: neighbouring tokens are alike, and like tokens go to like experts. Nor what a "
                "cache gains, for that depends on longer memory than one token."
            ),
            frame=frames.repeats_frame(results.repeats),
        )


def _repeated(repeats: xr.Dataset, either: str) -> str:
    """What the panels of Figure 10 count."""
    shared = f"with an expert in common among {either}"
    if "first" not in repeats["kind"].values:
        return f"{shared}; which of the choices is the first, the trace does not say"
    first = "with the same first choice"
    return first if int(repeats["top_k"].max()) == 1 else f"{first} (left) or {shared} (right)"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
