"""What several commands share: arguments and options, so that each is named, typed and explained once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from moescope.reporting.options import Command
from moescope.reporting.options import layers_option as layers_option
from moescope.reporting.options import layers_option_for as layers_option_for
from moescope.reporting.options import parse_integers as parse_integers
from moescope.reporting.options import shown_layers_option as shown_layers_option
from moescope.reporting.options import trace_argument as trace_argument
from moescope.reporting.options import word_option as word_option

format_option = click.option(
    "--format",
    "format",
    type=click.Choice(["text", "csv", "json", "latex"]),
    default="text",
    show_default=True,
    help="How the result is written to stdout.",
)
"""``--format text|csv|json|latex`` -> ``format``."""

force_option = click.option("--force", is_flag=True, help="Replace the output if it exists.")
"""``--force`` -> ``force``."""


def output_option(default: str | None, help: str) -> Callable[[Command], Command]:
    """``-o PATH``/``--output PATH`` -> ``output``; required if there is no default."""
    given: dict[str, Any] = {} if default is None else {"default": default}  # None itself would count as a default
    return click.option(
        "-o",
        "--output",
        "output",
        type=click.Path(path_type=Path),
        required=default is None,
        show_default=True,
        metavar="PATH",
        help=help,
        **given,
    )
