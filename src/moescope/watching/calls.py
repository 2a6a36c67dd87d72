"""What a stack of layers is called with: which tokens of the batch are real, and where sequences start.

Unit: one `Call` a forward pass. Convention: everything stays on the device of the model; nothing here waits for it,
except where a cache keeps its length there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moescope.engines.transformers.routers import Experts, forward_parameters
from moescope.errors import ModelUnsupported

_CACHES = ("past_key_values", "past_key_value", "cache_params")
_TOKENS = ("input_ids", "inputs_embeds")


@dataclass(frozen=True)
class Stack:
    """The innermost module that reads whole sequences and holds some layers; most models have one.

    Attributes:
        name: Path of the module in the model.
        module: The module.
        places: Places of its layers among the experts watched.
    """

    name: str
    module: nn.Module
    places: tuple[int, ...]


def find_stacks(model: nn.Module, experts: Sequence[Experts]) -> tuple[Stack, ...]:
    """The stacks that hold the experts: for each the nearest ancestor that takes ``input_ids``, else the model."""
    places: dict[str, list[int]] = {}
    for place, block in enumerate(experts):
        name = block.name
        while name:
            name = name.rpartition(".")[0]
            if "input_ids" in forward_parameters(model.get_submodule(name)):
                break
        places.setdefault(name, []).append(place)
    return tuple(Stack(name, model.get_submodule(name), tuple(members)) for name, members in places.items())


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a stack.

    Attributes:
        subject: What errors call the stack.
        input_ids: Token ids, shape (sequence, token); None if the stack is given embeddings.
        shape: (sequences, tokens) of the batch.
        attention_mask: As given.
        position_ids: Position of each token in its sequence, shape (sequence, token) or (1, token); None if not given.
        boundaries: Where packed sequences start and the last one ends, shape (sequence + 1,); None if not given.
        cache: The cache of keys and values; None if there is none.
    """

    subject: str
    input_ids: Tensor | None
    shape: tuple[int, int]
    attention_mask: Any
    position_ids: Tensor | None
    boundaries: Tensor | None
    cache: Any

    @classmethod
    def read(cls, stack: Stack, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Read the arguments of a call.

        Raises:
            ModelUnsupported: None of them has the shape of a batch of tokens.
        """
        given = {**dict(zip(forward_parameters(stack.module), args, strict=False)), **kwargs}
        subject = stack.name or type(stack.module).__name__
        tokens = [given.get(name) for name in _TOKENS] + list(given.values())
        batch = next((tensor for tensor in tokens if isinstance(tensor, Tensor) and tensor.dim() >= 2), None)
        if batch is None:
            raise ModelUnsupported(subject, "is called without a tensor of shape (sequence, token, …)")
        ids, positions = given.get("input_ids"), given.get("position_ids")
        shape = int(batch.shape[0]), int(batch.shape[1])
        fits = isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == shape[1]
        caches = (given.get(name) for name in _CACHES)
        return cls(
            subject=subject,
            input_ids=ids if isinstance(ids, Tensor) else None,
            shape=shape,
            attention_mask=given.get("attention_mask"),
            position_ids=positions if fits else None,
            boundaries=given.get("cu_seq_lens_q"),
            cache=next((cache for cache in caches if cache is not None), None),
        )

    def past(self) -> int:
        """Tokens of each sequence that the cache already holds, padding included.

        Raises:
            ModelUnsupported: The cache does not tell.
        """
        if self.cache is None:
            return 0
        length: Callable[[], Any] | None = getattr(self.cache, "get_seq_length", None)
        if length is not None:
            return int(length())
        if isinstance(self.attention_mask, Tensor) and self.attention_mask.dim() == 2:
            return int(self.attention_mask.shape[1]) - self.shape[1]
        raise ModelUnsupported(self.subject, f"its cache, a {type(self.cache).__name__}, does not say how long it is")

    def real(self) -> Tensor | None:
        """Which tokens are no padding, shape (sequence, token); None if all are real.

        Raises:
            ModelUnsupported: The attention mask does not tell.
        """
        mask = self.attention_mask
        if isinstance(mask, Mapping):  # prepared masks by kind of layer
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if mask is None:
            return None
        num_sequences, num_tokens = self.shape
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == num_sequences:
            if mask.shape[1] >= num_tokens:
                return mask[:, -num_tokens:] != 0
        elif num_tokens == 1 and self.cache is not None:
            return None  # a prepared mask of one step: the token of a step is real
        elif isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-2] == num_tokens:
            past = self.past()
            if mask.shape[-1] >= past + num_tokens:  # a real token attends to itself, padding is attended by none
                itself = mask[:, 0].diagonal(past, -2, -1)[:, :num_tokens]
                real = itself if itself.dtype == torch.bool else itself == 0
                return real.expand(num_sequences, num_tokens)
        given = f"{type(mask).__name__} {tuple(getattr(mask, 'shape', ()))}"
        raise ModelUnsupported(
            self.subject,
            f"its attention mask, {given}, does not tell which of {self.shape} tokens are padding",
            "give a mask of shape (sequence, token), or none where nothing is padded",
        )

    def starts(self, real: Tensor | None) -> Tensor:
        """Where sequences start, for a call without a past: true at their first tokens, shape (sequence, token).

        A row is one sequence, unless `position_ids` do not grow from one of its tokens to the next or `boundaries`
        say that it is packed of several.
        """
        given = (self.input_ids, real, self.position_ids, self.boundaries)
        device = next((tensor.device for tensor in given if tensor is not None), torch.device("cpu"))
        starts = torch.zeros(self.shape, dtype=torch.bool, device=device)
        if real is None:
            starts[:, 0] = True
        else:
            starts |= real & (real.cumsum(1) == 1)
        if self.position_ids is not None:
            restarts = (self.position_ids[:, 1:] <= self.position_ids[:, :-1]).expand(self.shape[0], -1).to(device)
            starts[:, 1:] |= restarts if real is None else restarts & real[:, 1:] & real[:, :-1]
        if self.boundaries is not None and self.shape[0] == 1:
            flags = torch.zeros(self.shape[1] + 1, dtype=torch.bool, device=device)
            flags[self.boundaries.long().to(device)] = True
            starts |= flags[:-1] if real is None else flags[:-1] & real
        return starts

    def added(self, starts: Tensor, added_ids: Sequence[int]) -> Tensor | None:
        """Which tokens are those that the tokenizer puts in front, shape (sequence, token); None if none can be."""
        length = len(added_ids)
        if not length or self.input_ids is None or self.shape[1] < length:
            return None
        hits = starts.clone()
        for offset, token_id in enumerate(added_ids):
            same = self.input_ids == token_id
            hits[:, : self.shape[1] - offset] &= same[:, offset:]
            hits[:, self.shape[1] - offset :] = False
        added = hits.clone()
        for offset in range(1, length):
            added[:, offset:] |= hits[:, :-offset]
        return added


@dataclass
class Pass:
    """One forward pass of a stack.

    Attributes:
        call: What it is called with.
        counted: Which tokens count, shape (sequence, token); None for all.
        past: Tokens in the cache before; None if nobody asked.
        starts: Where sequences start, shape (sequence, token); None if nobody asked.
        counts: Assignments by device, as `LiveTally.count` keeps them.
        chosen: For each layer that has chosen, by place, its ranked choices if a trace wants them.
    """

    call: Call
    counted: Tensor | None
    past: int | None
    starts: Tensor | None
    counts: dict[torch.device, Tensor] = field(default_factory=dict)
    chosen: dict[int, tuple[Tensor, Tensor] | None] = field(default_factory=dict)
    _flat: dict[torch.device, Tensor] = field(default_factory=dict)

    def counted_on(self, device: torch.device) -> Tensor | None:
        """Which tokens count, shape (sequence x token,), on a device."""
        if self.counted is None:
            return None
        if device not in self._flat:
            self._flat[device] = self.counted.reshape(-1).to(device)
        return self._flat[device]
