"""The shares again, by choice: Figure 9."""

from __future__ import annotations

from collections.abc import Iterator

import xarray as xr

from moescope.reporting import figures
from moescope.reporting.chapters import TOPICS
from moescope.reporting.frames import tidy
from moescope.reporting.subject import PageFigure, Results, Subject
from moescope.reporting.subjects.shares import DIMS, about_uniform
from moescope.reporting.wording import capital, describe_any
from moescope.tallying import Counted


def measure(counted: Counted, results: Results) -> xr.Dataset | None:
    """The shares, where choices are known apart."""
    result: xr.Dataset = results.found["shares"]
    return result if result.sizes["choice"] > 1 else None


def blocks(result: xr.Dataset, results: Results) -> Iterator[PageFigure]:
    """Figure 9."""
    top_k = int(result["top_k"].max())
    choices = list(dict.fromkeys(["all", "first", result["choice"].values[top_k].item()]))
    yield PageFigure(
        name="choices",
        file="figure9-choices",
        draw=lambda: figures.shares.draw_choices(result, results.layers),
        label="Figure 9",
        title="The same by choice",
        caption=(
            f"{capital(describe_any(top_k))}, and the choices with the largest and the smallest gate weight apart. "
            f"{about_uniform(result)}"
        ),
        how=(
            "If the first choice carries the topic and the last fills up, the first row differs by domain and the "
            "last does not. If all rows look alike, the choices are exchangeable in this respect."
        ),
        cannot="It does not show which choices go together, nor how much weight each has in the output.",
        frame=tidy(result.sel(choice=choices, layer=list(results.layers)), *DIMS),
    )


subject = Subject(measure=measure, blocks=blocks, section=TOPICS)
