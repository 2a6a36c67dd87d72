"""Cost of load balance, co-activation and transitions as multiples of the tally's, one thread, in one run.

    python benchmarks/balance_and_joint.py [--tokens 4000000] [--layers 32] [--repeats 3] [--wide]

The trace is that of `benchmarks/tally.py`; `--wide` makes one of 128 experts, 8 a token, instead, with a tenth of the
tokens. CPU time, interleaved, median of the repeats. `counting` is the pass over tokens alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from gauges import peaks_of_calls
from tally import DOMAINS, PART_TOKENS, make_trace, seconds

import moescope
from moescope.tallying import tally
from moescope.tallying.balance import BalanceCounter
from moescope.tallying.counted import counted
from moescope.tallying.counter import CountOptions
from moescope.tallying.joint import CoactivationCounter, TransitionCounter
from moescope.trace import Header, Layer, Part, Trace, TraceWriter, Vocabulary, open_trace

ALONE = {name: f"moescope.{name}(trace, threads=2)" for name in ("balance", "coactivation", "transitions")}
"""Each in a process of its own, whose memory is measured."""


def make_wide_trace(path: Path, num_tokens: int, num_layers: int) -> Trace:
    rng = np.random.default_rng(0)
    layers = tuple(Layer(layer, 128, 8) for layer in range(num_layers))
    with TraceWriter(path, Header(layers), Vocabulary({})) as writer:
        for start in range(0, num_tokens, PART_TOKENS):
            count = min(PART_TOKENS, num_tokens - start)
            document = start + np.arange(count) // 800
            ids = {
                n: np.argpartition(rng.random((count, 128), np.float32), 8, axis=1)[:, :8] for n in range(num_layers)
            }
            position, zero = np.arange(count) % 800, np.zeros(count, np.uint32)
            part = Part(document, document % len(DOMAINS), DOMAINS, zero, position, zero, ids)
            writer.write(part, {})
        writer.finish({"tokens": num_tokens})
    return open_trace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--wide", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make = make_wide_trace if arguments.wide else make_trace
        trace = make(Path(folder) / "t.moe", arguments.tokens // (10 if arguments.wide else 1), arguments.layers)
        counts = (
            counted(trace, BalanceCounter, threads=1)[BalanceCounter],
            counted(trace, CoactivationCounter, threads=1)[CoactivationCounter],
            counted(trace, TransitionCounter, threads=1)[TransitionCounter],
        )
        calls: dict[str, Callable[[], object]] = {
            "tally": lambda: tally(trace, threads=1),
            "balance, counting": lambda: counted(trace, BalanceCounter, threads=1)[BalanceCounter],
            "coactivation, counting": lambda: counted(trace, CoactivationCounter, threads=1)[CoactivationCounter],
            "transitions, counting": lambda: counted(trace, TransitionCounter, threads=1)[TransitionCounter],
            "balance, measuring": lambda: moescope.balance(counts[0]),
            "coactivation, measuring": lambda: moescope.coactivation(counts[1]),
            "transitions, measuring": lambda: moescope.transitions(counts[2]),
        }
        if not arguments.wide:
            calls["transitions of all choices, counting"] = lambda: counted(
                trace, TransitionCounter, threads=1, options=CountOptions(choice="all")
            )[TransitionCounter]
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
            "peak_memory_mb": peaks_of_calls(ALONE, trace.path),
        }
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
