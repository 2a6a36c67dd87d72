"""The work that an engine keeps beside an unfinished trace, in a folder of its own, until the trace is complete.

Its plan says for which recording it is. A file counts once it is in the folder's ``SHA256SUMS``, as in a trace. What
else is in it is the engine's; `docs/how-to/larger-than-memory.md` says what the user sees of it.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from moescope.errors import TraceBusy, TraceDamaged
from moescope.trace import Header, checksums
from moescope.trace.locks import locked

PLAN = "plan.json"
SUFFIX = ".stream"
_FILE = re.compile(r"(choices|weights)-\d{6,}\.npy|states-\d{6,}")


def work_folder(out: Path) -> Path:
    """Where a streamed recording of a trace keeps its work, beside the trace."""
    return out.with_name(out.name + SUFFIX)


def has_work(out: Path) -> bool:
    """Whether a streamed recording of this trace was begun and not finished."""
    return (work_folder(out) / PLAN).is_file()


def remove_work(out: Path, finished: Header | None = None) -> None:
    """Remove what a streamed recording left, unless another process is at it.

    With the header of what is recorded there, the work of any other recording is kept.
    """
    path = work_folder(out)
    if not (path.is_dir() and is_work(path)):
        return
    with suppress(TraceBusy, TraceDamaged), locked(path):
        if finished is not None and (path / PLAN).exists():
            plan = Header.from_json(json.dumps(read_plan(path)["header"]), path)
            if without_top_k(plan).differences(without_top_k(finished)):
                return
        clear(path)


def is_work(path: Path) -> bool:
    """Whether a folder holds nothing but such work."""
    if path.is_symlink():
        return False
    names = [child.name.removesuffix(checksums.TEMPORARY) for child in path.iterdir()]
    return all(name in (PLAN, checksums.FILE_NAME) or _FILE.fullmatch(name) for name in names)


def clear(path: Path, *, keep: bool = False) -> None:
    """Remove what is in a work folder, and the folder unless it is to be kept."""
    (path / PLAN).unlink(missing_ok=True)  # first: without it nothing counts as work
    if not keep:
        shutil.rmtree(path)
        return
    for child in path.iterdir():
        child.unlink()


def damaged(path: Path, problem: str) -> TraceDamaged:
    """The error of work that cannot be continued."""
    return TraceDamaged(path, problem, "--force streams anew from the first layer")


def read_plan(path: Path) -> dict[str, Any]:
    """For which recording the work in a folder is.

    Raises:
        TraceDamaged: The plan cannot be read.
    """
    try:
        plan = json.loads((path / PLAN).read_bytes())
    except (OSError, ValueError) as error:
        raise damaged(path, f"{PLAN} cannot be read: {error}") from None
    if not isinstance(plan, dict) or not isinstance(plan.get("header"), dict):
        raise damaged(path, f"{PLAN} is not the plan of a streamed recording")
    return plan


def without_top_k(header: Header) -> Header:
    """A header that says nothing of how many choices a layer makes, for comparing with one that does not know."""
    return replace(header, layers=tuple(replace(layer, top_k=1) for layer in header.layers))
