"""A trace that is exported and read back is the same trace; what a format cannot hold is refused; outputs are kept."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from synthetic import make_part, make_trace

import moescope
from moescope.cli import main
from moescope.errors import DiskFull, NoSuchLayer, NotExportable, OutputExists, TraceNotFound
from moescope.trace import Header, Layer, Part, Trace, TraceWriter, Vocabulary, open_trace

LAYERS = (Layer(1, 8, 2), Layer(2, 8, 2), Layer(5, 8, 2, num_null_experts=1))


def a_trace(path: Path, layers: tuple[Layer, ...] = LAYERS, *, dropped: float = 0.0, **options: Any) -> Trace:
    rng = np.random.default_rng(0)
    parts = [
        make_part(rng, layers, [40, 1, 23], weights=True, dropped=dropped),
        make_part(rng, layers, [16, 33], weights=True, dropped=dropped, first_document=3),
    ]
    return make_trace(path, parts, layers, **options)


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return a_trace(tmp_path / "t.moe")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def sequences(trace: Trace) -> list[Part]:
    """The sequences of a trace, found row by row."""
    found = []
    for part in trace.iter_parts(weights=True):
        keys = list(zip(part.document.tolist(), part.sequence.tolist(), strict=True))
        for key in dict.fromkeys(keys):
            found.append(part.rows(np.array([at for at, other in enumerate(keys) if other == key])))
    return found


def arrays_of(out: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], list[dict[str, Any]]]:
    """The arrays, the layout and the sequences of a folder or an .npz."""
    if out.is_dir():
        arrays = {path.stem: np.load(path, allow_pickle=False) for path in out.glob("*.npy")}
        layout, lines = (out / "layout.json").read_bytes(), (out / "sequences.jsonl").read_bytes()
    else:
        with np.load(out, allow_pickle=False) as archive:
            layout, lines = archive["layout.json"], archive["sequences.jsonl"]
            arrays = {name: archive[name] for name in archive.files if "." not in name}
    return arrays, json.loads(layout), [json.loads(line) for line in lines.splitlines()]


@pytest.mark.parametrize("name", ["arrays", "arrays.npz"])
def test_vllm_arrays_hold_every_id_in_its_layer_and_zeros_elsewhere(name: str, trace: Trace, tmp_path: Path) -> None:
    out = moescope.export(trace, tmp_path / name, format="vllm")
    arrays, layout, lines = arrays_of(out)
    expected = sequences(trace)
    assert len(arrays) == len(lines) == len(expected) == 3 + 1 + 2 + 1 + 3
    for part, line in zip(expected, lines, strict=True):
        array = arrays[line["array"]]
        assert array.dtype == np.uint8
        assert array.shape == (part.num_tokens, 6, 2)
        for layer in range(6):
            ids = part.expert_ids.get(layer, np.zeros((part.num_tokens, 2), int))
            np.testing.assert_array_equal(array[:, layer], ids)
        assert line["token_ids"] == part.token_id.tolist()
        assert (line["document"], line["sequence"]) == (part.document[0], part.sequence[0])
        assert line["domain"] == trace.domains[part.domain[0]]
    assert (layout["num_hidden_layers"], layout["top_k"], layout["dtype"]) == (6, 2, "uint8")
    assert [each["layer"] for each in layout["layers"]] == [1, 2, 5]
    assert layout["layers"][2]["num_null_experts"] == 1
    assert layout["layers_of_zeros"] == [0, 3, 4]
    assert layout["complete"] is True


def test_more_than_256_ids_take_two_bytes(tmp_path: Path) -> None:
    trace = a_trace(tmp_path / "t.moe", (Layer(0, 8, 2), Layer(1, 600, 2)))
    arrays, layout, lines = arrays_of(moescope.export(trace, tmp_path / "out", format="vllm"))
    assert layout["dtype"] == "uint16"
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.uint16)}
    assert max(array.max() for array in arrays.values()) > 255
    np.testing.assert_array_equal(arrays[lines[0]["array"]][:, 1], sequences(trace)[0].expert_ids[1])
    some = arrays_of(moescope.export(trace, tmp_path / "some", format="vllm", layers=[0]))
    assert (some[1]["dtype"], some[1]["layers_of_zeros"]) == ("uint8", [1])


@pytest.mark.parametrize(
    ("claimed", "num_layers"),
    [(9, 9), (6, 6), (5, 6), (None, 6), ("9", 6), (True, 6), (10**9, 6), (-1, 6), (7.0, 6)],
)
def test_the_model_s_number_of_layers_is_believed_where_it_can_be(
    claimed: object, num_layers: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    header = Header(LAYERS, model={"num_layers": claimed})
    with TraceWriter(tmp_path / "t.moe", header, Vocabulary({})) as writer:
        writer.write(make_part(rng, LAYERS, [3]), {})
        writer.finish({})
    arrays, layout, _ = arrays_of(moescope.export(tmp_path / "t.moe", tmp_path / "out", format="vllm"))
    assert layout["num_hidden_layers"] == num_layers
    assert arrays["0_0"].shape == (3, num_layers, 2)


def test_layers_with_different_top_k_are_refused_and_can_be_chosen_apart(tmp_path: Path) -> None:
    trace = a_trace(tmp_path / "t.moe", (Layer(0, 8, 2), Layer(1, 8, 1), Layer(2, 8, 2)))
    with pytest.raises(NotExportable, match="found 1 in layer 1, 2 in layer 0"):
        moescope.export(trace, tmp_path / "out", format="vllm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.moe"]
    _, layout, _ = arrays_of(moescope.export(trace, tmp_path / "out", format="vllm", layers=[0, 2]))
    assert layout["layers_of_zeros"] == [1]


def test_dropped_assignments_are_refused_by_vllm_and_minus_one_in_json_lines(tmp_path: Path) -> None:
    trace = a_trace(tmp_path / "t.moe", dropped=0.2)
    with pytest.raises(NotExportable, match="dropped an assignment in document 0"):
        moescope.export(trace, tmp_path / "out", format="vllm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.moe"]
    assert_json_lines(trace, moescope.export(trace, tmp_path / "out", format="jsonl"), [1, 2, 5])
    assert "-1" in (tmp_path / "out").read_text()


def test_a_layer_number_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    trace = a_trace(tmp_path / "t.moe", (Layer(65_535, 8, 2),))
    with pytest.raises(NotExportable, match="65536 layers"):
        moescope.export(trace, tmp_path / "out", format="vllm")


def assert_json_lines(trace: Trace, out: Path, layers: list[int], *, weights: bool = True) -> None:
    """Each line is what a slow loop over the rows of the trace says."""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    at = 0
    for part in trace.iter_parts(weights=weights):
        for row in range(part.num_tokens):
            place = row - part.document.tolist().index(part.document[row])
            for layer in layers:
                line = lines[at]
                at += 1
                assert line["domain"] == trace.domains[part.domain[row]]
                assert line["document"] == part.document[row]
                assert line["sequence"] == part.sequence[row]
                assert line["token_idx"] == place
                assert line["token_id"] == part.token_id[row]
                assert line["layer"] == layer
                assert line["num_experts"] == 8
                assert line["experts"] == part.expert_ids[layer][row].tolist()
                if weights:
                    found = np.array(line["gating_probs"], np.float32)
                    np.testing.assert_array_equal(found, part.gate_weights[layer][row])
                else:
                    assert "gating_probs" not in line
    assert at == len(lines) > 0


@pytest.mark.parametrize("layers", [None, [2], [5, 1]])
def test_json_lines_read_back_exactly(layers: list[int] | None, trace: Trace, tmp_path: Path) -> None:
    out = moescope.export(trace.path, tmp_path / "sub" / "out.jsonl", format="jsonl", layers=layers)
    assert_json_lines(trace, out, sorted(layers or [1, 2, 5]))


def test_json_lines_are_the_same_however_many_rows_are_made_at_a_time(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moescope.exporting.json_lines as json_lines

    whole = moescope.export(trace, tmp_path / "whole", format="jsonl").read_bytes()
    monkeypatch.setattr(json_lines, "ROWS_AT_A_TIME", 7)
    assert moescope.export(trace, tmp_path / "bits", format="jsonl").read_bytes() == whole


def test_without_gate_weights_there_is_no_such_field_and_hostile_domains_stay_text(tmp_path: Path) -> None:
    part = make_part(np.random.default_rng(0), LAYERS, [5, 4], domains=('a"}\n{"b', "\u202eé\x1b[31m"))
    trace = make_trace(tmp_path / "t.moe", [part], LAYERS)
    assert_json_lines(trace, moescope.export(trace, tmp_path / "out", format="jsonl"), [1, 2, 5], weights=False)
    arrays_of(moescope.export(trace, tmp_path / "arrays", format="vllm"))


@pytest.mark.filterwarnings("default")
def test_of_an_unfinished_trace_what_is_there_is_exported_with_a_warning(tmp_path: Path) -> None:
    trace = a_trace(tmp_path / "t.moe", finish=False)
    with pytest.warns(UserWarning, match="is unfinished"):
        out = moescope.export(trace, tmp_path / "out", format="vllm")
    assert arrays_of(out)[1]["complete"] is False


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_an_output_is_kept_unless_forced(name: str, trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / name
    moescope.export(trace, out, format="vllm")
    with pytest.raises(OutputExists, match="is kept"):
        moescope.export(trace, out, format="vllm", layers=[1])
    assert arrays_of(out)[1]["layers_of_zeros"] == [0, 3, 4]
    moescope.export(trace, out, format="vllm", layers=[1], force=True)
    arrays, layout, _ = arrays_of(out)
    assert layout["layers_of_zeros"] == [0, 2, 3, 4, 5]
    assert len(arrays) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "t.moe"]


def test_a_folder_that_is_no_export_is_never_replaced(trace: Trace, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    for out in (tmp_path / "photos", tmp_path, trace.path, trace.path / "parts", trace.path / "new"):
        with pytest.raises(OutputExists):
            moescope.export(trace, out, format="jsonl", force=True)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"
    assert open_trace(trace.path).verify() == []


@pytest.mark.parametrize("format", ["vllm", "jsonl"])
def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(
    format: str, trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moescope.exporting.formats as formats

    def full(_trace: Trace, _layers: object, path: Path, _name: str) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "out").write_text("before")
    monkeypatch.setitem(formats.FORMATS, format, full)
    with pytest.raises(DiskFull, match="nothing was exported"):
        moescope.export(trace, tmp_path / "out", format=format, force=True)
    assert (tmp_path / "out").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "t.moe"]


def test_what_is_wrong_is_said(trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no format 'csv'; there are hot-experts, jsonl, oracle-general, vllm"):
        moescope.export(trace, tmp_path / "out", format="csv")
    with pytest.raises(NoSuchLayer, match="layer 3 was not recorded"):
        moescope.export(trace, tmp_path / "out", format="jsonl", layers=[3])
    with pytest.raises(TraceNotFound):
        moescope.export(tmp_path / "nothing", tmp_path / "out", format="jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.moe"]


def test_the_command_writes_and_prints_the_path(trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = run("jsonl", trace.path, "-o", out, "--layers", "1,2")
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    assert_json_lines(trace, out, [1, 2])
    again = run("jsonl", trace.path, "-o", out)
    assert (again.exit_code, "error[output-exists]" in again.stderr) == (1, True)
    assert run("jsonl", trace.path, "-o", out, "--force").exit_code == 0
    assert run("csv", trace.path, "-o", tmp_path / "x").exit_code == 2
    assert run("vllm", trace.path).exit_code == 2
    assert run("vllm", tmp_path / "no", "-o", tmp_path / "x").exit_code == 1


def columns(trace: Trace) -> dict[str, np.ndarray]:
    """What a trace says of each token, the windows of a document apart."""
    parts = list(trace.iter_parts(weights=True))
    found = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("document", "token_id")}
    found["domain"] = np.concatenate([np.array(part.domain_names)[part.domain] for part in parts])
    for layer in trace.layers:
        found[f"L{layer.layer}"] = np.concatenate([part.expert_ids[layer.layer] for part in parts])
        found[f"W{layer.layer}"] = np.concatenate([part.gate_weights[layer.layer] for part in parts])
    return found


def test_json_lines_come_back_through_the_importer_without_an_option_but_the_number_of_experts(tmp_path: Path) -> None:
    trace = a_trace(tmp_path / "t.moe", LAYERS[:2])
    lines = moescope.export(trace, tmp_path / "out.jsonl", format="jsonl")
    again = moescope.import_trace("jsonl", [lines], tmp_path / "again.moe", num_experts=8)
    found, expected = columns(again), columns(trace)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
