"""The progress bar of a recording: on stderr, with tokens, tokens/s and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from moescope.record.recorder import Progress


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Yields the callback that ``moescope.record`` calls; without a terminal nothing is drawn."""
    console = Console(stderr=True)
    columns = (TextColumn("recording"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[numbers]}"))
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, numbers="")

        def update(progress: Progress) -> None:
            numbers = f"{progress.tokens:,} tokens, {progress.tokens_per_second:,.0f}/s"
            if progress.seconds_left is not None:
                minutes, seconds = divmod(round(progress.seconds_left), 60)
                numbers += f", {minutes}:{seconds:02d} left"
            total = None if progress.fraction is None else 1.0
            bar.update(task, total=total, completed=progress.fraction or 0.0, numbers=numbers)

        yield update
