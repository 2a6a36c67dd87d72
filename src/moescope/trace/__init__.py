"""The trace: a folder of Parquet files in which each row is a token.

Rule of the package: the format and nothing else. It imports neither torch nor matplotlib and knows no model and no
measure; each file is written once, checksummed and never changed again. `docs/reference/trace-format.md` is the
format in words. `columns` and `rules` say what is valid; `header`, `part`, `counts` and `vocabulary` are what a trace
holds, `part_file` and `checksums` how it lies on disk; `gate` is passed by every reader; `cover` and
`excluding` leave tokens out, by `kept_rows`; `writer`, `opening`, `reader` and `verifying` are the entry points.
"""

from moescope.trace.columns import DROPPED, PHASES
from moescope.trace.counts import COUNTS_HINT, Counts
from moescope.trace.header import FORMAT_VERSION, Header, Layer
from moescope.trace.opening import as_trace, open_trace
from moescope.trace.part import Part, RowLabels
from moescope.trace.part_file import PART_TOKENS, PartFile
from moescope.trace.reader import Trace, selected_layers
from moescope.trace.vocabulary import Vocabulary
from moescope.trace.writer import TraceWriter

__all__ = [
    "COUNTS_HINT",
    "DROPPED",
    "FORMAT_VERSION",
    "PART_TOKENS",
    "PHASES",
    "Counts",
    "Header",
    "Layer",
    "Part",
    "PartFile",
    "RowLabels",
    "Trace",
    "TraceWriter",
    "Vocabulary",
    "as_trace",
    "open_trace",
    "selected_layers",
]
