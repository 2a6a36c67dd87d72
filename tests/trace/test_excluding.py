"""Documents and tokens that are left out, when a trace is opened and when a log is imported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import make_counts, make_part, make_trace, without_tokens

import moescope
from moescope.cli import main
from moescope.errors import ImportMalformed, NoSuchDocument, NotRecorded
from moescope.trace import Layer, Trace, open_trace
from moescope.trace.excluding import Exclusion

LAYERS = (Layer(0, 8, 2), Layer(3, 16, 3))
LENGTHS = [30, 41, 9, 25, 17, 33]

MEASURES = {
    "shares": moescope.shares,
    "repeats": moescope.repeats,
    "locality": lambda trace: moescope.locality(trace),
    "balance": moescope.balance,
    "transitions": moescope.transitions,
    "vocabulary": lambda trace: moescope.vocabulary(trace, permutations=2),
    "cache": lambda trace: moescope.cache(trace, sizes=[3, 6]),
}


def two_parts(path: Path, seed: int) -> tuple[Trace, Trace, list[bool]]:
    """A trace of two parts; one without tokens 20 to 44 and document 9, written; and which tokens that one has."""
    rng = np.random.default_rng(seed)
    parts = [make_part(rng, LAYERS, LENGTHS, first_document=6 * n) for n in range(2)]
    gone, kept = [], []
    for n, part in enumerate(parts):
        place = np.arange(part.num_tokens) + n * sum(LENGTHS)
        mask = (place >= 20) & (place < 45) | (part.document == 9)
        kept += (~mask).tolist()
        gone.append(without_tokens(part, mask))
    return make_trace(path / "whole.moe", parts, LAYERS), make_trace(path / "left.moe", gone, LAYERS), kept


@pytest.mark.parametrize("name", MEASURES)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1))
def test_a_measure_of_what_is_left_is_that_of_a_trace_that_never_had_the_rest(tmp_path_factory, name, seed):
    whole, left, kept = two_parts(tmp_path_factory.mktemp("exclude"), seed)
    view = open_trace(whole.path, exclude=["tokens:20-44", "documents:9"])
    assert view.num_tokens == left.num_tokens == sum(kept)
    assert view.domain_documents == left.domain_documents
    assert view.document_numbers.tolist() == left.document_numbers.tolist()
    found, expected = (MEASURES[name](trace) for trace in (view, left))
    xr.testing.assert_identical(found.drop_attrs(), expected.drop_attrs())


def test_the_items_are_read_or_refused() -> None:
    assert Exclusion.parse(["documents:3,17-20", "tokens:0-1"]) == Exclusion((range(3, 4), range(17, 21)), (range(2),))
    for item in ("", "rows:1", "documents:", "documents:-1", "tokens:1-", "tokens:2-1", "tokens:1 ,2", "documents:٣"):
        with pytest.raises(ValueError, match=r"expected documents:LIST or tokens:LIST|end before they start"):
            Exclusion.parse([item])


def test_what_is_not_there_is_not_left_out_in_silence(tmp_path: Path) -> None:
    trace, _, _ = two_parts(tmp_path, 0)
    for item in ("documents:12", "documents:0,50-60", "tokens:310"):
        with pytest.raises(NoSuchDocument, match=r"has no (document|token) (12|50|310) to leave out"):
            open_trace(trace.path, exclude=[item])
    with pytest.raises(NoSuchDocument, match="nothing is left without documents:0-11"):
        open_trace(trace.path, exclude=["documents:0-11"])
    result = CliRunner().invoke(main, ["shares", str(trace.path), "--exclude", "rows:3"])
    assert result.exit_code == 2
    assert "tokens:0-8191" in result.stderr


def test_documents_of_counts_can_be_left_out_and_tokens_cannot(tmp_path: Path) -> None:
    loads = {g: {0: dict.fromkeys(range(4), 1 + g)} for g in range(3)}
    trace = make_counts(tmp_path / "c.moe", loads)
    view = open_trace(trace.path, exclude=["documents:0,2"])
    assert view.num_documents == 1
    assert moescope.tally(view).data["loads"].sum().item() == 8
    with pytest.raises(NotRecorded, match="holds counts"):
        open_trace(trace.path, exclude=["tokens:0"])


def test_tables_and_provenance_say_what_was_left_out(tmp_path: Path) -> None:
    trace, _, _ = two_parts(tmp_path, 0)
    result = CliRunner().invoke(main, ["repeats", str(trace.path), "--exclude", "documents:9", "--exclude", "tokens:3"])
    assert result.exit_code == 0, result.stderr
    assert "Left out: documents:9, tokens:3." in result.stdout
    view = open_trace(trace.path, exclude=["documents:9"])
    assert view.header.run["exclude"] == ["documents:9"]
    assert "exclude" not in open_trace(trace.path).header.run


def test_the_remaining_rows_can_be_exported(tmp_path: Path) -> None:
    trace, *_ = two_parts(tmp_path, 0)
    out = tmp_path / "out.jsonl"
    arguments = ["export", "jsonl", str(trace.path), "-o", str(out), "--exclude", "tokens:20-44,214-238"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 2 * (2 * sum(LENGTHS) - 50)


def test_sql_refuses_a_trace_without_some_tokens_rather_than_answer_of_all(tmp_path: Path) -> None:
    trace, *_ = two_parts(tmp_path, 0)
    with pytest.raises(ValueError, match="leave rows out by WHERE"):
        moescope.sql(open_trace(trace.path, exclude=["tokens:3"]), "SELECT count(*) FROM tokens")


def log(path: Path) -> Path:
    """A log of three documents, the first 1,500 tokens of which are a warm-up."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for t in range(3000):
            experts = [3, 4] if t < 1500 else rng.permutation(8)[:2].tolist()
            row = {"request_id": f"r{t // 1000}", "token": t % 1000, "layer": 0, "experts": experts}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.filterwarnings("ignore:the order of")
def test_a_warm_up_is_left_out_of_an_import_as_its_warning_says(tmp_path: Path) -> None:
    file = log(tmp_path / "log.jsonl")
    with pytest.warns(UserWarning, match="is it a warm-up"):
        whole = moescope.import_trace("jsonl", [file], tmp_path / "whole.moe", num_experts=8)
    (item,) = [word for word in whole.summary["warnings"][0].split() if word.startswith("tokens:")]
    assert item == "tokens:0-1499"
    view = open_trace(whole.path, exclude=[item])
    made = moescope.import_trace("jsonl", [file], tmp_path / "made.moe", num_experts=8, exclude=[item])
    assert not [warning for warning in made.summary["warnings"] if "warm-up" in warning]
    assert made.num_tokens == view.num_tokens == 1500
    assert made.header.run["exclude"] == ["tokens:0-1499"]
    repeats = [moescope.repeats(trace).drop_attrs() for trace in (view, made)]
    xr.testing.assert_identical(*repeats)


@pytest.mark.filterwarnings("ignore:the order of")
def test_an_import_without_some_documents_begins_a_sequence_behind_a_gap(tmp_path: Path) -> None:
    file = log(tmp_path / "log.jsonl")
    exclude = ["documents:0", "tokens:1100-1599"]
    made = moescope.import_trace("jsonl", [file], tmp_path / "made.moe", num_experts=8, exclude=exclude)
    (part,) = made.iter_parts()
    assert made.num_documents == 2
    assert np.diff(part.sequence_starts()).tolist() == [100, 400, 1000]
    with pytest.raises(ImportMalformed, match="has no document 3 to leave out"):
        moescope.import_trace("jsonl", [file], tmp_path / "x.moe", num_experts=8, exclude=["documents:3"])
    with pytest.raises(ImportMalformed, match="nothing is left without documents:0-2"):
        moescope.import_trace("jsonl", [file], tmp_path / "x.moe", num_experts=8, exclude=["documents:0-2"])
    assert not (tmp_path / "x.moe").exists()
