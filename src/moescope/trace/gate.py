"""The gate that every reader of a trace passes: its list, the files present, and totals that agree.

It reads the small files alone, and of a complete trace that has a catalogue no part at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moescope.errors import TraceDamaged, TraceNotFound
from moescope.trace import checksums, header, plain_json, vocabulary
from moescope.trace.header import Header
from moescope.trace.part_file import PartContents, PartFile, footer_digest

PARTS = "parts"
SUMMARY = "summary.json"
CATALOGUE = "parts"
"""Key of the summary: what each part holds, in the order of the trace."""

_FILES = (header.FILE_NAME, vocabulary.FILE_NAME, SUMMARY)
_PART = re.compile(rf"{PARTS}/\d{{6,}}(-[0-9a-f]{{8,64}})?\.parquet")
_VERIFY = "`moescope verify` names everything that is wrong with it"


@dataclass(frozen=True)
class Opened:
    """What is known of a trace before a part is read.

    Attributes:
        header: The contents of ``trace.json``.
        parts: Its finished parts, in order.
        summary: The totals of the run; None while the trace is unfinished.
    """

    header: Header
    parts: tuple[PartFile, ...]
    summary: dict[str, Any] | None


def part_name(number: int) -> str:
    """Name of a part's file within the trace."""
    return f"{PARTS}/{number:06d}.parquet"


def is_part_name(name: str) -> bool:
    """Whether a name within the trace is one that a part can have."""
    return _PART.fullmatch(name) is not None


def part_files(path: Path) -> list[str]:
    """What is in the folder of parts under the name of a part, listed or not."""
    folder = path / PARTS
    names = (f"{PARTS}/{child.name}" for child in folder.iterdir()) if folder.is_dir() else ()
    return [name for name in names if is_part_name(name)]


def read_header(path: Path) -> Header:
    """Read and validate ``trace.json`` of the folder `path`."""
    return Header.from_json(_header_bytes(path), path)


def check_path(path: Path) -> None:
    """Refuse a path that Parquet's readers cannot be given.

    Raises:
        TraceNotFound: It is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise TraceNotFound(path, "is not a path in UTF-8", "give the folder another name") from None


def _header_bytes(path: Path) -> bytes:
    check_path(path)
    try:
        return (path / header.FILE_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = "nothing there" if not path.exists() else f"no {header.FILE_NAME} in it"
        raise TraceNotFound(path, f"is not a trace: {what}", "`moescope record` creates one") from None


def pass_gate(path: Path) -> Opened:
    """Open a trace, or say what is wrong with it.

    Raises:
        TraceNotFound: There is no trace at the path.
        TraceNewer: It was written in a later version of the format.
        TraceDamaged: A file is missing, is a link, or contradicts another.
    """
    data = _header_bytes(path)
    trace_header = Header.from_json(data, path)
    present = part_files(path)  # before the list is read, in which a part stands before it is there
    sums = checksums.read(path)
    if stray := sorted(set(present) - set(sums)):
        raise TraceDamaged(path, f"{stray[0]} is not listed in {checksums.FILE_NAME}", _VERIFY)
    if header.FILE_NAME not in sums:
        raise TraceDamaged(path, f"{header.FILE_NAME} is not listed in {checksums.FILE_NAME}", _VERIFY)
    checksums.check_bytes(path, header.FILE_NAME, data, sums[header.FILE_NAME])
    names = [name for name in listed_files(path, sums) if name not in _FILES]
    if (path / SUMMARY).exists():
        if SUMMARY not in sums:
            raise TraceDamaged(path, f"{SUMMARY} is not listed in {checksums.FILE_NAME}", _VERIFY)
        summary = read_summary(path, sums[SUMMARY])
        noted = catalogue(path, summary.pop(CATALOGUE, None))
    else:
        summary, noted = None, None
        check_numbers(path, names)
    if noted is None:
        parts = tuple(PartFile(path / name, trace_header, digest=sums[name]) for name in names)
    elif list(noted) == names:
        parts = tuple(PartFile(path / name, trace_header, *noted[name]) for name in names)
    else:
        other = sorted(set(noted) ^ set(names)) or ["the order of its parts"]
        raise TraceDamaged(path, f"{checksums.FILE_NAME} and the catalogue of {SUMMARY} differ in {other[0]}", _VERIFY)
    _check_totals(path, parts, trace_header, summary)
    return Opened(trace_header, parts, summary)


def listed_files(path: Path, sums: Mapping[str, str]) -> list[str]:
    """The files of the list, in its order, each of which is there and is a file.

    The last may be missing while the trace is unfinished: it is being written, or was when the recorder stopped.
    """
    for name in (PARTS, header.FILE_NAME, checksums.FILE_NAME):
        if (path / name).is_symlink():
            raise TraceDamaged(path / name, "is a link; a trace holds its own files")
    names = list(sums)
    for name in names:
        file = path / name
        if name not in _FILES and not is_part_name(name):
            raise TraceDamaged(path, f"{checksums.FILE_NAME} lists {name}, which is no file of a trace")
        if file.is_symlink():
            raise TraceDamaged(file, "is a link; a trace holds its own files")
        if not file.is_file() and (name != names[-1] or (path / SUMMARY).exists()):
            raise TraceDamaged(path, f"{name} is missing", _VERIFY)
    if names and not (path / names[-1]).is_file():
        names.pop()
    return names


def read_summary(path: Path, digest: str) -> dict[str, Any]:
    """``summary.json``, checked.

    Raises:
        TraceDamaged: It is another than the list has, no JSON object, or a value of it has the wrong type.
    """
    data = (path / SUMMARY).read_bytes()
    checksums.check_bytes(path, SUMMARY, data, digest)
    try:
        summary = plain_json.parse_object(data)
        for name in ("tokens", "documents"):
            if name in summary and (type(summary[name]) is not int or summary[name] < 0):
                raise ValueError(f"{name} is {str(summary[name])[:40]}, expected a whole number from 0")
        warnings = summary.get("warnings", [])
        if not isinstance(warnings, list) or not all(isinstance(warning, str) for warning in warnings):
            raise ValueError("warnings are not a list of texts")
    except ValueError as error:
        raise TraceDamaged(path, f"{SUMMARY} is not a valid summary: {error}") from None
    return summary


def catalogue_json(parts: Sequence[PartFile], path: Path) -> list[dict[str, Any]]:
    """What each part holds, for the summary."""
    return [
        {"name": part.path.relative_to(path).as_posix(), "footer": footer_digest(part.path)} | part.contents.to_json()
        for part in parts
    ]


def catalogue(path: Path, notes: Any) -> dict[str, tuple[PartContents, str]] | None:
    """What each part holds, and the checksum of its footer, by its name; None in a summary without a catalogue.

    Raises:
        TraceDamaged: That is not what the notes of a summary say.
    """
    if notes is None:
        return None
    try:
        return {str(note["name"]): (PartContents.from_json(note), str(note["footer"])) for note in notes}
    except (TypeError, KeyError, ValueError) as error:
        raise TraceDamaged(path, f"the catalogue of {SUMMARY} is not valid: {error}") from None


def check_numbers(path: Path, names: Sequence[str]) -> None:
    """The parts of an unfinished trace, which has no totals, are numbered from 0 without a gap."""
    for number, name in enumerate(names):
        if not name.startswith(part_name(number).removesuffix(".parquet")):
            raise TraceDamaged(path, f"{part_name(number)} is missing from {checksums.FILE_NAME}", _VERIFY)


def _check_totals(
    path: Path, parts: Sequence[PartFile], trace_header: Header, summary: Mapping[str, Any] | None
) -> None:
    first: dict[int, Path] = {}
    for part in parts:
        number = part.contents.first_document
        if number in first:
            raise TraceDamaged(part.path, f"holds document {number}, which is in {first[number].name}, too", _VERIFY)
        first[number] = part.path
    if summary is not None and not trace_header.counts_only and "tokens" in summary:
        total = sum(part.num_tokens for part in parts)
        if total != summary["tokens"]:
            raise TraceDamaged(path, f"holds {total} tokens, its summary says {summary['tokens']}", _VERIFY)


def summary_bytes(summary: Mapping[str, Any], parts: Sequence[PartFile], path: Path) -> bytes:
    """The text of ``summary.json``: a line a total, and a line a part."""
    line = partial(json.dumps, ensure_ascii=False, allow_nan=False)
    entries = [line(entry) for entry in catalogue_json(parts, path)]
    totals = [f"{line(name)}: {line(value)}" for name, value in summary.items()]
    listed = f"{line(CATALOGUE)}: [" + ",".join(f"\n  {entry}" for entry in entries) + "\n ]"
    return ("{\n " + ",\n ".join([*totals, listed]) + "\n}\n").encode()
