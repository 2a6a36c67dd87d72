"""Recording: a model reads a corpus, and what its routers chose becomes a trace.

Unit: a token of the corpus; padding and the tokens that the tokenizer adds are fed and not recorded. The trace grows by
whole parts, so whatever ends a recording early, the same call goes on after the last finished part.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
import transformers

import moescope
from moescope.corpus import Corpus, Document, Sample, open_corpus, sample
from moescope.errors import CorpusEmpty, ModelNotStreamable, TraceError, TraceExists
from moescope.recording.attention import SkipMaskedBlocks
from moescope.recording.batches import Encode, Portion, batches, num_characters, portions, windows
from moescope.recording.hooks import RouterWatch
from moescope.recording.layerwise import NO_STREAM
from moescope.recording.model import (
    Model,
    Spread,
    adopt_model,
    find_device,
    implementations,
    load_model,
    probe,
    probe_lookahead,
    ready_to_record,
    weights_put_back,
)
from moescope.recording.parts import check_finite, check_token_ids, unrouted
from moescope.recording.progress import Meter, Progress
from moescope.recording.routers import Router
from moescope.recording.rows import FillRows
from moescope.recording.spool import has_work, remove_work, work_folder
from moescope.recording.streaming import Estimate, Streamed, must_stream, open_streamed, planned_layers, record_streamed
from moescope.recording.threads import WriteBehind, read_ahead
from moescope.trace import Header, Part, Trace, TraceWriter, open_trace
from moescope.trace.reader import SUMMARY, read_header

BATCH_TOKENS = 4096
PART_TOKENS = 65_536
WINDOW = 2048


class Documents(Protocol):
    """What the recorder asks of a corpus: its documents, always in the same order, and their provenance."""

    def __iter__(self) -> Iterator[Document]: ...

    def description(self) -> dict[str, Any]:
        """Provenance for the header of a trace."""


def record(
    model: str | Path | tuple[Any, Any],
    corpus: str | Path | Corpus | Iterable[Document],
    out: str | Path,
    *,
    layers: Sequence[int] | None = None,
    window: int = WINDOW,
    max_tokens_per_domain: int | None = None,
    max_documents_per_domain: int | None = None,
    sample_seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    block: str = "mlp",
    routers: Sequence[Router] | None = None,
    trust_remote_code: bool = False,
    device_map: str | Mapping[str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    weights: bool = False,
    lookahead: Sequence[int] = (),
    batch_tokens: int = BATCH_TOKENS,
    part_tokens: int = PART_TOKENS,
    text_field: str | None = None,
    domain_field: str | None = None,
    strict: bool = False,
    force: bool = False,
    stream: bool | None = None,
    memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    announce: Callable[[Estimate], None] | None = None,
) -> Trace:
    """Record every choice that a model's routers make on a corpus.

    Args:
        model: Folder of a checkpoint (or its name in the local Hugging Face cache), or a loaded (model, tokenizer).
        corpus: Path of a corpus, or an opened one, or documents; read on a thread of its own, ahead of the model.
        out: Folder of the trace to write. An unfinished trace of the same recording is continued.
        layers: Layers to record, counted over the whole model; None for all with routed experts.
        window: Longest sequence the model reads, added tokens included; capped at what the model was made for.
        max_tokens_per_domain: Sample each domain down to this many tokens.
        max_documents_per_domain: Sample each domain down to this many documents.
        sample_seed: Seed of the sample.
        dtype: ``auto`` (the checkpoint's), ``bfloat16``, ``float16`` or ``float32``; it changes some choices.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` …
        block: ``mlp`` for the experts of the feed-forward blocks, ``attention`` for a model that routes its attention.
        routers: How to read the routers of a loaded model that moescope does not know (`moescope.Router`).
        trust_remote_code: Run code that the checkpoint brings, with a warning; otherwise such a model is refused.
        device_map: Spread the checkpoint over devices, memory and disk, as accelerate does: ``auto``, ``balanced``,
            ``balanced_low_0``, ``sequential``, or a device for each module, such as ``{"": "cpu"}``; instead of
            `device`.
        offload_folder: Where what a device map puts on disk is kept meanwhile; beside the trace unless given.
        weights: Record the gate weights, too.
        lookahead: Record, too, what each layer's router would choose from the hidden states that the router so many
            recorded layers before it read, such as (1, 2, 10); for `moescope.prefetch`. Changes no choice.
        batch_tokens: Most tokens of a forward pass, padding included.
        part_tokens: Tokens of a part: what an interruption can cost.
        text_field: Field of the corpus that holds the text.
        domain_field: Field of the corpus that holds the domain.
        strict: Stop at a malformed record instead of counting it.
        force: Replace a finished trace, or one of another recording.
        stream: Go layer by layer (`docs/how-to/larger-than-memory.md`); None to do so if the model does not fit.
        memory: Bytes of memory that recording may take: what decides whether the model fits, and how much of what
            layers hand on stays in memory. None for what is free.
        progress: Called after every forward pass.
        announce: Called before a streamed recording starts, with what it will take.
    Returns:
        The finished trace.
    Raises:
        MoescopeError: The model, the corpus or the output is at fault; `moescope.errors` has a class for each case.
    """
    out = Path(out)
    if block not in ("mlp", "attention"):
        raise ValueError(f"block is 'mlp' or 'attention', not {block!r}")
    if window < 1 or batch_tokens < 1 or part_tokens < 1:
        raise ValueError(f"window {window}, batch_tokens {batch_tokens} or part_tokens {part_tokens} is below 1")
    if memory is not None and memory < 0:
        raise ValueError(f"memory of {memory} bytes is below 0")
    if not force and (out / SUMMARY).exists():  # TraceWriter would say so, too, but only after the model is loaded
        _refuse_complete(out)
    if isinstance(corpus, str | Path):
        corpus = open_corpus(corpus, text_field=text_field, domain_field=domain_field, strict=strict)
    streamed: Streamed | None = None
    if isinstance(model, str | Path):
        if device_map is None:
            find_device(device)
        elif device != "auto":
            raise ValueError(f"a device ({device}) and a device map exclude each other")
        elif stream:
            raise ValueError("a model is streamed through one device, or spread by a device map, not both")
        if routers is not None:
            raise ValueError("routers describe a model that you loaded: hand over (model, tokenizer)")
        if device_map is None and must_stream(
            model, out, stream=stream, memory=memory, device=device, dtype=dtype, force=force
        ):
            if lookahead:
                raise ModelNotStreamable(
                    model, "looking ahead needs the routers of later layers, which are not loaded yet", NO_STREAM
                )
            if trust_remote_code:
                raise ValueError("a model that brings its own code cannot be streamed: --no-stream loads it whole")
            streamed = open_streamed(model, layers=layers, dtype=dtype, device=device, memory=memory, block=block)
            ready = streamed.model
        else:
            placement = device if device_map is None else Spread(device_map, Path(offload_folder or out.parent))
            ready = load_model(
                model,
                layers=layers,
                dtype=dtype,
                device=placement,
                block=block,
                trust_remote_code=trust_remote_code,
                lookahead=lookahead,
            )
    elif stream:
        raise ValueError("a loaded model is in memory already; pass the path of its checkpoint to stream it")
    elif (dtype, device, device_map) != ("auto", "auto", None):
        raise ValueError("the dtype and the devices of a loaded model are what they are")
    else:
        ready = adopt_model(*model, layers=layers, block=block, routers=routers)
    documents: Documents = corpus if isinstance(corpus, Corpus | Sample) else _Given(corpus)
    if max_tokens_per_domain is not None or max_documents_per_domain is not None:
        if not isinstance(corpus, Corpus):
            raise ValueError("quotas a domain are for a corpus of files; choose among your documents yourself")
        documents = sample(
            corpus,
            max_tokens_per_domain=max_tokens_per_domain,
            max_documents_per_domain=max_documents_per_domain,
            seed=sample_seed,
            num_tokens=ready.tokenizer.num_tokens,
        )
    window = min(window, ready.max_positions or window)
    if window <= len(ready.tokenizer.added_ids):
        raise ValueError(f"a window of {window} has no room beside the {len(ready.tokenizer.added_ids)} added tokens")
    with ready_to_record(ready):
        run = {
            "window": window,
            "batch_tokens": batch_tokens,
            "part_tokens": part_tokens,
            "device": ready.device.type,
            **implementations(ready),
            **_versions(),
        }
        provenance = (weights, ready.description, ready.tokenizer.description(), documents.description())
        report = progress or (lambda _: None)
        if streamed is not None:
            plan = Header(planned_layers(ready), *provenance, run | {"road": "stream"})
            with streamed.layerwise:
                record_streamed(
                    streamed, documents, plan, out, force=force, report=report, announce=announce or (lambda _: None)
                )
            return open_trace(out)
        layers_found, stop_at = probe(ready)
        looking = probe_lookahead(ready, lookahead)
        header = Header(layers_found if looking is None else looking.described(layers_found), *provenance, run)
        with (
            TraceWriter(out, header, ready.tokenizer.vocabulary(), force=force) as writer,
            RouterWatch(ready.experts, stop_at=stop_at, lookahead=looking) as watch,
            FillRows(),
            SkipMaskedBlocks() if ready.masks_blocks(window) else nullcontext(),
        ):
            _record_parts(ready, watch, documents, writer, report)
        remove_work(out)  # of a streamed recording that was given up for this one
    return open_trace(out)


def _refuse_complete(out: Path) -> NoReturn:
    """Say that a trace is complete, and whether the work of another recording waits beside it."""
    with suppress(TraceError):
        remove_work(out, read_header(out))  # a kill came between the last file of this recording and the clearing away
    if has_work(out):
        raise TraceExists(
            out,
            "holds a complete trace, which is kept; "
            f"{work_folder(out).name} beside it holds unfinished work of another",
            "--force goes on with that one, and replaces the trace in the end",
        )
    raise TraceExists(out, "holds a complete trace, which is kept", "--force records it anew")


def _record_parts(
    model: Model, watch: RouterWatch, documents: Documents, writer: TraceWriter, report: Callable[[Progress], None]
) -> None:
    """Record the parts that the trace does not hold yet, then its summary."""
    totals = dict.fromkeys(("documents_read", "documents_empty", "tokens", "characters"), 0)
    for note in writer.progress:
        totals = {name: totals[name] + note[name] for name in totals}
    meter = Meter(report, totals["tokens"], totals["characters"], _num_characters(documents, model.tokenizer.encode))
    done, part_tokens = totals["documents_read"], writer.header.run["part_tokens"]

    def tokenized(documents: Iterator[Document]) -> Iterator[Portion]:
        return portions(islice(documents, done, None), model.tokenizer.encode, part_tokens)

    def write(finished: tuple[Part, dict[str, int]]) -> None:
        writer.write(*finished)

    with read_ahead(documents, tokenized) as upcoming, WriteBehind(write) as written:
        for portion in upcoming:
            note = portion.note()
            if portion.documents:
                written.put((_record_part(model, watch, portion, writer.header, meter), note))
            totals = {name: totals[name] + note[name] for name in totals}
    if not totals["tokens"]:
        name = writer.header.corpus["name"]
        raise CorpusEmpty(name, f"none of its {totals['documents_read']} documents has a token")
    problems = getattr(documents, "problems", None)
    writer.finish(totals | ({} if problems is None else {"malformed": problems.count}))


def _record_part(model: Model, watch: RouterWatch, portion: Portion, header: Header, meter: Meter) -> Part:
    """Run the model over one part."""
    added_ids = model.tokenizer.added_ids
    cut = windows(portion, header.run["window"] - len(added_ids))
    part = unrouted(portion, cut, header)
    check_token_ids(portion, model.num_embeddings, model.description["name"])
    looks_ahead = model.looks_ahead
    for batch in batches(cut, added_ids, header.run["batch_tokens"], model.batching):
        inputs = {"input_ids": torch.from_numpy(batch.input_ids).to(model.device)}
        if batch.attention_mask is not None and looks_ahead:
            inputs["attention_mask"] = torch.from_numpy(batch.attention_mask).to(model.device)
        with weights_put_back(model):
            spoken = watch.run(model.body, inputs)
        for layer, choices in spoken.items():
            gate_weights = choices.gate_weights[batch.places]
            check_finite(layer, gate_weights, batch.rows, part)
            part.expert_ids[layer][batch.rows] = choices.expert_ids[batch.places]
            if header.weights:
                part.gate_weights[layer][batch.rows] = gate_weights
            for distance, predicted in choices.predicted.items():
                part.predictions[layer, distance][batch.rows] = predicted[batch.places]
        meter.add(len(batch.rows), portion.num_characters * len(batch.rows) / portion.num_tokens)
    return part


def _num_characters(documents: Documents, encode: Encode) -> int | None:
    """Characters that will be recorded; reading a corpus is nothing beside running a model over it."""
    if isinstance(documents, _Given) and not documents.can_be_read_again:
        return None
    return sum(num_characters(document, encode) for document in documents)


@dataclass(frozen=True)
class _Given:
    """Documents that a caller made, under the interface of a corpus."""

    documents: Iterable[Document]

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    @property
    def can_be_read_again(self) -> bool:
        """Whether these are more than an iterator, which is used up by the first reading."""
        return not isinstance(self.documents, Iterator)

    def description(self) -> dict[str, Any]:
        """Provenance; documents that can be read only once have no fingerprint."""
        if not self.can_be_read_again:
            return {"name": "documents", "format": "documents", "fingerprint": None}
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(repr(document).encode("utf-8", "backslashreplace"))
        return {"name": "documents", "format": "documents", "fingerprint": digest.hexdigest()}


def _versions() -> dict[str, str]:
    return {
        "moescope": moescope.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
