"""What the commands of several subjects share: arguments and options, each named, typed and explained once."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.reporting.numbers import count
from moescope.reporting.printing import say


def parse_integers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Read ``0,15,31``: whole numbers from 0, sorted, each once; None stays None. For ``callback=`` of an option."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise click.BadParameter(f"expected numbers with commas between them, such as 0,15,31; found {value!r}.")
    return tuple(sorted({int(part) for part in parts}))


def parse_words(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse a word that is nothing but spaces. For ``callback=`` of an option."""
    if not all(word.strip() for word in value):
        raise click.BadParameter("a word must hold something besides spaces.")
    return value


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

figures_option = click.option(
    "--figures", type=click.Path(path_type=Path), metavar="FOLDER", help="Also draw it there, as PNG, SVG and PDF."
)
"""``--figures FOLDER`` -> ``figures``: a folder, or None."""

choice_option = click.option(
    "--choice",
    type=click.Choice(["first", "all"]),
    default="first",
    show_default=True,
    help="The first choice of a token, or each of its choices.",
)
"""``--choice first|all`` -> ``choice``."""

permutations_option = click.option(
    "--permutations",
    type=click.IntRange(1, 99_999),
    default=99,
    show_default=True,
    help="Permutations of each test.",
)
"""``--permutations N`` -> ``permutations``, about which `warn_of_few_permutations` has a word."""


def warn_of_few_permutations(permutations: int) -> None:
    """Say on stderr if so few permutations cannot tell anything from chance."""
    from moescope.reporting.tables import SIGNIFICANT

    smallest = 1 / (permutations + 1)
    if smallest >= SIGNIFICANT:
        say(
            f"warning: with {count(permutations, 'permutation')} no p-value is below {smallest:.2g}, so nothing is "
            f"told from chance; use --permutations {round(1 / SIGNIFICANT)} or more.",
            err=True,
        )
