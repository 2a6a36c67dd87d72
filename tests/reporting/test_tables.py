"""Tables, to the letter, in every format."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from rich.text import Text

import moescope
from moescope.reporting.formats import FORMATS, render, styled
from moescope.reporting.frames import tidy
from moescope.reporting.subjects.divergence import divergence_table
from moescope.reporting.subjects.repeats import repeats_table
from moescope.reporting.subjects.shares import DIMS, shares_table
from moescope.reporting.subjects.words import words_table
from moescope.reporting.tables import (
    Cell,
    Row,
    Section,
    Table,
)

REPEATS = """\
Repeated consecutive assignments, %

                   ─────── first choice ────────  ── first or second choice ──
domain              layer 0    layer 3   layer 7   layer 0   layer 3   layer 7
──────────────────────────────────────────────────────────────────────────────
Gutenberg (PG-19)  14.0±0.9   27.9±0.9  22.7±0.9  46.5±0.9  62.3±0.9  52.9±0.9
50%_off & <b>␛        0+0.9  >99.9±0.8     –      <0.1±0.9   100−0.8     –

expected from the popularity of the experts alone
Gutenberg (PG-19)  13.0       13.0      13.0      13.0      13.0      13.0
50%_off & <b>␛     13.0       13.0      13.0      13.0      13.0      13.0

expected from uniform routing
any domain         12.5       12.5      12.5      46.4      46.4      46.4

Mixtral-8x7B on the Pile as published, layers 0, 15, 31 of 32
Gutenberg (PG-19)  13.9       26.1      26.3      49.5      63.1      52.2

± the larger side of a 95 % interval, clustered by document. Pairs never cross a sequence.
"""

LATEX = r"""% Repeated consecutive assignments, %
% ± the larger side of a 95 % interval, clustered by document. Pairs never cross a sequence.
% needs \usepackage{booktabs}
\begin{tabular}{lrr}
\toprule
 & \multicolumn{1}{c}{first choice} & \multicolumn{1}{c}{first or second choice} \\
\cmidrule(lr){2-2} \cmidrule(lr){3-3}
domain & layer 0 & layer 0 \\
\midrule
Gutenberg (PG-19) & 14.0 {\scriptsize $\pm$0.9} & 46.5 {\scriptsize $\pm$0.9} \\
50\%\_off \& \textless{}b\textgreater{}␛ & 0 {\scriptsize $+$0.9} & \textless{}0.1 {\scriptsize $\pm$0.9} \\
\midrule
\multicolumn{3}{l}{\textit{expected from the popularity of the experts alone}} \\
Gutenberg (PG-19) & 13.0 & 13.0 \\
50\%\_off \& \textless{}b\textgreater{}␛ & 13.0 & 13.0 \\
\midrule
\multicolumn{3}{l}{\textit{expected from uniform routing}} \\
any domain & 12.5 & 46.4 \\
\bottomrule
\end{tabular}
"""

SHARES = """\
Share of the assignments that each expert receives, the one choice, %

expert           A         B
────────────────────────────
layer 5: uniform 33.3
0         50.0±3.0  30.0±3.0
1         45.0±3.0  70.0±3.0
2            0+3.0  <0.1±3.0
3 (null)   5.0±3.0     0+3.0

± the larger side of a 95 % interval, clustered by document. The shares of a domain and layer sum to 100 %.
"""


def test_table_5_as_text(tiny_repeats):
    assert render(repeats_table(tiny_repeats, [0, 3, 7]), "text") == REPEATS


def test_table_5_as_latex(tiny_repeats):
    assert render(repeats_table(tiny_repeats, [0]), "latex") == LATEX


def test_a_dead_expert_prints_as_zero_and_a_rare_one_does_not(tiny_shares):
    assert render(shares_table(tiny_shares, [5]), "text") == SHARES


def test_the_published_table_stands_beside_three_layers_of_the_papers_domains_only(tiny_repeats):
    titles = [section.title for section in repeats_table(tiny_repeats, [0, 3, 7]).sections]
    assert "Mixtral-8x7B on the Pile as published, layers 0, 15, 31 of 32" in titles
    for table in (
        repeats_table(tiny_repeats, [0, 7]),
        repeats_table(tiny_repeats.assign_coords(domain=["C++", "Java"]), [0, 3, 7]),
    ):
        assert not [section for section in table.sections if "published" in section.title]


def test_csv_holds_every_value_with_interval_null_and_unit(tiny_repeats):
    text = render(repeats_table(tiny_repeats, [0, 7]), "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 2 * 2 * 3
    assert rows[0] == {
        "domain": "Gutenberg (PG-19)",
        "layer": "0",
        "kind": "first",
        "rate_percent": "14",
        "rate_low_percent": "13.2",
        "rate_high_percent": "14.9",
        "rate_error_percent": "0.4",
        "rate_null_percent": "13",
        "rate_uniform_percent": "12.5",
        "documents": "12",
        "tokens": "1212",
        "pairs": "1200",
    }
    assert rows[-1]["domain"] == "50%_off & <b>\x1b"  # data, so as it is
    assert rows[-1]["rate_percent"] == ""


def test_csv_quotes_what_would_break_a_row(tiny_repeats):
    nasty = ['a,"b"\nc', "=1+1"]
    text = render(repeats_table(tiny_repeats.assign_coords(domain=nasty), [0]), "csv")
    assert [row["domain"] for row in csv.DictReader(io.StringIO(text))] == [name for name in nasty for _ in range(3)]


def test_json_is_valid_and_null_where_a_value_is_missing(tiny_repeats):
    rows = json.loads(render(repeats_table(tiny_repeats, [7]), "json"))
    assert rows[0]["rate_percent"] == 22.7
    assert rows[-1]["rate_percent"] is None


def test_the_shares_of_the_frame_are_those_of_the_measure(mixtral):
    shares = moescope.shares(moescope.tally(mixtral))
    frame = tidy(shares, *DIMS)
    assert len(frame) == shares["share"].size
    row = frame[(frame.domain == "Github") & (frame.layer == 7) & (frame.choice == "second") & (frame.expert == 3)]
    assert row.share_percent.item() == pytest.approx(
        100 * shares["share"].sel(domain="Github", layer=7, choice="second", expert=3).item()
    )
    sums = frame.groupby(["domain", "layer", "choice"]).share_percent.sum()
    assert np.allclose(sums, 100)


def test_what_a_layer_lacks_has_no_row(tiny_shares):
    frame = tidy(tiny_shares.where(tiny_shares["expert"] < 2), *DIMS)
    assert set(frame.expert) == {0, 1}


def test_every_table_of_a_real_trace_prints_in_every_format(mixtral, wide):
    for trace in (mixtral, wide):
        tally = moescope.tally(trace)
        layers = list(tally.layers)[:2]
        for table in (
            shares_table(moescope.shares(tally), layers),
            repeats_table(moescope.repeats(tally), layers),
            words_table(moescope.words(trace, ["self", "x y"], indentation=True), layers),
            divergence_table(moescope.divergence(tally), layers),
        ):
            for format in FORMATS:
                assert render(table, format)
            assert len({len(row.cells) for section in table.sections for row in section.rows}) == 1


def test_a_divergence_is_marked_only_if_its_test_says_so(mixtral):
    result = moescope.divergence(moescope.tally(mixtral))
    table = divergence_table(result, [0, 31])
    for row in table.sections[0].rows:
        for cell, layer in zip(row.cells, (0, 31), strict=True):
            assert (cell.mark == "*") == (result["jsd_rest_q"].sel(domain=row.label, layer=layer).item() < 0.05)


def test_words_of_no_occurrence_print_as_missing(mixtral):
    table = words_table(moescope.words(mixtral, ["nowhere"], layers=[0]), [0])
    cells = table.sections[0].rows[0].cells
    assert [cell.value for cell in cells[:3]] == ["0", "–", "–"]


def test_a_table_too_wide_for_the_terminal_is_cut_into_blocks_that_hold_every_column():
    names = tuple(f"column{number}" for number in range(9))
    row = Row("row", tuple(Cell(str(number)) for number in range(9)))
    table = Table("t", "title", "stub", names, (Section("s", (row,)),), notes=("note",))
    text = styled(table, 40).plain
    assert all(len(line) <= 40 for line in text.splitlines())
    assert all(text.count(name) == 1 for name in names)
    assert text.count("note") == 1
    assert styled(table).plain.count("stub") == 1


def test_nothing_that_a_domain_is_called_reaches_the_terminal_as_an_escape_sequence(tiny_repeats):
    text = styled(repeats_table(tiny_repeats, [0]))
    assert isinstance(text, Text)
    assert "\x1b" not in text.plain


def test_an_unknown_format_is_refused_by_name(tiny_repeats):
    with pytest.raises(ValueError, match="no format 'xml'; there are text, csv, json, latex"):
        render(repeats_table(tiny_repeats, [0]), "xml")
