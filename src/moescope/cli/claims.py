"""``moescope claims``: the claims of section 5, with the effect, interval, null and significance behind each answer."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.cli.options import format_option, trace_argument


@click.command()
@trace_argument
@click.option(
    "--word", "words", multiple=True, metavar="WORD", help="Word to ask for instead of the paper's; repeatable."
)
@format_option
def command(trace: Path, words: tuple[str, ...], format: str) -> None:
    """Show which claims of section 5 hold for this model, and by how much.

    Each is answered yes, no, mixed or not enough data; below it the numbers the answer rests on: effect, 95 % interval
    by document, what it is compared with, and the p-value corrected for all of them.

    \b
    Example:
      moescope claims pile.moe
      moescope claims pile.moe --word return --format csv
    """
    from moescope.cli.printing import print_table
    from moescope.reporting.claims_table import claims_table
    from moescope.reporting.results import answer_claims
    from moescope.tallying import WORDS
    from moescope.trace import open_trace

    if not all(word.strip() for word in words):
        raise click.BadParameter("a word must hold something besides spaces.", param_hint="'--word'")
    print_table(claims_table(answer_claims(open_trace(trace), words or WORDS)), format)
