"""Watching: somebody else runs a model in a loop of their own; its routers are counted and recorded meanwhile.

Rule of the folder: hooks read and never change, and are gone when the ``with`` block ends, however it ends. `watcher`
is what the caller holds, with the figures of `live`. `passes` has the hooks and follows each forward pass, whose
arguments `calls` reads; `generating` follows ``generate``, and `compiling` makes hooks work in compiled models.
`output` writes a trace of what `sequences` puts together. `callback` reports to a Trainer.
"""

from moescope.errors import require

require("torch", extra="record")
require("transformers", extra="record")

from moescope.watching.watcher import watch  # noqa: E402

__all__ = ["watch"]
