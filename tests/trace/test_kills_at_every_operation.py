"""kill -9 before every operation on files, one after the other: what is started again ends as if nothing had happened.

    python tests/trace/test_kills_at_every_operation.py --folder FOLDER    # prints how many kills each job took

Jobs: recording with the model in memory and streamed, importing, and replacing a finished trace by either. A server
loads everything once and forks each job. What Python opens for writing, makes, renames and removes is an operation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MOST = 400
"""Operations of a job, should it never end."""

JOBS = ("record", "record --force", "stream", "import", "import --force")


def test_jobs_killed_before_any_operation_on_files_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__)), "--folder", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    kills = json.loads(result.stdout)
    assert list(kills) == list(JOBS)
    assert min(kills.values()) > 12  # a trace of several parts: each is opened, listed and renamed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    jobs = make_jobs(folder)
    print(json.dumps({name: kill_everywhere(folder / name.replace(" ", ""), *jobs[name]) for name in JOBS}))


def make_jobs(folder: Path) -> dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any] | None]]:
    """By name: what writes a trace, and what wrote the trace that stands there before."""
    model = save(tiny_model("mixtral", num_hidden_layers=3), folder / "model")
    held = tiny_model("mixtral", num_hidden_layers=2), byte_level_tokenizer(bos=True)
    options: dict[str, Any] = {"window": 20, "weights": True, "part_tokens": 60, "batch_tokens": 100}
    lengths = [90, 40, 7, 0, 130, 33]
    log = folder / "log.jsonl"
    rows = [
        {"request_id": document, "pos": position, "layer": layer, "experts": [(document + position) % 7, 7]}
        for document in range(9)
        for position in range(11 + document)
        for layer in (0, 1)
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def recorded(out: Path, *, stream: bool = False, force: bool = False) -> None:
        record(
            model if stream else held, some_documents(lengths), out,
            stream=stream, force=force, **options, **({"memory": 0} if stream else {}),
        )  # fmt: skip

    def imported(out: Path, *, force: bool = False) -> None:
        import_trace("jsonl", [log], out, num_experts=8, force=force)

    return {
        "record": (recorded, None),
        "record --force": (lambda out: recorded(out, force=True), imported),
        "stream": (lambda out: recorded(out, stream=True), None),
        "import": (imported, None),
        "import --force": (lambda out: imported(out, force=True), recorded),
    }


def kill_everywhere(folder: Path, job: Callable[[Path], Any], before: Callable[[Path], Any] | None) -> int:
    """Kill a job before its first, second, … operation, each time anew; return how many it has."""
    folder.mkdir()
    whole = folder / "whole.moe"
    run(job, whole)
    stranger = folder / "notes.moe"
    (stranger / "parts").mkdir(parents=True)
    (stranger / "parts" / "000000.parquet.part").write_text("somebody's", encoding="utf-8")
    theirs = fingerprint(stranger)
    if before is not None:
        run(before, folder / "before.moe")
    for kills in range(MOST):
        out = folder / "out.moe"
        if before is not None:
            shutil.copytree(folder / "before.moe", out)
        killed = run(job, out, operations=kills, within=folder)
        if killed and (before is not None or not (out / "summary.json").exists()):  # else it was complete, and is kept
            run(job, out)
        compare(out, whole)
        if fingerprint(stranger) != theirs:
            raise SystemExit(f"{stranger}: it is not ours, and has changed")
        if not killed:
            return kills
        shutil.rmtree(out)
    raise SystemExit(f"{folder.name} has more than {MOST} operations")


def run(job: Callable[[Path], Any], out: Path, *, operations: int | None = None, within: Path | None = None) -> bool:
    """Run a job in a process of its own, which kills itself after so many operations; return whether it did."""
    if (process := os.fork()) == 0:
        status = 1
        try:
            if operations is not None:
                kill_after(operations, str(within))
            job(out)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status not in (0, -signal.SIGKILL if operations is not None else 0):
        raise SystemExit(f"{out}: the job ended with status {status} after {operations} operations")
    return status != 0


def kill_after(operations: int, within: str) -> None:
    """Let so many operations on files below a folder be, and end this process before the next one."""
    left = [operations]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or not str(arguments[0]).startswith(within):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    sys.addaudithook(watch)


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def compare(found: Path, expected: Path) -> None:
    """Every file but the summary's seconds is the same to the byte; the trace is sound, no document lost or doubled."""
    trace = open_trace(found)
    if problems := trace.verify():
        raise SystemExit(str(problems))
    ours, theirs = fingerprint(found), fingerprint(expected)
    differing = [name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)]
    if differing:
        raise SystemExit(f"{found}: {', '.join(sorted(differing))} differ")


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    import torch

    from moescope.engines.streamed import engine
    from moescope.engines.streamed.rehearsal import Rehearsal
    from moescope.importers import import_trace, tokens
    from moescope.recording import record
    from moescope.trace import open_trace
    from tests.engines.test_streaming import save
    from tests.families import tiny_model
    from tests.tiny import byte_level_tokenizer, some_documents

    torch.set_num_threads(1)
    tokens.PART_TOKENS = 40
    engine.rehearse = lambda *_: Rehearsal(bare=True, top_k=2, state_widths=1.0)
    main()
