"""A model's configuration shrunk until a model of it is made in a moment: for rehearsing what the large one will do.

Convention: what decides how the model is built stays (kinds of layers and their order, heads, choices a token, shared
experts, groups, window, masks); widths are divided by one power of two, so that relations between them hold, and what
stands in none (inner widths of feed-forward blocks, vocabulary) becomes a small number.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

from moescope.engines.transformers.faults import CHOICES

MIN_LAYERS = 8
"""Enough for every period that layers of released models have."""

_VOCABULARY = 320
_INNER = 32
_EXPERTS = 16
_NULL_EXPERTS = 8
_NARROWEST_HEAD, _NARROWEST_ROTARY = 8, 4

_LAYER_COUNTS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer", "depth")
_CHUNKS = ("chunk_size", "mamba_chunk_size")  # of a scan, which pads to them
_GROUPS = ("n_group", "num_expert_group")
_WIDTH = re.compile(
    r"((?!\w*kernel)\w+_)?(hidden_size|hidden_dim|d_model|embed_dim|head_dim|d_head|rank|latent_size|kv_channels)"
    r"|n_embd|dim|hidden_size_\w+"
)
_INNER_WIDTH = re.compile(r"(\w+_)?(intermediate_size|ffn_hidden_size|ffn_dim|inner_dim|d_ff)(_\w+)?")
_VOCABULARY_SIZE = re.compile(r"(\w+_)?vocab_size(_\w+)?")
_NUM_EXPERTS = re.compile(r"(\w+_)?(n|num)_(local_|routed_)?experts")
_TOKEN_ID = re.compile(r"\w+_token_(id|index)")


def shrink(config: Any, num_layers: int = MIN_LAYERS) -> Any:
    """A copy of a configuration of transformers, shrunk to at most so many layers, the first ones.

    Returns:
        One of the same class, of a model small enough to be made, saved and run in a second or two.
    """
    small = copy.deepcopy(config)
    parts = list(_parts(small))
    factor = _factor(parts)
    for part in parts:
        _shrink_part(part, factor, num_layers)
    return small


def _factor(parts: Sequence[Any]) -> int:
    """The largest power of two that divides every width and leaves heads wide enough for their rotary embedding."""
    widths: list[tuple[int, int]] = []  # width and the least that may be left of it
    for part in parts:
        for name, value in _numbers(part):
            if _WIDTH.fullmatch(name) and value > 1:
                rotary, head = "rope" in name, "head" in name
                widths.append((value, _NARROWEST_ROTARY if rotary else _NARROWEST_HEAD if head else 1))
        hidden_size, num_heads = _number(part, "hidden_size"), _number(part, "num_attention_heads")
        if hidden_size and num_heads and "head_dim" not in dict(_numbers(part)):
            widths.append((hidden_size // num_heads, _NARROWEST_HEAD))
    factor = 1
    while widths and all(_divides(2 * factor, width, least) for width, least in widths):
        factor *= 2
    return factor


def _divides(factor: int, width: int, least: int) -> bool:
    """Whether enough is left of a width; a head stays even, for its rotary embedding pairs its numbers."""
    rest, remainder = divmod(width, factor)
    return remainder == 0 and rest >= least and (least == 1 or rest % 2 == 0)


def _shrink_part(part: Any, factor: int, num_layers: int) -> None:
    counts = {value for name, value in _numbers(part) if name in _LAYER_COUNTS}
    for name, value in list(_numbers(part)):
        if name in _LAYER_COUNTS:
            setattr(part, name, min(value, num_layers))
        elif _VOCABULARY_SIZE.fullmatch(name):
            setattr(part, name, min(value, _VOCABULARY))
        elif _NUM_EXPERTS.fullmatch(name) and value > 1:
            setattr(part, name, _num_experts(part, value))
        elif name == "zero_expert_num":
            setattr(part, name, min(value, _NULL_EXPERTS))
        elif _INNER_WIDTH.fullmatch(name) or name in _CHUNKS:
            setattr(part, name, min(value, _INNER))
        elif _WIDTH.fullmatch(name) and value > 1:
            setattr(part, name, value // factor)
        elif _TOKEN_ID.fullmatch(name) and value >= _VOCABULARY:
            setattr(part, name, _VOCABULARY - 1)
    for name, value in list(_fields(part)):
        if isinstance(value, list | tuple) and (len(value) in counts or name == "layers_block_type"):
            setattr(part, name, value[:num_layers])
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            setattr(part, name, _shrink_sections(value, factor))


def _shrink_sections(rope: dict[str, Any], factor: int) -> dict[str, Any]:
    """Rotary parameters whose sections, which add up to half a head, are shrunk like it."""
    return {
        name: [section // factor for section in value]
        if name.endswith("_section") and isinstance(value, list)
        else _shrink_sections(value, factor)
        if isinstance(value, dict)
        else value
        for name, value in rope.items()
    }


def _num_experts(part: Any, value: int) -> int:
    """Enough for the choices of a token and two in each group, a multiple of the groups."""
    groups = max((number for name, number in _numbers(part) if name in _GROUPS), default=1) or 1
    chosen = max((number for name, number in _numbers(part) if name in CHOICES), default=1)
    wanted = max(_EXPERTS, 2 * chosen, 2 * groups)
    return min(value, -(-wanted // groups) * groups)


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _parts(value)


def _number(part: Any, name: str) -> int | None:
    """A number under its common name, whatever the family's own; None if there is not the one of it."""
    try:
        value = getattr(part, name, None)
    except Exception:  # transformers raises where it differs from layer to layer
        return None
    return value if isinstance(value, int) else None


def _fields(part: Any) -> Iterator[tuple[str, Any]]:
    yield from ((name, value) for name, value in list(vars(part).items()) if not name.startswith("_"))


def _numbers(part: Any) -> Iterator[tuple[str, int]]:
    for name, value in _fields(part):
        if isinstance(value, int) and not isinstance(value, bool):
            yield name, value
