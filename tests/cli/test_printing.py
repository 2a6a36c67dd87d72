"""What is not ours reaches a terminal through one module, and cannot drive it from there."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.text import Text
from synthetic import make_part, make_trace

import moescope
from moescope.cli import main
from moescope.errors import TraceDamaged
from moescope.reporting import printing
from moescope.trace import Layer, Trace

SOURCE = Path(moescope.__file__).parent
MAY_PRINT = {"reporting/printing.py", "importers/parquet_probe.py"}  # the latter is a program of its own
PRINTS = {"print", "click.echo", "click.secho", "console.print", "sys.stdout.write", "sys.stderr.write"}
HOSTILE = "a\x1b[2J\u202eb\r\x07"


def test_nothing_prints_but_the_module_that_makes_text_harmless() -> None:
    found = []
    for file in SOURCE.rglob("*.py"):
        name = file.relative_to(SOURCE).as_posix()
        calls = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
        if name not in MAY_PRINT:
            found += [f"{name}:{call.lineno}" for call in calls if ast.unparse(call.func) in PRINTS]
    assert found == []


def hostile_trace(path: Path) -> Trace:
    layers = (Layer(0, 8, 2),)
    import numpy as np

    part = make_part(np.random.default_rng(0), layers, [40, 40, 40], domains=(HOSTILE, "b", "c"))
    return make_trace(path, [part], layers)


def is_harmless(text: str) -> bool:
    return re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text) is None


@pytest.mark.parametrize("name", ["info", "verify", "shares", "claims", "text", "sql"])
def test_no_command_lets_a_name_drive_the_terminal(tmp_path: Path, name: str) -> None:
    trace = hostile_trace(tmp_path / f"t{HOSTILE}.moe")
    query = ["SELECT domain, count(*) FROM tokens GROUP BY ALL"] if name == "sql" else []
    result = CliRunner().invoke(main, [name, str(trace.path), *query])
    assert result.exit_code == 0, result.output
    assert is_harmless(result.output), repr(result.output)


def test_a_stray_file_with_escapes_in_its_name_is_named_harmlessly(tmp_path: Path) -> None:
    trace = hostile_trace(tmp_path / "t.moe")
    (trace.path / HOSTILE).write_text("")
    result = CliRunner().invoke(main, ["verify", str(trace.path)])
    assert (result.exit_code, is_harmless(result.stderr)) == (1, True)
    assert "␛[2J" in result.stderr


def test_errors_of_every_command_pass_through_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["info", str(tmp_path / HOSTILE)])
    assert (result.exit_code, is_harmless(result.stderr)) == (1, True)
    assert not is_harmless(TraceDamaged(HOSTILE, "is damaged").render())  # in Python an error says what there is


def test_data_is_exact_in_a_pipe_and_harmless_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printing.write(f"{HOSTILE}\n")
    assert capsys.readouterr().out == f"{HOSTILE}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    printing.write(f"{HOSTILE}\nb\n")
    out = capsys.readouterr().out
    assert is_harmless(out)
    assert out.endswith("\nb\n")


def test_a_styled_text_keeps_its_styles_and_loses_its_escapes() -> None:
    for text in (Text("ab", "bold"), Text("a\x1b[31mb"), Text("a\u202eb")):
        console = Console(file=io.StringIO(), force_terminal=False)
        printing.print_styled(console, text)
        assert is_harmless(console.file.getvalue())
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    printing.print_styled(console, Text("ab", "bold"))
    assert console.file.getvalue() == "\x1b[1mab\x1b[0m\n"


def test_two_columns_of_one_name_are_both_in_json_and_in_csv(tmp_path: Path) -> None:
    trace = hostile_trace(tmp_path / "t.moe")
    query = "SELECT 1 AS n, 2 AS n, 3 AS n_2"
    result = CliRunner().invoke(main, ["sql", str(trace.path), query, "--format", "json"])
    assert json.loads(result.stdout) == [{"n": 1, "n_3": 2, "n_2": 3}]
    result = CliRunner().invoke(main, ["sql", str(trace.path), query, "--format", "csv"])
    assert list(csv.reader(io.StringIO(result.stdout))) == [["n", "n", "n_2"], ["1", "2", "3"]]


@pytest.mark.parametrize("format", ["text", "csv", "json"])
def test_a_moment_is_an_answer(tmp_path: Path, format: str) -> None:
    trace = hostile_trace(tmp_path / "t.moe")
    query = "SELECT now() AS t, TIMESTAMPTZ '2024-01-02 03:04:05+02' AS u, TIME '01:02:03' AS v, DATE '2024-01-02' AS w"
    result = CliRunner().invoke(main, ["sql", str(trace.path), query, "--format", format])
    assert result.exit_code == 0, result.output
    assert "2024-01-02" in result.stdout
