"""Checking every byte and every row of a trace, and keeping what is sound of one that is damaged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moescope.errors import NotRecorded, TraceDamaged
from moescope.trace import checksums, gate, vocabulary
from moescope.trace.counts import Counts
from moescope.trace.gate import SUMMARY
from moescope.trace.header import Header, ranges
from moescope.trace.locks import locked
from moescope.trace.part import Part
from moescope.trace.part_file import PartContents, PartFile
from moescope.trace.vocabulary import Vocabulary

ASIDE = ".damaged"
"""What the name of the folder beside a trace ends in that keeps its dropped parts."""


def verify(path: Path) -> list[TraceDamaged]:
    """Check every file of a trace against its checksum, and every row against the format.

    Returns:
        One error per problem; empty if the trace is sound.
    """
    try:
        sums = checksums.read(path)
    except TraceDamaged as error:
        return [error]
    problems = [*_strays(path, sums), *_failures(path, sums)]
    if problems:
        return problems
    try:
        opened = gate.pass_gate(path)
    except TraceDamaged as error:
        return [error]
    problems += part_problems(opened.parts, opened.header)
    try:
        Vocabulary.read(path / vocabulary.FILE_NAME)
    except TraceDamaged as error:
        problems.append(error)
    return problems


def part_problems(parts: Iterable[PartFile], trace_header: Header) -> Iterator[TraceDamaged]:
    """What is wrong with the rows of the parts of a trace: an error a part, found as they are asked for."""
    seen: set[int] = set()
    for part in parts:
        try:
            documents = _check_part(part, trace_header)
            if again := seen & documents:
                raise TraceDamaged(part.path, f"holds document {min(again)}, which is in another part, too")
            seen |= documents
        except TraceDamaged as error:
            yield error


def _strays(path: Path, sums: dict[str, str]) -> Iterator[TraceDamaged]:
    """Files and links that are not the trace's."""
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_symlink():
            yield TraceDamaged(path, f"{name} is a link; a trace holds its own files")
        elif file.is_file() and name not in (*sums, checksums.FILE_NAME) and not name.endswith(checksums.TEMPORARY):
            yield TraceDamaged(path, f"{name} is not listed in {checksums.FILE_NAME}")


def _failures(path: Path, sums: dict[str, str]) -> Iterator[TraceDamaged]:
    """Listed files that are missing, or not as they were written."""
    complete = (path / SUMMARY).exists()
    for name, expected in sums.items():
        if not (path / name).is_file():
            if complete or name != list(sums)[-1]:
                yield TraceDamaged(path, f"{name} is missing")
        elif (digest := checksums.digest_file(path / name)) != expected:
            yield checksums.failed(path, name, expected, digest)


def _check_part(part: PartFile, trace_header: Header) -> set[int]:
    """Read all of a part, and compare it with what is noted of it; return its documents.

    Raises:
        TraceDamaged: A page, a row, or what is noted of the part is wrong.
    """
    if trace_header.counts_only:
        rows: Part | Counts = part.read_counts()
    else:
        rows = part.read(trace_header.layers, weights=trace_header.weights, predictions=True, scores=True)
    if PartContents.of(rows, trace_header) != part.contents:
        raise TraceDamaged(part.path, "holds other documents, sequences or tokens than are noted of it")
    return set(rows.document[rows.document_starts()[:-1]].tolist())


@dataclass(frozen=True)
class Dropped:
    """A damaged part that is no longer in its trace.

    Attributes:
        name: Its name within the trace.
        problem: What was wrong with it.
        documents: What is known of the documents it held.
    """

    name: str
    problem: str
    documents: str


def drop_damaged(path: Path) -> list[Dropped]:
    """Take the damaged parts out of a complete trace, and keep the others; the files dropped are kept beside it.

    The summary of the trace says from then on what is lost, and every reader shows it as a warning.

    Returns:
        The parts dropped; empty if all are sound.
    Raises:
        TraceDamaged: What is damaged is not a part, or all parts are; nothing is changed.
        TraceBusy: Another process is writing the trace.
    """
    trace_header = gate.read_header(path)
    with locked(path):
        _finish_earlier(path)
        sums = checksums.read(path)
        if not (path / SUMMARY).exists():
            raise TraceDamaged(path, "is unfinished", "finish it first, with the command that began it")
        names = [name for name in sums if gate.is_part_name(name)]
        for error in _failures(path, {name: digest for name, digest in sums.items() if name not in names}):
            raise error
        summary = gate.read_summary(path, sums[SUMMARY])
        noted = gate.catalogue(path, summary.pop(gate.CATALOGUE, None)) or {}
        parts = {name: PartFile(path / name, trace_header, *noted.get(name, ())) for name in names}
        dropped = []
        for name, part in parts.items():
            try:
                for failure in _failures(path, {name: sums[name]}):
                    raise failure
                _check_part(part, trace_header)
            except TraceDamaged as problem:
                dropped.append(Dropped(name, problem.problem, _documents(part)))
        lost = {part.name for part in dropped}
        kept = [part for name, part in parts.items() if name not in lost]
        if not kept:
            raise TraceDamaged(path, "has no sound part", "record it again with --force")
        if not dropped:
            return []
        warnings = [f"{part.name} was damaged and is left out: {part.documents} lost" for part in dropped]
        summary["warnings"] = [*summary.get("warnings", []), *warnings]
        if not trace_header.counts_only:
            summary["tokens"] = sum(part.num_tokens for part in kept)
        _set_aside(path, [path / part.name for part in dropped])
        data = gate.summary_bytes(summary, kept, path)
        checksums.write_temporary(path, SUMMARY, data)
        listed = {name: digest for name, digest in sums.items() if name not in lost}
        checksums.rewrite(path, listed | {SUMMARY: hashlib.sha256(data).hexdigest()})
        _finish_earlier(path)
    return dropped


def _finish_earlier(path: Path) -> None:
    """Put a new summary that is listed already in its place: the last step, which a kill may have prevented."""
    new = path / (SUMMARY + checksums.TEMPORARY)
    if new.is_file() and checksums.read(path).get(SUMMARY) == checksums.digest_file(new):
        new.replace(path / SUMMARY)


def _set_aside(path: Path, files: list[Path]) -> None:
    """Move what is damaged into a folder beside the trace; what an earlier call put there stays."""
    folder = path.with_name(path.name + ASIDE)
    folder.mkdir(exist_ok=True)
    for file in files:
        if file.is_file() and not file.is_symlink():
            number = sum(other.name.startswith(file.name) for other in folder.iterdir())
            file.replace(folder / (file.name + (f".{number}" if number else "")))


def _documents(part: PartFile) -> str:
    """The documents that a damaged part held, as far as it or its trace tells."""
    with suppress(TraceDamaged, NotRecorded):
        numbers = np.unique(part.read((), tokens=False).document).tolist()
        return f"{len(numbers)} of its documents ({ranges(numbers)}) are"
    with suppress(TraceDamaged):
        documents = sum(number for number, _ in part.contents.domains.values())
        return f"its {documents} documents, the first of them {part.contents.first_document}, are"
    return "its documents, whose numbers are not known, are"
