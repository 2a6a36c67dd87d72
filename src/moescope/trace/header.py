"""`trace.json`: what was recorded, from which model and corpus, and how; written once, before the first token.

A recording may be resumed only by one whose header agrees, so everything that could change a choice is in it; names
that change when a recording moves to another machine may differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moescope.errors import TraceDamaged, TraceNewer, TraceNotFound
from moescope.trace import plain_json

FORMAT = "moescope-trace"
FORMAT_VERSION = 3
"""The latest; a trace is written in the earliest version that can represent it, so that earlier readers can read it."""

FILE_NAME = "trace.json"


@dataclass(frozen=True)
class Layer:
    """One layer with routed experts.

    Attributes:
        layer: Index in the whole model, dense layers included.
        num_experts: Routed experts; their ids are 0 .. num_experts - 1.
        top_k: Experts chosen per token.
        module: Path of the experts module in the model, for provenance.
        num_null_experts: Choices that run no expert (skip, zero-compute); their ids follow the routed ones.
        num_shared_experts: Experts that always run; never in the ids.
        ranked: Whether rank 0 is the choice with the largest gate weight; False if the source gave no order.
        drops: Whether capacity may drop assignments; otherwise every choice of every token has an expert id.
        partial: Whether the choices of some tokens were not recorded, which is not the same as dropped.
        lookahead: Distances, ascending, at which this layer's choice was predicted: at distance 1 its router was run on
            the input of the router of the preceding recorded layer.
        num_predicted: Experts per prediction; 0 if there is none.
    """

    layer: int
    num_experts: int
    top_k: int
    module: str = ""
    num_null_experts: int = 0
    num_shared_experts: int = 0
    ranked: bool = True
    drops: bool = False
    lookahead: tuple[int, ...] = ()
    num_predicted: int = 0
    partial: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.layer < 2**16:
            raise ValueError(f"layer {self.layer} lies outside 0..{2**16 - 1}")
        if self.num_experts < 1 or self.num_null_experts < 0 or self.num_shared_experts < 0:
            raise ValueError(f"layer {self.layer}: a number of experts is negative, or none is routed")
        if not 1 <= self.top_k <= self.num_experts + self.num_null_experts:
            raise ValueError(f"layer {self.layer}: top_k {self.top_k} of {self.num_experts} experts is impossible")
        if self.num_ids > 2**16:
            raise ValueError(f"layer {self.layer}: {self.num_ids} expert ids do not fit in 16 bits")
        if list(self.lookahead) != sorted({distance for distance in self.lookahead if distance > 0}):
            raise ValueError(f"layer {self.layer}: distances must be ascending and at least 1, not {self.lookahead}")
        if self.partial and self.lookahead:
            raise ValueError(f"layer {self.layer}: predictions of tokens that were not recorded are impossible")
        if not bool(self.lookahead) <= self.num_predicted <= self.num_ids * bool(self.lookahead):
            raise ValueError(f"layer {self.layer}: {self.num_predicted} predicted experts are impossible")

    @property
    def num_ids(self) -> int:
        """Number of ids a choice can take: routed experts, then null experts."""
        return self.num_experts + self.num_null_experts

    def expert_columns(self) -> list[str]:
        """Names of the columns of chosen experts, rank 0 first: ``L15_0``, ``L15_1`` …"""
        return [f"L{self.layer}_{rank}" for rank in range(self.top_k)]

    def weight_columns(self) -> list[str]:
        """Names of the columns of gate weights, rank 0 first: ``W15_0``, ``W15_1`` …"""
        return [f"W{self.layer}_{rank}" for rank in range(self.top_k)]

    @property
    def margin_column(self) -> str:
        """Name of the column of margins: ``M15``."""
        return f"M{self.layer}"

    @property
    def mass_column(self) -> str:
        """Name of the column of masses: ``S15``."""
        return f"S{self.layer}"

    def prediction_columns(self, distance: int) -> list[str]:
        """Names of the columns of experts predicted at a distance, rank 0 first: ``P15_1_0``, ``P15_1_1`` …"""
        return [f"P{self.layer}_{distance}_{rank}" for rank in range(self.num_predicted)]


@dataclass(frozen=True)
class Header:
    """The contents of ``trace.json``.

    Attributes:
        layers: The layers recorded, ascending.
        weights: Whether gate weights were recorded.
        model: Name, architecture, fingerprint, dtype … of the model.
        tokenizer: Class, fingerprint and added tokens.
        corpus: Name, format, fingerprint, fields and sampling of the corpus.
        run: Window, batching, device, implementations and library versions.
        token_ids: Whether vocabulary ids are known; some programs store routing without them.
        phases: Whether each token is marked as part of a prompt (prefill) or generated (decode).
        counts_only: Whether the source kept only how many assignments each expert received, and no token.
        clusters: Whether each document names its cluster, the unit of sampling: its book, file or repository.
        labels: Whether each token has a label: a role, a modality, thinking or answer.
        margins: Whether each token has, for each layer, the margin of its choice.
        masses: Whether each token has, for each layer, the router probability of its choices together.
    """

    layers: tuple[Layer, ...]
    weights: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    token_ids: bool = True
    phases: bool = False
    counts_only: bool = False
    clusters: bool = False
    labels: bool = False
    margins: bool = False
    masses: bool = False

    def __post_init__(self) -> None:
        indices = [layer.layer for layer in self.layers]
        if not indices or indices != sorted(set(indices)):
            raise ValueError(f"layers must be ascending, distinct and at least one, not {indices}")
        if self.counts_only and any(getattr(self, name) for name in _OF_TOKENS):
            raise ValueError(f"a trace of counts has none of {', '.join(_OF_TOKENS)}")
        for index, layer in enumerate(self.layers):
            if layer.lookahead and (self.counts_only or layer.lookahead[-1] > index):
                raise ValueError(f"layer {layer.layer} has no recorded layer {layer.lookahead[-1]} before it")

    @property
    def lookahead(self) -> tuple[int, ...]:
        """Distances at which choices were predicted, ascending; empty if none were recorded."""
        return tuple(sorted({distance for layer in self.layers for distance in layer.lookahead}))

    def to_json(self) -> str:
        """The text of ``trace.json``."""
        latest = any(layer.partial for layer in self.layers) or any(getattr(self, name) for name in _SINCE)
        version = 3 if latest else 2 if self.lookahead else 1
        document = {"format": FORMAT, "version": version, **asdict(self)}
        for values, since in ((document, _SINCE), *((layer, _SINCE_OF_LAYERS) for layer in document["layers"])):
            for name in since:
                if version < since[name]:
                    del values[name]
        return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, path: Path) -> Header:
        """Parse and validate ``trace.json``; `path` is used only in error messages.

        Raises:
            TraceNotFound: The file is not the header of a trace.
            TraceNewer: It was written in a later version of the format.
            TraceDamaged: It is not valid JSON or lacks a field.
        """
        try:
            document = plain_json.parse_object(text)
        except ValueError as error:
            raise TraceDamaged(path, f"{FILE_NAME} is not valid JSON ({error})") from None
        if document.get("format") != FORMAT:
            raise TraceNotFound(path, f"{FILE_NAME} is not that of a {FORMAT}")
        version = document.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise TraceDamaged(path, f"{FILE_NAME} has version {version!r}, expected an integer of at least 1")
        if version > FORMAT_VERSION:
            raise TraceNewer(
                path,
                f"written in version {version} of the trace format; this moescope reads up to {FORMAT_VERSION}",
                "upgrade with `pip install -U moescope`",
            )
        try:
            layers = tuple(_layer(layer) for layer in document["layers"])
            values = {f.name: document[f.name] for f in fields(cls) if f.name in document and f.name != "layers"}
            _check_notes(values)
            return cls(layers=layers, **_checked(cls, values))
        except (KeyError, TypeError, ValueError) as error:
            raise TraceDamaged(path, f"{FILE_NAME} is not a valid header: {error!r}") from None

    def differences(self, other: Header) -> list[str]:
        """Why a trace with the header `other` cannot be resumed by a recording with this one.

        The folder of the model, the name of a corpus that states the domain of each document, and the version of
        Python may differ: fingerprints identify model and corpus.

        Returns:
            One ``field: this, other`` per difference; empty if there is none.
        """
        left, right = json.loads(self.to_json()), json.loads(other.to_json())
        ignored = [("run", "python")]
        if self.model.get("fingerprint") is not None:
            ignored.append(("model", "name"))
        if self.corpus.get("fingerprint") is not None and self.corpus.get("domain_field") is not None:
            ignored.append(("corpus", "name"))  # without such a field the name of a file may be the domain
        for section, name in ignored:
            left[section].pop(name, None)
            right[section].pop(name, None)
        return list(_differences("", left, right))


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers of layers as text, runs abbreviated.

    Example:
        >>> ranges([0, 1, 2, 3, 5])
        '0-3, 5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


_SINCE = dict.fromkeys(("clusters", "labels", "margins", "masses"), 3)
_SINCE_OF_LAYERS = {"lookahead": 2, "num_predicted": 2, "partial": 3}
"""The version of the format in which a key, or one of a layer, came; an earlier one has the default."""

_OF_TOKENS = ("weights", "token_ids", "phases", *_SINCE)

_JSON_TYPES = {"int": int, "bool": bool, "str": str, "dict[str, Any]": dict, "tuple[int, ...]": list}


def _layer(values: dict[str, Any]) -> Layer:
    checked = _checked(Layer, values)
    distances = checked.get("lookahead", [])
    if not all(isinstance(distance, int) and not isinstance(distance, bool) for distance in distances):
        raise TypeError(f"lookahead must be integers, found {distances!r}")
    return Layer(**{**checked, "lookahead": tuple(distances)})


def _checked(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """`values` if each has the type that the dataclass `cls` declares, and none is unknown."""
    if not isinstance(values, dict):
        raise TypeError(f"expected an object, found {values!r}")
    declared = {f.name: str(f.type) for f in fields(cls)}
    for name, value in values.items():
        if name not in declared:
            raise TypeError(f"unknown field {name!r}")
        expected = _JSON_TYPES[declared[name]]
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            raise TypeError(f"{name} must be {declared[name]}, found {value!r}")
    return values


_NOTES: dict[tuple[str, str], tuple[type, ...]] = {
    ("model", "name"): (str,),
    ("model", "fingerprint"): (str, type(None)),
    ("corpus", "name"): (str,),
    ("corpus", "fingerprint"): (str, type(None)),
    ("corpus", "sample"): (dict, type(None)),
}
"""Types of the notes that moescope reads again; the others are only shown."""


def _check_notes(values: dict[str, Any]) -> None:
    for (section, name), types in _NOTES.items():
        notes = values.get(section)
        value = notes[name] if isinstance(notes, dict) and name in notes else types[0]()
        if not isinstance(value, types):
            raise TypeError(f"{section}.{name} must be {types[0].__name__}, found {str(value)[:40]!r}")


def _differences(name: str, left: Any, right: Any) -> list[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        differences: list[str] = []
        for key in dict.fromkeys([*left, *right]):
            differences += _differences(f"{name}.{key}" if name else key, left.get(key), right.get(key))
        return differences
    if left == right:
        return []
    if isinstance(left, list) and isinstance(right, list):
        return [f"{name} differ"]
    return [f"{name}: {left!r}, not {right!r}"]
