"""A folder locked by the process that writes into it; the lock is gone with the process, however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moescope.errors import TraceBusy

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no advisory locks; two writers are not told apart there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a folder for the block.

    Raises:
        TraceBusy: Another process has it.
    """
    if fcntl is None:  # pragma: no cover
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise TraceBusy(path, "another process is recording into this trace") from None
    try:
        yield
    finally:
        os.close(descriptor)
