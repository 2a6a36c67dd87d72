"""Opening a trace of many parts: ``python benchmarks/opening.py``.

A trace of `--parts` parts of 32 layers, 8 choices a token, 22 domains, is opened and asked for its domains, documents
and tokens, best of ten: by the catalogue of its summary, and, as an unfinished trace, by the footers of its parts.
Beside it, for scale, the time that Python takes to list the files and to ask each for its size.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moescope.trace import Header, Layer, Part, TraceWriter, Vocabulary, open_trace

LAYERS = tuple(Layer(layer, 64, 8) for layer in range(32))


def part(number: int) -> Part:
    """A part of 22 documents of two tokens, each of another domain."""
    tokens = 44
    ids = np.argsort(np.random.default_rng(number).random((tokens, 64)), axis=1)[:, :8]
    return Part(
        np.repeat(np.arange(22 * number, 22 * number + 22), 2),
        np.repeat(np.arange(22), 2),
        tuple(f"domain {d}" for d in range(22)),
        np.zeros(tokens, np.int64),
        np.tile(np.arange(2), 22),
        np.zeros(tokens, np.int64),
        {layer.layer: ids for layer in LAYERS},
    )


def best(call: Callable[[], object], repeats: int = 10) -> float:
    """Processor seconds of the fastest call."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=int, default=1000)
    parts = parser.parse_args().parts
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.moe"
        with TraceWriter(path, Header(LAYERS), Vocabulary({0: b"a"})) as writer:
            for number in range(parts):
                writer.write(part(number), {})
            unfinished = best(lambda: ask(path), 3)
            writer.finish({"tokens": 44 * parts})
        complete = best(lambda: ask(path))
        files = best(lambda: [file.stat().st_size for file in (path / "parts").iterdir()])
    print(f"{parts:,} parts: complete {complete * 1e3:.1f} ms, unfinished {unfinished * 1e3:.1f} ms")
    print(f"to list the files and their sizes {files * 1e3:.1f} ms")


def ask(path: Path) -> object:
    """Open a trace, and ask what it holds."""
    trace = open_trace(path)
    return trace.domain_documents, trace.domain_tokens, trace.num_tokens


if __name__ == "__main__":
    main()
