"""The report as a folder: whole or not there, and nothing that is not ours is lost."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

import moescope
from moescope.errors import NoSuchLayer, OutputExists, TraceNotFound
from moescope.measures.claims import claims
from moescope.reporting import writer
from moescope.reporting.page import MOST_DATA_BYTES
from moescope.reporting.writer import check_output, report

FIGURES = (
    *("figure7-shares", "figure8-tokens", "figure9-choices", "figure10-repeats", "divergence"),
    *("explained", "explained-by-layer", "repeats-above-nulls", "repeats-by-distance", "consistency"),
    *("balance", "coactivation", "transitions", "domain-pairs"),
    *("vocabulary", "word-classes", "distinct-experts", "cache", "prefetch", "parallel"),
)
TABLES = (
    *("claims", "shares", "repeats", "words", "divergence", "explain", "locality", "lags", "runs", "consistency"),
    *("balance", "batches", "weights", "coactivation", "information_between_layers", "transitions", "paths"),
    *("domain_pairs", "vocabulary", "expert_tokens", "word_classes", "word_class_experts"),
    *(
        "distinct",
        "cache",
        "cache_layers",
        "cache_domains",
        "prefetch",
        "prefetch_by_layer",
        "parallel",
        "drops",
        "drop_places",
        "reach",
        "foreign",
    ),
)


@pytest.fixture(scope="module")
def written(mixtral, tmp_path_factory):
    return report(mixtral, tmp_path_factory.mktemp("r") / "deep" / "report", layers=[0, 7], words=["self"])


@pytest.fixture
def earlier(tmp_path):
    """A small folder that looks like an earlier report."""
    out = tmp_path / "report"
    out.mkdir()
    (out / "index.html").write_text("old")
    (out / "report.json").write_text(json.dumps({"format": "moescope-report", "files": ["index.html"]}))
    return out


def test_a_report_is_a_page_with_every_figure_and_table_in_every_format(written):
    folder = written.parent
    expected = {"index.html", "report.json"}
    expected |= {f"figures/{name}.{ending}" for name in FIGURES for ending in ("png", "svg", "pdf", "csv")}
    expected |= {f"tables/{name}.{ending}" for name in TABLES for ending in ("csv", "tex")}
    present = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert present == expected
    assert [path.name for path in folder.parent.iterdir()] == ["report"]


def test_the_report_answers_the_claims_for_reading_by_machine(written, mixtral):
    answered = json.loads((written.parent / "report.json").read_text())["claims"]
    expected = claims(mixtral, ["self"])
    assert answered == json.loads(json.dumps([asdict(claim) for claim in expected]))
    effects = [effect for claim in answered for effect in claim["effects"]]
    assert len(effects) > 20
    table = (written.parent / "tables" / "claims.csv").read_text().splitlines()
    assert len(table) == 1 + len(effects) + sum(not claim["effects"] for claim in answered)


def test_the_layers_asked_for_are_those_of_tables_and_panels(written):
    text = (written.parent / "tables" / "repeats.csv").read_text()
    assert {line.split(",")[1] for line in text.splitlines()[1:]} == {"0", "7"}
    every = (written.parent / "figures" / "figure10-repeats.csv").read_text()
    assert {line.split(",")[1] for line in every.splitlines()[1:]} == {"0", "3", "7", "15", "23", "31"}


def test_the_function_can_be_called_by_its_public_name_again_and_again(mixtral, earlier, monkeypatch):
    monkeypatch.setattr(writer, "_write", lambda results, folder: (folder / "index.html").write_text("new"))
    for _ in range(2):
        assert moescope.report(mixtral, earlier, force=True) == earlier / "index.html"


def test_a_report_of_128_experts_is_written(wide, tmp_path):
    page = report(wide.path, tmp_path / "wide")
    text = page.read_text("utf-8")
    assert "128 experts, clustered" in text
    assert page.stat().st_size < 6_000_000
    large = (tmp_path / "wide" / "figures" / "transitions.csv").stat().st_size
    assert large > MOST_DATA_BYTES  # so it is beside the page, not in it
    assert 'href="figures/transitions.csv"' in text


def test_an_earlier_report_is_replaced(mixtral, earlier, monkeypatch):
    monkeypatch.setattr(writer, "_write", lambda results, folder: (folder / "index.html").write_text("new"))
    assert report(mixtral, earlier).read_text() == "new"
    assert [path.name for path in earlier.parent.iterdir()] == ["report"]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda out: out.write_text("mine"), "exists and is not a folder"),
        (lambda out: (out.mkdir(), (out / "thesis.tex").write_text("mine")), "exists and is not a report"),
        (lambda out: (out.mkdir(), (out / "report.json").write_text("[]")), "exists and is not a report"),
    ],
)
def test_what_is_not_a_report_is_kept(mixtral, tmp_path, make, problem):
    out = tmp_path / "out"
    make(out)
    with pytest.raises(OutputExists, match=problem):
        report(mixtral, out)
    assert "mine" in "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file()) or out.is_dir()


def test_a_report_with_a_file_of_somebody_else_in_it_is_kept(mixtral, earlier):
    (earlier / "notes.md").write_text("mine")
    with pytest.raises(OutputExists, match=r"notes\.md in it is not of it"):
        report(mixtral, earlier)
    assert (earlier / "notes.md").read_text() == "mine"


def test_force_replaces_it(mixtral, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    monkeypatch.setattr(writer, "_write", lambda results, folder: (folder / "index.html").write_text("new"))
    report(mixtral, tmp_path / "out", force=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.html"]


def test_not_even_force_replaces_the_current_folder_or_the_trace(mixtral, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputExists, match="is the current folder or holds it"):
        check_output(tmp_path.parent, force=True)
    for out in (mixtral.path, mixtral.path / "report", mixtral.path.parent):
        with pytest.raises(OutputExists, match="is in the trace"):
            report(mixtral, out, force=True)
    assert not mixtral.verify()


def test_a_failure_half_way_leaves_the_earlier_report_and_nothing_else(mixtral, earlier, monkeypatch):
    def fail(results, folder):
        (folder / "index.html").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write", fail)
    with pytest.raises(OSError, match="No space left"):
        report(mixtral, earlier)
    assert (earlier / "index.html").read_text() == "old"
    assert [path.name for path in earlier.parent.iterdir()] == ["report"]


def test_the_output_is_checked_before_anything_is_measured(mixtral, tmp_path, monkeypatch):
    monkeypatch.setattr("moescope.reporting.results.gather", lambda *a: pytest.fail("measured first"))
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputExists):
        report(mixtral, tmp_path / "out")


def test_a_trace_or_a_layer_that_is_not_there_is_named(mixtral, tmp_path):
    with pytest.raises(TraceNotFound):
        report(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(NoSuchLayer, match="layer 5 was not recorded"):
        report(mixtral, tmp_path / "out", layers=[5])
    assert not (tmp_path / "out").exists()


def test_a_trace_of_one_domain_one_layer_and_short_documents_gets_its_report(make_trace, tmp_path):
    trace = make_trace(
        tmp_path / "t.moe", num_experts=4, top_k=1, layers=(2,), domains=("only",), documents_per_domain=1, tokens=3
    )
    page = report(trace, tmp_path / "report")
    assert "Not enough data" in page.read_text("utf-8")
