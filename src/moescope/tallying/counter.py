"""What a counter is: sums that a pass fills, what they need of a trace, and the result they give.

A result holds whole numbers (or says where it does not). It declares its arrays, their axes and bounds once; how it
adds up with that of other documents, how it is kept in a file and what is refused there follow from that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from moescope.errors import NotRecorded
from moescope.tallying.token_sample import NO_HASH, HashSample
from moescope.trace import Header, Layer, Part, Trace

R = TypeVar("R", bound="Result")

Facts = Mapping[str, Any]
"""What a result says beside its arrays, by name."""

Arrays = Mapping[str, NDArray[Any]]

CHOICES = (None, "first", "all")


@dataclass(frozen=True)
class CountOptions:
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
    """Refuse to look at first choices where it is not known which they are; `path` is for the message.

    Raises:
        NotRecorded: A layer does not say which choice is the first.
        ValueError: `choice` is neither "all" of a token's choices, which takes no order, nor "first", as None.
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
        counts: What was counted so far, by a counter that adds to its result in place.
    """

    counts: R
    name: ClassVar[str]
    result_type: ClassVar[type[Any]]
    reads_tokens: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = False

    @classmethod
    def need(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> None:
        """Refuse a trace from which this cannot be counted; unless a counter says otherwise, one without tokens.

        Raises:
            NotRecorded: The trace, or these layers of it, do not hold what is counted.
            ValueError: An option is none that could be.
        """
        trace.need_tokens()

    @classmethod
    @abstractmethod
    def prepare(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> Callable[[], Self]:
        """What makes empty counters of one pass, one a thread."""

    @classmethod
    def of_counts(cls, trace: Trace, layers: Sequence[Layer], options: CountOptions) -> R:
        """The result for a trace of counts; only of a counter that does not refuse one."""
        raise NotImplementedError

    @abstractmethod
    def add(self, part: Part, group: Sequence[Layer]) -> None:
        """Count some layers of a part, as `one_pass.Filled.add`."""

    def merge(self, other: Self) -> None:
        """Add what another counter of the same pass holds, in place."""
        self.counts.merge(other.counts)

    def result(self) -> R:
        """What was counted."""
        return self.counts


class Array(NamedTuple):
    """What one array of a result must be.

    Attributes:
        axes: What goes along each axis; a result is added domain by domain where one is ``domain``.
        shape: Its shape; None where any number will do, the same in all arrays of the result that have this axis.
        dtypes: Types it may have, the first that of an empty one.
        least: Its smallest value may not be below; None for any.
        most: Its largest value may not be above; None for any.
    """

    axes: tuple[str, ...]
    shape: tuple[int | None, ...]
    dtypes: tuple[type[np.generic], ...] = (np.int64,)
    least: int | None = 0
    most: int | None = None


WIDENING = (np.uint32, np.uint64)
"""Types of a table that is widened when a sum needs it."""


def summed(sizes: Mapping[str, int | None], **axes: str) -> dict[str, Array]:
    """Sums in whole numbers, each by name with its axes in words.

    Example:
        >>> summed({"layer": 2, "expert": 8}, loads="layer expert")["loads"].shape
        (2, 8)
    """
    return {
        name: Array(tuple(words.split()), tuple(sizes[word] for word in words.split())) for name, words in axes.items()
    }


def sampled(name: str, layers: Iterable[Layer], group: str, num_groups: int, size: int) -> dict[str, Array]:
    """The arrays of a `HashSample` of the choices of tokens."""
    shape = (num_groups, size)
    return {
        f"{name}/hashes": Array((group, "token"), shape, (np.uint64,)),
        **{
            f"{name}/{a.layer}": Array(
                (group, "token", "choice"), (*shape, a.top_k), (np.int32,), least=-1, most=a.num_ids - 1
            )
            for a in layers
        },
    }


class Result(ABC):
    """What a counter counted: a frozen dataclass of arrays, tables by layer (`dict`), samples, and facts.

    From what a class declares of its arrays follow how it is added, kept in a file, checked and made empty.

    Attributes:
        facts: Attributes that are no arrays: kept in the header of a file.
        own_facts: Those in which results that are added may differ; the others must be alike.
    """

    facts: ClassVar[tuple[str, ...]] = ()
    own_facts: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def declared(cls, layers: Sequence[Layer], domains: Sequence[str], facts: Facts) -> dict[str, Array]:
        """Its arrays by name; that of a layer in the table ``x`` is named ``x/LAYER``.

        Raises:
            ValueError: A fact is none that could be.
        """

    @property
    def header(self) -> Header:
        """What it says of the trace, for a measure that is given nothing else."""
        return Header(self.layers)  # type: ignore[attr-defined]

    @classmethod
    def of_arrays(cls, layers: Sequence[Layer], domains: Sequence[str], facts: Facts, arrays: Arrays) -> Self:
        """The result that has these arrays, in the order in which they are declared."""
        values: dict[str, Any] = {"layers": tuple(layers), "domains": tuple(domains), **facts}
        for name, array in arrays.items():
            table, _, layer = name.partition("/")
            if not layer:
                values[name] = array
            elif layer == "hashes":
                values[table] = HashSample(array, {})
            else:
                rows = values.setdefault(table, {})
                (rows.rows if isinstance(rows, HashSample) else rows)[int(layer)] = array
        names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in values.items() if name in names})

    @classmethod
    def empty(cls, layers: Sequence[Layer], domains: Sequence[str] = (), **facts: Any) -> Self:
        """Counts of nothing."""
        arrays = {}
        for name, array in cls.declared(layers, domains, facts).items():
            fill: Any = NO_HASH if name.endswith("/hashes") else min(array.least or 0, 0)
            arrays[name] = np.full(tuple(size or 0 for size in array.shape), fill, array.dtypes[0])
        return cls.of_arrays(layers, domains, facts, arrays)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays by the names under which they are declared and kept in a file."""
        arrays: dict[str, NDArray[Any]] = {}
        for f in fields(self):  # type: ignore[arg-type]
            arrays |= _by_name(f.name, getattr(self, f.name))
        return arrays

    @classmethod
    def restored(cls, layers: Sequence[Layer], domains: Sequence[str], facts: Facts, arrays: Arrays) -> Self:
        """The result of the arrays and facts of a file; none is taken without a look at type, shape and bounds.

        Raises:
            ValueError: They are not of such a result; it says which array, what was expected and what was found.
        """
        if set(facts) != set(cls.facts):
            raise ValueError(f"holds the facts {sorted(facts)}, expected {sorted(cls.facts)}")
        declared, sizes = cls.declared(layers, domains, facts), dict[str, int]()
        checked = {name: _checked(name, arrays, array, sizes) for name, array in declared.items()}
        return cls.of_arrays(layers, domains, facts, checked)

    def known_facts(self) -> dict[str, Any]:
        """The facts by name."""
        return {name: getattr(self, name) for name in self.facts}

    def __add__(self, other: Self) -> Self:
        """The counts of both; their documents are disjoint.

        Raises:
            ValueError: They cannot be added; it says what differs.
        """
        if type(other) is not type(self):
            return NotImplemented
        kind = type(self).__name__
        for name in (*(name for name in self.facts if name not in self.own_facts), "layers"):
            mine, theirs = (getattr(a.header if name == "layers" else a, name) for a in (self, other))
            if mine != theirs:
                which = "" if name == "layers" else f": {mine} and {theirs}"
                raise ValueError(f"{kind} of different {name} cannot be added{which}")
        domains, *places = united(getattr(self, "domains", ()), getattr(other, "domains", ()))
        return self.added(other, domains, {"domain": (places[0], places[1], len(domains))})

    def added(self, other: Self, domains: Sequence[str], places: Mapping[str, Places]) -> Self:
        """The counts of both, with what goes along an axis of `places` at the places it has there."""
        declared = self.declared(self.header.layers, domains, self.known_facts())
        mine, theirs = self.arrays(), other.arrays()
        arrays: dict[str, NDArray[Any]] = {}
        for f in fields(self):  # type: ignore[arg-type]
            sample = getattr(self, f.name)
            if isinstance(sample, HashSample):
                one_group = np.zeros(1, np.int64)
                mine_G, theirs_G, size = places.get(declared[f"{f.name}/hashes"].axes[0], (one_group, one_group, 1))
                both = sample.spread(mine_G, size)
                both.merge(getattr(other, f.name).spread(theirs_G, size))
                arrays |= _by_name(f.name, both)
        for name, array in mine.items():
            if name not in arrays:
                arrays[name] = _total(array, theirs[name], declared[name], places)
        return self.of_arrays(self.header.layers, domains, self.known_facts(), arrays)

    def merge(self, other: Self) -> None:
        """Add the counts of other documents of the same trace, in place."""
        for f in fields(self):  # type: ignore[arg-type]
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, HashSample):
                mine.merge(theirs)
            else:
                for name, array in _by_name(f.name, mine).items():
                    array += _by_name(f.name, theirs)[name]


def _checked(name: str, arrays: Arrays, declared: Array, sizes: dict[str, int]) -> NDArray[Any]:
    """An array that is as declared; `sizes`, those of axes found in other arrays, are added to."""
    if name not in arrays:
        raise ValueError(f"{name} is missing")
    array = arrays[name]
    if array.dtype not in declared.dtypes:
        allowed = " or ".join(str(np.dtype(dtype)) for dtype in declared.dtypes)
        raise ValueError(f"{name} holds {array.dtype}, expected {allowed}")
    shape = [
        sizes.get(axis) if size is None else size for axis, size in zip(declared.axes, declared.shape, strict=True)
    ]
    if array.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{name} has shape {array.shape}, expected {tuple(shape)}")
    sizes.update(zip(declared.axes, array.shape, strict=True))
    for bound, is_least in ((declared.least, True), (declared.most, False)):
        extreme = None if bound is None or not array.size else array.min() if is_least else array.max()
        if extreme is not None and not (extreme >= bound if is_least else extreme <= bound):
            raise ValueError(f"{name} holds {extreme}, expected at {'least' if is_least else 'most'} {bound}")
    return array


def _by_name(name: str, value: Any) -> dict[str, NDArray[Any]]:
    """The arrays of a field; none if it holds something else."""
    if isinstance(value, HashSample):
        return {f"{name}/hashes": value.hashes, **_by_name(name, value.rows)}
    if isinstance(value, dict):
        return {f"{name}/{key}": array for key, array in value.items()}
    return {name: value} if isinstance(value, np.ndarray) else {}


Places = tuple[NDArray[np.int64], NDArray[np.int64], int]
"""Where what goes along an axis of one result and of another stands in that of both, and the size of that."""


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


def _total(mine: NDArray[Any], theirs: NDArray[Any], declared: Array, places: Mapping[str, Places]) -> NDArray[Any]:
    """The sum of two arrays; a table of 32 bits becomes one of 64 only where 32 do not hold the sum."""
    for axis, words in enumerate(declared.axes):
        if words in places:
            mine_D, theirs_D, size = places[words]
            mine, theirs = spread(mine, mine_D, size, axis), spread(theirs, theirs_D, size, axis)
    if declared.dtypes != WIDENING:
        return mine + theirs
    total: NDArray[Any] = mine.astype(np.uint64)
    total += theirs
    return total.astype(np.uint32) if total.max(initial=0) < 2**32 else total
