"""What a subject takes to be shown everywhere, and what subjects must not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from moescope.cli import COMMANDS, main
from moescope.reporting import subjects
from moescope.reporting.page.contents import contents
from moescope.reporting.results import gather
from moescope.reporting.subject import PageTable
from moescope.reporting.subjects import SUBJECTS, load
from moescope.trace import Trace

MODULE = '''
"""How many tokens each domain has."""

import click
import pandas as pd

from moescope.reporting.chapters import STRUCTURE
from moescope.reporting.options import figures_option, trace_argument
from moescope.reporting.subject import Drawing, PageFigure, PageSection, PageTable, Subject
from moescope.reporting.tables import Cell, Row, Section, Table
from moescope.tallying.tally import TallyCounter


def measure(counted, results):
    return counted[TallyCounter].data["tokens"]


def blocks(found, results):
    frame = found.to_series().reset_index()
    yield PageFigure(
        name="sizes", file="sizes", draw=lambda: None, label="Sizes", title="Tokens", caption="", how="", cannot="",
        frame=frame,
    )
    yield PageTable(table(found), folded="The same as a table")


@trace_argument
@click.option("--least", default=0)
@figures_option
def command(trace, least, figures):
    """Show how many tokens each domain has."""
    from moescope.tallying import tally

    found = tally(trace).data["tokens"]
    yield table(found[found >= least])
    yield Drawing(file="sizes", draw=lambda: None)


def table(found):
    rows = tuple(Row(str(name), (Cell(str(n)),)) for name, n in found.to_series().items())
    return Table("sizes", "Tokens", "domain", ("tokens",), (Section("", rows),), frame=found.to_series().reset_index())


subject = Subject(
    measure=measure,
    blocks=blocks,
    section=PageSection(STRUCTURE, "sizes", "How large?", "Sizes", "One asks."),
    command=command,
)
'''


@pytest.fixture
def sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subject of a test's own: a module, and its line in the registry."""
    (tmp_path / "sizes.py").write_text(MODULE)
    monkeypatch.setattr(subjects, "__path__", [*subjects.__path__, str(tmp_path)])
    monkeypatch.setitem(SUBJECTS, "sizes", "Show how many tokens each domain has.")
    monkeypatch.setitem(COMMANDS, "sizes", SUBJECTS["sizes"])
    monkeypatch.delitem(sys.modules, "moescope.reporting.subjects.sizes", raising=False)


@pytest.mark.usefixtures("sizes")
def test_a_module_and_a_line_are_a_section_of_the_page_a_table_a_figure_and_a_command(mixtral: Trace) -> None:
    shown = contents(gather(mixtral))
    (section,) = (s for found in shown.chapters.values() for s in found if s.about.name == "sizes")
    assert [section.about.chapter.name, len(section.blocks)] == ["structure", 2]
    assert shown.figures[-1].name == "sizes"
    assert "sizes" in shown.tables
    help = CliRunner().invoke(main, ["sizes", "--help"]).stdout
    assert all(text in help for text in (SUBJECTS["sizes"], "--least", "--figures", "--format"))
    text = CliRunner().invoke(main, ["sizes", str(mixtral.path), "--least", "1", "--format", "csv"])
    assert text.stdout.splitlines()[0] == "domain,tokens"
    assert len(text.stdout.splitlines()) == 1 + len(mixtral.domains)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_has_a_command_if_and_only_if_the_registry_has_its_line(name: str) -> None:
    subject = load(name)
    assert (subject.command is not None) == bool(SUBJECTS[name])
    assert (subject.measure is None and subject.play is None) == (subject.blocks is None)


def test_figures_and_tables_of_a_report_have_names_of_their_own(mixtral: Trace) -> None:
    shown = contents(gather(mixtral))
    for names in ([figure.name for figure in shown.figures], [figure.file for figure in shown.figures]):
        assert len(set(names)) == len(names)
    placed = [b.table.name for s in shown.chapters.values() for f in s for b in f.blocks if isinstance(b, PageTable)]
    assert set(shown.tables) - set(placed) == {"claims", "shares"}
    assert len(set(placed)) == len(placed)


BLOCKED = """
import sys
for name in ("matplotlib", "jinja2"):
    sys.modules[name] = None
from moescope.cli import main
from moescope.reporting.subjects import SUBJECTS, load
for name in SUBJECTS:
    load(name)
main(["shares", sys.argv[1], "--layers", "0"], standalone_mode=False)
main(["divergence", sys.argv[1], "--layers", "0", "--figures", sys.argv[2]], standalone_mode=False)
"""


def test_commands_print_where_the_extra_report_is_not_installed_and_name_it_where_they_draw(
    mixtral: Trace, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(mixtral.path), str(tmp_path / "f")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "Share of the assignments" in done.stdout
    assert "Jensen-Shannon divergence" in done.stdout
    assert "moescope[report]" in done.stderr
    assert not (tmp_path / "f").exists()
