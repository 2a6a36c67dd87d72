"""Commands, tables and figures of load balance, co-activation and transitions."""

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
from moescope.reporting.figures.joint import order_of_pairs, order_of_rows
from moescope.reporting.formats import render
from moescope.reporting.subjects.balance import balance_tables
from moescope.reporting.subjects.coactivation import coactivation_table
from moescope.reporting.subjects.transitions import transitions_tables
from moescope.trace import Layer


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def balance(mixtral):
    return moescope.balance(mixtral)


@pytest.fixture(scope="module")
def coactivation(mixtral):
    return moescope.coactivation(mixtral)


@pytest.fixture(scope="module")
def transitions(mixtral):
    return moescope.transitions(mixtral)


def mesh_of(axes) -> np.ndarray:
    return np.ma.filled(axes.collections[0].get_array().astype(float), np.nan)


@pytest.mark.parametrize(
    ("command", "tables_of"),
    [
        ("balance", lambda trace: list(balance_tables(moescope.balance(trace, [0, 31]), [0, 31]))),
        ("coactivation", lambda trace: [coactivation_table(moescope.coactivation(trace, [0, 31]), [0, 31])]),
        ("transitions", lambda trace: list(transitions_tables(moescope.transitions(trace, [0, 31])))),
    ],
)
def test_a_command_prints_its_tables_and_as_csv_and_json_everything(run, mixtral, command, tables_of) -> None:
    tables = tables_of(mixtral)
    arguments = (command, mixtral.path, "--layers", "0,31")
    for format in ("text", "latex"):
        result = run(*arguments, "--format", format)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout == "\n".join(render(table, format) for table in tables)
    rows = list(csv.DictReader(io.StringIO(run(*arguments, "--format", "csv").stdout)))
    assert len(rows) == len(json.loads(run(*arguments, "--format", "json").stdout)) == len(tables[0].frame)


def test_the_frame_of_balance_holds_each_value_once(balance, mixtral) -> None:
    frame = next(balance_tables(balance, [0, 31])).frame
    loads = frame[(frame["what"] == "loads") & (frame["layer"] == 31)].set_index("domain")
    assert loads.index.tolist() == ["(all)", *mixtral.domains]
    np.testing.assert_allclose(loads["gini"], balance["gini"].sel(layer=31))
    batches = frame[frame["what"] == "loads within a batch"].set_index(["layer", "batch"])
    expected = balance.sel(layer=31, batch=16)
    for name in ("batch_imbalance", "batch_imbalance_low", "batches"):
        assert batches.loc[(31, 16), name] == expected[name]
    for name, quantile in (("batch_imbalance_quantile", 0.95), ("batch_imbalance_null_quantile", 0.05)):
        assert batches.loc[(31, 16), f"{name}_{100 * quantile:g}"] == expected[name].sel(quantile=quantile)
    weights = frame[frame["what"] == "gate weights"].set_index(["domain", "layer", "statistic"])
    assert weights.loc[("Github", 31, "margin"), "weight"] == balance["weight"].sel(
        domain="Github", layer=31, statistic="margin"
    )
    quantiles = frame[frame["what"] == "quantiles of gate weights"].set_index(["layer", "statistic"])
    assert quantiles.loc[(0, "entropy"), "weight_quantile_50"] == balance["weight_quantile"].sel(
        layer=0, statistic="entropy", quantile=0.5
    )
    assert len(frame) == 9 * 2 + 2 * 2 + 9 * 2 * 3 + 2 * 3  # no batch of 256 sequences is full


def test_the_frames_of_pairs_hold_every_pair_once(coactivation, transitions) -> None:
    frame = coactivation_table(coactivation, [0, 7])
    rows = frame.frame.set_index(["layer", "expert", "other"])
    assert len(rows) == 2 * 28
    at, reverse = coactivation.sel(layer=7, expert=2, other=6), coactivation.sel(layer=7, expert=6, other=2)
    assert rows.loc[(7, 2, 6), "lift"] == at["lift"]
    assert rows.loc[(7, 2, 6), "conditional_percent"] == 100 * at["conditional"]
    assert rows.loc[(7, 2, 6), "conditional_reversed_percent"] == 100 * reverse["conditional"]
    frame = next(transitions_tables(transitions)).frame
    moves = frame[frame["what"] == "transition"].set_index(["layer", "expert", "next"])
    assert len(moves) == 5 * 64
    move = transitions.sel(layer=31, expert=4, next=1)
    assert moves.loc[(31, 4, 1), "probability_percent"] == 100 * move["probability"]
    information = frame[frame["what"] == "information"].set_index("layer")
    assert information.loc[31, "layer_before"] == 23
    assert information.loc[31, "information_null_bits"] == transitions["information_null"].sel(layer=31)
    paths = frame[frame["what"] == "paths"].set_index("routing")
    assert paths.loc["trace", "half"] == transitions["half"].sel(routing="trace")


def test_the_figure_of_balance_draws_the_trace_the_batches_and_their_null(balance, mixtral) -> None:
    left, right = figures.balance.draw_balance(balance).axes
    drawn = {str(line.get_label()): line.get_ydata() for line in left.lines}
    np.testing.assert_allclose(drawn["the whole trace"], balance["imbalance"].isel(domain=0))
    np.testing.assert_allclose(drawn["16 sequences"], balance["batch_imbalance"].sel(batch=16))
    np.testing.assert_allclose(drawn["16 sequences, drawn"], balance["batch_imbalance_null"].sel(batch=16))
    assert "256 sequences" not in drawn  # the trace has 32
    np.testing.assert_allclose(right.lines[0].get_ydata(), balance["weight"].isel(domain=0).sel(statistic="first"))
    without = balance.drop_vars([name for name in balance if str(name).startswith("weight")])
    right = figures.balance.draw_balance(without).axes[1]
    np.testing.assert_allclose(right.lines[0].get_ydata(), balance["entropy"].isel(domain=0))


def test_the_maps_draw_the_logarithm_of_each_lift_in_natural_order_for_few_experts(coactivation, transitions) -> None:
    figure = figures.joint.draw_coactivation(coactivation, [7])
    at = coactivation.sel(layer=7)
    known = np.where(np.isfinite(at["lift_p"]), at["lift"], np.nan)
    expected = np.clip(np.log2(known), -2, 2)
    np.testing.assert_allclose(mesh_of(figure.axes[0]).reshape(8, 8), expected)
    figure = figures.joint.draw_transitions(transitions, [31])
    at = transitions.sel(layer=31)
    with np.errstate(divide="ignore"):
        expected = np.clip(np.log2(np.where(np.isfinite(at["lift_p"]), at["lift"], np.nan)), -2, 2)
    np.testing.assert_allclose(mesh_of(figure.axes[0]).reshape(8, 8), expected)
    lines = {str(line.get_label()): line.get_ydata() for line in figure.axes[-1].lines}
    np.testing.assert_allclose(lines["bias removed"], transitions["information"])


def test_many_experts_stand_in_an_order_that_puts_a_planted_group_together(wide) -> None:
    found = moescope.coactivation(wide, [0])
    axes = figures.joint.draw_coactivation(found).axes[0]
    assert mesh_of(axes).size == 128 * 128
    lift = np.ones((60, 60))
    group = np.array([3, 17, 30, 44, 59])
    lift[np.ix_(group, group)] = 4
    lift[50] = lift[:, 50] = np.nan  # an expert that nobody picks
    order = order_of_pairs(lift)
    places = np.sort(np.flatnonzero(np.isin(order, group)))
    assert (np.diff(places) == 1).all()
    assert order[-1] == 50
    assert sorted(order.tolist()) == list(range(60))
    rows = np.tile(np.linspace(0.5, 2, 40), (60, 1))
    rows[group] = rows[group, ::-1]
    places = np.sort(np.flatnonzero(np.isin(order_of_rows(rows), group)))
    assert (np.diff(places) == 1).all()


def test_a_map_of_transitions_shows_the_experts_it_can_tell_of_and_says_how_many(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    popularity = np.r_[np.full(6, 3.0), np.zeros(34)]  # six experts take most of 1,500 tokens, 34 next to none
    ids = np.argsort(-(popularity + rng.gumbel(size=(2, 1500, 40))), axis=2)[:, :, :2]
    documents = np.sort(rng.integers(0, 40, 1500))
    trace = moescope.from_arrays(tmp_path / "t.moe", ids, num_experts=40, ranked=True, documents=documents)
    found = moescope.transitions(trace)
    known = np.isfinite(found["lift_p"].values[0])
    rows, columns, number = int(known.any(axis=1).sum()), int(known.any(axis=0).sum()), int(known.sum())
    assert number < 100
    axes = figures.joint.draw_transitions(found).axes[0]
    drawn = mesh_of(axes).reshape(rows, columns)
    assert int(np.isfinite(drawn).sum()) == number
    assert [label.get_text() for label in axes.get_yticklabels()] != [str(row) for row in range(rows)]
    assert {int(label.get_text()) for label in axes.get_yticklabels()} == set(np.flatnonzero(known.any(axis=1)))
    assert f"{number} of 1,600 have enough tokens" in [text.get_text() for text in axes.texts]
    assert axes.get_ylabel() == f"{rows} of 40 experts, layer 0"
    notes = " ".join(list(transitions_tables(found))[1].notes)
    assert f"{1600 - number:,} of these 1,600 transitions are not tested" in notes


def test_more_paths_than_tokens_are_not_counted_and_batches_are(transitions, balance) -> None:
    few = transitions.copy(deep=True)
    number = int(few["path_tokens"])
    few["effective"][:] = [number + 1.0, float(number), 17.2]
    column = [row.cells[2].value for row in list(transitions_tables(few))[-1].sections[0].rows]
    assert column == [f">{number:,}", f"{number:,}", "17"]
    batches = next(table for table in list(balance_tables(balance, [0])) if table.name == "batches")
    held = ", ".join(f"{int(balance['batches'].sel(batch=size))} of {size}" for size in (1, 16))
    assert f"Full batches: {held}." in batches.notes[-1]


def test_figures_of_the_same_results_are_the_same_bytes(coactivation, balance, tmp_path: Path) -> None:
    for draw, data in ((figures.joint.draw_coactivation, coactivation), (figures.balance.draw_balance, balance)):
        for name in ("a", "b"):
            figures.style.save(draw(data), tmp_path, name)
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_what_a_trace_cannot_tell_is_refused_in_one_line_and_counts_have_a_balance(run, tmp_path: Path) -> None:
    make_counts(tmp_path / "c.moe", {g: {0: {g: 6, 7: 1}} for g in range(4)})
    found = run("balance", tmp_path / "c.moe")
    assert found.exit_code == 0
    assert "Imbalance within batches" not in found.stdout
    for command in ("coactivation", "transitions"):
        refused = run(command, tmp_path / "c.moe")
        assert (refused.exit_code, refused.output.count("error[not-recorded]")) == (1, 1), command
    layers = (Layer(0, 8, 1), Layer(4, 8, 1, ranked=False))
    part = make_part(np.random.default_rng(0), layers, [40] * 4)
    trace = make_synthetic(tmp_path / "t.moe", [part], layers)
    assert "one expert a token" in run("coactivation", trace.path).output
    assert "--choice all" in run("transitions", trace.path).output
    assert run("transitions", trace.path, "--choice", "all").exit_code == 0
    assert "two layers" in run("transitions", trace.path, "--layer", "4").output
