"""What several commands share: arguments and options, each named, typed and explained once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from moescope.reporting.numbers import count
from moescope.reporting.printing import say

MOST_IN_RANGE = 100_000
"""Numbers of one range; no model has as many layers."""

Command = TypeVar("Command", bound=Callable[..., object])


def parse_integers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Read ``0,15,20-31``: whole numbers from 0, sorted, each once; None stays None. For ``callback=`` of an option."""
    if value is None:
        return None
    numbers: set[int] = set()
    for part in value.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + MOST_IN_RANGE:
            raise click.BadParameter(f"expected numbers or ranges, such as 0,15,20-31; found {value!r}.")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def _parse_words(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse a word that is nothing but spaces. For ``callback=`` of an option."""
    if not all(word.strip() for word in value):
        raise click.BadParameter("a word must hold something besides spaces.")
    return value


trace_argument = click.argument("trace", type=click.Path(path_type=Path))
"""``TRACE``: the folder ``moescope record`` wrote. Whether it is one is for ``open_trace`` to say."""


def layers_option_for(help: str) -> Callable[[Command], Command]:
    """``--layers 0,15,31`` -> ``layers``: a tuple of int, or None."""
    return click.option("--layers", "--layer", "layers", callback=parse_integers, metavar="LIST", help=help)


layers_option = layers_option_for("Layers, such as 0,15,31, counted over the whole model.  [default: all]")
"""Layers to measure; None for all."""

shown_layers_option = layers_option_for(
    "Layers to show, such as 0,15,31.  [default: the first, the middle and the last recorded]"
)
"""Layers of which a few are shown; None for three of them."""


def one_of(option: str, values: Sequence[str], help: str, default: str | None = None) -> Callable[[Command], Command]:
    """An option that takes one of a few words, by default the first of them."""
    return click.option(option, type=click.Choice(values), default=default or values[0], show_default=True, help=help)


def format_option_for(*formats: str) -> Callable[[Command], Command]:
    """``--format`` -> ``format``."""
    return one_of("--format", formats, "How the result is written to stdout.")


def _check_exclusion(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what cannot be left out of any trace. For ``callback=`` of an option."""
    from moescope.trace.excluding import Exclusion

    try:
        Exclusion.parse(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None
    return value


exclude_option = click.option(
    "--exclude",
    multiple=True,
    callback=_check_exclusion,
    metavar="WHAT",
    help="Leave out documents by number, documents:3,17-20, or tokens by place, tokens:0-8191; may be repeated.",
)
"""``--exclude`` -> ``exclude``: items as of `moescope.open_trace`, which reads them."""

format_option = format_option_for("text", "csv", "json", "latex")
"""The formats of a table."""

force_option = click.option("--force", is_flag=True, help="Replace the output if it exists.")
"""``--force`` -> ``force``."""


def output_option(default: str | None, help: str) -> Callable[[Command], Command]:
    """``-o PATH``/``--output PATH`` -> ``output``; required if there is no default."""
    given: dict[str, Any] = {"required": True} if default is None else {"default": default}
    path = click.Path(path_type=Path)
    return click.option("-o", "--output", "output", type=path, show_default=True, metavar="PATH", help=help, **given)


def word_option(help: str) -> Callable[[Command], Command]:
    """``--word self --word the`` -> ``words``: a tuple of str."""
    return click.option("--word", "words", multiple=True, callback=_parse_words, metavar="WORD", help=help)


figures_option = click.option(
    "--figures", type=click.Path(path_type=Path), metavar="FOLDER", help="Also draw it there, as PNG, SVG and PDF."
)
"""``--figures FOLDER`` -> ``figures``: a folder, or None."""


choice_option = one_of("--choice", ["first", "all"], "The first choice of a token, or each of its choices.")
"""``--choice first|all`` -> ``choice``: which choices are measured."""


def _warn_of_few_permutations(ctx: click.Context, param: click.Parameter, value: int) -> int:
    """Say on stderr if so few permutations cannot make anything significant."""
    from moescope.reporting.tables import SIGNIFICANT  # here, since it takes pandas with it

    smallest = 1 / (value + 1)
    if smallest >= SIGNIFICANT:
        say(
            f"warning: with {count(value, 'permutation')} no p-value is below {smallest:.2g}, so nothing is "
            f"significant; use --permutations {round(1 / SIGNIFICANT)} or more.",
            err=True,
        )
    return value


permutations_option = click.option(
    "--permutations",
    type=click.IntRange(1, 99_999),
    default=99,
    show_default=True,
    callback=_warn_of_few_permutations,
    help="Permutations of each test.",
)
"""``--permutations N`` -> ``permutations``."""
