"""The commands that show results."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from click.testing import CliRunner

import moescope
from moescope.cli import main
from moescope.measures.claims import claims
from moescope.reporting.formats import render
from moescope.reporting.subjects.claims import claims_table
from moescope.reporting.subjects.repeats import repeats_table
from moescope.reporting.subjects.shares import shares_table
from moescope.reporting.subjects.words import words_table
from moescope.trace import Header, Layer, TraceWriter, Vocabulary


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_shares_prints_the_table_of_the_first_middle_and_last_layer(run, mixtral):
    result = run("shares", mixtral.path)
    assert result.exit_code == 0, result.output
    expected = shares_table(moescope.shares(moescope.tally(mixtral, [0, 7, 31])), [0, 7, 31])
    assert result.stdout == render(expected, "text")
    assert result.stderr == ""


def test_shares_of_a_choice_and_a_layer_as_csv(run, mixtral):
    result = run("shares", mixtral.path, "--layer", "7", "--choice", "second", "--format", "csv")
    lines = result.stdout.splitlines()
    assert lines[0].startswith(
        "domain,layer,choice,expert,share_percent,share_low_percent,share_high_percent,share_error_percent"
    )
    assert len(lines) == 1 + 8 * 8
    assert all(line.split(",")[1:3] == ["7", "second"] for line in lines[1:])


def test_a_choice_that_the_trace_lacks_is_an_error_of_the_command_line(run, mixtral):
    result = run("shares", mixtral.path, "--choice", "third")
    assert result.exit_code == 2
    assert "'third' is not one of all, first, second" in result.stderr


def test_repeats_prints_table_5_and_as_json_its_values(run, mixtral):
    expected = repeats_table(moescope.repeats(moescope.tally(mixtral, [0, 31])), [0, 31])
    assert run("repeats", mixtral.path, "--layers", "0,31").stdout == render(expected, "text")
    rows = json.loads(run("repeats", mixtral.path, "--layers", "0,31", "--format", "json").stdout)
    assert len(rows) == 8 * 2 * 3


def test_words_asks_for_those_of_the_paper_if_none_is_given(run, mixtral):
    out = run("words", mixtral.path, "--layer", "0", "--format", "csv").stdout
    assert [line.split(",")[0] for line in out.splitlines()[1:]] == ["self", "Question", "<indentation>"]


def test_words_takes_words_and_indentation(run, mixtral):
    result = run("words", mixtral.path, "--word", "wind", "--indentation", "--layer", "3")
    words = moescope.words(mixtral, ["wind"], indentation=True, layers=[3])
    assert result.stdout == render(words_table(words, [3]), "text")
    assert run("words", mixtral.path, "--word", " ").exit_code == 2


def test_text_shows_a_document_in_the_layers_asked_for(run, mixtral):
    result = run("text", mixtral.path, "--document", "10", "--layers", "3,31", "--width", "60")
    assert result.exit_code == 0
    assert result.stdout.startswith("document 10, Github, ")
    assert "L3  " in result.stdout
    assert "L31 " in result.stdout
    assert all(len(line) <= 60 for line in result.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text", "--document", "999"], "error[no-such-document]"),
        (["text", "--layers", "5"], "error[no-such-layer]"),
        (["shares", "--layer", "5"], "error[no-such-layer]"),
        (["repeats", "--layer", "5"], "error[no-such-layer]"),
        (["report", "--layer", "5", "-o", "out"], "error[no-such-layer]"),
    ],
)
def test_what_the_trace_does_not_hold_is_named(run, mixtral, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run(arguments[0], mixtral.path, *arguments[1:])
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout == ""


def test_a_trace_without_a_document_is_named(run, tmp_path):
    header = Header((Layer(0, 8, 2),))
    with TraceWriter(tmp_path / "new.moe", header, Vocabulary({})):
        pass
    for name in ("shares", "repeats", "words", "text", "report"):
        result = run(name, tmp_path / "new.moe", *(["-o", tmp_path / "out"] if name == "report" else []))
        assert result.exit_code == 1
        assert "error[no-such-document]" in result.stderr


def test_a_path_that_is_no_trace_is_named(run, tmp_path):
    for name in ("shares", "repeats", "words", "text"):
        result = run(name, tmp_path)
        assert result.exit_code == 1
        assert "error[trace-not-found]" in result.stderr


def test_report_prints_the_path_of_the_page_and_keeps_what_is_not_its_own(run, mixtral, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    refused = run("report", mixtral.path, "-o", "mine")
    assert refused.exit_code == 1
    assert "error[output-exists]: mine: exists and is not a report" in refused.stderr
    monkeypatch.setattr(
        "moescope.reporting.writer._write", lambda results, folder: (folder / "index.html").write_text("page")
    )
    done = run("report", mixtral.path, "-o", "new")
    assert done.stdout == "new/index.html\n"


def test_claims_prints_each_answer_with_its_effects(run, mixtral):
    expected = claims(mixtral, ["wind"])
    result = run("claims", mixtral.path, "--word", "wind")
    assert result.exit_code == 0, result.output
    assert result.stdout == render(claims_table(expected), "text")
    for claim in expected:
        assert f"{claim.answer}: {claim.name}" in result.stdout
    rows = json.loads(run("claims", mixtral.path, "--word", "wind", "--format", "json").stdout)
    effects = [effect for claim in expected for effect in claim.effects]
    assert [row["what"] for row in rows if row["what"]] == [effect.what for effect in effects]
    for row, effect in zip([row for row in rows if row["what"]], effects, strict=True):
        assert row["value"] == pytest.approx(effect.value, rel=1e-5)
        assert row["q_value"] == (None if effect.q_value is None else pytest.approx(effect.q_value, rel=1e-5))


def test_claims_of_a_word_of_spaces_are_refused(run, mixtral):
    assert run("claims", mixtral.path, "--word", " ").exit_code == 2


def test_demo_uses_a_finished_trace_and_prints_the_claims(run, mixtral, tmp_path, monkeypatch):
    def write(results, folder):
        (folder / "index.html").write_text("page")
        (folder / "report.json").write_text(
            json.dumps({"claims": [asdict(claim) for claim in results.found["claims"]]})
        )

    monkeypatch.setattr("moescope.reporting.writer._write", write)
    shutil.copytree(mixtral.path, tmp_path / "demo" / "sample.moe")
    result = run("demo", "-o", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    page = tmp_path / "demo" / "report" / "index.html"
    assert page.is_file()
    assert result.stdout.splitlines()[-1] == f"report: {page}"
    for claim in json.loads((page.parent / "report.json").read_text())["claims"]:
        assert f"{claim['answer']:<16}  {claim['name']}" in result.stdout
    assert "is there and is used" in result.stderr


def test_demo_keeps_a_report_folder_that_is_not_one_before_it_records(run, tmp_path):
    (tmp_path / "demo" / "report").mkdir(parents=True)
    (tmp_path / "demo" / "report" / "mine").write_text("")
    result = run("demo", "-o", tmp_path / "demo")
    assert result.exit_code == 1
    assert "error[output-exists]" in result.stderr
    assert not (tmp_path / "demo" / "sample.moe").exists()


def test_one_document_of_one_domain_is_drawn_and_said_to_be_too_little(run, tmp_path) -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((2, 300, 8)), axis=2)[:, :, :2]
    trace = moescope.from_arrays(tmp_path / "t.moe", ids, num_experts=8, ranked=True)
    result = run("explain", trace.path, "--figures", tmp_path / "f")
    assert result.exit_code == 0, result.output
    assert "nothing is known of what explains the choice; that takes two documents." in result.stdout
    result = run("divergence", trace.path, "--figures", tmp_path / "g")
    assert result.exit_code == 0, result.output
    assert "two domains" not in result.stdout
    assert {path.stem for path in (tmp_path / "g").iterdir()} == {"divergence"}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("balance",), ["balance"]),
        (("coactivation",), ["coactivation"]),
        (("transitions",), ["transitions"]),
        (("divergence",), ["divergence", "domain_pairs"]),
        (("explain", "--permutations", "20"), ["explained", "explained_by_layer"]),
        (("locality",), ["excess", "lags"]),
    ],
)
def test_a_measure_is_drawn_beside_its_table_if_a_folder_is_given(run, mixtral, arguments, names, tmp_path) -> None:
    result = run(*arguments, mixtral.path, "--layers", "7,31", "--figures", tmp_path / "f")
    assert result.exit_code == 0, result.output
    assert "layer" in result.stdout
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == sorted(
        f"{name}.{ending}" for name in names for ending in ("pdf", "png", "svg")
    )
