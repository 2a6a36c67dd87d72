"""What explain and locality print and draw is what was measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from synthetic import make_counts, make_part, make_trace

import moescope
from moescope.cli import main
from moescope.measures.schema import TOTAL
from moescope.reporting import figures
from moescope.reporting.formats import FORMATS, render
from moescope.reporting.frames import tidy
from moescope.reporting.subjects.explain import explain_sentence, explain_table
from moescope.reporting.subjects.locality import (
    lags_frame,
    lags_table,
    locality_frame,
    locality_sentence,
    locality_table,
    runs_table,
)
from moescope.trace import Layer


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def explained(mixtral):
    return moescope.explain(mixtral, permutations=19)


@pytest.fixture(scope="module")
def locality(mixtral):
    return moescope.locality(mixtral)


def test_explain_prints_three_layers_and_a_sentence_each(run, mixtral):
    result = run("explain", mixtral.path, "--permutations", "19")
    assert result.exit_code == 0, result.output
    assert "use --permutations 20 or more" in result.stderr  # with 19 nothing could be below 5 %
    assert run("explain", mixtral.path, "--layer", "0", "--permutations", "20").stderr == ""
    expected = explain_table(moescope.explain(mixtral, [0, 7, 31], permutations=19), [0, 7, 31])
    assert result.stdout == render(expected, "text")
    assert result.stdout.count("the first choice holds") == 3
    rows = json.loads(run("explain", mixtral.path, "--layer", "31", "--format", "json").stdout)
    assert [row["source"] for row in rows] == moescope.explain(mixtral, [31])["source"].values.tolist()
    assert "previous layer" not in run("explain", mixtral.path, "--layer", "0", "--format", "csv").stdout
    assert "2 choices" not in run("explain", mixtral.path, "--layer", "0", "--choice", "all").stdout


@pytest.mark.parametrize("show", ["excess", "lags", "runs"])
def test_locality_prints_its_three_tables(run, mixtral, locality, show):
    result = run("locality", mixtral.path, "--show", show, "--layers", "0,31")
    table = {"excess": locality_table, "lags": lags_table, "runs": runs_table}[show]
    assert result.exit_code == 0, result.output
    assert result.stdout == render(table(moescope.locality(mixtral, [0, 31]), [0, 31]), "text")
    for name in FORMATS:
        assert render(table(locality, [0, 31]), name)


def test_the_frames_hold_the_values(explained, locality):
    frame = tidy(explained, "layer", "source").set_index(["layer", "source"])
    assert frame.loc[(7, "token"), "bits"] == float(explained["bits"].sel(layer=7, source="token"))
    assert (0, "previous layer") not in frame.index
    frame = locality_frame(locality).set_index(["domain", "pairs", "null", "layer", "kind"])
    at = {"domain": TOTAL, "pairs": "all", "null": "words", "layer": 31, "kind": "first"}
    assert frame.loc[tuple(at.values()), "excess_points"] == 100 * float(locality["excess"].sel(at))
    frame = lags_frame(locality).set_index(["domain", "layer", "kind", "lag"])
    at = {"domain": "ArXiv", "layer": 31, "kind": "any", "lag": 8}
    assert frame.loc[tuple(at.values()), "lag_rate_percent"] == 100 * float(locality["lag_rate"].sel(at))
    assert runs_table(locality, [0, 31]).frame.groupby("layer")["runs_percent"].sum().to_numpy() == pytest.approx(100)


def test_the_sentences_say_what_is_significant_and_only_that(explained, locality):
    made = explained.copy(deep=True)
    made["bits_q"].loc[{"layer": 31}] = 1.0
    assert "no source tells much. Not distinguishable from chance:" in explain_sentence(made, 31)
    made["bits_q"].loc[{"layer": 31, "source": ["token", "position"]}] = 0.01
    made["share"].loc[{"layer": 31, "source": "token"}] = 0.5
    made["bits"].loc[{"layer": 31, "source": "token"}] = 1.5
    made["share"].loc[{"layer": 31, "source": "position"}] = 0.01
    sentence = explain_sentence(made, 31)
    assert "each by itself tells: the token 1.500 (50 %)." in sentence
    assert "A little (under 5 %): the place in the sequence." in sentence
    made["bits_high"].loc[{"layer": 31, "source": "position"}] = 0.0731 * float(made["entropy"].sel(layer=31))
    assert "A little (under 5 %): the place in the sequence (up to 7 %)." in explain_sentence(made, 31)
    at = {"layer": 31, "domain": TOTAL, "pairs": "all", "kind": "first", "null": "words"}
    made = locality.copy(deep=True)
    for name, value in {"excess": -0.03, "excess_low": -0.05, "excess_high": 0.01}.items():
        made[name].loc[at] = value
    assert "3.0 points less than these words would anyway (−5.0 to +1.0)." in locality_sentence(made, 31)


def test_the_bars_are_the_bits_and_the_ticks_what_permuted_routing_gives(explained):
    figure = figures.explain.draw_explained(explained, [0, 31])
    for axes, layer in zip(figure.axes, [0, 31], strict=True):
        for patch in axes.patches:
            if patch.get_label() != "bounds":
                width = patch.get_path().vertices[:, 0].max()
                assert width == pytest.approx(float(explained["bits"].sel(layer=layer, source=patch.get_label())))
        (ticks,) = (c for c in axes.collections if c.get_label() == "permuted routing")
        null = explained["bits_null"].sel(layer=layer).values
        assert [s[0, 0] for s in ticks.get_segments()] == pytest.approx(null[np.isfinite(null)].tolist())


def test_the_lines_are_the_excess_and_the_rates(explained, locality):
    figure = figures.locality.draw_excess(locality)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    at = locality["excess"].sel(domain=TOTAL, pairs="all", kind="first")
    assert lines["same words elsewhere"] == pytest.approx(100 * at.sel(null="words").values)
    assert lines["document in any order"] == pytest.approx(100 * at.sel(null="document").values)
    figure = figures.locality.draw_lags(locality, [0, 31])
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[1].lines}
    assert lines["layer 31"] == pytest.approx(
        100 * locality["lag_rate"].sel(domain=TOTAL, kind="any", layer=31).values, nan_ok=True
    )
    figure = figures.explain.draw_explained_by_layer(explained)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert lines["token"] == pytest.approx(100 * explained["share"].sel(source="token").values)


def test_many_experts_one_layer_and_what_a_trace_lacks_can_be_drawn(wide, tmp_path):
    explained, locality = moescope.explain(wide, [11], permutations=3), moescope.locality(wide, [11])
    for number, figure in enumerate(
        [
            figures.explain.draw_explained(explained, [11]),
            figures.explain.draw_explained_by_layer(explained),
            figures.locality.draw_excess(locality),
            figures.locality.draw_lags(locality.assign(excess=locality["excess"] * np.nan), [11]),
        ]
    ):
        figures.style.save(figure, tmp_path, str(number))
        assert (tmp_path / f"{number}.png").stat().st_size > 5000


@pytest.mark.parametrize("command", ["explain", "locality"])
def test_a_trace_of_counts_is_refused_with_a_hint(run, tmp_path, command):
    result = run(command, make_counts(tmp_path / "c.moe", {0: {0: {1: 5}}}).path)
    assert result.exit_code == 1
    assert "holds counts of assignments, and no token" in result.stderr
    assert "hint: " in result.stderr


def test_a_trace_without_order_is_explained_if_all_its_choices_are_asked_for(run, tmp_path):
    layers = (Layer(0, 8, 2, ranked=False), Layer(1, 8, 2, ranked=False))
    part = make_part(np.random.default_rng(0), layers, [30] * 6)
    path = make_trace(tmp_path / "t.moe", [part], layers).path
    refused = run("explain", path)
    assert refused.exit_code == 1
    assert "--choice all" in refused.stderr
    result = run("explain", path, "--choice", "all", "--permutations", "5")
    assert result.exit_code == 0
    assert "previous expert" not in result.stdout
    assert "first or second choice" in run("locality", path).stdout
