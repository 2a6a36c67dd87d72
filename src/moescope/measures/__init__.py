"""What a tally says: a module per question; tally in, labelled result out.

Rule of the room: no drawing, printing or paths, and no pass over tokens. Every result is an `xarray.Dataset` whose
variables carry their unit, definition and source in their attributes, with a null and a 95 % interval wherever a claim
could be made. `statistics` holds what they share; `published` the figures of the paper, to set beside one's own.
"""

from moescope.measures.balance import balance
from moescope.measures.claims import Claim, claims
from moescope.measures.coactivation import coactivation
from moescope.measures.divergence import divergence
from moescope.measures.repeats import repeats
from moescope.measures.shares import shares
from moescope.measures.transitions import transitions
from moescope.measures.words import words

__all__ = ["Claim", "balance", "claims", "coactivation", "divergence", "repeats", "shares", "transitions", "words"]
