"""What streaming will take, and whether it is needed: bytes of memory and of disk, and time, before it starts."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import closing
from pathlib import Path

import torch

from moescope.engines.protocol import Estimate
from moescope.engines.streamed.layerwise import Layerwise
from moescope.engines.streamed.shards import Shards
from moescope.errors import DiskFull, ModelNotStreamable

BASE_BYTES = 10**9
"""What the interpreter, torch and the activations of a batch are allowed beside a layer and the spool."""

LAYER_FACTOR = 1.5  # a layer, and what its conversion needs for a moment
_WHOLE_FACTOR = 1.2  # a whole model in memory, and what loading it needs

OVERHEAD = 1.25
"""Time of a layer over that of its matrix products: attention, norms, routing (docs/decisions/log.md)."""

_MEASURE_SECONDS = 0.1  # enough for the best of several products, and nobody notices


def fits(folder: Path, dtype: str, available: int) -> bool:
    """Whether a checkpoint can be loaded whole, in a dtype, if recording may take so many bytes of memory."""
    return _WHOLE_FACTOR * model_bytes(folder, dtype) + BASE_BYTES <= available


def spool_bytes(layerwise: Layerwise, num_layers: int, memory: int) -> int:
    """Bytes of memory that are left, beside a layer, for what a layer gives to the next."""
    layer_bytes = max(map(layerwise.memory_bytes, range(num_layers)))
    return max(0, int(memory - BASE_BYTES - LAYER_FACTOR * layer_bytes))


def model_bytes(folder: Path, dtype: str) -> int:
    """Bytes that the weights of a checkpoint take in memory."""
    files = [file for pattern in ("*.safetensors", "*.bin") for file in sorted(folder.glob(pattern))]
    if not any(file.suffix == ".safetensors" for file in files):
        return sum(file.stat().st_size for file in files)
    try:
        with closing(Shards(folder)) as shards:
            wanted = None if dtype == "auto" else getattr(torch, dtype).itemsize
            return sum(
                tensor.nbytes // tensor.dtype.itemsize * wanted
                if wanted is not None and tensor.dtype.is_floating_point
                else tensor.nbytes
                for tensor in shards.tensors.values()
            )
    except ModelNotStreamable:  # dtypes that cannot be streamed, but perhaps loaded
        return sum(file.stat().st_size for file in files if file.suffix == ".safetensors")


def available_memory(device: torch.device) -> int:
    """Bytes of memory that are free for a new process: of a GPU, of the control group, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - _group_use(group))
    except (OSError, ValueError):  # another system, or no limit
        pass
    return min(limits, default=2**63)


def _group_use(group: Path) -> int:
    """Bytes of a control group that cannot be reclaimed: its use without the page cache."""
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int((group / "memory.current").read_text()) - int(statistics.get("file", 0))


def operations_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Speed of a matrix product of the size of an expert's, the best of what fits a moment."""
    left, right = (torch.randn(shape).to(device, dtype) for shape in ((256, 1024), (1024, 2048)))
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < _MEASURE_SECONDS:
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * 256 * 1024 * 2048 / best


def refuse_small_disk(work: Path, estimate: Estimate) -> None:
    """Refuse a disk too small for what a layer gives to the next.

    Raises:
        DiskFull: It has less free than will be written.
    """
    written = sum(file.stat().st_size for file in work.iterdir())
    free = shutil.disk_usage(work).free
    if free < estimate.disk_bytes - written:
        raise DiskFull(
            work,
            f"needs some {estimate.disk_bytes / 1e9:,.1f} GB for what a layer gives to the next, and {free / 1e9:,.1f} "
            "GB are free",
            "put the output on a larger disk, or record fewer tokens",
        )
