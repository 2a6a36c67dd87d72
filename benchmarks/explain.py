"""What `explain` and `locality` cost, as multiples of the tally; one thread, CPU time, everything in one run.

    python benchmarks/explain.py [--tokens 4000000] [--layers 32]

The one pass is the reading of documents into memory; the rest goes over these documents, a layer at a time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from gauges import peaks_of_calls
from tally import make_trace

import moescope
from moescope.tallying.counted import counted
from moescope.tallying.counter import CountOptions
from moescope.tallying.document_sample import DocumentCounter

EXPLAIN = """
from moescope.tallying.counted import counted
from moescope.tallying.document_sample import DocumentCounter
sample = counted(trace, DocumentCounter, threads=1)
moescope.explain(sample, permutations={permutations}, threads=1)
moescope.locality(sample, threads=1)
"""
"""What a user of both does, in a process of its own, whose memory is measured."""


def cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--permutations", type=int, default=99)
    arguments = parser.parse_args()
    explain = importlib.import_module("moescope.measures.explain").explain
    locality = importlib.import_module("moescope.measures.locality").locality
    with tempfile.TemporaryDirectory() as folder:
        trace = make_trace(Path(folder) / "t.moe", arguments.tokens, arguments.layers)
        few = counted(trace, DocumentCounter, layers=[0], options=CountOptions(max_bytes=2**20))[DocumentCounter]
        explain(few, permutations=2)  # compiled before it is measured
        locality(few)
        moescope.tally(trace, [0], threads=1)
        tally = cpu_seconds(lambda: moescope.tally(trace, threads=1), 3)
        one_pass = cpu_seconds(lambda: counted(trace, DocumentCounter, threads=1)[DocumentCounter], 3)
        sample = counted(trace, DocumentCounter, threads=1)[DocumentCounter]
        seconds = {
            "tally": tally,
            "one pass of explain and locality": one_pass,
            "explain": cpu_seconds(lambda: explain(sample, permutations=arguments.permutations, threads=1), 1),
            "locality": cpu_seconds(lambda: locality(sample, threads=1), 1),
        }
        peaks = peaks_of_calls(
            {"explain and locality": EXPLAIN.format(permutations=arguments.permutations)}, trace.path
        )
    result = {
        "tokens": arguments.tokens,
        "layers": arguments.layers,
        "cpu_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "times_the_tally": {name: round(value / tally, 2) for name, value in seconds.items()},
        "peak_memory_mb": peaks,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
