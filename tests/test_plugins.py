"""Subjects of other packages: the example is installed as pip installs it, and broken ones are named and left out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from synthetic import make_part, make_trace

from moescope.trace import Layer, Trace

EXAMPLE = Path(__file__).parent / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with the example in it."""
    folder = tmp_path_factory.mktemp("site")
    source = folder.with_name("source")
    shutil.copytree(EXAMPLE, source)
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    install = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(source)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    return folder


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    layers = (Layer(0, 8, 2), Layer(3, 8, 2))
    part = make_part(np.random.default_rng(0), layers, [60, 90, 40, 70, 80, 50])
    return make_trace(tmp_path_factory.mktemp("trace") / "t.moe", [part], layers)


def broken(folder: Path, name: str, text: str, *, entry: str | None = None) -> Path:
    """A package that is installed, and names a subject."""
    (folder / f"{name}_module.py").write_text(textwrap.dedent(text))
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[moescope.subjects]\n{entry or name} = {name}_module\n")
    return folder


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    command = [sys.executable, "-m", "moescope", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def python(site: Path, code: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_example_has_its_line_of_help(site: Path) -> None:
    shown = run(site, "--help")
    assert "Plug-ins:\n  effective  Show how many equally loaded experts would be as concentrated." in shown.stdout
    assert not shown.stderr


def test_the_example_has_its_command_its_options_and_its_figure(site: Path, trace: Trace, tmp_path: Path) -> None:
    shown = run(site, "effective", str(trace.path), "--layers", "3", "--format", "csv")
    header, first, *_ = shown.stdout.splitlines()
    assert header.startswith("domain,layer,effective,effective_low,effective_high,effective_null")
    assert first.startswith("(all),3,")
    run(site, "effective", str(trace.path), "--figures", str(tmp_path))
    assert (tmp_path / "effective.png").stat().st_size > 1000
    assert run(site, "effective", str(trace.path), "--least", "8").returncode == 1


def test_the_example_is_a_measure_like_ours(site: Path, trace: Trace) -> None:
    code = f"""if True:
        import moescope.measures as measures, moescope
        from moescope.measures import schema
        trace = moescope.open_trace({str(trace.path)!r})
        result = measures.effective(trace)
        schema.check(result)
        assert result.identical(measures.effective(moescope.count(trace)))
        print("effective" in dir(measures), bool((result["effective"] <= 8).all() and (result["effective"] > 1).all()))
    """
    assert python(site, code) == "True True"


def test_the_example_stands_in_the_report(site: Path, trace: Trace, tmp_path: Path) -> None:
    done = run(site, "report", str(trace.path), "-o", str(tmp_path / "report"))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report" / "index.html").read_text()
    assert "How many experts carry the load?" in page
    for name in ("figures/effective-experts.svg", "tables/effective.csv", "tables/effective.tex"):
        assert (tmp_path / "report" / name).exists()


SECTION = """
    from moescope.reporting.chapters import STRUCTURE
    from moescope.reporting.subject import PageFigure, PageSection, PageTable, Subject
    from moescope.reporting.tables import Table
    import pandas as pd
    section = PageSection(STRUCTURE, "odd", "An odd one?", "Odd", "Lead.")
    def fail(*_):
        raise RuntimeError("of its own making")
    def figure(draw):
        return PageFigure(name="odd", file="odd", draw=draw, label="Odd", title="T", caption="C", how="", cannot="",
                          frame=pd.DataFrame({"a": [1]}))
"""
BROKEN = {
    "import": "import a_package_that_nobody_has",
    "no subject": "subject = 7",
    "measure": SECTION + "    subject = Subject(measure=fail, blocks=lambda *_: iter(()), section=section)\n",
    "blocks": SECTION + "    subject = Subject(measure=lambda *_: 1, blocks=fail, section=section)\n",
    "figure": SECTION
    + "    subject = Subject(measure=lambda *_: 1, blocks=lambda *_: iter([figure(fail)]), section=section)\n",
    "table of our name": SECTION
    + """    table = Table("shares", "T", "s", (), ())
    subject = Subject(measure=lambda *_: 1, blocks=lambda *_: iter([PageTable(table)]), section=section)
""",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plug_in_is_named_and_left_out_of_the_report(fault: str, trace: Trace, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    site = broken(tmp_path / "site", "odd", BROKEN[fault])
    done = run(site, "report", str(trace.path), "-o", str(tmp_path / "report"))
    assert done.returncode == 0, done.stderr
    assert "the plug-in odd of odd 1.0 is left out" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("odd 1.0") == 1
    assert "An odd one?" not in (tmp_path / "report" / "index.html").read_text()


def test_a_broken_plug_in_leaves_help_and_our_commands_alone(trace: Trace, tmp_path: Path) -> None:
    site = broken(tmp_path, "odd", BROKEN["import"])
    shown = run(site, "--help")
    assert shown.returncode == 0
    assert "Plug-ins" not in shown.stdout
    assert "odd 1.0 is left out: ModuleNotFoundError" in shown.stderr
    assert not run(site, "shares", str(trace.path)).stderr
    assert run(site, "odd", str(trace.path)).returncode == 2


def test_a_command_that_fails_says_whose_it_is(trace: Trace, tmp_path: Path) -> None:
    site = broken(
        tmp_path,
        "odd",
        """
        from moescope.reporting.options import trace_argument
        from moescope.reporting.subject import Subject
        @trace_argument
        def command(trace):
            "Show what cannot be shown."
            raise RuntimeError("of its own making")
            yield
        subject = Subject(command=command)
        """,
    )
    done = run(site, "odd", str(trace.path))
    assert done.returncode == 1
    assert done.stderr.startswith("error[plugin-failed]: the plug-in odd of odd 1.0: RuntimeError: of its own making")
    assert "Traceback" not in done.stderr


def test_a_name_of_ours_stays_ours(trace: Trace, tmp_path: Path) -> None:
    site = broken(tmp_path, "odd", "raise RuntimeError('imported')", entry="shares")
    done = run(site, "shares", str(trace.path))
    assert done.returncode == 0
    assert done.stdout.startswith("Share of the assignments")
