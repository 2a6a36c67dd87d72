"""One pass over a trace: the sums from which every measure is computed, labelled and mergeable.

Rule of the room: count, and nothing more. What leaves it are whole numbers: totals, and for each total the sums of
squares and products over documents that give its standard error, so that tallies of disjoint documents add up exactly.
Memory does not grow with the number of tokens. Only the modules of kernels loop over tokens. Measures that need tokens
several times get them from `document_sample`, which holds whole documents up to a bound in bytes.
"""

from moescope.tallying.document_sample import DocumentSample, sample_documents
from moescope.tallying.everything import Everything, count_everything
from moescope.tallying.occurrences import INDENTATION, Occurrences, TokenChoices, find_occurrences
from moescope.tallying.tally import REPEAT_KINDS, Tally, choice_labels, tally

__all__ = [
    "INDENTATION",
    "REPEAT_KINDS",
    "DocumentSample",
    "Everything",
    "Occurrences",
    "Tally",
    "TokenChoices",
    "choice_labels",
    "count_everything",
    "find_occurrences",
    "sample_documents",
    "tally",
]
