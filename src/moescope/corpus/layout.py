"""What is at a path: the files of a corpus and their format.

One classifier (`classify`) says what a file holds, by its first bytes, and by its name where they do not tell, whether
it stands alone or in a folder. A folder holds data files, directly in it or in subfolders that are the domains; or text
files, whose subfolders are the domains; whichever are most of its bytes. Links are followed, and no file is read twice.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from moescope.corpus.compression import BrokenFile, chunks
from moescope.errors import CorpusEmpty, CorpusNotFound

EXPECTED = (
    "a corpus is a file of JSON lines (.jsonl, also as .zst or .gz), a JSON array (.json), CSV, Parquet, Arrow or text"
    " (.txt), a folder of such data files, or a folder of text files with one subfolder per domain"
)
DATA = {"jsonl": "JSON lines", "json": "JSON arrays", "csv": "CSV", "parquet": "Parquet", "arrow": "Arrow"}
"""Formats of data files, as they are called."""

_NAMES = {
    "jsonl": re.compile(r"\.(jsonl|ndjson)(\.(zst|gz))?$|\.json\.(zst|gz)$", re.IGNORECASE),
    "json": re.compile(r"\.json$", re.IGNORECASE),
    "csv": re.compile(r"\.(csv|tsv)(\.(zst|gz))?$", re.IGNORECASE),
    "parquet": re.compile(r"\.parquet$", re.IGNORECASE),
    "arrow": re.compile(r"\.(arrow|feather)$", re.IGNORECASE),
    "text": re.compile(r"\.txt$", re.IGNORECASE),
}
_ARCHIVES = (b"PK\x03\x04", b"7z\xbc\xaf\x27\x1c", b"BZh", b"\xfd7zXZ\x00", b"Rar!\x1a")
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What `datasets` writes beside data."""

_START_BYTES = 1 << 12
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class File:
    """One file of a corpus.

    Attributes:
        path: Its path.
        name: Its name, relative to the folder if the corpus is one; for messages and provenance.
        domain: The domain of its records if they have none of their own.
        kind: What it holds, as of `classify`.
    """

    path: Path
    name: str
    domain: str
    kind: str


@dataclass(frozen=True)
class Layout:
    """What a path means.

    Attributes:
        name: Name of the file or folder.
        format: One of `DATA`, ``text`` or ``folder``.
        files: The files, in order.
    """

    name: str
    format: str
    files: tuple[File, ...]


def find_layout(path: Path) -> Layout:
    """Determine which files a path stands for, and their format.

    Raises:
        CorpusNotFound: There is nothing, or nothing recognised.
        CorpusEmpty: A folder without a file, or with little that can be read.
    """
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise CorpusNotFound(path, "there is nothing at this path", EXPECTED)
    if not path.is_file():
        raise CorpusNotFound(path, "this is neither a file nor a folder; a corpus is read more than once", EXPECTED)
    name, kind = readable(path.name), classify(path)
    if kind == "unknown" and re.match(rb"\s*(\{|\[\s*\{)", _start(path).removeprefix(_BOM)):
        kind = _of_json(path)
    if kind == "unknown":
        if _NAMES["parquet"].search(name):
            raise CorpusNotFound(path, "its name says Parquet, but its first bytes do not (expected PAR1)", EXPECTED)
        raise CorpusNotFound(path, f"its format is unknown (it starts with {_start(path)[:12]!r})", EXPECTED)
    _refuse(path, {path: kind})
    return Layout(name, kind, (File(path, name, _stem(name), kind),))


def readable(name: str) -> str:
    """A file name as valid text: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(name).decode(errors="replace")


def classify(path: Path) -> str:
    """What a file holds.

    Returns:
        One of `DATA`; ``text``, by name; ``archive``; ``pointer`` of Git LFS; ``binary``; ``metadata`` of `datasets`;
        ``object``, a JSON document that is no data; or ``unknown``: text, perhaps, without a name that says so.
    """
    start = _start(path)
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "pointer"
    if start.startswith(_ARCHIVES) or start[257:262] == b"ustar":
        return "archive"
    if start.startswith(b"PAR1") and _ends_with(path, b"PAR1"):
        return "parquet"
    if start.startswith((b"ARROW1\x00\x00", b"\xff\xff\xff\xff")):
        return "arrow"
    if path.name in _METADATA:
        return "metadata"
    named = next((kind for kind, pattern in _NAMES.items() if pattern.search(path.name)), "unknown")
    if named in ("json", "jsonl") and (named == "json" or start.removeprefix(_BOM).lstrip().startswith(b"[")):
        return _of_json(path)
    if named in ("parquet", "arrow"):
        named = "unknown"
    return "binary" if named == "unknown" and b"\0" in start else named


def _of_json(path: Path) -> str:
    """Whether JSON is an array of objects, lines of objects, or another document."""
    start = _start(path).removeprefix(_BOM).lstrip()
    if re.match(rb"\[\s*\{", start):
        return "json"
    try:
        line = b""
        for chunk in chunks(path):
            line += chunk.removeprefix(_BOM)
            if b"\n" in line.lstrip() or len(line) > 1 << 24:
                break
        msgspec.json.decode(line.lstrip().split(b"\n")[0], type=dict[str, msgspec.Raw])
    except (BrokenFile, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "object" if _NAMES["json"].search(path.name) else "jsonl"
    return "jsonl"


def _start(path: Path) -> bytes:
    """The first bytes of a file, decompressed if need be."""
    with path.open("rb") as file:
        start = file.read(_START_BYTES)
    if start[:2] == b"\x1f\x8b" or start[:4] == b"\x28\xb5\x2f\xfd" or start[1:4] == b"\x2a\x4d\x18":
        try:
            return next(chunks(path), b"")[:_START_BYTES]
        except BrokenFile:
            return b""
    return start


def _ends_with(path: Path, end: bytes) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) < 12:
            return False
        file.seek(-len(end), os.SEEK_END)
        return file.read() == end


def _stem(name: str) -> str:
    """The name of a file without the extension of its format."""
    ends: list[int] = [match.start() for pattern in _NAMES.values() if (match := pattern.search(name))]
    return name[: min(ends)] if min(ends, default=0) else Path(name).stem


def _folder(path: Path) -> Layout:
    """The data files or the text files of a folder; hidden entries are ignored."""
    name = readable(path.name if path.name not in ("", "..") else path.resolve().name)
    top = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    if (path / "trace.json").exists():
        raise CorpusNotFound(path, "this is a trace, not a corpus", EXPECTED)
    if (path / "config.json").exists() and any(entry.suffix in (".safetensors", ".bin") for entry in top):
        raise CorpusNotFound(path, "this is a model checkpoint, not a corpus", EXPECTED)
    files, passed_over = _walk(path)
    if passed_over:
        warnings.warn(
            f"{name}: not read, since they lead nowhere or to what is read: {_some(passed_over)}", stacklevel=2
        )
    if not files:
        raise CorpusEmpty(path, "the folder holds no files", EXPECTED)
    kinds = {file: classify(file) for file in files}
    _refuse(path, kinds)
    nbytes = {file: file.stat().st_size for file in files}
    data = {file: kind for file, kind in kinds.items() if kind in DATA}
    text_bytes = sum(nbytes[file] for file, kind in kinds.items() if kind in ("text", "unknown", "object"))
    if data and sum(nbytes[file] for file in data) >= text_bytes:
        return _data_files(path, name, data, [file for file in files if kinds[file] not in (*DATA, "metadata")])
    if 2 * text_bytes < (total := sum(nbytes.values())):
        binary = [file for file, kind in kinds.items() if kind not in ("text", "unknown", "object")]
        problem = (
            f"most of it is not text: of {total:,} bytes in {len(files):,} files {text_bytes:,} are, "
            f"{_some([readable(file.relative_to(path).as_posix()) for file in binary])} are not"
        )
        raise CorpusEmpty(path, problem, EXPECTED)
    return Layout(name, "folder", tuple(_file(file, path, name, kinds[file]) for file in files))


def _refuse(path: Path, kinds: Mapping[Path, str]) -> None:
    """Refuse what stands for data that is not there, or is in a form that is not read."""
    for file, kind in kinds.items():
        where = "it" if file == path else readable(file.relative_to(path).as_posix())
        if kind == "pointer":
            hint = "`git lfs pull` in the repository fetches the file"
            raise CorpusNotFound(path, f"{where} is a Git LFS pointer in place of the file", hint)
        if kind == "archive":
            raise CorpusNotFound(path, f"{where} is an archive, or compressed as none that is read", "unpack it")
        if file == path and kind in ("object", "metadata", "binary"):
            what = "not text" if kind == "binary" else "one JSON document, not an array or lines of objects"
            raise CorpusNotFound(path, f"it is {what}", EXPECTED)


def _data_files(path: Path, name: str, data: Mapping[Path, str], others: list[Path]) -> Layout:
    """The layout of a folder that holds data files, given what else is in it."""
    by_format = {kind: file for file, kind in reversed(list(data.items()))}
    if len(by_format) > 1:
        examples = " and ".join(
            f"{DATA[kind]} ({readable(by_format[kind].relative_to(path).as_posix())})"
            for kind in DATA
            if kind in by_format
        )
        raise CorpusNotFound(path, f"it holds both {examples}", "give one of the files, or split them")
    inside = [file for file in data if file.parent != path]
    if inside and len(inside) < len(data):
        first = next(file for file in data if file.parent == path)
        folder = inside[0].relative_to(path).parts[0]
        problem = f"it holds both shards ({readable(first.name)}) and folders ({readable(folder)}) of them"
        raise CorpusNotFound(path, f"{problem}, so the corpus is ambiguous", "give one of the two")
    (kind,) = by_format
    if others:
        names = [readable(file.relative_to(path).as_posix()) for file in others]
        warnings.warn(f"{name}: not read, since the corpus is its {DATA[kind]} files: {_some(names)}", stacklevel=2)
    return Layout(name, kind, tuple(_file(file, path, name, kind) for file in data))


def _walk(root: Path) -> tuple[list[Path], list[str]]:
    """The visible files below a folder, in order, each once whatever links lead to it; and the links passed over."""
    files: list[Path] = []
    passed_over: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            passed_over.append(readable(folder.relative_to(root).as_posix()))
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in folder.iterdir():
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                waiting.append(entry)
            elif entry.is_file():
                files.append(entry)
            elif entry.is_symlink():
                passed_over.append(readable(entry.relative_to(root).as_posix()))
    kept: list[Path] = []
    for file in sorted(files, key=lambda file: (file.is_symlink(), file.relative_to(root).parts)):
        status = file.stat()
        key = status.st_dev, status.st_ino
        if file.is_symlink() and key in seen:
            passed_over.append(readable(file.relative_to(root).as_posix()))
            continue
        seen.add(key)
        kept.append(file)
    return sorted(kept, key=lambda file: file.relative_to(root).parts), sorted(passed_over)


def _file(file: Path, root: Path, root_name: str, kind: str) -> File:
    relative = file.relative_to(root)
    domain = relative.parts[0] if len(relative.parts) > 1 else root_name
    return File(file, readable(relative.as_posix()), readable(domain), kind)


def _some(names: Iterator[str] | list[str]) -> str:
    """The first three names, and whether there are more."""
    listed = list(names)
    return ", ".join(listed[:3]) + (", …" if len(listed) > 3 else "")
