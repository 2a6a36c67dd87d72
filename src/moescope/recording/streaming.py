"""Recording a model that is larger than memory: the corpus goes through it layer by layer.

Each layer's weights are read once, every batch passes, the layer is freed; what it returned waits in the spool for the
next one. Batches, hooks, ranking and checks are those of the road in memory, so the choices are the same to the bit.
What comes out is whole layers; once all are through, the parts of the trace are put together from them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.corpus import Document
from moescope.errors import CorpusEmpty, DiskFull, ModelNotStreamable
from moescope.recording.batches import Batch, Portion, batches, portions, windows
from moescope.recording.hooks import Choices, RouterWatch
from moescope.recording.layerwise import NO_STREAM, Layerwise
from moescope.recording.model import (
    Checkpoint,
    Model,
    checkpoint_fingerprint,
    describe,
    find_checkpoint,
    find_device,
    open_checkpoint,
    quiet,
    trace_layer,
)
from moescope.recording.parts import check_finite, check_token_ids, unrouted
from moescope.recording.progress import Progress
from moescope.recording.rehearsal import Rehearsal, rehearse, run_layer
from moescope.recording.routers import find_experts, find_left_out, select_experts
from moescope.recording.shards import Shards
from moescope.recording.spool import Spool, has_work, without_top_k, work_folder
from moescope.trace import Header, Layer, TraceWriter
from moescope.trace import header as trace_header
from moescope.trace.reader import read_header
from moescope.trace.writer import refuse_foreign, refuse_other

BASE_BYTES = 10**9
"""What the interpreter, torch and the activations of a batch are allowed beside a layer and the spool."""

_LAYER_ROOM = 1.5  # a layer, and what its conversion needs for a moment
_WHOLE_ROOM = 1.2  # a whole model in memory, and what loading it needs

_OVERHEAD = 1.25
"""Time of a layer over that of its matrix products: attention, norms, routing (docs/decisions/log.md)."""

_MEASURE_SECONDS = 0.1


@dataclass(frozen=True)
class Estimate:
    """What a streamed recording will take, told before it starts.

    Attributes:
        model_bytes: Bytes of the checkpoint that will be read.
        memory_bytes: Most memory it will hold: a layer with its conversion, the spool, and the rest.
        spool_bytes: How much of that is for what layers hand on: of the budget for it, what it takes.
        disk_bytes: Most it will write beside the trace, removed in the end.
        num_layers: Layers to run.
        first_layer: The layer it starts with; above 0 if it goes on after an interruption.
        tokens: Tokens of the corpus.
        compute_seconds: Time to compute, from a short measurement of matrix products.
        read_seconds: Time to read what is left to read, from the speed of what was read first; overlapped.
    """

    model_bytes: int
    memory_bytes: int
    spool_bytes: int
    disk_bytes: int
    num_layers: int
    first_layer: int
    tokens: int
    compute_seconds: float
    read_seconds: float

    @property
    def seconds(self) -> float:
        """Time in all: reading and computing overlap, but for the first layer's reading."""
        left = max(1, self.num_layers - self.first_layer)
        return max(self.compute_seconds, self.read_seconds) + self.read_seconds / left


@dataclass(frozen=True)
class Streamed:
    """A model ready to be streamed.

    Attributes:
        model: As the road in memory has it, its layers empty.
        layerwise: Loads and runs its layers.
        rehearsal: What the small model taught.
        read_rate: Bytes a second at which its first weights were read.
        memory: Bytes of memory that recording may take.
    """

    model: Model
    layerwise: Layerwise
    rehearsal: Rehearsal
    read_rate: float
    memory: int


def must_stream(
    model: Path | str, out: Path, *, stream: bool | None, memory: int | None, device: str, dtype: str, force: bool
) -> bool:
    """Whether a recording goes layer by layer: as asked, else as it was begun, else if the checkpoint does not fit.

    Args:
        model: The checkpoint.
        out: The trace to be.
        stream: What the user said; None for nothing.
        memory: Bytes of memory that recording may take; None for what is available.
        device: Where the model would be loaded.
        dtype: What it would be loaded in.
        force: Whether a trace that was begun does not matter, since it will be replaced.
    """
    if stream is not None:
        return stream
    if has_work(out):
        return True
    if not force and (out / trace_header.FILE_NAME).exists():
        return read_header(out).run.get("road") == "stream"
    available = available_memory(find_device(device)) if memory is None else memory
    return _WHOLE_ROOM * model_bytes(find_checkpoint(model), dtype) + BASE_BYTES > available


def model_bytes(folder: Path, dtype: str) -> int:
    """Bytes that the weights of a checkpoint take in memory."""
    files = [file for pattern in ("*.safetensors", "*.bin") for file in sorted(folder.glob(pattern))]
    if not any(file.suffix == ".safetensors" for file in files):
        return sum(file.stat().st_size for file in files)
    try:
        with Shards(folder) as shards:
            wanted = None if dtype == "auto" else getattr(torch, dtype).itemsize
            return sum(
                each.nbytes // each.dtype.itemsize * wanted
                if wanted is not None and each.dtype.is_floating_point
                else each.nbytes
                for each in shards.tensors.values()
            )
    except ModelNotStreamable:  # dtypes that cannot be streamed, but perhaps loaded
        return sum(file.stat().st_size for file in files if file.suffix == ".safetensors")


def available_memory(device: torch.device) -> int:
    """Bytes of memory that are free for a new process: of a GPU, of the control group, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - _group_use(group))
    except (OSError, ValueError):  # another system, or no limit
        pass
    return min(limits, default=2**63)


def _group_use(group: Path) -> int:
    """Bytes of a control group that cannot be reclaimed: its use without the page cache."""
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int((group / "memory.current").read_text()) - int(statistics.get("file", 0))


def open_streamed(
    path: Path | str, *, layers: Sequence[int] | None, dtype: str, device: str, memory: int | None, block: str = "mlp"
) -> Streamed:
    """Ready a checkpoint to be streamed; everything that can be refused is refused before its layers are read.

    Args:
        path: Folder of a checkpoint, or its name in the local Hugging Face cache.
        layers: Layers to record, or None for all with routed experts.
        dtype: ``auto`` (the checkpoint's), ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto``, ``cpu``, ``cuda`` …
        memory: Bytes of memory that recording may take; None for half of what is available.
        block: ``mlp`` or ``attention``: which routed blocks to record.
    Raises:
        ModelNotStreamable: It is quantized, an encoder-decoder, not in safetensors files, or a small model of its
            family comes out differently.
        ModelError: As for a model that is loaded whole.
    """
    checkpoint = open_checkpoint(path, layers, block=block)
    _refuse(checkpoint)
    place = find_device(device)
    with quiet():
        layerwise = Layerwise(
            checkpoint.folder,
            checkpoint.config,
            dtype=dtype,
            device=place,
            find=partial(find_experts, block=block),
            subject=checkpoint.name,
        )
    try:
        rehearsal = rehearse(checkpoint, layerwise.experts, layerwise.dtype)
        with quiet():
            layerwise.check(select_experts(layerwise.experts, layers, None, path)[-1].layer, bare=rehearsal.bare)
        fingerprint = checkpoint_fingerprint(checkpoint.folder)
        left_out = (*find_left_out(layerwise.body, layerwise.experts), *checkpoint.elsewhere)
        model = describe(
            layerwise.body, checkpoint.tokenizer, layerwise.experts, layers, checkpoint.name, fingerprint, left_out
        )
        before, start = layerwise.shards.bytes_read, time.monotonic()
        with quiet():
            layerwise.load_rest()
        rate = (layerwise.shards.bytes_read - before) / max(time.monotonic() - start, 1e-9)
    except BaseException:
        layerwise.close()
        raise
    return Streamed(model, layerwise, rehearsal, rate, available_memory(place) // 2 if memory is None else memory)


def planned_layers(model: Model) -> tuple[Layer, ...]:
    """The layers to record, with one choice a token, since how many they make is not known before they have run."""
    return tuple(trace_layer(experts, top_k=1) for experts in model.experts)


def record_streamed(
    streamed: Streamed,
    documents: Iterable[Document],
    plan: Header,
    out: Path,
    *,
    force: bool,
    report: Callable[[Progress], None],
    announce: Callable[[Estimate], None],
) -> None:
    """Record a corpus layer by layer, or go on where a call like it was stopped, and write the trace.

    Args:
        streamed: The model.
        documents: The corpus; its tokens are held in memory, 4 bytes each.
        plan: Header of the trace, its layers from `planned_layers`.
        out: Folder of the trace; the work is kept beside it.
        force: Replace a finished trace, or what another recording began.
        report: Called after every batch of a layer.
        announce: Called once, before the first layer.
    Raises:
        MoescopeError: The model, the corpus or the output is at fault.
    """
    refuse_foreign(out, force=force)
    if not force:
        _refuse_other_trace(out, plan)
    encode = streamed.model.tokenizer.encode
    read = [_without_text(portion) for portion in portions(documents, encode, plan.run["part_tokens"])]
    for portion in read:
        check_token_ids(portion, streamed.model.num_embeddings, streamed.model.description["name"])
    total = sum(portion.num_tokens for portion in read)
    if not total:
        number = sum(portion.num_read for portion in read)
        raise CorpusEmpty(plan.corpus["name"], f"none of its {number} documents has a token")
    num_layers = streamed.model.experts[-1].layer + 1
    layer_bytes = max(streamed.layerwise.memory_bytes(layer) for layer in range(num_layers))
    spool_bytes = max(0, int(streamed.memory - BASE_BYTES - _LAYER_ROOM * layer_bytes))
    with Spool(work_folder(out), plan, _digest(read), num_layers=num_layers, memory=spool_bytes, force=force) as spool:
        first = spool.next_layer
        estimate = _estimate(streamed, total, first, num_layers, spool_bytes)
        _refuse_small_disk(spool.path, estimate)
        announce(estimate)
        start = time.monotonic()
        for layer in range(first, num_layers):

            def advance(tokens: int, layer: int = layer) -> None:
                done = layer + tokens / total
                speed = total * (done - first) / num_layers / max(time.monotonic() - start, 1e-9)
                tokens_done = total * done / num_layers
                report(Progress(int(tokens_done), done / num_layers, speed, (total - tokens_done) / max(speed, 1e-9)))

            _run_layer(streamed, read, plan, spool, layer, last=layer == num_layers - 1, advance=advance)
        spool.settle()
        _write_parts(streamed.model, read, plan, spool, out, force=force, problems=getattr(documents, "problems", None))
        spool.remove()


def _run_layer(
    streamed: Streamed,
    read: Sequence[Portion],
    plan: Header,
    spool: Spool,
    layer: int,
    *,
    last: bool,
    advance: Callable[[int], None],
) -> None:
    """Load a layer, have every batch pass, free it, and commit what it chose and returned."""
    model, layerwise = streamed.model, streamed.layerwise
    bare = last and streamed.rehearsal.bare
    num_layers = model.experts[-1].layer + 1
    with quiet():
        layerwise.load(layer, bare=bare)
    if not last:
        layerwise.fetch_ahead(layer + 1, bare=layer + 1 == num_layers - 1 and streamed.rehearsal.bare)
    experts = [each for each in model.experts if each.layer == layer]
    table = _Table(layer, sum(portion.num_tokens for portion in read), weights=plan.weights) if experts else None
    states = None if last else spool.states_of(layer)
    passed = 0
    try:
        with RouterWatch(experts, stop_at=layer if bare else None) as watch:
            for index, (portion, first_row, batch) in enumerate(_batches(model, read, plan)):
                inputs = {"input_ids": torch.from_numpy(batch.input_ids).to(layerwise.device)}
                if batch.attention_mask is not None and model.looks_ahead:
                    inputs["attention_mask"] = torch.from_numpy(batch.attention_mask).to(layerwise.device)
                before = spool.take(index) if layer else None
                choices, returned = run_layer(layerwise, watch, layer, inputs, before)
                if table is not None:
                    table.add(choices[layer], batch, first_row, portion, plan, len(model.tokenizer.added_ids))
                if states is not None:
                    states.append(returned)
                passed += len(batch.rows)
                advance(passed)
    except BaseException:
        if states is not None:
            states.close()
        raise
    layerwise.free(layer)
    spool.commit(layer, states, None if table is None else table.expert_ids, None if table is None else table.weights)


class _Table:
    """What one layer chose for every token of the corpus."""

    def __init__(self, layer: int, num_tokens: int, *, weights: bool) -> None:
        self._layer, self._num_tokens, self._with_weights = layer, num_tokens, weights
        self.expert_ids: NDArray[np.integer[Any]] | None = None
        self.weights: NDArray[np.float32] | None = None

    def add(
        self, choices: Choices, batch: Batch, first_row: int, portion: Portion, plan: Header, num_added: int
    ) -> None:
        """Note the choices of one batch, whose portion starts at `first_row`."""
        gate_weights = choices.gate_weights[batch.places]
        if not np.isfinite(gate_weights).all():
            cut = windows(portion, plan.run["window"] - num_added)
            check_finite(self._layer, gate_weights, batch.rows, unrouted(portion, cut, plan))
        if self.expert_ids is None:
            shape = (self._num_tokens, choices.expert_ids.shape[1])
            self.expert_ids = np.empty(shape, choices.expert_ids.dtype)
            self.weights = np.empty(shape, np.float32) if self._with_weights else None
        self.expert_ids[first_row + batch.rows] = choices.expert_ids[batch.places]
        if self.weights is not None:
            self.weights[first_row + batch.rows] = gate_weights


def _batches(model: Model, read: Sequence[Portion], plan: Header) -> Iterator[tuple[Portion, int, Batch]]:
    """Every batch of the corpus, as the road in memory cuts them, with its portion and that one's first row."""
    added_ids = model.tokenizer.added_ids
    first_row = 0
    for portion in read:
        if portion.documents:
            cut = windows(portion, plan.run["window"] - len(added_ids))
            for batch in batches(cut, added_ids, plan.run["batch_tokens"], model.batching):
                yield portion, first_row, batch
        first_row += portion.num_tokens


def _write_parts(
    model: Model, read: Sequence[Portion], plan: Header, spool: Spool, out: Path, *, force: bool, problems: Any
) -> None:
    """Write the trace from what every layer chose."""
    choices = {layer.layer: spool.choices(layer.layer) for layer in plan.layers}
    header = replace(
        plan, layers=tuple(replace(layer, top_k=choices[layer.layer][0].shape[1]) for layer in plan.layers)
    )
    with TraceWriter(out, header, model.tokenizer.vocabulary(), force=force) as writer:
        written = sum(note["documents_read"] for note in writer.progress)
        totals = dict.fromkeys(("documents_read", "documents_empty", "tokens", "characters"), 0)
        first_row = 0
        for portion in read:
            note = portion.note()
            if portion.documents and totals["documents_read"] >= written:
                part = unrouted(portion, windows(portion, plan.run["window"] - len(model.tokenizer.added_ids)), header)
                rows = slice(first_row, first_row + portion.num_tokens)
                for layer, (expert_ids, gate_weights) in choices.items():
                    part.expert_ids[layer][:] = expert_ids[rows]
                    if gate_weights is not None:
                        part.gate_weights[layer][:] = gate_weights[rows]
                writer.write(part, note)
            first_row += portion.num_tokens
            totals = {name: totals[name] + note[name] for name in totals}
        writer.finish(totals | ({} if problems is None else {"malformed": problems.count}))


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


def _estimate(streamed: Streamed, tokens: int, first: int, num_layers: int, spool_bytes: int) -> Estimate:
    layerwise, rehearsal = streamed.layerwise, streamed.rehearsal
    by_layer = {experts.layer: experts for experts in layerwise.experts}
    operations = 0.0
    for layer in range(first, num_layers):
        if layer == num_layers - 1 and rehearsal.bare:
            operations += layerwise.operations(layer, share_of_experts=0)
        else:
            share = rehearsal.top_k / by_layer[layer].num_experts if layer in by_layer else 0
            operations += layerwise.operations(layer, share_of_experts=min(1.0, share))
    reads = [
        layerwise.nbytes(layer, bare=layer == num_layers - 1 and rehearsal.bare) for layer in range(first, num_layers)
    ]
    states = int(tokens * rehearsal.widths_handed_on * layerwise.hidden_size * layerwise.dtype.itemsize)
    num_choices = len(streamed.model.experts) * rehearsal.top_k
    kept = min(spool_bytes, states)
    return Estimate(
        model_bytes=sum(reads) + layerwise.nbytes(None),
        memory_bytes=int(_LAYER_ROOM * max(map(layerwise.memory_bytes, range(num_layers))))
        + layerwise.memory_bytes(None)
        + kept
        + BASE_BYTES,
        spool_bytes=kept,
        disk_bytes=2 * states + tokens * num_choices * 6,
        num_layers=num_layers,
        first_layer=first,
        tokens=tokens,
        compute_seconds=_OVERHEAD * tokens * operations / _operations_per_second(layerwise.dtype, layerwise.device),
        read_seconds=sum(reads) / streamed.read_rate,
    )


def _operations_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Speed of a matrix product of the size of an expert's, the best of what fits a moment."""
    left, right = (torch.randn(shape).to(device, dtype) for shape in ((256, 1024), (1024, 2048)))
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < _MEASURE_SECONDS:
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * 256 * 1024 * 2048 / best


def _refuse(checkpoint: Checkpoint) -> None:
    """Refuse what cannot be streamed by its configuration.

    Raises:
        ModelNotStreamable: It is an encoder-decoder or quantized.
    """
    config = checkpoint.config
    if getattr(config, "is_encoder_decoder", False):
        raise ModelNotStreamable(
            checkpoint.name, f"{config.model_type} is an encoder-decoder; only decoders can be streamed", NO_STREAM
        )
    for part in (config, config.get_text_config()):
        if (quantization := getattr(part, "quantization_config", None)) is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise ModelNotStreamable(
                checkpoint.name,
                f"its weights are quantized ({method}); bfloat16, float16 and float32 can be streamed",
                f"{NO_STREAM}, or take a checkpoint that is not quantized",
            )


def _refuse_other_trace(out: Path, plan: Header) -> None:
    if (out / trace_header.FILE_NAME).exists():
        refuse_other(out, without_top_k(plan), without_top_k(read_header(out)))


def _refuse_small_disk(work: Path, estimate: Estimate) -> None:
    there = sum(file.stat().st_size for file in work.iterdir())
    free = shutil.disk_usage(work).free
    if free < estimate.disk_bytes - there:
        raise DiskFull(
            work,
            f"needs some {estimate.disk_bytes / 1e9:,.1f} GB for what the layers hand on, and {free / 1e9:,.1f} GB are "
            "free",
            "put the output on a larger disk, or record fewer tokens",
        )
