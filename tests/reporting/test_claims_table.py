"""The table of the claims: values chosen by hand, a sign where there is one, nothing where nothing is known."""

from __future__ import annotations

from moescope.measures.claims import Claim, Effect
from moescope.reporting.claims_table import claims_frame, claims_table

CLAIMS = [
    Claim(
        "A <b>",
        "s",
        "yes",
        "e",
        (
            Effect("\x1b here", 12.34, "points", 11.9, 12.8, "uniform routing", 12.5, 1e-9, 1e-8),
            Effect("there", -0.04, "points", -1.26, 1.18, "same words", 25.0, 0.9, 0.95),
            Effect("bits", 0.01234, "bits", 0.0, 0.00001, "sampling", 0.0002, 0.02, 0.049),
            Effect("lone", -0.5, "bits", None, None, "nothing", None),
        ),
    ),
    Claim("B", "s", "not enough data", "e"),
]


def test_an_effect_is_printed_with_its_unit_and_sign_and_a_zero_without() -> None:
    table = claims_table(CLAIMS)
    assert [section.title for section in table.sections] == ["yes: A <b>", "not enough data: B"]
    rows = table.sections[0].rows
    assert rows[0].label == "␛ here"
    assert [cell.value + cell.mark for cell in rows[0].cells] == [
        *("+12.3 points", "+11.9 to +12.8", "uniform routing", "12.5 %", "<0.001*")
    ]
    assert [cell.value + cell.mark for cell in rows[1].cells] == [
        *("0.0 points", "−1.3 to +1.2", "same words", "25.0 %", "0.950")
    ]
    assert [cell.value + cell.mark for cell in rows[2].cells] == [
        *("0.0123 bits", "0 to <0.0001", "sampling", "0.0002", "0.049*")
    ]
    assert [cell.value + cell.mark for cell in rows[3].cells] == ["−0.5000 bits", "–", "nothing", "–", "–"]
    assert table.sections[1].rows == ()


def test_the_frame_has_a_row_an_effect_and_one_for_a_claim_without() -> None:
    frame = claims_frame(CLAIMS)
    assert frame["claim"].tolist() == ["A <b>"] * 4 + ["B"]
    assert frame["value"].isna().tolist() == [False] * 4 + [True]
    assert frame["q_value"].notna().tolist() == [True, True, True, False, False]
