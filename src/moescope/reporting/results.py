"""Everything a report shows, gathered from a trace: the measures, the claims, and some documents to look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
    """Measure a trace for a report, all of it; arguments and errors as of `gathering`."""
    with gathering(trace, layers, words) as results:
        return replace(results, found={name: results.found[name] for name in results.found})


@contextmanager
def gathering(trace: Trace, layers: Iterable[int] | None = None, words: Sequence[str] = WORDS) -> Iterator[Results]:
    """Measure a trace for a report, while what is measured already can be shown: the kernels leave Python to others.

    One pass for all counters, then those of the simulations, side by side. Whatever is raised is raised where the
    result is asked for.

    Args:
        trace: The trace.
        layers: Layers to show where each has a panel; None for the first, the middle and the last recorded.
        words: Words whose experts are asked for; indentation is always asked for.
    Yields:
        The results; one that is not there yet is waited for.
    Raises:
        NoSuchLayer: A layer was not recorded.
        TraceDamaged: A page fails its checksum.
    """
    results = Results(trace, shown_layers(trace, layers), tuple(words), _Found())
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
    measures = {name: subject.measure for name, subject in subjects.items() if subject.measure is not None}
    awaited: dict[str, Future[Any]] = {name: Future() for name in subjects if name in jobs or name in measures}
    results.found.update({name: awaited.get(name) for name in subjects})  # in the order of the page

    def play_all() -> None:
        with _told(awaited[name] for name in jobs):
            for name, result in zip(jobs, run_together(recorded, list(jobs.values())), strict=True):
                awaited[name].set_result(result)

    def measure_all() -> None:
        for name, measure in measures.items():
            with _told([awaited[name]]):
                awaited[name].set_result(_known(name, measure, counted, results))

    with ThreadPoolExecutor(2) as pool:
        pool.submit(play_all)
        pool.submit(measure_all)
        yield results


class _Found(dict[str, Any]):
    """Results by subject; one that is still being measured is waited for."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, Future):
            value = self[name] = value.result()
        return value


@contextmanager
def _told(futures: Iterable[Future[Any]]) -> Iterator[None]:
    """Hand what is raised to those who wait."""
    try:
        yield
    except BaseException as error:
        for future in futures:
            if not future.done():
                future.set_exception(error)


def _known(name: str, measure: Any, *arguments: Any) -> Any:
    """The result of a subject; None where the trace does not tell it, which the report leaves out."""
    with guarded(name), suppress(NotRecorded):
        return measure(*arguments)
    return None
