"""Placements as files: what SGLang and EPLB read, read back with the standard library and numpy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from synthetic import VOCABULARY, make_counts, make_part, make_trace

import moescope
from moescope import cli
from moescope.errors import NoSuchDomain, NotExportable, NotRecorded, OutputExists
from moescope.simulation import eplb
from moescope.trace import Header, Layer, Trace, TraceWriter, open_trace

LAYERS = (Layer(1, 8, 2), Layer(3, 8, 2))


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    """Two layers with experts, 1 and 3, of a model of five."""
    part = make_part(np.random.default_rng(0), LAYERS, [20, 30, 25, 17])
    with TraceWriter(tmp_path / "t.moe", Header(LAYERS, model={"num_layers": 5}), VOCABULARY) as writer:
        writer.write(part, {})
        writer.finish({})
    return open_trace(tmp_path / "t.moe")


def test_sglang_reads_a_row_for_every_layer_of_the_model(trace: Trace, tmp_path: Path) -> None:
    placed = moescope.placement(trace, "eplb-replicated", devices=4)
    out = moescope.export_placement(placed, tmp_path / "p.json", trace=trace)
    content = json.loads(out.read_text())
    assert list(content) == ["physical_to_logical_map"]  # SGLang refuses further keys
    rows = content["physical_to_logical_map"]
    assert [len(row) for row in rows] == [12] * 5
    assert rows[1] == placed.experts[1].tolist()
    assert rows[3] == placed.experts[3].tolist()
    assert rows[0] == rows[2] == rows[4] == [*range(8), *range(4)]


def test_sglang_counts_are_the_loads_of_the_trace(trace: Trace, tmp_path: Path) -> None:
    placed = moescope.placement(trace, "linear", devices=4)
    out = moescope.export_placement(placed, tmp_path / "c.json", trace=trace, format="sglang-counts")
    (part,) = trace.iter_parts()
    rows = json.loads(out.read_text())["logical_count"]
    for layer in (1, 3):
        assert rows[layer] == [int((part.expert_ids[layer] == e).sum()) for e in range(8)]
    assert rows[0] == [0] * 8


@pytest.mark.parametrize("name", ["p.npz", "p.json"])
def test_the_arrays_of_eplb_invert_each_other(trace: Trace, tmp_path: Path, name: str) -> None:
    placed = moescope.placement(trace, "eplb-replicated", devices=4, nodes=2, redundant_experts=8)
    out = moescope.export_placement(placed, tmp_path / name, trace=trace, format="eplb")
    found = (
        dict(np.load(out, allow_pickle=False))
        if name.endswith("z")
        else {key: np.array(value) for key, value in json.loads(out.read_text()).items()}
    )
    assert found["layers"].tolist() == [1, 3]
    assert found["phy2log"].shape == (2, 16)
    assert (found["logcnt"].sum(axis=1) == 16).all()
    for layer in range(2):
        for expert in range(8):
            slots = found["log2phy"][layer, expert]
            used = slots[slots >= 0]
            assert len(used) == found["logcnt"][layer, expert]
            assert (slots[len(used) :] == -1).all()
            assert sorted(used) == np.flatnonzero(found["phy2log"][layer] == expert).tolist()


def test_a_placement_on_one_domain_is_that_of_its_loads(trace: Trace) -> None:
    from moescope.simulation import eplb

    placed = moescope.placement(trace, "eplb", devices=4, domain="Github")
    part = next(trace.iter_parts(domains=["Github"]))
    loads = [int((part.expert_ids[3] == e).sum()) for e in range(8)]
    assert placed.experts[3].tolist() == eplb.rebalance(loads, 8, 1, 1, 4)[0].tolist()
    with pytest.raises(NoSuchDomain, match="no domain 'Books'"):
        moescope.placement(trace, "eplb", devices=4, domain="Books")
    with pytest.raises(ValueError, match="affinity is fitted on all domains"):
        moescope.placement(trace, "affinity", devices=4, domain="Github")


def test_layers_that_differ_cannot_be_written(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 2), Layer(1, 12, 2))
    made = make_trace(tmp_path / "t.moe", [make_part(np.random.default_rng(0), layers, [9])], layers)
    placed = moescope.placement(made, "linear", devices=4)
    with pytest.raises(NotExportable, match="8 slots of 8 experts and 12 slots of 12 experts"):
        moescope.export_placement(placed, tmp_path / "p.json", trace=made)
    assert not (tmp_path / "p.json").exists()


def test_what_is_there_is_kept_and_a_wrong_format_refused(trace: Trace, tmp_path: Path) -> None:
    placed = moescope.placement(trace, "random", devices=4)
    (tmp_path / "p.json").write_text("mine")
    with pytest.raises(OutputExists):
        moescope.export_placement(placed, tmp_path / "p.json", trace=trace)
    with pytest.raises(ValueError, match="no format 'vllm'; there are sglang"):
        moescope.export_placement(placed, tmp_path / "q.json", trace=trace, format="vllm")
    with pytest.raises(ValueError, match=r"sglang is JSON, and q.npz would hold arrays; choose a name in .json"):
        moescope.export_placement(placed, tmp_path / "q.npz", trace=trace, format="sglang")
    assert not (tmp_path / "q.npz").exists()


def test_the_command_writes_what_the_library_does(trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / "p.npz"
    options = ["placement", str(trace.path), "--devices", "4", "--algorithm", "affinity", "-o", str(out)]
    done = CliRunner().invoke(cli.main, options)
    assert (done.exit_code, done.stdout.strip()) == (0, str(out)), done.output
    expected = moescope.placement(trace, "affinity", devices=4)
    written = np.load(out, allow_pickle=False)["phy2log"].tolist()
    assert written == [expected.experts[layer].tolist() for layer in (1, 3)]
    again = CliRunner().invoke(cli.main, options)
    assert (again.exit_code, "error[output-exists]" in again.stderr) == (1, True)
    wrong = CliRunner().invoke(cli.main, [*options[:3], "5", *options[4:], "--force"])
    assert (wrong.exit_code, "devices that divide them: 1, 2, 4, 8" in wrong.stderr) == (2, True)


def test_counts_are_placed_as_the_tokens_that_they_count_are(trace: Trace, tmp_path: Path) -> None:
    (part,) = trace.iter_parts()
    table = {
        (g, a.layer): np.bincount(part.expert_ids[a.layer][part.document == g].ravel(), minlength=8)
        for g in range(4)
        for a in LAYERS
    }
    loads = {g: {n: {e: int(x) for e, x in enumerate(table[g, n]) if x} for n in (1, 3)} for g in range(4)}
    counts = make_counts(tmp_path / "counts.moe", loads, tuple(replace(layer, ranked=False) for layer in LAYERS))
    for algorithm in ("linear", "random", "eplb", "eplb-replicated"):
        one, other = (moescope.placement(source, algorithm, devices=4) for source in (trace, counts))
        for layer in (1, 3):
            np.testing.assert_array_equal(one.experts[layer], other.experts[layer])
    hot = [moescope.export(one, tmp_path / f"{n}.json", format="hot-experts") for n, one in enumerate((trace, counts))]
    assert len({json.dumps(json.loads(path.read_text())["layers"]) for path in hot}) == 1
    one = moescope.placement(counts, "eplb", devices=4, domain="Github")
    github = table[1, 1] + table[3, 1]
    np.testing.assert_array_equal(one.experts[1], eplb.rebalance(github, 8, 1, 1, 4)[0])
    with pytest.raises(NotRecorded, match="counts of assignments"):
        moescope.placement(counts, "affinity", devices=4)
    with pytest.raises(NoSuchDomain):
        moescope.placement(counts, "eplb", devices=4, domain="Prose")
