"""Everything a report shows, measured from one pass over a trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moescope.reporting.layers import shown_layers
from moescope.reporting.subject import SAMPLE_BYTES, WORDS, Results
from moescope.reporting.subjects import SUBJECTS, load
from moescope.tallying import count_everything
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
    shown = shown_layers(trace, layers)
    counted = count_everything(trace, lengths=SEGMENT_LENGTHS, max_bytes=SAMPLE_BYTES)
    results = Results(trace, shown, tuple(words), {})
    for name in SUBJECTS:
        measure = load(name).measure
        results.found[name] = None if measure is None else measure(counted, results)
    return results
