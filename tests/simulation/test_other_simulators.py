"""LRU and Belady at one expert a token against libCacheSim, which runs apart: it may abort its interpreter."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moescope
from moescope import mini
from moescope.trace import Trace

THEIRS = """
import json, sys
import libcachesim as lcs
path, sizes = sys.argv[1], json.loads(sys.argv[2])
found = {}
for name in sys.argv[3].split(","):
    for size in sizes:
        reader = lcs.TraceReader(path, lcs.TraceType.ORACLE_GENERAL_TRACE, lcs.ReaderInitParam(ignore_obj_size=True))
        found[f"{name} {size}"] = getattr(lcs, name)(size).process_trace(reader)[0]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def first_choices(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The first choices of two layers of the embedded model on a part of the embedded corpus."""
    if importlib.util.find_spec("libcachesim") is None:
        pytest.skip("needs libcachesim (pip install libcachesim)")
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("k1")
    few = {"layers": [0, 5], "max_documents_per_domain": 4}
    demo = moescope.record(mini.model_path(), mini.corpus_path(), folder / "demo.moe", **few)
    ids: dict[int, list[np.ndarray]] = {layer.layer: [] for layer in demo.layers}
    documents = []
    for part in demo.iter_parts():
        documents.append(part.document)
        for layer, of in ids.items():
            of.append(part.expert_ids[layer][:, :1])
    arrays = {layer: np.concatenate(of) for layer, of in ids.items()}
    return moescope.from_arrays(
        folder / "k1.moe", arrays, num_experts=8, documents=np.concatenate(documents), ranked=True
    )


def test_lru_and_belady_miss_as_often_as_in_libcachesim(first_choices: Trace, tmp_path: Path) -> None:
    sizes = list(range(1, 9))
    found = moescope.cache(first_choices, policies=("lru", "belady"), null=False, threads=1).isel(domain=0)
    for layer in found["layer"].values.tolist():
        path = moescope.export(first_choices, tmp_path / f"{layer}.bin", format="oracle-general", layers=[layer])
        command = [sys.executable, "-c", THEIRS, str(path), json.dumps(sizes), "LRU,Belady"]
        theirs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for theirs_name, ours in (("LRU", "lru"), ("Belady", "belady")):
            for size in sizes:
                mine = 1 - found["hit_ratio"].sel(layer=layer, policy=ours, size=size).item()
                assert theirs[f"{theirs_name} {size}"] == pytest.approx(mine, abs=1e-9), (layer, ours, size)


def test_one_budget_is_one_cache_of_libcachesim(first_choices: Trace, tmp_path: Path) -> None:
    path = moescope.export(first_choices, tmp_path / "all.bin", format="oracle-general")
    found = moescope.cache(first_choices, policies=("lru", "belady"), budget="global", null=False, threads=1)
    sizes = [2, 6, 10, 14]
    command = [sys.executable, "-c", THEIRS, str(path), json.dumps(sizes), "LRU,Belady"]
    theirs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for theirs_name, ours in (("LRU", "lru"), ("Belady", "belady")):
        for size in sizes:
            mine = 1 - found["model_hit_ratio"].isel(domain=0).sel(policy=ours, size=size // 2).item()
            assert theirs[f"{theirs_name} {size}"] == pytest.approx(mine, abs=1e-9), (ours, size)


def test_s3_fifo_misses_about_as_often_as_in_libcachesim(tmp_path: Path) -> None:
    """Sizes at which their small queue holds two objects or more; the rest is a few requests in a thousand."""
    if importlib.util.find_spec("libcachesim") is None:
        pytest.skip("needs libcachesim (pip install libcachesim)")
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, 65) ** 0.8
    ids = rng.choice(64, (1, 20_000, 1), p=popularity / popularity.sum())
    trace = moescope.from_arrays(tmp_path / "s3.moe", ids, num_experts=64, ranked=True)
    sizes = [20, 25, 30, 40]
    path = moescope.export(trace, tmp_path / "s3.bin", format="oracle-general")
    command = [sys.executable, "-c", THEIRS, str(path), json.dumps(sizes), "S3FIFO"]
    theirs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    found = moescope.cache(trace, policies=("lru", "s3-fifo"), sizes=sizes, null=False, threads=1).isel(domain=0)
    for size in sizes:
        miss = {p: 1 - found["model_hit_ratio"].sel(policy=p, size=size).item() for p in ("lru", "s3-fifo")}
        assert theirs[f"S3FIFO {size}"] == pytest.approx(miss["s3-fifo"], abs=0.004)
        assert abs(miss["lru"] - miss["s3-fifo"]) > 0.01  # so that the tolerance tells the policies apart
