"""The keys by which every engine describes model and run in a header: what decides whether two traces compare."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import moescope


@dataclass(frozen=True, kw_only=True)
class ModelProvenance:
    """Provenance of a model.

    Attributes:
        name: What a trace calls it.
        family: Its ``model_type``; ``custom`` for a module that has none.
        architecture: Its class.
        num_layers: Layers, dense ones included; None if it does not say.
        hidden_size: Values of a hidden state; None if it does not say.
        dtype: What it computes in.
        fingerprint: Hash of its configuration and weights.
        expert_widths: Values of an expert's hidden layer, each that occurs; None if that is not known.
        router: Class of the routers; None if that is not known.
        not_recorded: Paths of routed blocks that are not among the layers recorded, ``*`` for the index of the layer.
    """

    name: str
    family: str
    architecture: str
    num_layers: int | None
    hidden_size: int | None
    dtype: str
    fingerprint: str
    expert_widths: list[int] | None
    router: str | None
    not_recorded: list[str] = field(default_factory=list)

    def described(self) -> dict[str, Any]:
        """As a header has it; without `not_recorded` where that is nothing."""
        return {name: value for name, value in vars(self).items() if name != "not_recorded" or value}


def describe_run(
    *, device: str, attn_implementation: str, experts_implementation: str, libraries: Sequence[str]
) -> dict[str, Any]:
    """Provenance of a run; its libraries, imported already, are those whose versions decide what is computed."""
    return {
        "device": device,
        "attn_implementation": attn_implementation,
        "experts_implementation": experts_implementation,
        **versions(libraries),
    }


def versions(libraries: Sequence[str]) -> dict[str, str]:
    """Versions of moescope, of some libraries and of Python."""
    return {
        "moescope": moescope.__version__,
        **{name: str(sys.modules[name].__version__) for name in libraries},
        "python": platform.python_version(),
    }
