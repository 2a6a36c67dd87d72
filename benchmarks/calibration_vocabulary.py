"""How often the intervals of vocabulary specialization hold, and its test rejects, over draws of known generators.

    python benchmarks/calibration_vocabulary.py [--draws 200] [--experts 8 64] [--permutations 19]

The generators are those of `tests/planted.py`: 60 documents of 20 to 100 tokens, 40 ids. The interval is of what other
documents, as many, would show, so its truth is the mean over the draws. A row each way of looking; `sees` says whether
the routing sees the id, so whether the test should reject (at 5 %).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from planted import GENERATORS, planted

import moescope

COLUMNS = ("experts", "driven by", "by", "sees", "measured", "null", "held out", "holds %", "holds null %", "rejects %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--permutations", type=int, default=19)
    arguments = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for num_experts in arguments.experts:
        for kind in GENERATORS:
            if num_experts > 8 and kind == "alternating":
                continue
            rng = np.random.default_rng(1)
            found = [
                moescope.vocabulary(
                    planted(rng, kind, num_experts).sample, [1], permutations=arguments.permutations, top=0, threads=1
                ).sel(layer=1)
                for _ in range(arguments.draws)
            ]
            for by in ("input", "next"):
                value, null, held_out, low, high, p_value = (
                    np.array([float(at[name].sel(by=by)) for at in found])
                    for name in (
                        "specialization",
                        "specialization_null",
                        "held_out",
                        "specialization_low",
                        "specialization_high",
                        "specialization_p",
                    )
                )
                holds, holds_null = (
                    100 * np.mean((low <= truth + 1e-12) & (truth - 1e-12 <= high))
                    for truth in (value.mean(), null.mean())
                )
                sees = kind == "token" and by == "input"
                cells = [num_experts, kind, by, "yes" if sees else "no"]
                cells += [f"{100 * x.mean():.1f}" for x in (value, null, held_out)]
                cells += [f"{x:.1f}" for x in (holds, holds_null, 100 * np.mean(p_value <= 0.05))]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
