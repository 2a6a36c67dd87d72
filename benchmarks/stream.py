"""Streaming a model that is larger than memory: time, memory and bytes read, against the whole model in memory and
against accelerate's disk offload.

    python benchmarks/stream.py                      # a random Mixtral of 4.1 GB, 16 sequences of 512 tokens
    python benchmarks/stream.py --small              # a quick check of the same code on a model of 50 MB
    python benchmarks/stream.py --figure docs/images/streaming.png    # other sizes of model and corpus, drawn

The checkpoint is written shard by shard, as the hub has it. Every way runs in a process of its own, whose peak is
VmHWM of /proc, on files that the system has forgotten (posix_fadvise DONTNEED). "Compute" is the in-memory model's body
over the same batches, its files read and its weights loaded beforehand. accelerate is given 700 MiB, and its files are
forgotten before every batch, as they would be if the model were larger than memory; its time is that of the passes
alone. On a busy machine, read the CPU times.

Bars: peak at most 1.5 x the largest layer + the spool's budget + 1 GB; bytes read at most 1.02 x the checkpoint; time
at most 1.10 x compute, and less than accelerate; the same ids.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gauges import peak_memory, require

require("torch", "transformers", "safetensors", "accelerate")

import torch
import transformers
from safetensors.torch import save_file

from moescope import mini
from moescope.corpus import Document, open_corpus
from moescope.engines.options import EngineOptions
from moescope.engines.streamed.estimate import BASE_BYTES
from moescope.engines.transformers.batches import batches
from moescope.engines.transformers.model import load_model, ready_to_record
from moescope.engines.transformers.tokenizer import Tokenizer
from moescope.recording import Estimate, record
from moescope.recording.portions import portions, windows
from moescope.trace import open_trace

SEQUENCE = 512
BATCH_TOKENS = 2 * SEQUENCE
SPOOL_BYTES = 10**8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a model of 50 MB")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where 10 GB fit; a temporary folder by default")
    parser.add_argument("--figure", type=Path, help="measure sizes of model and corpus instead, and draw them here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.figure:
        require("matplotlib")
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.child:
        print(json.dumps(run_child(json.loads(options.child))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        config = mixtral(small=options.small)
        make_checkpoint(folder / "model", config)
        layer_bytes = largest_layer(folder / "model")
        size = checkpoint_bytes(folder / "model")
        print(f"{size / 1e9:.2f} GB, {config.num_hidden_layers} layers of {layer_bytes / 1e9:.3f} GB, bf16")
        if options.figure:
            rate = read_rate(folder / "model")
            draw(options.figure, by_size(folder, config, options), by_corpus(folder, options), size / rate, layer_bytes)
        else:
            compare(folder, options, size, layer_bytes)


# ------------------------------------------------------------------------------------------------------ measuring


def compare(folder: Path, options: argparse.Namespace, size: int, layer_bytes: int) -> None:
    """Every way over the same sequences, with the bars beside."""
    found = {
        way: measure(way, folder / "model", folder / f"{way}.moe", options.sequences, options)
        for way in ("streaming", "memory", "accelerate")
    }
    tokens = options.sequences * SEQUENCE
    for way, result in found.items():
        print(
            f"  {way:10} {result['seconds']:7.1f} s ({result['cpu_seconds']:.1f} s of CPU)  "
            f"{tokens / result['seconds']:6.0f} tokens/s  peak {result['peak'] / 1e9:.2f} GB  "
            f"read {result['read'] / size:.3f} x the checkpoint ({result['from_disk'] / size:.3f} x from disk)"
        )
    streaming, compute = found["streaming"], found["memory"]["compute"]
    bound = 1.5 * layer_bytes + SPOOL_BYTES + 1e9
    print(f"  compute in memory: {compute['seconds']:.1f} s ({compute['cpu_seconds']:.1f} s of CPU)")
    print(
        f"  streaming: {streaming['seconds'] / compute['seconds']:.3f} x compute "
        f"({streaming['cpu_seconds'] / compute['cpu_seconds']:.3f} by CPU time; bar 1.10), "
        f"{found['accelerate']['seconds'] / streaming['seconds']:.2f} times as fast as accelerate, "
        f"peak {streaming['peak'] / bound:.2f} of the bound {bound / 1e9:.2f} GB, "
        f"read {streaming['read'] / size:.4f} (bar 1.02)"
    )
    estimated = streaming["estimated"]
    print(f"  estimated before: computing {estimated['compute']:.1f} s, reading {estimated['read']:.1f} s")
    first = routing(folder / "streaming.moe")
    for way in ("memory", "accelerate"):
        print(
            f"  ids and weights, streaming and {way}: {'equal' if routing(folder / f'{way}.moe') == first else 'NOT'}"
        )


def by_size(folder: Path, config: Any, options: argparse.Namespace) -> list[dict[str, float]]:
    """Peak memory of models that differ in depth."""
    found = []
    for layers in sorted({max(1, config.num_hidden_layers * part // 4) for part in (1, 2, 3, 4)}):
        model = folder / f"layers-{layers}"
        shorter(folder / "model", model, layers)
        peaks = {
            way: measure(way, model, folder / f"{layers}-{way}.moe", 2, options)["peak"]
            for way in ("streaming", "memory")
        }
        found.append({"size": checkpoint_bytes(model), **peaks})
        print(f"  {found[-1]['size'] / 1e9:.2f} GB: " + ", ".join(f"{k} {v / 1e9:.2f} GB" for k, v in peaks.items()))
    return found


def by_corpus(folder: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """CPU time a token over corpora of different sizes, and that of the computing alone."""
    found = []
    for sequences in (1, 2, 4, 8, 16):
        streaming = measure("streaming", folder / "model", folder / f"{sequences}-sequences.moe", sequences, options)
        found.append({"tokens": sequences * SEQUENCE, "seconds": streaming["cpu_seconds"]})
        print(
            f"  {sequences * SEQUENCE:,} tokens: {1000 * found[-1]['seconds'] / found[-1]['tokens']:.1f} ms of CPU a "
            f"token, {streaming['seconds']:.1f} s in all"
        )
    compute = measure("memory", folder / "model", folder / "floor.moe", 4, options)["compute"]
    return [entry | {"floor": compute["cpu_seconds"] / (4 * SEQUENCE)} for entry in found]


def read_rate(folder: Path) -> float:
    """Bytes a second at which the system reads files that it has forgotten."""
    forget(folder)
    start_seconds, done = time.perf_counter(), 0
    for file in sorted(folder.glob("layer-*.safetensors"))[:6]:
        with file.open("rb", buffering=0) as opened:
            while block := opened.read(2**23):
                done += len(block)
    rate = done / (time.perf_counter() - start_seconds)
    print(f"  the disk reads {rate / 1e9:.2f} GB/s")
    return rate


def measure(way: str, model: Path, out: Path, sequences: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one way in a process of its own, on files that the system has forgotten."""
    forget(model)
    task = json.dumps({"way": way, "model": str(model), "out": str(out), "sequences": sequences})
    command = [sys.executable, __file__, "--child", task, "--threads", str(options.threads)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def run_child(task: dict[str, Any]) -> dict[str, Any]:
    model, out = Path(task["model"]), Path(task["out"])
    documents = some_documents(task["sequences"])
    arguments: dict[str, Any] = {"window": SEQUENCE, "batch_tokens": BATCH_TOKENS, "weights": True}
    extra: dict[str, Any] = {}

    def note_estimate(estimate: Estimate) -> None:
        extra["estimated"] = {"compute": estimate.compute_seconds, "read": estimate.read_seconds}

    if task["way"] == "accelerate":
        loaded = offloaded(model, out.with_suffix(".offload"))
        forget(out.with_suffix(".offload"), model)
        before = start()
        record(loaded, documents, out, progress=lambda _: forget(out.with_suffix(".offload"), model), **arguments)
    elif task["way"] == "memory":
        extra["compute"] = compute(model, documents)
        before = start()
        record(model, documents, out, stream=False, **arguments)
    else:
        memory = int(BASE_BYTES + 1.5 * largest_layer(model) + SPOOL_BYTES)
        before = start()
        record(model, documents, out, stream=True, memory=memory, announce=note_estimate, **arguments)
    return {**since(before), "peak": peak_memory(), **extra}


def compute(folder: Path, documents: list[Document]) -> dict[str, float]:
    """Time of the in-memory model's body over the batches, once it is loaded."""
    model = load_model(folder, EngineOptions(device="cpu"))
    prepared = [
        torch.from_numpy(batch.input_ids)
        for portion in portions(documents, model.tokenizer.encode, 65_536)
        for batch in batches(
            [window.token_ids for window in windows(portion, SEQUENCE - len(model.tokenizer.added_ids))],
            model.tokenizer.added_ids,
            BATCH_TOKENS,
        )
    ]
    with torch.no_grad(), ready_to_record(model):
        model.body(prepared[0], use_cache=False)
        before = start()
        for input_ids in prepared:
            model.body(input_ids, use_cache=False)
    return since(before)


def offloaded(folder: Path, offload: Path) -> tuple[Any, Any]:
    """The model as accelerate runs it with 700 MiB of memory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        device_map="auto",
        max_memory={"cpu": "700MiB"},
        offload_folder=offload,
        experts_implementation="eager",
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def start() -> dict[str, float]:
    return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time(), **io_bytes()}


def since(before: dict[str, float]) -> dict[str, float]:
    now = start()
    return {name: now[name] - before[name] for name in before}


def io_bytes() -> dict[str, int]:
    """Bytes asked for by read calls, and bytes fetched from the disk, by this process so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"read": int(lines["rchar"]), "from_disk": int(lines["read_bytes"])}


def forget(*folders: Path) -> None:
    """Have the system drop what it keeps of the files."""
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def routing(path: Path) -> list[bytes]:
    """Ids and weights of every part and layer, as bytes."""
    return [
        array.tobytes()
        for part in open_trace(path).iter_parts(weights=True)
        for arrays in (part.expert_ids, part.gate_weights)
        for array in arrays.values()
    ]


# ------------------------------------------------------------------------------------------------ what is measured


def mixtral(*, small: bool) -> Any:
    return transformers.MixtralConfig(
        vocab_size=32_000,
        hidden_size=256 if small else 1024,
        intermediate_size=448 if small else 3584,
        num_hidden_layers=4 if small else 22,
        num_attention_heads=4 if small else 16,
        num_key_value_heads=2 if small else 4,
        num_local_experts=8,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["MixtralForCausalLM"],
    )


def make_checkpoint(folder: Path, config: Any) -> None:
    """A random Mixtral in the layout of the hub, one file a layer, so that making it takes the memory of a layer."""
    folder.mkdir(parents=True)
    hidden, inner = config.hidden_size, config.intermediate_size
    narrow = hidden // config.num_attention_heads * config.num_key_value_heads
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=0.04, generator=generator)

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    files = {
        "rest.safetensors": {
            "model.embed_tokens.weight": (config.vocab_size, hidden),
            "lm_head.weight": (config.vocab_size, hidden),
            "model.norm.weight": None,
        }
    }
    for layer in range(config.num_hidden_layers):
        start = f"model.layers.{layer}."
        shapes: dict[str, Any] = {
            f"{start}input_layernorm.weight": None,
            f"{start}post_attention_layernorm.weight": None,
            f"{start}self_attn.q_proj.weight": (hidden, hidden),
            f"{start}self_attn.k_proj.weight": (narrow, hidden),
            f"{start}self_attn.v_proj.weight": (narrow, hidden),
            f"{start}self_attn.o_proj.weight": (hidden, hidden),
            f"{start}block_sparse_moe.gate.weight": (config.num_local_experts, hidden),
        }
        for expert in range(config.num_local_experts):
            for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                shapes[f"{start}block_sparse_moe.experts.{expert}.{name}.weight"] = shape
        files[f"layer-{layer:02}.safetensors"] = shapes
    for name, shapes in files.items():
        tensors = {key: ones() if shape is None else matrix(*shape) for key, shape in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    write_index(folder, {key: name for name, shapes in files.items() for key in shapes})
    config.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(mini.model_path()).save_pretrained(folder)


def shorter(source: Path, folder: Path, layers: int) -> None:
    """The first layers of a checkpoint, its files linked."""
    folder.mkdir()
    kept = ["rest.safetensors", *(f"layer-{layer:02}.safetensors" for layer in range(layers))]
    for file in source.iterdir():
        if file.suffix != ".safetensors" or file.name in kept:
            os.link(file, folder / file.name)
    for name in ("model.safetensors.index.json", "config.json"):
        (folder / name).unlink()
    index = json.loads((source / "model.safetensors.index.json").read_bytes())["weight_map"]
    write_index(folder, {key: name for key, name in index.items() if name in kept})
    config = transformers.AutoConfig.from_pretrained(source)
    config.num_hidden_layers = layers
    config.save_pretrained(folder)


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def checkpoint_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def largest_layer(folder: Path) -> int:
    return max(file.stat().st_size for file in folder.glob("layer-*.safetensors"))


def some_documents(sequences: int) -> list[Document]:
    """Documents of the sample corpus, each cut to one sequence."""
    tokenizer = Tokenizer(transformers.AutoTokenizer.from_pretrained(mini.model_path()))
    length = SEQUENCE - len(tokenizer.added_ids)
    texts = [document for document in open_corpus(mini.corpus_path()) if len(document.text) > 2500]
    long = [document for document in texts if tokenizer.num_tokens(document.text[:8000]) >= length]
    chosen = [long[number % len(long)] for number in range(sequences)]
    return [Document(n, each.domain, each.text[:8000], max_tokens=length) for n, each in enumerate(chosen)]


def draw(
    path: Path,
    sizes: list[dict[str, float]],
    corpora: list[dict[str, float]],
    read_seconds: float,
    layer_bytes: int,
) -> None:
    """Peak memory against model size, and time a token against corpus size; colours of Okabe and Ito."""
    import matplotlib.pyplot as plt

    blue, orange, grey = "#0072B2", "#D55E00", "#6b6b6b"
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    x = [each["size"] / 1e9 for each in sizes]
    left.plot(x, [each["memory"] / 1e9 for each in sizes], color=orange, marker="s", label="whole, in memory")
    left.plot(x, [each["streaming"] / 1e9 for each in sizes], color=blue, marker="o", label="streamed")
    bound = (1.5 * layer_bytes + SPOOL_BYTES + 1e9) / 1e9
    left.axhline(bound, color=grey, linestyle=":", label="1.5 layers + spool + 1 GB")
    left.set(xlabel="checkpoint (GB)", ylabel="peak memory (GB)", xlim=0, ylim=0)
    left.legend(frameon=False, fontsize=8)
    tokens = [each["tokens"] for each in corpora]
    milliseconds = [1000 * each["seconds"] / each["tokens"] for each in corpora]
    right.plot(tokens, milliseconds, color=blue, marker="o", label="streamed, CPU time")
    reading = [1000 * read_seconds / number for number in tokens]
    right.plot(tokens, reading, color=orange, linestyle=":", marker="s", label="reading it once, meanwhile")
    right.axhline(1000 * corpora[0]["floor"], color=grey, linestyle="--", label="computing alone, in memory")
    right.set_xscale("log", base=2)
    right.set_xticks(tokens, [f"{number:,}" for number in tokens], fontsize=8)
    right.set(xlabel="tokens of the corpus", ylabel="time a token (ms)", ylim=0)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main()
