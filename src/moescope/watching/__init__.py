"""Watching: somebody else runs a model, in a loop of their own, and its routers are looked at meanwhile."""

from moescope.errors import require

require("torch", extra="record")
require("transformers", extra="record")

from moescope.watching.watcher import watch  # noqa: E402

__all__ = ["watch"]
