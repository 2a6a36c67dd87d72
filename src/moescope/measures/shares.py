"""Shares (Figures 7 and 9): which part of a domain's assignments each expert receives.

The unit is the assignment, a (token, choice) pair; the shares of a choice sum to 1 over the experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xarray as xr

from moescope.measures import statistics
from moescope.measures.schema import FRACTION, described, estimate, layer_coordinates
from moescope.tallying import Source
from moescope.tallying.counted import counted
from moescope.tallying.tally import TallyCounter

PAPER = "Mixtral of Experts (arXiv 2401.04088)"


def shares(trace: Source, layers: Iterable[int] | None = None, *, threads: int | None = None) -> xr.Dataset:
    """Share of the assignments that go to each expert, by domain, layer and choice.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`, `moescope.tally`).
        layers: Layers of the trace to measure, or None for all; counts have theirs.
        threads: Parts counted at a time; None for the number of processors.
    Returns:
        Variables with dims (domain, layer, choice, expert):

        * `share`: load of the expert over the assignments made by the choice; "all" counts all ranks together;
          `share_error`, `share_low`, `share_high`: clustered by document, 95 %;
        * `share_of_tokens`: the same load over tokens, as OLMoE's domain specialization; sums to `top_k` for "all";

        and `share_null` (layer), 1/E. NaN for experts and choices that a layer lacks, and where nothing was assigned.
        Where a layer has null experts (choices that run nothing), their ids follow the routed ones.
    Source:
        Mixtral of Experts, section 5, Figures 7 and 9; the intervals are ours.
    """
    tally = counted(trace, TallyCounter, layers=layers, threads=threads)[TallyCounter]
    data = tally.data
    exists = _exists(data)
    share = statistics.proportion(
        data["loads"].values,
        data["made"].values[..., None],
        data["loads_squared"].values,
        data["loads_by_made"].values,
        data["made_squared"].values[..., None],
        data["documents"].values[:, None, None, None],
        exists=exists,
    )
    of_tokens = statistics.ratio(data["loads"].values, data["tokens"].values[:, None, None, None])
    dims = ("domain", "layer", "choice", "expert")
    return xr.Dataset(
        estimate("share", dims, "share of assignments", FRACTION, f"{PAPER}, Figures 7 and 9", **share)
        | {
            "share_null": described(
                1 / data["num_experts"].values, ("layer",), "share if all experts were equal", FRACTION
            ),
            "share_of_tokens": described(
                np.where(exists, of_tokens, np.nan),
                dims,
                "load over tokens",
                FRACTION,
                "OLMoE (arXiv 2409.02060), domain specialization",
            ),
        },
        {name: data[name] for name in ("domain", "choice", "expert", "documents", "tokens")}
        | layer_coordinates(tally.header.layers),
    )


def _exists(data: xr.Dataset) -> np.ndarray:
    """Whether a layer has the choice and the expert, shape (layer, choice, expert)."""
    choice = np.arange(data.sizes["choice"])[None, :, None]
    expert = np.arange(data.sizes["expert"])[None, None, :]
    top_k, num_ids = (data[name].values[:, None, None] for name in ("top_k", "num_ids"))
    return (choice <= top_k) & (expert < num_ids)
