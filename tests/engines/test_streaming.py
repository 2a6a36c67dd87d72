"""Layer by layer: the same trace as in memory, each byte of a checkpoint read once, and no family guessed at."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from families import FAMILIES, tiny_model
from safetensors import safe_open
from tiny import byte_level_tokenizer, some_documents

from moescope.cli import main
from moescope.engines import work
from moescope.engines.streamed import estimate, layerwise, shards, spool
from moescope.engines.streamed.rehearsal import rehearse
from moescope.engines.streamed.shards import Shards
from moescope.engines.streamed.shrinking import shrink
from moescope.engines.transformers.model import Checkpoint
from moescope.engines.transformers.routers import find_experts
from moescope.errors import (
    CorpusEmpty,
    DiskFull,
    ModelDamaged,
    ModelNotStreamable,
    MoescopeError,
    RouterNotFinite,
    TraceBusy,
    TraceDamaged,
    TraceExists,
    TraceMismatch,
)
from moescope.recording import Estimate, Progress, record, recorder
from moescope.trace import Trace, TraceWriter
from moescope.trace.locks import locked

OPTIONS: dict[str, Any] = {"window": 40, "part_tokens": 100, "batch_tokens": 90, "weights": True}


def save(model: Any, folder: Path, **options: Any) -> Path:
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    byte_level_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    """A checkpoint of four layers, with its head, in several files."""
    return save(tiny_model("mixtral", causal=True), tmp_path / "model", max_shard_size="60KB")


def same_parts(left: Trace, right: Trace) -> bool:
    return [part.path.read_bytes() for part in left.parts] == [part.path.read_bytes() for part in right.parts]


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------------- the same trace


NOT_STREAMED = {
    "diffusion_gemma": "2 tensors are missing",  # its encoder shares the decoder's weights
    "nllb-moe": "is an encoder-decoder",
    "step3p7": "no small one could be made",
    "switch_transformers": "is an encoder-decoder",
}


@pytest.mark.parametrize("family", NOT_STREAMED)
@pytest.mark.filterwarnings("ignore:.*NLLB-MoE")
def test_what_does_not_come_out_the_same_is_refused_by_name(family: str, tmp_path: Path) -> None:
    folder = save(tiny_model(family), tmp_path / "model")
    with pytest.raises(ModelNotStreamable, match=NOT_STREAMED[family]):
        record(folder, some_documents(), tmp_path / "streamed.moe", stream=True, **OPTIONS)
    assert not (tmp_path / "streamed.moe").exists()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_STREAMED])
def test_a_streamed_trace_is_that_of_the_model_in_memory_to_the_byte(family: str, tmp_path: Path) -> None:
    folder = save(tiny_model(family), tmp_path / "model", max_shard_size="100KB")
    documents = some_documents()
    whole = record(folder, documents, tmp_path / "whole.moe", stream=False, **OPTIONS)
    streamed = record(folder, documents, tmp_path / "streamed.moe", stream=True, **OPTIONS)
    assert streamed.header.run.pop("engine") == "streamed"
    assert streamed.header == whole.header
    assert len(whole.parts) > 1
    assert same_parts(whole, streamed)
    assert streamed.summary == whole.summary
    assert streamed.verify() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "streamed.moe", "whole.moe"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_every_dtype_is_the_same_in_both_engines(stored: str, dtype: str, tmp_path: Path) -> None:
    folder = save(tiny_model("qwen3_moe").to(getattr(torch, stored)), tmp_path / "model")
    traces = [
        record(folder, some_documents(), tmp_path / f"{stream}.moe", stream=stream, dtype=dtype, **OPTIONS)
        for stream in (False, True)
    ]
    assert same_parts(*traces)
    assert traces[1].header.model["dtype"] == dtype


def test_what_the_layers_hand_on_may_be_in_memory_or_on_disk(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_back: list[int] = []
    own = spool.States._read_into

    def read_into(self: Any, data: Any, start: int) -> None:
        read_back.append(len(data))
        own(self, data, start)

    monkeypatch.setattr(spool.States, "_read_into", read_into)
    layer_bytes = sum(each.nbytes for each in tiny_model("mixtral").layers[0].state_dict().values())
    traces, totals = [], []
    for spool_bytes in (0, 30_000, 10**9):
        announced: list[Estimate] = []
        memory = 10**9 + int(1.5 * layer_bytes) + spool_bytes
        out = tmp_path / f"{spool_bytes}.moe"
        traces.append(
            record(mixtral, some_documents(), out, stream=True, memory=memory, announce=announced.append, **OPTIONS)
        )
        assert announced[0].spool_bytes == min(spool_bytes, announced[0].tokens * 32 * 4)
        totals.append(sum(read_back))
        read_back.clear()
    assert same_parts(traces[0], traces[1])
    assert same_parts(traces[0], traces[2])
    tokens = traces[0].num_tokens
    assert totals[0] > 3 * tokens * 32 * 4  # padding and added tokens are handed on, too
    assert totals[0] > totals[1] > totals[2] == 0


def test_a_layer_asked_for_is_recorded_and_later_ones_are_never_read(mixtral: Path, tmp_path: Path) -> None:
    with reads() as seen:
        streamed = record(mixtral, some_documents(), tmp_path / "s.moe", stream=True, layers=[1], **OPTIONS)
    whole = record(mixtral, some_documents(), tmp_path / "w.moe", stream=False, layers=[1], **OPTIONS)
    assert same_parts(whole, streamed)
    names = names_read(mixtral, seen)
    assert not any(".layers.2." in name or ".layers.3." in name for name in names)
    assert any(".layers.1." in name for name in names)


# ------------------------------------------------------------------------------------------- reading and memory


class reads(pytest.MonkeyPatch):
    """While it lasts, notes (file, start, length) of each reading from a checkpoint."""

    def __enter__(self) -> list[tuple[str, int, int]]:
        seen: list[tuple[str, int, int]] = []
        own = shards._Shard.read

        def read(self: Any, into: memoryview, start: int) -> None:
            seen.append((str(self.path), start, len(into)))
            own(self, into, start)

        self.setattr(shards._Shard, "read", read)
        return seen

    def __exit__(self, *_: object) -> None:
        self.undo()


def names_read(folder: Path, seen: list[tuple[str, int, int]]) -> set[str]:
    """Names of the tensors that were read, by an own reading of the headers."""
    found = set()
    for path in folder.glob("*.safetensors"):
        text = path.read_bytes()
        length = int.from_bytes(text[:8], "little")
        for name, entry in json.loads(text[8 : 8 + length]).items():
            start = 8 + length + entry["data_offsets"][0] if name != "__metadata__" else -1
            if any(file == str(path) and place == start for file, place, _ in seen):
                found.add(name)
    return found


def test_each_byte_is_read_once_and_the_last_layers_experts_and_the_head_never(mixtral: Path, tmp_path: Path) -> None:
    announced: list[Estimate] = []
    with reads() as seen:
        record(
            mixtral, some_documents([400] * 9), tmp_path / "s.moe", stream=True, announce=announced.append, **OPTIONS
        )
    own = [entry for entry in seen if entry[0].startswith(str(mixtral))]
    data = Counter((file, byte) for file, start, length in own for byte in range(start, start + length) if start > 8)
    assert set(data.values()) == {1}
    every = {}
    for path in mixtral.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            every |= {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118 - no dict
    unread = {name for name in every if ".layers.3." in name and ".experts." in name} | {"lm_head.weight"}
    assert len(unread) == 1 + 8 * 3
    assert names_read(mixtral, own) == every.keys() - unread
    assert announced[0].model_bytes == sum(every[name] for name in every.keys() - unread)


def test_one_layer_at_a_time_is_in_memory_and_none_in_the_end(mixtral: Path, tmp_path: Path) -> None:
    held: list[set[int]] = []
    bodies = []
    own = layerwise.Layerwise.run

    def loaded(body: Any) -> set[int]:
        named = [*body.named_parameters(), *body.named_buffers()]
        return {int(name.split(".")[1]) for name, each in named if name.startswith("layers.") and not each.is_meta}

    def run(self: Any, layer: int, *rest: Any) -> Any:
        if str(self.shards._files[0].path).startswith(str(mixtral)):
            held.append(loaded(self.body) - {layer})
            bodies.append(self.body)
        return own(self, layer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layerwise.Layerwise, "run", run)
        record(mixtral, some_documents(), tmp_path / "s.moe", stream=True, **OPTIONS)
    assert len(held) >= 12
    assert held == [set()] * len(held)
    assert loaded(bodies[-1]) == set()
    assert not any("forward" in vars(module) for module in bodies[-1].modules())


# ----------------------------------------------------------------------------------------------------- interrupted


class Stop(BaseException):
    """What stops a recording in these tests."""


def stopped_after(number: int) -> Callable[[object], None]:
    calls = iter(range(10**9))

    def progress(_: object) -> None:
        if next(calls) == number:
            raise Stop

    return progress


def test_stopped_after_any_batch_it_goes_on_to_the_same_trace(mixtral: Path, tmp_path: Path) -> None:
    documents = some_documents()
    whole = record(mixtral, documents, tmp_path / "whole.moe", stream=False, **OPTIONS)
    calls: list[Progress] = []
    record(mixtral, documents, tmp_path / "once.moe", stream=True, progress=calls.append, **OPTIONS)
    fractions = [call.fraction or 0 for call in calls]
    assert fractions == sorted(set(fractions))
    assert (fractions[-1], calls[-1].tokens) == (1.0, whole.num_tokens)
    out = tmp_path / "again.moe"
    first_layers = []
    for number in range(1, len(calls), 6):
        announced: list[Estimate] = []
        with pytest.raises(Stop):
            record(mixtral, documents, out, progress=stopped_after(number), stream=True, memory=0, **OPTIONS)
        record(mixtral, documents, out, announce=announced.append, **OPTIONS)  # it streams, since that was begun
        first_layers.append(announced[0].first_layer)
        trace = record_of(out)
        assert same_parts(trace, whole)
        assert trace.summary == whole.summary
        assert not work.work_folder(out).exists()
        for path in [*out.rglob("*")]:
            path.unlink() if path.is_file() else None
    assert set(first_layers) == {0, 1, 2, 3}


def record_of(out: Path) -> Trace:
    from moescope.trace import open_trace

    return open_trace(out)


def interrupted(model: Path, out: Path, **changes: Any) -> None:
    """Stop a streamed recording in its third layer."""

    def progress(report: Any) -> None:
        if report.fraction > 0.6:
            raise Stop

    with pytest.raises(Stop):
        record(model, some_documents(), out, stream=True, progress=progress, **OPTIONS | changes)


def test_finished_layers_are_not_read_again(mixtral: Path, tmp_path: Path) -> None:
    interrupted(mixtral, tmp_path / "s.moe")
    with reads() as seen:
        record(mixtral, some_documents(), tmp_path / "s.moe", **OPTIONS)
    names = names_read(mixtral, seen)
    assert not any(".layers.0." in name or ".layers.1." in name for name in names)
    assert any(".layers.2." in name for name in names)


def test_stopped_while_the_parts_are_written_it_goes_on_with_them(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = record(mixtral, some_documents(), tmp_path / "whole.moe", stream=False, **OPTIONS)
    written: list[object] = []
    own = TraceWriter.write

    def write(*arguments: Any) -> None:
        if len(written) == 2:
            raise Stop
        written.append(own(*arguments))

    monkeypatch.setattr(TraceWriter, "write", write)
    with pytest.raises(Stop):
        record(mixtral, some_documents(), tmp_path / "s.moe", stream=True, **OPTIONS)
    monkeypatch.undo()
    with reads() as seen:
        trace = record(mixtral, some_documents(), tmp_path / "s.moe", **OPTIONS)
    assert not any(".layers." in name for name in names_read(mixtral, seen))
    assert same_parts(trace, whole)
    assert trace.summary == whole.summary


def test_another_recording_is_not_continued_and_what_differs_is_named(mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.moe"
    interrupted(mixtral, out)
    with pytest.raises(TraceMismatch, match=r"run.window: 39, not 40"):
        record(mixtral, some_documents(), out, **OPTIONS | {"window": 39})
    with pytest.raises(TraceMismatch, match=r"corpus.fingerprint"):
        record(mixtral, some_documents([50, 60]), out, **OPTIONS)
    interrupted(mixtral, tmp_path / "once.moe")
    plan = work.work_folder(tmp_path / "once.moe") / work.PLAN
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"tokens": "0" * 64}))
    with pytest.raises(TraceMismatch, match="the tokens of the corpus"):
        record(mixtral, some_documents(), tmp_path / "once.moe", **OPTIONS)
    trace = record(mixtral, some_documents(), out, force=True, **OPTIONS | {"window": 39})
    assert trace.header.run["window"] == 39


def test_an_unfinished_trace_of_the_other_engine_is_not_streamed_into(mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.moe"
    with pytest.raises(Stop):
        record(mixtral, some_documents(), out, stream=False, progress=stopped_after(4), **OPTIONS)
    with pytest.raises(TraceMismatch, match=r"run.engine"):
        record(mixtral, some_documents(), out, stream=True, **OPTIONS)
    assert "engine" not in record(mixtral, some_documents(), out, memory=0, **OPTIONS).header.run


@pytest.mark.parametrize("name", ["states-000001", "choices-000001.npy", "weights-000000.npy", work.PLAN])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_work_folder_is_refused_by_name_and_force_begins_anew(
    name: str, damage: str, mixtral: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.moe"
    interrupted(mixtral, out)
    path = work.work_folder(out) / name
    text = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        text[len(text) // 2] ^= 1
        path.write_bytes(text if damage == "flip" else text[: len(text) // 2])
    if damage == "remove" and name in (work.PLAN, "states-000001"):
        return  # without a plan there is no work; without states it starts again, which costs time and nothing else
    with pytest.raises((TraceDamaged, TraceMismatch)):
        record(mixtral, some_documents(), out, stream=True, **OPTIONS)
    assert record(mixtral, some_documents(), out, stream=True, force=True, **OPTIONS).complete


def test_a_second_process_is_told_that_the_first_is_at_it(mixtral: Path, tmp_path: Path) -> None:
    def progress(_: object) -> None:
        with pytest.raises(TraceBusy):
            record(mixtral, some_documents(), tmp_path / "s.moe", stream=True, **OPTIONS)
        raise Stop

    with pytest.raises(Stop):
        record(mixtral, some_documents(), tmp_path / "s.moe", stream=True, progress=progress, **OPTIONS)


def test_what_is_not_ours_is_left_alone_before_any_layer_runs(mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.moe"
    folder = work.work_folder(out)
    for path in (out / "thesis.tex", out / "parts/000000.parquet", folder / "thesis.tex", folder / "states-of-america"):
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        with pytest.raises(TraceExists):
            record(mixtral, some_documents(), out, stream=True, force=True, progress=stopped_after(0), **OPTIONS)
        assert path.read_text() == "mine"
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_complete_trace_is_kept_and_its_leftover_work_cleared_away(mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.moe"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "remove_work", lambda _: None)  # as if killed just before
        record(mixtral, some_documents(), out, stream=True, **OPTIONS)
    assert work.has_work(out)
    with pytest.raises(TraceExists):
        record(mixtral, some_documents(), out, stream=True, **OPTIONS)
    assert not work.work_folder(out).exists()


def test_work_that_is_to_replace_a_complete_trace_is_kept_by_a_call_without_force(
    mixtral: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.moe"
    record(mixtral, some_documents(), out, stream=True, **OPTIONS)
    other = OPTIONS | {"window": 39}
    with pytest.raises(Stop):
        record(mixtral, some_documents(), out, stream=True, force=True, progress=stopped_after(20), **other)
    for options in (OPTIONS, other):
        with pytest.raises(TraceExists, match=r"s\.moe\.stream beside it holds unfinished work of another"):
            record(mixtral, some_documents(), out, stream=True, **options)
    announced: list[Estimate] = []
    again = record(mixtral, some_documents(), out, force=True, announce=announced.append, **other)
    assert announced[0].first_layer > 0
    assert again.header.run["window"] == 39
    assert not work.work_folder(out).exists()


def test_work_that_another_process_is_at_is_left_alone(mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.moe"
    interrupted(mixtral, out)
    with locked(work.work_folder(out)):
        work.remove_work(out)
    assert work.has_work(out)
    (work.work_folder(out) / work.PLAN).unlink()  # a kill came while it was cleared away
    work.remove_work(out)
    assert not work.work_folder(out).exists()


def test_the_folder_is_let_go_of_only_when_what_was_committed_is_on_disk_whatever_ctrl_c_says(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, begun, ended = spool.Spool._commit, threading.Event(), threading.Event()

    def slowly(self: Any, *given: Any) -> None:
        begun.set()
        time.sleep(0.5)
        commit(self, *given)
        ended.set()

    def interrupt_twice() -> None:
        begun.wait(60)
        for _ in range(2):
            time.sleep(0.1)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    monkeypatch.setattr(spool.Spool, "_commit", slowly)
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt_twice).start()
        with pytest.raises(KeyboardInterrupt):
            record(mixtral, some_documents(), tmp_path / "s.moe", stream=True, **OPTIONS)
    finally:
        signal.signal(signal.SIGINT, own)
    assert ended.is_set()
    monkeypatch.undo()
    with locked(work.work_folder(tmp_path / "s.moe")):  # it can be taken
        pass
    record(mixtral, some_documents(), tmp_path / "s.moe", stream=True, **OPTIONS)


def test_a_disk_that_is_too_small_is_said_before_the_first_layer(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = estimate.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFull, match="GB are free"):
        record(mixtral, some_documents(), tmp_path / "s.moe", stream=True, progress=stopped_after(0), **OPTIONS)


# ------------------------------------------------------------------------------------------- the choice of an engine


def test_a_checkpoint_streams_exactly_if_it_does_not_fit(mixtral: Path, tmp_path: Path) -> None:
    streams = {
        memory: "engine" in record(mixtral, some_documents([30]), tmp_path / f"{memory}", memory=memory).header.run
        for memory in (10**6, 10**9, 10**9 + 10**6)
    }
    assert streams == {10**6: True, 10**9: True, 10**9 + 10**6: False}


def test_the_bytes_of_a_model_are_those_of_its_tensors_in_the_dtype_asked_for(mixtral: Path) -> None:
    numbers = sum(tensor.numel() for tensor in tiny_model("mixtral", causal=True).state_dict().values())
    assert estimate.model_bytes(mixtral, "auto") == 4 * numbers
    assert estimate.model_bytes(mixtral, "bfloat16") == 2 * numbers


def test_force_chooses_the_engine_anew_and_clears_away_the_work_of_a_stream(mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.moe"
    record(mixtral, some_documents(), out, stream=False, **OPTIONS)
    assert record(mixtral, some_documents(), out, memory=0, force=True, **OPTIONS).header.run["engine"] == "streamed"
    interrupted(mixtral, tmp_path / "given-up.moe")
    record(mixtral, some_documents(), tmp_path / "given-up.moe", stream=False, **OPTIONS)
    assert not work.work_folder(tmp_path / "given-up.moe").exists()


def test_a_loaded_model_cannot_be_streamed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in memory already"):
        record((tiny_model("mixtral"), byte_level_tokenizer()), some_documents(), tmp_path / "s.moe", stream=True)


def test_the_command_says_what_streaming_will_take_and_reads_sizes(mixtral: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(
            json.dumps({"text": each.text, "meta": {"pile_set_name": each.domain}}) + "\n" for each in some_documents()
        )
    )

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["record", str(mixtral), str(corpus), *arguments])

    result = run("-o", str(tmp_path / "s.moe"), "--memory", "1.5 MiB")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "through 4 layers, one at a time; each is read once" in result.stderr
    assert "time: about 0:0" in result.stderr
    assert "0.0 GB of it for what a layer gives to the next" in result.stderr
    result = run("-o", str(tmp_path / "w.moe"), "--no-stream", "--memory", "1M")
    assert result.exit_code == 0
    assert "one at a time" not in result.stderr
    assert run("-o", str(tmp_path / "x.moe"), "--memory", "lots").exit_code == 2


# ------------------------------------------------------------------------------------------------------- refused


def test_a_family_that_carries_state_past_its_layers_is_refused_by_name() -> None:
    config = transformers.AutoConfig.for_model("inkling2")
    with torch.device("meta"):
        experts = find_experts(transformers.AutoModel.from_config(config), "model")
    with pytest.raises(ModelNotStreamable, match=r"inkling2 models cannot be streamed.*layer 7 chooses otherwise"):
        rehearse(Checkpoint(Path(), "model", config, byte_level_tokenizer()), experts, torch.bfloat16)


@pytest.mark.parametrize("family", ["deepseek_v4", "hy_v4"])
def test_families_whose_layers_return_more_than_hidden_states_can_be_rehearsed(family: str) -> None:
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = transformers.AutoConfig.for_model(family)
    with torch.device("meta"):
        experts = find_experts(transformers.AutoModel.from_config(config), "model")
    rehearsal = rehearse(Checkpoint(Path(), "model", config, byte_level_tokenizer()), experts, torch.bfloat16)
    assert rehearsal.state_widths >= 4


@pytest.mark.parametrize("fault", ["experts swapped", "last bit of a state", "a layer left out"])
def test_the_rehearsal_notices(fault: str, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "experts swapped":
        own_places = layerwise.Layerwise._places

        def places(*arguments: Any) -> Any:
            found = own_places(*arguments)
            return found and {key: (7 - index, start, end) for key, (index, start, end) in found.items()}

        monkeypatch.setattr(layerwise.Layerwise, "_places", places)
    else:
        own_run = layerwise.Layerwise.run

        def run(self: Any, layer: int, inputs: Any, before: Any) -> Any:
            returned = own_run(self, layer, inputs, before)
            if layer != 1:
                return returned
            return before if fault == "a layer left out" else returned * (1 + 2**-23)

        monkeypatch.setattr(layerwise.Layerwise, "run", run)
    with pytest.raises(ModelNotStreamable, match="mixtral models cannot be streamed"):
        record(mixtral, some_documents(), tmp_path / "s.moe", stream=True, **OPTIONS)
    assert not (tmp_path / "s.moe").exists()


def test_encoder_decoders_quantized_weights_and_other_files_are_refused_by_name(mixtral: Path, tmp_path: Path) -> None:
    change_config(mixtral, is_encoder_decoder=True)
    with pytest.raises(ModelNotStreamable, match="mixtral is an encoder-decoder"):
        record(mixtral, some_documents(), tmp_path / "s.moe", stream=True)
    change_config(mixtral, is_encoder_decoder=False, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelNotStreamable, match=r"quantized \(fp8\)"):
        record(mixtral, some_documents(), tmp_path / "s.moe", stream=True)
    change_config(mixtral, quantization_config=None)
    for file in mixtral.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, mixtral / "pytorch_model.bin")
    with pytest.raises(ModelNotStreamable, match="only safetensors files can be read layer by layer"):
        record(mixtral, some_documents(), tmp_path / "s.moe", stream=True)


def test_without_the_parts_of_transformers_that_load_one_layer_it_says_so(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert layerwise._MISSING is None
    monkeypatch.setattr(layerwise, "_MISSING", "cannot import name 'rename_source_key'")
    with pytest.raises(ModelNotStreamable, match=f"transformers {transformers.__version__} cannot load one layer"):
        record(mixtral, some_documents(), tmp_path / "s.moe", stream=True)


def test_a_tensor_that_is_missing_or_misshapen_is_named_before_the_first_layer_runs(
    mixtral: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    for change in ("missing", "misshapen"):
        name = next(
            path for path in mixtral.glob("*.safetensors") if any(".layers.2." in key for key in load_file(path))
        )
        tensors = load_file(name)
        key = next(key for key in tensors if "layers.2." in key)
        kept = tensors.pop(key)
        if change == "misshapen":
            tensors[key] = torch.zeros(3, 5)
        save_file(tensors, name)
        with pytest.raises(ModelDamaged, match=r"missing or misshapen|cannot be loaded"):
            record(mixtral, some_documents(), tmp_path / "s.moe", stream=True, progress=stopped_after(0), **OPTIONS)
        save_file(tensors | {key: kept}, name)


def test_a_router_that_is_not_finite_is_named_with_its_place(mixtral: Path, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        model.layers[2].mlp.gate.weight[3] = torch.nan
    folder = save(model, tmp_path / "nan")
    with pytest.raises(RouterNotFinite, match=r"layer 2: .* document 1, sequence 0, position 0"):
        record(folder, some_documents(), tmp_path / "s.moe", stream=True, **OPTIONS)


def test_a_corpus_without_a_token_is_refused(mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusEmpty):
        record(mixtral, some_documents([0, 0]), tmp_path / "s.moe", stream=True)


# ---------------------------------------------------------------------------------------------- files and widths


def test_hostile_safetensors_files_end_in_a_clear_error(tmp_path: Path) -> None:
    folder = save(tiny_model("mixtral", num_hidden_layers=1), tmp_path / "model")
    path = folder / "model.safetensors"
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    broken: list[Any] = [
        [],
        {name: 1},
        {name: header[name] | {"dtype": []}},
        {name: header[name] | {"dtype": "F7"}},
        {name: header[name] | {"shape": [10**400]}},
        {name: header[name] | {"shape": [-1, 2]}},
        {name: header[name] | {"shape": "wide"}},
        {name: header[name] | {"data_offsets": [0, 10**15]}},
        {name: header[name] | {"data_offsets": [-8, 0]}},
        {name: header[name] | {"data_offsets": [0]}},
    ]
    texts = [json.dumps(each).encode() for each in broken] + [b"[" * 100_000, b"\xff" * 40]
    files = [len(text).to_bytes(8, "little") + text + good[8 + length :] for text in texts]
    files += [b"", good[:4], good[:100], (2**63).to_bytes(8, "little") + good[8:], (10**8).to_bytes(8, "little")]
    for content in files:
        path.write_bytes(content)
        with pytest.raises((ModelDamaged, ModelNotStreamable)):
            Shards(folder)
    chance = random.Random(0)
    for _ in range(500):
        content = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            content[chance.randrange(length + 8)] = chance.randrange(256)
        path.write_bytes(content)
        try:
            with closing(Shards(folder)) as opened:
                for stored in opened.tensors.values():
                    assert stored[...].shape == stored.shape
        except MoescopeError:
            pass


def test_an_index_that_leads_out_of_the_folder_is_refused(mixtral: Path) -> None:
    for entry in ("../secret", "/etc/passwd", "gone.safetensors", 7):
        (mixtral / shards.INDEX).write_text(json.dumps({"weight_map": {"a": entry}}))
        with pytest.raises(ModelDamaged):
            Shards(mixtral)


def test_a_stored_tensor_is_what_the_safetensors_library_reads(mixtral: Path) -> None:
    with closing(Shards(mixtral)) as opened:
        for path in mixtral.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - no dict
                    assert torch.equal(opened.tensors[name][...], file.get_tensor(name))


def test_fetching_ahead_brings_the_files_into_the_page_cache(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, length, advice: asked.append((start, length)))
    with closing(Shards(mixtral)) as opened:
        names = [name for name in opened.tensors if ".layers.1." in name]
        opened.fetch_ahead(names)
        opened._ahead.shutdown()
        assert sum(length for _, length in asked) == sum(opened.tensors[name].nbytes for name in names)


def test_a_spool_gives_back_what_a_layer_returned(tmp_path: Path) -> None:
    values = [
        torch.randn(2, 3, 4).to(torch.bfloat16).transpose(1, 2),
        (torch.arange(5), None, [torch.zeros(0, 3), True, 1.5], "x"),
        torch.tensor(3.0),
    ]
    for budget in (0, 50, 10**6):
        memory = spool._Memory(budget)
        states = spool.States(tmp_path, f"states-{budget}", memory)
        for value in values:
            states.append(value)
        states.seal()
        states._path.rename(tmp_path / states.name)
        for opened in (states, spool.States.reopen(tmp_path, states.name, memory)):
            assert torch.equal(opened.take(0), values[0])
            found = opened.take(1)
            assert torch.equal(found[0], torch.arange(5))
            assert found[1] is None
            assert found[2][0].shape == (0, 3)
            assert (found[2][1], found[2][2], found[3]) == (True, 1.5, "x")
            assert torch.equal(opened.take(2), values[2])
            with pytest.raises(TraceDamaged):
                opened.take(3)
            opened.close()
        assert memory.left == budget


def test_a_state_that_is_not_read_as_written_ends_the_recording(tmp_path: Path) -> None:
    states = spool.States(tmp_path, "states", spool._Memory(0))
    states.append(torch.arange(6))
    with states._path.open("r+b") as file:
        file.seek(8)
        file.write(b"\x07")
    with pytest.raises(TraceDamaged, match="not those written"):
        states.take(0)
    states.close()


def test_a_spool_is_read_while_another_thread_seals_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [torch.full((4,), float(index)) for index in range(300)]
    states = spool.States(tmp_path, "states", spool._Memory(0))
    for value in values:
        states.append(value)
    write = states._write
    monkeypatch.setattr(states, "_write", lambda data: [write(data[at : at + 1]) for at in range(len(data))])
    with ThreadPoolExecutor(1) as behind:
        sealed = behind.submit(states.seal)
        while not sealed.done():
            index = states.nbytes % 300
            assert torch.equal(states.take(index), values[index])
        assert hashlib.sha256(states._path.read_bytes()).hexdigest() == sealed.result()
    states.close()


def test_a_configuration_is_shrunk_in_a_copy_and_keeps_what_decides_how_it_is_built() -> None:
    config = transformers.AutoConfig.for_model("deepseek_v3")
    before = config.to_dict()
    small = shrink(config)
    assert config.to_dict() == before
    kept = (
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "first_k_dense_replace",
        "num_attention_heads",
        "hidden_act",
    )
    assert [getattr(small, name) for name in kept] == [before[name] for name in kept]
    assert small.num_hidden_layers == 8
    assert small.n_routed_experts == 16
    assert small.hidden_size * before["qk_rope_head_dim"] == before["hidden_size"] * small.qk_rope_head_dim
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(small)
    assert sum(each.numel() for each in model.parameters()) < 120e6


def test_a_run_of_dense_layers_longer_than_the_small_model_still_shows_experts() -> None:
    config = transformers.AutoConfig.for_model("deepseek_v3", first_k_dense_replace=11)
    with torch.device("meta"):
        experts = find_experts(transformers.AutoModel.from_config(config), "model")
    checkpoint = Checkpoint(Path(), "model", config, byte_level_tokenizer())
    assert rehearse(checkpoint, experts, torch.bfloat16).top_k == 8


def test_a_plan_is_compared_without_the_number_of_choices(mixtral: Path, tmp_path: Path) -> None:
    header = record(mixtral, some_documents([30]), tmp_path / "t.moe", stream=True).header
    fewer = replace(header, layers=tuple(replace(layer, top_k=1) for layer in header.layers))
    assert work.without_top_k(header) == fewer != header
    assert np.all([layer.top_k == 2 for layer in header.layers])
