"""``moescope demo``: the embedded model on the embedded corpus, from the first token to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moescope.cli.options import force_option, output_option

if TYPE_CHECKING:
    from moescope.trace import Trace

TRACE = "sample.moe"
REPORT = "report"


@click.command()
@output_option("moescope-demo", "Folder for the trace and the report.")
@force_option
def command(output: Path, force: bool) -> None:
    """Record the embedded model on the embedded corpus and write its report.

    Takes a few minutes; stopped and started again it goes on where it was, and a finished trace is used as it is.

    \b
    Example:
      moescope demo -o moescope-demo
    """
    from moescope.report.writer import check_output, report

    check_output(output / REPORT, force=force)
    trace = _recorded(output / TRACE)
    click.echo("writing the report …", err=True)
    page = report(trace, output / REPORT, force=force)
    click.echo(_summary(page))


def _recorded(path: Path) -> Trace:
    """The finished trace at the path, recorded first if need be."""
    from moescope import mini
    from moescope.errors import TraceNotFound
    from moescope.trace import open_trace

    try:
        trace = open_trace(path)
        if trace.complete:
            click.echo(f"{path} is there and is used", err=True)
            return trace
    except TraceNotFound:
        path.parent.mkdir(parents=True, exist_ok=True)
    from moescope.cli.progress import progress_bar
    from moescope.errors import require

    require("torch", extra="record")
    from moescope.record import record

    with progress_bar() as progress:
        return record(mini.model_path(), mini.corpus_path(), path, weights=True, progress=progress)


def _summary(page: Path) -> str:
    """The claims of section 5 with their answers, and where the evidence is."""
    from moescope.report.writer import MARKER

    claims = json.loads((page.parent / MARKER).read_bytes())["claims"]
    lines = [f"{claim['answer']:<16}  {claim['name']}" for claim in claims]
    return "\n".join(["Section 5 of Mixtral of Experts, claim by claim:", *lines, "", f"report: {page}"])
