"""BigMoeOnEdge's route trace: CSV, one row per assignment, preceded by ``#`` lines that describe the model.

A document is a turn. In the prefill of a turn llama.cpp runs the last layer for the last token only: the others have no
row there. Columns are read by name, as its authors ask; ``dropped`` was added later and marks experts that did not run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from moescope.errors import ImportMalformed
from moescope.importers.documents import ModelFacts, TokenDocument
from moescope.importers.events import UNKNOWN, DocumentNumbers, Event, Meaning, batches, gather
from moescope.importers.files import find, number, real, stem, table
from moescope.importers.findings import Findings, Options

_NEEDED = ("turn", "phase", "step", "layer", "slot", "expert")


def read(paths: Sequence[Path], options: Options, findings: Findings) -> Generator[TokenDocument, None, None]:
    """One document per turn."""
    for path in find(paths):
        comments: list[str] = []
        place, header, cells = table(path, comments=comments)
        columns = {name: index for index, name in enumerate(header)}
        if missing := [name for name in _NEEDED if name not in columns]:
            raise ImportMalformed(place, f"lacks the columns {', '.join(missing)}")
        if not comments or not comments[0].startswith("route_trace"):
            findings.warn(f"{path}: does not begin with # route_trace v1")
        model = _model(comments, path)
        documents = DocumentNumbers()
        domain = options.domain or stem(path)
        events = _events(path, cells, columns, documents, domain)
        yield from gather(batches(events), documents, Meaning("weight" in columns, ranked=True, model=model), findings)


def _events(
    path: Path, rows: Iterator[tuple[str, list[str]]], columns: dict[str, int], documents: DocumentNumbers, domain: str
) -> Iterator[Event]:
    width = max(columns[name] for name in _NEEDED) + 1
    needed = [columns[name] for name in _NEEDED]
    optional = [columns.get(name, sys.maxsize) for name in ("weight", "dropped")]
    for place, cells in rows:
        if len(cells) < width:
            raise ImportMalformed(place, f"has {len(cells)} cells, expected {len(columns)}")
        turn_cell, phase, step, layer, slot, expert_cell = (cells[column] for column in needed)
        turn = number(turn_cell, place, "turn")
        weight_cell, dropped = (cells[column] if column < len(cells) else None for column in optional)
        weight = math.nan if weight_cell is None else real(weight_cell, place, "weight")
        expert = number(expert_cell, place, "expert", high=65535)
        if dropped is not None and dropped.strip() not in ("0", ""):
            expert, weight = -1, 0.0
        yield (
            documents.number((turn,), domain, f"{path}, turn {turn}"),
            number(step, place, "step"),
            number(layer, place, "layer", high=65535),
            number(slot, place, "slot", high=1023),
            expert,
            weight,
            UNKNOWN,
            number(phase, place, "phase", high=1),
        )


def _model(comments: list[str], path: Path) -> ModelFacts:
    """The line ``model=… arch=… n_layer=… n_expert=… n_expert_used=…``."""
    for comment in comments:
        if comment.startswith("model="):
            name, _, rest = comment.removeprefix("model=").partition(" arch=")
            pairs = dict(pair.split("=", 1) for pair in rest.split() if "=" in pair)
            known = {
                key: number(pairs[key], f"{path}, header", key, low=1, high=65536) for key in pairs if key[:2] == "n_"
            }
            return ModelFacts(
                name.replace("\\", "/").rsplit("/", 1)[-1],
                known.get("n_expert"),
                known.get("n_expert_used"),
                known.get("n_layer"),
            )
    return ModelFacts()
