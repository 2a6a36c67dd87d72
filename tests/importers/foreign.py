"""Tiny genuine files of every format, written without the importers: what each program writes, by its own source.

Each writer takes a folder and a generator, writes its files, and says how to import them and what must come out.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass
class Foreign:
    """Files of a format, and the trace they must make.

    Attributes:
        format: Name of the format.
        files: What to import.
        options: Arguments of `import_trace`.
        ids: For each layer the ids, shape (token, choice), in the order of the trace; None for counts.
        weights: For each layer the gate weights, or empty.
        token_ids: Vocabulary ids, or None.
        sequences: Lengths of the sequences, in order; documents beside each other are separate lists.
        phases: Phase of each token, or None.
        counts: (document, layer, expert) -> assignments.
        domains: Domain of each document.
    """

    format: str
    files: list[Path]
    options: dict[str, Any] = field(default_factory=dict)
    ids: dict[int, np.ndarray] = field(default_factory=dict)
    weights: dict[int, np.ndarray] = field(default_factory=dict)
    token_ids: np.ndarray | None = None
    sequences: list[list[int]] = field(default_factory=list)
    phases: list[int] | None = None
    counts: dict[tuple[int, int, int], int] = field(default_factory=dict)
    domains: list[str] = field(default_factory=list)


def choices(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> np.ndarray:
    """Distinct experts of each token, in no order; the last expert occurs."""
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int64)
    if not (ids == experts - 1).any():
        ids[0, 0] = experts - 1
    return ids


def sglang_per_token(folder: Path, rng: np.random.Generator) -> Foreign:
    import torch

    num_layers, logical, physical, top_k = 3, 6, 8, 2
    to_logical = np.stack([rng.permutation(np.append(np.arange(logical), [0, 3])) for _ in range(num_layers)])
    records, by_layer, tokens = [], {1: [], 2: []}, []
    # a prefill of prompts of 4 and 3 tokens, the second a later chunk, then a decode of two requests
    passes = [(1, [4, 3], [0, 1, 2, 3, 512, 513, 514]), (2, None, [4, 515]), (4, None, [])]
    for number, (mode, lengths, positions) in enumerate(passes):
        n = len(positions)
        topk = np.full((num_layers, n, 8), -1, np.int32)  # layer 0 is dense
        for layer in (1, 2):
            chosen = choices(rng, max(n, 1), logical, top_k)[:n]
            for t in range(n):
                for k in range(top_k):
                    topk[layer, t, k] = rng.choice(np.flatnonzero(to_logical[layer] == chosen[t, k]))
            by_layer[layer].append(chosen)
        ids = rng.integers(0, 1000, n).tolist()
        tokens += ids
        records.append(
            {
                "forward_pass_id": 100 + number,
                "rank": 0,
                "gatherer_key": "primary",
                "input_ids": ids,
                "positions": positions,
                "extend_seq_lens": lengths,
                "forward_mode": mode,
                "topk_ids_of_layer": torch.from_numpy(topk),
                "misc_objects": [],
                "global_physical_count": torch.zeros((num_layers, physical), dtype=torch.int32),
            }
        )
    path = folder / "expert_distribution_recorder_1.5_0.pt"
    torch.save({"records": records, "last_physical_to_logical_map": torch.from_numpy(to_logical)}, path)
    return Foreign(
        "sglang",
        [path],
        ids={layer: np.concatenate(blocks) for layer, blocks in by_layer.items()},
        token_ids=np.array(tokens),
        sequences=[[4, 3], [1, 1]],
        phases=[0] * 7 + [1] * 2,
        domains=["expert_distribution_recorder_1"] * 2,
        options={"num_experts": 6},
    )


def sglang_per_pass(folder: Path, rng: np.random.Generator) -> Foreign:
    import torch

    to_logical = np.array([[0, 1, 2, 3, 1], [3, 2, 1, 0, 3]])
    counts = rng.integers(1, 50, (2, 2, 5))
    counts[:, :, 0] += counts.sum(axis=2) % 2  # divisible by top-k 2
    records = [
        {
            "forward_pass_id": i,
            "rank": 0,
            "gatherer_key": "primary",
            "global_physical_count": torch.tensor(c.tolist(), dtype=torch.int32),
        }
        for i, c in enumerate(counts)
    ]
    path = folder / "expert_distribution_recorder_2.pt"
    torch.save({"records": records, "last_physical_to_logical_map": torch.from_numpy(to_logical)}, path)
    expected: dict[tuple[int, int, int], int] = {}
    for document in range(2):
        for layer in range(2):
            for p in range(5):
                key = (document, layer, int(to_logical[layer, p]))
                expected[key] = expected.get(key, 0) + int(counts[document, layer, p])
    return Foreign("sglang", [path], {"top_k": 2, "domain": "load"}, counts=expected, domains=["load"] * 2)


def sglang_stat(folder: Path, rng: np.random.Generator) -> Foreign:
    import torch

    counts = np.zeros((4, 3, 4), np.int32)  # two passes of a buffer of four; layer 0 is dense
    counts[:2, 1:] = rng.integers(0, 9, (2, 2, 4)) * 2
    counts[:2, 1:, 3] += 2
    path = folder / "expert_distribution_recorder_3.25.pt"
    torch.save(
        {"rank": 0, "logical_count": torch.from_numpy(counts), "average_utilization_rate_over_window": None}, path
    )
    return Foreign(
        "sglang", [path], {"top_k": 2}, counts=_nonzero(counts), domains=["expert_distribution_recorder_3"] * 2
    )


def _nonzero(counts: np.ndarray) -> dict[tuple[int, int, int], int]:
    return {tuple(int(i) for i in at): int(counts[tuple(at)]) for at in np.argwhere(counts)}


def sglang_csv(folder: Path, rng: np.random.Generator) -> Foreign:
    path = folder / "expert_distribution_rank0_timestamp1.0.csv"
    expected = {(0, layer, int(e)): int(rng.integers(1, 100)) * 4 for layer in (3, 4) for e in rng.permutation(8)[:5]}
    path.write_text("layer_id,expert_id,count\n" + "".join(f"{a},{e},{n}\n" for (_, a, e), n in expected.items()))
    return Foreign(
        "sglang-csv", [path], {"top_k": 4, "num_experts": 8}, counts=expected, domains=[path.name.split(".")[0]]
    )


def counted_rows(folder: Path, rng: np.random.Generator) -> Foreign:
    """As llama.cpp's moe-trace: a row an assignment, and no token."""
    path = folder / "moe_trace.csv"
    expected = {(0, layer, int(e)): int(rng.integers(1, 9)) * 2 for layer in (0, 1) for e in rng.permutation(8)[:5]}
    path.write_text("layer,expert\n" + "".join(f"{a},{e}\n" * n for (_, a, e), n in expected.items()))
    return Foreign("counts", [path], {"top_k": 2, "num_experts": 8}, counts=expected, domains=["moe_trace"])


def counted_lists(folder: Path, rng: np.random.Generator) -> Foreign:
    """A list of the counts of all experts of a layer and document."""
    path = folder / "counts.jsonl"
    table = rng.integers(0, 50, (2, 3, 8)) * 2
    rows = [{"doc_id": n, "layer": a, "counts": table[n, a].tolist(), "domain": "x"} for n in (0, 1) for a in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = {cell: int(n) for cell, n in np.ndenumerate(table) if n}
    return Foreign("counts", [path], {"top_k": 2}, counts=expected, domains=["x"] * 2)


def sglang_returned(folder: Path, rng: np.random.Generator) -> Foreign:
    num_layers, top_k = 3, 2
    prompt, output = [5, 6, 7], [8, 9]
    ids = np.zeros((4, num_layers, top_k), np.int32)
    ids[:, 1], ids[:, 2] = choices(rng, 4, 8, top_k), choices(rng, 4, 8, top_k)  # layer 0 is dense
    response = {
        "text": "…",
        "output_ids": output,
        "input_ids": prompt,
        "meta_info": {
            "routed_experts": base64.b64encode(ids.tobytes()).decode(),
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "finish_reason": {"type": "stop"},
        },
    }
    path = folder / "answers.jsonl"
    path.write_text(json.dumps(response) + "\n")
    return Foreign(
        "sglang-returned",
        [path],
        {"num_layers": 3, "top_k": 2, "num_experts": 8},
        ids={1: ids[:, 1], 2: ids[:, 2]},
        token_ids=np.array([5, 6, 7, 8]),
        sequences=[[4]],
        phases=[0, 0, 0, 1],
        domains=["answers"],
    )


def sglang_raw(folder: Path, rng: np.random.Generator) -> Foreign:
    ids = np.stack([choices(rng, 5, 16, 4) for _ in range(2)], axis=1).astype("<i4")
    path = folder / "answer.bin"
    path.write_bytes(ids.tobytes())
    return Foreign(
        "sglang-returned",
        [path],
        {"num_layers": 2, "top_k": 4, "num_experts": 16, "domain": "raw"},
        ids={0: ids[:, 0], 1: ids[:, 1]},
        sequences=[[5]],
        domains=["raw"],
    )


def sglang_base64(folder: Path, rng: np.random.Generator) -> Foreign:
    made = sglang_raw(folder, rng)
    path = folder / "answer.b64"
    path.write_text(base64.encodebytes(made.files[0].read_bytes()).decode())
    made.files = [path]
    return made


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def vllm_npy(folder: Path, rng: np.random.Generator) -> Foreign:
    ids = np.stack([choices(rng, 6, 300, 3) for _ in range(2)], axis=1).astype(np.uint16)
    path = folder / "routed.npy"
    path.write_bytes(_npy(ids))
    return Foreign(
        "vllm",
        [path],
        {"num_experts": 300, "layers": [3, 4], "model": "m"},
        ids={3: ids[:, 0], 4: ids[:, 1]},
        sequences=[[6]],
        domains=["routed"],
    )


def vllm_http(folder: Path, rng: np.random.Generator) -> Foreign:
    prompt, outputs = [1, 2, 3], [[4, 5], [6]]
    arrays = [np.stack([choices(rng, 2 + len(o), 8, 2) for _ in range(2)], axis=1).astype(np.uint8) for o in outputs]
    response = {
        "id": "cmpl-1",
        "model": "Qwen/Qwen3-30B-A3B",
        "object": "text_completion",
        "prompt_token_ids": prompt,
        "choices": [
            {"index": i, "text": "x", "token_ids": o, "routed_experts": base64.b64encode(_npy(a)).decode()}
            for i, (o, a) in enumerate(zip(outputs, arrays, strict=True))
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3},
    }
    path = folder / "response.json"
    path.write_text(json.dumps(response, indent=2))
    return Foreign(
        "vllm",
        [path],
        {"num_experts": 8},
        ids={at: np.concatenate([a[:, at] for a in arrays]) for at in range(2)},
        token_ids=np.array([1, 2, 3, 4, 1, 2, 3]),
        sequences=[[4], [3]],
        phases=[0, 0, 0, 1, 0, 0, 0],
        domains=["response"] * 2,
    )


def vllm_split(folder: Path, rng: np.random.Generator) -> Foreign:
    prompt = np.stack([choices(rng, 3, 8, 2) for _ in range(2)], axis=1)
    prompt[0] = -1  # a cached prefix
    made = np.stack([choices(rng, 2, 8, 2) for _ in range(2)], axis=1)
    response = {
        "model": "m",
        "prompt_routed_experts": prompt.tolist(),
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        "choices": [{"index": 0, "text": "x", "routed_experts": made.tolist()}],
    }
    path = folder / "split.jsonl"
    path.write_text(json.dumps(response))
    return Foreign(
        "vllm",
        [path],
        {"num_experts": 8},
        ids={at: np.concatenate([np.full((1, 2), -2), prompt[1:, at], made[:, at]]) for at in range(2)},
        sequences=[[5]],
        phases=[0, 0, 0, 1, 1],
        domains=["split"],
    )


def gguf_bytes(values: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    """A GGUF file of version 3: u32 and string values, F32 tensors."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for key, value in values.items():
        out += string(key)
        if isinstance(value, str):
            out += struct.pack("<I", 8) + string(value)
        elif isinstance(value, list):
            out += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(string(item) for item in value)
        else:
            out += struct.pack("<II", 4, value)
    data = b""
    for name, array in tensors.items():
        out += string(name) + struct.pack("<I", array.ndim)
        out += b"".join(struct.pack("<Q", n) for n in array.shape[::-1]) + struct.pack("<IQ", 0, len(data))
        data += array.astype("<f4").tobytes()
        data += b"\0" * (-len(data) % 32)
    return out + b"\0" * (-len(out) % 32) + data


def imatrix(folder: Path, rng: np.random.Generator) -> Foreign:
    counts = np.stack([np.bincount(choices(rng, 20, 6, 2).ravel(), minlength=6) for _ in range(2)])
    tensors: dict[str, np.ndarray] = {"blk.0.attn_q.weight.counts": np.array([[20.0]])}
    for layer, row in enumerate(counts, 1):
        for part in ("gate", "up", "down"):
            tensors[f"blk.{layer}.ffn_{part}_exps.weight.counts"] = row[None].T.astype(np.float32)
            tensors[f"blk.{layer}.ffn_{part}_exps.weight.in_sum2"] = np.ones((6, 4))
    path = folder / "qwen.imatrix.gguf"
    head = {
        "general.type": "imatrix",
        "imatrix.datasets": ["a.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 10,
    }
    path.write_bytes(gguf_bytes(head, tensors))
    expected = {
        (0, layer + 1, e): n
        for (layer, e), n in ((tuple(map(int, at)), int(counts[tuple(at)])) for at in np.argwhere(counts))
    }
    return Foreign("imatrix", [path], counts=expected, domains=["qwen"])


def bigmoeonedge(folder: Path, rng: np.random.Generator) -> Foreign:
    lines = ["# route_trace v1", "# model=/data/Qwen3.gguf arch=qwen3moe n_layer=2 n_expert=8 n_expert_used=2"]
    lines += [f"# layer={i} expert_bytes=10 dense_bytes=20" for i in range(2)]
    lines += ["turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped"]
    ids = {layer: choices(rng, 5, 8, 2) for layer in range(2)}
    weights = {layer: -np.sort(-rng.random((5, 2)), axis=1).astype(np.float32) for layer in range(2)}
    ids[1][:2] = -2  # the last layer runs for the last token of a prompt only
    weights[1][:2] = 0
    for phase, steps in ((0, (0, 1, 2)), (1, (3, 4))):
        for layer in range(2):
            for step in steps:
                for slot in range(2):
                    if ids[layer][step, slot] >= 0:
                        chosen = f"{ids[layer][step, slot]},{weights[layer][step, slot]}"
                        lines.append(f"0,{phase},{step},{layer},{slot},{chosen},0,10,0")
    dropped = next(i for i, line in enumerate(lines) if line.startswith("0,1,4,0,1,"))
    lines[dropped] = lines[dropped][:-1] + "1"
    ids[0][4, 1], weights[0][4, 1] = -1, 0
    path = folder / "qwen.route.csv"
    path.write_text("\n".join(lines) + "\n")
    return Foreign(
        "bigmoeonedge", [path], ids=ids, weights=weights, sequences=[[5]], phases=[0, 0, 0, 1, 1], domains=["qwen"]
    )


def gpt_oss(folder: Path, rng: np.random.Generator) -> Foreign:
    pieces = ["<|start|>", "a", " b", " c", " a", "."]
    ids = {layer: choices(rng, 3, 8, 2) for layer in range(2)}
    weights = {layer: -np.sort(-rng.random((3, 2)), axis=1).astype(np.float32) for layer in range(2)}
    example = {
        "row_index": 3,
        "dataset": "mmlu_test",
        "category": "philosophy",
        "finished_successfully": True,
        "has_repetition": False,
        "original_prompt": "?",
        "full_text": pieces,
        "generated_only": pieces[2:],
        "router_data": [
            {
                f"token_{2 + t}": {
                    f"layer_{a}": {"selected_experts": ids[a][t].tolist(), "selected_probs": weights[a][t].tolist()}
                    for a in ids
                }
            }
            for t in range(3)
        ],
    }
    path = folder / "True_False_examples.json"
    path.write_text(json.dumps([example], indent=2))
    return Foreign(
        "gpt-oss",
        [path],
        {"num_experts": 8},
        ids=ids,
        weights=weights,
        token_ids=np.array([0, 1, 2]),
        sequences=[[3]],
        phases=[1, 1, 1],
        domains=["philosophy"],
    )


def _events(rng: np.random.Generator) -> tuple[list[dict[str, Any]], Foreign]:
    """Two problems of two data sets under the same number, interleaved as a server logs them."""
    lengths, found, events = {("gsm8k", 7): 3, ("mbpp", 7): 2}, Foreign("", []), []
    ids = {layer: [] for layer in (0, 2)}
    weights = {layer: [] for layer in (0, 2)}
    for n in lengths.values():
        for layer in (0, 2):
            ids[layer].append(choices(rng, n, 8, 2))
            weights[layer].append(-np.sort(-rng.random((n, 2)), axis=1).astype(np.float32))
    for token in range(3):
        for layer in (0, 2):
            for at, ((dataset, problem), n) in enumerate(lengths.items()):
                if token < n:
                    events.append(
                        {
                            "dataset": dataset,
                            "problem_id": problem,
                            "layer": layer,
                            "token_idx": token,
                            "experts": ids[layer][at][token].tolist(),
                            "gating_probs": weights[layer][at][token].tolist(),
                            "token_id": 10 * at + token,
                        }
                    )
    found.ids = {layer: np.concatenate(blocks) for layer, blocks in ids.items()}
    found.weights = {layer: np.concatenate(blocks) for layer, blocks in weights.items()}
    found.token_ids = np.array([0, 1, 2, 10, 11])
    found.sequences, found.domains = [[3], [2]], ["gsm8k", "mbpp"]
    found.options = {"num_experts": 8}
    return events, found


def jsonl(folder: Path, rng: np.random.Generator) -> Foreign:
    events, made = _events(rng)
    made.format, made.files = "jsonl", [folder / "log.jsonl"]
    made.files[0].write_text("".join(json.dumps(event) + "\n" for event in events))
    return made


def csv_long(folder: Path, rng: np.random.Generator) -> Foreign:
    events, made = _events(rng)
    made.format, made.files = "csv", [folder / "log.csv"]
    with made.files[0].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["domain", "doc_id", "layer_idx", "position", "rank", "expert_id", "weight", "token_id"])
        for e in events:
            for slot in (1, 0):
                writer.writerow(
                    [
                        e["dataset"],
                        e["problem_id"],
                        e["layer"],
                        e["token_idx"],
                        slot,
                        e["experts"][slot],
                        e["gating_probs"][slot],
                        e["token_id"],
                    ]
                )
    return made


def csv_wide(folder: Path, rng: np.random.Generator) -> Foreign:
    events, made = _events(rng)
    made.format, made.files = "csv", [folder / "wide.csv"]
    made.options["fields"] = {"experts": "chosen"}
    with made.files[0].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["dataset", "problem_id", "layer", "token_idx", "chosen", "weights", "token_id"])
        for e in events:
            writer.writerow(
                [
                    e["dataset"],
                    e["problem_id"],
                    e["layer"],
                    e["token_idx"],
                    e["experts"],
                    e["gating_probs"],
                    e["token_id"],
                ]
            )
    return made


def parquet(folder: Path, rng: np.random.Generator) -> Foreign:
    events, made = _events(rng)
    made.format, made.files = "parquet", [folder / "log.parquet"]
    renamed = [{"selected_experts" if k == "experts" else k: v for k, v in e.items()} for e in events]
    pq.write_table(pa.Table.from_pylist(renamed), made.files[0])
    return made


def _policylang(rng: np.random.Generator) -> tuple[dict[str, Any], list[dict[str, Any]], Foreign]:
    ids = {layer: choices(rng, 5, 8, 2) for layer in range(2)}
    scores = {layer: -np.sort(-rng.random((5, 2)), axis=1).astype(np.float32) for layer in range(2)}
    header = {"model_name": "Mixtral", "num_layers": 2, "num_experts": 8, "top_k": 2, "num_entries": 10}
    rows = [
        {"p": p, "t": t, "l": layer, "e": ids[layer][at].tolist(), "s": scores[layer][at].tolist()}
        for at, (p, t) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)])
        for layer in range(2)
    ]
    return header, rows, Foreign("moe-policylang", [], ids=ids, weights=scores, sequences=[[3], [2]])


def policylang(folder: Path, rng: np.random.Generator) -> Foreign:
    header, rows, made = _policylang(rng)
    made.files, made.domains = [folder / "mixtral.jsonl"], ["mixtral"] * 2
    made.files[0].write_text("\n".join(json.dumps(row) for row in [header, *rows]))
    return made


def policylang_parquet(folder: Path, rng: np.random.Generator) -> Foreign:
    _, rows, made = _policylang(rng)
    made.files, made.domains, made.options = [folder / "m.parquet"], ["m"] * 2, {"num_experts": 8}
    pq.write_table(pa.Table.from_pylist(rows), made.files[0])
    return made


def megatron(folder: Path, rng: np.random.Generator) -> Foreign:
    ids = {layer: choices(rng, 5, 8, 2) for layer in (1, 2)}
    lines = []
    for step, rows in ((0, slice(0, 3)), (1, slice(3, 5))):
        for layer in (1, 2):
            block = ids[layer][rows].tolist()
            lines.append(
                {
                    "step": step,
                    "stage": "pre_dispatch",
                    "block": "decoder",
                    "layer": layer,
                    "rank": 0,
                    "num_tokens": len(block),
                    "topk": 2,
                    "top_indices": block,
                }
            )
        lines.append(
            {
                "step": step,
                "stage": "pre_dispatch",
                "block": "mtp",
                "mtp_idx": 0,
                "layer": 1,
                "rank": 0,
                "num_tokens": 1,
                "topk": 2,
                "top_indices": [[0, 1]],
            }
        )
    path = folder / "router_trace_rank0.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Foreign(
        "megatron",
        [folder],
        {"num_experts": 8},
        ids=ids,
        sequences=[[1, 1, 1], [1, 1]],
        domains=["router_trace_rank0"] * 2,
    )


def tensorrt_llm(folder: Path, rng: np.random.Generator) -> Foreign:
    from safetensors.numpy import save_file

    counts = rng.integers(0, 5, (2, 2, 2, 6)) * 2  # rank, iteration, layer, expert
    counts[..., 0] += 2
    (folder / "meta_info.json").write_text(
        json.dumps({"num_experts": 6, "num_experts_per_token": 2, "model_name": "ds"})
    )
    for rank in range(2):
        tensors = {f"{10 + i}_{3 + a}": counts[rank, i, a] for i in range(2) for a in range(2)}
        save_file(tensors, folder / f"rank{rank}.safetensors")
    expected = {(i, 3 + a, e): n for (i, a, e), n in _nonzero(counts.sum(axis=0)).items()}
    return Foreign("tensorrt-llm", [folder], {"domain": "serve"}, counts=expected, domains=["serve"] * 2)


def olmoe(folder: Path, rng: np.random.Generator) -> Foreign:
    lines, ids, tokens = [], {layer: [] for layer in range(2)}, []
    for n in (3, 2):
        block = np.stack([choices(rng, n, 8, 2) for _ in range(2)], axis=-1)
        words = rng.integers(0, 50304, n).tolist()
        lines.append({"input_ids": words, "predicted_token_ids": words, "exp_ids": block.tolist()})
        tokens += words
        for layer in range(2):
            ids[layer].append(block[:, :, layer])
    path = folder / "c4_results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Foreign(
        "olmoe",
        [path],
        {"num_experts": 8},
        ids={a: np.concatenate(b) for a, b in ids.items()},
        token_ids=np.array(tokens),
        sequences=[[3], [2]],
        domains=["c4_results"] * 2,
    )


WRITERS: tuple[Callable[[Path, np.random.Generator], Foreign], ...] = (
    sglang_per_token,
    sglang_per_pass,
    sglang_stat,
    sglang_csv,
    counted_rows,
    counted_lists,
    sglang_returned,
    sglang_raw,
    sglang_base64,
    vllm_npy,
    vllm_http,
    vllm_split,
    imatrix,
    bigmoeonedge,
    gpt_oss,
    jsonl,
    csv_long,
    csv_wide,
    parquet,
    policylang,
    policylang_parquet,
    megatron,
    tensorrt_llm,
    olmoe,
)
