"""Files that the programs themselves wrote, against an independent reading of a few lines."""

from __future__ import annotations

import csv
import json
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

import moescope
from moescope.trace import Trace


def imported(format: str, path: Path, out: Path, **options: object) -> Trace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return moescope.import_trace(format, [path], out, **options)


@pytest.mark.parametrize(
    ("name", "model", "layers", "tokens", "missing"),
    [
        ("qwen", "Qwen3-30B-A3B-Q4_K_M.gguf", 48, 156, {47: 27}),
        ("gemma", "google_gemma-4-26B-A4B-it-Q4_K_M.gguf", 30, 157, {}),
    ],
)
def test_bigmoeonedge_reads_as_a_csv_reader_reads_it(
    name: str, model: str, layers: int, tokens: int, missing: dict[int, int], shared_data: Path, tmp_path: Path
) -> None:
    path = shared_data / "traces" / "bigmoeonedge" / f"{name}.route.csv"
    trace = imported("bigmoeonedge", path, tmp_path / "o.moe")
    with path.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    steps = sorted({int(row["step"]) for row in rows})
    assert (trace.header.model["name"], len(trace.layers), trace.num_tokens) == (model, layers, tokens)
    assert len(steps) == tokens
    assert {(layer.num_experts, layer.top_k, layer.ranked) for layer in trace.layers} == {(128, 6, True)}
    (part,) = trace.iter_parts(weights=True)
    for row in rows:
        at, layer, slot = steps.index(int(row["step"])), int(row["layer"]), int(row["slot"])
        assert part.expert_ids[layer][at, slot] == int(row["expert"])
        assert part.gate_weights[layer][at, slot] == np.float32(row["weight"])
        assert part.phase[at] == int(row["phase"])
    assert len(rows) == sum(int((ids >= 0).sum()) for ids in part.expert_ids.values())
    found = {layer: int((ids < 0).all(axis=1).sum()) for layer, ids in part.expert_ids.items()}
    assert {layer: n for layer, n in found.items() if n} == missing
    assert trace.verify() == []


@pytest.mark.parametrize(("name", "previous", "popular"), [("qwen", 38.0, 37.6), ("gemma", 35.7, 39.6)])
def test_the_previous_tokens_experts_predict_hardly_better_than_popularity(
    name: str, previous: float, popular: float, shared_data: Path, tmp_path: Path
) -> None:
    path = shared_data / "traces" / "bigmoeonedge" / f"{name}.route.csv"
    trace = imported("bigmoeonedge", path, tmp_path / "o.moe")
    (part,) = trace.iter_parts()
    generated = part.phase == 1
    hits, likely, total = 0, 0, 0
    for ids in part.expert_ids.values():
        mine, before = ids[1:][generated[1:]], ids[:-1][generated[1:]]
        kept = (mine >= 0).all(axis=1) & (before >= 0).all(axis=1)
        mine, before = mine[kept], before[kept]
        most = np.argsort(-np.bincount(mine.ravel(), minlength=128), kind="stable")[:6]
        hits += int((mine[:, :, None] == before[:, None, :]).any(axis=2).sum())
        likely += int(np.isin(mine, most).sum())
        total += mine.size
    assert 100 * hits / total == pytest.approx(previous, abs=0.2)
    assert 100 * likely / total == pytest.approx(popular, abs=0.2)


def test_gpt_oss_fingerprints_read_as_json_reads_them(shared_data: Path, tmp_path: Path) -> None:
    for name, tokens in (("philosophy", 130), ("professional_law", 151)):
        path = shared_data / "traces" / "gptoss20b" / f"{name}.True_False_examples.json"
        trace = imported("gpt-oss", path, tmp_path / f"{name}.moe", num_experts=32)
        content = json.loads(path.read_text())
        assert (trace.num_tokens, trace.domains, len(trace.layers)) == (tokens, (content["category"],), 24)
        (part,) = trace.iter_parts(weights=True)
        pieces = Counter()
        for row, entry in enumerate(content["router_data"]):
            ((key, layers),) = entry.items()
            text = content["full_text"][int(key.split("_")[1])]
            assert trace.vocabulary.text([part.token_id[row]]) == text
            pieces[text] += 1
            for layer, choice in layers.items():
                index = int(layer.split("_")[1])
                assert part.expert_ids[index][row].tolist() == choice["selected_experts"]
                np.testing.assert_array_equal(part.gate_weights[index][row], np.float32(choice["selected_probs"]))
        assert len(np.unique(part.token_id)) == len(pieces)
        assert trace.summary["warnings"] == []


def test_an_imported_trace_is_measured_like_a_recorded_one(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "traces" / "gptoss20b" / "philosophy.True_False_examples.json"
    trace = imported("gpt-oss", path, tmp_path / "o.moe", num_experts=32)
    shares = moescope.shares(moescope.tally(trace))
    content = json.loads(path.read_text())
    counts: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for entry in content["router_data"]:
        for layers in entry.values():
            for layer, choice in layers.items():
                counts[int(layer.split("_")[1])].update(choice["selected_experts"])
    for layer in range(24):
        found = shares["share"].sel(layer=layer, domain="philosophy", choice="all").values
        expected = np.array([counts[layer][expert] for expert in range(32)]) / (4 * trace.num_tokens)
        np.testing.assert_allclose(found, expected, atol=1e-12)
