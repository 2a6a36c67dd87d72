"""Simulation: what the routing of a trace is worth to who serves the model.

Rule of the room: may import trace, tallying and errors, and of measures only its statistics; a module a subject; never
draws or prints. A result is an `xarray.Dataset` in which beside every gain stands what routing without the property
that is used would give. Memory does not grow with tokens, and only the modules of kernels loop over them.
"""

from moescope.simulation.prefetch import prefetch

__all__ = ["prefetch"]
