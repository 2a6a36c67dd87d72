"""A domain that is called as all domains together are: it keeps its name, and the total gets another."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from click.testing import CliRunner
from reporting.conftest import write_trace

import moescope
from moescope.cli import main
from moescope.measures import schema
from moescope.reporting.subjects import SUBJECTS
from moescope.trace import Trace

ARGUMENTS = {
    "words": ("--word", "the"),
    "explain": ("--permutations", "3"),
    "parallel": ("--devices", "2", "--prefill", "64", "--decode", "2"),
    "cache": ("--expert-bytes", "1e6", "--bandwidth", "1"),
}
SHOW_THE_TOTAL = ("balance", "locality", "consistency", "cache", "parallel", "compare")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder: Path = tmp_path_factory.mktemp("named-all")
    return write_trace(folder / "t.moe", layers=(0, 3), domains=(schema.TOTAL, "Github"))


def output_of(*arguments: str) -> str:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output or done.exception
    return done.stdout


@pytest.mark.parametrize("name", [name for name, line in SUBJECTS.items() if line])
def test_every_command_tells_it_from_the_total(trace: Trace, name: str) -> None:
    traces = [str(trace.path)] * (2 if name in ("compare", "saturation") else 1)
    rows = list(csv.DictReader(io.StringIO(output_of(name, *traces, *ARGUMENTS.get(name, ()), "--format", "csv"))))
    named = {row["domain"] for row in rows if row.get("domain")}
    assert named <= {"((all))", "(all)", "Github"}
    if name in SHOW_THE_TOTAL:
        assert {"((all))", "(all)"} <= named
    assert output_of(name, *traces, *ARGUMENTS.get(name, ()))


def test_the_report_shows_both(trace: Trace, tmp_path: Path) -> None:
    output_of("report", str(trace.path), "-o", str(tmp_path / "report"))
    rows = list(csv.DictReader((tmp_path / "report" / "figures" / "balance.csv").read_text().splitlines()))
    assert [row["domain"] for row in rows[:6:2]] == ["((all))", "(all)", "Github"]
    assert "(all)" in (tmp_path / "report" / "index.html").read_text()


def test_its_numbers_are_those_it_has_under_another_name(trace: Trace, tmp_path: Path) -> None:
    other = write_trace(tmp_path / "t.moe", layers=(0, 3), domains=("Prose", "Github"))
    for measure in (moescope.balance, moescope.locality, moescope.consistency):
        found, expected = measure(trace), measure(other)
        assert found["domain"].values.tolist() == ["((all))", "(all)", "Github"]
        assert found.drop_vars("domain").identical(expected.drop_vars("domain"))
