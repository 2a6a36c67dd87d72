"""What several commands share: arguments and options, so that each is named, typed and explained once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., object])


def parse_integers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Read ``0,15,31``: whole numbers from 0, sorted, each once; None stays None. For ``callback=`` of an option."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise click.BadParameter(f"expected numbers with commas between them, such as 0,15,31; found {value!r}.")
    return tuple(sorted({int(part) for part in parts}))


trace_argument = click.argument("trace", type=click.Path(path_type=Path))
"""``TRACE``: the folder ``moescope record`` wrote. Whether it is one is for ``open_trace`` to say."""

layers_option = click.option(
    "--layers",
    "--layer",
    "layers",
    callback=parse_integers,
    metavar="LIST",
    help="Layers, such as 0,15,31, counted over the whole model.  [default: all]",
)
"""``--layers 0,15,31`` -> ``layers``: a tuple of int, or None for all."""

shown_layers_option = click.option(
    "--layers",
    "--layer",
    "layers",
    callback=parse_integers,
    metavar="LIST",
    help="Layers to show, such as 0,15,31.  [default: the first, the middle and the last recorded]",
)
"""The same for commands that show a few layers; None for three of them."""

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

figures_option = click.option(
    "--figures", type=click.Path(path_type=Path), metavar="FOLDER", help="Also draw it there, as PNG, SVG and PDF."
)
"""``--figures FOLDER`` -> ``figures``: a folder, or None."""


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
