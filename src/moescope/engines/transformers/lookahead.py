"""Lookahead: which experts the routers of later layers would choose from what the router of this layer reads.

Unit: a ranked list of predicted experts a token, layer and distance. Convention: distance a counts the layers recorded,
which are all with routed experts unless some were selected; dense layers do not count. The router of layer l + a gets,
unchanged, what the router of layer l was called with: the hidden states that went through the norm of layer l. That is
what a server has in hand when it can start to load, and what Eliseev and Mazur 2023 (arXiv 2312.17238) do; the norm of
layer l + a is not applied, because some families have it inside the router and some before it.

A router is the module that gives the very ids that reach the experts. It is run by its ``forward``, so no hook on it
sees the run, and only if the hidden states are all that it is called with. The model's own pass is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moescope.engines.transformers.adapters import Read
from moescope.engines.transformers.hooks import RouterWatch, ranked, tensors_in
from moescope.engines.transformers.replacing import attribute_set
from moescope.engines.transformers.routers import Experts, check_call, layer_index
from moescope.errors import ModelUnsupported, NoSuchLayer, RouterSilent
from moescope.trace import Layer

FEWEST_PREDICTED = 8
"""Experts predicted a token, if the layer has as many: all of Mixtral's; twice the top-k where that is more."""

_TOP_K = ("top_k", "num_experts_per_tok")
"""Attributes of routers that say how many experts to choose."""

_CONSTANTS = (type(None), bool, int, float, str)
"""Types of arguments that do not depend on the tokens."""

_HINT = "record without --lookahead; `moescope prefetch` then compares the predictors that need no hidden states"


@dataclass(frozen=True)
class LoneRouter:
    """The router of a layer, to be run by itself.

    Attributes:
        experts: Its layer.
        module: The router.
        place: Where the hidden states stand among its arguments: a position, or a name.
        args: Positional arguments beside them, such as a bias that its block keeps; what stands in their place is old.
        kwargs: Named ones.
        alone: Whether nothing else depends on the tokens, so that it can be run from other hidden states.
        read: From its arguments and output, chosen ids and what they rank by, each of shape (token, choice).
        num_predicted: Length of its list: top-k, or more if it can be made to choose more.
        top_k: Attribute that says how many it chooses; empty if it cannot be made to choose more.
    """

    experts: Experts
    module: nn.Module
    place: int | str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    alone: bool
    read: Read
    num_predicted: int
    top_k: str = ""

    def predict(self, hidden: Tensor) -> Tensor:
        """The experts that it would choose from these hidden states, shape (token, predicted).

        First those of its own top-k, by falling weight; then those that it would add with a top-k of `num_predicted`.
        """
        chosen = self._ranked(hidden)
        further = self.num_predicted - chosen.shape[1]
        if further < 1:
            return chosen
        with attribute_set(self.module, self.top_k, self.num_predicted):
            more = self._ranked(hidden)
        known = (more[:, :, None] == chosen[:, None, :]).any(dim=2)
        new = known.to(torch.uint8).argsort(dim=1, stable=True)[:, :further]
        return torch.cat([chosen, more.gather(1, new)], dim=1)

    def _ranked(self, hidden: Tensor) -> Tensor:
        args = tuple(hidden if place == self.place else value for place, value in enumerate(self.args))
        kwargs = {name: hidden if name == self.place else value for name, value in self.kwargs.items()}
        output = self.module.forward(*args, **kwargs)
        return ranked(*check_call(self.experts, *self.read(args, kwargs, output)))[0]


class Lookahead:
    """Predicts, during a forward pass, from each layer's hidden states the choices of layers after it.

    Args:
        routers: By layer.
        targets: The layer to predict from, the distance and the layer to predict, of each prediction.
    """

    def __init__(self, routers: Mapping[int, LoneRouter], targets: Sequence[tuple[int, int, int]]) -> None:
        self.routers, self.targets = routers, targets
        self._predicted: dict[tuple[int, int], Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Lookahead:
        for layer in {source for source, _, _ in self.targets}:
            module = self.routers[layer].module
            self._handles.append(module.register_forward_pre_hook(self._predict(layer), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._predicted.clear()

    def take(self, num_tokens: int) -> dict[int, dict[int, NDArray[np.int16]]]:
        """What was predicted since the last call: for each layer and distance ids of shape (token, predicted).

        Raises:
            RouterSilent: A router was passed by, or not called with every token.
            ModelUnsupported: An id is none of the layer's.
        """
        predictions, self._predicted = self._predicted, {}
        taken: dict[int, dict[int, NDArray[np.int16]]] = {}
        for source, distance, target in self.targets:
            router = self.routers[target]
            ids = predictions.get((target, distance))
            if ids is None or ids.shape != (num_tokens, router.num_predicted):
                raise RouterSilent(
                    f"layer {source}",
                    f"its router gave {'nothing' if ids is None else tuple(ids.shape)} to predict layer {target} "
                    f"from, expected {num_tokens} rows",
                    "an implementation or kernel may bypass the module; load the model without it",
                )
            predicted = ids.to(torch.int16).cpu().numpy()
            limit = router.experts.num_experts + router.experts.num_null_experts
            if predicted.min() < 0 or predicted.max() >= limit:
                raise ModelUnsupported(
                    router.experts.name, f"predicts experts outside 0..{limit - 1}: {predicted.max()}", _HINT
                )
            taken.setdefault(target, {})[distance] = predicted
        return taken

    def described(self, layers: Sequence[Layer]) -> tuple[Layer, ...]:
        """The layers of a header, with what is predicted of each."""
        distances: dict[int, list[int]] = {}
        for _, distance, target in self.targets:
            distances.setdefault(target, []).append(distance)
        return tuple(
            replace(layer, lookahead=tuple(sorted(ahead)), num_predicted=self.routers[layer.layer].num_predicted)
            if (ahead := distances.get(layer.layer))
            else layer
            for layer in layers
        )

    def _predict(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        router = self.routers[layer]

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[router.place] if isinstance(router.place, int) else kwargs[router.place]
            for source, distance, target in self.targets:
                if source == layer:
                    self._predicted[target, distance] = _run(self.routers[target], hidden, layer)

        return before


def check_distances(distances: Sequence[int], num_layers: int, subject: object) -> tuple[int, ...]:
    """The distances, ascending, if they fit the number of layers to record.

    Raises:
        ValueError: One is no whole number from 1.
        NoSuchLayer: No two of the layers are so far apart.
    """
    if not all(type(distance) is int and distance >= 1 for distance in distances):
        raise ValueError(f"distances to look ahead are whole numbers from 1, not {tuple(distances)}")
    if distances and max(distances) >= num_layers:
        most = f"distances go up to {num_layers - 1}" if num_layers > 1 else "there is no layer to look ahead to"
        raise NoSuchLayer(
            subject, f"cannot look {max(distances)} layers ahead: {num_layers} with routed experts are recorded; {most}"
        )
    return tuple(sorted(set(distances)))


def find_lookahead(
    body: Any, experts: Sequence[Experts], distances: Sequence[int], inputs: Mapping[str, Tensor], subject: object
) -> Lookahead:
    """Find the routers of a model, and make sure, on a few tokens, that they can be run by themselves.

    The experts are those of the layers to record, ascending, the distances as `check_distances` returned them, and the
    inputs ``input_ids`` of a few tokens, shape (1, token).

    Raises:
        ModelUnsupported: A router is no module of its own, needs more than hidden states, or does not repeat itself.
    """
    family = str(getattr(getattr(body, "config", None), "model_type", None) or "the model")
    with _Finder(body, experts) as finder:
        finder.run(body, inputs)
    kept = {id(tensor) for tensors in (body.parameters(), body.buffers()) for tensor in tensors}
    routers = {block.layer: _router(block, finder, kept, f"{subject} ({family})") for block in experts}
    targets = [
        (block.layer, distance, experts[place + distance].layer)
        for place, block in enumerate(experts)
        for distance in distances
        if place + distance < len(experts)
    ]
    for source, _, target in targets:
        if not routers[target].alone:
            raise ModelUnsupported(
                f"{subject} ({family})",
                f"the router of layer {target} is called with more than hidden states and cannot be asked earlier",
                _HINT,
            )
        _run(routers[target], finder.hidden[source], source)
    return Lookahead(routers, targets)


def _run(router: LoneRouter, hidden: Tensor, source: int) -> Tensor:
    try:
        with torch.no_grad():
            return router.predict(hidden)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelUnsupported(
            router.experts.name,
            f"the router of layer {router.experts.layer} cannot read what that of layer {source} reads: {error!r}",
            _HINT,
        ) from error


class _Seen(NamedTuple):
    """One call of a module during the search."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class _Finder(RouterWatch):
    """Watches, by layer, the calls of every module until the experts are called, and what these are called with."""

    def __init__(self, body: Any, experts: Sequence[Experts]) -> None:
        super().__init__(experts)
        self.body = body
        self.calls: dict[int, list[_Seen]] = {block.layer: [] for block in experts}
        self.chosen: dict[int, tuple[Tensor, Tensor]] = {}
        self.hidden: dict[int, Tensor] = {}

    def __enter__(self) -> _Finder:
        for experts in self.experts:
            index = layer_index(experts.name)
            block = f"{experts.name[: index.end(1)]}." if index is not None else ""
            own = f"{experts.name}."
            see = self._see(experts.layer)
            for name, module in self.body.named_modules():
                if name.startswith(block) and (module is experts.router or not f"{name}.".startswith(own)):
                    self.undo.callback(module.register_forward_hook(see, with_kwargs=True).remove)
        super().__enter__()
        return self

    def _see(self, layer: int) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if layer not in self.chosen:
                self.calls[layer].append(_Seen(module, args, kwargs, output))

        return after

    def note(self, experts: Experts) -> Callable[[Tensor, Tensor], None]:
        note = super().note(experts)

        def tell(ids: Tensor, weights: Tensor) -> None:
            self.chosen[experts.layer] = ids, weights
            note(ids, weights)

        return tell


def _router(experts: Experts, finder: _Finder, kept: set[int], subject: str) -> LoneRouter:
    """The router of a layer, as the search saw it; `kept` are the identities of the model's own tensors."""
    calls, (ids, weights) = finder.calls[experts.layer], finder.chosen[experts.layer]
    giving = None if experts.drops or experts.in_decoder else _giver(experts, calls, ids, weights)
    if giving is None:
        reason = "capacity drops assignments" if experts.drops else "no module gives the ids that reach its experts"
        raise ModelUnsupported(
            subject, f"layer {experts.layer} cannot be predicted from another one's hidden states: {reason}", _HINT
        )
    call, read = giving
    named: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    given = {place: value for place, value in named if not isinstance(value, _CONSTANTS) and id(value) not in kept}
    place = next(
        (name for name, value in given.items() if isinstance(value, Tensor) and value.is_floating_point()), None
    )
    if place is None:
        raise ModelUnsupported(subject, f"the router of layer {experts.layer} is not called with hidden states", _HINT)
    alone = len(given) == 1
    router = LoneRouter(experts, call.module, place, call.args, call.kwargs, alone, read, ids.shape[1])
    hidden = finder.hidden[experts.layer] = given[place]
    if not alone:
        return router
    own = _run(router, hidden, experts.layer)
    if not own.sort(dim=1).values.equal(ids.sort(dim=1).values):
        raise ModelUnsupported(subject, f"the router of layer {experts.layer} chooses otherwise when run again", _HINT)
    return _longer(router, hidden)


def _giver(experts: Experts, calls: Sequence[_Seen], ids: Tensor, weights: Tensor) -> tuple[_Seen, Read] | None:
    """The call that gave the ids, and how to read them from its output."""
    if experts.called is None:
        call = next((call for call in reversed(calls) if call.module is experts.router), None)
        return None if call is None else (call, experts.read)
    num_choices = ids.shape[1]
    for call in calls:
        given = list(tensors_in(call.output))
        index = next((index for index, tensor in enumerate(given) if _same(tensor, ids)), None)
        if index is None:
            continue
        alike = [tensor.is_floating_point() and tensor.numel() == ids.numel() for tensor in given]
        equal = [fits and _same(tensor, weights) for fits, tensor in zip(alike, given, strict=True)]
        rank_index = equal.index(True) if any(equal) else alike.index(True) if any(alike) else None

        return call, _reader(index, rank_index, num_choices)
    return None


def _reader(index: int, rank_index: int | None, num_choices: int) -> Read:
    """Reads the ids, and what they rank by, from two places of an output; without the latter they keep their order."""

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
        given = list(tensors_in(output))
        width = given[index].shape[-1] if given[index].dim() > 1 else num_choices
        ids = given[index].reshape(-1, width)
        if rank_index is None:
            return ids, torch.arange(width, 0, -1.0, device=ids.device).expand(len(ids), width)
        return ids, given[rank_index].reshape(-1, width)

    return read


def _longer(router: LoneRouter, hidden: Tensor) -> LoneRouter:
    """The same router, with a longer list if it can be made to choose more; its own choices come first either way."""
    top_k, limit = router.num_predicted, router.experts.num_experts + router.experts.num_null_experts
    wanted = min(limit, max(2 * top_k, FEWEST_PREDICTED))
    name = next((name for name in _TOP_K if getattr(router.module, name, None) == top_k), "")
    if wanted == top_k or not name or router.experts.called is None:
        return router
    longer = replace(router, num_predicted=wanted, top_k=name)
    try:
        with torch.no_grad():
            ids = longer.predict(hidden)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError, ModelUnsupported):
        return router
    distinct = ids.sort(dim=1).values.diff(dim=1).ne(0).all()
    return longer if ids.shape[1] == wanted and bool(distinct) else router


def _same(given: Tensor, received: Tensor) -> bool:
    """Whether a tensor holds what was received, in the same order."""
    return (
        given.numel() == received.numel()
        and given.dtype == received.dtype
        and given.device == received.device
        and given.reshape(received.shape).equal(received)
    )
