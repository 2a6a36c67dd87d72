"""What documents of tokens and of counts have in common when they become a trace: one model, domains, layers, parts.

A trace's header precedes its parts but is known only after the last document, so parts are kept in a folder beside the
trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportMalformed, ImportTooLarge
from moescope.importers.documents import NO_MODEL, ModelFacts
from moescope.importers.findings import Findings, Options
from moescope.trace.excluding import Exclusion
from moescope.trace.header import ranges

MAX_LAYERS = 1024  # several times those of the deepest models; every layer has columns in every part
MAX_DOMAINS = 1 << 16  # more labels than that are document names, each of which would be held in memory

Arrays = dict[str, NDArray[Any]]


@dataclass
class ArraySpool:
    """Bundles of arrays on disk, in order."""

    folder: Path
    length: int = 0

    def put(self, arrays: Arrays) -> None:
        """Store the next bundle."""
        np.savez(self.folder / f"{self.length}.npz", **arrays)  # type: ignore[arg-type]
        self.length += 1

    def __iter__(self) -> Iterator[Arrays]:
        for index in range(self.length):
            with np.load(self.folder / f"{index}.npz", allow_pickle=False) as arrays:
                yield dict(arrays)


@dataclass
class Assembly:
    """What both kinds of documents need: the model they share, and their domains."""

    folder: Path
    options: Options
    findings: Findings
    num_documents: int = 0
    pieces: dict[int, bytes] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)
    model: ModelFacts = NO_MODEL
    domains: dict[str, int] = field(default_factory=dict)
    _read_documents: int = 0
    _read_tokens: int = 0

    def __post_init__(self) -> None:
        self.exclusion = Exclusion.parse(self.options.exclude)
        self.spool = ArraySpool(self.folder)
        given = self.options
        self.model = ModelFacts(given.model or "", given.num_experts, given.top_k, given.num_layers)

    def learn(self, model: ModelFacts, place: str) -> None:
        """Merge what a document states about the model into what is known; a contradiction is refused."""
        known = self.model
        merged = {}
        described = {"num_experts": "experts", "top_k": "experts per token", "num_layers": "layers"}
        for name, description in described.items():
            value, earlier = getattr(model, name), getattr(known, name)
            if value is not None and earlier is not None and value != earlier:
                raise ImportMalformed(place, f"says {value} {description}; an option or an earlier file says {earlier}")
            merged[name] = earlier if value is None else value
        if model.name and known.name and model.name != known.name and not self.options.model:
            raise ImportMalformed(
                place,
                f"is from model {model.name[:80]!r}, an earlier file from {known.name[:80]!r}",
                "import them separately",
            )
        self.model = ModelFacts(known.name or model.name[:1000], **merged)

    def code_of(self, domain: str, place: str) -> int:
        """Code of a domain, an index into `domains`."""
        if len(domain) > 1000:  # text, read from the wrong field
            raise ImportMalformed(place, f"its domain is {len(domain)} characters long, expected a label")
        code = self.domains.setdefault(domain, len(self.domains))
        if code >= MAX_DOMAINS:
            raise ImportTooLarge(place, f"is in domain number {code + 1}", "is the domain read from the right field?")
        return code

    def kept(self, num_tokens: int) -> NDArray[np.bool_]:
        """Which tokens of the next document are not left out; a document of counts has one to ask for."""
        kept = self.exclusion.kept(np.full(num_tokens, self._read_documents), self._read_tokens)
        self._read_documents += 1
        self._read_tokens += num_tokens
        return kept

    def check_excluded(self, name: str) -> None:
        """Refuse what is to be left out and was not there, and what leaves nothing."""
        if missing := self.exclusion.missing(np.arange(self._read_documents), self._read_tokens):
            raise ImportMalformed(name, missing)
        if self._read_documents and not self.num_documents:
            raise ImportMalformed(name, f"nothing is left without {', '.join(self.options.exclude)}")

    def takes(self, layer: int, place: str) -> bool:
        """Whether a layer is wanted; one that the model cannot have is refused."""
        if not 0 <= layer < 2**16:
            raise ImportMalformed(place, f"has layer {layer}, expected 0 to 65535")
        if self.model.num_layers is not None and layer >= self.model.num_layers:
            raise ImportMalformed(place, f"has layer {layer}, but the model has {self.model.num_layers} layers")
        if self.options.layers is None or layer in self.options.layers:
            return True
        self.findings.warn("layers not named by --layers were left out")
        return False

    def count_experts(self, largest: int) -> int:
        """Experts of a layer: the known number, or else the number that the ids require, with a warning."""
        if self.model.num_experts is not None:
            return self.model.num_experts
        self.findings.warn(
            f"the number of experts is not in the file and was taken to be {largest + 1}, the largest id plus one; "
            "--num-experts sets it"
        )
        return largest + 1

    def check_layers(self, layers: list[int], name: str) -> None:
        """Compare the layers that have routing with what is known of the model."""
        if not layers:
            raise ImportMalformed(name, "has no layer with routing: every value is zero or padding")
        expected = None if self.options.layers is None else len(self.options.layers)
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
                self.findings.warn(f"layers {ranges(gaps)} between others have no routing; are they dense?")

    def described(self) -> dict[str, Any]:
        """The model, for the header."""
        return {"name": self.model.name or "unknown"}
