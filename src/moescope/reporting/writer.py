"""The report as a folder: ``index.html``, ``figures/``, ``tables/`` and ``report.json``: the claims, and what is ours.

Written to a folder beside it and renamed, so that a report is whole or not there. What is not an earlier report, or
holds a file that no report wrote, is kept.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moescope.errors import OutputExists, require

if TYPE_CHECKING:
    import xarray as xr

    from moescope.reporting.page import PageFigure
    from moescope.reporting.results import Results
    from moescope.reporting.tables import Table
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
    from moescope.reporting.results import gather
    from moescope.tallying import WORDS
    from moescope.trace import open_trace

    out = Path(out)
    check_output(out, force=force)
    opened = open_trace(trace) if isinstance(trace, str | Path) else trace
    _keep_apart(opened, out)
    results = gather(opened, layers, WORDS if words is None else words)
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
    from moescope.reporting import frames
    from moescope.reporting.formats import csv, latex
    from moescope.reporting.page import render_page

    for name in ("figures", "tables"):
        (folder / name).mkdir()
    tables = _tables(results)
    figures = _figures(results, folder / "figures")
    csvs = {f"tables/{table.name}": csv(table) for table in tables}
    csvs |= {f"figures/{figure.file}": frames.csv(figure.frame) for figure in figures}
    for path, text in csvs.items():
        _write_text(folder / f"{path}.csv", text)
    for table in tables:
        _write_text(folder / "tables" / f"{table.name}.tex", latex(table))
    _write_text(folder / PAGE, render_page(results, figures, tables, csvs, _sentences(results)))
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    marker = {
        "format": FORMAT,
        "version": 1,
        "trace": results.trace.path.name,
        "claims": [asdict(claim) for claim in results.claims],
        "files": files,
    }
    _write_text(folder / MARKER, json.dumps(marker, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _tables(results: Results) -> list[Table]:
    """Every table that the trace can tell, in the order of the page."""
    from moescope.reporting import tables
    from moescope.reporting.cache_tables import cache_tables
    from moescope.reporting.captions import FEWEST_DOMAINS_IN_PAIRS
    from moescope.reporting.claims_table import claims_table
    from moescope.reporting.comparison_tables import consistency_table
    from moescope.reporting.explain_tables import explain_table
    from moescope.reporting.locality_tables import lags_table, locality_table, runs_table
    from moescope.reporting.parallel_tables import parallel_tables
    from moescope.reporting.prefetch_tables import prefetch_tables
    from moescope.reporting.vocabulary_tables import expert_tokens_table, syntax_tables, vocabulary_table

    layers = results.layers
    found = [claims_table(results.claims), tables.shares_table(results.shares, layers)]
    if results.shares.sizes["domain"] > 1:
        found.append(tables.divergence_table(results.divergence, layers))
    if results.words is not None:
        found.append(tables.words_table(results.words, layers))
    if results.repeats is not None:
        found.append(tables.repeats_table(results.repeats, layers))
    if results.explained is not None:
        found.append(explain_table(results.explained, layers))
    if results.locality is not None:
        found += [locality_table(results.locality, layers), lags_table(results.locality, layers)]
        if results.locality["runs"].notnull().any():
            found.append(runs_table(results.locality, layers))
    if results.consistency is not None:
        found.append(consistency_table(results.consistency, layers))
    if results.vocabulary is not None:
        pieces = results.trace.vocabulary
        found.append(vocabulary_table(results.vocabulary, layers, pieces))
        found.append(expert_tokens_table(results.vocabulary, layers, pieces))
    if results.syntax is not None:
        found += syntax_tables(results.syntax, layers)
    found += tables.balance_tables(results.balance, layers)
    if results.coactivation is not None:
        found.append(tables.coactivation_table(results.coactivation.sel(layer=list(results.paired_layers)), layers))
    if results.transitions is not None:
        found += tables.transitions_tables(results.transitions, results.later_layers)
    if results.shares.sizes["domain"] >= FEWEST_DOMAINS_IN_PAIRS:
        found.append(tables.domain_pairs_table(results.divergence, layers))
    if results.cache is not None:
        found += cache_tables(results.cache)
    if results.prefetch is not None:
        found += prefetch_tables(results.prefetch, layers)
    if results.parallel is not None:
        found += parallel_tables(results.parallel, layers)
    return found


def _sentences(results: Results) -> dict[str, list[str]]:
    """What bits and locality say of a layer, in a sentence each: of all layers if they are few, else of those shown."""
    from moescope.reporting.explain_tables import explain_sentence
    from moescope.reporting.locality_tables import locality_sentence

    recorded = [layer.layer for layer in results.trace.layers]
    layers = recorded if len(recorded) <= MOST_SENTENCES else results.layers
    found = {}
    if results.explained is not None:
        found["bits"] = [explain_sentence(results.explained, layer) for layer in layers]
    if results.locality is not None:
        found["locality"] = [said for layer in layers if (said := locality_sentence(results.locality, layer))]
    return {name: said for name, said in found.items() if said}


MOST_SENTENCES = 12


def _figures(results: Results, folder: Path) -> list[PageFigure]:
    """Draw, save and describe every figure."""
    from moescope.reporting import figures
    from moescope.reporting.captions import page_figures
    from moescope.reporting.documents import example_documents
    from moescope.reporting.inline_svg import inline_svg

    layers = results.layers
    shown = results.trace.select_layers(layers[:3])
    examples = example_documents(results.documents, results.words_asked)

    def known(result: xr.Dataset | None) -> xr.Dataset:
        return cast("xr.Dataset", result)  # a figure is described only if there is something to draw

    drawings = {
        "shares": lambda: figures.draw_shares(results.shares, layers),
        "choices": lambda: figures.draw_choices(results.shares, layers),
        "divergence": lambda: figures.draw_divergence(results.divergence),
        "repeats": lambda: figures.draw_repeats(known(results.repeats)),
        "tokens": lambda: figures.draw_tokens(examples, shown, results.words_asked),
        "explained": lambda: figures.draw_explained(known(results.explained), layers),
        "depth": lambda: figures.draw_explained_by_layer(known(results.explained)),
        "nulls": lambda: figures.draw_excess(known(results.locality)),
        "distance": lambda: figures.draw_lags(known(results.locality), layers),
        "consistency": lambda: figures.draw_consistency(known(results.consistency)),
        "balance": lambda: figures.draw_balance(results.balance),
        "coactivation": lambda: figures.draw_coactivation(known(results.coactivation), results.paired_layers),
        "transitions": lambda: figures.draw_transitions(known(results.transitions), results.later_layers),
        "pairs": lambda: figures.draw_domain_pairs(results.divergence, layers),
        "vocabulary": lambda: figures.draw_vocabulary(known(results.vocabulary)),
        "classes": lambda: figures.draw_word_classes(known(results.syntax)),
        "cache": lambda: figures.draw_cache(known(results.cache)),
        "prefetch": lambda: figures.draw_prefetch(known(results.prefetch)),
        "parallel": lambda: figures.draw_parallel(known(results.parallel)),
    }
    found = []
    for described in page_figures(results, examples):
        figures.save(drawings[described.name](), folder, described.file)
        if described.name != "tokens":  # the page draws that one itself
            svg = (folder / f"{described.file}.svg").read_text("utf-8")
            described = replace(described, svg=inline_svg(svg, described.name, f"{described.label}: {described.title}"))
        found.append(described)
    return found
