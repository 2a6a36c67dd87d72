"""What is no valid trace: each kind of fault is refused by every reader, also where the checksums are right."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from synthetic import VOCABULARY, make_counts, make_part, make_trace

import moescope
from moescope import errors
from moescope.cli import main
from moescope.trace import Header, Layer, Trace, TraceWriter, checksums, open_trace
from moescope.trace.part_file import footer_digest
from moescope.trace.verifying import drop_damaged, verify

LAYERS = (Layer(0, 8, 2), Layer(3, 300, 4, num_null_experts=1))


def trace_of(path: Path, num_parts: int = 2, *, finish: bool = True) -> Trace:
    rng = np.random.default_rng(0)
    parts = [
        make_part(rng, LAYERS, [5, 20, 7], first_document=3 * number, weights=True, scores=True)
        for number in range(num_parts)
    ]
    return make_trace(path, parts, LAYERS, finish=finish)


def renew(trace: Path, name: str, data: bytes) -> None:
    """Change a file, and its checksums with it."""
    old = checksums.read(trace)[name]
    (trace / name).write_bytes(data)
    sums = trace / checksums.FILE_NAME
    sums.write_text(sums.read_text().replace(old, hashlib.sha256(data).hexdigest()))
    if name.startswith("parts/") and (trace / "summary.json").exists():
        summary = json.loads((trace / "summary.json").read_text())
        (entry,) = (entry for entry in summary["parts"] if entry["name"] == name)
        entry["footer"] = footer_digest(trace / name)
        renew(trace, "summary.json", json.dumps(summary).encode())


def rewrite(trace: Path, change: Callable[[pa.Table], pa.Table], name: str = "parts/000001.parquet") -> None:
    """Write a part anew with other columns, and its checksum with it."""
    file = trace / name
    table = pq.read_table(file)
    mark = pq.read_metadata(file).metadata[b"moescope"]
    changed = change(table)
    with pq.ParquetWriter(file, changed.schema, store_schema=False) as writer:
        writer.write_table(changed)
        writer.add_key_value_metadata({b"moescope": mark})
    renew(trace, name, file.read_bytes())


def with_column(name: str, change: Callable[[list], list], type: pa.DataType | None = None) -> Callable:
    def changed(table: pa.Table) -> pa.Table:
        values = pa.array(change(table[name].to_pylist()), type or table.schema.field(name).type)
        return table.set_column(table.schema.get_field_index(name), pa.field(name, values.type), values)

    return changed


def first(value: object) -> Callable[[list], list]:
    return lambda values: [value, *values[1:]]


FAULTS = {
    "ids beyond a byte": (
        with_column("L0_0", lambda ids: [i + 256 for i in ids], pa.uint16()),
        "uint16, expected uint8",
    ),
    "an id beyond the experts": (with_column("L0_0", first(8)), "layer 0, row 0: 8 lies outside 0..7"),
    "a null where none can be": (with_column("L0_1", first(None)), "L0_0 or a later rank has nulls"),
    "an expert twice": (
        lambda table: table.set_column(table.schema.get_field_index("L0_1"), "L0_1", table["L0_0"]),
        r"layer 0, row 0: expert \d is chosen twice \(ranks 0 and 1\)",
    ),
    "a weight of NaN": (with_column("W0_1", first(float("nan"))), "column W0_1, row 0: gate weight nan is not finite"),
    "a weight of inf": (with_column("W3_0", first(float("inf"))), "column W3_0, row 0: gate weight inf is not finite"),
    "a margin of NaN": (with_column("M0", first(float("nan"))), "column M0, row 0: nan, expected a finite number"),
    "a mass above 1": (with_column("S3", first(1.5)), "column S3, row 0: 1.5, expected 0 to 1"),
    "margins of 64 bits": (with_column("M3", lambda values: values, pa.float64()), "double, expected float"),
    "a mass that is missing": (with_column("S0", first(None)), "column S0 has nulls"),
    "a document of two clusters": (with_column("cluster", first("another book")), "a document has one cluster"),
    "a label that is missing": (with_column("label", first(None)), "column label has nulls"),
    "clusters as numbers": (with_column("cluster", lambda names: [1 for _ in names], pa.int32()), "int32, expected"),
    "token ids as text": (
        with_column("token_id", lambda ids: list(map(str, ids)), pa.string()),
        "string, expected uint32",
    ),
    "fractional token ids": (
        with_column("token_id", lambda ids: [i + 0.5 for i in ids], pa.float64()),
        "double, expected",
    ),
    "negative token ids": (
        with_column("token_id", lambda ids: [-i for i in ids], pa.int32()),
        "int32, expected uint32",
    ),
    "negative documents": (
        with_column("document", lambda ids: [-i for i in ids], pa.int64()),
        "int64, expected uint32",
    ),
    "domains as numbers": (with_column("domain", lambda ids: [7 for _ in ids], pa.int32()), "int32, expected string"),
    "domains as bytes": (
        with_column("domain", lambda ids: [b"x" for _ in ids], pa.binary()),
        "binary, expected string",
    ),
    "a column too many": (lambda table: table.append_column("L9_0", table["L0_0"]), "those of the header: L9_0"),
    "a column that is missing": (lambda table: table.drop_columns(["L0_1"]), "those of the header: L0_1"),
    "another document": (with_column("document", lambda ids: [i + 1 for i in ids]), "than are noted of it"),
    "rows of a document apart": (
        lambda table: pa.concat_tables([table.slice(25), table.slice(0, 25)]),
        "than are noted",
    ),
    "a row that is missing": (lambda table: table.slice(0, 31), "31 rows, the summary says 32"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_part_rewritten_with_right_checksums_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    change, problem = FAULTS[fault]
    trace = trace_of(tmp_path / "t.moe")
    rewrite(trace.path, change)
    (found,) = verify(trace.path)
    assert re.search(problem, found.problem), found.problem
    assert found.subject.endswith("000001.parquet")
    if "noted" not in problem:  # what is noted of a part is compared by `verify`, for which rows are not read
        with pytest.raises(errors.TraceDamaged, match=problem):
            list(open_trace(trace.path).iter_parts(weights=True, scores=True))
    result = CliRunner().invoke(main, ["sql", str(trace.path), "SELECT count(*) FROM tokens"])
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert "error[trace-damaged]" in result.stderr


def every_door(trace: Path, out: Path) -> dict[str, str]:
    """What each way into a trace answers: the code of its error, or nothing."""
    commands = {
        "info": ["info", str(trace)],
        "verify": ["verify", str(trace)],
        "shares": ["shares", str(trace)],
        "sql": ["sql", str(trace), "SELECT count(*) FROM tokens"],
        "export": ["export", "jsonl", str(trace), "-o", str(out)],
    }
    answers = {}
    for name, command in commands.items():
        result = CliRunner().invoke(main, command)
        assert result.exception is None or isinstance(result.exception, SystemExit), (name, result.exception)
        answers[name] = "" if result.exit_code == 0 else result.stderr.split("]")[0].removeprefix("error[")
    try:
        open_trace(trace)
        answers["python"] = ""
    except errors.TraceError as error:
        answers["python"] = error.code
    return answers


def lose_list(trace: Path) -> None:
    (trace / checksums.FILE_NAME).unlink()


def lose_part_and_line(trace: Path) -> None:
    (trace / "parts/000001.parquet").unlink()
    lines = (trace / checksums.FILE_NAME).read_text().splitlines(keepends=True)
    (trace / checksums.FILE_NAME).write_text("".join(line for line in lines if "000001" not in line))


def copy_part(trace: Path) -> None:
    data = (trace / "parts/000001.parquet").read_bytes()
    (trace / "parts/000002.parquet").write_bytes(data)
    with (trace / checksums.FILE_NAME).open("a") as sums:
        sums.write(f"{hashlib.sha256(data).hexdigest()}  parts/000002.parquet\n")


def list_twice(trace: Path) -> None:
    sums = trace / checksums.FILE_NAME
    sums.write_text(sums.read_text() + sums.read_text().splitlines(keepends=True)[-2])


def link_part(trace: Path) -> None:
    part = trace / "parts/000001.parquet"
    part.rename(trace.parent / "elsewhere.parquet")
    part.symlink_to(trace.parent / "elsewhere.parquet")


def link_parts(trace: Path) -> None:
    (trace / "parts").rename(trace.parent / "elsewhere")
    (trace / "parts").symlink_to(trace.parent / "elsewhere")


def list_stranger(trace: Path) -> None:
    (trace / "notes.txt").write_text("")
    with (trace / checksums.FILE_NAME).open("a") as sums:
        sums.write(f"{hashlib.sha256(b'').hexdigest()}  notes.txt\n")


def change_header(trace: Path) -> None:
    text = (trace / "trace.json").read_text()
    (trace / "trace.json").write_text(text.replace("synthetic", "renamed"))


@pytest.mark.parametrize(
    "fault", [lose_list, lose_part_and_line, copy_part, list_twice, link_part, link_parts, list_stranger, change_header]
)
def test_a_trace_whose_files_and_list_disagree_is_damage_at_every_door(tmp_path: Path, fault: Callable) -> None:
    trace = trace_of(tmp_path / "t.moe")
    fault(trace.path)
    answers = every_door(trace.path, tmp_path / "out.jsonl")
    assert set(answers.values()) == {"trace-damaged"}, answers
    assert not (tmp_path / "out.jsonl").exists()


def test_a_part_under_the_next_number_is_damage_in_an_unfinished_trace_too(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t.moe", finish=False)
    copy_part(trace.path)
    assert set(every_door(trace.path, tmp_path / "out.jsonl").values()) == {"trace-damaged"}


JSON_FAULTS = {
    "deep header": ("trace.json", lambda text: "[" * 200_000),
    "deep summary": ("summary.json", lambda text: '{"a":' * 200_000),
    "NaN in the header": ("trace.json", lambda text: text.replace('"synthetic"', "NaN")),
    "warnings that are none": ("summary.json", lambda text: text.replace("{", '{"warnings": null,', 1)),
    "warnings that are numbers": ("summary.json", lambda text: text.replace("{", '{"warnings": [5],', 1)),
    "a sample that is a number": ("trace.json", lambda text: text.replace('"corpus": {', '"corpus": {"sample": 5')),
    "a layer of no experts": ("trace.json", lambda text: text.replace('"num_experts": 8', '"num_experts": 0')),
    "a negative layer": ("trace.json", lambda text: text.replace('"layer": 0', '"layer": -1')),
    "experts as text": ("trace.json", lambda text: text.replace('"num_experts": 8', '"num_experts": "8"')),
    "a summary that is a list": ("summary.json", lambda text: "[]"),
    "a catalogue that is a number": ("summary.json", lambda text: json.dumps(json.loads(text) | {"parts": 5})),
    "fewer tokens": ("summary.json", lambda text: json.dumps(json.loads(text) | {"tokens": 63})),
    "a tokens that is text": ("summary.json", lambda text: json.dumps(json.loads(text) | {"tokens": "64"})),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_a_header_or_summary_that_cannot_be_is_damage_at_every_door(tmp_path: Path, fault: str) -> None:
    name, change = JSON_FAULTS[fault]
    trace = trace_of(tmp_path / "t.moe")
    renew(trace.path, name, change((trace.path / name).read_text()).encode())
    answers = every_door(trace.path, tmp_path / "out.jsonl")
    assert set(answers.values()) == {"trace-damaged"}, answers


def test_a_vocabulary_with_an_id_twice_or_without_bytes_is_damage(tmp_path: Path) -> None:
    for change, problem in (
        (lambda table: pa.concat_tables([table, table.slice(3, 1)]), "token id 3 has two pieces"),
        (lambda table: table.drop_columns(["bytes"]), "columns are token_id"),
        (lambda table: table.set_column(0, "token_id", table["token_id"].cast(pa.int64())), "token_id .int64."),
    ):
        trace = trace_of(tmp_path / "t.moe")
        file = trace.path / "vocabulary.parquet"
        pq.write_table(change(pq.read_table(file)), file, store_schema=False)
        renew(trace.path, "vocabulary.parquet", file.read_bytes())
        (found,) = verify(trace.path)
        with pytest.raises(errors.TraceDamaged, match=problem):
            raise found
        shutil.rmtree(trace.path)


def test_a_part_is_refused_as_it_is_written_for_the_reasons_it_is_as_it_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    part = make_part(rng, LAYERS, [5, 20, 7], weights=True)
    with TraceWriter(tmp_path / "t.moe", Header(LAYERS, weights=True), VOCABULARY) as writer:
        part.gate_weights[3][4, 1] = np.inf
        with pytest.raises(ValueError, match="column W3_1, row 4: gate weight inf is not finite"):
            writer.write(part, {})
        part.gate_weights[3][4, 1] = 0
        part.expert_ids[3][2] = [5, 300, 300, 5]  # 300 is the null expert, which may be chosen twice
        with pytest.raises(ValueError, match=r"layer 3, row 2: expert 5 is chosen twice \(ranks 0 and 3\)"):
            writer.write(part, {})
        part.expert_ids[3][2] = [5, 300, 300, 6]
        writer.write(part, {})


def test_opening_a_complete_trace_reads_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for trace in (trace_of(tmp_path / "t.moe"), make_counts(tmp_path / "c.moe", {0: {0: {1: 3}}, 1: {0: {2: 1}}})):
        expected = (trace.domains, trace.num_documents, trace.domain_tokens)
        with monkeypatch.context() as patch:
            for name in ("read_metadata", "ParquetFile", "read_table"):
                patch.setattr(pq, name, _never)
            opened = open_trace(trace.path)
            assert (opened.domains, opened.num_documents, opened.domain_tokens) == expected


def _never(*_: object, **__: object) -> None:
    raise AssertionError("a part was read")


def test_a_part_written_anew_with_other_choices_is_another_file(tmp_path: Path) -> None:
    for finish in (True, False):
        trace = trace_of(tmp_path / f"{finish}.moe", finish=finish)
        file = trace.path / "parts/000001.parquet"
        table = pq.read_table(file)
        mark = pq.read_metadata(file).metadata[b"moescope"]
        swapped = [table[{"L0_0": "L0_1", "L0_1": "L0_0"}.get(name, name)] for name in table.column_names]
        with pq.ParquetWriter(file, table.schema, store_schema=False, write_page_checksum=True) as writer:
            writer.write_table(pa.table(swapped, table.schema))
            writer.add_key_value_metadata({b"moescope": mark})
        for read in (moescope.shares, moescope.repeats, lambda trace: moescope.sql(trace, "SELECT 1")):
            with pytest.raises(errors.TraceDamaged, match="it is another file than the"):
                read(trace.path)


def test_a_damaged_part_is_dropped_and_the_others_are_kept(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t.moe", 3)
    expected = [part.document.tolist() for part in trace.iter_parts()]
    file = trace.path / "parts/000001.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    result = CliRunner().invoke(main, ["verify", str(trace.path)])
    assert (result.exit_code, "--drop-damaged" in result.stderr) == (1, True)
    result = CliRunner().invoke(main, ["verify", "--drop-damaged", str(trace.path)])
    assert result.exit_code == 0, result.output
    assert "parts/000001.parquet" in result.output
    assert "3-5" in result.output
    kept = open_trace(trace.path)
    assert (kept.verify(), kept.complete, kept.num_tokens) == ([], True, 64)
    assert [part.document.tolist() for part in kept.iter_parts()] == [expected[0], expected[2]]
    assert "lost" in kept.summary["warnings"][0]
    assert (tmp_path / "t.moe.damaged" / "000001.parquet").read_bytes() == data
    assert moescope.tally(kept).data["tokens"].sum() == 64
    assert drop_damaged(trace.path) == []


def test_dropping_what_is_damaged_can_be_killed_and_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = ["replace", "open", "mkdir", "iterdir"]
    for kill_at in range(24):
        trace = trace_of(tmp_path / f"{kill_at}.moe", 3)
        (trace.path / "parts/000002.parquet").write_bytes(b"")
        left = iter(range(kill_at))
        with monkeypatch.context() as patch:
            for name in calls:
                _stop_after(patch, name, left)
            with suppress(KeyboardInterrupt):
                drop_damaged(trace.path)
        drop_damaged(trace.path)
        kept = open_trace(trace.path)
        assert (kept.verify(), kept.num_tokens) == ([], 64), kill_at


def _stop_after(patch: pytest.MonkeyPatch, name: str, left: object) -> None:
    call = getattr(Path, name)

    def counted(self: Path, *args: object, **kwargs: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return call(self, *args, **kwargs)

    patch.setattr(Path, name, counted)


def test_a_trace_of_which_more_than_parts_is_damaged_stays_as_it_is(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t.moe")
    (trace.path / "vocabulary.parquet").write_bytes(b"")
    (trace.path / "parts/000001.parquet").write_bytes(b"")
    before = {file: file.read_bytes() for file in trace.path.rglob("*") if file.is_file()}
    with pytest.raises(errors.TraceDamaged, match=r"vocabulary\.parquet fails"):
        drop_damaged(trace.path)
    assert before == {file: file.read_bytes() for file in trace.path.rglob("*") if file.is_file()}


def test_a_folder_with_somebodys_list_and_parts_is_not_touched(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "parts").mkdir(parents=True)
    (theirs / "parts/000000.parquet").write_bytes(b"theirs")
    digest = hashlib.sha256(b"theirs").hexdigest()
    (theirs / "SHA256SUMS").write_text(f"{digest}  parts/000000.parquet\n")
    before = {file: file.read_bytes() for file in theirs.rglob("*") if file.is_file()}
    for force in (False, True):
        with pytest.raises(errors.TraceExists, match="is not a trace"):
            TraceWriter(theirs, Header(LAYERS), VOCABULARY, force=force)
    assert before == {file: file.read_bytes() for file in theirs.rglob("*") if file.is_file()}


def test_a_file_in_the_place_of_the_next_part_is_not_overwritten(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t.moe", finish=False)
    stranger = trace.path / "parts/000002.parquet"
    stranger.write_bytes(b"theirs")
    for force in (False, True):
        with pytest.raises(errors.TraceError, match=r"000002\.parquet"):
            TraceWriter(trace.path, trace.header, VOCABULARY, force=force)
    assert stranger.read_bytes() == b"theirs"
    assert len(list((trace.path / "parts").iterdir())) == 3


def test_a_path_that_is_not_utf_8_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(errors.TraceError, match="not a path in UTF-8"):
        TraceWriter(tmp_path / "t\udcff.moe", Header(LAYERS), VOCABULARY)
    with pytest.raises(errors.TraceError, match="not a path in UTF-8"):
        open_trace(tmp_path / "t\udcff.moe")
