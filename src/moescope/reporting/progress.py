"""A bar on stderr for what takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def layer_progress(task: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what to call with the layers done and all; nothing is drawn without a terminal.

    Args:
        task: What is being done, such as "explaining".
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        number = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(number, completed=done, total=total)
