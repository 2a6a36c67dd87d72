"""Adapters: how to read the routed blocks that are not called with chosen ids and gate weights as the others are.

Unit: one `Reading` a routed block. Convention: what is read is what the block **acts** on: the arguments of its
experts, or the very output of its router that it uses. A block is known by the name of its class, so it is read
wherever it stands. What an adapter finds must have the shape it was written for; another version of transformers may
give something else, and then the block is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moescope.engines.transformers.batches import Batching
from moescope.trace.columns import DROPPED

Read = Callable[[tuple[Any, ...], Mapping[str, Any], Any], tuple[Any, Any]]
"""From positional arguments, named ones and an output (or None), ids and gate weights, each (token, choice)."""


@dataclass(frozen=True)
class Reading:
    """How a routed block shows what it chose.

    Attributes:
        read: From arguments and output, the chosen ids and their gate weights, each of shape (token, choice).
        called: The module whose arguments tell; None if the router's output alone does.
        router: The module whose output shows it; None if the arguments alone do.
        num_experts: Routed experts.
        num_null_experts: Ids after the routed ones that run no expert.
        num_shared_experts: Experts inside the block that always run, where nothing else shows them.
        drops: Whether capacity may drop assignments; their id is -1 and their weight 0.
        batching: ``padded`` if padding after a sequence changes no choice; ``equal`` if sequences may go together but
            not be padded; ``alone`` if a token's choices depend on all that is in the batch.
        holder: Where in the block the experts are.
        block: ``mlp`` or ``attention``: what the experts replace.
        says: What is recorded, for the table of models.
        warning: What the user must know before trusting the numbers.
    """

    read: Read
    called: nn.Module | None
    router: nn.Module | None
    num_experts: int
    num_null_experts: int = 0
    num_shared_experts: int = 0
    drops: bool = False
    batching: Batching = "padded"
    holder: str = ""
    block: str = "mlp"
    says: str = ""
    warning: str = ""


def find_adapter(module: nn.Module) -> Reading | None:
    """The reading of a block that has an adapter; None for every other module.

    Raises:
        ValueError: The block has an adapter that was written for another version of it.
    """
    for kind in type(module).__mro__:
        if (adapter := ADAPTERS.get(kind.__name__)) is not None:
            return adapter(module)
    return None


def _llama4(block: Any) -> Reading:
    """Every expert runs on every token, its input scaled by the router's scores, which are 0 where it is not chosen."""
    top_k = block.router.top_k

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Any, Any]:
        scores, logits = output
        # A chosen score may underflow to 0 in half precision; the router's own top-k says which those are.
        ids = logits.topk(top_k, dim=1).indices
        weights = scores.gather(1, ids)
        if scores.count_nonzero() != weights.count_nonzero():
            raise ValueError("the router scores experts that are not among its top k")
        return ids, weights

    return Reading(
        read, None, block.router, block.num_experts,
        holder="experts", says="the experts with a score; the weight scales the expert's input",
    )  # fmt: skip


def _jetmoe(block: Any) -> Reading:
    """The router returns assignments sorted by expert: the place of each before sorting, gates, and loads."""
    top_k, num_experts = block.router.top_k, block.router.num_experts

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Any, Any]:
        places, _, gates, loads, _ = output
        loads = torch.as_tensor(loads, device=places.device)
        sorted_ids = torch.arange(num_experts, device=places.device).repeat_interleave(loads)
        ids, weights = torch.empty_like(places), torch.empty_like(gates)
        ids[places], weights[places] = sorted_ids, gates
        return ids.view(-1, top_k), weights.view(-1, top_k)

    return Reading(
        read, None, block.router, num_experts, says="the dispatch by expert, put back in the order of tokens"
    )


def _jetmoe_attention(block: Any) -> Reading:
    """The same router over pairs of query and output projections."""
    return replace(_jetmoe(block), block="attention")


def _switch(experts: Any) -> Reading:
    """The experts get a one-hot mask a token, empty where the expert was over its capacity."""

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Any, Any]:
        mask, weights = _arguments(args, kwargs, "selected_experts", "routing_weights")
        kept = mask.sum(dim=-1) > 0
        return mask.argmax(dim=-1).where(kept, DROPPED), weights.where(kept, 0)

    return Reading(
        read, experts, None, experts.num_experts,
        drops=True, batching="equal", says="the mask that reaches the experts; over capacity is dropped",
    )  # fmt: skip


def _nllb(experts: Any) -> Reading:
    """The experts take the router's mask for ids: 1 runs expert 1, each 0 runs expert 0, with the gate found there.

    So the first choice runs expert 1 and the second one expert 0, whichever were chosen (seen in transformers 5.23).
    """
    if "one_hot(router_mask" not in inspect.getsource(type(experts).forward):
        raise ValueError("this version of transformers dispatches to its experts in another way")

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Any, Any]:
        mask, gates = _arguments(args, kwargs, "router_mask", "router_probs")
        weights = torch.stack([(gates * (mask == 1)).sum(dim=1), (gates * (mask == 0)).sum(dim=1)], dim=1)
        return torch.tensor([1, 0], device=mask.device).expand(len(mask), 2).where(weights > 0, DROPPED), weights

    return Reading(
        read, experts, None, experts.num_experts,
        drops=True, batching="alone", says="the mask that reaches the experts, as it is executed",
        warning="transformers runs expert 1 for every first choice of an NLLB-MoE model and expert 0 for every second, "
        "whichever experts its router chose; what is recorded is what ran, not what the model was trained to do",
    )  # fmt: skip


def _doge(block: Any) -> Reading:
    """The ids look up the experts' vectors; their scores are sums of two of the logits that the router gave."""
    num_keys = block.num_keys

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Any, Any]:
        (ids,) = args
        first, second = output.view(2, len(ids), num_keys)  # as the block does: it mixes the logits of the tokens
        weights = (first.gather(1, ids // num_keys) + second.gather(1, ids % num_keys)).softmax(dim=-1)
        return ids, weights / weights.sum(dim=-1, keepdim=True) if block.norm_topk_prob else weights

    return Reading(
        read, block.down_embed, block.router_gate, block.num_experts,
        num_shared_experts=1, batching="alone", says="the ids that look up the experts' vectors",
    )  # fmt: skip


def _zaya(experts: Any) -> Reading:
    """The skip expert, id E of the router, reaches the experts as expert 0 with weight 0; it is given its id back."""
    num_experts = experts.num_experts

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Any, Any]:
        ids, weights = _arguments(args, kwargs, "top_k_index", "top_k_weights")
        return ids.masked_fill((ids == 0) & (weights == 0), num_experts), weights

    return Reading(
        read, experts, None, num_experts,
        num_null_experts=1, says="arguments of the experts; expert 0 with weight 0 is the skip expert",
    )  # fmt: skip


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any], ids: str, weights: str) -> tuple[Tensor, Tensor]:
    """The second and third arguments of an experts module, by place or by name."""
    return args[1] if len(args) > 1 else kwargs[ids], args[2] if len(args) > 2 else kwargs[weights]


ADAPTERS: dict[str, Callable[[Any], Reading]] = {
    "DogeCDMoE": _doge,
    "JetMoeMoA": _jetmoe_attention,
    "JetMoeMoE": _jetmoe,
    "Llama4TextMoe": _llama4,
    "NllbMoeExperts": _nllb,
    "SwitchTransformersExperts": _switch,
    "ZayaExperts": _zaya,
}
"""By the name of a block's class, or of its experts', the reading of one."""
