"""``moescope vocabulary``: how surely tokens go to one expert, the tokens of an expert and the experts of a token."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.cli.options import figures_option, format_option, parse_integers, shown_layers_option, trace_argument

BRIEF_TOP = 5
"""Tokens an expert in the table of all experts; of a few experts there is room for more."""


@click.command()
@trace_argument
@shown_layers_option
@click.option(
    "--by",
    type=click.Choice(["input", "next"]),
    default="input",
    show_default=True,
    help="List by the token itself, or by the token after it.",
)
@click.option(
    "--choice",
    type=click.Choice(["first", "either"]),
    default="first",
    show_default=True,
    help="The first choice of a token, or all of its choices.",
)
@click.option(
    "--min-count",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Tokens that an id must have to be counted.",
)
@click.option(
    "--top",
    type=click.IntRange(0, 1000),
    metavar="N",
    help=f"Tokens listed for each expert.  [default: {BRIEF_TOP}, of chosen experts 10]",
)
@click.option(
    "--expert", "experts", callback=parse_integers, metavar="LIST", help="List the tokens of these experts in full."
)
@click.option(
    "--token",
    "tokens",
    multiple=True,
    metavar="TEXT",
    help="Show the experts of a token, with and without a space in front; repeatable.",
)
@click.option(
    "--permutations",
    type=click.IntRange(1, 99_999),
    default=99,
    show_default=True,
    help="Permutations of each test.",
)
@figures_option
@format_option
def command(
    trace: Path,
    layers: tuple[int, ...] | None,
    by: str,
    choice: str,
    min_count: int,
    top: int | None,
    experts: tuple[int, ...] | None,
    tokens: tuple[str, ...],
    permutations: int,
    figures: Path | None,
    format: str,
) -> None:
    """Show how surely each token goes to one expert, and which tokens each expert gets.

    Vocabulary specialization (OLMoE, equation 8): of the tokens with an id, the share that chose the id's most frequent
    expert; by the token's own id and by that of the next token. (A trace does not hold the ids that the model
    predicts.) Beside it the same of choices that do not see the token. Then the tokens of each expert or, if they are
    asked for, of some experts, and the experts of some tokens. CSV and JSON hold all of it in one table.

    \b
    Example:
      moescope vocabulary pile.moe --layers 0,15,31 --expert 3 --token self
    """
    from moescope.cli.printing import layer_progress, print_table, save_figure, warn_of_few_permutations
    from moescope.measures import vocabulary
    from moescope.reporting import vocabulary_tables as tables
    from moescope.reporting.results import shown_layers
    from moescope.trace import open_trace

    opened = open_trace(trace)
    opened.need_tokens()
    shown = shown_layers(opened, layers)
    most = max(layer.num_ids for layer in opened.select_layers(shown))
    if experts and experts[-1] >= most:
        raise click.BadParameter(
            f"there is no expert {experts[-1]}; the largest is {most - 1}.", param_hint="'--expert'"
        )
    listed = top if top is not None else 10 if experts else BRIEF_TOP
    warn_of_few_permutations(permutations)
    with layer_progress("looking at tokens") as progress:
        result = vocabulary(
            opened,
            shown if figures is None else None,
            choice=choice,
            min_count=min_count,
            top=listed,
            tokens=_token_ids(opened.vocabulary.pieces, tokens),
            permutations=permutations,
            progress=progress,
        )
    pieces = opened.vocabulary
    found = [tables.vocabulary_table(result, shown, pieces)]
    if format in ("text", "latex"):
        if experts:
            found.append(tables.expert_table(result, shown, pieces, experts, by, listed))
        elif listed and not tokens:
            found.append(tables.expert_tokens_table(result, shown, pieces, by, listed))
        if tokens:
            found.append(tables.token_experts_table(result, shown, pieces, by))
    for number, table in enumerate(found):
        if number:
            click.echo()
        print_table(table, format)
    if figures is not None:
        save_figure("vocabulary", result, figures)


def _token_ids(pieces: dict[int, bytes], texts: tuple[str, ...]) -> list[int]:
    """Ids of the pieces that are one of the texts, or one of them after a space."""
    ids: list[int] = []
    for text in texts:
        wanted = {text.encode(), f" {text}".encode()}
        here = [token_id for token_id, piece in pieces.items() if piece in wanted]
        if not here:
            raise click.BadParameter(f"{text!r} is not one token of the trace's vocabulary.", param_hint="'--token'")
        ids += here
    return ids
