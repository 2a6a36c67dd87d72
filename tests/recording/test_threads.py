"""Reading ahead and writing behind: in order, with the errors, and nothing left running."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model
from tiny import some_documents

import moescope.trace.part_file
from moescope.corpus import Document
from moescope.recording import Progress, record
from moescope.recording.threads import WriteBehind, read_ahead
from moescope.trace import open_trace

LONG = 20.0
"""Seconds that no step of a test takes unless it fails."""


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def same(pieces: Iterator[int]) -> Iterator[int]:
    return pieces


def fail_after(items: Iterator[int], error: type[BaseException]) -> None:
    next(items)
    raise error


def put_all(behind: WriteBehind[int], numbers: range, then: type[BaseException] | None = None) -> None:
    for n in numbers:
        behind.put(n)
    if then is not None:
        raise then


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_is_read_ahead_comes_in_order_and_whole() -> None:
    with read_ahead(range(1000), lambda pieces: (piece * piece for piece in pieces)) as items:
        assert list(items) == [piece * piece for piece in range(1000)]


def test_one_item_waits_and_one_is_made_and_no_more_is_read() -> None:
    read: list[int] = []
    with read_ahead((read.append(n) or n for n in range(100)), same) as items:
        wait_for(lambda: read == [0, 1])
        assert next(items) == 0
        wait_for(lambda: read == [0, 1, 2])
        time.sleep(0.05)
        assert read == [0, 1, 2]


def test_an_error_of_the_source_comes_after_what_was_read_before_it() -> None:
    def source() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("the disk is gone")

    with read_ahead(source(), same) as items:
        assert [next(items), next(items)] == [1, 2]
        with pytest.raises(OSError, match="the disk is gone"):
            next(items)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_block_that_ends_early_ends_the_reading(error: type[BaseException]) -> None:
    read: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            read.append(len(read))
            yield read[-1]

    with pytest.raises(error), read_ahead(endless(), same) as items:
        fail_after(items, error)
    seen = len(read)
    assert seen <= 4
    time.sleep(0.02)
    assert len(read) == seen


def test_what_is_written_behind_is_written_in_order_and_at_the_end_all_of_it() -> None:
    written: list[int] = []
    with WriteBehind(lambda n: (time.sleep(0.002), written.append(n))) as behind:
        for n in range(20):
            behind.put(n)
    assert written == list(range(20))


def test_one_item_is_written_while_one_waits_and_the_next_has_to() -> None:
    go = threading.Event()
    written: list[int] = []
    with WriteBehind(lambda n: (go.wait(LONG), written.append(n))) as behind:
        behind.put(0)
        behind.put(1)
        third = threading.Thread(target=behind.put, args=(2,))
        third.start()
        third.join(0.1)
        assert third.is_alive()
        assert written == []
        go.set()
        third.join(LONG)
    assert written == [0, 1, 2]


def test_after_an_error_nothing_more_is_written_and_the_next_call_says_so() -> None:
    written: list[int] = []

    def write(n: int) -> None:
        if n == 1:
            raise OSError("no space left")
        written.append(n)

    with pytest.raises(OSError, match="no space left"), WriteBehind(write) as behind:
        put_all(behind, range(1000))
    assert written == [0]


def test_an_error_of_the_last_item_is_raised_at_the_end() -> None:
    def write(n: int) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), WriteBehind(write) as behind:
        behind.put(0)


def test_after_an_error_of_ours_what_was_handed_over_is_written() -> None:
    written: list[int] = []
    with pytest.raises(KeyboardInterrupt), WriteBehind(lambda n: (time.sleep(0.02), written.append(n))) as behind:
        put_all(behind, range(2), KeyboardInterrupt)
    assert written == [0, 1]


def test_ctrl_c_while_the_last_item_is_written_does_not_leave_the_thread_alone() -> None:
    begun, written = threading.Event(), []

    def write(n: int) -> None:
        begun.set()
        time.sleep(0.3)
        written.append(n)

    def interrupt() -> None:
        begun.wait(LONG)
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt), WriteBehind(write) as behind:
            behind.put(0)
        assert written == [0]
    finally:
        signal.signal(signal.SIGINT, own)


def test_the_model_goes_on_while_a_part_is_written(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_part = moescope.trace.part_file.write_part
    model_is_ahead = threading.Event()
    waited: list[bool] = []
    calls: list[Progress] = []

    def slow(*args: Any) -> None:
        waited.append(model_is_ahead.wait(LONG))
        write_part(*args)

    def progress(so_far: Progress) -> None:
        calls.append(so_far)
        if len(calls) > 1:  # of the second part
            model_is_ahead.set()

    monkeypatch.setattr(moescope.trace.part_file, "write_part", slow)
    documents = some_documents([400] * 3)
    trace = record((tiny_model("mixtral"), tokenizer), documents, tmp_path / "t.moe", part_tokens=1, progress=progress)
    assert waited == [True] * 3
    assert trace.num_documents == 3


def test_documents_are_tokenized_while_the_model_runs(tokenizer: Any, tmp_path: Path) -> None:
    asked_for_third = threading.Event()
    waited: list[bool] = []

    def documents() -> Iterator[Document]:
        first, second, third = some_documents([400] * 3)
        yield first
        yield second
        asked_for_third.set()
        yield third

    def progress(_: Progress) -> None:
        waited.append(asked_for_third.wait(LONG))

    record((tiny_model("mixtral"), tokenizer), documents(), tmp_path / "t.moe", part_tokens=1, progress=progress)
    assert waited[0]


def test_a_part_that_fails_to_be_written_ends_the_recording_and_is_not_followed_by_another(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_part, calls = moescope.trace.part_file.write_part, 0

    def fail_second(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise PermissionError("the disk is read-only now")
        write_part(*args)

    monkeypatch.setattr(moescope.trace.part_file, "write_part", fail_second)
    model, documents = tiny_model("mixtral"), some_documents([200] * 12)
    with pytest.raises(PermissionError, match="read-only"):
        record((model, tokenizer), documents, tmp_path / "t.moe", part_tokens=1)
    assert calls == 2
    assert len(open_trace(tmp_path / "t.moe").parts) == 1
    assert not any(module._forward_pre_hooks for module in model.modules())
