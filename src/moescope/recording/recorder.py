"""Recording: an engine reads a corpus, and what its routers chose becomes a trace.

Unit: a token of the corpus; padding and the tokens that the tokenizer adds are fed and not recorded. The trace grows by
whole parts, so whatever ends a recording early, the same call goes on after the last finished part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from moescope.corpus import MAX_RECORD_BYTES, Corpus, Document, Sample, open_corpus, sample
from moescope.corpus.sampling import SAMPLE_SEED
from moescope.engines.opening import open_engine
from moescope.engines.options import BATCH_TOKENS, BLOCKS, DEVICE, DTYPES, WINDOW, EngineOptions
from moescope.engines.protocol import CorpusEngine, CorpusPlan, Engine, EngineTokenizer, Estimate, NotFinite
from moescope.engines.work import has_work, remove_work, without_top_k, work_folder
from moescope.errors import CorpusEmpty, TraceError, TraceExists
from moescope.recording.parts import not_finite, record_part, unit_of
from moescope.recording.portions import Encode, Portion, num_characters, portions, summed
from moescope.recording.progress import Meter, Progress
from moescope.recording.threads import WriteBehind, read_ahead
from moescope.trace import Header, Part, Trace, TraceWriter, open_trace
from moescope.trace import header as trace_header
from moescope.trace.gate import SUMMARY, read_header
from moescope.trace.part_file import PART_TOKENS
from moescope.trace.writer import refuse_foreign, refuse_other


def record(
    model: str | Path | tuple[Any, Any],
    corpus: str | Path | Corpus | Iterable[Document],
    out: str | Path,
    *,
    layers: Sequence[int] | None = None,
    window: int = WINDOW,
    max_tokens_per_domain: int | None = None,
    max_documents_per_domain: int | None = None,
    sample_seed: int = SAMPLE_SEED,
    dtype: str = DTYPES[0],
    device: str = DEVICE,
    block: str = BLOCKS[0],
    routers: Sequence[Any] | None = None,
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
    max_record_bytes: int = MAX_RECORD_BYTES,
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
        max_record_bytes: Largest record of the corpus that is read, decompressed.
        force: Replace a finished trace, or one of another recording.
        stream: Go layer by layer (`docs/how-to/larger-than-memory.md`); None to do so if the model does not fit.
        memory: Bytes of memory that recording may take: what decides whether the model fits, and how much of what
            a layer gives to the next stays in memory. None for what is free.
        progress: Called after every forward pass.
        announce: Called before a streamed recording starts, with what it will take.
    Returns:
        The finished trace.
    Raises:
        MoescopeError: The model, the corpus or the output is at fault; `moescope.errors` has a class for each case.
    """
    out = Path(out)
    engine_options = EngineOptions(
        layers=layers,
        block=block,
        weights=weights,
        lookahead=lookahead,
        window=window,
        batch_tokens=batch_tokens,
        dtype=dtype,
        device=device,
        device_map=device_map,
        offload_folder=None if offload_folder is None else Path(offload_folder),
        routers=routers,
        trust_remote_code=trust_remote_code,
        stream=stream,
        memory=memory,
    )
    if part_tokens < 1:
        raise ValueError(f"part_tokens {part_tokens} is below 1")
    if not force and (out / SUMMARY).exists():  # TraceWriter would say so, too, but only after the model is loaded
        _refuse_complete(out)
    if isinstance(corpus, str | Path):
        fields = {"text_field": text_field, "domain_field": domain_field}
        corpus = open_corpus(corpus, **fields, strict=strict, max_record_bytes=max_record_bytes)
    with open_engine(model, engine_options, out=out, force=force) as engine:
        tokenizer = engine.tokenizer
        documents = _documents(corpus, max_tokens_per_domain, max_documents_per_domain, sample_seed, tokenizer)
        added = len(tokenizer.added_ids)
        if engine.window <= added:
            raise ValueError(f"a window of {engine.window} is full with the {added} added tokens")
        run = {"window": engine.window, "batch_tokens": batch_tokens, "part_tokens": part_tokens, **engine.run()}
        layers_read = engine.layers()  # may refuse the model, so before the corpus is read for its fingerprint
        provenance = engine.description, tokenizer.description(), documents.description(), run
        header = Header(layers_read, weights, *provenance)
        report = progress or (lambda _: None)
        prepared = None
        if isinstance(engine, CorpusEngine):
            prepared = _prepare(engine, documents, header, out, force, report, announce or (lambda _: None))
            header = replace(header, layers=engine.layers())
        with TraceWriter(out, header, tokenizer.vocabulary(), force=force) as writer:
            _record_parts(engine, documents, prepared, writer, report)
    remove_work(out)  # what the engine kept beside it, or a streamed recording that was given up for this one
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


def _documents(
    corpus: Corpus | Sample | Iterable[Document],
    max_tokens: int | None,
    max_documents: int | None,
    seed: int,
    tokenizer: EngineTokenizer,
) -> Documents:
    """The documents to record: those given, or a sample of them, by the quotas a domain."""
    if max_tokens is None and max_documents is None:
        return corpus if isinstance(corpus, Corpus | Sample) else _Given(corpus)
    if not isinstance(corpus, Corpus):
        raise ValueError("quotas a domain are for a corpus of files; choose among your documents yourself")
    return sample(
        corpus,
        max_tokens_per_domain=max_tokens,
        max_documents_per_domain=max_documents,
        seed=seed,
        num_tokens=lambda text: len(tokenizer.encode(text)),
    )


def _prepare(
    engine: CorpusEngine,
    documents: Documents,
    header: Header,
    out: Path,
    force: bool,
    report: Callable[[Progress], None],
    announce: Callable[[Estimate], None],
) -> list[Portion]:
    """Have an engine read the whole corpus, whose tokens are held in memory, 4 bytes each.

    Returns:
        The parts to be written from what it read.
    """
    refuse_foreign(out, force=force)
    if not force and (out / trace_header.FILE_NAME).exists():
        refuse_other(out, without_top_k(header), without_top_k(read_header(out)))
    cut = portions(documents, engine.tokenizer.encode, header.run["part_tokens"])
    read = [_without_text(portion) for portion in cut]
    units = [unit_of(portion, number, engine) for number, portion in enumerate(read) if portion.documents]
    if not units:
        raise _empty(header, sum(portion.num_read for portion in read))
    num_tokens = sum(unit.num_tokens for unit in units)
    meter = Meter(report, 0, 0, 1)

    def begin(estimate: Estimate) -> None:
        nonlocal meter
        announce(estimate)
        before = estimate.first_layer / estimate.num_layers
        meter = Meter(report, num_tokens * before, before, 1)

    def advance(done: float) -> None:
        meter.reach(num_tokens * done, done)

    try:
        engine.prepare(units, CorpusPlan(header, _digest(read), out, force), announce=begin, advance=advance)
    except NotFinite as error:
        raise not_finite(error, read[error.unit], engine) from None  # only the last has no document, and no unit
    return read


def _record_parts(
    engine: Engine,
    documents: Documents,
    prepared: Sequence[Portion] | None,
    writer: TraceWriter,
    report: Callable[[Progress], None],
) -> None:
    """Record the parts that the trace does not hold yet, then its summary."""
    notes, encode = tuple(writer.progress), engine.tokenizer.encode
    totals = summed(notes)
    done, part_tokens = totals["documents_read"], writer.header.run["part_tokens"]

    def tokenized(documents: Iterator[Document]) -> Iterator[Portion]:
        return portions(islice(documents, done, None), encode, part_tokens)

    def write(finished: tuple[Part, dict[str, int]]) -> None:
        writer.write(*finished)

    source: AbstractContextManager[Iterable[Portion]]
    if prepared is None:
        meter = Meter(report, totals["tokens"], totals["characters"], _num_characters(documents, encode))
        source = read_ahead(documents, tokenized)
    else:
        meter = Meter(lambda _: None, 0, 0, None)  # progress was reported while the engine read
        source = nullcontext(prepared[len(notes) :])
    with source as upcoming, WriteBehind(write) as written:
        for number, portion in enumerate(upcoming, len(notes)):
            totals = summed([totals, portion.note()])
            if portion.documents:  # those after the last token make no part

                def advance(tokens: int, portion: Portion = portion) -> None:
                    meter.add(tokens, portion.num_characters * tokens / portion.num_tokens)

                written.put((record_part(engine, portion, number, advance), portion.note()))
    if not totals["tokens"]:
        raise _empty(writer.header, totals["documents_read"])
    files = documents.corpus if isinstance(documents, Sample) else documents
    if isinstance(files, Corpus):
        files.check_unchanged()
    problems = getattr(documents, "problems", None)
    writer.finish(totals | ({} if problems is None else {"malformed": problems.count}))


def _empty(header: Header, num_documents: int) -> CorpusEmpty:
    return CorpusEmpty(header.corpus["name"], f"none of its {num_documents} documents has a token")


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


Documents = Corpus | Sample | _Given


def _without_text(portion: Portion) -> Portion:
    """The portion without the texts, which are not needed once they are tokens."""
    documents = [(replace(document, text=""), token_ids) for document, token_ids in portion.documents]
    return replace(portion, documents=documents)


def _digest(read: Sequence[Portion]) -> str:
    """Hash of the documents, their domains and tokens, and of the portions they are in."""
    digest = hashlib.sha256()
    for portion in read:
        digest.update(f"\n{portion.num_read} {portion.num_tokens} {portion.num_characters}\n".encode())
        for document, token_ids in portion.documents:
            digest.update(f"\n{document.number} {document.domain!r} {len(token_ids)}\n".encode())
            digest.update(token_ids.tobytes())
    return digest.hexdigest()
