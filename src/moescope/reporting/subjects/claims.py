"""The claims of section 5, with the effect, interval, null and significance behind each answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from math import isnan

import pandas as pd

from moescope.measures.claims import Claim, Effect, answered, claims
from moescope.reporting.cells import mark
from moescope.reporting.numbers import MISSING, bits, percent
from moescope.reporting.options import trace_argument, word_option
from moescope.reporting.subject import Results, Subject
from moescope.reporting.tables import SIGNIFICANT, Cell, Row, Section, Table
from moescope.reporting.visible import visible
from moescope.tallying import WORDS, Counted
from moescope.trace import Trace


def measure(counted: Counted, results: Results) -> list[Claim]:
    """From what the subjects before it found."""
    found = results.found
    return answered(found["divergence"], found["words"], found["locality"], found["explain"])


def blocks(found: list[Claim], results: Results) -> Iterator[Table]:
    """The page opens with the claims, and shows them in its own way."""
    yield claims_table(found)


@trace_argument
@word_option("Word to ask for instead of the paper's; repeatable.")
def command(trace: Trace, words: tuple[str, ...]) -> Iterator[Table]:
    """Show which claims of section 5 hold for this model, and by how much.

    Each is answered yes, no, mixed or not enough data; below it the numbers the answer rests on: effect, 95 % interval
    by document, what it is compared with, and the p-value corrected for all of them.

    \b
    Example:
      moescope claims pile.moe
      moescope claims pile.moe --word return --format csv
    """
    yield claims_table(claims(trace, words or WORDS))


def claims_table(claims: Sequence[Claim]) -> Table:
    """What each answer rests on: effect, interval, null and corrected significance."""
    return Table(
        "claims",
        "The claims of section 5, and the effects each answer rests on",
        "",
        ("effect", "95 % interval", "against", "null", "q"),
        tuple(
            Section(f"{claim.answer}: {visible(claim.name)}", tuple(map(_row, claim.effects)), visible(claim.evidence))
            for claim in claims
        ),
        notes=(
            "points: of per cent, by which a rate is above its null; null: what the null predicts, per cent or bits.",
            f"q: p-value corrected for all effects of all claims (false discovery rate; * below "
            f"{percent(SIGNIFICANT, 0)} %). Intervals by document.",
        ),
        frame=claims_frame(claims),
    )


def claims_frame(claims: Sequence[Claim]) -> pd.DataFrame:
    """A row an effect; a claim without one has a row, too. `lead` marks the effect that the answer hangs on."""
    nothing = dict.fromkeys(field.name for field in fields(Effect))
    rows = []
    for claim in claims:
        about = {"claim": visible(claim.name), "answer": claim.answer, "evidence": visible(claim.evidence)}
        effects = [asdict(effect) | {"what": visible(effect.what)} for effect in claim.effects] or [nothing]
        rows += [about | effect | {"lead": place == claim.lead} for place, effect in enumerate(effects)]
    frame = pd.DataFrame(rows, columns=["claim", "answer", *nothing, "lead", "evidence"])
    numbers = ["value", "low", "high", "null_value", "p_value", "q_value"]
    return frame.astype(dict.fromkeys(numbers, float))


def _row(effect: Effect) -> Row:
    interval = null = q_value = Cell(MISSING)
    if effect.low is not None and effect.high is not None:
        interval = Cell(f"{_plain(effect, effect.low)} to {_plain(effect, effect.high)}")
    if effect.null_value is not None:
        percent_too = effect.unit == "points"
        null = Cell(f"{effect.null_value:.1f} %" if percent_too else _plain(effect, effect.null_value))
    if (q := effect.q_value) is not None:
        q_value = Cell("<0.001" if q < 0.001 else f"{q:.3f}", mark=mark(q))
    size = Cell(f"{_plain(effect, effect.value)} {effect.unit}")
    return Row(visible(effect.what), (size, interval, Cell(visible(effect.null)), null, q_value))


def _plain(effect: Effect, value: float) -> str:
    """A size in the unit of the effect; points have a sign."""
    if isnan(value):
        return MISSING
    if effect.unit == "points":
        text = f"{abs(value):.1f}"
        return text if text == "0.0" else f"{'+' if value > 0 else '−'}{text}"
    return f"−{bits(-value)}" if value < 0 else bits(value)


subject = Subject(measure=measure, blocks=blocks, command=command)
