"""``moescope verify``: the door to ``moescope.trace.reader.verify``."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.cli.options import trace_argument
from moescope.errors import TraceDamaged
from moescope.reporting.numbers import count


@click.command()
@trace_argument
@click.pass_context
def command(ctx: click.Context, trace: Path) -> None:
    """Check every byte of a trace.

    Compares each file with its checksum and each row with the format, and names everything that is wrong. Exit code 1
    if anything is.
    """
    from moescope.trace.reader import open_trace, verify

    try:
        opened = open_trace(trace)
        problems = opened.verify()
    except TraceDamaged as error:
        problems = verify(trace) or [error]
    for problem in problems:
        click.echo(problem.render(), err=True)
    if problems:
        ctx.exit(1)
    state = "complete" if opened.complete else "unfinished, to be resumed with the command that began it"
    click.echo(f"{trace}: sound, {state}; {count(opened.num_tokens, 'token')} in {count(len(opened.parts), 'part')}")
