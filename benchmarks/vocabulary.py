"""Cost of vocabulary specialization and word classes as multiples of the tally's, one thread, in one run.

    python benchmarks/vocabulary.py [--tokens 4000000] [--layers 32] [--repeats 3] [--memory]

The trace is that of `benchmarks/tally.py`, with pieces of a few letters. CPU time, interleaved, median of the repeats.
`reading` is the sample of documents that vocabulary specialization goes over, `without tests` all but the 99
permutations, which go over 131,072 tokens however many there are. `--memory` measures the peak of fresh processes
instead, for 60 layers, 8 of 256 experts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from gauges import peaks_of_calls
from tally import DOMAINS, make_trace, seconds

import moescope
from moescope.tallying import tally
from moescope.tallying.counted import counted
from moescope.tallying.counter import CountOptions
from moescope.tallying.document_sample import DocumentCounter
from moescope.tallying.word_classes import ClassCounter
from moescope.trace import Header, Layer, Part, Trace, TraceWriter, Vocabulary, open_trace

VOCABULARY = 32_000


def with_pieces(trace: Trace) -> Trace:
    """The trace with a piece for every id, a few of them of each word class."""
    special = [b"\n", b"    ", b" def", b"return", b".", b"(", b"\\", b"alpha", b" The", b"42"]
    pieces = [special[n] if n < len(special) else f"{' ' * (n % 3 > 0)}w{n:x}".encode() for n in range(VOCABULARY)]
    with (trace.path / "vocabulary.parquet").open("wb") as file:
        Vocabulary.from_pieces(pieces).write(file)
    return open_trace(trace.path)


def make_wide_trace(path: Path, num_tokens: int) -> Trace:
    rng = np.random.default_rng(0)
    layers = tuple(Layer(layer, 256, 8) for layer in range(60))
    with TraceWriter(path, Header(layers), Vocabulary({})) as writer:
        for start in range(0, num_tokens, 2**16):
            count = min(2**16, num_tokens - start)
            document = start // 2**16 * 100 + np.arange(count) // 800
            scores = rng.random((count, 256), np.float32)
            ids = np.argpartition(scores, 8, axis=1)[:, :8]
            position, zero = np.arange(count) % 800, np.zeros(count, np.uint32)
            token_id = rng.integers(0, 150_000, count)
            part = Part(document, document % len(DOMAINS), DOMAINS, zero, position, token_id, {})
            writer.write(replace(part, expert_ids={layer.layer: (ids + layer.layer) % 256 for layer in layers}), {})
        writer.finish({"tokens": num_tokens})
    return open_trace(path)


def peaks(path: Path) -> dict[str, float]:
    """Peak memory, MB, of fresh processes with two threads."""
    calls = (
        "vocabulary(trace, threads=2)",
        "vocabulary(trace, threads=2, choice='all')",
        "syntax(trace, threads=2)",
    )
    return peaks_of_calls({call: f"moescope.{call}" for call in calls}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.memory:
            trace = make_wide_trace(Path(folder) / "wide.moe", arguments.tokens)
            print(json.dumps({"tokens": arguments.tokens, "peak_memory_mb": peaks(trace.path)}, indent=1))
            return
        trace = with_pieces(make_trace(Path(folder) / "t.moe", arguments.tokens, arguments.layers))
        sample = counted(trace, DocumentCounter, threads=1, options=CountOptions(ranks=1))[DocumentCounter]
        calls: dict[str, Callable[[], object]] = {
            "tally": lambda: tally(trace, threads=1),
            "vocabulary, reading": lambda: counted(trace, DocumentCounter, threads=1, options=CountOptions(ranks=1))[
                DocumentCounter
            ],
            "vocabulary, without tests": lambda: moescope.vocabulary(sample, threads=1, permutations=1),
            "vocabulary, measuring": lambda: moescope.vocabulary(sample, threads=1),
            "word classes": lambda: counted(trace, ClassCounter, threads=1)[ClassCounter],
            "syntax": lambda: moescope.syntax(trace, threads=1),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(arguments.repeats):
            for name, call in calls.items():
                times[name].append(seconds(call))
        base = median(times["tally"])
        result = {
            "tally_seconds": round(base, 2),
            "multiples_of_the_tally": {name: round(median(values) / base, 2) for name, values in times.items()},
        }
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
