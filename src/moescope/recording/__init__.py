"""Recording: runs a model over a corpus and watches its routers.

Rule of the room: the only one that imports torch and transformers. It never changes what a model computes and leaves no
hook behind; it records the experts that ran, and what it cannot read exactly it refuses. `routers` says where a model
routes, `hooks` notes what comes by, `tokenizer` and `batches` prepare what the model reads, `model` loads it, and
`recorder` is the way from a corpus to a trace, with `lookahead`, which asks routers before their turn, `threads` that
read ahead and write behind, `parts` for what a part holds before it is routed, and `attention`, which leaves out what a
mask excludes. For models larger than memory, `streaming` is that way: `shards` reads a checkpoint, `layerwise` has one
layer of it in memory, `spool` keeps what lies between two layers, and `rehearsal` makes sure, on a small model
(`shrinking`), that a family comes out the same. `watch` looks on while somebody else runs the model: `calls` reads what
it is called with, `live` counts, `sequences` puts a trace together, `callback` reports to a Trainer.
"""

from moescope.errors import require

require("torch", extra="record")
require("transformers", extra="record")

from moescope.recording.model import find_device  # noqa: E402
from moescope.recording.progress import Progress  # noqa: E402
from moescope.recording.recorder import record  # noqa: E402
from moescope.recording.routers import Router  # noqa: E402
from moescope.recording.streaming import Estimate  # noqa: E402
from moescope.recording.watch import watch  # noqa: E402

__all__ = ["Estimate", "Progress", "Router", "find_device", "record", "watch"]
