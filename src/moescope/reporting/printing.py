"""The one way out to a terminal: what commands say, and the data they print.

Names, paths and texts come from models, corpora and other programs, so whatever would drive a terminal is shown as a
symbol. Data keeps its exact characters for a file or a pipe, which no terminal reads. Nothing else in moescope prints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from moescope.reporting.visible import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from moescope.reporting.tables import Table


def say(message: object, *, err: bool = False) -> None:
    """Print a message of one or more lines."""
    click.echo(_visible_lines(str(message)), err=err)


def write(data: str) -> None:
    """Print data to stdout as it is; to a terminal, harmless."""
    sys.stdout.write(_visible_lines(data) if sys.stdout.isatty() else data)


def print_table(table: Table, format: str) -> None:
    """Print a table to stdout in one of ``FORMATS``; ``text`` has the colours, and fits the width, of a terminal."""
    from rich.console import Console

    from moescope.reporting.formats import render, styled

    if format != "text":
        write(render(table, format))
        return
    console = Console(highlight=False)
    print_styled(console, styled(table, console.width if console.is_terminal else None), end="")


def print_styled(console: Console, text: Text, *, end: str = "\n") -> None:
    """Print a styled text; its colours are the console's, its characters harmless."""
    plain = _visible_lines(text.plain)
    if len(plain) == len(text.plain):
        text.plain = plain  # which keeps the styles
    else:
        text = type(text)(plain)
    console.print(text, soft_wrap=True, highlight=False, end=end)


@contextmanager
def layer_progress(task: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for a task such as "explaining": yields what to call with the layers done and all.

    Nothing is drawn without a terminal.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        number = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(number, completed=done, total=total)


def _visible_lines(text: str) -> str:
    return "\n".join(map(visible, text.split("\n")))
