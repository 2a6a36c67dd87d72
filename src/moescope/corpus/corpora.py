"""A corpus: the documents of its files, streamed in order, and what a trace stores to identify it."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from moescope.corpus import json_lines, parquet, text_files
from moescope.corpus.documents import Document
from moescope.corpus.layout import File, Layout, find_layout
from moescope.corpus.problems import Problems
from moescope.corpus.records import MISSING, Record, Unreadable, find, kind, names
from moescope.errors import CorpusEmpty, CorpusField

TEXT_FIELD = "text"
PILE_DOMAIN_FIELD = "meta.pile_set_name"
PROBED = 1000
"""Most records read to determine whether a field exists: it may be missing in some; so few take no time."""


@dataclass(frozen=True)
class Corpus:
    """Documents from files; iterating streams them in the order of the corpus, which never changes.

    Attributes:
        path: The path of the corpus, as given.
        name: Name of its file or folder.
        format: ``pile`` (JSON lines with the Pile's fields), ``jsonl``, ``parquet``, ``folder`` or ``text``.
        text_field: Path of the field that holds the text; None if each file is a document.
        domain_field: Path of the field that holds the domain; None if it follows from the file.
        files: The files, in order.
        problems: The records left out in the latest pass.
    """

    path: Path
    name: str
    format: str
    text_field: str | None
    domain_field: str | None
    files: tuple[File, ...]
    problems: Problems = field(compare=False)

    def __iter__(self) -> Iterator[Document]:
        """Stream the documents; a record that cannot be read as one is added to ``problems``.

        Raises:
            CorpusMalformed: At the first such record, if the corpus is read strictly.
        """
        self.problems.begin()
        number = 0  # counts all records of all files, including those left out
        fields = tuple(name for name in (self.text_field, self.domain_field) if name)
        for file in self.files:
            for index, record in enumerate(_records(self.format, file, fields)):
                document = _document(self, file, number, record)
                number += 1
                if isinstance(document, Document):
                    yield document
                elif document:
                    self.problems.report(_place(self.format, file, index), document.problem)
        self.problems.end()

    def fingerprint(self) -> str:
        """Digest of the data.

        Returns:
            SHA-256 in hex: for a file, what ``sha256sum`` prints; for a folder, the digest of the lines
            ``<digest>  <name>`` that it prints for the files in order.
        """
        digests = []
        for file in self.files:
            with file.path.open("rb") as data:
                digests.append(hashlib.file_digest(data, "sha256").hexdigest())
        if not self.path.is_dir():
            return digests[0]
        lines = [f"{digest}  {file.name}\n" for digest, file in zip(digests, self.files, strict=True)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

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
) -> Corpus:
    """Determine what a path holds; its first records determine which fields exist.

    Args:
        path: A file of JSON lines, Parquet or text, a folder of such shards, or a folder of text files.
        text_field: Field that holds the text, dotted if nested; ``text`` by default.
        domain_field: Field that holds the domain; by default the Pile's ``meta.pile_set_name``, and in a corpus
            without it all documents are in one domain, named after the file.
        strict: Raise at the first record that cannot be read, instead of counting and skipping it.
    Raises:
        CorpusNotFound: There is nothing, or nothing that can be read.
        CorpusField: No record has the field.
        CorpusEmpty: There is no record at all.
    """
    path = Path(path)
    layout = find_layout(path)
    if layout.format in ("folder", "text"):
        if given := text_field or domain_field:
            problem = f"its documents are text files, which have no field {given!r}"
            raise CorpusField(path, problem, "the domain of a text file is the subfolder it is in")
        return Corpus(path, layout.name, layout.format, None, None, layout.files, Problems(strict))

    text_field = text_field or TEXT_FIELD
    wanted = domain_field or PILE_DOMAIN_FIELD
    fields = _probe(path, layout, text_field, wanted)
    listed = f"fields found: {', '.join(fields)}"
    missing = f"its first {PROBED} records have no field"
    if text_field not in fields:
        raise CorpusField(path, f"{missing} {text_field!r} for the text", f"--text-field; {listed}")
    if wanted not in fields and domain_field:
        raise CorpusField(path, f"{missing} {wanted!r} for the domain", f"--domain-field; {listed}")
    if wanted not in fields:
        consequence = f"so all documents are in one domain, {layout.files[0].domain!r}"
        remedy = f"--domain-field selects another field ({listed})"
        warnings.warn(f"{layout.name}: {missing} {wanted!r}, {consequence}; {remedy}", stacklevel=2)
        return Corpus(path, layout.name, layout.format, text_field, None, layout.files, Problems(strict))
    is_pile = layout.format == "jsonl" and (text_field, wanted) == (TEXT_FIELD, PILE_DOMAIN_FIELD)
    format = "pile" if is_pile else layout.format
    return Corpus(path, layout.name, format, text_field, wanted, layout.files, Problems(strict))


def _probe(path: Path, layout: Layout, *wanted: str) -> list[str]:
    """The fields of the first records, up to the record by which all wanted fields have been seen."""
    fields: dict[str, None] = {}
    first_problem, num_records = None, 0
    for file in layout.files:
        for index, record in enumerate(islice(_records(layout.format, file), PROBED - num_records)):
            num_records += 1
            if isinstance(record, dict):
                fields |= dict.fromkeys(
                    [*names(record), *(path for path in wanted if find(record, path) is not MISSING)]
                )
                if fields.keys() >= set(wanted):
                    return list(fields)
            elif record and first_problem is None:
                first_problem = f"{_place(layout.format, file, index)}: {record.problem}"
    if first_problem and not fields:
        raise CorpusEmpty(path, f"none of its first {num_records} records can be read; {first_problem}")
    if not fields:
        raise CorpusEmpty(path, "it holds no record")
    return list(fields)


def _records(format: str, file: File, fields: tuple[str, ...] | None = None) -> Iterator[Record]:
    """The records of one file, with at least the requested fields."""
    if format == "parquet":
        return parquet.read(file.path, fields)
    if format in ("folder", "text"):
        return text_files.read(file.path)
    return json_lines.read(file.path)


def _place(format: str, file: File, index: int) -> str:
    """Where a record is, for messages: counted from 1."""
    if format in ("folder", "text"):
        return file.name
    return f"{file.name}, {'row' if format == 'parquet' else 'line'} {index + 1}"


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
