"""Documents and tokens that are left out of a trace, when another program's log is imported or when it is opened.

``documents:3,17-20`` are documents by number, ``tokens:0-8191`` tokens by their place in the trace, from 0. What is
left out is in no number; a token before a gap and the one after it are not neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from moescope.errors import NoSuchDocument, NotRecorded
from moescope.trace.counts import COUNTS_HINT
from moescope.trace.header import Header
from moescope.trace.kept_rows import KeptRows
from moescope.trace.part_file import PartFile
from moescope.trace.reader import Trace

_ITEM = re.compile(r"(documents|tokens):([0-9]{1,18}(?:-[0-9]{1,18})?(?:,[0-9]{1,18}(?:-[0-9]{1,18})?)*)", re.ASCII)


@dataclass(frozen=True)
class Exclusion:
    """What is left out.

    Attributes:
        documents: Runs of numbers of documents.
        tokens: Runs of places of tokens.

    Example:
        >>> Exclusion.parse(["documents:3,17-20", "tokens:0-8191"])
        Exclusion(documents=(range(3, 4), range(17, 21)), tokens=(range(0, 8192),))
    """

    documents: tuple[range, ...] = ()
    tokens: tuple[range, ...] = ()

    @classmethod
    def parse(cls, items: Iterable[str]) -> Self:
        """Read ``documents:LIST`` and ``tokens:LIST``.

        Raises:
            ValueError: An item is neither, or a run ends before it starts.
        """
        runs: dict[str, list[range]] = {"documents": [], "tokens": []}
        for item in items:
            if (match := _ITEM.fullmatch(item)) is None:
                raise ValueError(f"expected documents:LIST or tokens:LIST, such as tokens:0-8191; found {item!r}")
            for run in match[2].split(","):
                first, _, last = run.partition("-")
                runs[match[1]].append(range(int(first), int(last or first) + 1))
                if not runs[match[1]][-1]:
                    raise ValueError(f"{match[1]} {run} end before they start")
        return cls(tuple(runs["documents"]), tuple(runs["tokens"]))

    def kept(self, document: NDArray[np.integer], first: int) -> NDArray[np.bool_]:
        """Which rows are not left out.

        Args:
            document: Number of the document of each, shape (row,).
            first: Place of the first of them in the trace.
        """
        kept = np.ones(len(document), np.bool_)
        for run in self.documents:
            kept &= (document < run.start) | (document >= run.stop)
        for run in self.tokens:
            kept[max(0, run.start - first) : max(0, run.stop - first)] = False
        return kept

    def missing(self, documents: NDArray[np.integer], num_tokens: int) -> str | None:
        """What is to be left out and is not there, which is a mistake, and would pass for done; None if there is none.

        Args:
            documents: Numbers of the documents that there are.
            num_tokens: Tokens that there are.
        """
        for run in self.documents:
            if not ((documents >= run.start) & (documents < run.stop)).any():
                return f"has no document {run.start} to leave out ({len(documents):,} others)"
        for run in self.tokens:
            if run.start >= num_tokens:
                return f"has no token {run.start} to leave out ({num_tokens:,} from 0)"
        return None


def without(trace: Trace, exclude: Sequence[str]) -> Trace:
    """A trace without some of its documents or tokens; its `header.run` says which, under ``exclude``.

    Args:
        trace: The trace.
        exclude: Items as of `Exclusion.parse`.
    Raises:
        ValueError: An item is none that could be.
        NoSuchDocument: The trace does not have what is to be left out, or nothing is left.
        NotRecorded: Tokens are to be left out of a trace of counts.
        TraceDamaged: A page fails its checksum.
    """
    exclusion = Exclusion.parse(exclude)
    if not exclude:
        return trace
    if exclusion.tokens and trace.header.counts_only:
        raise NotRecorded(trace.path, "holds counts of assignments, and no token", COUNTS_HINT)
    header = replace(trace.header, run={**trace.header.run, "exclude": [*excluded(trace.header), *exclude]})
    numbers: list[NDArray[np.int64]] = []
    parts: list[PartFile] = []
    first = 0
    for file in trace.parts:
        rows = file.read_counts() if header.counts_only else file.read((), tokens=False)
        numbers.append(np.unique(rows.document).astype(np.int64))
        kept = exclusion.kept(rows.document, first)
        first += len(kept)
        if kept.all():
            parts.append(file)
        elif kept.any():
            parts.append(KeptRows(file, header, trace.layers, kept))
    if missing := exclusion.missing(np.concatenate([np.zeros(0, np.int64), *numbers]), first):
        raise NoSuchDocument(trace.path, missing)
    if not parts:
        raise NoSuchDocument(trace.path, f"nothing is left without {', '.join(exclude)}")
    return replace(trace, header=header, parts=tuple(parts))


def excluded(header: Header) -> list[str]:
    """What was left out of a trace, when it was imported or opened."""
    items = header.run.get("exclude", [])
    return [str(item) for item in items] if isinstance(items, list) else []
