"""What is at a path: the files of a corpus and their format.

A file is identified by its name, or by its first bytes if the name does not suffice. A folder holds either shards,
directly in it, or text files, whose subfolders are the domains.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from moescope.corpus.compression import BrokenFile, chunks
from moescope.errors import CorpusEmpty, CorpusNotFound

EXPECTED = (
    "a corpus is a file of JSON lines (.jsonl, also as .zst or .gz), Parquet (.parquet) or text (.txt), a folder of"
    " such JSON lines or Parquet files, or a folder of text files with one subfolder per domain"
)
_NAMES = {
    "jsonl": re.compile(r"\.(jsonl|ndjson)(\.(zst|gz))?$|\.json\.(zst|gz)$", re.IGNORECASE),
    "parquet": re.compile(r"\.parquet$", re.IGNORECASE),
    "text": re.compile(r"\.txt$", re.IGNORECASE),
}


@dataclass(frozen=True)
class File:
    """One file of a corpus.

    Attributes:
        path: Its path.
        name: Its name, relative to the folder if the corpus is one; for messages and provenance.
        domain: The domain of its records if they have none of their own.
    """

    path: Path
    name: str
    domain: str


@dataclass(frozen=True)
class Layout:
    """What a path means.

    Attributes:
        name: Name of the file or folder.
        format: ``jsonl``, ``parquet``, ``text`` or ``folder``.
        files: The files, in order.
    """

    name: str
    format: str
    files: tuple[File, ...]


def find_layout(path: Path) -> Layout:
    """Determine which files a path stands for, and their format.

    Raises:
        CorpusNotFound: There is nothing, or nothing recognised.
        CorpusEmpty: A folder without a file.
    """
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise CorpusNotFound(path, "there is nothing at this path", EXPECTED)
    if not path.is_file():
        raise CorpusNotFound(path, "this is neither a file nor a folder; a corpus is read more than once", EXPECTED)
    name = readable(path.name)
    return Layout(name, _format(path), (File(path, name, domain=_stem(name)),))


def readable(name: str) -> str:
    """A file name as valid text: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(name).decode(errors="replace")


def _format(path: Path) -> str:
    try:
        start = next(chunks(path), b"")
    except BrokenFile:
        start = b""
    if start.startswith(b"PAR1"):
        return "parquet"
    if (format := _format_by_name(path.name)) in ("jsonl", "text"):
        return format
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        return "jsonl"
    if format == "parquet":
        raise CorpusNotFound(path, "its name says Parquet, but its first bytes do not (expected PAR1)", EXPECTED)
    raise CorpusNotFound(path, f"its format is unknown (it starts with {start[:12]!r})", EXPECTED)


def _format_by_name(name: str) -> str | None:
    return next((format for format, pattern in _NAMES.items() if pattern.search(name)), None)


def _stem(name: str) -> str:
    """The name of a file without the extension of its format."""
    ends = [match.start() for pattern in _NAMES.values() if (match := pattern.search(name))]
    return name[: ends[0]] if ends and ends[0] else Path(name).stem


def _folder(path: Path) -> Layout:
    """The shards or the text files of a folder; hidden entries are ignored."""
    name = readable(path.name if path.name not in ("", "..") else path.resolve().name)
    top = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    if (path / "trace.json").exists():
        raise CorpusNotFound(path, "this is a trace, not a corpus", EXPECTED)
    if (path / "config.json").exists() and any(entry.suffix in (".safetensors", ".bin") for entry in top):
        raise CorpusNotFound(path, "this is a model checkpoint, not a corpus", EXPECTED)

    shards = {entry: _format_by_name(entry.name) for entry in top if entry.is_file()}
    shards = {entry: format for entry, format in shards.items() if format in ("jsonl", "parquet")}
    if shards:
        return _shards(path, name, shards, [entry for entry in top if entry not in shards])

    walk = chain.from_iterable(_visible_files(entry) for entry in top)
    files = sorted(walk, key=lambda file: file.relative_to(path).parts)
    if not files:
        raise CorpusEmpty(path, "the folder holds no files", EXPECTED)
    if all(_format_by_name(file.name) in ("jsonl", "parquet") for file in files):
        example = files[0].relative_to(path).as_posix()
        raise CorpusNotFound(path, f"its shards are in subfolders ({example})", "give the folder that holds the shards")
    return Layout(name, "folder", tuple(_text_file(file.relative_to(path), path, name) for file in files))


def _shards(path: Path, name: str, shards: dict[Path, str | None], others: list[Path]) -> Layout:
    """The layout of a folder that holds shards, given what else is in it."""
    formats = sorted({format for format in shards.values() if format})
    folders = [entry.name for entry in others if entry.is_dir()]
    if len(formats) > 1:
        raise CorpusNotFound(path, "it holds both JSON lines and Parquet files", "give one of the files, or split them")
    if folders:
        first = next(iter(shards)).name
        problem = f"it holds both shards ({first}) and folders ({folders[0]}), so the corpus is ambiguous"
        raise CorpusNotFound(path, problem, "give one of the two")
    if others:
        ignored = ", ".join(readable(entry.name) for entry in others[:3]) + (", …" if len(others) > 3 else "")
        warnings.warn(f"{name}: not read, since the corpus is its {formats[0]} files: {ignored}", stacklevel=2)
    return Layout(name, formats[0], tuple(File(shard, readable(shard.name), name) for shard in shards))


def _visible_files(entry: Path) -> list[Path]:
    """The file, or all files below the folder."""
    if entry.is_file():
        return [entry]
    visible: list[Path] = []
    for folder, subfolders, files in os.walk(entry, onerror=_raise):
        subfolders[:] = [subfolder for subfolder in subfolders if not subfolder.startswith(".")]
        paths = (Path(folder, file) for file in files if not file.startswith("."))
        visible += [path for path in paths if path.is_file()]
    return visible


def _text_file(relative: Path, root: Path, root_name: str) -> File:
    domain = relative.parts[0] if len(relative.parts) > 1 else root_name
    return File(root / relative, readable(relative.as_posix()), readable(domain))


def _raise(error: OSError) -> None:
    raise error
