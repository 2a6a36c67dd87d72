"""The trace: round trips, damage, interruption, refusal."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import VOCABULARY, make_counts, make_part, make_trace

import moescope
from moescope import errors
from moescope.trace import PHASES, Header, Layer, Part, TraceWriter, Vocabulary, checksums, open_trace
from moescope.trace.verifying import verify

LAYERS = (Layer(0, 8, 2), Layer(3, 300, 4, num_null_experts=1))


def parts(weights: bool = False, dropped: float = 0.0) -> list[Part]:
    rng = np.random.default_rng(0)
    first = make_part(rng, LAYERS, [5, 40, 1, 17], weights=weights, dropped=dropped)
    return [first, make_part(rng, LAYERS, [30, 2], first_document=4, weights=weights, dropped=dropped)]


def assert_same_rows(found: Part, expected: Part) -> None:
    names = [np.array(part.domain_names)[part.domain] for part in (found, expected)]
    np.testing.assert_array_equal(*names)
    for column in ("document", "sequence", "position", "token_id"):
        np.testing.assert_array_equal(getattr(found, column), getattr(expected, column))
    for ours, theirs in ((found.expert_ids, expected.expert_ids), (found.gate_weights, expected.gate_weights)):
        assert ours.keys() == theirs.keys()
        for layer in ours:
            np.testing.assert_array_equal(ours[layer], theirs[layer])


@pytest.mark.parametrize("dropped", [0.0, 0.2])
def test_a_trace_gives_back_every_row_it_was_given(tmp_path: Path, dropped: float) -> None:
    written = parts(weights=True, dropped=dropped)
    trace = make_trace(tmp_path / "t.moe", written, LAYERS)
    for found, expected in zip(trace.iter_parts(weights=True), written, strict=True):
        assert_same_rows(found, expected)
    assert (trace.num_tokens, trace.num_documents, trace.complete) == (95, 6, True)
    assert trace.verify() == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    window=st.integers(1, 50),
    experts=st.integers(1, 520),
    data=st.data(),
)
def test_any_shape_of_model_and_corpus_survives_the_round_trip(tmp_path_factory, seed, lengths, window, experts, data):
    top_k = data.draw(st.integers(1, min(16, experts)))
    layers = (Layer(7, experts, top_k),)
    part = make_part(np.random.default_rng(seed), layers, lengths, window=window)
    trace = make_trace(tmp_path_factory.mktemp("any") / "t.moe", [part], layers)
    (found,) = trace.iter_parts()
    assert_same_rows(found, part)


def test_columns_are_plain_parquet_with_one_or_two_bytes_an_id_and_nulls_for_dropped(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t.moe", parts(dropped=0.2), LAYERS)
    table = pq.read_table(trace.parts[0].path)
    assert table.column_names == [
        "document", "domain", "sequence", "position", "token_id", "L0_0", "L0_1", "L3_0", "L3_1", "L3_2", "L3_3",
    ]  # fmt: skip
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert (types["L0_0"], types["L3_0"], types["token_id"], types["domain"]) == ("uint8", "uint16", "uint32", "string")
    assert table["L0_0"].null_count == int((parts(dropped=0.2)[0].expert_ids[0][:, 0] == -1).sum()) > 0
    assert [name for name in table.column_names if table.schema.field(name).nullable] == table.column_names[5:]


def test_phases_come_back_and_are_text_in_the_file(tmp_path: Path) -> None:
    phase = np.random.default_rng(1).integers(0, 2, 63)
    trace = make_trace(tmp_path / "t.moe", [replace(parts()[0], phase=phase)], LAYERS)
    (part,) = trace.iter_parts()
    assert part.phase is not None
    np.testing.assert_array_equal(part.phase, phase)
    np.testing.assert_array_equal(part.rows(phase == 1).phase, 1)
    assert pq.read_table(trace.parts[0].path)["phase"].to_pylist() == [PHASES[code] for code in phase]
    assert trace.verify() == []


def test_phases_the_header_does_not_announce_are_refused(tmp_path: Path) -> None:
    with (
        TraceWriter(tmp_path / "t.moe", Header(LAYERS), VOCABULARY) as writer,
        pytest.raises(ValueError, match="phase"),
    ):
        writer.write(replace(parts()[0], phase=np.zeros(63, int)), {})


def test_a_trace_without_token_ids_has_no_such_column_and_reads_zeros(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t.moe", parts(weights=True), LAYERS, token_ids=False)
    (first, _) = trace.iter_parts(weights=True)
    assert not first.token_id.any()
    np.testing.assert_array_equal(first.expert_ids[3], parts()[0].expert_ids[3])
    assert "token_id" not in pq.read_schema(trace.parts[0].path).names
    assert trace.verify() == []


LOADS = {0: {0: {0: 7, 3: 1}, 3: {299: 16}}, 4: {0: {1: 4}}}


def test_counts_come_back_and_what_needs_tokens_is_refused(tmp_path: Path) -> None:
    trace = make_counts(tmp_path / "c.moe", LOADS, LAYERS)
    (counts,) = trace.iter_counts()
    rows = zip(counts.document.tolist(), counts.layer.tolist(), counts.expert.tolist(), counts.count, strict=True)
    assert list(rows) == [(0, 0, 0, 7), (0, 0, 3, 1), (0, 3, 299, 16), (4, 0, 1, 4)]
    assert (trace.domains, trace.document_numbers.tolist(), trace.num_tokens) == (("ArXiv",), [0, 4], 6)
    assert trace.verify() == []
    for question in (lambda: list(trace.iter_parts()), lambda: trace.document(0), lambda: trace.parts[0].read(LAYERS)):
        with pytest.raises(errors.NotRecorded, match="counts of assignments, and no token"):
            question()


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        ({0: {1: {0: 1}}}, "layer 1 is not in the header"),
        ({0: {0: {8: 1}}}, "expert id"),
        ({0: {0: {0: 0}}}, "a count is 0"),
    ],
)
def test_counts_that_cannot_be_are_refused(tmp_path: Path, loads: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_counts(tmp_path / "c.moe", loads, LAYERS)


def test_a_dropped_assignment_where_the_header_knows_of_none_is_refused(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t.moe", Header(LAYERS), VOCABULARY) as writer:
        with pytest.raises(ValueError, match=r"layer 0, row \d+: -1 lies outside 0\.\.7"):
            writer.write(parts(dropped=0.2)[0], {})
        assert open_trace(tmp_path / "t.moe").num_tokens == 0
        writer.write(parts()[0], {})
    schema = pq.read_schema(open_trace(tmp_path / "t.moe").parts[0].path)
    assert not any(schema.field(name).nullable for name in schema.names)


def test_the_pages_of_eight_experts_take_less_than_0_40_bytes_an_id(tmp_path: Path) -> None:
    layers = tuple(Layer(layer, 8, 2) for layer in range(32))
    rng = np.random.default_rng(1)
    part = make_part(rng, layers, [512] * 256, window=512)
    trace = make_trace(tmp_path / "t.moe", [part], layers)
    assert trace.parts[0].path.stat().st_size / (part.num_tokens * 64) < 0.40


def test_reading_one_domain_gives_its_rows_only(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t.moe", parts(), LAYERS)
    (part, other) = trace.iter_parts([0], domains=["Github"])
    assert set(np.array(part.domain_names)[part.domain]) == {"Github"}
    assert part.num_tokens + other.num_tokens == 40 + 30
    assert set(part.expert_ids) == {0}
    with pytest.raises(errors.NoSuchDomain, match="no domain 'Books3'; the trace has ArXiv, Github"):
        next(trace.iter_parts(domains=["Books3"]))


def test_a_document_is_found_in_whichever_part_it_is(tmp_path: Path) -> None:
    written = parts()
    trace = make_trace(tmp_path / "t.moe", written, LAYERS)
    assert_same_rows(trace.document(5), written[1].rows(written[1].document == 5))
    with pytest.raises(errors.NoSuchDocument, match=r"document 17 is not in the trace \(6 are\)"):
        trace.document(17)


def test_what_was_not_recorded_is_an_error_that_says_so(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t.moe", parts(), LAYERS)
    with pytest.raises(errors.NoSuchLayer, match="layer 1 was not recorded; the trace has layers 0, 3"):
        trace.select_layers([0, 1])
    with pytest.raises(errors.NotRecorded, match="gate weights were not recorded"):
        next(trace.iter_parts(weights=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence": np.zeros(63, int)}, "order of its text"),
        ({"document": np.r_[np.zeros(60, int), 1, 0, 0]}, "contiguous"),
        ({"position": np.arange(63)}, "order of its text|position 0"),
        ({"domain": np.arange(63) % 3}, "one domain"),
        ({"expert_ids": {0: np.full((63, 2), 8), 3: np.zeros((63, 4), int)}}, "outside 0..7"),
        ({"expert_ids": {0: np.zeros((63, 2), int)}}, "layers"),
        ({"expert_ids": {0: np.zeros((63, 1), int), 3: np.zeros((63, 4), int)}}, "shape"),
    ],
)
def test_a_part_that_would_make_the_trace_lie_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    good = parts()[0]
    bad = Part(**{**good.__dict__, **change})
    with TraceWriter(tmp_path / "t.moe", Header(LAYERS), VOCABULARY) as writer:
        with pytest.raises(ValueError, match=message):
            writer.write(bad, {})
        writer.write(good, {})


def test_every_one_of_200_flipped_bytes_is_found_and_reading_never_gives_other_rows(tmp_path: Path) -> None:
    written = parts(weights=True)
    trace = make_trace(tmp_path / "t.moe", written, LAYERS)
    rng = np.random.default_rng(2)
    silent = []
    for _ in range(200):
        path = trace.parts[rng.integers(2)].path
        good = path.read_bytes()
        at = int(rng.integers(len(good)))
        path.write_bytes(good[:at] + bytes([good[at] ^ int(rng.integers(1, 256))]) + good[at + 1 :])
        assert verify(trace.path), f"byte {at} of {path.name}"
        try:
            found = list(open_trace(trace.path).iter_parts(weights=True))
        except errors.TraceDamaged:
            pass
        else:
            for part, expected in zip(found, written, strict=True):
                try:
                    assert_same_rows(part, expected)
                except AssertionError:
                    silent.append((path.name, at))
        path.write_bytes(good)
    assert not silent
    assert trace.verify() == []


@pytest.mark.parametrize("name", ["trace.json", "vocabulary.parquet", "summary.json", "parts/000000.parquet"])
def test_a_missing_or_changed_file_is_named(tmp_path: Path, name: str) -> None:
    trace = make_trace(tmp_path / "t.moe", parts(), LAYERS)
    file = trace.path / name
    text = file.read_bytes()
    file.write_bytes(text + b" ")
    (problem,) = trace.verify()
    assert f"{name} fails its checksum (expected " in problem.problem
    file.unlink()
    assert f"{name} is missing" in [problem.problem for problem in trace.verify()] or name == "summary.json"


def test_a_stray_part_is_not_taken_for_one_of_the_trace(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t.moe", parts(), LAYERS)
    shutil.copy(trace.parts[0].path, trace.path / "parts" / "000002.parquet")
    with pytest.raises(errors.TraceDamaged, match=r"parts/000002\.parquet is not listed in SHA256SUMS"):
        open_trace(trace.path)
    assert [problem.problem for problem in trace.verify()] == ["parts/000002.parquet is not listed in SHA256SUMS"]


def test_sha256sum_itself_can_check_a_trace(tmp_path: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("needs the program sha256sum")
    trace = make_trace(tmp_path / "t.moe", parts(), LAYERS)
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=trace.path).returncode == 0


def test_an_unfinished_trace_can_be_read_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first, second = parts()
    trace = make_trace(tmp_path / "t.moe", [first], LAYERS, finish=False)
    assert (trace.complete, trace.num_tokens, trace.verify()) == (False, 63, [])
    with TraceWriter(trace.path, trace.header, VOCABULARY) as writer:
        assert writer.progress == [{"documents_read": 4}]
        writer.write(second, {"documents_read": 6})
        writer.finish({"tokens": 95})
    whole = make_trace(tmp_path / "whole.moe", [first, second], LAYERS)
    for name in ("SHA256SUMS", "parts/000001.parquet"):
        assert (trace.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_writer_killed_between_any_two_system_calls_leaves_a_prefix(tmp_path: Path) -> None:
    """A child is stopped by SIGKILL at the nth call of fsync, write or rename, for every n until it survives."""
    written = parts()
    for n in range(100):
        path = tmp_path / f"{n}.moe"
        child = os.fork()
        if child == 0:
            _kill_at_call(n)
            make_trace(path, written, LAYERS)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            break
        if (path / "trace.json").exists():
            trace = open_trace(path)
            assert trace.verify() == []
            for found, expected in zip(trace.iter_parts(), written, strict=False):
                assert_same_rows(found, expected)
        resumed_from = 0
        with TraceWriter(path, Header(LAYERS, model={"name": "synthetic"}), VOCABULARY, force=True) as writer:
            resumed_from = len(writer.progress)
            for part in written[resumed_from:]:
                writer.write(part, {"documents_read": int(part.document.max()) + 1})
            writer.finish({"tokens": 95})
        assert open_trace(path).verify() == []
        assert open_trace(path).num_tokens == 95
    assert n > 15


def _kill_at_call(n: int) -> None:
    calls = 0

    def counting(call):
        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == n + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted

    os.fsync = counting(os.fsync)
    Path.replace = counting(Path.replace)
    Path.open = counting(Path.open)
    Path.unlink = counting(Path.unlink)


def test_a_full_disk_keeps_every_finished_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = parts()
    with TraceWriter(tmp_path / "t.moe", Header(LAYERS, model={"name": "synthetic"}), VOCABULARY) as writer:
        writer.write(first, {"documents_read": 4})
        with monkeypatch.context() as context:
            context.setattr(checksums, "_sync", _no_space)
            with pytest.raises(errors.DiskFull, match="every finished part is kept"):
                writer.write(second, {"documents_read": 6})
        assert open_trace(writer.path).num_tokens == 63
        writer.write(second, {"documents_read": 6})
        writer.finish({"tokens": 95})
    assert open_trace(tmp_path / "t.moe").verify() == []


@pytest.mark.parametrize("room", [0, 20, 64, 72])
def test_a_disk_that_fills_up_within_a_line_of_the_list_leaves_the_list_as_it_was(tmp_path: Path, room: int) -> None:
    checksums.rewrite(tmp_path, {})
    checksums.commit(tmp_path, "first", lambda file: file.write(b"1") and None)
    before = (tmp_path / checksums.FILE_NAME).read_bytes()
    code = (
        "import resource, signal, sys; from pathlib import Path; from moescope.trace import checksums\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + room}, resource.RLIM_INFINITY))\n"
        f"checksums.commit(Path({str(tmp_path)!r}), 'second', lambda file: file.write(b'2') and None)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "File too large" in ended.stderr
    assert (tmp_path / checksums.FILE_NAME).read_bytes() == before
    checksums.commit(tmp_path, "second", lambda file: file.write(b"2") and None)
    assert list(checksums.read(tmp_path)) == ["first", "second"]


def test_a_replacement_killed_at_any_file_is_done_again_by_the_same_call(tmp_path: Path) -> None:
    first, second = parts()
    for n in range(20):
        path = make_trace(tmp_path / f"{n}.moe", [first, second], LAYERS).path
        other = Header(LAYERS, model={"name": "another"})
        child = os.fork()
        if child == 0:
            _kill_at_call(n)
            with TraceWriter(path, other, VOCABULARY, force=True) as writer:
                writer.write(first, {"documents_read": 4})
            os._exit(0)
        _, status = os.waitpid(child, 0)
        with TraceWriter(path, other, VOCABULARY, force=True) as writer:
            if not writer.progress:
                writer.write(first, {"documents_read": 4})
            writer.finish({"tokens": 63})
        assert (open_trace(path).verify(), open_trace(path).header.model["name"]) == ([], "another")
        assert len(list((path / "parts").iterdir())) == 1
        if os.WIFEXITED(status):
            break
    assert n > 12


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_parts_of_somebody_else_are_neither_deleted_nor_overwritten(tmp_path: Path) -> None:
    for names in (
        ("parts/000000.parquet", "parts/000007.parquet", "parts/movie.mkv.part"),
        ("parts/movie.mkv.part",),
        ("parts/movie.mkv",),
        ("trace.json",),  # Chrome's, for one
        ("trace.json", "parts/000000.parquet"),
        ("summary.json",),
    ):
        folder = tmp_path / "-".join(names).replace("/", "-")
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text('{"traceEvents": []}')
        before = contents(folder)
        for force in (False, True):
            with pytest.raises(errors.TraceExists, match="exists and is not a trace"):
                TraceWriter(folder, Header(LAYERS), VOCABULARY, force=force)
        assert contents(folder) == before


def test_files_beside_the_parts_stay_when_a_trace_goes_on_or_is_replaced(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t.moe", parts()[:1], LAYERS, finish=False)
    kept = {f"parts/{name}": b"frames" for name in ("movie.mkv", "movie.mkv.part")}
    for name, content in kept.items():
        (trace.path / name).write_bytes(content)
    for header in (trace.header, Header(LAYERS, model={"name": "another"})):
        TraceWriter(trace.path, header, VOCABULARY, force=True).close()
        assert kept.items() <= contents(trace.path).items()


@pytest.mark.parametrize("lost", ["", "a part", "garbled"])
def test_an_unfinished_trace_whose_list_is_lost_keeps_its_parts_unless_forced(tmp_path: Path, lost: str) -> None:
    trace = make_trace(tmp_path / "t.moe", parts(), LAYERS, finish=False)
    lines = (trace.path / checksums.FILE_NAME).read_text().splitlines(keepends=True)
    (trace.path / checksums.FILE_NAME).unlink()
    if lost:
        (trace.path / checksums.FILE_NAME).write_text("".join(lines[:-1]) if lost == "a part" else "no\nlist\n")
    before = contents(trace.path)
    for header in (trace.header, Header(LAYERS, model={"name": "another"})):
        with pytest.raises(errors.TraceDamaged, match="SHA256SUMS"):
            TraceWriter(trace.path, header, VOCABULARY)
        assert contents(trace.path) == before
    with TraceWriter(trace.path, trace.header, VOCABULARY, force=True) as writer:
        assert writer.progress == []
        writer.write(parts()[0], {"documents_read": 4})
        writer.finish({"tokens": 63})
    assert open_trace(trace.path).verify() == []


@pytest.mark.parametrize("finish", [False, True])
def test_a_trace_is_never_written_through_a_link_into_another(tmp_path: Path, finish: bool) -> None:
    other = make_trace(tmp_path / "other.moe", parts(), LAYERS)
    before = contents(other.path)
    trace = make_trace(tmp_path / "t.moe", parts(), LAYERS, finish=finish)
    shutil.rmtree(trace.path / "parts")
    (trace.path / "parts").symlink_to(other.path / "parts")
    (tmp_path / "new.moe").mkdir()
    (tmp_path / "new.moe" / "parts").symlink_to(other.path / "parts")
    for path in (trace.path, tmp_path / "new.moe"):
        for force in (False, True):
            with pytest.raises(errors.TraceExists, match="a trace is not written through one"):
                TraceWriter(path, trace.header, VOCABULARY, force=force)
    assert contents(other.path) == before


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_another_recording_is_refused_by_the_name_of_what_differs(tmp_path: Path) -> None:
    make_trace(tmp_path / "t.moe", parts()[:1], LAYERS, finish=False)
    other = Header(LAYERS, model={"name": "another"})
    with pytest.raises(errors.TraceMismatch, match=r"model\.name: 'another', not 'synthetic'"):
        TraceWriter(tmp_path / "t.moe", other, VOCABULARY)
    with TraceWriter(tmp_path / "t.moe", other, VOCABULARY, force=True) as writer:
        assert writer.progress == []


def test_a_finished_trace_is_kept_unless_forced(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t.moe", parts(), LAYERS)
    with pytest.raises(errors.TraceExists, match="complete trace, which is kept"):
        TraceWriter(trace.path, trace.header, VOCABULARY)
    assert open_trace(trace.path).num_tokens == 95
    with TraceWriter(trace.path, trace.header, VOCABULARY, force=True) as writer:
        assert writer.progress == []


def test_something_that_is_no_trace_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(errors.TraceExists, match="is not a trace"):
            TraceWriter(path, Header(LAYERS), VOCABULARY, force=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_two_recorders_cannot_write_one_trace(tmp_path: Path) -> None:
    with (
        TraceWriter(tmp_path / "t.moe", Header(LAYERS), VOCABULARY),
        pytest.raises(errors.TraceBusy, match="another process"),
    ):
        TraceWriter(tmp_path / "t.moe", Header(LAYERS), VOCABULARY)


def test_a_trace_of_a_later_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t.moe", parts(), LAYERS)
    header = json.loads((trace.path / "trace.json").read_text())
    (trace.path / "trace.json").write_text(json.dumps({**header, "version": 4}))
    with pytest.raises(errors.TraceNewer) as caught:
        open_trace(trace.path)
    assert caught.value.render() == (
        f"error[trace-newer]: {trace.path}: written in version 4 of the trace format; this moescope reads up to 3\n"
        "hint: upgrade with `pip install -U moescope`"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": "moescope-trace"}',
        '{"format": "moescope-trace", "version": true}',
        '{"format": "moescope-trace", "version": 1, "layers": [{"layer": 0, "num_experts": 8, "top_k": 9}]}',
        '{"format": "moescope-trace", "version": 1, "layers": "all"}',
        *(
            '{"format": "moescope-trace", "version": 2, "layers": [{"layer": 0, "num_experts": 8, "top_k": 2}, '
            f'{{"layer": 1, "num_experts": 8, "top_k": 2, "lookahead": {distances}, "num_predicted": {number}}}]}}'
            for distances, number in (
                ("[2]", 2),
                ("[true]", 2),
                ("[1, 1]", 2),
                ("[0]", 2),
                ('"1"', 2),
                ("[1]", 0),
                ("[1]", 9),
                ("[]", 2),
            )
        ),
    ],
)
def test_a_broken_header_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises((errors.TraceDamaged, errors.TraceNotFound), match=r"trace\.json"):
        open_trace(tmp_path)


def test_what_is_no_trace_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(errors.TraceNotFound, match="nothing there"):
        open_trace(tmp_path / "absent.moe")
    with pytest.raises(errors.TraceNotFound, match=r"no trace\.json in it"):
        open_trace(tmp_path)


def test_a_list_of_checksums_cannot_lead_out_of_the_trace(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t.moe", parts(), LAYERS)
    with (trace.path / "SHA256SUMS").open("a") as file:
        file.write("0" * 64 + "  ../../etc/passwd\n")
    with pytest.raises(errors.TraceDamaged, match="SHA256SUMS line 6"):
        open_trace(trace.path)


def test_a_vocabulary_joins_pieces_that_are_half_characters() -> None:
    vocabulary = Vocabulary.from_pieces(["日".encode()[:2], "日".encode()[2:], b"x"])
    assert vocabulary.text([0, 1, 2]) == "日x"
    assert vocabulary.text([0, 2]) == "\ufffdx"


def test_a_kept_trace_of_version_1_reads_as_it_was_written() -> None:
    trace = open_trace(Path(__file__).parent / "kept" / "version-1.moe")
    assert trace.verify() == []
    assert (trace.domains, trace.document_numbers.tolist()) == (("ArXiv", "Github"), [4, 9])
    assert trace.header.model == {"name": "tiny"}
    assert trace.layers[0] == Layer(1, 4, 2, "layers.1.experts", num_null_experts=1, num_shared_experts=1, drops=True)
    (part,) = trace.iter_parts(weights=True)
    assert part.expert_ids[1].tolist() == [[0, 4], [3, -1], [1, 2], [2, 0]]
    assert part.expert_ids[2].tolist() == [[299], [0], [7], [-1]]
    assert part.gate_weights[1].tolist() == [[0.5, 0.25], [0.75, 0], [0.5, 0.5], [1, 0.125]]
    assert (part.sequence.tolist(), part.position.tolist()) == ([0, 0, 1, 0], [0, 1, 0, 0])
    assert trace.vocabulary.text(part.token_id[:3]) == "aé"


@pytest.mark.parametrize("version", [2, 3])
def test_a_kept_trace_of_a_later_version_reads_as_it_was_written(version: int) -> None:
    trace = open_trace(Path(__file__).parent / "kept" / f"version-{version}.moe")
    assert f'"version": {version}' in (trace.path / "trace.json").read_text()
    assert trace.verify() == []
    assert (trace.domains, trace.document_numbers.tolist(), trace.domain_tokens) == (
        ("é", "b"),
        [0, 3],
        {"é": 3, "b": 1},
    )
    later = {2: {"lookahead": (1,), "num_predicted": 3}, 3: {"drops": True, "partial": True}}[version]
    assert trace.layers == (
        Layer(1, 8, 2, "m.1", drops=True),
        Layer(2, 300, 2, "m.2", num_null_experts=1, **later),
    )
    (part,) = trace.iter_parts(weights=True, predictions=True)
    assert part.expert_ids[1].tolist() == [[0, 1], [7, -1], [2, 3], [-1, -1]]
    missing, dropped = {2: ([5, 6], [0, 4]), 3: ([-2, -2], [0, -1])}[version]
    assert part.expert_ids[2].tolist() == [[299, 300], missing, dropped, [256, 255]]
    assert part.gate_weights[2].tolist() == [[0.5, 0.125], [0, 0], [1, 0], [0.25, 0.25]]
    assert (part.sequence.tolist(), part.position.tolist()) == ([0, 0, 1, 0], [0, 1, 0, 0])
    assert part.phase.tolist() == [0, 0, 1, 1]
    predicted = {(2, 1): [[299, 300, 1], [5, 6, 7], [0, 4, 2], [1, 2, 3]]} if version == 2 else {}
    assert {key: ids.tolist() for key, ids in part.predictions.items()} == predicted
    assert trace.vocabulary.text([5, 9, 7]) == "café"


def test_a_kept_trace_with_clusters_labels_margins_and_masses_reads_as_it_was_written() -> None:
    trace = open_trace(Path(__file__).parent / "kept" / "version-3-scores.moe")
    assert trace.verify() == []
    (part,) = trace.iter_parts(scores=True)
    assert [part.cluster.names[code] for code in part.cluster.codes] == ["book é", "book é", "book é", "book b"]
    assert [part.label.names[code] for code in part.label.codes] == ["answer", "", "", "answer"]
    assert {layer: values.tolist() for layer, values in part.margins.items()} == {
        1: [0.5, -0.25, 0, 2],
        2: [1, 0, 0.125, 3],
    }
    assert {layer: values.tolist() for layer, values in part.masses.items()} == {
        1: [0.5, 0.25, 1, 0],
        2: [0.75, 0, 0.5, 1],
    }
    (plain,) = trace.iter_parts()
    assert (plain.margins, plain.masses) == ({}, {})
    frame = moescope.sql(trace, "SELECT cluster, label, M1, S2 FROM tokens WHERE M2 > 1")
    assert frame.to_dict("list") == {"cluster": ["book b"], "label": ["answer"], "M1": [2.0], "S2": [1.0]}


def test_clusters_labels_margins_and_masses_are_written_joined_and_selected(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = [make_part(rng, LAYERS, [9, 20, 5], first_document=3 * n, scores=True) for n in range(2)]
    trace = make_trace(tmp_path / "t.moe", parts, LAYERS)
    assert '"version": 3' in (trace.path / "trace.json").read_text()
    joined = Part.joined(list(trace.iter_parts(scores=True)))
    for name in ("cluster", "label"):
        labels = getattr(joined, name)
        expected = [getattr(part, name).names[code] for part in parts for code in getattr(part, name).codes]
        assert [labels.names[code] for code in labels.codes] == expected
        assert labels.rows(slice(9, 40)).codes.tolist() == labels.codes[9:40].tolist()
    for name in ("margins", "masses"):
        for layer in LAYERS:
            expected = np.concatenate([getattr(part, name)[layer.layer] for part in parts])
            np.testing.assert_array_equal(getattr(joined, name)[layer.layer], expected)
            assert getattr(joined.rows(joined.document == 4), name)[layer.layer].shape == (20,)
    with pytest.raises(ValueError, match="clusters must be given if and only if"):
        make_trace(tmp_path / "u.moe", [parts[0], replace(parts[1], cluster=None)], LAYERS)


def test_arrays_may_have_clusters_labels_margins_and_masses(tmp_path: Path) -> None:
    ids = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])
    given = {
        "documents": [0, 0, 1, 2],
        "clusters": ["x", "x", "y", "x"],
        "labels": ["user", "answer", "user", "user"],
        "margins": [[0.5, 1, 2, -1]],
        "masses": {0: [1, 0.5, 0, 0.25]},
    }
    with pytest.warns(UserWarning, match="order of a token's choices"):
        trace = moescope.from_arrays(tmp_path / "a.moe", [ids], num_experts=8, **given)
    (part,) = trace.iter_parts(scores=True)
    assert [part.cluster.names[code] for code in part.cluster.codes] == given["clusters"]
    assert [part.label.names[code] for code in part.label.codes] == given["labels"]
    assert (part.margins[0].tolist(), part.masses[0].tolist()) == ([0.5, 1, 2, -1], [1, 0.5, 0, 0.25])
    for wrong, message in (
        ({"clusters": ["x", "y", "y", "x"]}, "a document has one of clusters; tokens 0 to 1 have several"),
        ({"labels": ["user"]}, "labels must be one per token, 4, found 1"),
        ({"margins": [[0, 1, 2, float("nan")]]}, "margins of layer 0 must be 4 finite numbers"),
        ({"masses": [[0, 1, 2, 0]]}, "masses are probabilities"),
        ({"masses": {3: [0, 0, 0, 0]}}, "masses must be given for the layers of expert_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            moescope.from_arrays(tmp_path / "b.moe", [ids], num_experts=8, **{**given, **wrong})


def test_a_trace_knows_the_part_and_the_domain_of_each_document(tmp_path: Path) -> None:
    layers = (Layer(0, 8, 2),)
    rng = np.random.default_rng(0)
    first = make_part(rng, layers, [3, 2], domains=("B", "A"))
    second = make_part(rng, layers, [4, 1, 2], domains=("C", "A", "B"), first_document=2)
    made = make_trace(tmp_path / "t.moe", [first, second], layers)
    assert made.domains == ("B", "A", "C")
    assert made.document_numbers.tolist() == [0, 1, 2, 3, 4]
    assert made.document_parts.tolist() == [0, 0, 1, 1, 1]
    names = [made.domains[code] for code in made.document_domains]
    assert names == ["B", "A", "B", "C", "A"]


AHEAD = (Layer(0, 8, 2), Layer(3, 300, 4, num_null_experts=1, lookahead=(1,), num_predicted=5))


def predicted_part() -> Part:
    rng = np.random.default_rng(0)
    part = make_part(rng, AHEAD, [5, 40, 1, 17])
    return replace(part, predictions={(3, 1): rng.random((63, 301)).argsort(axis=1)[:, :5]})


def test_predictions_come_back_only_if_they_are_asked_for(tmp_path: Path) -> None:
    part = predicted_part()
    trace = make_trace(tmp_path / "t.moe", [part], AHEAD)
    assert json.loads((trace.path / "trace.json").read_text())["version"] == 2
    assert (trace.header.lookahead, trace.layers[1].lookahead, trace.verify()) == ((1,), (1,), [])
    assert next(trace.iter_parts()).predictions == {}
    found = next(trace.iter_parts(predictions=True, domains=["Github"]))
    np.testing.assert_array_equal(found.predictions[3, 1], part.predictions[3, 1][5:45])
    assert next(trace.iter_parts(layers=[0], predictions=True)).predictions == {}
    assert pq.read_schema(trace.parts[0].path).names[-5:] == [f"P3_1_{rank}" for rank in range(5)]


def test_a_trace_without_predictions_is_written_for_earlier_readers(tmp_path: Path) -> None:
    header = json.loads((make_trace(tmp_path / "t.moe", parts(), LAYERS).path / "trace.json").read_text())
    assert header["version"] == 1
    assert not {"lookahead", "num_predicted"} & set(header["layers"][0])


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {(3, 1): np.zeros((63, 4), int)},
        {(3, 1): np.full((63, 5), 301)},
        {(3, 1): np.full((63, 5), -1)},
        {(3, 1): np.zeros((63, 5), int), (3, 2): np.zeros((63, 5), int)},
    ],
)
def test_predictions_that_are_not_those_of_the_header_are_refused(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(ValueError, match="predictions"):
        make_trace(tmp_path / "t.moe", [replace(predicted_part(), predictions=wrong)], AHEAD)


def test_a_damaged_prediction_is_found(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t.moe", [predicted_part()], AHEAD)
    path = trace.parts[0].path
    column = pq.read_metadata(path).row_group(0).column(len(pq.read_schema(path).names) - 1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(data))
    with pytest.raises(errors.TraceDamaged, match="cannot be read"):
        next(open_trace(trace.path).iter_parts(predictions=True))
    assert "fails its checksum" in str(trace.verify()[0])


@pytest.mark.parametrize("wrong", [None, 301])
def test_verify_reads_predictions_too(tmp_path: Path, wrong: int | None) -> None:
    trace = make_trace(tmp_path / "t.moe", [predicted_part()], AHEAD)
    path = trace.parts[0].path
    table = pq.read_table(path)
    values = pa.array([wrong, *table["P3_1_4"].to_pylist()[1:]], pa.uint16())
    at = table.schema.names.index("P3_1_4")
    path.chmod(0o644)
    mark = pq.read_metadata(path).metadata[b"moescope"]
    changed = table.set_column(at, "P3_1_4", values)
    with pq.ParquetWriter(path, changed.schema, store_schema=False) as writer:
        writer.write_table(changed)
        writer.add_key_value_metadata({b"moescope": mark})
    sums = trace.path / "SHA256SUMS"
    name = str(path.relative_to(trace.path))
    lines = sums.read_text().replace(checksums.read(trace.path)[name], checksums.digest_file(path))
    sums.write_text("".join(line for line in lines.splitlines(keepends=True) if "summary" not in line))
    (trace.path / "summary.json").unlink()
    (problem,) = verify(trace.path)
    assert ("row 0: 301 lies outside 0..300" if wrong else "has nulls, and no value of it can be missing") in str(
        problem
    )
