"""One pass over a trace: the sums from which every measure is computed, labelled and mergeable.

Rule of the room: count, and nothing more. What leaves it are whole numbers: totals, and for each total the sums of
squares and products over documents that give its standard error, so that tallies of disjoint documents add up exactly.
Memory does not grow with the number of tokens. `kernels` is the only module that loops over tokens.
"""

from moescope.tallying.occurrences import INDENTATION, Occurrences, TokenChoices, find_occurrences
from moescope.tallying.tally import REPEAT_KINDS, Tally, choice_labels, tally

__all__ = [
    "INDENTATION",
    "REPEAT_KINDS",
    "Occurrences",
    "Tally",
    "TokenChoices",
    "choice_labels",
    "find_occurrences",
    "tally",
]
