"""One pass over a trace: the sums from which every measure is computed, mergeable, saved and loaded.

A new count is a counter, one module here with its kernels beside it (`tally.py`, `kernels.py`): a `counter.Counter`
that says what it needs of a trace, makes itself empty and gives a `counter.Result`, which adds up. It is named in
`counted.COUNTERS` and nowhere else. Results are whole numbers, with the sums of squares and products over documents
that give errors; memory does not grow with tokens. What goes over tokens several times takes whole documents, up to a
bound in bytes (`document_sample`). Only kernels loop over tokens; those of one measure live beside it, in `measures`.
"""

from moescope.tallying.counted import COUNTERS, Counted, Source, count, open_counted, tally
from moescope.tallying.document_sample import DocumentSample
from moescope.tallying.occurrences import INDENTATION, WORDS, Occurrences, TokenChoices
from moescope.tallying.tally import REPEAT_KINDS, Tally, choice_labels

__all__ = [
    "COUNTERS",
    "INDENTATION",
    "REPEAT_KINDS",
    "WORDS",
    "Counted",
    "DocumentSample",
    "Occurrences",
    "Source",
    "Tally",
    "TokenChoices",
    "choice_labels",
    "count",
    "open_counted",
    "tally",
]
