"""What documents of tokens and of counts have in common on their way to a trace: one model, domains, layers, parts.

A trace's header comes before its parts and is known only after the last document, so parts wait in a folder beside the
trace; one part waits in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportMalformed, ImportTooLarge
from moescope.importers.documents import NO_MODEL, ModelShape
from moescope.importers.findings import Findings, Options

MAX_LAYERS = 1024
MAX_DOMAINS = 1 << 16

Arrays = dict[str, NDArray[Any]]


@dataclass
class BundleSpool:
    """Bundles of arrays, kept in order; all but the first on disk."""

    folder: Path
    length: int = 0
    _first: Arrays = field(default_factory=dict)

    def put(self, arrays: Arrays) -> None:
        """Keep the next bundle."""
        if self.length == 0:
            self._first = arrays
        else:
            with (self.folder / f"{self.length}.npz").open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        self.length += 1

    def __iter__(self) -> Iterator[Arrays]:
        for index in range(self.length):
            if index == 0:
                yield self._first
            else:
                with np.load(self.folder / f"{index}.npz", allow_pickle=False) as arrays:
                    yield dict(arrays)


@dataclass
class Assembly:
    """What both kinds of documents need: the model they agree on, and their domains."""

    folder: Path
    options: Options
    findings: Findings
    num_documents: int = 0
    pieces: dict[int, bytes] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)
    model: ModelShape = NO_MODEL
    domains: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spool = BundleSpool(self.folder)
        given = self.options
        self.model = ModelShape(given.model or "", given.num_experts, given.top_k, given.num_layers)

    def learn(self, model: ModelShape, place: str) -> None:
        """Add what a document says of the model to what is known; a contradiction is refused."""
        if model is self.model or model == NO_MODEL:
            return
        known = self.model
        merged = {}
        for name, words in (
            ("num_experts", "experts"),
            ("top_k", "experts a token"),
            ("num_layers", "layers"),
            ("num_moe_layers", "layers with routed experts"),
        ):
            here, before = getattr(model, name), getattr(known, name)
            if here is not None and before is not None and here != before:
                raise ImportMalformed(place, f"says {here} {words}; an option or an earlier file says {before}")
            merged[name] = before if here is None else here
        if model.name and known.name and model.name != known.name and not self.options.model:
            raise ImportMalformed(
                place,
                f"is of model {model.name[:80]!r}, an earlier file of {known.name[:80]!r}",
                "import them one by one",
            )
        self.model = ModelShape(known.name or model.name[:1000], **merged)

    def code_of(self, domain: str, place: str) -> int:
        """Code of a domain, an index into `domains`."""
        if len(domain) > 1000:
            raise ImportMalformed(place, f"its domain is {len(domain)} characters long, expected a label")
        code = self.domains.setdefault(domain, len(self.domains))
        if code >= MAX_DOMAINS:
            raise ImportTooLarge(place, f"is in domain number {code + 1}", "is the right field taken for the domain?")
        return code

    def takes(self, layer: int, place: str) -> bool:
        """Whether a layer is wanted; one that the model cannot have is refused."""
        if not 0 <= layer < 2**16:
            raise ImportMalformed(place, f"has layer {layer}, expected 0 to 65535")
        if self.model.num_layers is not None and layer >= self.model.num_layers:
            raise ImportMalformed(place, f"has layer {layer}, but the model has {self.model.num_layers} layers")
        if self.options.layers is None or layer in self.options.layers:
            return True
        self.findings.warn("layers that --layers does not name were left out")
        return False

    def count_experts(self, largest: int) -> int:
        """Experts of a layer: as is known, else as many as the ids need, which is told."""
        if self.model.num_experts is not None:
            return self.model.num_experts
        self.findings.warn(
            f"the number of experts is not in the file and was taken to be {largest + 1}, the largest id and one; "
            "--num-experts says it"
        )
        return largest + 1

    def check_layers(self, layers: list[int], name: str) -> None:
        """Compare the layers that have routing with what is known of the model."""
        if not layers:
            raise ImportMalformed(name, "has no layer with routing: every value is zero or padding")
        expected = self.model.num_moe_layers or (None if self.options.layers is None else len(self.options.layers))
        if expected is not None and expected != len(layers):
            self.findings.warn(f"{len(layers)} layers have routing, expected {expected}")
        elif expected is None and self.model.num_layers not in (None, len(layers)):
            self.findings.warn(
                f"{len(layers)} of the model's {self.model.num_layers} layers have routing; are the others dense?"
            )
        if expected is None and self.model.num_layers is None:
            gaps = sorted(set(range(layers[0], layers[-1] + 1)) - set(layers))
            steps = set(np.diff(layers).tolist())
            if gaps and len(steps) > 1:
                self.findings.warn(f"layers {spans(gaps)} between others have no routing; are they dense?")

    def described(self) -> dict[str, Any]:
        """The model, for the header."""
        return {"name": self.model.name or "unknown"}


def spans(numbers: list[int]) -> str:
    """Numbers in words.

    Example:
        >>> spans([0, 1, 2, 5])
        '0-2, 5'
    """
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
