"""Shares (Figures 7 and 9): which part of a domain's assignments each expert receives.

The unit is the assignment, a (token, choice) pair; the shares of a choice sum to 1 over the experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xarray as xr

from moescope.measures import statistics
from moescope.measures.schema import described
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

        * `share`: load of the expert over the assignments made by the choice; "either" counts all ranks together;
        * `standard_error`, `low`, `high`: clustered by document, 95 %;
        * `share_of_tokens`: the same load over tokens, as OLMoE's domain specialization; sums to `top_k` for "either";

        and `uniform` (layer), 1/E. NaN for experts and choices that a layer lacks, and where nothing was assigned.
        Where a layer has null experts (choices that run nothing), their ids follow the routed ones.
    Source:
        Mixtral of Experts, section 5, Figures 7 and 9; the intervals are ours.
    """
    data = counted(trace, TallyCounter, layers=layers, threads=threads)[TallyCounter].data
    made = data["made"]
    documents = data["documents"].values[:, None, None, None]
    y, n = data["loads"].values, made.values[..., None]
    p = statistics.ratio(y, n)
    error = statistics.ratio_standard_error(
        y,
        n,
        data["loads_squared"].values,
        data["loads_by_made"].values,
        data["made_squared"].values[..., None],
        documents,
    )
    low, high = statistics.proportion_interval(p, error, documents)
    of_tokens = statistics.ratio(y, data["tokens"].values[:, None, None, None])
    exists = _exists(data)
    dims = ("domain", "layer", "choice", "expert")
    return xr.Dataset(
        {
            "share": described(
                np.where(exists, p, np.nan), dims, "share of assignments", "1", f"{PAPER}, Figures 7 and 9"
            ),
            "standard_error": described(np.where(exists, error, np.nan), dims, "standard error of the share", "1"),
            "low": described(np.where(exists, low, np.nan), dims, "95 % interval, low end", "1"),
            "high": described(np.where(exists, high, np.nan), dims, "95 % interval, high end", "1"),
            "share_of_tokens": described(
                np.where(exists, of_tokens, np.nan),
                dims,
                "load over tokens",
                "1",
                "OLMoE (arXiv 2409.02060), domain specialization",
            ),
            "uniform": described(1 / data["num_experts"].values, ("layer",), "share if all experts were equal", "1"),
        },
        data.drop_vars([name for name in data.coords if name in ("kind", "second_expert")]).coords,
    ).assign_coords(documents=data["documents"], tokens=data["tokens"])


def _exists(data: xr.Dataset) -> np.ndarray:
    """Whether a layer has the choice and the expert, shape (layer, choice, expert)."""
    choice = np.arange(data.sizes["choice"])[None, :, None]
    expert = np.arange(data.sizes["expert"])[None, None, :]
    top_k, num_ids = (data[name].values[:, None, None] for name in ("top_k", "num_ids"))
    return (choice <= top_k) & (expert < num_ids)
