"""The report as a folder: ``index.html``, ``figures/``, ``tables/`` and ``report.json``: the claims, and what is ours.

Written to a folder beside it and renamed, so that a report is whole or not there. What is not an earlier report, or
holds a file that no report wrote, is kept.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moescope.errors import OutputExists, require

if TYPE_CHECKING:
    from moescope.reporting.subject import Results
    from moescope.trace import Trace

PAGE = "index.html"
MARKER = "report.json"
FORMAT = "moescope-report"


def report(
    trace: Trace | str | Path,
    out: str | Path,
    *,
    layers: Iterable[int] | None = None,
    words: Sequence[str] | None = None,
    force: bool = False,
) -> Path:
    """Write everything that section 5 of the paper asks, answered for a trace, as one page with figures and tables.

    Args:
        trace: The trace, or its folder; complete or not.
        out: Folder to write. An earlier report there is replaced.
        layers: Layers of tables and of figures with a panel a layer; None for the first, the middle and the last.
        words: Words whose experts are asked for; None for those of the paper. Indentation is always asked for.
        force: Replace the folder, whatever it holds.
    Returns:
        Path of the page, ``out/index.html``.
    Raises:
        OutputExists: `out` is no report of ours, or holds other files, too.
        MissingExtra: The extra `report` is not installed.
        TraceError: The trace is not there or damaged, or a layer was not recorded.
    """
    require("matplotlib", extra="report")
    require("jinja2", extra="report")
    from moescope.reporting.results import gathering
    from moescope.tallying import WORDS
    from moescope.trace import open_trace

    out = Path(out)
    check_output(out, force=force)
    opened = open_trace(trace) if isinstance(trace, str | Path) else trace
    _keep_apart(opened, out)
    with gathering(opened, layers, WORDS if words is None else words) as results:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            _write(results, beside)
            _replace(beside, out, force=force)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return out / PAGE


def check_output(out: Path, *, force: bool = False) -> None:
    """Refuse a folder that must be kept.

    Raises:
        OutputExists: There is something at `out`, and it is not replaced.
    """
    if not out.exists() and not out.is_symlink():
        return
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise OutputExists(out, "is the current folder or holds it", "choose a folder of its own")
    if force:
        return
    hint = "choose another output, or --force to replace it"
    if out.is_symlink() or not out.is_dir():
        raise OutputExists(out, "exists and is not a folder", hint)
    present = {str(file.relative_to(out)) for file in out.rglob("*") if not file.is_dir() or file.is_symlink()}
    if not present:
        return
    ours = _listed(out)
    if ours is None:
        raise OutputExists(out, "exists and is not a report", hint)
    if strange := sorted(present - ours):
        raise OutputExists(out, f"is a report, but {strange[0]} in it is not of it", hint)


def _keep_apart(trace: Trace, out: Path) -> None:
    """Refuse to write into the trace, or to replace a folder that holds it."""
    ours, theirs = out.resolve(), trace.path.resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise OutputExists(out, f"is in the trace {trace.path} or holds it", "choose a folder beside the trace")


def _listed(out: Path) -> set[str] | None:
    """The files of the report at `out`; None if it is none."""
    try:
        marker = json.loads((out / MARKER).read_bytes())
        if marker["format"] != FORMAT:
            return None
        return {MARKER, *map(str, marker["files"])}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _replace(beside: Path, out: Path, *, force: bool) -> None:
    """Put the finished folder in its place; an earlier one is set aside first, and restored if that fails."""
    check_output(out, force=force)  # again: writing took a while
    beside.chmod(0o755)
    if not (out.exists() or out.is_symlink()):
        beside.rename(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    out.rename(aside / out.name)
    try:
        beside.rename(out)
    except OSError:
        (aside / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(results: Results, folder: Path) -> None:
    from moescope.reporting import figures, frames
    from moescope.reporting.formats import latex
    from moescope.reporting.inline_svg import inline_svg
    from moescope.reporting.page import DRAWN_BY_PAGE, render_page
    from moescope.reporting.page.contents import contents

    for name in ("figures", "tables"):
        (folder / name).mkdir()
    shown = contents(results, lambda figure: figures.style.save(figure.draw(), folder / "figures", figure.file))
    csvs, svgs = {}, {}
    for table in shown.tables.values():
        csvs[f"tables/{table.name}"] = frames.csv(table.frame)
        _write_text(folder / "tables" / f"{table.name}.tex", latex(table))
    for figure in shown.figures:
        csvs[f"figures/{figure.file}"] = frames.csv(figure.frame)
        if figure.name != DRAWN_BY_PAGE:
            svg = (folder / "figures" / f"{figure.file}.svg").read_text("utf-8")
            svgs[figure.name] = inline_svg(svg, figure.name, f"{figure.label}: {figure.title}")
    for path, text in csvs.items():
        _write_text(folder / f"{path}.csv", text)
    _write_text(folder / PAGE, render_page(results, shown, csvs, svgs))
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    marker = {
        "format": FORMAT,
        "version": 1,
        "trace": results.trace.path.name,
        "claims": [asdict(claim) for claim in results.found["claims"]],
        "files": files,
    }
    _write_text(folder / MARKER, json.dumps(marker, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
