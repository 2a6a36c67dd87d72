"""The one form of every result: names of variables, dims, coordinates, attributes, and the total over domains.

A value ``x`` may come with ``x_low`` and ``x_high`` (its 95 % interval), ``x_null`` (what the null hypothesis gives),
``x_p`` (p-value) and ``x_q`` (p-value adjusted for the family tested with it); ``x_error`` is a standard error and
``x_quantile`` a distribution. Another baseline is ``x_<its name>``, such as ``x_uniform``; ``model_x`` is of all layers
together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from moescope.trace import Layer

DIMS = {
    "domain": "corpus label; the first may be all domains together",
    "other": "the second domain, or expert, of a pair",
    "layer": "index in the whole model, dense layers included",
    "choice": "first, second, third, 4th … by gate weight; all: every choice of a token",
    "kind": "what counts as a repeat or an agreement: first, any, first_in_next; set",
    "expert": "id within the layer",
    "next": "expert id in the next recorded layer",
    "null": "null hypothesis",
    "pairs": "which pairs of neighbouring tokens",
    "lag": "tokens between the two of a pair, plus 1",
    "run": "length of a run, tokens",
    "length": "tokens of a segment",
    "source": "what explains a choice",
    "by": "the token itself, or the next one",
    "place": "rank in a list",
    "word": "word that was asked for",
    "word_class": "class of tokens",
    "token": "vocabulary id that was asked for",
    "token_id": "vocabulary id",
    "routing": "observed, or drawn from a null",
    "batch": "sequences or tokens served together",
    "quantile": "part of the distribution below",
    "statistic": "statistic of a token's gate weights",
    "policy": "cache policy",
    "size": "experts that a cache holds, a layer",
    "predictor": "what predicts the experts of a layer",
    "loaded": "experts loaded ahead",
    "placement": "rule that puts experts on devices",
    "against": "the placement compared with",
    "foreign_placement": "placement judged on other domains",
    "fitted_on": "domain that a placement was fitted on",
    "capacity_factor": "capacity of an expert over its mean load",
    "position": "place of a token in its sequence",
    "step": "training step or checkpoint",
}
"""Every dim of every result."""

ENDINGS = {
    "low": "95 % interval, low end",
    "high": "95 % interval, high end",
    "error": "standard error",
    "null": "expected under the null hypothesis",
    "p": "p-value",
    "q": "p-value adjusted for multiple tests",
}
"""What stands beside a value, with what it is unless said otherwise."""

_PLAIN = ("p", "q")
"""Endings whose unit is 1, whatever that of the value."""

FRACTION = "fraction"
"""Unit of a part of a whole, from 0 to 1; shown in per cent."""

DIFFERENCE = "difference of fractions"
"""Unit of one fraction less another, from -1 to 1; shown in points, with its sign."""

EXPERT_ID = "expert id"
"""Unit of a variable that names an expert, NaN for none."""

TOTAL = "(all)"
"""Label of all domains together, unless a domain is called so (`with_total`)."""


def described(values: Any, dims: Sequence[str], long_name: str, units: str, source: str = "") -> tuple[Any, ...]:
    """A variable with its definition, unit and source as attributes."""
    attributes = {"long_name": long_name, "units": units, **({"source": source} if source else {})}
    return tuple(dims), values, attributes


def estimate(
    name: str,
    dims: Sequence[str],
    long_name: str,
    units: str,
    source: str = "",
    *,
    meanings: dict[str, str] | None = None,
    value: ArrayLike,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    error: ArrayLike | None = None,
    null: ArrayLike | None = None,
    p: ArrayLike | None = None,
    q: ArrayLike | None = None,
) -> dict[str, tuple[Any, ...]]:
    """A value and what stands beside it, as variables of a result.

    Args:
        name: Name of the value.
        dims: Dims of all of them.
        long_name: Definition of the value.
        units: Unit of all but the p-values: `FRACTION`, `DIFFERENCE`, "bits", "1" for ratios, or what is counted.
        source: Where the definition is from.
        meanings: By ending, what it is if `ENDINGS` does not say it well, such as the null hypothesis.
        value: The value itself; the others are named by their endings.
    """
    beside = {"low": low, "high": high, "error": error, "null": null, "p": p, "q": q}
    definitions = ENDINGS | (meanings or {})
    return {name: described(value, dims, long_name, units, source)} | {
        f"{name}_{ending}": described(values, dims, definitions[ending], "1" if ending in _PLAIN else units)
        for ending, values in beside.items()
        if values is not None
    }


def labelled(
    values: Mapping[str, ArrayLike], dims: Sequence[str], definitions: Mapping[str, Sequence[str]]
) -> dict[str, tuple[Any, ...]]:
    """Arrays that have their names already, as variables of a result.

    Args:
        values: The arrays by name.
        dims: Dims of all of them.
        definitions: By name, its definition, unit and, if there is one, source. A name that is not here is a value's
            that is, with an ending: it means what `ENDINGS` says, in the unit of the value.
    """
    variables: dict[str, dict[str, tuple[Any, ...]]] = {}  # by value, so that what stands beside it follows it
    for name, array in values.items():
        base, _, ending = name.rpartition("_")
        base = base if ending in ENDINGS else name
        words = definitions.get(name) or (ENDINGS[ending], "1" if ending in _PLAIN else definitions[base][1])
        variables.setdefault(base, {})[name] = described(array, dims, *words)
    return {name: variable for group in variables.values() for name, variable in group.items()}


def layer_coordinates(layers: Sequence[Layer]) -> dict[str, Any]:
    """Coordinates of a result that has the dim `layer`."""
    return {
        "layer": [layer.layer for layer in layers],
        "num_experts": ("layer", [layer.num_experts for layer in layers], {"units": "experts"}),
        "num_ids": ("layer", [layer.num_ids for layer in layers], {"units": "expert ids, null experts included"}),
        "top_k": ("layer", [layer.top_k for layer in layers], {"units": "choices a token"}),
    }


def total_coordinates(domains: Sequence[str], documents: ArrayLike) -> dict[str, Any]:
    """Coordinates of a result that has the dim `domain`, all of them together first.

    Args:
        domains: Names of the domains.
        documents: Documents of each.
    """
    documents_D = np.asarray(documents)
    return {
        "domain": with_total(domains),
        "total": ("domain", np.arange(len(domains) + 1) == 0, {"long_name": "whether it is all domains together"}),
        "documents": ("domain", np.concatenate([[documents_D.sum()], documents_D]), {"units": "documents"}),
    }


def with_total(domains: Sequence[str]) -> list[str]:
    """Labels of all domains together and of each; none is the name of another.

    Example:
        >>> with_total(["Code"]), with_total(["(all)", "Code"])
        (['(all)', 'Code'], ['((all))', '(all)', 'Code'])
    """
    label = TOTAL
    while label in domains:
        label = f"({label})"
    return [label, *domains]


def add_total(values_D: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Sums by domain along the first axis, their total put before them."""
    return np.concatenate([values_D.sum(axis=0, keepdims=True), values_D])


def total(result: xr.Dataset) -> xr.Dataset:
    """A result of all domains together."""
    return result.isel(domain=int(np.flatnonzero(result["total"].values)[0]))


def by_domain(result: xr.Dataset) -> xr.Dataset:
    """A result of each domain by itself."""
    return result.isel(domain=np.flatnonzero(~result["total"].values)) if "total" in result.coords else result


def check(result: xr.Dataset) -> None:
    """Assert that a result has the form this module describes.

    Raises:
        AssertionError: It has not; the variable is named.
    """
    unknown = [str(dim) for dim in result.dims if dim not in DIMS]
    assert not unknown, f"dims {unknown} are not in DIMS"
    for name, variable in result.data_vars.items():
        assert {"long_name", "units"} <= set(variable.attrs), f"{name} lacks its definition or its unit"
        base, _, ending = str(name).rpartition("_")
        assert name not in {*ENDINGS, "p_value", "q_value", "expected"}, f"{name} does not say of what it is"
        if ending in ENDINGS:
            assert base in result.variables, f"{name} stands beside no {base}"
        assert (f"{name}_low" in result) == (f"{name}_high" in result), f"{name} has half an interval"
    for dim, needed in (("layer", ("num_experts", "num_ids", "top_k")), ("domain", ("documents",))):
        if dim in result.dims:
            missing = [coordinate for coordinate in needed if coordinate not in result.coords]
            assert not missing, f"by {dim}, but without the coordinates {missing}"
    if "choice" in result.coords:
        choices = {str(choice) for choice in np.atleast_1d(result["choice"].values)}
        assert not choices & {"any", "either"}, f"choice holds {choices}: all choices together are called all"
