"""kill -9 at random moments: the same call goes on, and the trace ends up as if nothing had happened.

    python tests/recording/test_kill_and_resume.py --kills 100       # as often as you like; prints what it found

A server process loads everything once and forks each recording, so that a kill costs a fraction of a second. It keeps
to one thread, so that no thread is lost in the fork.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

KILLS = 30
DOCUMENTS = 60


def test_a_recording_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__)), "--kills", str(KILLS), "--folder", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["kills"] >= KILLS
    assert found["kills_that_left_parts"] > KILLS // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    whole = options.folder / "whole.moe"
    record_into(whole)
    start = time.monotonic()
    wait(fork_recording(options.folder / "again.moe"))
    seconds = time.monotonic() - start
    compare(options.folder / "again.moe", whole)
    kills = kills_that_left_parts = traces = 0
    while kills < options.kills:
        out = options.folder / f"{traces}.moe"
        traces += 1
        while True:
            process = fork_recording(out)
            time.sleep(chance.uniform(0, seconds / 2))
            os.kill(process, signal.SIGKILL)
            if wait(process) == 0:
                break
            kills += 1
            if (out / "summary.json").exists():  # the kill came after the last file: the trace is complete
                break
            kills_that_left_parts += any(out.glob("parts/*"))
        compare(out, whole)
    print(json.dumps({"kills": kills, "kills_that_left_parts": kills_that_left_parts, "traces": traces}))


def fork_recording(out: Path) -> int:
    """Record into `out` in a process of its own and return its id."""
    if (process := os.fork()) != 0:
        return process
    status = 1
    try:
        record_into(out)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def record_into(out: Path) -> None:
    lengths = [random.Random(number).randrange(0, 300) for number in range(DOCUMENTS)]
    record(
        MODEL, some_documents(lengths), out,
        window=20, weights=True, part_tokens=60, batch_tokens=100,
    )  # fmt: skip


def wait(process: int) -> int:
    """The exit status of a recording, -9 if it was killed; anything else is a failure of the test."""
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"a recording ended with status {status}")
    return status


def compare(left: Path, right: Path) -> None:
    """Every file is the same to the byte, apart from the order in which checksums were noted; the trace is sound."""
    from moescope.trace import open_trace

    def files(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }

    found, expected = files(left), files(right)
    if found.keys() != expected.keys():
        raise SystemExit(f"{left}: files differ: {found.keys() ^ expected.keys()}")
    for name, content in found.items():
        if content != expected[name]:
            raise SystemExit(f"{left}: {name} differs")
    trace = open_trace(left)
    if problems := trace.verify():
        raise SystemExit(str(problems))
    if len(set(trace.document_numbers.tolist())) != trace.num_documents or not trace.complete:
        raise SystemExit(f"{left}: documents are lost or doubled")


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    import torch

    from moescope.recording import record
    from tests.families import tiny_model
    from tests.tiny import byte_level_tokenizer, some_documents

    torch.set_num_threads(1)
    MODEL = (tiny_model("mixtral", num_hidden_layers=2), byte_level_tokenizer(bos=True))
    main()
