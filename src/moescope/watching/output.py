"""The trace that a watch writes, created with the first forward pass: which shows how many experts a token gets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from moescope.engines.transformers.provenance import describe_layer
from moescope.engines.transformers.routers import Experts
from moescope.errors import ModelUnsupported, RouterNotFinite, TraceExists
from moescope.trace import Header, Layer, TraceWriter, Vocabulary
from moescope.watching.calls import Pass
from moescope.watching.sequences import DECODE, PREFILL, Labels, Sequences, Step


class TraceOutput:
    """Records forward passes of one stack of layers; each method may be called from any thread.

    Header, made from the layers and whether token ids are known, and vocabulary are asked for once.

    Raises:
        TraceExists: There is something at the path.
    """

    def __init__(
        self,
        path: Path,
        experts: Sequence[Experts],
        header: Callable[[tuple[Layer, ...], bool], Header],
        vocabulary: Callable[[], Vocabulary],
        labels: Labels,
        *,
        weights: bool,
        part_tokens: int,
        force: bool,
    ) -> None:
        if not force and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise TraceExists(path, "exists and is kept; a watch does not go on with another's trace", "force=True")
        self._path, self._experts, self._labels = path, experts, labels
        self._header, self._vocabulary = header, vocabulary
        self._weights, self._part_tokens, self._force = weights, part_tokens, force
        self._sequences: Sequences | None = None
        self._interrupted = False
        self._lock = threading.Lock()

    def add(self, current: Pass, choices: Sequence[tuple[Tensor, Tensor]], cache: Any, generation: object) -> None:
        """Record a forward pass.

        Args:
            choices: For each layer ids and gate weights, by falling weight, shape (token, choice).
            cache: The cache that holds what was read; None if nothing can follow.
            generation: The call of ``generate`` that runs; None if none does.
        """
        call, past = current.call, current.past or 0
        counted, starts = current.counted, current.starts
        with self._lock:
            if self._sequences is None:
                layers = zip(self._experts, choices, strict=True)
                header = self._header(
                    tuple(describe_layer(experts, ids.shape[1]) for experts, (ids, _) in layers),
                    call.input_ids is not None,
                )
                writer = TraceWriter(self._path, header, self._vocabulary(), force=self._force)
                self._sequences = Sequences(writer, self._part_tokens)
            header = self._sequences.writer.header
            if header.token_ids and call.input_ids is None:
                raise ModelUnsupported(
                    call.subject,
                    "is called with embeddings, and was called with token ids before; a trace has them or not",
                )
            assert starts is not None  # asked for wherever a trace is written
            recorded = np.ones(call.shape, bool) if counted is None else counted.cpu().numpy()
            known = call.input_ids if header.token_ids else None
            step = Step(
                token_ids=np.zeros(call.shape, np.int64) if known is None else known.cpu().numpy(),
                recorded=recorded,
                starts=starts.cpu().numpy(),
                phase=DECODE if past and call.shape[1] == 1 else PREFILL,
                expert_ids={},
                gate_weights={},
            )
            for experts, layer, pair in zip(self._experts, header.layers, choices, strict=True):
                ids, weights = pair[0].int().cpu().numpy(), pair[1].float().cpu().numpy()
                _check(experts, layer, ids[recorded.reshape(-1)], weights[recorded.reshape(-1)])
                step.expert_ids[experts.layer] = ids.reshape(*call.shape, -1)
                if self._weights:
                    step.gate_weights[experts.layer] = weights.reshape(*call.shape, -1)

            def begin(num_rows: int) -> Any:
                return self._labels.batch(num_rows, generated=generation is not None)

            self._sequences.add(step, cache, past, call.subject, begin, generation)

    def close(self, *, complete: bool) -> None:
        """Write what is whole; the trace is complete if no error ended the block and no Ctrl-C came in between."""
        with self._lock:
            if self._sequences is not None:
                with self._sequences.writer:
                    self._sequences.finish(complete=complete and not self._interrupted)

    def update(self, change: Callable[[Sequences], None]) -> None:
        """Have the sequences take note of what has ended, and write the parts that are full.

        After an error what is not written is kept, and written next; Ctrl-C may come between any two steps.
        """
        with self._lock:
            try:
                if self._sequences is not None:
                    change(self._sequences)
            except Exception:
                raise
            except BaseException:
                self._interrupted = True
                raise


def _check(experts: Experts, layer: Layer, ids: Any, weights: Any) -> None:
    if not ids.size:
        return
    if ids.min() < (-1 if layer.drops else 0) or ids.max() >= layer.num_ids:
        raise ModelUnsupported(
            experts.name,
            f"layer {layer.layer} chose expert {ids.max()} or {ids.min()}, expected 0..{layer.num_ids - 1}",
        )
    if ids.shape[1] != layer.top_k:
        raise ModelUnsupported(experts.name, f"gives a token {ids.shape[1]} experts, and {layer.top_k} before")
    if not np.isfinite(weights).all():
        raise RouterNotFinite(f"layer {layer.layer}", "a gate weight is NaN or infinite", "does the loss diverge?")
