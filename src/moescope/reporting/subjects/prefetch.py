"""Which experts could be loaded before a token needs them, by predictor; and whether to do so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan
from pathlib import Path
from typing import Literal

import click
import numpy as np
import pandas as pd
import xarray as xr

from moescope.reporting import figures as drawn
from moescope.reporting.cells import cell, grid_of, values, with_interval
from moescope.reporting.chapters import WORTH
from moescope.reporting.frames import kinds, tidy
from moescope.reporting.layers import shown_layers
from moescope.reporting.numbers import count, percent, spread
from moescope.reporting.options import figures_option, parse_integers, shown_layers_option, trace_argument
from moescope.reporting.subject import Drawing, PageFigure, PageSection, PageTable, Recommendation, Results, Subject
from moescope.reporting.tables import Section, Table, grid
from moescope.simulation.prefetch import prefetch
from moescope.simulation.together import Job
from moescope.trace import Trace

SECTION = PageSection(
    WORTH,
    "prefetch",
    "Prefetch or not?",
    "Prefetching",
    "What is known before a layer is reached can start a load early: the routers of later layers asked "
    "ahead, the layers before, the token before. A list of popular experts needs none of this.",
)

_FOLDED = {"prefetch": "The same as a table", "prefetch_by_layer": "By layer, with the gain over popularity"}

NAMES = {
    "lookahead": "router, {} ahead",
    "transitions": "transitions, {} ahead",
    "previous": "previous token",
    "domain": "popularity in the domain",
    "popularity": "popularity",
}
"""What the kinds of predictors are called, with the number of layers ahead."""

RECORD_AGAIN = (
    "No lookahead was recorded: `moescope record … --lookahead 1,2,10` adds what the routers of later layers say."
)


_ADVISED = {
    "lookahead": "asking the router {} ahead",
    "transitions": "tables of transitions from {} before",
    "previous": "the experts of the token before, then the popular ones",
}


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure | PageTable]:
    """Recall by experts loaded and by layer, and the tables."""
    ahead = "lookahead" in result["kind"].values
    yield PageFigure(
        name="prefetch",
        file="prefetch",
        draw=lambda: drawn.prefetch.draw_prefetch(result),
        label="Prefetch",
        title="What could be loaded ahead",
        caption=(
            "Per cent of the needed experts that are among the first n that a predictor names: left by n, over the "
            "layers that all predictors reach; right by layer, n as many as a token chooses. What a predictor learns, "
            "it learns on other documents. Bands: 95 % over documents."
        ),
        how=(
            "At as many as a token chooses, nothing is loaded in vain that a perfect predictor would not load. The "
            "distance to the black line is what a predictor adds to a fixed list of popular experts."
        ),
        cannot="Whether a load finishes in time, nor what a cache already holds."
        + ("" if ahead else " The routers of later layers were not asked: “moescope record --lookahead 1,2” does."),
        frame=prefetch_frame(result),
    )
    yield from PageTable.each(prefetch_tables(result, results.layers), _FOLDED)


@trace_argument
@shown_layers_option
@click.option(
    "--predictor",
    "predictors",
    type=click.Choice(list(NAMES)),
    multiple=True,
    help="Only this predictor, beside popularity; may be given several times.  [default: all that the trace allows]",
)
@click.option(
    "--distances",
    callback=parse_integers,
    metavar="LIST",
    help="How many layers ahead, such as 1,2,10.  [default: those recorded by --lookahead, else 1,2,4]",
)
@click.option(
    "--loaded", callback=parse_integers, metavar="LIST", help="Experts loaded, such as 2,4,8.  [default: k, 2k, 4k … E]"
)
@click.option(
    "--phase", type=click.Choice(["prefill", "decode"]), help="Only tokens of a prompt, or only generated ones."
)
@figures_option
def command(
    trace: Trace,
    layers: tuple[int, ...] | None,
    predictors: tuple[str, ...],
    distances: tuple[int, ...] | None,
    loaded: tuple[int, ...] | None,
    phase: Literal["prefill", "decode"] | None,
    figures: Path | None,
) -> Iterator[Table | Drawing]:
    """Show which experts could be loaded before a token needs them.

    The part of the needed experts that are among the first 1, 2 … E that a predictor names: the router of the layer
    asked some layers ahead (recorded by `moescope record --lookahead`), transitions from layer to layer, the previous
    token's experts, popularity in the domain. Beside them popularity alone and chance. What a predictor learns, it
    learns on other documents. CSV and JSON hold all of it in one table.

    \b
    Example:
      moescope prefetch pile.moe --loaded 2,4 --figures figures/
    """
    if distances is not None and 0 in distances:
        raise click.BadParameter("the next layer is 1 layer ahead: expected numbers from 1.", param_hint="--distances")
    trace.need_tokens()
    shown = shown_layers(trace, layers)
    most = max(layer.num_experts for layer in trace.layers)
    if loaded is not None and (not loaded[0] or loaded[-1] > most):
        raise click.BadParameter(
            f"a layer has {most} experts: expected numbers from 1 to {most}, found {loaded[-1] if loaded[0] else 0}.",
            param_hint="--loaded",
        )
    result = prefetch(trace, distances=distances, predictors=predictors or None, phase=phase)
    yield from prefetch_tables(result, shown, loaded)
    yield Drawing(file="prefetch", draw=lambda: drawn.prefetch.draw_prefetch(result))


def predictor_names(prefetch: xr.Dataset) -> list[str]:
    """What the predictors of a result are called."""
    pairs = zip(prefetch["kind"].values.tolist(), prefetch["distance"].values.tolist(), strict=True)
    return [NAMES[kind].format(count(distance, "layer")) for kind, distance in pairs]


def default_loaded(prefetch: xr.Dataset) -> tuple[int, ...]:
    """Numbers of experts to show: k, 2k, 4k … and all."""
    most, top_k = int(prefetch["loaded"].max()), int(prefetch["top_k"].max())
    return tuple(sorted({min(top_k * 2**power, most) for power in range(4)} | {most}))


def prefetch_tables(
    prefetch: xr.Dataset, layers: Sequence[int], loaded: Sequence[int] | None = None
) -> Iterator[Table]:
    """Recall over the layers together by experts loaded; then recall and gain at as many as a token needs, by layer.

    With None for the numbers of experts loaded these are k, 2k, 4k … and all.
    """
    yield _by_loaded(prefetch, default_loaded(prefetch) if loaded is None else loaded)
    yield _by_layer(prefetch, layers)


def _by_loaded(prefetch: xr.Dataset, loaded: Sequence[int]) -> Table:
    data = prefetch.sel(loaded=list(loaded)).assign_coords(predictor=predictor_names(prefetch))
    rows = grid_of(data, "predictor", "loaded", "model_recall")
    random = grid(["at random"], loaded, lambda _, number: cell(data.sel(loaded=number), "model_recall_uniform"))
    pooled = prefetch.attrs["pooled_layers"]
    notes = [
        f"The layers that every predictor reaches, together: {_listed(pooled)}. {_intervals(prefetch)}",
        f"popularity, transitions: learnt on other {_plural(prefetch)} than they predict.",
    ]
    if prefetch.attrs["lookahead_recorded"]:
        longest = prefetch["model_recall"].where(prefetch["kind"] == "lookahead").max("predictor").notnull().sum()
        if 0 < int(longest) < int(prefetch["loaded"].max()):
            notes.append(f"router: the recorded lists end after {int(longest)} experts.")
    else:
        notes.append(RECORD_AGAIN)
    return Table(
        "prefetch",
        "Needed experts that are loaded, %, by number of experts loaded",
        "predictor",
        tuple(map(str, loaded)),
        (Section("", (*rows, *random)),),
        groups=(("experts loaded", len(loaded)),),
        notes=tuple(notes),
        frame=prefetch_frame(prefetch),
    )


def _by_layer(prefetch: xr.Dataset, layers: Sequence[int]) -> Table:
    data = as_many_as_chosen(prefetch.sel(layer=list(layers))).assign_coords(predictor=predictor_names(prefetch))
    rows = grid_of(data, "predictor", "layer", "recall")
    random = grid(["at random"], layers, lambda _, layer: cell(data.sel(layer=layer), "recall_uniform"))
    sections = [Section("", (*rows, *random))]
    others = data.isel(predictor=np.flatnonzero(data["kind"] != "popularity"))
    if others.sizes["predictor"]:
        sections.append(Section("points above popularity", grid_of(others, "predictor", "layer", "gain")))
    return Table(
        "prefetch_by_layer",
        "Needed experts that are loaded, %, if as many are loaded as a token chooses",
        "predictor",
        tuple(f"layer {layer}" for layer in layers),
        tuple(sections),
        notes=(_intervals(prefetch),),
        frame=prefetch_frame(prefetch),
    )


def prefetch_frame(prefetch: xr.Dataset) -> pd.DataFrame:
    """A row a (predictor, experts loaded) of the layers together, then a row a (predictor, layer, experts loaded)."""
    by_layer = prefetch.drop_vars([name for name in prefetch.data_vars if str(name).startswith("model_")])
    return kinds(
        {
            "layers together": tidy(prefetch, "predictor", "loaded"),
            "a layer": tidy(by_layer, "predictor", "layer", "loaded"),
        }
    )


def as_many_as_chosen(prefetch: xr.Dataset) -> xr.Dataset:
    """What loading as many experts as a token chooses gives in each layer."""
    return prefetch.sel(loaded=np.minimum(prefetch["top_k"], prefetch["num_experts"]))


def _intervals(prefetch: xr.Dataset) -> str:
    return f"± the larger side of a 95 % interval, over {_plural(prefetch)}."


def _plural(prefetch: xr.Dataset) -> str:
    return "documents" if prefetch.attrs["unit"] == "document" else "stretches of the only document"


def _listed(layers: Sequence[int]) -> str:
    if not layers:
        return "there is none"
    contiguous = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if contiguous and len(layers) > 2 else ", ".join(map(str, layers))


def advise(prefetch: xr.Dataset) -> Recommendation:
    """Yes if the predictor with the largest gain over popularity has a gain whose interval lies above 0.

    With as many experts loaded as a token chooses. It is the best of several, so a gain near 0 is to be doubted.
    """
    loaded = default_loaded(prefetch)
    as_needed = prefetch.sel(loaded=loaded[0])
    gain_P = as_needed["model_gain"].where(prefetch["kind"] != "popularity").values
    if np.isnan(gain_P).all():
        return Recommendation(
            "Nothing to advise.", "No predictor beside popularity reaches the layers, or no expert was needed."
        )
    p = int(np.nanargmax(gain_P))
    best = as_needed.isel(predictor=p)
    gain, low, high = values(best, "model_gain", "model_gain_low", "model_gain_high")
    popularity = as_needed["model_recall"].isel(predictor=prefetch["kind"].values.tolist().index("popularity")).item()
    sign = "−" if gain < 0 else ""
    number_of = np.count_nonzero(~np.isnan(gain_P))
    evidence = [
        f"With {loaded[0]} experts loaded, as many as a token needs, {with_interval(best, 'model_recall')} % of the "
        f"needed ones are there; by popularity alone {percent(popularity)} %. The difference is {sign}"
        f"{percent(abs(gain))}{spread(gain, low, high)} points"
        + (f", the largest of {number_of} predictors." if number_of > 1 else ".")
    ]
    wider = [float(prefetch["model_recall"].isel(predictor=p).sel(loaded=n)) for n in loaded[1:2]]
    if wider and not isnan(wider[0]) and loaded[1] < int(prefetch["num_experts"].max()):
        evidence.append(f"With {loaded[1]} loaded: {percent(wider[0])} %.")
    if prefetch.attrs["unit"] != "document":
        evidence.append("One document, in stretches: nothing is said of others.")
    if low > 0:
        by = _ADVISED.get(str(best["kind"].item()), predictor_names(prefetch)[p])
        advice = f"Yes, by {by.format(count(int(best['distance']), 'layer'))}."
    elif isnan(low):
        advice = "Not known: there are too few documents for an interval."
    else:
        advice = (
            "No: nothing is shown to predict better than a fixed list of the most popular experts, which can be kept."
        )
    if not prefetch.attrs["lookahead_recorded"]:
        evidence.append("What the routers of later layers would have said was not recorded (`--lookahead`).")
    evidence.append("Whether a load ends in time is a matter of the link.")
    return Recommendation(advice, " ".join(evidence))


subject = Subject(
    play=lambda results: None if results.trace.header.counts_only else Job(prefetch),
    blocks=blocks,
    section=SECTION,
    advise=advise,
    command=command,
)
