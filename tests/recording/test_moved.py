"""A recording that is stopped on one machine and goes on on another, where everything lies elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import tiny_model
from tiny import assert_same, some_documents

from moescope.cli import main
from moescope.engines import provenance
from moescope.errors import TraceMismatch
from moescope.recording import Progress, record
from moescope.trace import Trace, open_trace

Save = Callable[..., Path]
MEASURES = [
    ["shares", "--format", "json"],
    ["repeats", "--format", "json"],
    ["words", "--word", "self", "--indentation", "--format", "json"],
]


@pytest.fixture
def home(checkpoint: Save, bos_tokenizer: Any, tmp_path: Path) -> Path:
    """A folder with a model, a corpus and an unfinished trace."""
    checkpoint(tiny_model("mixtral", causal=True), bos_tokenizer, "home/models/Mixtral")
    (tmp_path / "home/val.jsonl").write_text(
        "".join(
            json.dumps({"text": document.text, "meta": {"pile_set_name": document.domain}}) + "\n"
            for document in some_documents([230, 90, 400, 7, 0, 300])
        )
    )
    with pytest.raises(KeyboardInterrupt):
        record_in(tmp_path / "home", progress=stop_late)
    assert 1 <= len(open_trace(tmp_path / "home/pile.moe").parts) < 5
    return tmp_path / "home"


def stop_late(progress: Progress) -> None:
    if progress.tokens > 200:
        raise KeyboardInterrupt


def record_in(
    folder: Path, model: str = "models/Mixtral", corpus: str = "val.jsonl", trace: str = "pile.moe", **options: Any
) -> Trace:
    defaults: Any = {"part_tokens": 60, "window": 40, "weights": True}
    return record(folder / model, folder / corpus, folder / trace, **defaults | options)


def measured(trace: Path) -> list[bytes]:
    """What every measure prints of a trace."""
    results = [CliRunner().invoke(main, [name, str(trace), *options]) for name, *options in MEASURES]
    assert all(result.exit_code == 0 for result in results), results
    return [result.stdout_bytes for result in results]


@pytest.mark.parametrize("more_threads", [0, 1])
def test_moved_to_other_folders_it_goes_on_and_every_measure_is_equal_to_the_byte(
    more_threads: int, home: Path, tmp_path: Path
) -> None:
    whole = record_in(home, trace="whole.moe")
    away = tmp_path / "another machine"
    (away / "elsewhere").mkdir(parents=True)
    shutil.move(home / "models/Mixtral", away / "elsewhere/mixtral-8x7b")
    shutil.move(home / "val.jsonl", away / "elsewhere/pile-validation.jsonl")
    shutil.move(home / "pile.moe", away / "half.moe")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + more_threads)
    try:
        trace = record_in(
            away, "elsewhere/mixtral-8x7b", "elsewhere/pile-validation.jsonl", "half.moe", device_map={"": "cpu"}
        )
    finally:
        torch.set_num_threads(threads)
    assert trace.header.model["name"] == "Mixtral"  # as it was begun
    assert trace.complete
    assert trace.verify() == []
    assert_same(trace, whole, rtol=1e-5)  # of the weights: another number of threads rounds otherwise
    if not more_threads:
        for left, right in zip(trace.parts, whole.parts, strict=True):
            assert left.path.read_bytes() == right.path.read_bytes()
    assert measured(trace.path) == measured(whole.path)


def test_nothing_in_the_header_names_the_machine(home: Path, tmp_path: Path) -> None:
    text = (home / "pile.moe/trace.json").read_text()
    assert str(tmp_path) not in text
    assert "home" not in text
    assert not re.search(r"num_threads|hostname|cuda:\d|\bcpu_count", text)


@pytest.mark.parametrize(
    ("section", "name"), [("model", "dtype"), ("run", "torch"), ("run", "transformers"), ("run", "moescope")]
)
def test_another_dtype_or_library_may_not_go_on(
    section: str, name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "dtype":
        with pytest.raises(TraceMismatch, match=r"model\.dtype"):
            record_in(home, dtype="bfloat16")
        return
    versions = provenance.versions(("torch", "transformers"))
    monkeypatch.setattr(provenance, "versions", lambda _: versions | {name: "0.0.1"})
    with pytest.raises(TraceMismatch, match=f"{section}.{name}: '0.0.1', not "):
        record_in(home)


def test_another_python_may(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = provenance.versions(("torch", "transformers"))
    monkeypatch.setattr(provenance, "versions", lambda _: versions | {"python": "3.99.0"})
    assert record_in(home).header.run["python"] == versions["python"]


def test_a_model_of_the_same_name_with_other_weights_may_not(home: Path, checkpoint: Save, bos_tokenizer: Any) -> None:
    checkpoint(tiny_model("mixtral", causal=True, seed=1), bos_tokenizer, "home/models/Mixtral")
    with pytest.raises(TraceMismatch, match=r"model\.fingerprint"):
        record_in(home)


def test_a_corpus_whose_file_name_is_its_domain_must_keep_it(
    checkpoint: Save, bos_tokenizer: Any, tmp_path: Path
) -> None:
    checkpoint(tiny_model("mixtral", causal=True), bos_tokenizer, "models/Mixtral")
    for name in ("letters", "books"):
        (tmp_path / f"{name}.txt").write_text(some_documents([900])[0].text)
    with pytest.raises(KeyboardInterrupt):
        record_in(tmp_path, corpus="letters.txt", progress=stop_late, part_tokens=1)
    with pytest.raises(TraceMismatch, match=r"corpus\.name"):
        record_in(tmp_path, corpus="books.txt", part_tokens=1)
    assert record_in(tmp_path, corpus="letters.txt", part_tokens=1).domains == ("letters",)


def test_a_trace_of_another_name_is_not_replaced_by_force_but_gone_on_with(home: Path) -> None:
    kept = open_trace(home / "pile.moe").parts[0].path.stat().st_ino
    shutil.move(home / "models/Mixtral", home / "models/renamed")
    trace = record_in(home, model="models/renamed", force=True)
    assert trace.parts[0].path.stat().st_ino == kept
    assert np.array_equal(trace.document_numbers, [0, 1, 2, 3, 5])
