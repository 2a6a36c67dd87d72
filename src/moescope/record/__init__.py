"""Recording: runs a model over a corpus and watches its routers.

Rule of the room: the only one that imports torch and transformers. It never changes what a model computes and leaves no
hook behind; it records the experts that ran, and what it cannot read exactly it refuses. `routers` says where a model
routes, `hooks` notes what comes by, `tokenizer` and `batches` prepare what the model reads, `model` loads it, and
`recorder` is the way from a corpus to a trace.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from moescope.errors import require

require("torch", extra="record")
require("transformers", extra="record")

from moescope.record.model import find_device  # noqa: E402
from moescope.record.recorder import Progress, record  # noqa: E402

__all__ = ["Progress", "find_device", "record"]


class _Room(ModuleType):
    """Lets ``moescope.record(...)`` be the function although the room, its module, bears the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return record(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
