"""The formats by name, and the one function that imports them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import moescope
from moescope.importers.documents import CountedDocument, TokenDocument
from moescope.importers.files import find, fingerprint
from moescope.importers.findings import Findings, Options
from moescope.importers.writing import write
from moescope.trace import Trace, Vocabulary

Reader = Callable[[Sequence[Path], Options, Findings], Generator[TokenDocument | CountedDocument, None, None]]


@dataclass(frozen=True)
class Format:
    """A format that can be imported.

    Attributes:
        source: The program that writes it.
        files: What its files are.
        gives: ``tokens``, ``counts``, or both.
        document: What a document of the trace corresponds to.
        reader: Module and function that reads it.
        folder: Pattern of the files read from a folder; empty if a folder cannot be given.
    """

    source: str
    files: str
    gives: str
    document: str
    reader: str
    folder: str = ""

    def read(self) -> Reader:
        """The function that reads it, imported on demand."""
        module, _, name = self.reader.partition(":")
        reader: Reader = getattr(importlib.import_module(f"moescope.importers.{module}"), name)
        return reader


FORMATS: Mapping[str, Format] = {
    "sglang": Format(
        "SGLang expert distribution recorder",
        "`.pt` of the modes per_token, per_pass, stat, stat_approx",
        "tokens (per_token), counts (the others)",
        "forward pass",
        "sglang:read",
        "expert_distribution_recorder_*.pt",
    ),
    "sglang-csv": Format(
        "SGLang 0.4.5",
        "`expert_distribution_rank*.csv`",
        "counts",
        "file",
        "sglang:read_csv",
        "expert_distribution_rank*.csv",
    ),
    "sglang-returned": Format(
        "SGLang `return_routed_experts`",
        "raw int32, base64, `.npy`, JSON of the HTTP server",
        "tokens",
        "answer",
        "routed_experts:read",
    ),
    "vllm": Format(
        "vLLM `--enable-return-routed-experts`",
        "`.npy`, base64 of one, JSON of the HTTP server",
        "tokens",
        "answer",
        "routed_experts:read",
    ),
    "imatrix": Format("llama.cpp `llama-imatrix`", "GGUF", "counts", "file", "imatrix:read"),
    "bigmoeonedge": Format("BigMoeOnEdge `--route-trace`", "CSV", "tokens", "turn", "bigmoeonedge:read"),
    "gpt-oss": Format("GPT-OSS-MoE-ExpertFingerprinting", "`*_examples.json`", "tokens", "example", "gpt_oss:read"),
    "jsonl": Format(
        "any logger", "JSON lines with named fields", "tokens", "as a field says, else file", "named:read_jsonl"
    ),
    "csv": Format("any logger", "CSV with named columns", "tokens", "as a column says, else file", "named:read_csv"),
    "parquet": Format(
        "any logger",
        "Parquet with named columns",
        "tokens",
        "as a column says, else file",
        "named:read_parquet",
        "*.parquet",
    ),
    "counts": Format(
        "any logger",
        "CSV, JSON lines or Parquet of layer and expert, such as llama.cpp's `moe-trace`",
        "counts",
        "as a column says, else file",
        "named:read_counts",
    ),
    "moe-policylang": Format(
        "moe-policylang", "JSON lines with a header line, Parquet", "tokens", "prompt", "policylang:read"
    ),
    "megatron": Format(
        "Megatron-LM router trace",
        "`router_trace_rank*.jsonl`",
        "tokens",
        "forward pass of a rank",
        "megatron:read",
        "router_trace_rank*.jsonl",
    ),
    "tensorrt-llm": Format(
        "TensorRT-LLM expert statistics",
        "folder with `meta_info.json` and `rank*.safetensors`",
        "counts",
        "iteration",
        "tensorrt_llm:read",
        "rank*.safetensors",
    ),
    "olmoe": Format("OLMoE `run_moe_analysis.py`", "JSON lines", "tokens", "line", "olmoe:read"),
}


def import_trace(
    format: str,
    files: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    num_experts: int | None = None,
    top_k: int | None = None,
    num_layers: int | None = None,
    layers: Sequence[int] | None = None,
    domain: str | None = None,
    model: str | None = None,
    ranked: bool = False,
    fields: Mapping[str, str] | None = None,
    exclude: Sequence[str] = (),
    restarts: bool = False,
    document_tokens: int | None = None,
    bos: int | None = None,
    vocabulary: Vocabulary | None = None,
    force: bool = False,
) -> Trace:
    """Convert a recording of another program to a trace.

    Args:
        format: One of `FORMATS`.
        files: A file or several, or folders where the format allows them.
        out: Folder of the trace to write.
        num_experts: Routed experts of a layer, if the files do not state it.
        top_k: Experts chosen per token, if the files do not state it.
        num_layers: Layers of the model, dense ones included.
        layers: Layers with routed experts, counted over the whole model.
        domain: Label of all documents; by default what the files state, else the name of each file.
        model: Name of the model.
        ranked: Whether choices are in order of gate weight although the files have no weights.
        fields: Names of columns by what they hold (`named.NAMES`), for jsonl, csv and parquet.
        exclude: What is left out, as of `moescope.open_trace`; numbers are those of the trace that would be made
            without it.
        restarts: Whether a number of a token below the one before it begins a document, for jsonl, csv and parquet.
        document_tokens: Tokens of a document, for those of jsonl, csv and parquet that do not divide them.
        bos: Token id that the tokenizer puts before a text, for sglang-returned and vllm; such a first token is left
            out, as a recording leaves it out.
        vocabulary: Text pieces of the token ids.
        force: Replace a finished trace.
    Returns:
        The finished trace; its summary holds the warnings, under ``warnings``.
    Raises:
        ValueError: The format is unknown, a number is below 1, or an item of `exclude` is none that could be.
        ForeignTraceError: A file is missing, invalid or incomplete.
        TraceExists: There is a finished trace already.
    """
    if format not in FORMATS:
        raise ValueError(f"no format {format!r}; there are {', '.join(FORMATS)}")
    for name, value in (("num_experts", num_experts), ("top_k", top_k), ("num_layers", num_layers)):
        if value is not None and not 1 <= value <= 2**16:
            raise ValueError(f"{name} is {value}, expected 1 to 65536")
    if document_tokens is not None and document_tokens < 1:
        raise ValueError(f"document_tokens is {document_tokens}, expected at least 1")
    if layers is not None and (not layers or sorted(set(layers)) != list(layers) or not 0 <= layers[-1] < 2**16):
        raise ValueError(f"layers must be ascending, distinct and at least one, found {list(layers)[:20]}")
    chosen = FORMATS[format]
    paths = [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]
    inputs = find(paths, chosen.folder or None)
    options = Options(
        num_experts, top_k, num_layers, None if layers is None else tuple(layers), domain, model, ranked, fields or {},
        tuple(exclude), restarts, document_tokens, bos,
    )  # fmt: skip
    findings = Findings()
    given = {
        name: value
        for name, value in vars(options).items()
        if (value or value == 0) and value is not False and name not in ("domain", "model")
    }
    corpus = {
        "name": paths[0].name if len(paths) == 1 else f"{len(inputs)} files",
        "format": format,
        "fingerprint": fingerprint(inputs),
    }
    run = {"importer": format, "source": chosen.source, "moescope": moescope.__version__, **given}
    documents = chosen.read()(paths, options, findings)
    return write(Path(out), documents, options, findings, corpus=corpus, run=run, vocabulary=vocabulary, force=force)
