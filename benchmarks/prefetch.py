"""Cost of prefetching: the model's forward pass with lookahead, and the measure as multiples of the tally's time.

    python benchmarks/prefetch.py [--tokens 400000] [--layers 8] [--repeats 5]

One thread, CPU time, interleaved, median of the repeats. The pass is the embedded model's over 2 x 2048 tokens; the
trace has 128 experts, 8 a token, as that of `benchmarks/balance_and_joint.py --wide`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from gauges import require

require("torch", "transformers")

import torch
from balance_and_joint import make_wide_trace
from tally import seconds

import moescope
from moescope import mini
from moescope.engines.options import EngineOptions
from moescope.engines.transformers.hooks import RouterWatch
from moescope.engines.transformers.model import load_model, probe, probe_lookahead, ready_to_record
from moescope.tallying import tally


def passes(repeats: int) -> dict[str, float]:
    """CPU time of a pass with lookahead over that of one without, median of ratios."""
    torch.set_num_threads(1)
    model = load_model(mini.model_path(), EngineOptions(device="cpu"))
    ids = torch.randint(0, 4000, (2, 2048), generator=torch.Generator().manual_seed(0))
    with ready_to_record(model):
        _, stop = probe(model)
        looks = {str(each): probe_lookahead(model, each) for each in ((), (1,), (1, 2, 4))}
        times: dict[str, list[float]] = {name: [] for name in looks}
        for _ in range(repeats):
            for name, look in looks.items():
                with RouterWatch(model.experts, stop_at=stop, lookahead=look) as watch:
                    start = time.process_time()
                    watch.run(model.body, {"input_ids": ids})
                    times[name].append(time.process_time() - start)
    plain = times.pop("()")
    return {name: median(a / b for a, b in zip(each, plain, strict=True)) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = make_wide_trace(Path(folder) / "t.moe", arguments.tokens, arguments.layers)
        moescope.prefetch(trace, threads=1)
        tally(trace, threads=1)
        measured = {"tally": lambda: tally(trace, threads=1)}
        measured["prefetch, 3 distances"] = lambda: moescope.prefetch(trace, threads=1)
        measured["prefetch, no transitions"] = lambda: moescope.prefetch(trace, distances=[], threads=1)
        times = {name: median(seconds(run) for _ in range(3)) for name, run in measured.items()}
    result = {
        "forward pass, times that without lookahead": passes(arguments.repeats),
        "seconds": times,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
