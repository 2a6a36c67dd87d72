"""SQL over a trace: the same numbers as a loop, exact output, and no way out of the trace."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from synthetic import VOCABULARY, make_part, make_trace

import moescope
from moescope.cli import main
from moescope.errors import MissingExtra, TraceDamaged, TraceNotFound
from moescope.exporting.database import examples, schema
from moescope.trace import Header, Layer, Trace, TraceWriter, Vocabulary

LAYERS = (Layer(1, 8, 2), Layer(4, 300, 3, num_null_experts=1))


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    rng = np.random.default_rng(0)
    parts = [
        make_part(rng, LAYERS, [40, 1, 23], weights=True, dropped=0.1),
        make_part(rng, LAYERS, [16, 33], weights=True, dropped=0.1, first_document=3),
    ]
    return make_trace(tmp_path / "t.moe", parts, LAYERS)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["sql", *map(str, arguments)])


def test_the_views_hold_what_the_trace_holds(trace: Trace) -> None:
    tokens = moescope.sql(trace, "SELECT * FROM tokens ORDER BY document, sequence, position")
    choices = moescope.sql(trace, "SELECT * FROM choices ORDER BY document, sequence, position, layer, rank")
    assert len(tokens) == trace.num_tokens
    row = at = 0
    for part in trace.iter_parts(weights=True):
        for place in range(part.num_tokens):
            token = tokens.iloc[row]
            row += 1
            key = [
                part.document[place],
                trace.domains[part.domain[place]],
                part.sequence[place],
                part.position[place],
                part.token_id[place],
            ]
            assert token[["document", "domain", "sequence", "position", "token_id"]].tolist() == key
            for layer in LAYERS:
                for rank in range(layer.top_k):
                    choice = choices.iloc[at]
                    at += 1
                    expert = part.expert_ids[layer.layer][place, rank]
                    weight = part.gate_weights[layer.layer][place, rank]
                    assert choice[["document", "domain", "sequence", "position", "token_id"]].tolist() == key
                    assert (choice["layer"], choice["rank"]) == (layer.layer, rank)
                    assert choice["weight"] == token[f"W{layer.layer}_{rank}"] == weight
                    for found in (choice["expert"], token[f"L{layer.layer}_{rank}"]):
                        assert pd.isna(found) if expert < 0 else found == expert
    assert at == len(choices)
    words = moescope.sql(trace.path, "SELECT * FROM vocabulary ORDER BY token_id")
    assert words["text"].tolist() == [f" w{number}" for number in range(50)]
    assert [bytes(piece) for piece in words["bytes"]] == list(VOCABULARY.pieces.values())


def test_a_count_is_that_of_a_loop(trace: Trace) -> None:
    expected: Counter[tuple[str, int]] = Counter()
    for part in trace.iter_parts():
        for domain, ids in zip(part.domain.tolist(), part.expert_ids[4].tolist(), strict=True):
            expected.update((trace.domains[domain], expert) for expert in ids if expert >= 0)
    query = "SELECT domain, expert, count(expert) AS n FROM choices WHERE layer = 4 AND expert IS NOT NULL GROUP BY ALL"
    found = moescope.sql(trace, query)
    assert {(row.domain, row.expert): row.n for row in found.itertuples()} == expected


def test_a_query_about_one_layer_reads_only_its_columns(trace: Trace) -> None:
    plan = moescope.sql(trace, "EXPLAIN SELECT expert FROM choices WHERE layer = 4").iloc[0, 1]
    assert "L4_2" in plan
    assert "L1_0" not in plan


def test_csv_and_json_are_exact_and_text_is_for_people(trace: Trace) -> None:
    query = (
        "SELECT 123456789.125::DOUBLE AS number, 12345678901234567890::HUGEINT AS big, 1.5::DECIMAL(4,2) AS money, "
        "'a,\"b' AS word, NULL AS nothing, 'NaN'::DOUBLE AS nan, '\\x00a'::BLOB AS bytes, DATE '2020-02-03' AS day, "
        "[1, NULL] AS list, {'k': 'v'} AS object, true AS yes"
    )
    row = {
        "number": 123456789.125,
        "big": 12345678901234567890,
        "money": 1.5,
        "word": 'a,"b',
        "nothing": None,
        "nan": None,
        "bytes": "\\x00a",
        "day": "2020-02-03",
        "list": [1, None],
        "object": {"k": "v"},
        "yes": True,
    }
    assert json.loads(run(trace.path, query, "--format", "json").stdout) == [row]
    ((names), (values)) = csv.reader(io.StringIO(run(trace.path, query, "--format", "csv").stdout))
    assert names == list(row)
    assert values == ["" if value is None else str(value) for value in row.values()]
    assert run(trace.path, query).stdout.splitlines()[2].split()[:3] == ["1.23457e+08", "12345678901234567890", "1.5"]


def test_an_empty_result_is_valid_in_every_format(trace: Trace) -> None:
    query = "SELECT domain, document FROM tokens WHERE false"
    assert json.loads(run(trace.path, query, "--format", "json").stdout) == []
    assert run(trace.path, query, "--format", "csv").stdout == "domain,document\n"
    assert run(trace.path, query).stdout.splitlines()[0].split() == ["domain", "document"]


def test_many_rows_are_cut_as_text_and_whole_as_csv(trace: Trace) -> None:
    query = "SELECT range AS n FROM range(25000)"
    text = run(trace.path, query)
    assert len(text.stdout.splitlines()) == 1002
    assert "only the first 1,000 rows are shown" in text.stderr
    rows = run(trace.path, query, "--format", "csv").stdout.splitlines()
    assert rows == ["n", *map(str, range(25000))]
    assert len(json.loads(run(trace.path, query, "--format", "json").stdout)) == 25000


def test_without_a_query_every_column_is_shown_with_its_meaning(trace: Trace) -> None:
    shown = run(trace.path)
    assert shown.exit_code == 0
    assert "L1_0 … L4_2" in shown.stdout
    described = {(column.view, column.name): column.type for column in schema(trace)}
    for view in ("tokens", "choices", "vocabulary"):
        for name, type in moescope.sql(trace, f"DESCRIBE {view}").iloc[:, :2].itertuples(index=False):
            if name[1:2].isdigit():
                assert type in described["tokens", f"{name[0]}1_0 … {name[0]}4_2"]
            else:
                assert described.pop((view, name)) == type
    assert len(described) == 2  # nothing is described that is not there, but for the two spans
    assert len(examples(trace)) == 2
    for example in examples(trace):
        assert example in shown.stdout
        assert len(moescope.sql(trace, example)) > 0
    assert {row["view"] for row in json.loads(run(trace.path, "--format", "json").stdout)} == {
        "tokens",
        "choices",
        "vocabulary",
    }


def test_without_gate_weights_there_is_no_column_of_them(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t.moe", [make_part(np.random.default_rng(0), LAYERS, [3])], LAYERS)
    assert not [column for column in schema(trace) if "weight" in column.name or column.name.startswith("W")]
    assert "weight" not in moescope.sql(trace, "SELECT * FROM choices").columns


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT nope FROM tokens", "nope"),
        ("SELECT * FROM nope", "nope does not exist"),
        ("SELECT domain::INTEGER FROM tokens", "Could not convert"),
        ("", "no statement"),
        ("/* nothing */", "no statement"),
        ("SELECT error('arrow')", "arrow"),
    ],
)
def test_a_wrong_query_is_a_fault_of_the_command_line(query: str, says: str, trace: Trace) -> None:
    result = run(trace.path, query)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    with pytest.raises(ValueError, match=says):
        moescope.sql(trace, query)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM '{file}'",
        "SELECT * FROM read_csv('{file}')",
        "SELECT * FROM read_text('{file}')",
        "SELECT * FROM read_parquet('{part}')",
        "SELECT * FROM glob('{folder}/*')",
        "COPY tokens TO '{folder}/stolen.csv'",
        "COPY tokens TO '{part}'",
        "EXPORT DATABASE '{folder}/stolen'",
        "ATTACH '{folder}/stolen.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET lock_configuration = false",
        "SELECT * FROM a_python_variable",
    ],
)
def test_a_query_reaches_neither_files_nor_settings_nor_variables(query: str, trace: Trace, tmp_path: Path) -> None:
    a_python_variable = moescope.sql(trace, "SELECT 1 AS secret")
    (tmp_path / "secret.csv").write_text("secret\n1\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    names = {"file": tmp_path / "secret.csv", "folder": tmp_path, "part": trace.parts[0].path}
    with pytest.raises(ValueError, match=r"."):
        moescope.sql(trace, query.format(**names))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert trace.verify() == []
    assert len(a_python_variable) == 1


@pytest.mark.parametrize(
    "name", ["it's; DROP VIEW tokens; --.moe", 'a "b" \\.moe', "*?[x].moe", "ü 東京.moe", "%20.moe"]
)
def test_a_path_is_a_path_whatever_is_in_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trace(tmp_path / name, [make_part(np.random.default_rng(0), LAYERS, [7])], LAYERS)
    assert moescope.sql(tmp_path / name, "SELECT count(*) AS n FROM tokens")["n"].tolist() == [7]
    monkeypatch.chdir(tmp_path)
    assert moescope.sql(name, "SELECT count(L1_0) AS n FROM tokens")["n"].tolist() == [7]


def test_a_hostile_name_does_not_drive_the_terminal(tmp_path: Path) -> None:
    part = make_part(np.random.default_rng(0), LAYERS, [2], domains=("\x1b[2J\u202eevil",))
    trace = make_trace(tmp_path / "t.moe", [part], LAYERS)
    out = run(trace.path, 'SELECT DISTINCT domain, domain AS "\x1b[31m" FROM tokens').stdout
    assert "\x1b" not in out
    assert "␛[2J⟨U+202E⟩evil" in out


def test_a_damaged_part_is_the_trace_s_fault_not_the_query_s(trace: Trace) -> None:
    path = trace.parts[1].path
    content = bytearray(path.read_bytes())
    for place in range(4, 600):
        content[place] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(TraceDamaged, match=r"parts/000001\.parquet: cannot be read"):
        moescope.sql(trace.path, "SELECT * FROM tokens")
    result = run(trace.path, "SELECT * FROM tokens", "--format", "csv")
    assert result.exit_code == 1
    assert "error[trace-damaged]" in result.stderr


def test_a_trace_without_a_part_has_empty_views(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t.moe", Header(LAYERS), Vocabulary({1: b"a"})):
        pass
    assert moescope.sql(tmp_path / "t.moe", "SELECT count(*) AS n FROM choices")["n"].tolist() == [0]


def test_no_trace_and_no_duckdb_are_said(tmp_path: Path, trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TraceNotFound):
        moescope.sql(tmp_path / "nothing", "SELECT 1")
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(MissingExtra, match="duckdb") as error:
        moescope.sql(trace, "SELECT 1")
    assert error.value.hint == "pip install 'moescope[sql]'"
    assert run(trace.path, "SELECT 1").exit_code == 1
    assert run(trace.path).exit_code == 0  # the schema needs no DuckDB
