"""How often the intervals of `explain` and `locality` hold the truth, and how often their tests reject what is true.

    python benchmarks/calibration_explain.py --draws 200 --experts 8 64

Draws documents from generators whose answers are exact (tests/planted.py). For each generator and source: the truth,
the mean estimate, how many of the 95 % intervals hold the truth, and how many permutation tests reject at 5 %.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from planted import GENERATORS, planted

from moescope.measures.explain import SOURCES, explain
from moescope.measures.locality import locality


def one(seed: int, kind: str, num_experts: int, documents: int) -> dict[str, tuple[float, float, float, float, float]]:
    """Truth, estimate, low, high and p-value (NaN for locality) of everything that is known."""
    made = planted(np.random.default_rng(seed), kind, num_experts, documents=documents)
    of = explain(made.sample, [1], permutations=39, seed=seed, threads=1).sel(layer=1)
    values = ("bits", "low", "high", "p_value")
    rows = {s: (made.bits[s], *(float(of[v].sel(source=s)) for v in values)) for s in SOURCES if s in made.bits}
    near = locality(made.sample, [1], lags=[1], seed=seed, threads=1).sel(layer=1, kind="first", domain="(all)")
    near = near.sel(pairs="all")
    nothing = float("nan")
    if made.first is not None:
        truths = {"uniform": 1 / num_experts, "popularity": None, "words": made.words}
        rows["rate"] = (made.first, *(float(near[v]) for v in ("rate", "low", "high")), nothing)
        for null, truth in truths.items():
            if truth is not None:
                at = near.sel(null=null)
                value = made.first - truth
                rows[f"excess over {null}"] = (
                    value,
                    *(float(at[v]) for v in ("excess", "excess_low", "excess_high", "p_value")),
                )
    if kind in ("independent", "token", "documents", "collapsed", "layer"):
        at = near.sel(null="document")
        rows["excess over document"] = (
            0.0,
            *(float(at[v]) for v in ("excess", "excess_low", "excess_high", "p_value")),
        )
    if kind in ("independent", "token", "collapsed", "layer"):
        at = near.sel(null="popularity")
        rows["excess over popularity"] = (
            0.0,
            *(float(at[v]) for v in ("excess", "excess_low", "excess_high", "p_value")),
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--generators", nargs="+", default=list(GENERATORS), choices=GENERATORS)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    print("| generator | experts | measure | truth | mean estimate | intervals that hold it | tests that reject |")
    print("|---|---|---|---|---|---|---|")
    with ProcessPoolExecutor(arguments.processes) as pool:
        for kind in arguments.generators:
            for num_experts in arguments.experts:
                draw = partial(one, kind=kind, num_experts=num_experts, documents=arguments.documents)
                draws = list(pool.map(draw, range(arguments.draws)))
                for name in draws[0]:
                    truth, value, low, high, p_value = np.array([rows[name] for rows in draws]).T
                    holds = np.mean((low <= truth + 1e-12) & (truth <= high + 1e-12))
                    rejects = "" if np.isnan(p_value).all() else f"{100 * np.mean(p_value <= 0.05):.1f} %"
                    print(
                        f"| {kind} | {num_experts} | {name} | {truth[0]:.4f} | {value.mean():.4f} "
                        f"| {100 * holds:.1f} % | {rejects} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
