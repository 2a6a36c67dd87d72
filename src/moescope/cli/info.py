"""``moescope info``: what a trace holds, from its header and its token columns; no routing is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import click
from rich.cells import cell_len

from moescope.reporting.numbers import count
from moescope.reporting.options import trace_argument
from moescope.reporting.printing import say, write
from moescope.reporting.visible import visible
from moescope.reporting.wording import describe_cover
from moescope.trace import Trace
from moescope.trace.cover import cover


@click.command()
@trace_argument
@click.option("--format", "format", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(trace: Path, format: str) -> None:
    """Show what a trace holds.

    Its model, corpus, layers and domains; as JSON, also everything that was noted about the run.
    """
    from moescope.trace import open_trace

    contents = _contents(open_trace(trace))
    if format == "json":
        write(json.dumps(contents, indent=1, ensure_ascii=False) + "\n")
    else:
        say(_text(contents))


def _contents(trace: Trace) -> dict[str, Any]:
    """The header and what the parts add up to, JSON-able."""
    documents, tokens, assignments = trace.domain_documents, trace.domain_tokens, 0
    if trace.header.counts_only:
        from moescope.tallying import tally

        sums = tally(trace).data
        tokens = dict(zip(trace.domains, sums["tokens"].values.tolist(), strict=True))
        assignments = int(sums["made"].sum())
    num_tokens = sum(tokens.values())
    header = json.loads(trace.header.to_json())
    for layer, described in zip(trace.layers, header["layers"], strict=True):
        described["cover"] = cover(trace, layer)
    return {
        "trace": trace.path.name,
        "complete": trace.complete,
        "parts": len(trace.parts),
        "bytes": sum(file.stat().st_size for file in trace.path.rglob("*") if file.is_file()),
        "documents": trace.num_documents,
        "tokens": num_tokens,
        "assignments": assignments or num_tokens * sum(layer.top_k for layer in trace.layers),
        "domains": {name: {"documents": documents[name], "tokens": tokens[name]} for name in trace.domains},
        "summary": trace.summary,
        **header,
    }


def _text(contents: dict[str, Any]) -> str:
    """The contents for a reader; names come from a model and a corpus, so they are made visible first."""
    documents, tokens = contents["documents"], contents["tokens"]
    state = "complete" if contents["complete"] else "unfinished"
    size = f"{contents['bytes'] / 1e6:,.1f} MB"
    if contents["assignments"]:
        size += f", {contents['bytes'] / contents['assignments']:.2f} bytes an assignment"
    corpus = contents["corpus"]
    facts = {
        "trace": f"{contents['trace']} ({state}, {count(contents['parts'], 'part')}, {size})",
        "tokens": f"{tokens:,} of {count(documents, 'document')} in {count(len(contents['domains']), 'domain')}",
        "layers": "; ".join(_layers(contents["layers"])),
        "gate weights": "recorded" if contents["weights"] else "not recorded",
        "lookahead": ", ".join(_lookahead(contents["layers"])),
        "model": _pairs(contents["model"]),
        "corpus": _pairs({name: corpus[name] for name in corpus if name != "sample"}),
        "sample": _pairs(corpus.get("sample") or {}),
        "run": _pairs(contents["run"]),
        "summary": _pairs({name: value for name, value in (contents["summary"] or {}).items() if name != "warnings"}),
        "lacks": ", ".join(_lacks(contents)),
    }
    lines = [f"{name:<12}  {visible(fact)}" for name, fact in facts.items() if fact]
    warnings = (contents["summary"] or {}).get("warnings", [])
    lines += [f"{'warning':<12}  {visible(str(warning))}" for warning in warnings]

    rows = [(visible(name), f"{n['documents']:,}", f"{n['tokens']:,}") for name, n in contents["domains"].items()]
    header = ("domain", "documents", "tokens")
    widths = [max(map(cell_len, column)) for column in zip(header, *rows, strict=True)]
    lines.append("")
    for name, *numbers in (header, *rows):
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name + " " * (widths[0] - cell_len(name)), *cells]))
    return "\n".join(lines)


def _lacks(contents: dict[str, Any]) -> Iterator[str]:
    """What a trace of another program may not hold."""
    if contents["counts_only"]:
        yield "tokens (it holds counts of assignments)"
    elif not contents["token_ids"]:
        yield "token ids"


def _layers(layers: list[dict[str, Any]]) -> Iterator[str]:
    """Layers of one shape that follow each other, as ``0-31: top-2 of 8 experts``."""
    for shape, run in groupby(layers, key=lambda layer: {**layer, **_APART}):
        indices = [layer["layer"] for layer in run]
        span = f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else f"{indices[0]}"
        if indices != list(range(indices[0], indices[-1] + 1)):
            span = ", ".join(map(str, indices))
        extra = [
            f"{shape[f'num_{kind}_experts']} {kind}" for kind in ("shared", "null") if shape[f"num_{kind}_experts"]
        ]
        extra += [] if shape["ranked"] else ["not ranked"]
        extra += ["some assignments ran no expert"] if shape["drops"] else []
        fraction: Any = shape["cover"]
        extra += [describe_cover(fraction)] if fraction < 1 else []
        notes = f" ({', '.join(extra)})" if extra else ""
        yield f"{span}: top-{shape['top_k']} of {shape['num_experts']} experts{notes}"


_APART = dict.fromkeys(("layer", "module", "lookahead", "num_predicted"))
"""What may differ between layers of one shape."""


def _lookahead(layers: list[dict[str, Any]]) -> Iterator[str]:
    """Distances from which choices were predicted, and for how many layers."""
    counts = Counter(distance for layer in layers for distance in layer.get("lookahead", ()))
    for distance in sorted(counts):
        yield f"{count(distance, 'layer')} ahead (for {counts[distance]})"


def _pairs(notes: dict[str, Any]) -> str:
    """What was noted, without what is empty; fingerprints cut to what the eye compares."""
    shown = {name: str(value)[:12] if name == "fingerprint" else value for name, value in notes.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value not in (None, "", {}, []))
