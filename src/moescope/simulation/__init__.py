"""What a trace is worth to who serves the model: its routing, replayed on other hardware than it was recorded on.

Rule of the room: it may import the trace, tallying and errors, and of measures the statistics; a module per subject; it
never draws or prints. Beside what the trace gives stands what it would give without its locality.
"""

from moescope.simulation.parallel import parallel
from moescope.simulation.placements import Placement
from moescope.simulation.placing import placement

__all__ = ["Placement", "parallel", "placement"]
