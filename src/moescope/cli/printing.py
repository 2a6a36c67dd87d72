"""How commands print a table: styled for a terminal, as data for a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moescope.reporting.numbers import count
from moescope.reporting.tables import Table

if TYPE_CHECKING:
    import xarray as xr


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


def warn_of_few_permutations(permutations: int) -> None:
    """Say on stderr if so few permutations cannot tell anything from chance."""
    from moescope.reporting.tables import SIGNIFICANT

    smallest = 1 / (permutations + 1)
    if smallest >= SIGNIFICANT:
        click.echo(
            f"warning: with {count(permutations, 'permutation')} no p-value is below {smallest:.2g}, so nothing is "
            f"told from chance; use --permutations {round(1 / SIGNIFICANT)} or more.",
            err=True,
        )


def save_figure(name: str, result: xr.Dataset, folder: Path, layers: Sequence[int] | None = None) -> None:
    """Draw a result as PNG, SVG and PDF; the folder is made.

    Args:
        name: ``NAME`` of ``draw_NAME`` in ``moescope.reporting.figures``, and of the files.
        result: What it draws.
        folder: Where.
        layers: Layers to show, for figures of some layers.
    Raises:
        MissingExtra: The extra `report` is not installed.
    """
    from moescope.errors import require

    require("matplotlib", extra="report")
    from moescope.reporting import figures

    folder.mkdir(parents=True, exist_ok=True)
    draw = getattr(figures, f"draw_{name}")
    figures.save(draw(result) if layers is None else draw(result, layers), folder, name)


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
