"""Time and memory of expert parallelism over a trace, all five placements, in one run.

    python benchmarks/parallel.py [--tokens 4000000] [--layers 32] [--devices 8] [--threads 2] [--wide]

The trace is that of `benchmarks/tally.py` (2 of 8 experts), or with `--wide` 8 of 128 experts with a tenth of the
tokens. Wall time and CPU time of `moescope.parallel` with prefill batches of 4096 and decode batches of 64 tokens;
peak memory of a fresh process, for the trace and for a quarter of it.

2026-11-24, `python benchmarks/parallel.py`, two cores, nothing else running: 19.9 s of wall time, 32.5 s of CPU time;
for a quarter of the tokens 7.6 and 9.3 s. Peak 745 and 638 MB (2026-11-30, docs/decisions/log.md).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from balance_and_joint import make_wide_trace
from gauges import in_a_fresh_process
from tally import make_trace

CODE = """
import json, sys, time
import gauges
import moescope
trace = moescope.open_trace(sys.argv[1])
options = dict(devices=int(sys.argv[2]), threads=int(sys.argv[3]))
moescope.parallel(moescope.open_trace(sys.argv[4]), **options)  # compiles
wall, cpu = time.perf_counter(), time.process_time()
found = moescope.parallel(trace, **options)
reached = found["devices_reached"].isel(batch=0).mean("layer").to_series()
print(json.dumps({
    "seconds": round(time.perf_counter() - wall, 1),
    "cpu_seconds": round(time.process_time() - cpu, 1),
    "peak_memory_mb": gauges.peak_memory_mb(),
    "slowest": {p: round(v, 3) for p, v in found["slowest"].isel(batch=0).to_series().items()},
    "devices_reached": {p: round(v, 3) for p, v in reached.items()},
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--wide", action="store_true")
    arguments = parser.parse_args()
    make = make_wide_trace if arguments.wide else make_trace
    tokens = arguments.tokens // (10 if arguments.wide else 1)
    with tempfile.TemporaryDirectory() as folder:
        small = make(Path(folder) / "small.moe", 20_000, 2)
        result = {}
        for name, size in (("whole", tokens), ("quarter", tokens // 4)):
            trace = make(Path(folder) / f"{name}.moe", size, arguments.layers)
            result[name] = in_a_fresh_process(CODE, trace.path, arguments.devices, arguments.threads, small.path)
        size = {"tokens": tokens, "layers": arguments.layers, "devices": arguments.devices}
        print(json.dumps({**size, **result}, indent=1))


if __name__ == "__main__":
    main()
