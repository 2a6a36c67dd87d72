"""``moescope verify``: every byte of a trace checked."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.reporting.numbers import count
from moescope.reporting.options import trace_argument
from moescope.reporting.printing import say


@click.command()
@trace_argument
@click.option(
    "--drop-damaged",
    is_flag=True,
    help="Take damaged parts out of a complete trace; they are kept beside it, and it says what is lost.",
)
@click.pass_context
def command(ctx: click.Context, trace: Path, drop_damaged: bool) -> None:
    """Check every byte of a trace.

    Compares each file with its checksum and each row with the format, and names everything that is wrong. Exit code 1
    if anything is.
    """
    from moescope.trace import open_trace, verifying

    if drop_damaged:
        for part in verifying.drop_damaged(trace):
            say(f"{part.name}: {part.problem}; {part.documents} lost", err=True)
    problems = verifying.verify(trace)
    for problem in problems:
        say(problem.render(), err=True)
    if problems:
        if all(problem.subject.endswith(".parquet") or "parts/" in problem.problem for problem in problems):
            say(f"hint: `moescope verify --drop-damaged {trace}` keeps the other parts", err=True)
        ctx.exit(1)
    opened = open_trace(trace)
    state = "complete" if opened.complete else "unfinished, to be resumed with the command that began it"
    say(f"{trace}: sound, {state}; {count(opened.num_tokens, 'token')} in {count(len(opened.parts), 'part')}")
