"""Recordings of other programs, made into traces.

Rule of the room: a module a format, each a function ``read(paths, options, findings)`` that yields documents as the
file has them; ``tokens`` and ``counts`` alone check them. Files are not trusted: nothing of them is executed,
every length is bounded before it is used, what cannot be right is refused, what looks odd is imported and noted, and
what a file does not say is asked for and never guessed in silence. This room imports the trace, the errors, and of the
corpus its decompression.

    sglang, routed_experts, imatrix, bigmoeonedge …    a file -> its documents; a module a format
    documents, events                                  what a document is; rows in any order -> documents
    files, torch_file, gguf                            bounded reading; a pickle is never loaded
    findings                                           what was odd; what the user says
    tokens, counts, assembly, writing                  documents -> a trace, with every check
"""

from moescope.importers.arrays import from_arrays
from moescope.importers.formats import FORMATS, Format, import_trace

__all__ = ["FORMATS", "Format", "from_arrays", "import_trace"]
