"""Held-out loss of the mini model by domain against a unigram model, and the load of its experts.

Loss is counted over every token of a document but BOS, each document read from its own beginning, in nats a token and
bits a byte of text. The unigram model knows how often each token occurs in that domain's training text (counts plus
one). Load is counted in assignments over the whole sample corpus; imbalance is the largest load over the mean load.

Example:
    python training/evaluate.py --model src/moescope/mini/mini-mixtral --corpus WORK/corpus --tokens WORK/run/tokens \\
        --sample src/moescope/mini/corpus/sample.jsonl.zst --log WORK/run/log.jsonl \\
        --output src/moescope/mini/mini-mixtral/evaluation.json --card src/moescope/mini/mini-mixtral/README.md
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from build_corpus import read_documents
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS_PER_DOMAIN = 40_000
LONGEST_DOCUMENT = 2_048


@dataclasses.dataclass
class Domain:
    """Sums over the documents of one domain, and its loads, shape (layer, expert)."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    unigram_nats: float = 0.0
    loads: np.ndarray | int = 0


class Evaluator:
    """A model with a hook on each router, which counts the choices of the last forward pass."""

    def __init__(self, model_folder: Path, tokens: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self.model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
        self.unigrams = {path.stem: self._unigram(path) for path in sorted(tokens.glob("*.npy"))}
        self.loads: dict[int, np.ndarray] = {}
        for index, layer in enumerate(self.model.model.layers):
            layer.mlp.gate.register_forward_hook(lambda module, inputs, output, index=index: self._count(index, output))

    def _unigram(self, path: Path) -> torch.Tensor:
        counts = np.bincount(np.load(path), minlength=self.model.config.vocab_size) + 1.0
        return torch.from_numpy(-np.log(counts / counts.sum()))

    def _count(self, layer: int, output: tuple[torch.Tensor, ...]) -> None:
        chosen = output[2].flatten().numpy()
        self.loads[layer] = np.bincount(chosen, minlength=self.model.config.num_local_experts)

    @torch.no_grad()
    def evaluate(self, documents: Iterable[dict]) -> dict[str, Domain]:
        """Sum losses and loads over documents, one forward pass a document."""
        domains: dict[str, Domain] = collections.defaultdict(Domain)
        for document in documents:
            name = document["meta"]["pile_set_name"]
            domain = domains[name]
            ids = torch.tensor(self.tokenizer(document["text"])["input_ids"])
            if domain.tokens > TOKENS_PER_DOMAIN or len(ids) > LONGEST_DOCUMENT:
                continue
            logits = self.model(ids[None]).logits[0, :-1].float()
            domain.documents += 1
            domain.tokens += len(ids) - 1
            domain.bytes += len(document["text"].encode("utf-8"))
            domain.nats += F.cross_entropy(logits, ids[1:], reduction="sum").item()
            domain.unigram_nats += self.unigrams[name][ids[1:]].sum().item()
            domain.loads = domain.loads + np.stack([load for _, load in sorted(self.loads.items())])
        return dict(sorted(domains.items()))


def report(held_out: dict[str, Domain], sample: dict[str, Domain], log: list[dict]) -> dict:
    """The figures, as they are written to JSON."""
    loads = sum(domain.loads for domain in sample.values())
    trained = next(entry for entry in log if entry.get("event") == "start")
    return {
        "training": {
            "steps": max(entry["step"] for entry in log),
            "tokens": max(entry["step"] for entry in log) * 8 * 512,
            "hours": round(sum(_run_seconds(log)) / 3600, 2),
            "tokens_of_each_domain": dict(zip(trained["domains"], trained["tokens"], strict=True)),
            "share_of_each_domain": dict(zip(trained["domains"], trained["shares"], strict=True)),
        },
        "held_out": {name: _losses(domain) for name, domain in held_out.items()},
        "sample": {name: _losses(domain) for name, domain in sample.items()},
        "sample_load": {
            "assignments_per_layer": int(loads[0].sum()),
            "imbalance": (loads.max(axis=1) / loads.mean(axis=1)).round(3).tolist(),
            "shares": (loads / loads.sum(axis=1, keepdims=True)).round(4).tolist(),
            "imbalance_of_each_domain": {
                name: (domain.loads.max(axis=1) / domain.loads.mean(axis=1)).round(3).tolist()
                for name, domain in sample.items()
            },
        },
    }


def _run_seconds(log: list[dict]) -> list[int]:
    runs: list[int] = []
    for entry in log:
        if entry.get("event") == "start":
            runs.append(0)
        elif "seconds" in entry:
            runs[-1] = entry["seconds"]
    return runs


def _losses(domain: Domain) -> dict[str, float]:
    return {
        "documents": domain.documents,
        "tokens": domain.tokens,
        "bytes": domain.bytes,
        "nats_per_token": round(domain.nats / domain.tokens, 3),
        "unigram_nats_per_token": round(domain.unigram_nats / domain.tokens, 3),
        "bits_per_byte": round(domain.nats / math.log(2) / domain.bytes, 3),
        "unigram_bits_per_byte": round(domain.unigram_nats / math.log(2) / domain.bytes, 3),
    }


def tables(figures: dict) -> str:
    """The same as Markdown, for the card."""
    training = figures["training"]
    lines = [
        f"Trained for {training['steps']:,} steps on {training['tokens'] / 1e6:.1f} million tokens, "
        f"in {training['hours']} hours on one CPU core.",
        "",
        "| domain | training tokens | share of training | held-out tokens "
        "| nats a token | unigram | bits a byte | unigram |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, losses in figures["held_out"].items():
        lines.append(
            f"| {name} | {training['tokens_of_each_domain'][name] / 1e6:.2f} M "
            f"| {training['share_of_each_domain'][name]:.1%} | {losses['tokens']:,} "
            f"| {losses['nats_per_token']:.2f} | {losses['unigram_nats_per_token']:.2f} "
            f"| {losses['bits_per_byte']:.2f} | {losses['unigram_bits_per_byte']:.2f} |"
        )
    load = figures["sample_load"]
    experts = range(len(load["shares"][0]))
    lines += [
        "",
        f"Shares of the assignments over the whole sample corpus ({load['assignments_per_layer']:,} a layer):",
        "",
        "| layer | " + " | ".join(f"expert {expert}" for expert in experts) + " | imbalance | largest in one domain |",
        "|---" * (len(experts) + 3) + "|",
    ]
    for layer, shares in enumerate(load["shares"]):
        name, highest = max(
            ((name, values[layer]) for name, values in load["imbalance_of_each_domain"].items()),
            key=lambda pair: pair[1],
        )
        cells = " | ".join(f"{share:.1%}" for share in shares)
        lines.append(f"| {layer} | {cells} | {load['imbalance'][layer]:.2f} | {highest:.2f} ({name}) |")
    return "\n".join(lines)


def _by_hash(documents: Iterable[dict]) -> list[dict]:
    return sorted(documents, key=lambda document: hashlib.sha256(document["text"].encode("utf-8")).digest())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="the run's tokenised shards, for the unigram model")
    parser.add_argument("--sample", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--card", type=Path, help="put the tables between this file's two evaluation marks")
    arguments = parser.parse_args()
    evaluator = Evaluator(arguments.model, arguments.tokens)
    figures = report(
        evaluator.evaluate(_by_hash(read_documents(arguments.corpus / "held-out.jsonl.zst"))),
        evaluator.evaluate(read_documents(arguments.sample)),
        [json.loads(line) for line in arguments.log.read_text(encoding="utf-8").splitlines()],
    )
    arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(tables(figures))
    if arguments.card:
        card = arguments.card.read_text(encoding="utf-8")
        marked = re.compile(r"(<!-- evaluation -->\n).*?(<!-- end of evaluation -->)", re.DOTALL)
        arguments.card.write_text(marked.sub(lambda m: m[1] + tables(figures) + "\n" + m[2], card), encoding="utf-8")
