"""The command, tables and figure of expert parallelism."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner
from synthetic import make_counts, make_part, make_trace

import moescope
from moescope.cli import main
from moescope.reporting import figures
from moescope.reporting.formats import render
from moescope.reporting.subjects.parallel import parallel_tables
from moescope.trace import Layer, Trace

LAYERS = (Layer(0, 8, 2), Layer(2, 8, 2), Layer(5, 8, 2))
OPTIONS = (
    "--devices",
    4,
    "--nodes",
    2,
    "--prefill",
    "20,40",
    "--decode",
    "2",
    "--hidden-size",
    64,
    "--bytes-per-value",
    2,
)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    part = make_part(np.random.default_rng(0), LAYERS, [30, 25, 40, 19, 33, 28, 41, 22])
    return make_trace(tmp_path_factory.mktemp("parallel") / "t.moe", [part], LAYERS)


@pytest.fixture(scope="module")
def result(trace: Trace) -> xr.Dataset:
    return moescope.parallel(
        trace, devices=4, nodes=2, prefill=(20, 40), decode=2, hidden_size=64, bytes_per_value=2, threads=1
    )


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_prints_its_tables_and_as_csv_and_json_everything(run, trace: Trace, result: xr.Dataset) -> None:
    tables = list(parallel_tables(result, [0, 5]))
    shown = run("parallel", trace.path, *OPTIONS, "--layers", "0,5")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == "\n".join(render(table, "text") for table in tables)
    rows = list(csv.DictReader(io.StringIO(run("parallel", trace.path, *OPTIONS, "--format", "csv").stdout)))
    assert rows == list(csv.DictReader(io.StringIO(render(tables[0], "csv"))))
    assert len(json.loads(run("parallel", trace.path, *OPTIONS, "--format", "json").stdout)) == len(rows)
    number = {what: sum(row["what"] == what for row in rows) for what in dict.fromkeys(row["what"] for row in rows)}
    placements, batches, layers, domains, factors = 5, 3, 3, 4, 13
    assert number["a layer"] == placements * batches * layers
    assert number["over all layers"] == placements * batches
    assert number["foreign profile"] == 2 * domains * domains
    bins = int(result["dropped_by_position"].isel(layer=0, capacity_factor=0, batch=0).notnull().sum())
    assert number["dropped"] == batches * layers * domains * factors
    assert number["dropped by position"] == batches * layers * bins * factors
    assert number["dropped without locality"] == batches * layers * factors
    assert number["sufficient factor"] == batches * layers
    assert number["less another placement"] == placements * placements * batches


def test_a_row_of_the_table_holds_what_the_result_does(result: xr.Dataset) -> None:
    devices, drops, reach, foreign, places = list(parallel_tables(result, [2]))
    at = result.sel(placement="eplb", batch="prefill 40")
    row = next(row for row in devices.sections[1].rows if row.label == "eplb")
    expected = [at["over_subscription"].sel(layer=2), at["slowest"], at["slowest_quantile"][-1], at["slowest_own"]]
    expected += [at["slowest_null"], at["slowest_uniform"]]
    assert [cell.value for cell in row.cells] == [f"{float(value):.2f}" for value in expected]
    assert [section.title for section in reach.sections] == [
        "devices a token", "nodes a token",
        "KiB within nodes, a token and layer, one way", "KiB between nodes, a token and layer, one way",
    ]  # fmt: skip
    last = drops.sections[2].rows[-1].cells[0].value
    assert last == f"{float(result['sufficient_factor'].sel(batch='decode 2', layer=2)):.2f}"
    assert [len(row.cells) for row in foreign.sections[0].rows] == [4, 4, 4, 4]
    assert not any(cell.spread for section in foreign.sections for row in section.rows for cell in row.cells)
    assert [section.title for section in places.sections[:2]] == [
        "prefill 20, by domain", "prefill 20, by place of the token in the sequence"
    ]  # fmt: skip
    dropped = result.sel(batch="prefill 20", layer=2, capacity_factor=1.25)
    by_domain, by_position = places.sections[:2]
    assert [row.label for row in by_domain.rows] == result["domain"].values.tolist()
    expected = 100 * dropped["dropped"].values
    assert [float(row.cells[0].value) for row in by_domain.rows] == pytest.approx(expected, abs=0.005)
    assert [row.label for row in by_position.rows] == ["0", "1–2", "3–6", "7–14", "15–30"]
    expected = 100 * dropped["dropped_by_position"].values[:5]
    assert [float(row.cells[0].value) for row in by_position.rows] == pytest.approx(expected, abs=0.005)


def test_the_figure_draws_what_its_data_hold(result: xr.Dataset, tmp_path: Path) -> None:
    figure = figures.parallel.draw_parallel(result)
    upper, (drops, slowest, reached) = figure.axes[:3], figure.axes[3:]
    for axes, batch in zip(upper, result["batch"].values, strict=True):
        at = result.sel(batch=batch, placement="linear")
        drawn = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}
        for label, name in (("measured", ""), ("null", "_null"), ("uniform", "_uniform")):
            np.testing.assert_array_equal(drawn[label], at[f"over_subscription{name}"].values)
    mean = 100 * result["dropped"].isel(domain=0).mean("layer").sel(batch="prefill 20").values
    line = next(line for line in drops.lines if line.get_label() == "dropped")
    np.testing.assert_array_equal(line.get_ydata(), np.where(mean > 0, mean, np.nan))
    points = next(line for line in slowest.lines if line.get_label() == "prefill 20")
    np.testing.assert_array_equal(points.get_xdata(), result["slowest"].sel(batch="prefill 20").values)
    points = next(line for line in reached.lines if line.get_label() == "prefill 20")
    np.testing.assert_array_equal(points.get_xdata(), result["devices_reached"].mean("layer").isel(batch=0).values)
    figures.style.save(figure, tmp_path, "parallel")
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".svg", ".pdf"}


def test_a_result_without_batches_is_printed_and_drawn(run, trace: Trace, tmp_path: Path) -> None:
    done = run("parallel", trace.path, "--devices", 4, "--figures", tmp_path / "figures")
    assert done.exit_code == 0, done.output
    assert "prefill 4096: no batch is full" in done.stdout
    assert "choose smaller ones with --prefill and --decode" in " ".join(done.stdout.split())
    assert (tmp_path / "figures" / "parallel.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--devices", "3"], 2, "devices that divide them: 1, 2, 4, 8"),
        (["--devices", "4", "--nodes", "3"], 2, "nodes that divide them: 1, 2, 4"),
        (["--devices", "4", "--placements", "linear,best"], 2, "no placement 'best'; there are linear"),
        (["--devices", "4", "--prefill", "0"], 2, "a prefill batch holds at least one token"),
        (["--devices", "4", "--layers", "3"], 1, "error[no-such-layer]"),
        ([], 2, "--devices"),
    ],
)
def test_wrong_options_say_what_would_be_right(
    run, trace: Trace, arguments: list[str], code: int, message: str
) -> None:
    done = run("parallel", trace.path, *arguments)
    assert (done.exit_code, message in " ".join(done.stderr.split())) == (code, True), done.stderr


def test_a_trace_of_counts_is_refused(run, tmp_path: Path) -> None:
    made = make_counts(tmp_path / "c.moe", {0: {0: {1: 5}}})
    done = run("parallel", made.path, "--devices", 4)
    assert (done.exit_code, "error[not-recorded]" in done.stderr) == (1, True)
