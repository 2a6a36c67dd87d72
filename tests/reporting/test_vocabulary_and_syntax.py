"""Commands, tables and figures of vocabulary specialization and word classes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from synthetic import make_counts, make_part
from synthetic import make_trace as make_synthetic

import moescope
from moescope.cli import main
from moescope.reporting import figures
from moescope.reporting.formats import FORMATS, render
from moescope.reporting.subjects import vocabulary as tables
from moescope.reporting.subjects.syntax import word_class_experts_table, word_classes_table
from moescope.trace import Layer, Trace, Vocabulary


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def vocabulary(mixtral: Trace):
    pieces = mixtral.vocabulary.pieces
    tokens = [token for token, piece in pieces.items() if piece in (b" self,", b" model")]
    return moescope.vocabulary(mixtral, permutations=9, tokens=tokens)


@pytest.fixture(scope="module")
def syntax(mixtral: Trace):
    return moescope.syntax(mixtral)


def mesh_of(axes) -> np.ndarray:
    return np.ma.filled(axes.collections[0].get_array().astype(float), np.nan)


@pytest.mark.parametrize("format", ["text", "latex"])
@pytest.mark.parametrize("show", ["every expert", "some experts", "a token"])
def test_vocabulary_prints_the_layers_and_what_is_asked_for(run, mixtral, show, format) -> None:
    pieces = mixtral.vocabulary
    token = next(token for token, piece in pieces.pieces.items() if piece == b" model")
    result = moescope.vocabulary(mixtral, [0, 31], top=10, permutations=9, tokens=[token])
    layers = [0, 31]
    arguments, table = {
        "every expert": ((), tables.expert_tokens_table(result, layers, pieces, "input", 5)),
        "some experts": (
            ("--expert", "3,1", "--by", "next"),
            tables.expert_table(result, layers, pieces, [1, 3], "next", 10),
        ),
        "a token": (("--token", "model"), tables.token_experts_table(result, layers, pieces, "input")),
    }[show]
    found = run("vocabulary", mixtral.path, "--layers", "0,31", "--permutations", "9", "--format", format, *arguments)
    assert found.exit_code == 0, found.output
    assert found.stderr.startswith("warning: with 9 permutations no p-value is below 0.1")
    first = tables.vocabulary_table(result, layers, pieces)
    assert found.stdout == "\n".join(render(each, format) for each in (first, table))


def test_csv_and_json_of_vocabulary_hold_layers_experts_and_tokens_once(run, mixtral, vocabulary) -> None:
    arguments = ("vocabulary", mixtral.path, "--layers", "7", "--permutations", "9", "--top", "3", "--token", "model")
    rows = list(csv.DictReader(io.StringIO(run(*arguments, "--format", "csv").stdout)))
    assert len(rows) == len(json.loads(run(*arguments, "--format", "json").stdout))
    of = {what: [row for row in rows if row["what"] == what] for what in {row["what"] for row in rows}}
    assert {what: len(kept) for what, kept in of.items()} == {
        "layer": 2,
        "expert": 2 * 8,
        "token of an expert": 2 * 8 * 3,
        "expert of a token": 2 * 8,
    }
    at = vocabulary.sel(layer=7, by="next")
    row = next(row for row in of["layer"] if row["by"] == "next")
    assert float(row["specialization_percent"]) == pytest.approx(100 * float(at["specialization"]), rel=1e-5)
    assert float(row["specialization_null_percent"]) == pytest.approx(100 * float(at["specialization_null"]), rel=1e-5)
    row = next(
        row for row in of["token of an expert"] if (row["by"], row["expert"], row["place"]) == ("next", "6", "2")
    )
    best = at.sel(expert=6).isel(place=1)
    assert int(row["token_id"]) == int(best["top_token"])
    assert row["text"] == mixtral.vocabulary.piece(int(best["top_token"])).decode().replace("\n", "↵")
    assert (int(row["top_count"]), int(row["top_tokens"])) == (int(best["top_count"]), int(best["top_tokens"]))
    row = next(row for row in of["expert of a token"] if (row["by"], row["expert"]) == ("next", "6"))
    asked = at.sel(token=int(row["token_id"]), expert=6)
    assert float(row["share_percent"]) == pytest.approx(100 * float(asked["share"]), rel=1e-5)


def test_syntax_prints_its_tables_and_the_frame_a_row_a_class_and_layer(run, mixtral, syntax) -> None:
    result = moescope.syntax(mixtral, [0, 31])
    expected = [word_classes_table(result, [0, 31]), word_class_experts_table(result, [0, 31])]
    for format in ("text", "latex"):
        found = run("syntax", mixtral.path, "--layers", "0,31", "--format", format)
        assert (found.exit_code, found.stderr) == (0, "")
        assert found.stdout == "\n".join(render(table, format) for table in expected)
    rows = list(csv.DictReader(io.StringIO(run("syntax", mixtral.path, "--layer", "7", "--format", "csv").stdout)))
    known = syntax["jsd_all"].sel(layer=7).notnull()
    assert [row["word_class"] for row in rows] == syntax["word_class"].values[known].tolist()
    at = syntax.sel(layer=7, word_class="keyword")
    row = next(row for row in rows if row["word_class"] == "keyword")
    assert float(row["jsd_bits"]) == pytest.approx(float(at["jsd"]), rel=1e-5)
    assert int(row["top_expert"]) == int(at["top_expert"])
    assert float(row["top_share_percent"]) == pytest.approx(100 * float(at["top_share"]), rel=1e-5)


def test_text_that_a_corpus_made_up_is_harmless_in_every_format(run, make_trace, tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "h.moe", hostile=True, documents_per_domain=12, layers=(0,))
    pieces = trace.vocabulary
    hostile = [
        token for token, piece in pieces.pieces.items() if b"\x1b" in piece or piece.startswith("\u202e".encode())
    ]
    result = moescope.vocabulary(trace, top=200, permutations=1, tokens=hostile)
    shown = [
        tables.vocabulary_table(result, [0], pieces),
        tables.expert_tokens_table(result, [0], pieces, top=200),
        tables.expert_table(result, [0], pieces, range(8), top=200),
        tables.token_experts_table(result, [0], pieces),
    ]
    for table in shown:
        for format in FORMATS:
            text = render(table, format)
            assert not set(text) & set("\x1b\x00\u202e\u202c\u2028"), (table.name, format)
    assert "␛[31mred" in render(shown[3], "text")
    assert "␛" in render(shown[0], "csv")
    latex = render(shown[2], "latex")
    assert r"\textless{}/script\textgreater{}" in latex
    printed = run("vocabulary", trace.path, "--top", "200", "--permutations", "1", "--expert", "0,1,2,3,4,5,6,7")
    assert not set(printed.stdout) & set("\x1b\x00\u202e\u202c\u2028")


def test_bytes_that_are_no_text_look_different_and_long_tokens_are_cut(mixtral) -> None:
    pieces = Vocabulary.from_pieces([b"\xe2", b"\xc3", b"x" * 40])
    assert [tables._quoted(pieces, token) for token in range(3)] == ["“\\xe2”", "“\\xc3”", f"“{'x' * 13}…”"]


def test_the_figure_of_vocabulary_draws_values_null_and_experts_in_order(vocabulary, wide) -> None:
    figure = figures.vocabulary.draw_vocabulary(vocabulary)
    for column, by in enumerate(("input", "next")):
        at = vocabulary.sel(by=by)
        lines = {str(line.get_label()): line.get_ydata() for line in figure.axes[column].lines}
        drawn = {"specialization": "specialization", "null": "specialization_null", "popularity": "popularity"}
        for label, name in drawn.items():
            np.testing.assert_allclose(lines[label], 100 * at[name])
        value = 100 * at["expert_specialization"].transpose("expert", "layer").values
        expected = -np.sort(-value, axis=0)
        np.testing.assert_allclose(mesh_of(figure.axes[2 + column]).reshape(expected.shape), expected)
        numbers = [text.get_text() for text in figure.axes[2 + column].texts]
        best = np.nanargmax(value, axis=0)
        assert numbers[: len(best)] == [str(expert) for expert in best]
    figure = figures.vocabulary.draw_vocabulary(moescope.vocabulary(wide, permutations=1, min_count=2))
    assert mesh_of(figure.axes[2]).size == 128 * 3
    assert not figure.axes[2].texts


def test_the_map_of_word_classes_draws_each_divergence_and_leaves_out_classes_without_a_token(syntax) -> None:
    figure = figures.divergence.draw_word_classes(syntax)
    kept = syntax.sel(word_class=syntax["tokens"].values > 0)
    assert 3 < kept.sizes["word_class"] <= 8
    expected = kept["jsd"].transpose("word_class", "layer").values
    np.testing.assert_allclose(mesh_of(figure.axes[0]).reshape(expected.shape), expected)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == kept["word_class"].values.tolist()
    dots = sum("•" in text.get_text() for text in figure.axes[0].texts)
    assert dots == int((kept["jsd_q"] < 0.05).sum())


def test_figures_are_written_and_the_same_bytes_every_time(run, mixtral, vocabulary, syntax, tmp_path: Path) -> None:
    for draw, data in (
        (figures.vocabulary.draw_vocabulary, vocabulary),
        (figures.divergence.draw_word_classes, syntax),
    ):
        for name in ("a", "b"):
            figures.style.save(draw(data), tmp_path, name)
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert run("vocabulary", mixtral.path, "--permutations", "1", "--figures", tmp_path / "f").exit_code == 0
    assert run("syntax", mixtral.path, "--figures", tmp_path / "f").exit_code == 0
    assert {"vocabulary.pdf", "word_classes.png"} < {path.name for path in (tmp_path / "f").iterdir()}


def test_what_cannot_be_told_or_is_not_there_is_refused_in_one_line(run, mixtral, tmp_path: Path) -> None:
    make_counts(tmp_path / "c.moe", {g: {0: {g: 6, 7: 1}} for g in range(4)})
    part = make_part(np.random.default_rng(0), (Layer(0, 8, 2),), [40] * 4)
    make_synthetic(tmp_path / "i.moe", [part], (Layer(0, 8, 2),), token_ids=False)
    make_synthetic(tmp_path / "u.moe", [part], (Layer(0, 8, 2, ranked=False),))
    for command in ("vocabulary", "syntax"):
        for name, words in (("c.moe", "holds counts"), ("i.moe", "no token ids"), ("u.moe", "--choice all")):
            refused = run(command, tmp_path / name)
            assert (refused.exit_code, refused.output.count("error[not-recorded]")) == (1, 1), (command, name)
            assert words in refused.output
        assert run(command, tmp_path / "u.moe", "--choice", "all").exit_code == 0
    refused = run("vocabulary", mixtral.path, "--token", "\x1bno such token")
    assert refused.exit_code == 2
    assert "is not one token of the trace's vocabulary" in refused.output
    assert "\x1b" not in refused.output
    assert "no expert 8" in run("vocabulary", mixtral.path, "--expert", "8").output
