"""Recording against the plain forward ``model(input_ids)`` of the same batches: time and peak memory.

    python benchmarks/record.py                     # every scenario
    python benchmarks/record.py mini                # the mini model
    python benchmarks/record.py random              # a random Mixtral: hidden 512, 8 layers, 32,000 words
    python benchmarks/record.py layers0             # the same with 12 layers, of which only layer 0 is recorded
    python benchmarks/record.py path/to/checkpoint --json
    taskset -c 0 python benchmarks/record.py mini --threads 1 --repeats 9

Plain is what a user would write: the causal model as ``from_pretrained`` gives it, head and all, one call a batch, its
outputs dropped. Recording is everything that `moescope.record` does: reading, tokenizing, batching, hooks, sorting,
writing, on whatever thread. Repeats alternate in one process, so that a busy machine slows both. On a quiet machine
read the median of the wall times; on a busy one the ratios of CPU times, of the median or the least of many short
rounds, tell more. Memory is the peak of a process of its own that loads the model and goes over the corpus once.

Bars: time at most 0.85 (mini), 0.80 (random), 0.25 (layers0); memory at most 1.05.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gauges import peak_memory, require

require("torch", "transformers")

import torch
import transformers

from moescope import mini
from moescope.corpus import open_corpus, sample
from moescope.engines.options import BATCH_TOKENS, WINDOW
from moescope.engines.transformers.batches import Batch, batches
from moescope.engines.transformers.tokenizer import Tokenizer
from moescope.recording import record
from moescope.recording.portions import portions, windows
from moescope.trace.part import PART_TOKENS

BARS = {"mini": 0.85, "random": 0.80, "layers0": 0.25}
MEMORY_BAR = 1.05
DOCUMENTS = {"mini": 8, "random": 2, "layers0": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", default=list(BARS), help="mini, random, layers0, or a checkpoint")
    parser.add_argument("--documents", type=int, help="documents of each of the sample's domains")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--weights", action="store_true", help="record the gate weights, too")
    parser.add_argument("--json", action="store_true", help="print all measurements as JSON")
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=["plain", "recording"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    results = []
    for scenario in options.scenarios:
        with tempfile.TemporaryDirectory() as folder:
            run = argparse.Namespace(**vars(options))
            run.scenario = scenario
            run.layers = [0] if scenario == "layers0" else None
            run.documents = options.documents or DOCUMENTS.get(scenario, 2)
            run.path = options.path or checkpoint(scenario, Path(folder))
            if options.child:
                measure_child(run, Path(folder))
                return
            results.append(measure_time(run, Path(folder)) | {"memory": measure_memory(run)})
            if not options.json:
                print_result(results[-1])
    if options.json:
        print(json.dumps(results, indent=1))


def measure_time(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model, tokenizer = load(options)
    prepared = same_batches(options, tokenizer)
    tokens = sum(len(batch.rows) for batch in prepared)
    as_loaded = model.config._experts_implementation
    runs: dict[str, Callable[[], Any]] = {
        f"plain, {as_loaded} experts (as loaded)": lambda: plain(model, prepared),
        "plain, eager experts": lambda: with_eager_experts(model, prepared),
        "recording": lambda: recorded((model, tokenizer), options, folder),
    }
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in clocks} for name in runs}
    for repeat in range(options.repeats + 1):
        for name, run in runs.items():
            starts = {clock: read() for clock, read in clocks.items()}
            run()
            if repeat:  # the first round warms up
                for clock, read in clocks.items():
                    seconds[name][clock].append(read() - starts[clock])
    ours = seconds["recording"]
    return {
        "scenario": options.scenario,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": options.threads,
        "tokens": tokens,
        "batches": len(prepared),
        "padding": sum(batch.input_ids.size for batch in prepared) / tokens - 1,
        "bar": BARS.get(options.scenario),
        "seconds": seconds,
        "recording_takes": {
            name: {
                "median_wall": paired_median(ours["wall"], theirs["wall"]),
                "median_cpu": paired_median(ours["cpu"], theirs["cpu"]),
                "least_cpu": min(ours["cpu"]) / min(theirs["cpu"]),
            }
            for name, theirs in seconds.items()
        },
    }


def paired_median(ours: list[float], theirs: list[float]) -> float:
    """The median, over the rounds, of what ours takes of theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def print_result(result: dict[str, Any]) -> None:
    bar = "" if result["bar"] is None else f"; bar {result['bar']:.2f} of plain as loaded"
    print(
        f"{result['scenario']}, {result['dtype']}, {result['threads']} thread(s): {result['tokens']:,} tokens in "
        f"{result['batches']} batches, {result['padding']:.1%} of it padding and added tokens{bar}"
    )
    print(f"  {'':37} {'median':>9} {'':>16}   recording takes of it, by")
    print(f"  {'':37} {'wall':>9} {'':>16}  median wall  median CPU  least CPU")
    for name, seconds in result["seconds"].items():
        wall = statistics.median(seconds["wall"])
        ratios = result["recording_takes"][name]
        print(
            f"  {name:37} {wall:7.2f} s {result['tokens'] / wall:7,.0f} tokens/s"
            f"  {ratios['median_wall']:11.2f}  {ratios['median_cpu']:10.2f}  {ratios['least_cpu']:9.2f}"
        )
    memory = result["memory"]
    print(
        f"  peak memory: plain {memory['plain'] / 2**20:,.0f} MiB, recording {memory['recording'] / 2**20:,.0f} MiB, "
        f"ratio {memory['ratio']:.2f}; bar {MEMORY_BAR}"
    )


def measure_memory(options: argparse.Namespace) -> dict[str, float]:
    peaks = {}
    for child in ("plain", "recording"):
        command = [sys.executable, __file__, options.scenario, "--child", child, "--path", str(options.path)]
        for name in ("documents", "dtype", "threads", "batch_tokens"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        command += ["--weights"] if options.weights else []
        peaks[child] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return peaks | {"ratio": peaks["recording"] / peaks["plain"]}


def measure_child(options: argparse.Namespace, folder: Path) -> None:
    if options.child == "plain":
        model, tokenizer = load(options)
        plain(model, same_batches(options, tokenizer))
    else:
        recorded(options.path, options, folder)
    print(peak_memory())


def plain(model: Any, prepared: list[Batch]) -> None:
    with torch.inference_mode():
        for batch in prepared:
            model(torch.from_numpy(batch.input_ids))


def with_eager_experts(model: Any, prepared: list[Batch]) -> None:
    before = model.config._experts_implementation
    model.set_experts_implementation("eager")
    plain(model, prepared)
    model.set_experts_implementation(before)


def recorded(model: Any, options: argparse.Namespace, folder: Path) -> None:
    record(
        model,
        mini.corpus_path(),
        folder / "benchmark.moe",
        layers=options.layers,
        max_documents_per_domain=options.documents,
        batch_tokens=options.batch_tokens,
        weights=options.weights,
        dtype=options.dtype if isinstance(model, Path) else "auto",
        force=True,
    )


def same_batches(options: argparse.Namespace, tokenizer: Any) -> list[Batch]:
    """The batches that the recorder makes of the corpus."""
    used = Tokenizer(tokenizer)
    documents = sample(open_corpus(mini.corpus_path()), max_documents_per_domain=options.documents)
    return [
        batch
        for portion in portions(documents, used.encode, PART_TOKENS)
        for batch in batches(
            [window.token_ids for window in windows(portion, WINDOW - len(used.added_ids))],
            used.added_ids,
            options.batch_tokens,
        )
    ]


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(options.path, dtype=options.dtype)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(options.path)


def checkpoint(name: str, folder: Path) -> Path:
    if name == "mini":
        return mini.model_path()
    if name not in ("random", "layers0"):
        return Path(name)
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=8 if name == "random" else 12,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
    )
    transformers.MixtralForCausalLM(config).bfloat16().save_pretrained(folder / "random")
    transformers.AutoTokenizer.from_pretrained(mini.model_path()).save_pretrained(folder / "random")
    return folder / "random"


if __name__ == "__main__":
    main()
