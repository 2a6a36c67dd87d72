"""What a caller may ask of an engine: each choice and each default, once. Loads no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WINDOW = 2048
BATCH_TOKENS = 4096
BLOCKS = ("mlp", "attention")
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICE = "auto"
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class EngineOptions:
    """How a model is opened and what is read of it; `moescope.record` says what each means."""

    layers: Sequence[int] | None = None
    block: str = BLOCKS[0]
    weights: bool = False
    lookahead: Sequence[int] = ()
    window: int = WINDOW
    batch_tokens: int = BATCH_TOKENS
    dtype: str = DTYPES[0]
    device: str = DEVICE
    device_map: str | Mapping[str, int | str] | None = None
    offload_folder: Path | None = None
    routers: Sequence[Any] | None = None
    trust_remote_code: bool = False
    stream: bool | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        check_block(self.block)
        if self.window < 1 or self.batch_tokens < 1:
            raise ValueError(f"window {self.window} or batch_tokens {self.batch_tokens} is below 1")
        if self.memory is not None and self.memory < 0:
            raise ValueError(f"memory of {self.memory} bytes is below 0")


def check_block(block: str) -> None:
    """Refuse a kind of block that is none of `BLOCKS`."""
    if block not in BLOCKS:
        raise ValueError(f"block is {' or '.join(map(repr, BLOCKS))}, not {block!r}")
