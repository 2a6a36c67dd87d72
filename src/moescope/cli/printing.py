"""How commands print a table: styled for a terminal, as data for a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from moescope.reporting.tables import Table


def print_table(table: Table, format: str) -> None:
    """Print a table to stdout.

    Args:
        table: The table.
        format: One of ``moescope.reporting.formats.FORMATS``; ``text`` has colours, and fits the width, if stdout is a
            terminal.
    """
    from moescope.reporting.formats import render, styled

    if format != "text":
        click.echo(render(table, format), nl=False)
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(styled(table, console.width if console.is_terminal else None), soft_wrap=True, end="")


@contextmanager
def layer_progress(task: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what to call with the layers done and all; a bar on stderr, nothing without a terminal.

    Args:
        task: What is being done, such as "explaining".
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        number = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(number, completed=done, total=total)
