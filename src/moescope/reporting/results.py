"""Everything a report shows, gathered from a trace: the measures, the claims, and some documents to look at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from moescope.errors import NotRecorded
from moescope.measures.claims import SAMPLE_BYTES
from moescope.plugins import guarded
from moescope.reporting.layers import shown_layers
from moescope.reporting.subject import Results, Subject
from moescope.reporting.subjects import load, names
from moescope.simulation.together import Job, run_together
from moescope.tallying import INDENTATION, WORDS, count
from moescope.trace import Trace
from moescope.trace.cover import covered

SEGMENT_LENGTHS = (16,)
"""Tokens of the segments counted for consistency; each length costs as much as the tally."""


def gather(trace: Trace, layers: Iterable[int] | None = None, words: Sequence[str] = WORDS) -> Results:
    """Measure a trace for a report: one pass for all counters, then those of the simulations, side by side.

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
    recorded = covered(trace, trace.layers)
    counted = count(recorded, words=asked, lengths=SEGMENT_LENGTHS, max_bytes=SAMPLE_BYTES)
    subjects: dict[str, Subject] = {}
    jobs: dict[str, Job] = {}
    for name in names():
        with guarded(name):
            subjects[name] = load(name)
            if (play := subjects[name].play) is not None and (job := play(results)) is not None:
                jobs[name] = replace(job, call=partial(_known, name, job.call))
    results.found.update(dict.fromkeys(subjects))  # in the order of the page
    results.found.update(zip(jobs, run_together(recorded, list(jobs.values())), strict=True))
    for name, subject in subjects.items():
        if subject.measure is not None:
            results.found[name] = _known(name, subject.measure, counted, results)
    return results


def _known(name: str, measure: Any, *arguments: Any) -> Any:
    """The result of a subject; None where the trace does not tell it, which the report leaves out."""
    with guarded(name), suppress(NotRecorded):
        return measure(*arguments)
    return None
