"""What a counter is: sums that a pass fills, what they need of a trace, and the result they give.

A result holds whole numbers (or says where it does not), adds up with that of other documents, and can be taken apart
into arrays and put together again, which is all that a file of counts needs to know of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from moescope.errors import NotRecorded
from moescope.trace import Header, Layer, Part, Trace

R = TypeVar("R", bound="Result")


CHOICES = (None, "first", "all")


@dataclass(frozen=True)
class Options:
    """What some counters can be asked for; None leaves it to the counter, whose module says what it then does.

    Attributes:
        lengths: Tokens of a segment.
        batch_sizes: Sequences of a batch.
        max_bytes: Memory of the documents that are kept.
        ranks: Choices of a token that are kept with the documents, from the first on.
        choice: "first" or "all", of a token's choices; None for the first where the trace knows it.
        words: Words to be found.
    """

    lengths: tuple[int, ...] | None = None
    batch_sizes: tuple[int, ...] | None = None
    max_bytes: int | None = None
    ranks: int | None = None
    choice: str | None = None
    words: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise ValueError(f"choice must be 'first' or 'all', not {self.choice!r}")


def need_choice(path: Path | None, layers: Sequence[Layer], choice: str | None) -> None:
    """Refuse to look at first choices where it is not known which they are.

    Args:
        path: The trace, for the message.
        layers: The layers to look at.
        choice: "all" of a token's choices, which takes no order; or "first", as None.
    Raises:
        NotRecorded: A layer does not say which choice is the first.
        ValueError: `choice` is neither.
    """
    if choice not in CHOICES:
        raise ValueError(f"choice must be 'first' or 'all', not {choice!r}")
    if choice != "all" and not all(layer.ranked for layer in layers):
        hint = "ask for all of the choices: --choice all, or choice='all'"
        raise NotRecorded(path, "does not say which of a token's choices is the first", hint)


class Counter(ABC, Generic[R]):
    """Sums that a pass over a trace fills.

    Attributes:
        name: What its result is called, in a file of counts and in messages.
        result_type: The class of its result.
        reads_tokens: Whether it reads token ids or phases.
        reads_weights: Whether it reads gate weights, where they were recorded.
    """

    name: ClassVar[str]
    result_type: ClassVar[type[Any]]
    reads_tokens: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def need(cls, trace: Trace, layers: Sequence[Layer], options: Options) -> None:
        """Refuse a trace from which this cannot be counted.

        Raises:
            NotRecorded: The trace, or these layers of it, do not hold what is counted.
            ValueError: An option is none that could be.
        """

    @classmethod
    @abstractmethod
    def prepare(cls, trace: Trace, layers: Sequence[Layer], options: Options) -> Callable[[], Self]:
        """What makes empty counters of one pass, one a thread."""

    @classmethod
    def of_counts(cls, trace: Trace, layers: Sequence[Layer], options: Options) -> R:
        """The result for a trace of counts; only of a counter that does not refuse one."""
        raise NotImplementedError

    @abstractmethod
    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count some layers of a part, as `one_pass.Filled.add`."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add what another counter of the same pass holds, in place."""

    @abstractmethod
    def result(self) -> R:
        """What was counted."""


class Result(ABC):
    """What a counter counted."""

    @property
    def header(self) -> Header:
        """What it tells of the trace, for a measure that is given nothing else."""
        return Header(self.layers)  # type: ignore[attr-defined]

    @abstractmethod
    def __add__(self, other: Self) -> Self:
        """The counts of both; their documents are disjoint, their layers and the order of the choices alike.

        Raises:
            ValueError: They cannot be added; it says what differs.
        """

    @abstractmethod
    def stored(self) -> dict[str, NDArray[Any]]:
        """The arrays from which `restored` makes it again."""

    @classmethod
    @abstractmethod
    def restored(cls, stored: Stored) -> Self:
        """The result of some arrays.

        Raises:
            ValueError: They are not of such a result; it says which array, what was expected and what was found.
        """


@dataclass(frozen=True)
class Stored:
    """Arrays of a file, and what they are of; nothing is taken from them without a look at type, shape and bounds.

    Attributes:
        arrays: By name.
        layers: Layers counted.
        domains: Domains counted.
        ranked: Whether the order of the choices is known.
        counts_only: Whether it was a trace of counts.
    """

    arrays: Mapping[str, NDArray[Any]]
    layers: tuple[Layer, ...]
    domains: tuple[str, ...]
    ranked: bool
    counts_only: bool

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def names(self, prefix: str) -> list[str]:
        """What follows the prefix in the names that begin with it, in the order of the file."""
        return [name.removeprefix(prefix) for name in self.arrays if name.startswith(prefix)]

    def take(
        self,
        name: str,
        dtypes: Any,
        shape: tuple[int | None, ...],
        *,
        least: int | None = 0,
        most: int | None = None,
    ) -> NDArray[Any]:
        """One array.

        Args:
            name: Its name.
            dtypes: The type it must have, or a list of those that it may have.
            shape: Its shape, None where any number will do.
            least: Its smallest value may not be below; None for any.
            most: Its largest value may not be above; None for any.
        Raises:
            ValueError: It is missing or not like that.
        """
        if name not in self.arrays:
            raise ValueError(f"{name} is missing")
        array = self.arrays[name]
        allowed = [np.dtype(d) for d in (dtypes if isinstance(dtypes, list) else [dtypes])]
        if array.dtype not in allowed:
            raise ValueError(f"{name} holds {array.dtype}, expected {' or '.join(map(str, allowed))}")
        if array.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
        if array.size and least is not None and not array.min() >= least:
            raise ValueError(f"{name} holds {array.min()}, expected at least {least}")
        if array.size and most is not None and not array.max() <= most:
            raise ValueError(f"{name} holds {array.max()}, expected at most {most}")
        return array

    def number(self, name: str, least: int = 0, most: int = 2**62) -> int:
        """One whole number."""
        return int(self.take(name, np.int64, (1,), least=least, most=most)[0])

    def select(self, numbers: NDArray[np.integer[Any]]) -> tuple[Layer, ...]:
        """The layers counted that have these indices.

        Raises:
            ValueError: One has not been counted, or they do not ascend.
        """
        chosen = tuple(layer for layer in self.layers if layer.layer in set(numbers.tolist()))
        if [layer.layer for layer in chosen] != numbers.tolist():
            raise ValueError(f"layers {numbers.tolist()} are not among those counted, ascending")
        return chosen


def united(mine: Sequence[str], theirs: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.int64]]:
    """The domains of both, those of the first first, and the place of each domain of either among them.

    Example:
        >>> united(["a", "b"], ["c", "b"])
        (('a', 'b', 'c'), array([0, 1]), array([2, 1]))
    """
    domains = tuple(dict.fromkeys([*mine, *theirs]))
    place = {name: d for d, name in enumerate(domains)}
    mine_D, theirs_D = (np.array([place[name] for name in names], np.int64) for names in (mine, theirs))
    return domains, mine_D, theirs_D


def spread(values: NDArray[Any], place_D: NDArray[np.int64], num_domains: int, axis: int = 0) -> NDArray[Any]:
    """Values by domain over more domains, those without a value at 0."""
    shape = list(values.shape)
    shape[axis] = num_domains
    wide = np.zeros(shape, values.dtype)
    np.moveaxis(wide, axis, 0)[place_D] = np.moveaxis(values, axis, 0)
    return wide


def added_counts(mine: NDArray[Any], theirs: NDArray[Any]) -> NDArray[Any]:
    """The sum of two tables of 32 or 64 bits, of 64 only where 32 do not hold it."""
    total: NDArray[np.uint64] = mine.astype(np.uint64)
    total += theirs
    return total.astype(np.uint32) if total.max(initial=0) < 2**32 else total
