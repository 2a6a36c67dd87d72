"""All sizes of an LRU cache in one pass against libCacheSim, a size at a time, in one run, one thread.

    pip install libcachesim==0.3.5
    python benchmarks/cache.py [--requests 5000000] [--repeats 3]

One layer of 8 experts, 2 a token, and one of 128 experts, 8 a token; experts of Zipf's popularity that a document
shifts and neighbours repeat. Ours is `moescope.cache` from the files of the trace to the labelled result, with LRU
alone, then with Belady, then with every policy and the null; theirs replays the same requests from an oracleGeneral
file at half of the experts. CPU seconds, median of the repeats, interleaved; requests a second in millions.

Last run, 5 million requests, two cores:

    8 experts, 2 a token: LRU of all 7 sizes 30.3 M requests/s, 0.75 of their LRU of one size (40.6), 5.2 times as fast
        as all sizes one by one; Belady 14.7, 4.2 times as fast; every policy and the null 1.5
    128 experts, 8 a token: LRU of all 121 sizes 37.4, 0.73 of their one size (51.4), 88 times as fast as all sizes one
        by one; Belady 7.3, 33 times as fast; every policy and the null 0.4
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from gauges import in_a_fresh_process, require

import moescope
from moescope.trace import Header, Layer, Part, Trace, TraceWriter, Vocabulary, open_trace

DOCUMENT_TOKENS = 500
PART_TOKENS = 65_536

THEIRS = """
import sys, time
import libcachesim as lcs
path, policy, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
reader = lcs.TraceReader(path, lcs.TraceType.ORACLE_GENERAL_TRACE, lcs.ReaderInitParam(ignore_obj_size=True))
cache = getattr(lcs, policy)(size)
start = time.process_time()
cache.process_trace(reader)
print(time.process_time() - start)
"""


def make_trace(path: Path, num_tokens: int, num_experts: int, top_k: int) -> Trace:
    rng = np.random.default_rng(0)
    layer = Layer(0, num_experts, top_k)
    popularity = -0.5 * np.log(np.arange(1, num_experts + 1))
    with TraceWriter(path, Header((layer,)), Vocabulary({})) as writer:
        for start in range(0, num_tokens, PART_TOKENS):
            count = min(PART_TOKENS, num_tokens - start)
            document = start // DOCUMENT_TOKENS + 1 + np.arange(count) // DOCUMENT_TOKENS
            scores = rng.gumbel(size=(count, num_experts)).astype(np.float32) + popularity
            scores += rng.normal(size=(document[-1] + 1, num_experts))[document]
            scores[1:] += 0.7 * scores[:-1]
            ids = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
            zeros = np.zeros(count, np.uint32)
            position = np.arange(count) % DOCUMENT_TOKENS
            writer.write(Part(document + start, zeros, ("d",), zeros, position, zeros, {0: ids}), {})
        writer.finish({"tokens": num_tokens})
    return open_trace(path)


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def theirs(path: Path, policy: str, size: int) -> float:
    return in_a_fresh_process(THEIRS, path, policy, size)


def measure(folder: Path, requests: int, repeats: int, num_experts: int, top_k: int) -> dict[str, object]:
    trace = make_trace(folder / f"{num_experts}.moe", requests // top_k, num_experts, top_k)
    path = moescope.export(trace, folder / f"{num_experts}.bin", format="oracle-general")
    num_requests = path.stat().st_size // 24
    calls: dict[str, Callable[[], object]] = {
        "LRU, all sizes": lambda: moescope.cache(trace, policies=("lru",), null=False, threads=1),
        "Belady, all sizes": lambda: moescope.cache(trace, policies=("belady",), null=False, threads=1),
        "everything": lambda: moescope.cache(trace, threads=1),
    }
    times: dict[str, list[float]] = {name: [] for name in [*calls, "their LRU, one size", "their Belady, one size"]}
    warm_up = make_trace(folder / f"warm{num_experts}.moe", 2000, num_experts, top_k)
    moescope.cache(warm_up, threads=1)
    for repeat in range(repeats):
        for name, call in calls.items():
            if name != "everything" or not repeat:
                times[name].append(seconds(call))
        for policy in ("LRU", "Belady"):
            times[f"their {policy}, one size"].append(theirs(path, policy, num_experts // 2))
    took = {name: median(values) for name, values in times.items()}
    sizes = num_experts - top_k + 1
    return {
        "requests": num_requests,
        "sizes": sizes,
        "million_requests_a_second": {name: round(num_requests / took[name] / 1e6, 1) for name in took},
        "lru_to_their_one_size": round(took["their LRU, one size"] / took["LRU, all sizes"], 2),
        "lru_to_all_their_sizes": round(sizes * took["their LRU, one size"] / took["LRU, all sizes"], 1),
        "belady_to_all_their_sizes": round(sizes * took["their Belady, one size"] / took["Belady, all sizes"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    require("libcachesim==0.3.5")
    with tempfile.TemporaryDirectory() as folder:
        for num_experts, top_k in ((8, 2), (128, 8)):
            found = measure(Path(folder), arguments.requests, arguments.repeats, num_experts, top_k)
            print(json.dumps({"experts": num_experts, "top_k": top_k, **found}, indent=1))


if __name__ == "__main__":
    main()
