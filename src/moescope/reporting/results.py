"""Everything a report shows, gathered from a trace: the measures, the claims, and some documents to look at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

from moescope.errors import NotRecorded
from moescope.measures.claims import SAMPLE_BYTES
from moescope.plugins import guarded
from moescope.reporting.layers import shown_layers
from moescope.reporting.subject import Results
from moescope.reporting.subjects import load, names
from moescope.tallying import INDENTATION, WORDS, count
from moescope.trace import Trace

SEGMENT_LENGTHS = (16,)
"""Tokens of the segments counted for consistency; each length costs as much as the tally."""


def gather(trace: Trace, layers: Iterable[int] | None = None, words: Sequence[str] = WORDS) -> Results:
    """Measure a trace for a report: one pass for all counters, then each subject in turn.

    Args:
        trace: The trace.
        layers: Layers to show where each has a panel; None for the first, the middle and the last recorded.
        words: Words whose experts are asked for; indentation is always asked for.
    Raises:
        NoSuchLayer: A layer was not recorded.
        TraceDamaged: A page fails its checksum.
    """
    results = Results(trace, shown_layers(trace, layers), tuple(words), {})
    asked = (*words, INDENTATION) if results.has_text else ()
    counted = count(trace, words=asked, lengths=SEGMENT_LENGTHS, max_bytes=SAMPLE_BYTES)
    for name in names():
        results.found[name] = None
        with guarded(name), suppress(NotRecorded):  # what the trace does not tell, the report leaves out
            if (measure := load(name).measure) is not None:
                results.found[name] = measure(counted, results)
    return results
