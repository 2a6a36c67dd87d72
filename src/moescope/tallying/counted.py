"""All that one pass over a trace counts, together: what every measure takes in the place of the trace.

A count of many documents is the sum of the counts of some of them, whoever counted which.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moescope.errors import NotRecorded, TraceDamaged
from moescope.tallying import array_file
from moescope.tallying.balance import BalanceCounter
from moescope.tallying.counter import Counter, CountOptions, R, Result, united
from moescope.tallying.document_sample import DocumentCounter, DocumentSample
from moescope.tallying.joint import CoactivationCounter, TransitionCounter
from moescope.tallying.occurrences import WordCounter
from moescope.tallying.one_pass import one_pass
from moescope.tallying.segments import SegmentCounter
from moescope.tallying.tally import Tally, TallyCounter
from moescope.tallying.word_classes import ClassCounter
from moescope.trace import COUNTS_HINT, Header, Layer, Trace, as_trace, selected_layers
from moescope.trace.cover import covered

FORMAT = "moescope-counted"
FORMAT_VERSION = 1

COUNTERS: tuple[type[Counter[Any]], ...] = (
    TallyCounter,
    BalanceCounter,
    CoactivationCounter,
    TransitionCounter,
    SegmentCounter,
    ClassCounter,
    WordCounter,
    DocumentCounter,
)
"""All counters. The next one is added here, and nowhere else."""


@dataclass(frozen=True)
class Counted:
    """What one pass counted; add two of disjoint documents with ``+``.

    Counts are whole numbers and the same whatever the order of the parts and the number of threads.

    Attributes:
        path: Of the trace or the file, for messages.
        header: Of the trace; of a sum what both say.
        domains: Domains counted.
        layers: Layers counted.
        results: What was counted, by the name of the counter.
        absent: What was not, by name: why, and what to do about it.
    """

    path: Path
    header: Header
    domains: tuple[str, ...]
    layers: tuple[Layer, ...]
    results: Mapping[str, Any]
    absent: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)

    def __getitem__(self, counter: type[Counter[R]]) -> R:
        """The result of a counter.

        Raises:
            NotRecorded: The trace does not hold what it counts, or it was not counted; it says which.
        """
        if counter.name in self.results:
            result: R = self.results[counter.name]
            return result
        why = f"the counts hold no {counter.name.replace('_', ' ')}: only {', '.join(self.results)} counted"
        raise NotRecorded(self.path, *self.absent.get(counter.name, (why, "count the trace with moescope.count")))

    def __contains__(self, counter: type[Counter[Any]]) -> bool:
        return counter.name in self.results

    def __add__(self, other: Counted) -> Counted:
        """The counts of both; their documents must be disjoint, their model, layers and kind of recording the same.

        Raises:
            ValueError: They cannot be added; it says what differs.
        """
        if not isinstance(other, Counted):
            return NotImplemented
        mine, theirs = ({f.name: getattr(of.header, f.name) for f in fields(Header)} for of in (self, other))
        sides = ((mine | {"layers": self.layers}), (theirs | {"layers": other.layers}))
        loose = ("corpus", "run")
        for name in mine:
            if name not in loose and sides[0][name] != sides[1][name]:
                raise ValueError(f"counts cannot be added: {name} differ: {sides[0][name]} and {sides[1][name]}")
        if set(self.results) != set(other.results):
            odd = ", ".join(sorted(set(self.results) ^ set(other.results)))
            raise ValueError(f"counts cannot be added: only one of them holds {odd}")
        common: dict[str, Any] = {
            name: {
                key: value for key, value in mine[name].items() if key in theirs[name] and theirs[name][key] == value
            }
            for name in loose
        }
        results = {name: result + other.results[name] for name, result in self.results.items()}
        domains, _, _ = united(self.domains, other.domains)
        return replace(self, header=replace(self.header, **common), domains=domains, results=results)

    def save(self, path: Path | str) -> None:
        """Write a file that `moescope.open_counted` reads; the format is docs/reference/counted-format.md.

        Raises:
            OutputExists: There is something at the path.
        """
        metadata = {
            "header": self.header.to_json(),
            "layers": json.dumps([layer.layer for layer in self.layers]),
            "domains": json.dumps(list(self.domains), ensure_ascii=False),
            "counted": json.dumps({name: result.known_facts() for name, result in self.results.items()}),
            "absent": json.dumps(dict(self.absent)),
        }
        arrays = {f"{name}/{key}": a for name, result in self.results.items() for key, a in result.arrays().items()}
        array_file.write(Path(path), FORMAT, FORMAT_VERSION, metadata, arrays)

    def select_layers(self, layers: Iterable[int] | None) -> tuple[Layer, ...]:
        """The counted layers with these indices, ascending; all of them for None.

        Raises:
            NoSuchLayer: An index is not among the counted layers.
        """
        return selected_layers(self.layers, layers, self.path)

    def need_tokens(self) -> None:
        """Refuse what was counted of a trace of counts.

        Raises:
            NotRecorded: It has no tokens.
        """
        if self.header.counts_only:
            raise NotRecorded(self.path, "holds counts of assignments, and no token", COUNTS_HINT)

    @cached_property
    def trace(self) -> Trace:
        """The documents held, as a trace in memory, for what is simulated token by token.

        Raises:
            NotRecorded: Not all of the documents are held.
        """
        return self[DocumentCounter].as_trace(self.path, self.header)


def open_counted(path: Path | str) -> Counted:
    """Read what `Counted.save` wrote.

    Args:
        path: The file.
    Raises:
        TraceNotFound: There is no file of counts at the path.
        TraceNewer: It was written in a later version of the format.
        TraceDamaged: It is not what its checksum says, or cannot be what was counted.
    """
    path = Path(path)
    metadata, arrays = array_file.read(path, FORMAT, FORMAT_VERSION)
    try:
        header = Header.from_json(metadata["header"], path)
        numbers, names, counted, absent = (
            json.loads(metadata[key]) for key in ("layers", "domains", "counted", "absent")
        )
        layers = tuple(layer for layer in header.layers if layer.layer in numbers)
        if [layer.layer for layer in layers] != numbers or not layers:
            raise ValueError(f"layers {numbers} are not among those of the trace, ascending")
        domains = tuple(names)
        if len(set(domains)) != len(domains) or not all(isinstance(name, str) for name in domains):
            raise ValueError("domains are no distinct names")
        reasons = {str(name): (str(why), None if hint is None else str(hint)) for name, (why, hint) in absent.items()}
        if unknown := set(counted) - {counter.name for counter in COUNTERS}:
            raise ValueError(f"there is no counter {min(unknown)!r}")
        results = {}
        for counter in COUNTERS:
            if counter.name in counted:
                prefix = f"{counter.name}/"
                mine = {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
                facts = {
                    name: tuple(fact) if isinstance(fact, list) else fact
                    for name, fact in counted[counter.name].items()
                }
                results[counter.name] = counter.result_type.restored(layers, domains, facts, mine)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise TraceDamaged(path, f"cannot be what was counted: {error}") from None
    return Counted(path, header, domains, layers, results, reasons)


Source = Trace | Counted | Result | Path | str
"""What a measure is given: a trace, the folder of one, what was counted of one, or the one result it needs of that."""


def count(
    trace: Trace | Path | str,
    layers: Iterable[int] | None = None,
    *,
    words: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    max_bytes: int | None = None,
    threads: int | None = None,
) -> Counted:
    """Count a trace for all measures in one pass.

    Takes the memory of all counters. With one thread, for 60 layers of 256 experts, 8 a token, a whole process peaked
    at 1.3 GB for 200,000 tokens, 0.1 GB of it documents, which grow to `max_bytes` and no further; each further thread
    adds its own counts, about 0.6 GB there (docs/decisions/log.md).

    Args:
        trace: The trace, complete or not, or its folder.
        layers: Layers to count, or None for all.
        words: Words to find, whole and with their case, ``<indentation>`` for the indentation of lines; None for
            those that the claims ask for, where the trace has a text.
        lengths: Tokens of a segment; None for 4, 16, 64 and 256.
        max_bytes: Memory of the documents to aim at; None for 1 GiB.
        threads: Parts counted at a time; None for the number of processors.
    Raises:
        NoSuchLayer: A layer was not recorded.
        NotRecorded: Words are asked for, and the trace has no text.
        TraceDamaged: A page fails its checksum.
        ValueError: `threads` is not positive, or a length cannot be.
    """
    options = CountOptions(
        words=None if words is None else tuple(words),
        lengths=None if lengths is None else tuple(lengths),
        max_bytes=max_bytes,
    )
    opened = as_trace(trace)
    required = [WordCounter] if words else []
    return count_with(COUNTERS, opened, layers, options, required=required, threads=threads)


def tally(trace: Trace | Path | str, layers: Iterable[int] | None = None, *, threads: int | None = None) -> Tally:
    """Count what shares, divergence and repeats need of a trace, in one pass.

    Args:
        trace: The trace, complete or not, or its folder.
        layers: Layers to count, or None for all.
        threads: Parts counted at a time; None for the number of processors.
    Returns:
        The tally; its memory does not depend on the number of tokens.
    Raises:
        NoSuchLayer: A layer was not recorded.
        TraceDamaged: A page fails its checksum.
        ValueError: `threads` is not positive.
    """
    return count_with((TallyCounter,), as_trace(trace), layers, threads=threads)[TallyCounter]


def count_with(
    counters: Sequence[type[Counter[Any]]],
    trace: Trace,
    layers: Iterable[int] | None = None,
    options: CountOptions = CountOptions(),  # noqa: B008 (frozen)
    *,
    required: Sequence[type[Counter[Any]]] = (),
    threads: int | None = None,
) -> Counted:
    """Count a trace with some counters in one pass, without what it does not hold; arguments and errors as of `count`.

    Args:
        options: What the counters are asked for.
        required: Counters that must not be left out.
    Raises:
        NotRecorded: The trace does not hold what a required counter needs.
    """
    trace = covered(trace, trace.select_layers(layers))
    chosen = trace.select_layers(layers)
    able: list[type[Counter[Any]]] = []
    absent: dict[str, tuple[str, str | None]] = {}
    for counter in counters:
        try:
            counter.need(trace, chosen, options)
            able.append(counter)
        except NotRecorded as error:
            if counter in required:
                raise
            absent[counter.name] = error.problem, error.hint
    if trace.header.counts_only:
        results = {counter.name: counter.of_counts(trace, chosen, options) for counter in able}
    else:
        makers = [counter.prepare(trace, chosen, options) for counter in able]
        filled = one_pass(
            trace,
            chosen,
            lambda: [make() for make in makers],
            threads=threads,
            tokens=any(counter.reads_tokens for counter in able),
            weights=trace.header.weights and any(counter.reads_weights for counter in able),
        )
        results = {counter.name: each.result() for counter, each in zip(able, filled, strict=True)}
    return Counted(trace.path, trace.header, trace.domains, chosen, results, absent)


def counted(
    source: Source,
    *counters: type[Counter[Any]],
    layers: Iterable[int] | None = None,
    options: CountOptions = CountOptions(),  # noqa: B008 (frozen)
    threads: int | None = None,
) -> Counted:
    """What a measure is computed from: what was counted, or else a count of the trace with these counters.

    Raises:
        NotRecorded: The trace does not hold what they count.
        ValueError: Other layers are asked for than were counted.
    """
    source = opened(source)
    if isinstance(source, Trace):
        return count_with(counters, source, layers, options, required=counters, threads=threads)
    if source.select_layers(layers) != source.layers:
        raise ValueError("layers are chosen when a trace is counted: moescope.count(trace, layers)")
    return source


def opened(source: Source) -> Trace | Counted:
    """The trace or the counts themselves; the trace of a path; counts that hold nothing but a result."""
    if isinstance(source, Counted):
        return source
    if not isinstance(source, Result):
        return as_trace(source)
    name = next(counter.name for counter in COUNTERS if counter.result_type is type(source))
    header = source.header
    return Counted(Path("the counts"), header, (), header.layers, {name: source})


def documents_of(
    source: Trace | Counted, layers: Iterable[int], *, ranks: int | None = None, threads: int | None = None
) -> DocumentSample:
    """The documents that were kept, or as many of the trace as fit, with some layers and first choices of a token."""
    if isinstance(source, Counted):
        return source[DocumentCounter]
    options = CountOptions(ranks=ranks)
    return counted(source, DocumentCounter, layers=layers, options=options, threads=threads)[DocumentCounter]


def playable(source: Source, layers: Iterable[int] | None) -> Trace:
    """A trace whose tokens can be gone through in order: the trace itself, or the documents of what was counted.

    Args:
        source: The trace, or what was counted of it.
        layers: Layers that will be looked at, or None for all; tokens that one of them lacks are left out.
    Raises:
        NotRecorded: What was counted does not hold all of the documents, or no token is in all of the layers.
    """
    source = opened(source)
    trace = source.trace if isinstance(source, Counted) else source
    return covered(trace, trace.select_layers(layers))
