"""``moescope report``: everything of a trace as one page."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.reporting.options import (
    exclude_option,
    force_option,
    output_option,
    shown_layers_option,
    trace_argument,
    word_option,
)
from moescope.reporting.printing import say


@click.command()
@trace_argument
@output_option("report", "Folder to write; an earlier report there is replaced.")
@shown_layers_option
@word_option("Word to look for instead of the paper's; repeatable.")
@exclude_option
@force_option
def command(
    trace: Path,
    output: Path,
    layers: tuple[int, ...] | None,
    words: tuple[str, ...],
    exclude: tuple[str, ...],
    force: bool,
) -> None:
    """Write everything as one offline HTML page, with figures and tables.

    Figures are beside it as PNG, SVG and PDF, tables as CSV and LaTeX. Prints the path of the page.

    \b
    Example:
      moescope report pile.moe -o report/
    """
    from moescope.reporting import report
    from moescope.trace import open_trace

    say(report(open_trace(trace, exclude=exclude), output, layers=layers, words=words or None, force=force))
