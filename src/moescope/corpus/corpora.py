"""A corpus: the documents of its files, streamed in order, and what a trace stores to identify it."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from moescope.corpus import json_lines, parquet, tables, text_files
from moescope.corpus.documents import Document
from moescope.corpus.layout import DATA, File, find_layout
from moescope.corpus.problems import Problems
from moescope.corpus.records import MISSING, Record, Unreadable, find, kind, names
from moescope.errors import CorpusChanged, CorpusEmpty, CorpusField

TEXT_FIELD = "text"
PILE_DOMAIN_FIELD = "meta.pile_set_name"
MAX_RECORD_BYTES = 1 << 28
"""Largest record, decompressed: a line of JSON, a cell of CSV, a text file; decoded it takes five times as much."""

PROBED = 1000
"""Most records read to determine whether a field exists: it may be missing in some; so few take no time."""


@dataclass(frozen=True)
class Corpus:
    """Documents from files; iterating streams them in the order of the corpus, which never changes.

    Attributes:
        path: The path of the corpus, as given.
        name: Name of its file or folder.
        format: ``pile`` (JSON lines with the Pile's fields), another of `layout.DATA`, ``folder`` or ``text``.
        text_field: Path of the field that holds the text; None if each file is a document.
        domain_field: Path of the field that holds the domain; None if it follows from the file.
        files: The files, in order.
        problems: The records left out in the latest pass.
        max_record_bytes: Largest record that is read, decompressed.
    """

    path: Path
    name: str
    format: str
    text_field: str | None
    domain_field: str | None
    files: tuple[File, ...]
    problems: Problems = field(compare=False)
    max_record_bytes: int = MAX_RECORD_BYTES
    _read: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __iter__(self) -> Iterator[Document]:
        """Stream the documents; a record that cannot be read as one is added to ``problems``.

        Raises:
            CorpusMalformed: At the first such record, if the corpus is read strictly.
        """
        self.problems.begin()
        number = 0  # counts all records of all files, including those left out
        fields = tuple(name for name in (self.text_field, self.domain_field) if name)
        domains: dict[str, str] = {}
        for file in self.files:
            for index, record in enumerate(_records(self, file, fields)):
                document = _document(self, file, number, record)
                number += 1
                if isinstance(document, Document):
                    folded = " ".join(document.domain.casefold().split())
                    if (like := domains.setdefault(folded, document.domain)) != document.domain:
                        both = f"domains {like!r} and {document.domain!r} differ only in case or spaces"
                        self.problems.note(f"{self.name}: {both}; they are two domains of the trace")
                    yield document
                elif document:
                    self.problems.report(_place(self.format, file, index), document.problem)
        self.problems.end()
        if self.format == "folder" and self.problems.count:
            read = len(self.files) - self.problems.count
            self.problems.note(f"{self.name}: {read:,} of {len(self.files):,} files are text and were read")

    def fingerprint(self) -> str:
        """Digest of the data.

        Returns:
            SHA-256 in hex: for a file, what ``sha256sum`` prints; for a folder, the digest of the lines
            ``<digest>  <name>`` that it prints for the files in order.
        """
        stamps, digests = self._stamps(), []
        for file in self.files:
            with file.path.open("rb") as data:
                digests.append(hashlib.file_digest(data, "sha256").hexdigest())
        digest = digests[0]
        if self.path.is_dir():
            lines = [f"{digest}  {file.name}\n" for digest, file in zip(digests, self.files, strict=True)]
            digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        self._read.update(stamps=stamps, digest=digest)
        return digest

    def check_unchanged(self) -> None:
        """See that the files are those of the latest fingerprint: by size and times, and by content if these differ.

        Raises:
            CorpusChanged: They are not.
        """
        before = dict(self._read)
        if not before:
            return
        try:
            stamps = self._stamps()
            if stamps == before["stamps"] or self.fingerprint() == before["digest"]:
                return
            odd = [file.name for file, a, b in zip(self.files, before["stamps"], stamps, strict=True) if a != b]
            problem = f"{odd[0]} was changed while it was read"
        except OSError as error:
            problem = f"cannot be read any more ({error.strerror})"
        hint = "what was recorded is kept, unfinished; record the changed corpus to another output"
        raise CorpusChanged(self.path, problem, hint)

    def _stamps(self) -> list[tuple[int, int, int]]:
        status = [file.path.stat() for file in self.files]
        return [(one.st_size, one.st_mtime_ns, one.st_ino) for one in status]

    def description(self) -> dict[str, Any]:
        """What identifies the corpus in a trace: JSON-able, with names but no paths."""
        return {
            "name": self.name,
            "format": self.format,
            "text_field": self.text_field,
            "domain_field": self.domain_field,
            "num_files": len(self.files),
            "fingerprint": self.fingerprint(),
            "sample": None,
        }


def open_corpus(
    path: str | os.PathLike[str],
    *,
    text_field: str | None = None,
    domain_field: str | None = None,
    strict: bool = False,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Corpus:
    """Determine what a path holds; its first records determine which fields exist.

    Args:
        path: A file of JSON lines, a JSON array, CSV, Parquet, Arrow or text; a folder of such data files, or of text.
        text_field: Field that holds the text, dotted if nested; ``text`` by default.
        domain_field: Field that holds the domain; by default the Pile's ``meta.pile_set_name``, and in a corpus
            without it all documents are in one domain, named after the file.
        strict: Raise at the first record that cannot be read, instead of counting and skipping it.
        max_record_bytes: Largest record, decompressed.
    Raises:
        ValueError: `max_record_bytes` is below 1.
        CorpusTooLarge: A record is larger.
        CorpusNotFound: There is nothing, or nothing that can be read.
        CorpusField: No record has the field.
        CorpusEmpty: There is no record at all.
    """
    if max_record_bytes < 1:
        raise ValueError(f"max_record_bytes is {max_record_bytes}, expected at least 1")
    path = Path(path)
    layout = find_layout(path)
    rest = layout.files, Problems(strict), max_record_bytes
    if layout.format in ("folder", "text"):
        if given := text_field or domain_field:
            problem = f"its documents are text files, which have no field {given!r}"
            raise CorpusField(path, problem, "the domain of a text file is the subfolder it is in")
        return Corpus(path, layout.name, layout.format, None, None, *rest)

    text_field = text_field or TEXT_FIELD
    wanted = domain_field or PILE_DOMAIN_FIELD
    probed = Corpus(path, layout.name, layout.format, text_field, None, *rest)
    fields = _probe(probed, text_field, wanted)
    listed = f"fields found: {', '.join(fields)}"
    missing = f"its first {PROBED} records have no field"
    if text_field not in fields:
        raise CorpusField(path, f"{missing} {text_field!r} for the text", f"--text-field; {listed}")
    if wanted not in fields and domain_field:
        raise CorpusField(path, f"{missing} {wanted!r} for the domain", f"--domain-field; {listed}")
    if wanted not in fields:
        if all(file.domain == layout.files[0].domain for file in layout.files):
            consequence = f"so all documents are in one domain, {layout.files[0].domain!r}"
            remedy = f"--domain-field selects another field ({listed})"
            warnings.warn(f"{layout.name}: {missing} {wanted!r}, {consequence}; {remedy}", stacklevel=2)
        return probed
    is_pile = layout.format == "jsonl" and (text_field, wanted) == (TEXT_FIELD, PILE_DOMAIN_FIELD)
    format = "pile" if is_pile else layout.format
    return Corpus(path, layout.name, format, text_field, wanted, *rest)


def _probe(corpus: Corpus, *wanted: str) -> list[str]:
    """The fields of the first records, up to the record by which all wanted fields have been seen.

    Of formats with columns it is those of the first file, and no column is decoded that nobody asked for.
    """
    fields: dict[str, None] = {}
    first_problem, num_records = None, 0
    schemas = {"parquet": parquet.schema, "arrow": tables.arrow_schema}
    for file in corpus.files:
        if corpus.format in schemas:
            with suppress(pa.ArrowException, OSError):
                names_of_file = list(parquet.field_names(schemas[corpus.format](file.path)))
                fields |= dict.fromkeys(names_of_file)
                if fields.keys() >= set(wanted):
                    return list(fields)
                continue
        for index, record in enumerate(islice(_records(corpus, file), PROBED - num_records)):
            num_records += 1
            if isinstance(record, dict):
                fields |= dict.fromkeys(
                    [*names(record), *(path for path in wanted if find(record, path) is not MISSING)]
                )
                if fields.keys() >= set(wanted):
                    return list(fields)
            elif record and first_problem is None:
                first_problem = f"{_place(corpus.format, file, index)}: {record.problem}"
    if first_problem and not fields:
        raise CorpusEmpty(corpus.path, f"none of its first {num_records} records can be read; {first_problem}")
    if not fields:
        raise CorpusEmpty(corpus.path, "it holds no record")
    return list(fields)


def _records(corpus: Corpus, file: File, fields: tuple[str, ...] | None = None) -> Iterator[Record]:
    """The records of one file, with at least the requested fields."""
    if corpus.format in ("folder", "text"):
        if file.kind in DATA:
            return iter([Unreadable(f"is {DATA[file.kind]}, and most of the folder is text; give it by itself")])
        return text_files.read(file.path, corpus.max_record_bytes)
    if file.kind == "parquet":
        return parquet.read(file.path, fields)
    if file.kind == "arrow":
        return tables.read_arrow(file.path, fields)
    if file.kind == "json":
        return tables.read_array(file.path)
    if file.kind == "csv":
        return tables.read_csv(file.path, corpus.max_record_bytes)
    return json_lines.read(file.path, corpus.max_record_bytes)


_PLACES = {"jsonl": "line", "pile": "line", "json": "item"}


def _place(format: str, file: File, index: int) -> str:
    """Where a record is, for messages: counted from 1."""
    if format in ("folder", "text"):
        return file.name
    return f"{file.name}, {_PLACES.get(format, 'row')} {index + 1}"


def _document(corpus: Corpus, file: File, number: int, record: Record) -> Document | Unreadable | None:
    """The document of a record, or why it has none; None for a blank line."""
    if not isinstance(record, dict):
        return record
    text_field = corpus.text_field or TEXT_FIELD
    text = find(record, text_field)
    domain = find(record, corpus.domain_field) if corpus.domain_field else file.domain
    if text is MISSING or domain is MISSING:
        return Unreadable(f"field {text_field if text is MISSING else corpus.domain_field!r} is missing")
    if not isinstance(text, str):
        return Unreadable(f"field {text_field!r} holds {kind(text)}, not a string")
    if isinstance(domain, int):  # a class label
        domain = str(domain)
    if not isinstance(domain, str) or not domain:
        held = kind(domain) if domain != "" else "an empty string"
        return Unreadable(f"field {corpus.domain_field!r} holds {held}, not the name of a domain")
    return Document(number, domain, text)
