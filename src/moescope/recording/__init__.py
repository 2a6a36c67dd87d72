"""Recording: from a corpus and any engine to a trace.

Rule of the folder: it knows documents, parts and files, and of engines only their protocol (`engines.protocol`), so
that importing it loads no library of theirs. `portions` divides documents into parts and windows, `parts` has an engine
record one, `recorder` is the way from a corpus to a trace, with `threads` that read ahead and write behind; `progress`
is what is reported.
"""

from moescope.engines.protocol import Estimate
from moescope.recording.progress import Progress
from moescope.recording.recorder import record

__all__ = ["Estimate", "Progress", "record"]
