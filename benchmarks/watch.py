"""What `moescope.watch` costs: steps of the mini model with a live tally and without, in turn.

    python benchmarks/watch.py                                  # training step and plain forward, 8 x 512
    taskset -c 0 python benchmarks/watch.py --threads 1 --repeats 15

A training step is forward, backward and AdamW; a plain forward is without gradients. Steps alternate in one process,
so that a busy machine slows both; which of the two comes first alternates, too. Read the median of the ratios on a
quiet machine, and the ratio of the least CPU times on a busy one. `--padding` gives every batch an attention mask with
a quarter of padding. The CPU time of what runs in the hooks is taken as well, as a share of a step's: the figure that
a busy neighbour blurs least.

Bar: under 1.03.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

from gauges import require

require("torch", "transformers")

import torch
import transformers

import moescope
from moescope import mini
from moescope.watching.passes import Passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--experts", default="eager", help="experts implementation")
    parser.add_argument("--padding", action="store_true")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(mini.model_path(), dtype=options.dtype)
    model.set_experts_implementation(options.experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(3, model.config.vocab_size, (options.sequences, options.length))
    mask = torch.ones_like(ids)
    if options.padding:
        mask[:, -options.length // 4 :] = 0
    batch = {"input_ids": ids, **({"attention_mask": mask} if options.padding else {})}

    def training() -> None:
        model.train()
        model(**batch, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            model(**batch)

    print(f"mini model, {options.dtype}, {options.experts} experts, {tuple(ids.shape)}, {options.threads} thread(s)")
    for name, step in {"training step": training, "plain forward": forward}.items():
        measure(name, model, step, options.repeats)


def measure(name: str, model: Any, step: Callable[[], None], repeats: int) -> None:
    seconds: dict[bool, list[float]] = {False: [], True: []}
    cpu_seconds: dict[bool, list[float]] = {False: [], True: []}
    step()
    for repeat in range(repeats):
        for watched in (False, True) if repeat % 2 else (True, False):
            with moescope.watch(model) if watched else nullcontext():
                start, cpu_start = time.perf_counter(), time.process_time()
                step()
                seconds[watched].append(time.perf_counter() - start)
                cpu_seconds[watched].append(time.process_time() - cpu_start)
    ratio = statistics.median(ours / theirs for ours, theirs in zip(seconds[True], seconds[False], strict=True))
    cpu_ratio = min(cpu_seconds[True]) / min(cpu_seconds[False])
    share = time_in_hooks(model, step) / min(cpu_seconds[False])
    print(
        f"  {name}: {statistics.median(seconds[False]):.3f} s; watched {ratio:.4f} of it (median), {cpu_ratio:.4f} by "
        f"least CPU time; the hooks themselves take {share:.3%}"
    )


def time_in_hooks(model: Any, step: Callable[[], None]) -> float:
    """CPU seconds that a step spends in what the hooks call."""
    total = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal total
            start = time.process_time()
            try:
                return function(*args)
            finally:
                total += time.process_time() - start

        return run

    hooks = {name: timed(getattr(Passes, name)) for name in ("begin", "note", "end")}
    with patch.multiple(Passes, **hooks), moescope.watch(model):
        step()
        total = 0.0
        for _ in range(3):
            step()
    return total / 3


if __name__ == "__main__":
    main()
