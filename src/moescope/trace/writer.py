"""Writing a trace: created or resumed, one whole part at a time, and complete once its summary is written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

from moescope.errors import TraceDamaged, TraceExists, TraceMismatch, TraceNotFound
from moescope.trace import checksums, gate, header, part_file, vocabulary
from moescope.trace.counts import Counts, check_counts
from moescope.trace.gate import PARTS, SUMMARY, is_part_name, part_name, read_header
from moescope.trace.header import Header
from moescope.trace.locks import locked
from moescope.trace.part import Part
from moescope.trace.part_file import PartFile, is_part
from moescope.trace.rules import check
from moescope.trace.vocabulary import Vocabulary

_NAMES = (checksums.FILE_NAME, header.FILE_NAME, vocabulary.FILE_NAME, SUMMARY)
_OTHER_OUTPUT = "choose another output"


class TraceWriter(AbstractContextManager["TraceWriter"]):
    """Creates a trace, or resumes an unfinished one whose header agrees.

    Args:
        path: Folder of the trace.
        header: What is recorded; that of a resumed trace must agree (`Header.differences`), and stays as it is.
        vocabulary: Text pieces of the tokenizer.
        force: Replace a trace that is complete, damaged or has another header. Anything but a trace is never replaced.
    Raises:
        TraceExists: The path holds a complete trace, or something else.
        TraceMismatch: The path holds an unfinished trace with another header; the differing fields are named.
        TraceDamaged: The path holds a trace whose list does not have all of its files.
        TraceBusy: Another process is writing it.
        DiskFull: There is no space left.
    """

    def __init__(self, path: Path | str, header: Header, vocabulary: Vocabulary, *, force: bool = False) -> None:
        self.path = Path(path)
        self.header = header
        self._undo = ExitStack()
        refuse_foreign(self.path, force=force)
        with checksums.no_room(self.path):
            (self.path / PARTS).mkdir(parents=True, exist_ok=True)
        self._undo.enter_context(locked(self.path))
        try:
            if force and not self._can_resume():
                self._clear()
            self.progress: list[dict[str, Any]] = self._resume()
            self._create(vocabulary)
        except BaseException:
            self.close()
            raise

    def _can_resume(self) -> bool:
        if (self.path / SUMMARY).exists() or _unlisted(self.path, force=True):
            return False
        return not (self.path / header.FILE_NAME).exists() or not self.header.differences(read_header(self.path))

    def _clear(self) -> None:
        """Remove the files of a trace, and no others; interrupted at any point, it can be repeated.

        The last part goes first, so that what is left is a beginning.
        """
        listed = _list(self.path, force=True)
        for name in sorted(gate.part_files(self.path), reverse=True):
            if name in listed or is_part(self.path / name):
                (self.path / name).unlink()
        # The header last: it identifies what is left without a list as a trace.
        for name in (SUMMARY, checksums.FILE_NAME, vocabulary.FILE_NAME, header.FILE_NAME):
            (self.path / name).unlink(missing_ok=True)

    def _resume(self) -> list[dict[str, Any]]:
        """Remove what an interruption left unfinished; return the progress of the finished parts."""
        if (self.path / SUMMARY).exists():
            raise TraceExists(self.path, "holds a complete trace, which is kept", "--force records it again")
        sums = checksums.read(self.path)
        if header.FILE_NAME in sums and (self.path / header.FILE_NAME).exists():
            refuse_other(self.path, self.header, read_header(self.path))
        while sums and not (self.path / list(sums)[-1]).exists():
            sums.popitem()  # listed, but killed before it was renamed, or while files were removed
        for folder in (self.path, self.path / PARTS):
            for leftover in folder.glob(f"*{checksums.TEMPORARY}"):
                name = leftover.relative_to(self.path).as_posix().removesuffix(checksums.TEMPORARY)
                if name in _NAMES or is_part_name(name):
                    leftover.unlink()
        checksums.rewrite(self.path, sums)
        names = [name for name in gate.listed_files(self.path, sums) if is_part_name(name)]
        gate.check_numbers(self.path, names)
        return [PartFile(self.path / name, self.header).progress for name in names]

    def _create(self, pieces: Vocabulary) -> None:
        """Write the files that precede the parts; ``trace.json`` last, because it makes the folder a trace."""
        if header.FILE_NAME in checksums.read(self.path):
            return
        checksums.rewrite(self.path, {})
        checksums.commit(self.path, vocabulary.FILE_NAME, pieces.write)
        checksums.commit_bytes(self.path, header.FILE_NAME, self.header.to_json().encode())

    def write(self, rows: Part | Counts, progress: Mapping[str, Any]) -> None:
        """Write the next part; once this returns, no kill or crash can lose it.

        Args:
            rows: Whole documents; counts if the header says so.
            progress: JSON-able state from which the recorder resumes after this part.
        Raises:
            ValueError: The part contradicts the header or the format.
            DiskFull: There is no space left; the parts before this one are kept.
        """
        name = part_name(len(self.progress))
        if isinstance(rows, Counts):
            check_counts(rows, self.header)
            checksums.commit(self.path, name, lambda file: part_file.write_counts(file, rows, self.header, progress))
        else:
            check(rows, self.header)
            checksums.commit(self.path, name, lambda file: part_file.write_part(file, rows, self.header, progress))
        self.progress.append(dict(progress))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Declare the trace complete.

        Args:
            summary: JSON-able totals of the run, such as documents, tokens, malformed records, seconds.
        """
        parts = [PartFile(self.path / part_name(number), self.header) for number in range(len(self.progress))]
        checksums.commit_bytes(self.path, SUMMARY, gate.summary_bytes(summary, parts, self.path))

    def close(self) -> None:
        """Release the trace; an unfinished one can be resumed."""
        self._undo.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def refuse_foreign(path: Path, *, force: bool = False) -> None:
    """Refuse a path that holds anything but a trace, an empty folder or the beginning of a trace.

    Args:
        path: Folder of a trace to be.
        force: Whether a damaged trace does not matter, since it will be replaced.
    Raises:
        TraceExists: It holds something else, which is never replaced.
        TraceDamaged: It holds a trace whose list lacks some of its files, which are kept.
    """
    gate.check_path(path)
    if not path.is_dir():
        if path.exists():
            raise TraceExists(path, "exists and is not a trace", _OTHER_OUTPUT)
        return
    parts = path / PARTS
    for child in (*path.iterdir(), *(parts.iterdir() if parts.is_dir() else ())):
        if child.is_symlink():
            raise TraceExists(child, "is a link; a trace is not written through one", _OTHER_OUTPUT)
    if not {child.name.removesuffix(checksums.TEMPORARY) for child in path.iterdir()} <= {*_NAMES, PARTS}:
        raise TraceExists(path, "exists and is not a trace", _OTHER_OUTPUT)
    if parts.exists() and not parts.is_dir():
        raise TraceExists(parts, "exists and is not a folder", _OTHER_OUTPUT)
    try:
        read_header(path)
    except (TraceNotFound, TraceDamaged):
        if (foreign := _not_of_a_beginning(path)) is not None:
            problem = f"exists and is not a trace: it has {foreign}, but neither header nor list of a trace"
            raise TraceExists(path, problem, _OTHER_OUTPUT) from None
        return
    unlisted = _unlisted(path, force=force)
    for name in unlisted:
        if is_part_name(name) and not is_part(path / name):
            raise TraceExists(path / name, "is in the place of a part of a trace, and is none", _OTHER_OUTPUT)
    if unlisted and not force:
        raise TraceDamaged(
            path,
            f"{unlisted[0]} is not listed in {checksums.FILE_NAME}; it is kept",
            "restore the list, choose another output, or --force to record it again",
        )


def _list(path: Path, *, force: bool) -> dict[str, str]:
    """The list of a trace; if it is damaged and the trace is to be replaced anyway, an empty one."""
    try:
        return checksums.read(path)
    except TraceDamaged:
        if not force:
            raise
        return {}


def _unlisted(path: Path, *, force: bool) -> list[str]:
    """Files that may belong to a trace but are not in its list."""
    names = [name for name in (vocabulary.FILE_NAME, header.FILE_NAME, SUMMARY) if (path / name).exists()]
    names += sorted(gate.part_files(path))
    listed = _list(path, force=force)  # read after the files are listed: a line precedes its file
    return [name for name in names if name not in listed]


def _not_of_a_beginning(path: Path) -> str | None:
    """A file that is not left by the beginning of a trace, which writes the vocabulary first; None if there is none."""
    own = {checksums.FILE_NAME, *(name + checksums.TEMPORARY for name in _NAMES)}
    with suppress(TraceDamaged):
        listed = checksums.read(path)
        if set(listed) <= {vocabulary.FILE_NAME, header.FILE_NAME}:
            own.discard(SUMMARY + checksums.TEMPORARY)
            file = path / vocabulary.FILE_NAME
            if file.exists() and checksums.digest_file(file) == listed.get(vocabulary.FILE_NAME):
                Vocabulary.read(file)
                own.add(vocabulary.FILE_NAME)
        else:
            own.discard(checksums.FILE_NAME)
    files = [child.relative_to(path).as_posix() for child in sorted(path.rglob("*")) if child.name != PARTS]
    return next((name for name in files if name not in own), None)


def refuse_other(path: Path, wanted: Header, found: Header) -> None:
    """Refuse an unfinished trace that another recording began.

    Raises:
        TraceMismatch: The headers differ; the differing fields are named.
    """
    if differences := wanted.differences(found):
        raise TraceMismatch(
            path,
            "holds an unfinished trace of another recording: " + "; ".join(differences[:4]),
            "run the command it was started with, choose another output, or --force to record it again",
        )
