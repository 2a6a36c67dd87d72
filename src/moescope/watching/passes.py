"""Forward passes of a model that somebody else runs: hooks, and what they count and record of each pass.

Unit: one `Pass` of a stack of layers. What a pass adds counts once it has come to its end; one that an exception ends
is forgotten.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from moescope.engines.transformers.hooks import listen, ranked
from moescope.engines.transformers.routers import Experts
from moescope.errors import RouterSilent
from moescope.watching.calls import Call, Pass, Stack
from moescope.watching.compiling import noticed_by_dynamo, teller
from moescope.watching.generating import Generation, generate_announced
from moescope.watching.live import LiveTally
from moescope.watching.output import TraceOutput
from moescope.watching.sequences import Sequences

BYPASSED = (
    "was the model compiled, or captured in a graph, so that the hooks are passed by? Enter `moescope.watch` before "
    "the first call of the compiled model, or call torch.compiler.reset() first"
)


class Passes:
    """Follows the forward passes of a model, out of its wrappers, while its ``with`` block lasts.

    What the layers choose is counted and, if there is an output, recorded; ids added in front of a text are not.

    Attributes:
        paused: Whether nothing is counted now.
        seen: Whether a forward pass has begun.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        stacks: Sequence[Stack],
        experts: Sequence[Experts],
        tally: LiveTally,
        output: TraceOutput | None,
        added_ids: Sequence[int],
    ) -> None:
        self._model, self._name, self._stacks, self._experts = model, name, stacks, experts
        self._tally, self._output, self._added_ids = tally, output, added_ids
        self._stack_of = {place: stack for stack in stacks for place in stack.places}
        # By thread: DataParallel runs its replicas in threads, and a server may generate in several.
        self._open = threading.local()
        self._generations = threading.local()
        self._undo = ExitStack()
        self.paused = self.seen = False

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            for stack in self._stacks:
                undo.enter_context(noticed_by_dynamo(stack.module))
                before, after = self._stack_hooks(stack)
                undo.callback(stack.module.register_forward_pre_hook(before, with_kwargs=True).remove)
                undo.callback(stack.module.register_forward_hook(after).remove)
            for place, experts in enumerate(self._experts):
                for module in (experts.called, experts.router):
                    if module is not None:
                        undo.enter_context(noticed_by_dynamo(module))
                for handle in listen(experts, teller(self, place, device_of(experts.module))):
                    undo.callback(handle.remove)
            undo.enter_context(generate_announced(self._model, self.generating))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        self._open = threading.local()

    def begin(self, stack: Stack, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins; one that an exception ended before is forgotten."""
        self.seen = True
        self._open.__dict__[stack.name] = None if self.paused else self._prepare(Call.read(stack, args, kwargs))

    def note(self, place: int, ids: Tensor, weights: Tensor) -> None:
        """A layer has chosen."""
        if _in_backward():
            return  # gradient checkpointing runs the layer again
        experts, stack = self._experts[place], self._stack_of[place]
        if stack.name not in self._open.__dict__:
            raise RouterSilent(
                f"layer {experts.layer}",
                f"{experts.name} was called outside a forward pass of {stack.name or self._name}",
                f"call the model and not its layers one by one; {BYPASSED}",
            )
        current: Pass | None = self._open.__dict__[stack.name]
        if current is None:
            return
        num_tokens = current.call.shape[0] * current.call.shape[1]
        if place in current.chosen or ids.shape[0] != num_tokens:
            raise RouterSilent(
                f"layer {experts.layer}",
                f"{experts.name} was called {1 + (place in current.chosen)} times, now with {ids.shape[0]} rows, "
                f"expected once with {num_tokens}",
            )
        with torch.inference_mode(False), torch.no_grad():
            current.chosen[place] = ranked(ids, weights.detach()) if self._output is not None else None
            self._tally.count(current.counts, place, ids, weights, current.counted_on(ids.device))

    def end(self, stack: Stack, output: Any) -> None:
        """A forward pass has come to its end: what it counted, counts."""
        current: Pass | None = self._open.__dict__.pop(stack.name, None)
        if current is None:
            return
        for place in stack.places:
            if place not in current.chosen:
                raise RouterSilent(
                    f"layer {self._experts[place].layer}",
                    f"{self._experts[place].name} was not called in a forward pass of {stack.name or self._name}",
                    f"an experts implementation or kernel may go around the module; {BYPASSED}",
                )
        if self._output is not None:
            choices = [choice for place in stack.places if (choice := current.chosen[place]) is not None]
            self._output.add(current, choices, _cache_of(output, current.call.cache), self._generation)
        self._tally.commit(current.counts)
        if self._output is not None:
            self._output.update(Sequences.settle)

    @contextmanager
    def generating(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """``generate`` runs in this block."""
        generation = Generation.read(model, args, kwargs)
        if self._output is not None and not self.paused and generation.unlike is not None:
            raise ValueError(
                f"generate with {generation.unlike} cannot be followed in a trace: it reads tokens that are thrown "
                "away, or the same ones again; generate without it, or watch without a trace, which counts all that "
                "runs"
            )
        before, self._generations.now = self._generation, generation
        whole = False
        try:
            yield
            whole = True
        finally:
            self._generations.now = before
            if self._output is not None:
                self._output.update(lambda sequences: sequences.end_generation(generation, whole=whole))

    @property
    def _generation(self) -> Generation | None:
        """The call of ``generate`` that runs in this thread."""
        return getattr(self._generations, "now", None)

    def _stack_hooks(self, stack: Stack) -> tuple[Callable[..., None], Callable[..., None]]:
        """What runs before and after a stack; never inside a compiled graph, which breaks there."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not _in_backward():
                with torch.inference_mode(False), torch.no_grad():
                    self.begin(stack, args, kwargs)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not _in_backward():
                with torch.inference_mode(False), torch.no_grad():
                    self.end(stack, output)

        return torch.compiler.disable(before), torch.compiler.disable(after)  # type: ignore[no-untyped-call]

    def _prepare(self, call: Call) -> Pass:
        counted = call.real()
        past, starts = None, None
        if self._output is not None or self._added_ids:
            past = call.past()
            starts = call.starts(counted)
            added = call.added(starts, self._added_ids) if past == 0 else None
            if added is not None:
                counted = ~added if counted is None else counted & ~added
        if self._generation is not None:
            running = self._generation.running(call)
            if running is not None:
                counted = running if counted is None else counted & running
        return Pass(call, counted, past, starts)


def _cache_of(output: Any, given: Any) -> Any:
    """The cache that holds what was read: the one given, else the one in the output."""
    if given is not None:
        return given
    if isinstance(output, tuple):
        return next((item for item in output if hasattr(item, "get_seq_length")), None)
    return getattr(output, "past_key_values", None)


def device_of(module: nn.Module) -> torch.device:
    """Where a module is; for weights that accelerate moves about, any real device will do."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.device.type == "meta" else parameter.device


def _in_backward() -> bool:
    """Whether autograd is at work in this thread: whatever layer runs now, gradient checkpointing runs it again."""
    return _current_graph_task() != -1


_current_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)
