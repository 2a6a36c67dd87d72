"""``moescope record``, from the command line to the trace, its errors, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from families import tiny_model
from tiny import some_documents

from moescope.cli import main
from moescope.trace import open_trace

Save = Callable[..., Path]

SLOW = """
import time
import moescope.trace.part_file as part
from moescope.cli import main

write_part = part.write_part
part.write_part = lambda *arguments: (time.sleep(0.2), write_part(*arguments))
main()
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["record", *map(str, arguments)])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    records = [
        {"text": document.text, "meta": {"pile_set_name": document.domain}} for document in some_documents([300] * 12)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def model(checkpoint: Save, tokenizer: Any) -> Path:
    return checkpoint(tiny_model("mixtral", causal=True), tokenizer)


def test_the_command_writes_a_trace_and_nothing_to_stdout(model: Path, corpus: Path, tmp_path: Path) -> None:
    result = run(model, corpus, "-o", tmp_path / "t.moe", "--layers", "0,2", "--window", 64, "--weights")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "12 documents in 3 domains, 2 layers" in result.stderr
    trace = open_trace(tmp_path / "t.moe")
    assert trace.complete
    assert [layer.layer for layer in trace.layers] == [0, 2]
    assert trace.header.run["window"] == 64
    assert trace.header.weights


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nothing", "CORPUS"], 1, "error[model-not-found]: nothing: there is no such folder"),
        (["MODEL", "nothing"], 1, "error[corpus-not-found]"),
        (["CORPUS", "MODEL"], 1, "error["),
        (["MODEL", "CORPUS", "--layers", "7"], 1, "there is no layer 7; the layers with routed experts are 0-3"),
        (["MODEL", "CORPUS", "--layers", "x"], 2, "expected numbers or ranges"),
        (["MODEL", "CORPUS", "--text-field", "body"], 1, "error[corpus-field]"),
        (["MODEL", "CORPUS", "--device", "hologram"], 2, "hologram"),
        (["MODEL"], 2, "Missing argument 'CORPUS'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    arguments: list[str], code: int, says: str, model: Path, corpus: Path, tmp_path: Path
) -> None:
    names = {"MODEL": model, "CORPUS": corpus}
    result = run(*(names.get(argument, argument) for argument in arguments), "-o", tmp_path / "t.moe")
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "t.moe").exists()


def test_an_existing_trace_is_kept_unless_forced(model: Path, corpus: Path, tmp_path: Path) -> None:
    assert run(model, corpus, "-o", tmp_path / "t.moe").exit_code == 0
    again = run(model, corpus, "-o", tmp_path / "t.moe")
    assert (again.exit_code, "error[trace-exists]" in again.stderr) == (1, True)
    assert run(model, corpus, "-o", tmp_path / "t.moe", "--force").exit_code == 0


def test_ctrl_c_ends_in_a_line_and_the_same_command_goes_on(model: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.moe"
    command = [sys.executable, "-c", SLOW, "record", model, corpus, "-o", out]
    command += ["--part-tokens", "1", "--batch-tokens", "1", "--window", "2"]
    process = subprocess.Popen(
        [str(each) for each in command],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells start jobs behind & without it
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("parts/*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "tokens are kept; the same command goes on from there" in stderr
    assert "Traceback" not in stderr
    kept = open_trace(out).num_tokens
    assert kept > 0
    assert not open_trace(out).complete
    result = run(model, corpus, "-o", out, "--part-tokens", 1, "--batch-tokens", 1, "--window", 2)
    assert result.exit_code == 0, result.output
    assert open_trace(out).num_documents == 12
