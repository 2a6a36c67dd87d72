"""See where a Mixture-of-Experts language model sends its tokens, and what that is worth.

    import moescope

    trace = moescope.record("path/to/model", "path/to/corpus.jsonl.zst", "pile.moe")
    counts = moescope.count(trace)
    moescope.repeats(counts)
    moescope.report(trace, "report/")

Importing this package imports nothing else: a name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "corpus": "Document open_corpus",
    "engines.transformers.routers": "Router",
    "exporting": "export export_placement sql",
    "importers": "from_arrays import_trace",
    "measures": "balance claims coactivation compare consistency distinct divergence explain locality repeats"
    " saturation shares syntax transitions vocabulary words",
    "measures.compare": "Comparison",
    "recording": "record",
    "reporting": "report",
    "simulation": "Placement cache offloading parallel placement prefetch",
    "tallying": "Counted Tally count open_counted tally",
    "trace": "Trace open_trace",
    "watching": "watch",
    "watching.callback": "RoutingCallback",
}
"""Public names by module; the imports below say their types to a checker and are never run."""

_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from moescope.corpus import Document as Document
    from moescope.corpus import open_corpus as open_corpus
    from moescope.engines.transformers.routers import Router as Router
    from moescope.exporting import export as export
    from moescope.exporting import export_placement as export_placement
    from moescope.exporting import sql as sql
    from moescope.importers import from_arrays as from_arrays
    from moescope.importers import import_trace as import_trace
    from moescope.measures.balance import balance as balance
    from moescope.measures.claims import claims as claims
    from moescope.measures.coactivation import coactivation as coactivation
    from moescope.measures.compare import Comparison as Comparison
    from moescope.measures.compare import compare as compare
    from moescope.measures.consistency import consistency as consistency
    from moescope.measures.distinct import distinct as distinct
    from moescope.measures.divergence import divergence as divergence
    from moescope.measures.explain import explain as explain
    from moescope.measures.locality import locality as locality
    from moescope.measures.repeats import repeats as repeats
    from moescope.measures.saturation import saturation as saturation
    from moescope.measures.shares import shares as shares
    from moescope.measures.syntax import syntax as syntax
    from moescope.measures.transitions import transitions as transitions
    from moescope.measures.vocabulary import vocabulary as vocabulary
    from moescope.measures.words import words as words
    from moescope.recording import record as record
    from moescope.reporting import report as report
    from moescope.simulation import Placement as Placement
    from moescope.simulation import cache as cache
    from moescope.simulation import offloading as offloading
    from moescope.simulation import parallel as parallel
    from moescope.simulation import placement as placement
    from moescope.simulation import prefetch as prefetch
    from moescope.tallying import Counted as Counted
    from moescope.tallying import Tally as Tally
    from moescope.tallying import count as count
    from moescope.tallying import open_counted as open_counted
    from moescope.tallying import tally as tally
    from moescope.trace import Trace as Trace
    from moescope.trace import open_trace as open_trace
    from moescope.watching import watch as watch
    from moescope.watching.callback import RoutingCallback as RoutingCallback


def __getattr__(name: str) -> Any:
    """A public name; one whose extra is not installed is there, and says so when it is used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moescope' has no attribute {name!r}")
    from moescope.errors import MissingExtra

    try:
        return getattr(importlib.import_module(f"moescope.{_HOMES[name]}"), name)
    except MissingExtra as missing:
        error = missing

    def stand_in(*_: Any, **__: Any) -> Any:
        raise error

    stand_in.__name__, stand_in.__doc__ = name, str(error)
    return stand_in


def __dir__() -> list[str]:
    return sorted(__all__)
