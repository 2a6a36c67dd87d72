"""Cost of all measures of what routing means, as multiples of the tally's, in CPU time; everything in one run.

    python benchmarks/meaning.py [--tokens 4000000] [--layers 32] [--repeats 3] [--only pass permutations memory]

The trace is that of `benchmarks/tally.py`, 2 of 8 (`--trace PATH` keeps and reuses it). *pass*: one thread, in turn,
median of the repeats: the tally; each other counter alone; and all of them in one pass, in which each page is read and
decoded once: tally, balance, co-activation, transitions with paths, segments of 16 tokens for SRP, word classes, and
the documents that `explain`, `locality` and `vocabulary` go over. The bar is 5 times the tally.

*permutations*: over these documents, `explain` with 99 permutations and `locality`, two threads: CPU time as a multiple
of the tally's, and wall time.

*memory*: peak of a fresh process that counts everything in one pass and then measures everything, `explain` and
`locality` among it, 60 layers of 256 experts, 8 a token; two sizes of trace, because it must not depend on tokens,
only on the documents held, up to 1 GiB. The bar is 4 GB.

On 2026-11-24, busy machine (docs/decisions/log.md): balance 1.5, co-activation 1.0, transitions 1.5, segments 2.0,
documents 1.6, all in one pass 4.6 times the tally (4.3 by the least of the times). Peak (2026-11-30) 1,976 MB for
200,000 tokens and 3,087 MB for 2.4 million, whose documents fill the 1 GiB.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from gauges import in_a_fresh_process
from tally import DOMAINS, make_trace, seconds

import moescope
from moescope.tallying import count, tally
from moescope.tallying.balance import BalanceCounter
from moescope.tallying.counted import counted
from moescope.tallying.counter import CountOptions
from moescope.tallying.document_sample import DocumentCounter
from moescope.tallying.joint import CoactivationCounter, TransitionCounter
from moescope.tallying.segments import SegmentCounter
from moescope.tallying.word_classes import ClassCounter
from moescope.trace import Header, Layer, Part, Trace, TraceWriter, Vocabulary, open_trace

SEGMENTS = (16,)
BAR_TIMES, BAR_GB = 5.0, 4.0

IN_A_FRESH_PROCESS = """
import json, sys, time
import gauges, moescope

def note(name):
    peaks[name] = gauges.peak_memory_mb()

peaks, start = {}, time.process_time()
trace = moescope.open_trace(sys.argv[1])
counts = moescope.count(trace, threads=1)
note("counted")
from moescope.measures import divergence, repeats, shares
from moescope.tallying.document_sample import DocumentCounter
kept = [shares(counts), repeats(counts), divergence(counts)]
kept.append(moescope.balance(counts)); note("balance")
kept.append(moescope.coactivation(counts)); note("coactivation")
kept.append(moescope.transitions(counts)); note("transitions")
kept.append(moescope.consistency(counts)); note("consistency")
kept.append(moescope.locality(counts, threads=1)); note("locality")
kept.append(moescope.explain(counts, permutations=int(sys.argv[2]), threads=1)); note("explain")
kept.append(moescope.syntax(counts)); note("syntax")
kept.append(moescope.vocabulary(counts, permutations=int(sys.argv[2]), threads=1)); note("vocabulary")
fraction, seconds = round(counts[DocumentCounter].fraction, 3), round(time.process_time() - start, 1)
print(json.dumps({"peak_mb": peaks, "documents_held": fraction, "cpu_seconds": seconds}))
"""


TEXT = Vocabulary(
    {at: (b" the", b"ing", b" Word", b"7", b",", b"\n", b"    ", b" def")[at % 8] for at in range(32_000)}
)
"""Something of every word class, so that they are counted as in a text."""


def wide_trace(path: Path, num_tokens: int) -> Trace:
    """60 layers of 256 experts, 8 a token, in documents of some 800 tokens."""
    rng = np.random.default_rng(0)
    layers = tuple(Layer(number, 256, 8) for number in range(60))
    with TraceWriter(path, Header(layers), TEXT) as writer:
        for start in range(0, num_tokens, 16_384):
            count = min(16_384, num_tokens - start)
            at = np.arange(count)
            zero = np.zeros(count, np.uint32)
            ids = {}
            for layer in layers:  # distinct ids: a random start and one of the odd strides modulo 256
                first, half = rng.integers(0, 256, (count, 1)), rng.integers(0, 128, (count, 1))
                ids[layer.layer] = (first + np.arange(8) * (2 * half + 1)) % 256
            document = start // 16_384 * 21 + at // 800
            part = Part(document, document % len(DOMAINS), DOMAINS, zero, at % 800, rng.zipf(1.3, count) % 32_000, ids)
            writer.write(part, {})
        writer.finish({"tokens": num_tokens})
    return open_trace(path)


def of_pass(trace: Trace, repeats: int) -> dict[str, Any]:
    """Multiples of the tally, one thread."""
    calls: dict[str, Callable[[], object]] = {
        "tally": lambda: tally(trace, threads=1),
        "balance": lambda: counted(trace, BalanceCounter, threads=1)[BalanceCounter],
        "co-activation": lambda: counted(trace, CoactivationCounter, threads=1)[CoactivationCounter],
        "transitions": lambda: counted(trace, TransitionCounter, threads=1)[TransitionCounter],
        "segments of 16": lambda: counted(trace, SegmentCounter, threads=1, options=CountOptions(lengths=SEGMENTS))[
            SegmentCounter
        ],
        "word classes": lambda: counted(trace, ClassCounter, threads=1)[ClassCounter],
        "documents": lambda: counted(trace, DocumentCounter, threads=1)[DocumentCounter],
        "everything in one pass": lambda: count(trace, lengths=SEGMENTS, threads=1),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    tally(trace, [0], threads=1)
    count(trace, [0, 1], lengths=SEGMENTS, threads=1)  # compiled before it is measured
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call))
    base = median(times["tally"])
    multiples = {name: round(median(values) / base, 2) for name, values in times.items()}
    return {
        "tally_cpu_seconds": round(base, 2),
        "times_the_tally": multiples,
        "least_times_the_tally": {name: round(min(v) / min(times["tally"]), 2) for name, v in times.items()},
        "within_the_bar": multiples["everything in one pass"] <= BAR_TIMES,
    }


def of_permutations(trace: Trace, permutations: int) -> dict[str, Any]:
    """Cost of what goes over the documents several times, two threads."""
    base = min(seconds(lambda: tally(trace, threads=1)) for _ in range(2))
    sample = counted(trace, DocumentCounter, threads=2)[DocumentCounter]
    found: dict[str, Any] = {"tally_cpu_seconds": round(base, 2)}
    for name, call in (
        ("explain", lambda: moescope.explain(sample, permutations=permutations, threads=2, progress=said)),
        ("locality", lambda: moescope.locality(sample, threads=2, progress=said)),
    ):
        start = time.monotonic()
        cpu = seconds(call)
        wall = time.monotonic() - start
        found[name] = {
            "cpu_times_the_tally": round(cpu / base, 1),
            "wall_seconds": round(wall, 1),
            "cpu_over_wall": round(cpu / wall, 2),
        }
    return found


def said(done: int, of: int) -> None:
    """Progress, as a user sees it."""
    print(f"\r{done} of {of} layers", end="" if done < of else "\n", file=sys.stderr, flush=True)


def of_memory(folder: Path, sizes: list[int], permutations: int) -> dict[str, Any]:
    """Peaks of fresh processes."""
    peaks: dict[str, Any] = {}
    for size in sizes:
        trace = wide_trace(folder / f"wide-{size}.moe", size)
        peaks[f"{size} tokens"] = in_a_fresh_process(IN_A_FRESH_PROCESS, trace.path, permutations)
    most = max(measured["peak_mb"]["vocabulary"] for measured in peaks.values())
    return {**peaks, "within_the_bar": most < BAR_GB * 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--permutations", type=int, default=99)
    parser.add_argument("--trace", type=Path, help="where the trace is kept, or is")
    parser.add_argument("--wide-tokens", type=int, nargs="+", default=[100_000, 200_000])
    parts = ("pass", "permutations", "memory")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    arguments = parser.parse_args()
    result: dict[str, Any] = {"tokens": arguments.tokens, "layers": arguments.layers}
    with tempfile.TemporaryDirectory() as folder:
        if {"pass", "permutations"} & set(arguments.only):
            path = arguments.trace or Path(folder) / "t.moe"
            trace = open_trace(path) if path.exists() else make_trace(path, arguments.tokens, arguments.layers, TEXT)
            if "pass" in arguments.only:
                result["one_pass"] = of_pass(trace, arguments.repeats)
            if "permutations" in arguments.only:
                result["permutations"] = of_permutations(trace, arguments.permutations)
        if "memory" in arguments.only:
            result["memory"] = of_memory(Path(folder), arguments.wide_tokens, min(arguments.permutations, 9))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
