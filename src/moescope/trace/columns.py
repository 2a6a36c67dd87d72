"""The columns of a part: one table of name, exact Arrow type, nullability and range, for every writer and reader.

``document, domain, sequence, position``, ``cluster``, ``token_id``, ``phase`` and ``label`` if the header says so, then
``L{layer}_{rank}`` (chosen expert; null = none, see `DROPPED` and `NOT_RECORDED`) and, if recorded, ``W{layer}_{rank}``
(gate weight as executed), ``M{layer}`` and ``S{layer}`` (margin and mass of the choice) and
``P{layer}_{distance}_{rank}`` (expert predicted that many recorded layers earlier). What relates several rows or
columns stands in `rules`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from moescope.trace.header import Header, Layer

DROPPED = -1
"""The expert id, in memory, of an assignment for which no expert ran.

In the file a null, but in a layer of which not all tokens were recorded the id after the layer's last.
"""

NOT_RECORDED = -2
"""The expert id, in memory, of each choice of a token whose choices were not recorded; a null in the file."""

PHASES = ("prefill", "decode")
"""Names of the codes of `Part.phase`: processed as part of a prompt, or one at a time as generated."""


@dataclass(frozen=True)
class Column:
    """A column of a part.

    Attributes:
        name: Its name.
        type: Its type; a file that has another is damaged, even one that could be cast.
        meaning: In one line.
        nullable: Whether a value may be missing.
        most: Largest value of a column of whole numbers, which start at 0; None for a column of another kind.
    """

    name: str
    type: pa.DataType
    meaning: str
    nullable: bool = False
    most: int | None = None

    def field(self) -> pa.Field:
        """Its place in the schema of a file that is written."""
        return pa.field(self.name, self.type, nullable=self.nullable)


def columns(header: Header) -> tuple[Column, ...]:
    """The columns of a part, in their order."""
    if header.counts_only:
        return _COUNTS
    names = tuple(token_columns(header))
    return _of_tokens(header.layers, names, header.weights, header.margins, header.masses)


@lru_cache(maxsize=16)
def _of_tokens(
    layers: tuple[Layer, ...], names: tuple[str, ...], weights: bool, margins: bool, masses: bool
) -> tuple[Column, ...]:
    """Kept, because every read of a part asks for them, and a model has hundreds."""
    return (
        *(column for column in _TOKENS if column.name in names),
        *(_ids(layer, name) for layer in layers for name in layer.expert_columns()),
        *(Column(name, pa.float32(), _WEIGHT) for layer in layers if weights for name in layer.weight_columns()),
        *(Column(layer.margin_column, pa.float32(), _MARGIN) for layer in layers if margins),
        *(Column(layer.mass_column, pa.float32(), _MASS) for layer in layers if masses),
        *(_ids(layer, name, predicted=True) for layer in layers for name in prediction_columns([layer])),
    )


def token_columns(header: Header) -> list[str]:
    """Names of the columns that identify the token of a row."""
    known = {
        "cluster": header.clusters,
        "token_id": header.token_ids,
        "phase": header.phases,
        "label": header.labels,
    }
    return [column.name for column in _TOKENS if known.get(column.name, True)]


def prediction_columns(layers: Iterable[Layer]) -> list[str]:
    """Names of the columns of predicted experts, by layer, distance and rank."""
    return [name for layer in layers for distance in layer.lookahead for name in layer.prediction_columns(distance)]


def id_dtype(layer: Layer) -> type[np.uint8 | np.uint16]:
    """Width of a layer's expert columns: one byte up to 256 values, two above."""
    return np.uint8 if highest_value(layer) < 256 else np.uint16


def highest_value(layer: Layer) -> int:
    """The largest number in a layer's expert columns: its last id, or the one after that for a dropped assignment."""
    return layer.num_ids - 1 + (layer.partial and layer.drops)


def check_schema(found: pa.Schema, header: Header) -> None:
    """Refuse a file whose columns are not those of the header: their names, their order, their types.

    A column that may not lack a value may be nullable in the file as long as it lacks none.

    Raises:
        ValueError: A column is missing, is too many, is elsewhere, or has another type.
    """
    expected = columns(header)
    if found.names != (names := [column.name for column in expected]):
        differing = sorted(set(found.names) ^ set(names)) or ["their order"]
        raise ValueError(f"the columns are not those of the header: {', '.join(differing[:5])}")
    for column, field in zip(expected, found, strict=True):
        if field.type != column.type:
            raise ValueError(f"column {column.name} holds {field.type}, expected {column.type}")


def _number(name: str, type: pa.DataType, meaning: str) -> Column:
    return Column(name, type, meaning, most=2**type.bit_width - 1)


def _ids(layer: Layer, name: str, *, predicted: bool = False) -> Column:
    type = pa.from_numpy_dtype(id_dtype(layer))
    meaning = _PREDICTED if predicted else _CHOSEN
    nullable = (layer.drops or layer.partial) and not predicted
    return Column(name, type, meaning, nullable=nullable, most=highest_value(layer))


_CHOSEN = "L{layer}_{rank}: the expert that ran; NULL: none"
_WEIGHT = "W{layer}_{rank}: its gate weight, as executed"
_MARGIN = "M{layer}: selection score of the last chosen expert minus that of the first not chosen, bias included"
_MASS = "S{layer}: router probability of the chosen experts together, before they are renormalised"
_PREDICTED = "P{layer}_{distance}_{rank}: an expert predicted from so many recorded layers before"
_TOKENS = (
    _number("document", pa.uint32(), "index of the record in the corpus"),
    Column("domain", pa.string(), "label that the corpus gives the document"),
    _number("sequence", pa.uint32(), "window within the document; pairs of tokens never cross one"),
    _number("position", pa.uint32(), "place within the window"),
    Column("cluster", pa.string(), "what the document is a piece of, the unit of sampling"),
    _number("token_id", pa.uint32(), "vocabulary id"),
    Column("phase", pa.string(), "prefill (part of a prompt) or decode (generated)"),
    Column("label", pa.string(), "the token's role, modality, or part of an answer"),
)
MOST_TOKEN_COLUMNS = len(_TOKENS)
_COUNTS = (
    _number("document", pa.uint32(), "the unit in which the source counted"),
    Column("domain", pa.string(), "its label"),
    _number("layer", pa.uint16(), "index in the whole model"),
    _number("expert", pa.uint16(), "expert id"),
    _number("count", pa.uint64(), "assignments the expert received in the document, at least 1"),
)
COUNT_COLUMNS = tuple(column.name for column in _COUNTS)
