"""Recording: runs a model over a corpus and watches its routers.

Rule of the room: the only one that imports torch and transformers. It never changes what a model computes and leaves no
hook behind; it records the experts that ran, and what it cannot read exactly it refuses. `routers` says where a model
routes, `hooks` notes what comes by, `tokenizer` and `batches` prepare what the model reads, `model` loads it,
`attention` skips what a mask excludes, `threads` read ahead and write behind, and `recorder` is the way from a corpus
to a trace.
"""

from moescope.errors import require

require("torch", extra="record")
require("transformers", extra="record")

from moescope.recording.model import find_device  # noqa: E402
from moescope.recording.recorder import Progress, record  # noqa: E402

__all__ = ["Progress", "find_device", "record"]
