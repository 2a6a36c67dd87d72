"""The live tally: assignments counted on the device of the model while it runs, and the figures of load balance.

Unit: the assignment, a (token, choice) pair. Counting never waits for the device and its memory does not grow: one row
of numbers a layer (and a step of the window, if only the last steps count). Only reading brings numbers to the host.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, distributed

from moescope.engines.transformers.routers import Experts
from moescope.errors import ModelUnsupported, RouterSilent


@dataclass(frozen=True)
class Loads:
    """How many assignments each expert received, and how even that is.

    Attributes:
        load: Assignments by expert, dims (layer, expert). Ids from `num_experts` on are null experts (choices that run
            nothing); where a layer has fewer ids than another, the rest is 0.
        dropped: Assignments that capacity dropped, dims (layer,); they are in no expert's load.
        not_finite: Tokens of whose gate weights one is NaN or infinite, dims (layer,): what a router chose for them
            means nothing. They are in the loads all the same.
        tokens: Tokens counted, padding excluded.
        forwards: Forward passes counted.
    """

    load: xr.DataArray
    dropped: xr.DataArray
    not_finite: xr.DataArray
    tokens: int
    forwards: int

    @property
    def share(self) -> xr.DataArray:
        """Load over the layer's assignments, dims (layer, expert); NaN where there are none."""
        return _over(self.load, self.load.sum("expert"))

    @property
    def imbalance(self) -> xr.DataArray:
        """Largest load over mean load of the routed experts, from 1 (even), dims (layer,)."""
        return _over(self._routed.max("expert"), self._routed.mean("expert"))

    @property
    def max_violation(self) -> xr.DataArray:
        """MaxVio of arXiv 2408.15664: imbalance minus 1, so that 0 is even, dims (layer,)."""
        return self.imbalance - 1

    @property
    def variation(self) -> xr.DataArray:
        """Load CV: standard deviation of the load over its mean, over the routed experts, dims (layer,)."""
        return _over(self._routed.std("expert"), self._routed.mean("expert"))

    @property
    def entropy(self) -> xr.DataArray:
        """Entropy of the routed experts' shares over log(num_experts): 1 is even, 0 one expert; dims (layer,)."""
        share = _over(self._routed, self._routed.sum("expert"))
        nats = -(share * np.log(share.where(share > 0, 1))).sum("expert")
        most = self.load["num_experts"].copy(data=np.log(self.load["num_experts"].values))
        return _over(nats.where(share.notnull().any("expert")), most)

    @property
    def idle(self) -> xr.DataArray:
        """Routed experts without an assignment, dims (layer,)."""
        return (self._routed == 0).sum("expert")

    @property
    def _routed(self) -> xr.DataArray:
        """Load of the routed experts, NaN elsewhere."""
        return self.load.where(self.load["expert"] < self.load["num_experts"])


class LiveTally:
    """Sums on the devices of the layers; what a forward pass adds is added whole or not at all.

    Args:
        experts: The layers.
        window: Forward passes that count, the last ones; None for all.
        stacks: For each layer which stack it is in; an encoder and a decoder read different tokens. None: all in one.
    """

    def __init__(
        self, experts: Sequence[Experts], window: int | None = None, stacks: Sequence[int] | None = None
    ) -> None:
        self._experts = tuple(experts)
        self._stacks = np.zeros(len(self._experts), np.int64) if stacks is None else np.asarray(stacks)
        self._window = window
        # Columns: dropped, the ids, impossible ids, tokens whose weights are not finite.
        self._width = 3 + max(_num_ids(block) for block in experts)
        self._lock = threading.Lock()  # DataParallel runs its replicas in threads
        self._told_of: set[int] = set()
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self._totals: dict[torch.device, Tensor] = {}
        self._top_k = np.zeros(len(self._experts), np.int64)
        self.forwards = 0

    def count(
        self, counts: dict[torch.device, Tensor], place: int, ids: Tensor, weights: Tensor, counted: Tensor | None
    ) -> None:
        """Count what one layer chose, into the sums of a forward pass.

        Args:
            counts: The sums of the pass, one tensor (layer, id) a device.
            place: Place of the layer among `experts`.
            ids: Chosen experts, shape (token, choice); -1 = dropped.
            weights: Their gate weights, shape (token, choice).
            counted: Which tokens count, shape (token,); None for all.
        """
        self._top_k[place] = ids.shape[1]
        with torch.inference_mode(False), torch.no_grad():
            if ids.device not in counts:
                shape = len(self._experts), self._width
                counts[ids.device] = torch.zeros(shape, dtype=torch.int64, device=ids.device)
            bins = ids.to(torch.int64).clamp(-1, _num_ids(self._experts[place])).add(1)
            ones = bins.new_ones(len(bins)) if counted is None else counted.to(ids.device, torch.int64)
            row = counts[ids.device][place]
            row.scatter_add_(0, bins.reshape(-1), ones.unsqueeze(1).expand_as(bins).reshape(-1))
            not_finite = ~weights.isfinite().reshape(len(ids), -1).all(1)
            row[-1] += (ones * not_finite).sum()

    def commit(self, counts: Mapping[torch.device, Tensor]) -> None:
        """Add the sums of a whole forward pass."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            slot = 0 if self._window is None else self.forwards % self._window
            for device, fresh in counts.items():
                if device not in self._totals:
                    shape = self._window or 1, *fresh.shape
                    self._totals[device] = torch.zeros(shape, dtype=torch.int64, device=device)
            for device, total in self._totals.items():
                if self._window is not None:
                    total[slot].zero_()
                if device in counts:
                    total[slot].add_(counts[device])
            self.forwards += 1

    def read(self, group: Any = None, *, reduce: bool = False) -> Loads:
        """Bring the sums to the host.

        Args:
            group: Process group to sum over; None for all processes.
            reduce: Sum over the processes of `group`; every one of them must call.
        Raises:
            RouterSilent: The layers did not count the same tokens.
            ModelUnsupported: An expert id is not one of its layer's.
        Warns:
            UserWarning: A layer's router gave gate weights that are not finite; once a layer.
        """
        with torch.inference_mode(False), torch.no_grad(), self._lock:
            host = torch.zeros(len(self._experts), self._width, dtype=torch.int64)
            for total in self._totals.values():
                host += total.sum(0).cpu()
            forwards = self.forwards if self._window is None else min(self.forwards, self._window)
            top_k = self._top_k.copy()
        if reduce:
            host, forwards, top_k = _all_reduce(host, forwards, top_k, group)
        counts, not_finite = host.numpy()[:, :-1], host.numpy()[:, -1]
        self._check(counts, top_k)
        tokens = counts.sum(1) // np.maximum(top_k, 1)
        self._warn(not_finite, tokens)
        return self._labelled(counts, not_finite, int(tokens.max(initial=0)), forwards)

    def _warn(self, not_finite: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """Say once of a layer that its router is broken."""
        for block, broken, counted in zip(self._experts, not_finite.tolist(), tokens.tolist(), strict=True):
            if broken and block.layer not in self._told_of:
                self._told_of.add(block.layer)
                warnings.warn(
                    f"layer {block.layer}: the router is not finite: of {broken:,} of {counted:,} tokens a gate weight "
                    f"is NaN or infinite, and what it chose for them means nothing ({block.name})",
                    stacklevel=4,
                )

    def _check(self, counts: NDArray[np.int64], top_k: NDArray[np.int64]) -> None:
        for block, row in zip(self._experts, counts, strict=True):
            if row[_num_ids(block) + 1 :].any():
                raise ModelUnsupported(
                    block.name, f"layer {block.layer} chose an expert id outside 0..{_num_ids(block) - 1}"
                )
        tokens = counts.sum(1) / np.maximum(top_k, 1)
        for stack in np.unique(self._stacks):
            if len(np.unique(counted := tokens[self._stacks == stack])) > 1:
                raise RouterSilent(
                    "the live tally",
                    f"layers counted {counted.min()} to {counted.max()} tokens, expected the same in each",
                )

    def _labelled(self, counts: NDArray[np.int64], not_finite: NDArray[np.int64], tokens: int, forwards: int) -> Loads:
        layers = [block.layer for block in self._experts]
        coordinates = {
            "layer": layers,
            "expert": np.arange(counts.shape[1] - 2),
            "num_experts": ("layer", [block.num_experts for block in self._experts]),
        }
        load = xr.DataArray(
            counts[:, 1:-1], coordinates, ("layer", "expert"), "load", {"units": "assignments", "long_name": "load"}
        )
        dropped = xr.DataArray(counts[:, 0], {"layer": layers}, ("layer",), "dropped", {"units": "assignments"})
        broken = xr.DataArray(not_finite, {"layer": layers}, ("layer",), "not_finite", {"units": "tokens"})
        return Loads(load, dropped, broken, tokens, forwards)


def _num_ids(experts: Experts) -> int:
    return experts.num_experts + experts.num_null_experts


def _over(numerator: xr.DataArray, denominator: xr.DataArray) -> xr.DataArray:
    """Division in which nothing over nothing is NaN."""
    return numerator / denominator.where(denominator > 0)


def is_distributed() -> bool:
    """Whether this is one of several processes that torch has joined."""
    return distributed.is_available() and distributed.is_initialized()


def _all_reduce(
    counts: Tensor, forwards: int, top_k: NDArray[np.int64], group: Any
) -> tuple[Tensor, int, NDArray[np.int64]]:
    """Sums over processes; a process that has seen no pass yet knows no top-k, so that is the largest."""
    if not is_distributed():
        return counts, forwards, top_k
    device = "cuda" if distributed.get_backend(group) == "nccl" else "cpu"
    sums = torch.cat([counts.flatten(), torch.tensor([forwards])]).to(device)
    largest = torch.from_numpy(top_k).to(device)
    distributed.all_reduce(sums, group=group)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=group)
    sums = sums.cpu()
    return sums[:-1].view_as(counts), int(sums[-1]), largest.cpu().numpy()
