"""Write documents as a trace."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from moescope.errors import ImportMalformed, TraceExists
from moescope.importers.counts import AssignmentCounts
from moescope.importers.documents import CountedDocument, TokenDocument
from moescope.importers.findings import Findings, Options
from moescope.importers.tokens import Tokens
from moescope.trace import Counts, Part, Trace, TraceWriter, Vocabulary, open_trace
from moescope.trace.gate import SUMMARY


def write(
    out: Path,
    documents: Generator[TokenDocument | CountedDocument, None, None],
    options: Options,
    findings: Findings,
    *,
    corpus: Mapping[str, Any],
    run: Mapping[str, Any],
    vocabulary: Vocabulary | None = None,
    force: bool = False,
) -> Trace:
    """Check the documents, all of one kind, and write them as a trace.

    They are read once, one at a time; the warnings found are issued at the end and stored in the trace.

    Raises:
        ForeignTraceError: The documents are invalid.
    """
    if not force and (out / SUMMARY).exists():  # TraceWriter raises this too, but only after everything is read
        raise TraceExists(out, "holds a complete trace, which is kept", "--force replaces it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        closing(documents),
        tempfile.TemporaryDirectory(prefix=f".{out.name}-", suffix=".import", dir=out.parent) as folder,
    ):
        assembly: Tokens | AssignmentCounts | None = None
        for document in documents:
            if assembly is None:
                kind = Tokens if isinstance(document, TokenDocument) else AssignmentCounts
                assembly = kind(Path(folder), options, findings)
            assembly.add(document)
        if assembly is None:
            raise ImportMalformed(corpus["name"], "holds no routing")
        header = assembly.finish(str(corpus["name"]))
        header = replace(header, corpus=dict(corpus), run=dict(run))
        pieces = vocabulary or Vocabulary(assembly.pieces if header.token_ids else {})
        totals = {"documents": assembly.num_documents, **assembly.totals}
        with TraceWriter(out, header, pieces, force=force) as writer:
            parts: Iterator[tuple[Part | Counts, dict[str, Any]]] = assembly.parts(header)
            for index, (rows, progress) in enumerate(parts):
                if index >= len(writer.progress):  # an interrupted import wrote the others
                    writer.write(rows, progress)
            writer.finish(totals | {"warnings": findings.messages()})
    findings.emit()
    return open_trace(out)
