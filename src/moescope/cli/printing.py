"""How commands print a table: styled for a terminal, as data for a pipe."""

from __future__ import annotations

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
