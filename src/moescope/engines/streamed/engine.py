"""A checkpoint larger than memory as an engine: the corpus goes through it layer by layer.

Each layer's weights are read once, every batch passes, the layer is freed; what it returned waits in the spool for the
next one. Batches, hooks, ranking and checks are those of a model in memory, so the choices are the same to the bit.
What comes out is whole layers; once all are through, units are cut from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from moescope.engines.options import EngineOptions
from moescope.engines.protocol import CorpusEngine, CorpusPlan, Estimate, NotFinite, Routed, Unit
from moescope.engines.streamed.estimate import (
    BASE_BYTES,
    LAYER_FACTOR,
    OVERHEAD,
    available_memory,
    fits,
    operations_per_second,
    refuse_small_disk,
    spool_bytes,
)
from moescope.engines.streamed.layerwise import NO_STREAM, Layerwise
from moescope.engines.streamed.rehearsal import Rehearsal, rehearse, run_layer
from moescope.engines.streamed.spool import Chosen, Spool
from moescope.engines.transformers.batches import Batch
from moescope.engines.transformers.engine import ModelEngine
from moescope.engines.transformers.hooks import Choices, RouterWatch
from moescope.engines.transformers.model import (
    Checkpoint,
    Model,
    describe,
    find_checkpoint,
    find_device,
    open_checkpoint,
    quiet,
)
from moescope.engines.transformers.provenance import checkpoint_fingerprint, describe_layer
from moescope.engines.transformers.routers import find_experts, find_left_out, select_experts
from moescope.engines.work import has_work, work_folder
from moescope.errors import ModelNotStreamable
from moescope.trace import Layer
from moescope.trace import header as trace_header
from moescope.trace.gate import read_header

RUN_KEY, RUN_VALUE = "engine", "streamed"
"""In the header's ``run``, what a streamed trace says; with another word, unfinished traces would not resume."""


def must_stream(model: Path | str, out: Path, options: EngineOptions, *, force: bool) -> bool:
    """Whether a recording goes layer by layer: as asked, else as it was begun, else if the checkpoint does not fit."""
    if options.stream is not None:
        return options.stream
    if has_work(out):
        return True
    if not force and (out / trace_header.FILE_NAME).exists():
        return read_header(out).run.get(RUN_KEY) == RUN_VALUE
    available = available_memory(find_device(options.device)) if options.memory is None else options.memory
    return not fits(find_checkpoint(model), options.dtype, available)


class StreamedEngine(ModelEngine, CorpusEngine):
    """Runs a model layer by layer over all units, then returns what each layer chose.

    The model is as in memory, its layers empty; `read_rate` is in bytes a second, that of its first weights. If the
    options say no memory, half of what is available is taken.
    """

    def __init__(
        self, model: Model, layerwise: Layerwise, rehearsal: Rehearsal, read_rate: float, options: EngineOptions
    ) -> None:
        super().__init__(model, options)
        self._layerwise, self._rehearsal, self._read_rate = layerwise, rehearsal, read_rate
        self._memory = available_memory(layerwise.device) // 2 if options.memory is None else options.memory
        self._chosen: dict[int, Chosen] = {}
        self._first_rows: dict[int, int] = {}

    def __enter__(self) -> Self:
        self.undo.callback(self._layerwise.close)
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        self._chosen = {}
        super().__exit__()

    def run(self) -> dict[str, Any]:
        """Provenance of the run."""
        return super().run() | {RUN_KEY: RUN_VALUE}

    def layers(self) -> tuple[Layer, ...]:
        """The layers, with one choice a token until they have run."""
        layers = (describe_layer(experts, top_k=1) for experts in self.model.experts)
        if not self._chosen:
            return tuple(layers)
        return tuple(replace(layer, top_k=self._chosen[layer.layer].expert_ids.shape[1]) for layer in layers)

    def prepare(
        self,
        units: Sequence[Unit],
        plan: CorpusPlan,
        *,
        announce: Callable[[Estimate], None],
        advance: Callable[[float], None],
    ) -> None:
        """Run every layer that an earlier call has not finished."""
        num_layers = self.model.experts[-1].layer + 1
        memory = spool_bytes(self._layerwise, num_layers, self._memory)
        spool = Spool(
            work_folder(plan.out), plan.header, plan.tokens, num_layers=num_layers, memory=memory, force=plan.force
        )
        self.undo.callback(spool.close)
        num_tokens = [unit.num_tokens for unit in units]
        total, first = sum(num_tokens), spool.next_layer
        taken = self._estimate(total, first, num_layers, memory)
        refuse_small_disk(spool.path, taken)
        announce(taken)
        first_rows = (np.cumsum(num_tokens) - num_tokens).tolist()
        self._first_rows = {unit.number: row for unit, row in zip(units, first_rows, strict=True)}
        for layer in range(first, num_layers):

            def read(tokens: int, layer: int = layer) -> None:
                advance((layer + tokens / total) / num_layers)

            self._run_layer(units, spool, layer, last=layer == num_layers - 1, advance=read)
        spool.settle()
        self._chosen = {experts.layer: spool.choices(experts.layer) for experts in self.model.experts}

    def record(self, unit: Unit, advance: Callable[[int], None]) -> Routed:
        """Cut a unit from what the layers chose."""
        routed = Routed.empty(self.layers(), unit.num_tokens, weights=self.options.weights)
        first = self._first_rows[unit.number]
        rows = slice(first, first + unit.num_tokens)
        for layer, (expert_ids, gate_weights) in self._chosen.items():
            routed.expert_ids[layer][:] = expert_ids[rows]
            if gate_weights is not None:
                routed.gate_weights[layer][:] = gate_weights[rows]
        advance(unit.num_tokens)
        return routed

    def _estimate(self, tokens: int, first: int, num_layers: int, spool_bytes: int) -> Estimate:
        """What the layers from `first` on will take."""
        layerwise, rehearsal = self._layerwise, self._rehearsal
        shares = {experts.layer: min(1.0, rehearsal.top_k / experts.num_experts) for experts in layerwise.experts}
        if rehearsal.bare:
            shares[num_layers - 1] = 0
        left = range(first, num_layers)
        operations = sum(layerwise.operations(layer, share_of_experts=shares.get(layer, 0)) for layer in left)
        reads = [layerwise.nbytes(layer, bare=self._is_bare(layer)) for layer in left]
        states = int(tokens * rehearsal.state_widths * layerwise.hidden_size * layerwise.dtype.itemsize)
        num_choices = len(self.model.experts) * rehearsal.top_k
        kept = min(spool_bytes, states)
        largest = int(LAYER_FACTOR * max(map(layerwise.memory_bytes, range(num_layers))))
        return Estimate(
            model_bytes=sum(reads) + layerwise.nbytes(None),
            memory_bytes=largest + layerwise.memory_bytes(None) + kept + BASE_BYTES,
            spool_bytes=kept,
            disk_bytes=2 * states + tokens * num_choices * 6,
            num_layers=num_layers,
            first_layer=first,
            tokens=tokens,
            compute_seconds=OVERHEAD * tokens * operations / operations_per_second(layerwise.dtype, layerwise.device),
            read_seconds=sum(reads) / self._read_rate,
        )

    def _is_bare(self, layer: int) -> bool:
        """Whether a layer runs without its experts: the last, if the pass may stop once it has chosen."""
        return self._rehearsal.bare and layer == self.model.experts[-1].layer

    def _run_layer(
        self, units: Sequence[Unit], spool: Spool, layer: int, *, last: bool, advance: Callable[[int], None]
    ) -> None:
        """Load a layer, have every batch pass, free it, and commit what it chose and returned."""
        model, layerwise = self.model, self._layerwise
        bare = self._is_bare(layer)
        with quiet():
            layerwise.load(layer, bare=bare)
        if not last:
            layerwise.fetch_ahead(layer + 1, bare=self._is_bare(layer + 1))
        experts = [block for block in model.experts if block.layer == layer]
        num_tokens = sum(unit.num_tokens for unit in units)
        table = _Table(layer, num_tokens, weights=self.options.weights) if experts else None
        states = None if last else spool.states_of(layer)
        passed = 0
        all_batches = ((unit, *batch) for unit in units for batch in self.batches(unit, layerwise.device))
        try:
            with RouterWatch(experts, stop_at=layer if bare else None) as watch:
                for index, (unit, batch, inputs) in enumerate(all_batches):
                    before = spool.take(index) if layer else None
                    choices, returned = run_layer(layerwise, watch, layer, inputs, before)
                    if table is not None:
                        table.add(choices[layer], batch, unit.number, self._first_rows[unit.number])
                    if states is not None:
                        states.append(returned)
                    passed += len(batch.rows)
                    advance(passed)
        except BaseException:
            if states is not None:
                states.close()
            raise
        layerwise.free(layer)
        spool.commit(layer, states, None if table is None else table.chosen)


class _Table:
    """What one layer chose for every token of the corpus; None before the first batch shows how many experts."""

    def __init__(self, layer: int, num_tokens: int, *, weights: bool) -> None:
        self._layer, self._num_tokens, self._with_weights = layer, num_tokens, weights
        self.chosen: Chosen | None = None

    def add(self, choices: Choices, batch: Batch, unit: int, first_row: int) -> None:
        """Note the choices of one batch of a unit, which starts at `first_row`."""
        gate_weights = choices.gate_weights[batch.places]
        NotFinite.check(self._layer, unit, gate_weights, batch.rows)
        if self.chosen is None:
            shape = (self._num_tokens, choices.expert_ids.shape[1])
            weights = np.empty(shape, np.float32) if self._with_weights else None
            self.chosen = Chosen(np.empty(shape, choices.expert_ids.dtype), weights)
        self.chosen.expert_ids[first_row + batch.rows] = choices.expert_ids[batch.places]
        if self.chosen.gate_weights is not None:
            self.chosen.gate_weights[first_row + batch.rows] = gate_weights


def open_streamed(path: Path | str, options: EngineOptions) -> StreamedEngine:
    """Ready a checkpoint to be streamed; everything that can be refused is refused before its layers are read.

    Raises:
        ModelNotStreamable: It is quantized, an encoder-decoder, not in safetensors files, or a small model of its
            family comes out differently.
        ModelError: As for a model that is loaded whole.
    """
    checkpoint = open_checkpoint(path, options)
    _refuse(checkpoint)
    with quiet():
        layerwise = Layerwise(
            checkpoint.folder,
            checkpoint.config,
            dtype=options.dtype,
            device=find_device(options.device),
            find=partial(find_experts, block=options.block),
            subject=checkpoint.name,
        )
    try:
        rehearsal = rehearse(checkpoint, layerwise.experts, layerwise.dtype)
        with quiet():
            last = select_experts(layerwise.experts, options.layers, None, path)[-1].layer
            layerwise.check(last, bare=rehearsal.bare)
        fingerprint = checkpoint_fingerprint(checkpoint.folder)
        left_out = (*find_left_out(layerwise.body, layerwise.experts), *checkpoint.elsewhere)
        body, experts, tokenizer = layerwise.body, layerwise.experts, checkpoint.tokenizer
        model = describe(body, tokenizer, experts, options.layers, checkpoint.name, fingerprint, left_out)
        before, start = layerwise.shards.bytes_read, time.monotonic()
        with quiet():
            layerwise.load(None)
        rate = (layerwise.shards.bytes_read - before) / max(time.monotonic() - start, 1e-9)
    except BaseException:
        layerwise.close()
        raise
    return StreamedEngine(model, layerwise, rehearsal, rate, options)


def _refuse(checkpoint: Checkpoint) -> None:
    """Refuse an encoder-decoder and a quantized checkpoint."""
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
