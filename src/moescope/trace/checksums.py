"""`SHA256SUMS`: one line per file of the trace, in the format of `sha256sum -c`; it defines what the trace holds.

A file is committed in this order: written under a temporary name, synced, its line appended here and synced, renamed.
A kill at any moment therefore leaves either a line without its file (the file was not finished) or a truncated last
line, never a file without its line, and never a partial file under its final name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moescope.errors import DiskFull, TraceDamaged

FILE_NAME = "SHA256SUMS"
TEMPORARY = ".part"
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_./-]+)")


def read(folder: Path) -> dict[str, str]:
    """The checksum of each listed file by its name; a truncated last line is ignored.

    Raises:
        TraceDamaged: A line is not a checksum and a name, a name points outside the trace, or stands there twice.
    """
    try:
        text = (folder / FILE_NAME).read_bytes().decode("ascii", "replace")
    except FileNotFoundError:
        return {}
    sums: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        match = _LINE.fullmatch(line[:-1])
        if match is None or match[2].startswith("/") or ".." in match[2].split("/"):
            raise TraceDamaged(folder, f"{FILE_NAME} line {number} is not a checksum and a file name")
        if match[2] in sums:
            raise TraceDamaged(folder, f"{FILE_NAME} line {number} lists {match[2]} again")
        sums[match[2]] = match[1]
    return sums


def rewrite(folder: Path, sums: dict[str, str]) -> None:
    """Replace the whole list, atomically."""
    write_temporary(folder, FILE_NAME, "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode())
    (folder / (FILE_NAME + TEMPORARY)).replace(folder / FILE_NAME)
    _sync_folder(folder)


def write_temporary(folder: Path, name: str, data: bytes) -> None:
    """Write and sync what will replace a file, under its temporary name."""
    with no_room(folder), (folder / (name + TEMPORARY)).open("wb") as file:
        file.write(data)
        _sync(file)


def commit(folder: Path, name: str, write: Callable[[BinaryIO], None]) -> str:
    """Write one file of the trace, atomically and listed here; return its checksum.

    Raises:
        DiskFull: There is no space left; nothing is listed and nothing is left behind.
    """
    path = folder / name
    temporary = path.with_name(path.name + TEMPORARY)
    with no_room(folder):
        try:
            with temporary.open("w+b") as file:
                write(file)
                _sync(file)
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            enlist(folder, name, digest)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return digest


def commit_bytes(folder: Path, name: str, data: bytes) -> None:
    """Write one file of the trace that is small; as `commit`."""

    def write(file: BinaryIO) -> None:
        file.write(data)

    commit(folder, name, write)


def enlist(folder: Path, name: str, digest: str) -> None:
    """List a file that is written and synced under its temporary name, then give it its final name.

    Raises:
        DiskFull: There is no space for the line; the file is not listed.
    """
    path, line = folder / name, memoryview(f"{digest}  {name}\n".encode())
    temporary = path.with_name(path.name + TEMPORARY)
    with no_room(folder):
        with (folder / FILE_NAME).open("ab", buffering=0) as sums:  # a buffer would be written once more at the end
            length = os.fstat(sums.fileno()).st_size
            try:
                while line:
                    line = line[sums.write(line) or 0 :]
                os.fsync(sums.fileno())
                temporary.replace(path)
            except BaseException:
                if temporary.exists():
                    os.truncate(folder / FILE_NAME, length)
                raise
        _sync_folder(path.parent)


def check_bytes(folder: Path, name: str, data: bytes, expected: str) -> None:
    """Refuse the bytes of a file that are not those the list has.

    Raises:
        TraceDamaged: The checksum is another.
    """
    if (digest := hashlib.sha256(data).hexdigest()) != expected:
        raise failed(folder, name, expected, digest)


def failed(folder: Path, name: str, expected: str, found: str) -> TraceDamaged:
    """The error for a file that has another checksum than the list."""
    return TraceDamaged(folder, f"{name} fails its checksum (expected {expected[:8]}…, found {found[:8]}…)")


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def no_room(
    folder: Path,
    problem: str = "no space left on the disk; every finished part is kept",
    hint: str | None = "free some space and run the same command again: it resumes where it stopped",
) -> Iterator[None]:
    """Raise `DiskFull` where the system reports that no space is left."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(folder, problem, hint) from None
        raise


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
