"""Tables, figures and commands of two traces, of checkpoints and of segments."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from synthetic import make_part
from synthetic import make_trace as make_synthetic

import moescope
from moescope.cli import main
from moescope.reporting import figures
from moescope.reporting.formats import FORMATS, render
from moescope.reporting.subjects.compare import (
    MOST_TOKENS,
    agreement_table,
    changes_table,
    distances_table,
    kappa_text,
    tokens_table,
)
from moescope.reporting.subjects.consistency import consistency_table
from moescope.reporting.subjects.saturation import saturation_table
from moescope.trace import Layer, Trace

LAYERS = tuple(Layer(layer, 8, 2) for layer in (0, 3, 7, 15, 31))
DOMAINS = ("ArXiv", "50%_off & <b>\x1b", "Github")


def checkpoints(folder: Path, layers: tuple[Layer, ...]) -> list[Trace]:
    rng = np.random.default_rng(0)
    last = make_part(rng, layers, [40] * 15, domains=DOMAINS, window=64)
    traces = []
    for number, kept in enumerate((0.2, 0.6, 0.9, 1.0)):
        ids = {}
        for layer in layers:
            mine = np.asarray(last.expert_ids[layer.layer])
            dealt = mine[rng.permutation(len(mine))]
            ids[layer.layer] = np.where(rng.random((len(mine), 1)) < kept, mine, dealt)
        traces.append(make_synthetic(folder / f"{number}.moe", [replace(last, expert_ids=ids)], layers))
    return traces


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> list[Trace]:
    return checkpoints(tmp_path_factory.mktemp("checkpoints"), LAYERS)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> list[Trace]:
    return checkpoints(tmp_path_factory.mktemp("wide"), tuple(Layer(layer, 128, 8) for layer in range(20)))


@pytest.fixture(scope="module")
def comparison(traces):
    return moescope.compare(traces[2], traces[3])


@pytest.fixture(scope="module")
def saturation(traces):
    return moescope.saturation(traces, [10, 100, 1000, 5000])


@pytest.fixture(scope="module")
def consistency(traces):
    return moescope.consistency(traces[3], lengths=(4, 16))


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


def cells(table) -> list[list[str]]:
    return [[cell.value for cell in row.cells] for section in table.sections for row in section.rows]


def test_the_table_of_agreement_shows_all_domains_by_layer_and_the_domains_of_some(comparison):
    table = agreement_table(comparison, [0, 31])
    assert [section.title for section in table.sections] == ["all domains", "layer 0", "layer 31"]
    assert [row.label for row in table.sections[0].rows] == [f"layer {layer.layer}" for layer in LAYERS]
    assert [row.label for row in table.sections[1].rows] == ["ArXiv", "50%_off & <b>␛", "Github"]
    at = comparison.agreement.isel(domain=0).sel(layer=3, kind="first")
    row = table.sections[0].rows[1]
    assert row.cells[3].value == f"{100 * float(at['agreement']):.1f}"
    assert row.cells[4].value == f"{100 * float(at['agreement_null']):.1f}"
    assert row.cells[5].value == f"{float(at['kappa']):.2f}"
    changed = int((comparison.changes["change_q"].isel(domain=0).sel(layer=3) < 0.05).sum())
    assert row.cells[6].value == f"{changed} of 8"
    assert comparison.remarks[0] in table.notes
    assert len(table.frame) == 4 * len(LAYERS) * 2


def test_the_table_of_agreement_tells_of_gate_weights_where_there_are_some(tmp_path):
    part = make_part(np.random.default_rng(1), LAYERS[:1], [40] * 9, domains=DOMAINS, weights=True)
    trace = make_synthetic(tmp_path / "w.moe", [part], LAYERS[:1])
    table = agreement_table(moescope.compare(trace, trace), [0])
    assert table.columns[6:9] == ("on B's experts", "margin, same first", "margin, other first")
    assert [cell.value for cell in table.sections[0].rows[0].cells[6:9:2]] == ["100", "–"]
    assert (table.frame["kept_percent"] == 100).all()


def test_a_kappa_of_one_is_printed_only_if_it_is_one():
    printed = [kappa_text(value, 3) for value in (1.0, 0.9998, 0.5, -0.02, float("nan"))]
    assert printed == ["1.000", ">0.999", "0.500", "−0.020", "–"]


def test_the_table_of_changes_holds_every_expert_and_its_frame_every_domain(comparison):
    table = changes_table(comparison, [7])
    assert [row.label for row in table.sections[0].rows] == [str(expert) for expert in range(8)]
    at = comparison.changes.isel(domain=0).sel(layer=7, expert=2)
    row = table.sections[0].rows[2]
    assert row.cells[2].value == f"{100 * float(at['change']):+.2f}".replace("-", "−")
    assert row.cells[2].mark == ("*" if float(at["change_q"]) < 0.05 else "")
    assert len(table.frame) == 4 * len(LAYERS) * 8
    assert np.allclose(table.frame["change_points"], table.frame["share_b_percent"] - table.frame["share_a_percent"])


def test_the_table_of_tokens_has_the_lowest_first_and_its_frame_all(comparison):
    table = tokens_table(comparison)
    assert table.sections[0].rows[0].label == f"{int(comparison.tokens['token_id'][0])} " + str(
        comparison.tokens["text"].values[0]
    )
    assert len(table.sections[0].rows) == MOST_TOKENS
    assert len(table.frame) == comparison.tokens.sizes["token_id"] > MOST_TOKENS


def test_the_table_of_saturation_has_a_row_a_checkpoint(saturation):
    table = saturation_table(saturation)
    assert [row.label for row in table.sections[0].rows] == ["10", "100", "1000"]
    at = saturation.isel(domain=0).sel(kind="set", layer=31)
    assert [row.cells[-1].value for row in table.sections[0].rows] == [
        f"{100 * float(value):.1f}" for value in at["agreement"]
    ]
    assert "3.moe (5000)" in table.title
    assert len(table.frame) == 3 * 4 * len(LAYERS) * 2
    assert table.frame["step"].unique().tolist() == [10, 100, 1000]
    assert (table.frame["tokens"][table.frame["domain"] == "(all)"] == 600).all()


def test_the_table_of_consistency_has_a_section_a_length_and_all_layers_last(consistency):
    table = consistency_table(consistency, [0, 31], "Github")
    assert [section.title for section in table.sections] == [
        "segments of 4 tokens (5 documents)",
        "segments of 16 tokens (5 documents)",
    ]
    assert [row.label for row in table.sections[0].rows] == ["layer 0", "layer 31", "all layers"]
    at = consistency.sel(domain="Github", length=16)
    assert table.sections[1].rows[2].cells[0].value == f"{100 * float(at['model_srp']):.1f}"
    assert table.sections[1].rows[1].cells[1].value == f"{100 * float(at['srp_null'].sel(layer=31)):.1f}"
    assert len(table.frame) == 4 * 2 * (len(LAYERS) + 1)


@pytest.mark.parametrize("format", FORMATS)
def test_every_table_is_written_in_every_format(comparison, saturation, consistency, traces, tmp_path, format):
    apart = moescope.compare(
        traces[0], make_synthetic(tmp_path / "o.moe", [make_part(np.random.default_rng(9), LAYERS, [40] * 9)], LAYERS)
    )
    for table in (
        agreement_table(comparison, [0]),
        changes_table(comparison, [0]),
        tokens_table(comparison),
        saturation_table(saturation, "first"),
        consistency_table(consistency, [0]),
        distances_table(apart, [0, 31]),
    ):
        written = render(table, format)
        if format in ("text", "latex"):  # data keep names as they are
            assert "\x1b" not in written
        if format == "csv":
            assert len(pd.read_csv(io.StringIO(written))) == len(table.frame)
        if format == "json":
            assert len(json.loads(written)) == len(table.frame)


def test_the_figure_of_agreement_draws_every_domain_and_all_together(comparison):
    figure = figures.agreement.draw_agreement(comparison.agreement)
    assert [axes.get_title("left") for axes in figure.axes] == ["First or second choice", "First choice"]
    for axes, kind in zip(figure.axes, ("set", "first"), strict=True):
        lines = {line.get_label(): line.get_ydata() for line in axes.lines}
        assert list(lines) == ["ArXiv", "50%_off & <b>␛", "Github", "all domains"]
        for number, name in enumerate(("all domains", "ArXiv")):
            expected = 100 * comparison.agreement["agreement"].isel(domain=number).sel(kind=kind)
            assert np.allclose(lines[name], expected)
        assert axes.get_ylim() == (0, 100)


def test_traces_that_are_nearly_the_same_are_drawn_near_the_top(traces):
    found = moescope.compare(traces[3], traces[3])
    figure = figures.agreement.draw_agreement(
        found.agreement.assign(agreement_low=found.agreement["agreement_low"] * 0 + 0.99)
    )
    assert figure.axes[0].get_ylim() == (98, 100)
    assert "popularity" not in str([text.get_text() for text in figure.legends[0].get_texts()])


@pytest.mark.parametrize("name", ["traces", "wide"])
def test_the_figure_of_saturation_draws_a_line_a_layer(request, name):
    found = moescope.saturation(request.getfixturevalue(name), [10, 100, 1000, 5000])
    figure = figures.saturation.draw_saturation(found)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines) == [f"layer {layer}" for layer in found["layer"].values]
    last = found["layer"].values[-1]
    expected = 100 * found["agreement"].isel(domain=0).sel(kind="set", layer=last)
    assert np.allclose(lines[f"layer {last}"].get_ydata(), expected)
    assert lines[f"layer {last}"].get_xdata().tolist() == [10, 100, 1000]
    assert figure.axes[0].get_xscale() == "log"
    named = [text.get_text() for text in figure.axes[1].texts if text.get_text().startswith("layer")]
    assert len(named) == (len(found["layer"]) if name == "traces" else 0)
    assert len(figure.axes) == (2 if name == "traces" else 3)  # many layers: a scale of colours


def test_names_of_lines_that_end_together_are_moved_apart():
    from moescope.reporting.figures.saturation import _apart

    placed = _apart(np.array([50.0, 50.0, 90.0, 99.0, 99.5]), 6)
    assert (np.diff(np.sort(placed)) >= 6 - 1e-9).all()
    assert placed.max() <= 100
    assert np.argsort(placed, kind="stable").tolist() == [0, 1, 2, 3, 4]


def test_the_figure_of_consistency_has_a_panel_a_length(consistency):
    figure = figures.consistency.draw_consistency(consistency)
    assert [axes.get_title("left") for axes in figure.axes] == ["4 tokens", "16 tokens"]
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[1].lines}
    at = consistency.isel(domain=0).sel(length=16)
    for label, name in (("measured", "srp"), ("random order", "srp_null"), ("uniform", "srp_uniform")):
        assert np.allclose(lines[label], 100 * at[name])


def test_compare_prints_the_table_of_agreement_and_draws_it(run, traces, comparison, tmp_path):
    result = run("compare", traces[2].path, traces[3].path, "--figures", tmp_path / "figures")
    assert result.exit_code == 0, result.output
    assert result.stdout == render(agreement_table(comparison, [0, 7, 31]), "text")
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == [
        f"agreement.{ending}" for ending in ("pdf", "png", "svg")
    ]


@pytest.mark.parametrize("show", ["changes", "tokens"])
def test_compare_shows_what_is_asked_for(run, traces, show):
    result = run("compare", traces[2].path, traces[3].path, "--show", show, "--layers", "7", "--format", "csv")
    found = moescope.compare(traces[2], traces[3], [7])
    expected = changes_table(found, [7]) if show == "changes" else tokens_table(found)
    assert result.stdout == render(expected, "csv")


def test_compare_says_that_unlike_traces_are_compared_by_distribution(run, traces, tmp_path):
    part = make_part(np.random.default_rng(9), LAYERS, [40] * 9)
    other = make_synthetic(tmp_path / "o.moe", [part], LAYERS)
    result = run("compare", traces[0].path, other.path)
    assert result.exit_code == 0
    assert "Only distributions are compared, not tokens" in result.stdout
    assert "layer 31" in result.stdout


def test_compare_refuses_layers_that_are_not_alike(run, traces, wide):
    result = run("compare", traces[0].path, wide[0].path, "--layers", "3")
    assert result.exit_code == 2
    assert "layer 3 has (experts, null experts, top-k) (8, 0, 2) and (128, 0, 8)" in result.stderr


def test_saturation_prints_its_table_and_steps_must_fit(run, traces, saturation):
    paths = [trace.path for trace in traces]
    result = run("saturation", *paths, "--steps", "10,100,1000,5000", "--first")
    assert result.stdout == render(saturation_table(saturation, "first"), "text")
    for steps in ("1,2", "4,3,2,1", "a,b,c,d", "1,2,3,nan"):
        wrong = run("saturation", *paths, "--steps", steps)
        assert wrong.exit_code == 2
        assert "--steps" in wrong.stderr
    assert run("saturation", paths[0]).exit_code == 2


def test_consistency_prints_its_table(run, traces):
    result = run("consistency", traces[3].path, "--layers", "0,31", "--domain", "Github")
    found = moescope.consistency(traces[3])
    assert result.stdout == render(consistency_table(found, [0, 31], "Github"), "text")
    unknown = run("consistency", traces[3].path, "--domain", "Law")
    assert unknown.exit_code == 1
    assert "error[no-such-domain]" in unknown.stderr
