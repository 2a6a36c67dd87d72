"""Calibration of agreement, kappa, changes of shares, and SRP: how often intervals hold the truth and tests err.

    python benchmarks/calibration_pairs.py [--draws 200]

A row a generator, shape and measure: of the draws, the per cent whose 95 % interval holds the planted value (90 to 99
is right), or in which a test at 5 % finds what is not there (3 to 7). Every draw is a trace (or two) on disk, measured
as a user would.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import moescope
from moescope.trace import Header, Layer, Part, Trace, TraceWriter, Vocabulary, open_trace

DOCUMENTS = 40
SHAPES = ((4, 1), (8, 2), (64, 8), (256, 8))
Row = tuple[str, str, str, float]


def trace_of(path: Path, ids: np.ndarray, lengths: np.ndarray, layer: Layer) -> Trace:
    """A trace of one layer and one domain."""
    document = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    zero = np.zeros(len(ids), np.int64)
    part = Part(document, zero, ("A",), zero, position, position, {0: ids})
    with TraceWriter(path, Header((layer,)), Vocabulary({})) as writer:
        writer.write(part, {})
        writer.finish({})
    return open_trace(path)


def draw(rng: np.random.Generator, scores: np.ndarray, top_k: int) -> np.ndarray:
    """The top-k of the scores with Gumbel noise: draws without replacement."""
    return np.argsort(-(scores + rng.gumbel(size=scores.shape)), axis=1)[:, :top_k]


def kept_or_dealt(rng: np.random.Generator, folder: Path, layer: Layer, draws: int) -> Iterator[Row]:
    """Each document keeps the set of A with a probability of its own, mean 0.6; else B draws anew, of one popularity.

    Then the kappa of sets is 0.6 whatever the popularity, and no share changes.
    """
    held, wrong = [], []
    popularity = rng.normal(0, 0.7, layer.num_experts)
    for number in range(draws):
        lengths = rng.integers(20, 80, DOCUMENTS)
        keep = np.repeat(rng.beta(6, 4, DOCUMENTS), lengths)
        scores = np.tile(popularity, (len(keep), 1))
        a, anew = draw(rng, scores, layer.top_k), draw(rng, scores, layer.top_k)
        b = np.where(rng.random((len(keep), 1)) < keep[:, None], a, anew)
        sides = [trace_of(folder / f"kept-{number}-{name}.moe", x, lengths, layer) for name, x in (("a", a), ("b", b))]
        found = moescope.compare(*sides, threads=1)
        assert found.agreement is not None
        assert found.changes is not None
        at = found.agreement.isel(domain=0, layer=0).sel(kind="set")
        held.append(float(at["kappa_low"]) <= 0.6 <= float(at["kappa_high"]))
        p_values = found.changes["p_value"].isel(domain=0, layer=0).values
        wrong.append(np.nanmean(p_values < 0.05))
    shape = f"{layer.top_k} of {layer.num_experts}"
    yield "kept or dealt", shape, "kappa holds", 100 * float(np.mean(held))
    yield "kept or dealt", shape, "change found", 100 * float(np.mean(wrong))


def in_order(rng: np.random.Generator, folder: Path, layer: Layer, draws: int) -> Iterator[Row]:
    """Documents with favourite experts; a token keeps the set of the one before with a probability of 0 or 0.4."""
    for stay in (0.0, 0.4):

        def routed(documents: int, name: str, stay: float = stay) -> Trace:
            lengths = rng.integers(40, 80, documents)
            taste = np.repeat(rng.normal(0, 0.8, (documents, layer.num_experts)), lengths, axis=0)
            ids = draw(rng, taste, layer.top_k)
            anew = rng.random(len(ids)) >= stay
            anew[np.cumsum(lengths) - lengths] = True
            ids = ids[np.maximum.accumulate(np.where(anew, np.arange(len(ids)), 0))]
            return trace_of(folder / f"{name}.moe", ids, lengths, layer)

        def judged(documents: int, name: str, routed: Callable[[int, str], Trace] = routed):
            found = moescope.consistency(routed(documents, name), lengths=(16,), threads=1)
            return found.isel(domain=0, layer=0, length=0)

        truth = judged(4000, f"truth-{stay}")
        found = [judged(DOCUMENTS, f"order-{stay}-{number}") for number in range(draws)]
        srp = float(truth["srp"])
        held = [float(at["low"]) <= srp <= float(at["high"]) for at in found]
        shape = f"{layer.top_k} of {layer.num_experts}"
        yield f"stays {stay:.0%}", shape, "SRP holds", 100 * float(np.mean(held))
        found_order = 100 * float(np.mean([float(at["p_value"]) < 0.05 for at in found]))
        yield f"stays {stay:.0%}", shape, "order found" + ("" if stay == 0 else " (it is there)"), found_order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    arguments = parser.parse_args()
    print("| routing | shape | measure | % of draws |\n|---|---|---|---|")
    for num_experts, top_k in SHAPES:
        for generator in (kept_or_dealt, in_order):
            with tempfile.TemporaryDirectory() as folder:
                rng = np.random.default_rng(num_experts)
                for row in generator(rng, Path(folder), Layer(0, num_experts, top_k), arguments.draws):
                    print(f"| {' | '.join(row[:3])} | {row[3]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
