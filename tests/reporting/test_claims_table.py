"""The table of the claims: values chosen by hand, a sign where there is one, nothing where nothing is known."""

from __future__ import annotations

from dataclasses import replace

from moescope.measures.claims import Claim, Effect
from moescope.reporting.formats import render, styled
from moescope.reporting.subjects.claims import claims_frame, claims_table

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
        2,
    ),
    Claim("B", "s", "not enough data", "why \x1b"),
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
    assert frame["lead"].tolist() == [False, False, True, False, False]
    assert frame["evidence"].tolist() == ["e"] * 4 + ["why ␛"]


def test_the_evidence_stands_under_each_answer_also_where_there_is_no_effect() -> None:
    table = claims_table([replace(CLAIMS[0], evidence=" ".join(["word"] * 40)), CLAIMS[1]])
    lines = render(table, "text").splitlines()
    start, other = lines.index("yes: A <b>"), lines.index("not enough data: B")
    first_effect = next(at for at, line in enumerate(lines) if line.startswith("␛ here"))
    assert " ".join(lines[start + 1 : first_effect]).split() == ["word"] * 40
    assert max(map(len, lines[start:other])) <= len(lines[3]), "no line is wider than the rule"
    assert lines[other + 1] == "why ␛"
    latex = render(table, "latex")
    assert " ".join(["word"] * 40) in latex
    assert "why ␛" in latex


def test_long_labels_and_words_go_on_in_the_next_line_with_nothing_lost() -> None:
    what, null = "divergence of a domain, layer 0 less the layers between", "mean of the layers in between them"
    effect = Effect(what, 12.34, "points", 11.9, 12.8, null, 12.5, 1e-9, 1e-8)
    lines = render(claims_table([Claim("A", "s", "yes", "e", (effect,), 0)]), "text").splitlines()
    at = next(at for at, line in enumerate(lines) if line.startswith("divergence"))
    assert "+12.3 points" in lines[at]
    assert "<0.001*" in lines[at]
    assert len(lines[at + 1].split("  ")[0]) <= 40
    assert sorted(" ".join(lines[at : at + 2]).split()) == sorted(
        f"{what} {null} +12.3 points +11.9 to +12.8 12.5 % <0.001*".split()
    )
    for width in (80, 100):
        narrow = styled(claims_table([Claim("A", "s", "yes", "e", (effect,), 0)]), width).plain.splitlines()
        table_lines = narrow[: next(at for at, line in enumerate(narrow) if line.startswith("points: of per cent"))]
        assert max(map(len, table_lines)) <= width
