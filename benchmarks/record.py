"""Recording against the plain forward ``model(input_ids)`` of the same batches: time and peak memory.

    python benchmarks/record.py                     # the mini model
    python benchmarks/record.py --model random      # a random Mixtral: hidden 512, 8 layers, 32,000 words
    taskset -c 0 python benchmarks/record.py --threads 1 --repeats 9

Plain is what a user would write: the causal model as ``from_pretrained`` gives it, head and all, one call a batch, its
outputs dropped. Recording is everything that `moescope.record` does: reading, tokenizing, batching, hooks, sorting,
writing. Repeats alternate in one process, so that a busy machine slows both. On a quiet machine read the median over
the rounds; on a busy one the ratio of the least CPU times of many short rounds tells more. Memory is the peak of a
process of its own that loads the model and goes over the corpus once.

Bars: time at most 0.90, memory at most 1.05.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from moescope import mini
from moescope.corpus import open_corpus, sample
from moescope.recording import record
from moescope.recording.batches import Batch, batches, portions, windows
from moescope.recording.recorder import BATCH_TOKENS, PART_TOKENS, WINDOW
from moescope.recording.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="mini, random, or the folder of a checkpoint")
    parser.add_argument("--documents", type=int, default=8, help="documents of each of the sample's domains")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--weights", action="store_true", help="record the gate weights, too")
    parser.add_argument("--child", choices=["plain", "recording"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        options.path = checkpoint(options.model, Path(folder))
        if options.child:
            measure_child(options, Path(folder))
            return
        measure_memory(options)  # first: a child's peak starts at what its parent held
        measure_time(options, Path(folder))


def measure_time(options: argparse.Namespace, folder: Path) -> None:
    model, tokenizer = load(options)
    prepared = same_batches(options, tokenizer)
    tokens = sum(len(batch.rows) for batch in prepared)
    padding = sum(batch.input_ids.size for batch in prepared) / tokens - 1
    print(
        f"{options.model}, {model.dtype}, {options.threads} thread(s): {tokens:,} tokens in {len(prepared)} batches, "
        f"{padding:.1%} of it padding and added tokens"
    )
    as_loaded = model.config._experts_implementation
    runs: dict[str, Callable[[], Any]] = {
        f"plain, {as_loaded} experts (as loaded)": lambda: plain(model, prepared),
        "plain, eager experts": lambda: with_eager_experts(model, prepared),
        "recording": lambda: recorded((model, tokenizer), options, folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.repeats + 1):
        for name, run in runs.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu_start)
    for name, values in seconds.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(seconds["recording"], values, strict=True))
        cpu_ratio = min(cpu_seconds["recording"]) / min(cpu_seconds[name])
        print(
            f"  {name:37} {statistics.median(values):6.2f} s  {tokens / statistics.median(values):7,.0f} tokens/s"
            f"  recording takes {ratio:.2f} of it, {cpu_ratio:.2f} by least CPU time"
        )


def measure_memory(options: argparse.Namespace) -> None:
    peaks = {}
    for child in ("plain", "recording"):
        command = [sys.executable, __file__, "--child", child, "--model", str(options.path)]
        for name in ("documents", "dtype", "threads", "batch_tokens"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        command += ["--weights"] if options.weights else []
        peaks[child] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ratio = peaks["recording"] / peaks["plain"]
    print(
        f"  peak memory: plain {peaks['plain'] / 2**20:,.0f} MiB, recording {peaks['recording'] / 2**20:,.0f} MiB, "
        f"ratio {ratio:.2f}"
    )


def measure_child(options: argparse.Namespace, folder: Path) -> None:
    if options.child == "plain":
        model, tokenizer = load(options)
        plain(model, same_batches(options, tokenizer))
    else:
        recorded(options.path, options, folder)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


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
        for batch in batches(windows(portion, WINDOW - len(used.added_ids)), used.added_ids, options.batch_tokens)
    ]


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(options.path, dtype=options.dtype)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(options.path)


def checkpoint(name: str, folder: Path) -> Path:
    if name == "mini":
        return mini.model_path()
    if name != "random":
        return Path(name)
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
    )
    transformers.MixtralForCausalLM(config).bfloat16().save_pretrained(folder / "random")
    transformers.AutoTokenizer.from_pretrained(mini.model_path()).save_pretrained(folder / "random")
    return folder / "random"


if __name__ == "__main__":
    main()
