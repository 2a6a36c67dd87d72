"""Watching a model in somebody else's loop: their forward, ``generate`` or training step, with nothing changed.

Unit: a token that the model reads, once each: padding, what ``generate`` feeds after a sequence has ended, and layers
that gradient checkpointing runs again in the backward pass are not counted. `Watch` keeps a live tally in bounded
memory and, if asked, writes a trace of the same tokens. Its hooks read and never change, and are gone when the ``with``
block ends, however it ends.
"""

from __future__ import annotations

import datetime
import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import xarray as xr
from torch import nn

from moescope.engines.options import BLOCKS, check_block
from moescope.engines.transformers.provenance import describe_body, describe_run, tensors_fingerprint
from moescope.engines.transformers.replacing import attribute_set
from moescope.engines.transformers.routers import (
    Router,
    find_experts,
    find_left_out,
    given_experts,
    select_experts,
    text_tower,
)
from moescope.engines.transformers.tokenizer import Tokenizer
from moescope.errors import ModelUnsupported, RouterSilent
from moescope.trace import Header, Layer, Vocabulary
from moescope.trace.part_file import PART_TOKENS
from moescope.watching.calls import find_stacks
from moescope.watching.live import LiveTally, Loads
from moescope.watching.output import TraceOutput
from moescope.watching.passes import BYPASSED, Passes, device_of
from moescope.watching.sequences import DocumentBlock, Labels

UNLABELLED = "watched"
"""Domain of sequences for which none is given."""


class Watch:
    """Watches the routers of a model while a ``with`` block lasts.

    The figures (`load`, `imbalance` …) may be read in the block and after it. Each reading waits for the device; what
    lies between two readings does not.

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

    def __init__(
        self,
        model: nn.Module,
        out: str | Path | None = None,
        *,
        tokenizer: Any = None,
        domain: str = UNLABELLED,
        layers: Sequence[int] | None = None,
        window: int | None = None,
        weights: bool = False,
        part_tokens: int = PART_TOKENS,
        block: str = BLOCKS[0],
        routers: Sequence[Router] | None = None,
        force: bool = False,
    ) -> None:
        if (window is not None and window < 1) or part_tokens < 1:
            raise ValueError(f"window {window} or part_tokens {part_tokens} is below 1")
        check_block(block)
        self._model = unwrapped(model)
        self._name = Path(str(getattr(self._model, "name_or_path", "") or type(self._model).__name__)).name
        self._known = routers is None
        if routers is None:
            experts = find_experts(self._model, self._name, block=block)
        else:
            experts = given_experts(self._model, routers)
        self.experts = select_experts(experts, layers, None, self._name)
        for message in dict.fromkeys(block.warning for block in self.experts if block.warning):
            warnings.warn(message, stacklevel=2)
        stacks = find_stacks(self._model, self.experts)
        stack_of = {place: index for index, stack in enumerate(stacks) for place in stack.places}
        self._tokenizer = None if tokenizer is None else Tokenizer(tokenizer)
        self._tally = LiveTally(self.experts, window, [stack_of[place] for place in range(len(self.experts))])
        self._labels = Labels(domain)
        self._weights, self._part_tokens = weights, part_tokens
        self._output = None
        if out is not None:
            pieces = self._tokenizer.vocabulary if self._tokenizer is not None else lambda: Vocabulary({})
            self._output = TraceOutput(
                Path(out),
                self.experts,
                self._header,
                pieces,
                self._labels,
                weights=weights,
                part_tokens=part_tokens,
                force=force,
            )
            if len(stacks) > 1:
                names = ", ".join(stack.name for stack in stacks)
                raise ModelUnsupported(
                    self._name,
                    f"a trace holds one stack of layers, the model has {names}",
                    "watch it without a trace",
                )
        added_ids = () if self._tokenizer is None else self._tokenizer.added_ids
        self._passes = Passes(self._model, self._name, stacks, self.experts, self._tally, self._output, added_ids)
        self._entered = False

    # ------------------------------------------------------------------------------------------------ the block

    def __enter__(self) -> Watch:
        if self._entered:
            raise ValueError("a watch is entered once; call moescope.watch again")
        self._entered = True
        self._passes.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._passes.__exit__()
        if self._output is not None:
            self._output.close(complete=kind is None)
        if kind is None and not self._passes.seen and not self._passes.paused:
            if self._output is not None:
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
        if self._labels.block is not None:
            raise ValueError("a document cannot lie in another")
        domain = self._labels.domains if domain is None else domain  # type: ignore[assignment]
        if not isinstance(domain, str):
            raise ValueError(f"a document has one domain, not {domain!r}")
        block = self._labels.block = DocumentBlock(domain)
        whole = False
        try:
            yield
            whole = True
        finally:
            self._labels.block = None
            if self._output is not None:
                self._output.update(lambda sequences: sequences.end_block(block, whole=whole))

    def domain(self, domains: str | Sequence[str]) -> AbstractContextManager[None]:
        """In this block the sequences have this domain, or the rows of each batch have these."""
        return attribute_set(self._labels, "domains", domains if isinstance(domains, str) else tuple(domains))

    def paused(self) -> AbstractContextManager[None]:
        """In this block nothing is counted or recorded: evaluation within training, say."""
        return attribute_set(self._passes, "paused", True)

    def pause(self) -> None:
        """Count and record nothing until `resume`."""
        self._passes.paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self._passes.paused = False

    # ---------------------------------------------------------------------------------------------- the figures

    def reset(self) -> None:
        """Start the live tally anew; a trace goes on."""
        self._tally.reset()

    def loads(self) -> Loads:
        """The live tally of this process, as it is now.

        Raises:
            RouterSilent: No forward pass of the model was seen since the block began.
        """
        if not self._passes.seen:
            raise self._nothing_seen()
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

    # ---------------------------------------------------------------------------------------------- the header

    def _header(self, layers: tuple[Layer, ...], token_ids: bool) -> Header:
        """Header of the trace: all that a recording says of model and run, as far as a watch can know it."""
        base = getattr(self._model, "base_model", self._model)
        body = text_tower(base)
        run = {
            "watch": secrets.token_hex(8),  # no two watches have equal headers, so none goes on with another's trace
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "part_tokens": self._part_tokens,
        }
        left_out = find_left_out(base, self.experts) if self._known else ()
        return Header(
            layers,
            self._weights,
            describe_body(body, self.experts, self._name, tensors_fingerprint(body), left_out),
            {} if self._tokenizer is None else self._tokenizer.description(),
            {"name": "watched", "format": "watch", "fingerprint": None},
            run | describe_run(body, self.experts[0], device_of(self.experts[0].module)),
            token_ids=token_ids,
            phases=True,
        )

    def _nothing_seen(self) -> RouterSilent:
        return RouterSilent(self._name, "no forward pass of the watched model was seen", BYPASSED)


watch = Watch
"""The name under which callers know it: a function that makes a `Watch`."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in its wrappers: DataParallel, DistributedDataParallel, torch.compile and those that look like them."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and getattr(model, "config", None) is None:
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
