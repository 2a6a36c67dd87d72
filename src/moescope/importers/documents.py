"""What every importer reads from its files: documents with their routing, or with counts, as unchecked arrays.

Unit: a token, or an assignment where only counts are known. `assembly` checks the documents and writes the trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportMalformed
from moescope.trace import RowLabels

Ids = NDArray[np.integer[Any]]
ExpertId = Annotated[int, msgspec.Meta(ge=0, le=65535)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


@dataclass(frozen=True)
class ModelFacts:
    """What a file states about the model; None and the empty name stand for what it does not state.

    Attributes:
        name: Its name.
        num_experts: Routed experts of a layer.
        top_k: Experts chosen per token.
        num_layers: Layers, dense ones included.
    """

    name: str = ""
    num_experts: int | None = None
    top_k: int | None = None
    num_layers: int | None = None


NO_MODEL = ModelFacts()


@dataclass(frozen=True)
class TokenDocument:
    """The routing of one document, in the order of its text.

    Attributes:
        place: File and position in it, for messages.
        domain: Its label.
        expert_ids: For each layer the chosen experts, shape (token, choice); -1 = no expert ran, or none was logged.
        gate_weights: For each layer the gate weights, shape (token, choice); empty if unknown.
        token_ids: Vocabulary ids, shape (token,), or None.
        starts: Whether a token begins a new sequence, shape (token,); None if the document is one sequence.
        phase: Codes of `moescope.trace.PHASES`, shape (token,), or None.
        ranked: Whether choices are in order of gate weight.
        zero_is_dense: Whether the program writes rows of zeros where no router ran.
        none_is_dropped: Whether a row of -1 is a token whose assignments were all dropped; else it was not recorded.
            Then -2 may stand for a choice that was not recorded.
        model: What the file states about the model.
        pieces: Text pieces of token ids, as far as the file has them.
        cluster: What the document is a piece of, or None.
        label: Label of each token, or None.
        margins: For each layer the margin of each token's choice, as of `moescope.trace.Part`; empty if unknown.
        masses: For each layer the mass of each token's choice; empty if unknown.
        skipped: Tokens before the first, whose routing the source left out; they shift the positions.
    """

    place: str
    domain: str
    expert_ids: Mapping[int, Ids]
    gate_weights: Mapping[int, NDArray[np.floating[Any]]] = field(default_factory=dict)
    token_ids: Ids | None = None
    starts: NDArray[np.bool_] | None = None
    phase: Ids | None = None
    ranked: bool = False
    zero_is_dense: bool = False
    none_is_dropped: bool = False
    model: ModelFacts = NO_MODEL
    pieces: Mapping[int, bytes] = field(default_factory=dict)
    cluster: str | None = None
    label: RowLabels | None = None
    margins: Mapping[int, NDArray[np.floating[Any]]] = field(default_factory=dict)
    masses: Mapping[int, NDArray[np.floating[Any]]] = field(default_factory=dict)
    skipped: int = 0

    def rows(self, selected: slice | NDArray[np.bool_]) -> TokenDocument:
        """The document of the selected tokens."""
        columns: dict[str, Any] = {
            name: None if (column := getattr(self, name)) is None else column[selected]
            for name in ("token_ids", "starts", "phase")
        }
        for name in ("expert_ids", "gate_weights", "margins", "masses"):
            columns[name] = {layer: column[selected] for layer, column in getattr(self, name).items()}
        return replace(self, **columns, label=None if self.label is None else self.label.rows(selected))

    def only(self, kept: NDArray[np.bool_]) -> TokenDocument:
        """The tokens that are kept, shape (token,); one behind a gap begins a sequence."""
        starts = np.zeros(len(kept), np.bool_) if self.starts is None else self.starts.copy()
        starts[1:] |= ~kept[:-1]
        return replace(self, starts=starts).rows(kept)


@dataclass(frozen=True)
class CountedDocument:
    """The assignments that each expert received in one document, forward pass or file.

    Attributes:
        place: File and position in it, for messages.
        domain: Its label.
        counts: For each layer the assignments of each expert, shape (expert,).
        model: What the file states about the model.
        complete: Whether all experts are listed; otherwise only those with assignments are.
    """

    place: str
    domain: str
    counts: Mapping[int, Ids]
    model: ModelFacts = NO_MODEL
    complete: bool = True


def integers(values: Any, place: str, what: str, *, ndim: int) -> Ids:
    """Nested lists as an array of whole numbers.

    Raises:
        ImportMalformed: The lists are ragged, of the wrong depth, or hold anything but 64-bit integers.
    """
    if ndim == 1 and isinstance(values, list | tuple) and not all(type(value) is int for value in values):
        raise ImportMalformed(place, f"{what} holds values other than whole numbers")
    try:
        array = np.array(values)
    except (ValueError, OverflowError, TypeError):
        raise ImportMalformed(place, f"{what} is not a table of whole numbers with rows of one length") from None
    if array.size == 0 and isinstance(values, list | tuple):
        return np.zeros((0,) * ndim, np.int64)
    if array.dtype.kind not in "iu" or array.ndim != ndim:
        kind = f"{array.ndim} dimensions of {array.dtype}" if array.dtype.kind in "iuf" else "something else"
        raise ImportMalformed(place, f"{what}: expected whole numbers in {ndim} dimensions, found {kind}")
    if array.dtype == np.uint64:
        if array.max(initial=0) >= 2**63:
            raise ImportMalformed(place, f"{what} holds {array.max()}, which is beyond 64 bits")
        array = array.astype(np.int64)
    return array
