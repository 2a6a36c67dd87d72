"""The trace: a folder of Parquet files in which each row is a token.

Rule of the package: the format and nothing else. It imports neither torch nor matplotlib and knows no model and no
measure; each file is written once, checksummed and never changed again. `docs/reference/trace-format.md` is the
format in words; `header`, `part`, `counts`, `vocabulary`, `checksums` and `locks` are its pieces, `writer` and
`reader` the entry points.
"""

from moescope.trace.counts import COUNTS_HINT, Counts
from moescope.trace.header import FORMAT_VERSION, Header, Layer
from moescope.trace.part import PHASES, Part, PartFile
from moescope.trace.reader import Trace, as_trace, open_trace, selected_layers
from moescope.trace.vocabulary import Vocabulary
from moescope.trace.writer import TraceWriter

__all__ = [
    "COUNTS_HINT",
    "FORMAT_VERSION",
    "PHASES",
    "Counts",
    "Header",
    "Layer",
    "Part",
    "PartFile",
    "Trace",
    "TraceWriter",
    "Vocabulary",
    "as_trace",
    "open_trace",
    "selected_layers",
]
