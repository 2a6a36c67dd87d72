"""Commands, tables and figure of expert caches."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from synthetic import make_counts, make_part
from synthetic import make_trace as make_synthetic

import moescope
from moescope.cli import main
from moescope.reporting import figures
from moescope.reporting.formats import render
from moescope.reporting.subjects.cache import (
    POLICY_NAMES,
    cache_frame,
    cache_sentence,
    cache_tables,
    quarter,
    shown_sizes,
)
from moescope.simulation import POLICIES
from moescope.trace import Header, Layer, TraceWriter, Vocabulary


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def played(mixtral):
    return moescope.cache(mixtral, threads=1)


def test_the_command_prints_its_tables_and_as_csv_and_json_everything(run, mixtral, played) -> None:
    tables = list(cache_tables(played))
    assert [table.name for table in tables] == ["cache", "cache_layers", "cache_domains"]
    for format in ("text", "latex"):
        result = run("cache", mixtral.path, "--format", format)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout == "\n".join(render(table, format) for table in tables)
    rows = list(csv.DictReader(io.StringIO(run("cache", mixtral.path, "--format", "csv").stdout)))
    assert len(rows) == len(json.loads(run("cache", mixtral.path, "--format", "json").stdout)) == len(tables[0].frame)


def test_the_frame_holds_each_value_once_in_per_cent(played) -> None:
    frame = cache_frame(played).set_index(["policy", "domain", "layer", "size"])
    assert frame.index.is_unique
    at = played.sel(policy="lru", domain="Github", size=3)
    row = frame.loc[("lru", "Github", 31, 3)]
    assert row["hit_ratio_percent"] == pytest.approx(100 * at["hit_ratio"].sel(layer=31).item())
    assert row["hit_ratio_null_percent"] == pytest.approx(100 * at["hit_ratio_null"].sel(layer=31).item())
    assert row["hit_ratio_uniform_percent"] == 37.5
    whole = frame.xs(("lru", "Github", 3), level=("policy", "domain", "size"))
    whole = whole[whole.index.isna()].iloc[0]
    assert whole["gain_points"] == pytest.approx(100 * at["gain"].item())
    assert whole["loads"] == pytest.approx(at["loads"].item())
    assert whole["loads"] == pytest.approx(2 * 6 * (1 - at["model_hit_ratio"].item()))


def test_the_table_shows_what_the_dataset_holds(played) -> None:
    table = next(cache_tables(played))
    sections = {section.title: section for section in table.sections}
    assert table.columns == tuple(f"{size} experts" for size in (2, 3, 4, 5, 6, 7))
    for row, policy in zip(sections[""].rows, POLICIES, strict=True):
        assert row.label == POLICY_NAMES[policy]
        hits = played["model_hit_ratio"].isel(domain=0).sel(policy=policy, size=3).item()
        assert row.cells[1].value == f"{100 * hits:.1f}"
    assert [cell.value for cell in sections["uniform independent routing"].rows[0].cells][:2] == ["25.0", "37.5"]
    closed = sections["part of the way from LRU to the optimum"]
    assert [row.label for row in closed.rows] == [POLICY_NAMES[policy] for policy in POLICIES[1:-1]]
    assert closed.rows[0].cells[0].value == "–"  # at top-k there is nothing to choose


def test_tokens_a_second_are_shown_where_the_link_is_given(run, mixtral) -> None:
    arguments = ("cache", mixtral.path, "--policies", "lru,belady", "--sizes", "4")
    text = run(*arguments, "--expert-bytes", "66e6", "--bandwidth", "16", "--compute", "30").stdout
    played = moescope.cache(mixtral, policies=("lru", "belady"), sizes=[4], threads=1)
    speed = moescope.offloading(played, bytes_per_expert=66e6, bandwidth=16e9, compute=0.03)
    assert render(list(cache_tables(played, speed))[-1], "text") in text
    assert "An expert has 66 MB, the link 16 GB/s" in text
    assert "1.58" in text.splitlines()[-4]  # 6 layers x 4 experts x 66 MB


def test_tokens_a_second_stand_beside_their_interval_any_order_and_uniform_routing(mixtral) -> None:
    """An expert takes 1 ms to load; so with half of the 12 requests of a token missing, 6 ms and no compute."""
    played = moescope.cache(mixtral, policies=("lru",), sizes=[4], threads=1)
    speed = moescope.offloading(played, bytes_per_expert=1e6, bandwidth=1e9)
    table = list(cache_tables(played, speed))[-1]
    rows = {section.title: section.rows[0] for section in table.sections}
    low, value, high = (
        1000 / (12 * (1 - played[name].isel(policy=0, domain=0, size=0).item()))
        for name in ("model_hit_ratio_low", "model_hit_ratio", "model_hit_ratio_high")
    )
    assert rows[""].cells[0].value == f"{value:.2f}"
    assert rows[""].cells[0].spread == f"±{max(value - low, high - value):.2f}"
    assert rows[""].cells[0].mark == "*"
    any_order = 1000 / (12 * (1 - played["model_hit_ratio_null"].isel(policy=0, domain=0, size=0).item()))
    assert rows["tokens of each document in any order"].cells[0].value == f"{any_order:.2f}"
    assert rows["uniform independent routing"].cells[0].value == f"{1000 / 6:.2f}"
    assert table.notes[1].startswith("The link takes longer than compute everywhere.")
    slow = moescope.offloading(played, bytes_per_expert=1e6, bandwidth=1e9, compute=1.0)
    assert list(cache_tables(played, slow))[-1].notes[1].startswith("The link takes longer than compute nowhere.")
    frame = table.frame.set_index(["policy", "domain", "size"])
    assert frame.index.is_unique
    assert frame.loc[("lru", "(all)", 4), "tokens_per_second_uniform"] == pytest.approx(1000 / 6)


def test_the_command_line_says_what_cannot_be(run, mixtral, tmp_path) -> None:
    for arguments, said in (
        (("--sizes", "1"), "a cache of 1 cannot hold the 2 experts that a token needs at once"),
        (("--sizes", "9"), "a cache of 9 is larger than a layer's 8 experts; choose sizes up to 8."),
        (("--policies", "fifo"), "no policy 'fifo'; there are lru, lfu"),
        (("--batch", "2", "--prefill", "4"), "choose a batch to decode or a chunk of prefill"),
        (("--expert-bytes", "5"), "--expert-bytes and --bandwidth belong together"),
    ):
        result = run("cache", mixtral.path, *arguments)
        assert result.exit_code == 2
        assert said in " ".join(result.stderr.split())
    with TraceWriter(tmp_path / "empty.moe", Header((Layer(0, 8, 2),)), Vocabulary({})):
        pass
    result = run("cache", tmp_path / "empty.moe")
    assert result.exit_code == 1
    assert "holds no document yet" in result.stderr
    counts = make_counts(tmp_path / "c.moe", {0: {0: {1: 5}}})
    result = run("cache", counts.path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error[not-recorded]")


def test_the_command_offers_the_policies_there_are() -> None:
    assert tuple(POLICY_NAMES) == POLICIES


def test_the_figure_draws_every_policy_with_optimum_and_nulls(played) -> None:
    left, right = figures.cache.draw_cache(played).axes
    drawn = {str(line.get_label()): line for line in left.lines}
    for policy, name in POLICY_NAMES.items():
        expected = 100 * played["model_hit_ratio"].isel(domain=0).sel(policy=policy).values
        np.testing.assert_allclose(drawn[name].get_ydata(), expected)
    np.testing.assert_allclose(drawn["uniform"].get_ydata(), 100 * np.arange(2, 9) / 8)
    nulls = [line.get_ydata() for line in left.lines if line.get_label() == "null"]
    for line, policy in zip(nulls, ("lru", "belady"), strict=True):
        np.testing.assert_allclose(line, 100 * played["model_hit_ratio_null"].isel(domain=0).sel(policy=policy).values)
    by_layer = {str(line.get_label()): line for line in right.lines}
    at = played.isel(domain=0).sel(size=quarter(played), policy="lru")
    np.testing.assert_allclose(by_layer["LRU"].get_ydata(), 100 * at["hit_ratio"].values)
    assert right.get_title("left") == f"By layer, {quarter(played)} experts"


def test_with_many_experts_the_figure_stays_readable(wide) -> None:
    played = moescope.cache(wide, threads=1)
    assert len(shown_sizes(played)) == 6
    assert 128 not in shown_sizes(played)
    left, _ = figures.cache.draw_cache(played).axes
    drawn = {str(line.get_label()): line for line in left.lines}
    queues = drawn[POLICY_NAMES["s3-fifo"]]
    assert len(queues.get_xdata()) == 8
    assert queues.get_linestyle() == "None"  # a line between sizes that were not simulated would claim too much
    places = {line.get_markevery() for name, line in drawn.items() if name in set(POLICY_NAMES.values())}
    assert len(places) > 4  # markers of different lines do not cover each other
    ticks = [t for t in left.get_xticks() if left.get_xlim()[0] <= t <= left.get_xlim()[1]]
    assert len(ticks) <= 12


def test_a_figure_of_two_policies_without_nulls_is_drawn(mixtral, tmp_path) -> None:
    played = moescope.cache(mixtral, policies=("lfu", "s3-fifo"), null=False, threads=1)
    figures.style.save(figures.cache.draw_cache(played), tmp_path, "cache")
    assert (tmp_path / "cache.png").stat().st_size > 10_000


def test_policies_that_could_not_be_fitted_are_not_shown(tmp_path) -> None:
    layer = Layer(0, 8, 2)
    trace = make_synthetic(tmp_path / "t.moe", [make_part(np.random.default_rng(0), (layer,), [60])], (layer,))
    played = moescope.cache(trace, threads=1)
    table = next(cache_tables(played))
    assert [row.label for row in table.sections[0].rows] == [
        POLICY_NAMES[policy] for policy in POLICIES if policy not in ("hot", "matching")
    ]
    assert table.notes[1] == (
        "hot elsewhere, matched document: not simulated, for one half of the corpus has no document to fit them on."
    )
    legend = figures.cache.draw_cache(played).legends[0]
    assert POLICY_NAMES["hot"] not in [text.get_text() for text in legend.get_texts()]


def test_one_cache_for_all_layers_is_called_so(mixtral) -> None:
    played = moescope.cache(mixtral, policies=("lru",), sizes=[4], budget="global", null=False, threads=1)
    assert cache_sentence(played).startswith("One cache for all layers of 4 of 8 experts a layer hits ")
    assert next(cache_tables(played)).groups[0][0] == "one cache, experts a layer of 8"
