"""``moescope demo``: the embedded model on the embedded corpus, from the first token to the report."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moescope.reporting.options import force_option, output_option
from moescope.reporting.printing import say

TRACE = "sample.moe"
REPORT = "report"


@click.command()
@output_option("moescope-demo", "Folder for the trace and the report.")
@force_option
@click.pass_context
def command(ctx: click.Context, output: Path, force: bool) -> None:
    """Record the embedded model on the embedded corpus and write its report.

    Takes a few minutes; stopped and started again it goes on where it was, and a finished trace is used as it is.

    \b
    Example:
      moescope demo -o moescope-demo
    """
    from moescope.errors import require
    from moescope.reporting.writer import check_output, report

    for module in ("matplotlib", "jinja2"):  # better now than after the recording
        require(module, extra="report")
    check_output(output / REPORT, force=force)
    if _finished(output / TRACE):
        say(f"{output / TRACE} is there and is used", err=True)
    else:
        _record(ctx, output / TRACE)
    say("writing the report …", err=True)
    say(_summary(report(output / TRACE, output / REPORT, force=force)))


def _finished(path: Path) -> bool:
    from moescope.errors import TraceNotFound
    from moescope.trace import open_trace

    try:
        return open_trace(path).complete
    except TraceNotFound:
        return False


def _record(ctx: click.Context, path: Path) -> None:
    """Run ``moescope record`` on what is embedded."""
    from moescope import mini
    from moescope.cli.record import command as record

    path.parent.mkdir(parents=True, exist_ok=True)
    ctx.invoke(
        record,
        model=str(mini.model_path()),
        corpus=mini.corpus_path(),
        output=path,
        weights=True,
        lookahead=(1, 2),
        dtype="float32",
    )


def _summary(page: Path) -> str:
    """The claims of section 5 with their answers, and where the evidence is."""
    from moescope.reporting.writer import MARKER

    claims = json.loads((page.parent / MARKER).read_bytes())["claims"]
    lines = [f"{claim['answer']:<16}  {claim['name']}" for claim in claims]
    return "\n".join(["Section 5 of Mixtral of Experts, claim by claim:", *lines, "", f"report: {page}"])
