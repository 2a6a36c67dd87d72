"""Watching a model in somebody else's loop: their forward, ``generate`` or training step, with nothing changed.

Unit: a token that the model reads, once each: padding, what ``generate`` feeds after a sequence has ended, and layers
that gradient checkpointing runs again in the backward pass are not counted. `Watch` keeps a live tally in bounded
memory and, if asked, writes a trace of the same tokens. Its hooks read and never change, and are gone when the ``with``
block ends, however it ends.
"""

from __future__ import annotations

import datetime
import functools
import platform
import secrets
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import transformers
import xarray as xr
from torch import Tensor, nn

import moescope
from moescope.engines.transformers.hooks import Tell, listen
from moescope.engines.transformers.provenance import tensors_fingerprint
from moescope.engines.transformers.routers import Experts, Router, find_experts, given_experts, select_experts
from moescope.engines.transformers.tokenizer import Tokenizer
from moescope.errors import ModelUnsupported, RouterNotFinite, RouterSilent, TraceExists
from moescope.trace import Header, Layer, TraceWriter, Vocabulary
from moescope.watching.calls import Call, Stack, find_stacks
from moescope.watching.live import LiveTally, Loads
from moescope.watching.sequences import DECODE, PREFILL, Batch, Block, Sequences, Step

PART_TOKENS = 65_536
UNLABELLED = "watched"
"""Domain of sequences for which none is given."""

_BYPASSED = (
    "was the model compiled, or captured in a graph, so that the hooks are passed by? Enter `moescope.watch` before "
    "the first call of the compiled model, or call torch.compiler.reset() first"
)


def watch(
    model: nn.Module,
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    domain: str = UNLABELLED,
    layers: Sequence[int] | None = None,
    window: int | None = None,
    weights: bool = False,
    part_tokens: int = PART_TOKENS,
    block: str = "mlp",
    routers: Sequence[Router] | None = None,
    force: bool = False,
) -> Watch:
    """Watch the routers of a model while a ``with`` block lasts.

    Args:
        model: A model of transformers, bare or wrapped (DistributedDataParallel, DataParallel, torch.compile).
        out: Folder of a trace to write; None keeps only the live tally.
        tokenizer: Tokenizer of the model, so that a trace holds its vocabulary, and so that what it puts in front of a
            text (BOS) is fed and not counted, as in `moescope.record`.
        domain: Domain of the sequences in the trace.
        layers: Layers to watch, counted over the whole model; None for all with routed experts.
        window: Forward passes that the live tally covers, the last ones; None for all since `Watch.reset`.
        weights: Write the gate weights, too.
        part_tokens: Tokens of a part of the trace.
        block: ``mlp`` for the experts of the feed-forward blocks, ``attention`` for a model that routes its attention.
        routers: How to read the routers of a model that moescope does not know (`moescope.Router`).
        force: Replace what is at `out`, if it is a trace.
    Raises:
        ModelNotMoE: It has no routed experts.
        ModelUnsupported: It has some whose routing cannot be read exactly.
        NoSuchLayer: A layer asked for has no routed experts.
        TraceExists: There is something at `out`.
    Example:
        with moescope.watch(model) as w:
            model(**batch).loss.backward()
        w.imbalance.max()
    """
    if (window is not None and window < 1) or part_tokens < 1:
        raise ValueError(f"window {window} or part_tokens {part_tokens} is below 1")
    if block not in ("mlp", "attention"):
        raise ValueError(f"block is 'mlp' or 'attention', not {block!r}")
    return Watch(model, out, tokenizer, domain, layers, window, weights, part_tokens, block, routers, force)


class Watch:
    """Watches a model; made by `watch`, used as a context manager.

    The figures (`load`, `imbalance` …) may be read in the block and after it. Each reading waits for the device; what
    lies between two readings does not.
    """

    def __init__(
        self,
        model: nn.Module,
        out: str | Path | None,
        tokenizer: Any,
        domain: str,
        layers: Sequence[int] | None,
        window: int | None,
        weights: bool,
        part_tokens: int,
        block: str,
        routers: Sequence[Router] | None,
        force: bool,
    ) -> None:
        self._model = unwrapped(model)
        self._name = Path(str(getattr(self._model, "name_or_path", "") or type(self._model).__name__)).name
        if routers is None:
            found = find_experts(self._model, self._name, block=block)
        else:
            found = given_experts(self._model, routers)
        self.experts = select_experts(found, layers, None, self._name)
        for message in dict.fromkeys(each.warning for each in self.experts if each.warning):
            warnings.warn(message, stacklevel=3)
        self._stacks = find_stacks(self._model, self.experts)
        stack_of = {place: index for index, stack in enumerate(self._stacks) for place in stack.places}
        self._tokenizer = None if tokenizer is None else Tokenizer(tokenizer)
        self._added_ids = () if self._tokenizer is None else self._tokenizer.added_ids
        self._tally = LiveTally(self.experts, window, [stack_of[place] for place in range(len(self.experts))])
        self._trace = None if out is None else _TraceOutput(Path(out), self, weights, part_tokens, force)
        if self._trace is not None and len(self._stacks) > 1:
            names = ", ".join(stack.name for stack in self._stacks)
            raise ModelUnsupported(
                self._name, f"a trace holds one stack of layers, the model has {names}", "watch it without a trace"
            )
        self._domains: str | Sequence[str] = domain
        self._block: Block | None = None
        self._paused = False
        self._seen = False
        self._passes = threading.local()
        self._generations = threading.local()
        self._lock = threading.Lock()  # DataParallel runs its replicas in threads, and a server may generate in several
        self._undo = ExitStack()
        self._entered = False

    # ------------------------------------------------------------------------------------------------ the block

    def __enter__(self) -> Watch:
        if self._entered:
            raise ValueError("a watch is entered once; call moescope.watch again")
        self._entered = True
        with ExitStack() as undo:
            for stack in self._stacks:
                undo.enter_context(_noticed_by_dynamo(stack.module))
                before, after = self._stack_hooks(stack)
                undo.callback(stack.module.register_forward_pre_hook(before, with_kwargs=True).remove)
                undo.callback(stack.module.register_forward_hook(after).remove)
            for place, experts in enumerate(self.experts):
                for module in (experts.called, experts.router):
                    if module is not None:
                        undo.enter_context(_noticed_by_dynamo(module))
                for handle in listen(experts, self._teller(place, experts)):
                    undo.callback(handle.remove)
            undo.enter_context(_generate_announced(self._model, self))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._undo.close()
        self._passes = threading.local()
        if self._trace is not None:
            with self._lock:
                self._trace.close(complete=kind is None)
        if kind is None and not self._seen and not self._paused:
            if self._trace is not None:
                raise self._nothing_seen()
            warnings.warn(str(self._nothing_seen()), stacklevel=2)

    @contextmanager
    def document(self, domain: str | None = None) -> Iterator[None]:
        """Everything read in this block is one document: its sequences are consecutive windows of one text.

        Args:
            domain: Its domain; None for the one that holds outside.
        Raises:
            ValueError: Such a block is open already, or there are several domains and none is given.
        """
        if self._block is not None:
            raise ValueError("a document cannot lie in another")
        domain = self._domains if domain is None else domain  # type: ignore[assignment]
        if not isinstance(domain, str):
            raise ValueError(f"a document has one domain, not {domain!r}")
        block = self._block = Block(domain)
        whole = False
        try:
            yield
            whole = True
        finally:
            self._block = None
            if self._trace is not None:
                with self._lock:
                    self._trace.end_block(block, whole=whole)

    @contextmanager
    def domain(self, domains: str | Sequence[str]) -> Iterator[None]:
        """In this block the sequences have this domain, or the rows of each batch have these."""
        before, self._domains = self._domains, domains if isinstance(domains, str) else tuple(domains)
        try:
            yield
        finally:
            self._domains = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In this block nothing is counted or recorded: evaluation within training, say."""
        before = self._paused
        self.pause()
        try:
            yield
        finally:
            self._paused = before

    def pause(self) -> None:
        """Count and record nothing until `resume`."""
        self._paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False

    # ---------------------------------------------------------------------------------------------- the figures

    def reset(self) -> None:
        """Start the live tally anew; a trace goes on."""
        self._tally.reset()

    def loads(self) -> Loads:
        """The live tally of this process, as it is now.

        Raises:
            RouterSilent: No forward pass of the model was seen since the block began.
        """
        self._check_seen()
        return self._tally.read()

    def all_reduce(self, group: Any = None) -> Loads:
        """The live tally summed over the processes of a group (all of them for None); each of them must call."""
        return self._tally.read(group, reduce=True)

    @property
    def load(self) -> xr.DataArray:
        """Assignments by expert, dims (layer, expert)."""
        return self.loads().load

    @property
    def imbalance(self) -> xr.DataArray:
        """Largest load over mean load, from 1, dims (layer,)."""
        return self.loads().imbalance

    @property
    def max_violation(self) -> xr.DataArray:
        """MaxVio, imbalance minus 1, dims (layer,)."""
        return self.loads().max_violation

    @property
    def entropy(self) -> xr.DataArray:
        """Entropy of the shares over log(num_experts), 0 to 1, dims (layer,)."""
        return self.loads().entropy

    @property
    def idle(self) -> xr.DataArray:
        """Routed experts without an assignment, dims (layer,)."""
        return self.loads().idle

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return self.loads().tokens

    @property
    def forwards(self) -> int:
        """Forward passes counted, of all since the last reset."""
        return self._tally.forwards

    # ------------------------------------------------------------------------------------------------ the hooks

    def _stack_hooks(self, stack: Stack) -> tuple[Callable[..., None], Callable[..., None]]:
        """What runs before and after a stack; never inside a compiled graph, which breaks there."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not _in_backward():
                with torch.inference_mode(False), torch.no_grad():
                    self._open(stack, args, kwargs)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not _in_backward():
                with torch.inference_mode(False), torch.no_grad():
                    self._close(stack, output)

        return torch.compiler.disable(before), torch.compiler.disable(after)  # type: ignore[no-untyped-call]

    def _teller(self, place: int, experts: Experts) -> Tell:
        """What is told the choices of a layer; inside a compiled graph it is one opaque operator of it."""
        note, key = _note_operator(), id(self)
        anchor = torch.zeros((), device=_device(experts.module))
        _WATCHES[key] = self

        def tell(ids: Tensor, weights: Tensor) -> None:
            if torch.compiler.is_compiling():
                note(ids, weights.detach(), anchor, key, place)
            else:
                self._note(place, ids, weights)

        return tell

    def _open(self, stack: Stack, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins; one that an exception ended before is forgotten."""
        self._seen = True
        current = None if self._paused else self._prepare(stack, Call.read(stack, args, kwargs))
        self._passes.__dict__[stack.name] = current

    def _prepare(self, stack: Stack, call: Call) -> _Pass:
        counted = call.real()
        past, starts = None, None
        if self._trace is not None or self._added_ids:
            past = call.past()
            starts = call.starts(counted)
            added = call.added(starts, self._added_ids) if past == 0 else None
            if added is not None:
                counted = ~added if counted is None else counted & ~added
        if self._generation is not None:
            running = self._generation.running(call)
            if running is not None:
                counted = running if counted is None else counted & running
        return _Pass(stack, call, counted, past, starts)

    def _note(self, place: int, ids: Tensor, weights: Tensor) -> None:
        """A layer speaks."""
        if _in_backward():
            return  # gradient checkpointing runs the layer again
        experts = self.experts[place]
        stack = next(stack for stack in self._stacks if place in stack.places)
        if stack.name not in self._passes.__dict__:
            raise RouterSilent(
                f"layer {experts.layer}",
                f"{experts.name} was called outside a forward pass of {stack.name or self._name}",
                f"call the model and not its layers one by one; {_BYPASSED}",
            )
        current: _Pass | None = self._passes.__dict__[stack.name]
        if current is None:
            return
        num_tokens = current.call.shape[0] * current.call.shape[1]
        if place in current.spoken or ids.shape[0] != num_tokens:
            raise RouterSilent(
                f"layer {experts.layer}",
                f"{experts.name} was called {1 + (place in current.spoken)} times, now with {ids.shape[0]} rows, "
                f"expected once with {num_tokens}",
            )
        with torch.inference_mode(False), torch.no_grad():
            current.spoken[place] = _ranked(ids, weights) if self._trace is not None else None
            self._tally.count(current.counts, place, ids, current.counted_on(ids.device))

    def _close(self, stack: Stack, output: Any) -> None:
        """A forward pass has come to its end: what it counted, counts."""
        current: _Pass | None = self._passes.__dict__.pop(stack.name, None)
        if current is None:
            return
        for place in stack.places:
            if place not in current.spoken:
                raise RouterSilent(
                    f"layer {self.experts[place].layer}",
                    f"{self.experts[place].name} was not called in a forward pass of {stack.name or self._name}",
                    f"an experts implementation or kernel may go around the module; {_BYPASSED}",
                )
        if self._trace is not None:
            with self._lock:
                self._trace.add(current, _cache_of(output, current.call.cache))
        self._tally.commit(current.counts)
        if self._trace is not None:
            with self._lock:
                self._trace.settle()

    # --------------------------------------------------------------------------------------------- odds and ends

    @contextmanager
    def _generating(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """``generate`` runs in this block."""
        generation = _Generation.read(model, args, kwargs)
        if self._trace is not None and not self._paused:
            generation.check_can_be_followed()
        before, self._generations.now = self._generation, generation
        whole = False
        try:
            yield
            whole = True
        finally:
            self._generations.now = before
            if self._trace is not None:
                with self._lock:
                    self._trace.end_generation(generation, whole=whole)

    @property
    def _generation(self) -> _Generation | None:
        """The call of ``generate`` that runs in this thread."""
        return getattr(self._generations, "now", None)

    def _new_batch(self, num_rows: int) -> Batch:
        """A batch of sequences that begin now, with the domains that hold now."""
        if self._block is not None:
            return Batch((self._block.domain,) * num_rows, self._block)
        if isinstance(self._domains, str):
            return Batch((self._domains,) * num_rows, None)
        copies, rest = divmod(num_rows, max(1, len(self._domains)))
        if rest or not copies or (copies > 1 and self._generation is None):
            raise ValueError(f"{len(self._domains)} domains are given for a batch of {num_rows} sequences")
        return Batch([name for name in self._domains for _ in range(copies)], None)

    def _check_seen(self) -> None:
        if not self._seen:
            raise self._nothing_seen()

    def _nothing_seen(self) -> RouterSilent:
        return RouterSilent(self._name, "no forward pass of the watched model was seen", _BYPASSED)


@dataclass
class _Pass:
    """One forward pass of a stack.

    Attributes:
        stack: The stack.
        call: What it is called with.
        counted: Which tokens count, shape (sequence, token); None for all.
        past: Tokens in the cache before; None if nobody asked.
        starts: Where sequences start, shape (sequence, token); None if nobody asked.
        counts: Assignments by device, as `LiveTally.count` keeps them.
        spoken: For each layer that has spoken, by place, its ranked choices if a trace wants them.
    """

    stack: Stack
    call: Call
    counted: Tensor | None
    past: int | None
    starts: Tensor | None
    counts: dict[torch.device, Tensor] = field(default_factory=dict)
    spoken: dict[int, tuple[Tensor, Tensor] | None] = field(default_factory=dict)
    _flat: dict[torch.device, Tensor] = field(default_factory=dict)

    def counted_on(self, device: torch.device) -> Tensor | None:
        """Which tokens count, shape (sequence x token,), on a device."""
        if self.counted is None:
            return None
        if device not in self._flat:
            self._flat[device] = self.counted.reshape(-1).to(device)
        return self._flat[device]


@dataclass
class _Generation:
    """One call of ``generate``.

    Attributes:
        unlike: What makes it read other things than each token of each sequence once, in order; None if nothing does.
        end_ids: Ids that end a sequence; after one ``generate`` feeds the row padding, masked as if it were real.
        finished: Rows that have ended, shape (sequence,).
        started: Whether a forward pass has been made.
    """

    unlike: str | None
    end_ids: tuple[int, ...]
    finished: Tensor | None = None
    started: bool = False

    @classmethod
    def read(cls, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Generation:
        """From the arguments of ``generate``: its own, else of the configuration given, else of the model's."""
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)

        def value(name: str) -> Any:
            if kwargs.get(name) is not None:
                return kwargs[name]
            found = getattr(given, name, None)
            return found if found is not None else getattr(getattr(model, "generation_config", None), name, None)

        odd = {
            "num_beams": (value("num_beams") or 1) > 1,
            "assistant_model": kwargs.get("assistant_model") is not None,
            "prompt_lookup_num_tokens": value("prompt_lookup_num_tokens") is not None,
            "assistant_early_exit": value("assistant_early_exit") is not None,
            "penalty_alpha": bool(value("penalty_alpha")),
            "guidance_scale": (value("guidance_scale") or 1) != 1,
            "custom_generate": kwargs.get("custom_generate") is not None,
            "use_cache=False": value("use_cache") is False,
            "cache_implementation='paged'": value("cache_implementation") == "paged",
        }
        unlike = next((name for name, is_so in odd.items() if is_so), None)
        end_ids = value("eos_token_id")
        end_ids = end_ids.flatten().tolist() if isinstance(end_ids, Tensor) else end_ids
        end_ids = [] if end_ids is None or unlike else end_ids
        return cls(unlike, tuple(end_ids) if isinstance(end_ids, list | tuple) else (int(end_ids),))

    def check_can_be_followed(self) -> None:
        """Refuse what a trace cannot hold.

        Raises:
            ValueError: The method reads tokens that are in no sequence in the end, or reads them again.
        """
        if self.unlike is not None:
            raise ValueError(
                f"generate with {self.unlike} cannot be followed in a trace: it reads tokens that are thrown away, or "
                "the same ones again; generate without it, or watch without a trace, which counts all that runs"
            )

    def running(self, call: Call) -> Tensor | None:
        """Rows whose sequence has not ended, shape (sequence, 1); None if all run."""
        started, self.started = self.started, True
        if not started or not self.end_ids or call.shape[1] != 1 or call.input_ids is None:
            return None
        ends = torch.zeros_like(call.input_ids, dtype=torch.bool)
        for token_id in self.end_ids:
            ends |= call.input_ids == token_id
        self.finished = ends if self.finished is None else self.finished | ends
        return ~self.finished


class _TraceOutput:
    """The trace that a watch writes, created with the first forward pass: that tells how many experts a token gets."""

    def __init__(self, path: Path, watch: Watch, weights: bool, part_tokens: int, force: bool) -> None:
        if not force and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise TraceExists(path, "exists and is kept; a watch does not go on with another's trace", "force=True")
        self._path, self._watch, self._force = path, watch, force
        self._weights, self._part_tokens = weights, part_tokens
        self._writer: TraceWriter | None = None
        self._sequences: Sequences | None = None
        self._interrupted = False

    def add(self, current: _Pass, cache: Any) -> None:
        """Record a forward pass."""
        experts = [self._watch.experts[place] for place in current.stack.places]
        spoken = [current.spoken[place] for place in current.stack.places]
        if self._sequences is None:
            self._writer = self._create(current, [ids.shape[1] for ids, _ in spoken])  # type: ignore[misc]
            self._sequences = Sequences(self._writer, self._part_tokens)
        header = self._writer.header  # type: ignore[union-attr]
        call, past = current.call, current.past or 0
        if header.token_ids and call.input_ids is None:
            raise ModelUnsupported(
                call.subject, "is called with embeddings, and was called with token ids before; a trace has them or not"
            )
        counted = np.ones(call.shape, bool) if current.counted is None else current.counted.cpu().numpy()
        step = Step(
            token_ids=call.input_ids.cpu().numpy() if header.token_ids else np.zeros(call.shape, np.int64),  # type: ignore[union-attr]
            recorded=counted,
            starts=current.starts.cpu().numpy(),  # type: ignore[union-attr]
            phase=DECODE if past and call.shape[1] == 1 else PREFILL,
            expert_ids={},
            gate_weights={},
        )
        for each, layer, choices in zip(experts, header.layers, spoken, strict=True):
            ids, weights = (tensor.cpu().numpy() for tensor in choices)  # type: ignore[union-attr]
            _check(each, layer, ids[counted.reshape(-1)], weights[counted.reshape(-1)])
            step.expert_ids[each.layer] = ids.reshape(*call.shape, -1)
            if self._weights:
                step.gate_weights[each.layer] = weights.reshape(*call.shape, -1)
        self._sequences.add(step, cache, past, call.subject, self._watch._new_batch, self._watch._generation)

    def settle(self) -> None:
        """Write the parts that are full."""
        if self._sequences is not None:
            with self._intact():
                self._sequences.settle()

    def end_block(self, block: Block, *, whole: bool) -> None:
        """A document has ended."""
        if self._sequences is not None:
            with self._intact():
                (self._sequences.end_block if whole else self._sequences.drop_block)(block)

    def end_generation(self, generation: object, *, whole: bool) -> None:
        """A call of ``generate`` has ended."""
        if self._sequences is not None:
            with self._intact():
                self._sequences.end_generation(generation, whole=whole)

    def close(self, *, complete: bool) -> None:
        """Write what is whole; the trace is complete if no error ended the block and no Ctrl-C came in between."""
        if self._writer is None or self._sequences is None:
            return
        with self._writer:
            self._sequences.finish(complete=complete and not self._interrupted)

    @contextmanager
    def _intact(self) -> Iterator[None]:
        """After an error what is not written is kept, and written next; Ctrl-C may come between any two steps."""
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self._interrupted = True
            raise

    def _create(self, current: _Pass, top_k: Sequence[int]) -> TraceWriter:
        watch = self._watch
        layers = tuple(
            Layer(
                layer=each.layer,
                num_experts=each.num_experts,
                top_k=k,
                module=each.name,
                num_null_experts=each.num_null_experts,
                num_shared_experts=each.num_shared_experts,
                drops=each.drops,
            )
            for each, k in zip((watch.experts[place] for place in current.stack.places), top_k, strict=True)
        )
        tokenizer = watch._tokenizer
        header = Header(
            layers,
            self._weights,
            _description(watch._model, watch._name),
            {} if tokenizer is None else tokenizer.description(),
            {"name": "watched", "format": "watch", "fingerprint": None},
            _run(watch.experts[0]),
            token_ids=current.call.input_ids is not None,
            phases=True,
        )
        return TraceWriter(
            self._path, header, Vocabulary({}) if tokenizer is None else tokenizer.vocabulary(), force=self._force
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in its wrappers: DataParallel, DistributedDataParallel, torch.compile and those that look like them."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and getattr(model, "config", None) is None:
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _ranked(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Choices by falling gate weight, equal ones in the order of the router; shapes (token, choice)."""
    weights, order = weights.detach().sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order).to(torch.int32), weights.float()


def _check(experts: Experts, layer: Layer, ids: Any, weights: Any) -> None:
    if not ids.size:
        return
    if ids.min() < (-1 if layer.drops else 0) or ids.max() >= layer.num_ids:
        raise ModelUnsupported(
            experts.name,
            f"layer {layer.layer} chose expert {ids.max()} or {ids.min()}, expected 0..{layer.num_ids - 1}",
        )
    if ids.shape[1] != layer.top_k:
        raise ModelUnsupported(experts.name, f"gives a token {ids.shape[1]} experts, and {layer.top_k} before")
    if not np.isfinite(weights).all():
        raise RouterNotFinite(f"layer {layer.layer}", "a gate weight is NaN or infinite", "does the loss diverge?")


def _cache_of(output: Any, given: Any) -> Any:
    """The cache that holds what was read: the one given, else the one in the output."""
    if given is not None:
        return given
    if isinstance(output, tuple):
        return next((each for each in output if hasattr(each, "get_seq_length")), None)
    return getattr(output, "past_key_values", None)


def _description(model: Any, name: str) -> dict[str, Any]:
    """Provenance of the model for the header of a trace, as far as it says."""
    config = getattr(model, "config", None)
    if config is None:
        return {"name": name, "architecture": type(model).__name__}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    body = getattr(model, "base_model", model)
    architectures = getattr(config, "architectures", None) or [type(model).__name__]
    return {
        "name": name,
        "family": str(getattr(config, "model_type", None)),
        "architecture": str(architectures[0]),
        "num_layers": getattr(text, "num_hidden_layers", None),
        "dtype": str(getattr(body, "dtype", None)).removeprefix("torch."),
        "fingerprint": tensors_fingerprint(body),
        "attn_implementation": str(getattr(text, "_attn_implementation", None)),
    }


def _run(experts: Experts) -> dict[str, Any]:
    config = getattr(experts.module, "config", None)
    return {
        "watch": secrets.token_hex(8),  # no two watches have equal headers, so none goes on with another's trace
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": _device(experts.module).type,
        "experts_implementation": str(getattr(config, "_experts_implementation", None)),
        "moescope": moescope.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _device(module: nn.Module) -> torch.device:
    """Where a module is; for weights that accelerate moves about, any real device will do."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.device.type == "meta" else parameter.device


def _in_backward() -> bool:
    """Whether autograd is at work in this thread: whatever layer runs now, gradient checkpointing runs it again."""
    return _current_graph_task() != -1


_current_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)


# ------------------------------------------------------------------------------------------------ torch.compile
#
# Dynamo traces hooks that are there when it compiles, as part of the graph, and never looks again: hooks that come
# later are passed by (torch._dynamo.config.skip_nnmodule_hook_guards). Two things make hooks work all the same. The
# graph gets one opaque operator a layer instead of what the hook does, so that it need not break there. And modules
# get, while they are watched, a class of their own that differs from theirs in nothing but identity: graphs that were
# compiled without the hooks check the class, do not fit any more, and fit again afterwards.

_WATCHES: weakref.WeakValueDictionary[int, Watch] = weakref.WeakValueDictionary()


@functools.cache
def _note_operator() -> Any:
    """The operator that stands for a hook; it claims to change `anchor`, so that no compiler leaves it out."""

    @torch.library.custom_op("moescope::note", mutates_args=("anchor",))
    def note(ids: Tensor, weights: Tensor, anchor: Tensor, key: int, place: int) -> None:
        if (watch := _WATCHES.get(key)) is not None:
            watch._note(place, ids, weights)

    return torch.ops.moescope.note.default


_CLASSES: weakref.WeakKeyDictionary[nn.Module, tuple[type, int]] = weakref.WeakKeyDictionary()


@contextmanager
def _noticed_by_dynamo(module: nn.Module) -> Iterator[None]:
    """Make graphs that were compiled before fit this module no more, until the block ends."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    own, watches = _CLASSES.get(module, (type(module), 0))
    _CLASSES[module] = own, watches + 1
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    module.__class__ = type(own)(own.__name__, (own,), names)
    try:
        yield
    finally:
        own, watches = _CLASSES.pop(module)
        if watches > 1:
            _CLASSES[module] = own, watches - 1
        else:
            module.__class__ = own


# ----------------------------------------------------------------------------------------------------- generate

_GENERATING: weakref.WeakKeyDictionary[nn.Module, tuple[list[Watch], Any]] = weakref.WeakKeyDictionary()
"""For each watched model its watches, and a ``generate`` that the instance had of its own."""


@contextmanager
def _generate_announced(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Let a watch know, until the block ends, when ``generate`` of the model runs and with which arguments."""
    original = getattr(model, "generate", None)
    if original is None:
        yield
        return
    watches, own = _GENERATING.setdefault(model, ([], model.__dict__.get("generate")))
    watches.append(watch)
    if len(watches) == 1:

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for each in tuple(watches):
                    stack.enter_context(each._generating(model, args, kwargs))
                return original(*args, **kwargs)

        model.__dict__["generate"] = generate
    try:
        yield
    finally:
        watches.remove(watch)
        if not watches:
            del model.__dict__["generate"], _GENERATING[model]
            if own is not None:
                model.__dict__["generate"] = own
