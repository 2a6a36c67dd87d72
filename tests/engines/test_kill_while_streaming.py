"""kill -9 at random moments of a streamed recording: the same call goes on, to the trace of the engine in memory.

    python tests/engines/test_kill_while_streaming.py --kills 200 --folder FOLDER    # as often as you like

As `test_kill_and_resume`: a server loads everything once and forks each recording. It rehearses the family once, too.
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
from typing import Any

KILLS = 20
DOCUMENTS = 25


def test_a_streamed_recording_that_is_killed_again_and_again_ends_as_the_one_in_memory(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__)), "--kills", str(KILLS), "--folder", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["kills"] >= KILLS
    assert found["kills_that_left_layers"] > KILLS // 3
    assert found["traces"] >= 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    model = save(tiny_model("mixtral", num_hidden_layers=6), options.folder / "model")
    whole = record_into(model, options.folder / "whole.moe", stream=False)
    start = time.monotonic()
    wait(fork_recording(model, options.folder / "once.moe"))
    seconds = time.monotonic() - start
    kills = kills_that_left_layers = traces = 0
    while kills < options.kills:
        out = options.folder / f"{traces}.moe"
        traces += 1
        while True:
            process = fork_recording(model, out)
            time.sleep(chance.uniform(0, 1.2 * seconds))
            os.kill(process, signal.SIGKILL)
            if wait(process) == 0:
                break
            kills += 1
            kills_that_left_layers += any(work_folder(out).glob("states-*[0-9]"))
            if (out / "summary.json").exists():  # the kill came after the last file: the trace is complete
                break
        compare(out, whole)
    print(json.dumps({"kills": kills, "kills_that_left_layers": kills_that_left_layers, "traces": traces}))


def fork_recording(model: Path, out: Path) -> int:
    """Record into `out` in a process of its own and return its id."""
    if (process := os.fork()) != 0:
        return process
    status = 1
    try:
        record_into(model, out, stream=True)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def record_into(model: Path, out: Path, *, stream: bool) -> Any:
    lengths = [random.Random(number).randrange(0, 300) for number in range(DOCUMENTS)]
    return record(
        model, some_documents(lengths), out,
        stream=stream, window=20, weights=True, part_tokens=200, batch_tokens=100, memory=0,
    )  # fmt: skip


def compare(out: Path, whole: Any) -> None:
    """The parts are those of the engine in memory to the byte, the trace is sound."""
    trace = open_trace(out)
    if problems := trace.verify():
        raise SystemExit(str(problems))
    pairs = zip(trace.parts, whole.parts, strict=True)
    if not all(left.path.read_bytes() == right.path.read_bytes() for left, right in pairs):
        raise SystemExit(f"{out}: its parts differ from those of the engine in memory")
    if trace.summary != whole.summary:
        raise SystemExit(f"{out}: its summary differs")


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    import torch

    from moescope.engines.streamed import engine
    from moescope.engines.streamed.rehearsal import Rehearsal
    from moescope.engines.work import work_folder
    from moescope.recording import record
    from moescope.trace import open_trace
    from tests.engines.test_streaming import save
    from tests.families import tiny_model
    from tests.recording.test_kill_and_resume import wait
    from tests.tiny import some_documents

    torch.set_num_threads(1)
    engine.rehearse = lambda *_: Rehearsal(bare=True, top_k=2, state_widths=1.0)
    main()
