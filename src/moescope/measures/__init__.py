"""What a tally says: a module per question; tally in, labelled result out.

Rule of the room: no drawing, printing or paths, and no loop over tokens: what needs more than sums calls the kernels of
the tallying room. Every result is an `xarray.Dataset` whose
variables carry their unit, definition and source in their attributes, with a null and a 95 % interval wherever a claim
could be made. `statistics` holds what they share; `published` the figures of the paper, to set beside one's own.
"""

from moescope.measures.balance import balance
from moescope.measures.claims import Claim, claims
from moescope.measures.coactivation import coactivation
from moescope.measures.compare import Comparison, compare
from moescope.measures.consistency import consistency
from moescope.measures.divergence import divergence
from moescope.measures.explain import explain
from moescope.measures.locality import locality
from moescope.measures.repeats import repeats
from moescope.measures.saturation import saturation
from moescope.measures.shares import shares
from moescope.measures.syntax import syntax
from moescope.measures.transitions import transitions
from moescope.measures.vocabulary import vocabulary
from moescope.measures.words import words

__all__ = [
    "Claim",
    "Comparison",
    "balance",
    "claims",
    "coactivation",
    "compare",
    "consistency",
    "divergence",
    "explain",
    "locality",
    "repeats",
    "saturation",
    "shares",
    "syntax",
    "transitions",
    "vocabulary",
    "words",
]
