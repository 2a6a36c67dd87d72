"""Output that is complete or absent: written beside its place and renamed; what was there before is kept."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moescope.errors import OutputExists
from moescope.trace.checksums import no_room

MARKER = "layout.json"
"""The file that identifies a folder as an export of moescope."""


@contextmanager
def new_output(out: Path, *, apart_from: Path, force: bool) -> Iterator[Path]:
    """Put in place what the block writes, if it succeeds.

    Args:
        out: File or folder to create.
        apart_from: Folder of a trace, which no output may touch.
        force: Replace a file, or a folder that is an earlier export.
    Yields:
        A path beside `out` at which nothing exists yet, for a file or a folder.
    Raises:
        OutputExists: `out` exists and is kept.
        DiskFull: There is no space left; nothing is left behind.
    """
    _check(out, apart_from, force=force)
    with no_room(out, "no space left on the disk; nothing was exported", None):
        out.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            yield holder / "new"
            _check(out, apart_from, force=force)  # again: writing took a while
            if out.is_dir() and not out.is_symlink():  # a folder cannot be replaced in one step
                out.rename(holder / "old")
            (holder / "new").replace(out)
        finally:
            shutil.rmtree(holder, ignore_errors=True)


def _check(out: Path, apart_from: Path, *, force: bool) -> None:
    ours, theirs = out.resolve(), apart_from.resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise OutputExists(out, f"is in the trace {apart_from} or contains it", "choose an output beside the trace")
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise OutputExists(out, "exists and is kept", "choose another output, or --force to replace it")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise OutputExists(out, "is a folder that is not an export, so not even --force replaces it", "choose another")
