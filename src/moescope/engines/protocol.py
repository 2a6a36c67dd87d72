"""What an engine is: it reads sequences of token ids and says which experts ran for every token.

Unit: a `Unit`, the sequences of one part of a trace. Convention: what is routed of a unit depends on the model, the
options and the unit alone, never on what was recorded before it, so that units may be recorded in any order, by any
process, and again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from moescope.trace import Header, Layer, Vocabulary


class EngineTokenizer(Protocol):
    """What turns text into the token ids that an engine reads."""

    @property
    def added_ids(self) -> tuple[int, ...]:
        """Ids in front of every sequence, which the engine feeds by itself and does not record (BOS …)."""

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Token ids of a text, none added, shape (token,)."""

    def description(self) -> dict[str, Any]:
        """Provenance for the header of a trace."""

    def vocabulary(self) -> Vocabulary:
        """The exact bytes of every id."""


@dataclass(frozen=True)
class Unit:
    """What an engine reads at a time: the sequences of one part of a trace, each by itself.

    Attributes:
        number: Number of the part in the recording, from 0.
        sequences: Token ids of each, none added, each of shape (token,) and none empty.
    """

    number: int
    sequences: tuple[NDArray[np.uint32], ...]

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))


@dataclass(frozen=True)
class Routed:
    """What was chosen for the tokens of a unit, a row a token, in the order of its sequences.

    Attributes:
        expert_ids: By layer, the chosen experts, shape (token, choice), by falling gate weight if the layer says that
            it is ranked; -1 where capacity dropped one.
        gate_weights: By layer, their weights as executed, shape (token, choice); empty if they are not recorded.
        predictions: By layer and distance, the experts predicted, shape (token, predicted); empty without lookahead.
    """

    expert_ids: dict[int, NDArray[np.integer[Any]]]
    gate_weights: dict[int, NDArray[np.float32]]
    predictions: dict[tuple[int, int], NDArray[np.integer[Any]]]

    @classmethod
    def empty(cls, layers: Sequence[Layer], num_tokens: int, *, weights: bool) -> Self:
        """Arrays to be filled."""
        shapes = {layer.layer: (num_tokens, layer.top_k) for layer in layers}
        return cls(
            {layer: np.empty(shape, np.int16) for layer, shape in shapes.items()},
            {layer: np.empty(shape, np.float32) for layer, shape in shapes.items()} if weights else {},
            {
                (layer.layer, distance): np.empty((num_tokens, layer.num_predicted), np.int16)
                for layer in layers
                for distance in layer.lookahead
            },
        )


class NotFinite(Exception):
    """A gate weight is NaN or infinite; whoever knows the documents says where in the corpus that is.

    Attributes:
        layer: Index of the layer.
        unit: Number of the unit.
        row: Row of the token in it.
    """

    def __init__(self, layer: int, unit: int, row: int) -> None:
        super().__init__(f"layer {layer}, unit {unit}, row {row}")
        self.layer, self.unit, self.row = layer, unit, row

    @classmethod
    def check(cls, layer: int, unit: int, gate_weights: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
        """Raise it if one of the weights that a layer gave some rows, shape (token, choice), is not a number."""
        finite = np.isfinite(gate_weights)
        if not finite.all():
            raise cls(layer, unit, int(rows[~finite.all(axis=1)].min()))


class Engine(ABC):
    """A model that was opened to be recorded; what runs it is inside a ``with`` block of it.

    At the end of the block whatever the engine holds is released, and a model that the caller owns is as it was.

    Attributes:
        tokenizer: Of the model.
        description: Provenance of the model, from `provenance.ModelProvenance`.
        window: Longest sequence it reads, added tokens included: as asked, or what the model was made for.
        num_embeddings: Token ids that the model knows; None if it does not say.
    """

    tokenizer: EngineTokenizer
    description: dict[str, Any]
    window: int
    num_embeddings: int | None

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    @abstractmethod
    def run(self) -> dict[str, Any]:
        """Provenance of the run, from `provenance.describe_run`."""

    @abstractmethod
    def layers(self) -> tuple[Layer, ...]:
        """The layers that are recorded, as a trace describes them."""

    @abstractmethod
    def record(self, unit: Unit, advance: Callable[[int], None]) -> Routed:
        """Read the sequences of a unit.

        Args:
            advance: Called now and then with the number of tokens read since the last call.
        Raises:
            NotFinite: A gate weight is not a number.
            MoescopeError: The routing cannot be read exactly.
        """


@dataclass(frozen=True)
class CorpusPlan:
    """What a whole corpus is to be read for, so that interrupted work goes on for the same recording only.

    Attributes:
        header: Of the trace to be; `top_k` is 1 in layers of which it is not known yet.
        tokens: Hash of the documents and their tokens.
        out: Folder of the trace; work is kept beside it (`engines.work`).
        force: Whether the work of another recording is replaced.
    """

    header: Header
    tokens: str
    out: Path
    force: bool


class CorpusEngine(Engine):
    """An engine that must read the whole corpus before it can give the first unit.

    Before `prepare`, `layers` may say a `top_k` of 1 where that is not known; afterwards it is true, and `record` hands
    over what was prepared, for any unit.
    """

    @abstractmethod
    def prepare(
        self,
        units: Sequence[Unit],
        plan: CorpusPlan,
        *,
        announce: Callable[[Estimate], None],
        advance: Callable[[float], None],
    ) -> None:
        """Read all units, or go on where a call like it was stopped.

        Args:
            units: Of the whole recording, those that the trace has already included.
            plan: What they are read for.
            announce: Called once, before anything is read.
            advance: Called now and then with the share of the work that is done, 0 to 1.
        Raises:
            NotFinite: A gate weight is not a number.
            MoescopeError: The routing cannot be read exactly, or the work beside the trace is another's or damaged.
        """


@dataclass(frozen=True)
class Estimate:
    """What a streamed recording will take, reported before it starts.

    Attributes:
        model_bytes: Bytes of the checkpoint that will be read.
        memory_bytes: Most memory it will hold: a layer with its conversion, the spool, and the rest.
        spool_bytes: How much of that is for what a layer gives to the next: of the budget for it, what it takes.
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
