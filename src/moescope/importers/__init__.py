"""Recordings of other programs, converted to traces.

Rule of the package: one module per format, with a function ``read(paths, options, findings)`` that yields documents as
in the file, or raises `ForeignTraceError`; only ``tokens`` and ``counts`` check them. Files are not trusted: nothing in
them is executed, every length is bounded before it is used, invalid input is refused, unusual input is imported with a
warning, and what a file lacks is asked for, never guessed silently. The package imports the trace, the errors, and the
decompression of the corpus.

    sglang, routed_experts, imatrix, bigmoeonedge …    a file -> its documents; one module per format
    documents, events                                  what a document is; rows in any order -> documents
    files, torch_file, gguf                            bounded reading; a pickle is never loaded
    findings                                           warnings; what the user supplies
    tokens, counts, assembly, writing                  documents -> a trace, with every check
"""

from moescope.importers.arrays import from_arrays
from moescope.importers.formats import FORMATS, Format, import_trace

__all__ = ["FORMATS", "Format", "from_arrays", "import_trace"]
