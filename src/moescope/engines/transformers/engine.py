"""A model of transformers in memory, or spread by accelerate, as an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from moescope.engines.options import EngineOptions
from moescope.engines.protocol import Engine, NotFinite, Routed, Unit
from moescope.engines.transformers.attention import SkipMaskedBlocks
from moescope.engines.transformers.batches import Batch, batches
from moescope.engines.transformers.hooks import RouterWatch
from moescope.engines.transformers.lookahead import Lookahead
from moescope.engines.transformers.model import Model, probe, probe_lookahead, ready_to_record, weights_put_back
from moescope.engines.transformers.provenance import describe_run
from moescope.engines.transformers.rows import FillRows
from moescope.trace import Layer


class ModelEngine(Engine):
    """What is common to the engines that run a model of transformers, whole or layer by layer."""

    def __init__(self, model: Model, options: EngineOptions) -> None:
        self.tokenizer, self.description = model.tokenizer, model.description
        self.window = min(options.window, model.max_positions or options.window)
        self.num_embeddings = model.num_embeddings
        self.model, self.options, self.undo = model, options, ExitStack()

    def __enter__(self) -> Self:
        self.undo.enter_context(ready_to_record(self.model))
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()

    def run(self) -> dict[str, Any]:
        """Provenance of the run."""
        return describe_run(self.model.body, self.model.experts[0], self.model.device)

    def batches(self, unit: Unit, device: torch.device) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """The batches of a unit, and what the model is called with for each."""
        looks_ahead = self.model.looks_ahead
        for batch in batches(unit.sequences, self.tokenizer.added_ids, self.options.batch_tokens, self.model.batching):
            inputs = {"input_ids": torch.from_numpy(batch.input_ids).to(device)}
            if batch.attention_mask is not None and looks_ahead:
                inputs["attention_mask"] = torch.from_numpy(batch.attention_mask).to(device)
            yield batch, inputs


class TransformersEngine(ModelEngine):
    """Runs a loaded model over the sequences of a unit, with hooks at its routers."""

    def layers(self) -> tuple[Layer, ...]:
        """The layers, as a few tokens show them."""
        layers, _, lookahead = self._probed
        return layers if lookahead is None else lookahead.described(layers)

    def record(self, unit: Unit, advance: Callable[[int], None]) -> Routed:
        """Run the model over a unit, batch by batch."""
        model = self.model
        _, stop_at, lookahead = self._probed
        routed = Routed.empty(self.layers(), unit.num_tokens, weights=self.options.weights)
        with (
            RouterWatch(model.experts, stop_at=stop_at, lookahead=lookahead) as watch,
            FillRows(),
            SkipMaskedBlocks() if model.masks_blocks(self.window) else nullcontext(),
        ):
            for batch, inputs in self.batches(unit, model.device):
                with weights_put_back(model):
                    chosen = watch.run(model.body, inputs)
                for layer, choices in chosen.items():
                    gate_weights = choices.gate_weights[batch.places]
                    NotFinite.check(layer, unit.number, gate_weights, batch.rows)
                    routed.expert_ids[layer][batch.rows] = choices.expert_ids[batch.places]
                    if self.options.weights:
                        routed.gate_weights[layer][batch.rows] = gate_weights
                    for distance, predicted in choices.predicted.items():
                        routed.predictions[layer, distance][batch.rows] = predicted[batch.places]
                advance(len(batch.rows))
        return routed

    @cached_property
    def _probed(self) -> tuple[tuple[Layer, ...], int | None, Lookahead | None]:
        """The layers, the one after which a pass may stop, and what predicts."""
        layers, stop_at = probe(self.model)
        return layers, stop_at, probe_lookahead(self.model, self.options.lookahead)
