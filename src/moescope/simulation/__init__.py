"""What the routing of a trace is worth: serving decisions simulated on it, token by token.

Rule of the package: it may import the trace, the tallying, the errors and, for intervals, `measures.statistics` and
`measures.groups`; a module a subject; nothing is drawn or printed. Beside every gain stands what a trace without the
locality would give, and the optimum where there is one. Only the modules of kernels loop over tokens.
"""

from moescope.simulation.cache import cache
from moescope.simulation.offloading import offloading
from moescope.simulation.parallel import parallel
from moescope.simulation.placements import Placement, placement
from moescope.simulation.prefetch import prefetch
from moescope.simulation.serving import POLICIES

__all__ = ["POLICIES", "Placement", "cache", "offloading", "parallel", "placement", "prefetch"]
