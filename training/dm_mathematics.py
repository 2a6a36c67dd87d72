"""Question and answer pairs of the mathematics dataset, generated, one JSON object a line.

The unit is one pair: {"module": ..., "question": ..., "answer": ...}. Each of the generator's 56 training modules
is drawn ``per_module`` times from seeded generators; Python's hash seed must be 0 to draw the same pairs again. The
package is from 2021; three names that it uses have gone from sympy and numpy since, and are put back here from
outside, without touching its files.

Example:
    PYTHONHASHSEED=0 python training/dm_mathematics.py --package DIR --seed 1 --per-module 500 --output dm-1.jsonl
"""

import argparse
import itertools
import json
import random
import sys
import types
from pathlib import Path

MAX_QUESTION_LENGTH = 160  # the published data's own limits (generate_settings.py)
MAX_ANSWER_LENGTH = 30


def generate(package: Path, seed: int, per_module: int, output: Path) -> int:
    """Write ``per_module`` pairs of every training module to ``output`` and return how many were written."""
    modules = _import_modules(package)
    import numpy as np
    import sympy

    random.seed(seed)
    sympy.core.random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the package draws from the global generators)
    written = 0
    with output.open("w", encoding="utf-8") as file:
        for name, module in sorted(_flatten(modules.train(lambda entropy: entropy)).items()):
            drawn = 0
            while drawn < per_module:
                try:
                    problem = module()
                except AssertionError:  # about one draw in 5,600: the package's own checks reject it
                    continue
                question, answer = str(problem.question), str(problem.answer)
                if len(question) > MAX_QUESTION_LENGTH or len(answer) > MAX_ANSWER_LENGTH:
                    continue
                file.write(json.dumps({"module": name, "question": question, "answer": answer}) + "\n")
                drawn += 1
            written += drawn
    return written


def _import_modules(package: Path) -> types.ModuleType:
    import numpy as np
    from sympy.solvers.diophantine.diophantine import base_solution_linear

    # sympy.solvers.diophantine is also the name of a function, so the module is taken from sys.modules.
    sys.modules["sympy.solvers.diophantine"].base_solution_linear = base_solution_linear
    np.object = object  # noqa: NPY001
    sys.path.insert(0, str(package))
    from mathematics_dataset.sample import polynomials

    # ndarray.itemset left numpy 2; the two places that call it index an object array, which a plain assignment does.
    source = Path(polynomials.__file__).read_text(encoding="utf-8")
    source = source.replace("coeffs.itemset(index, value)", "coeffs[index] = value")
    source = source.replace("expanded_coefficients.itemset(power, coeffs)", "expanded_coefficients[power] = coeffs")
    exec(compile(source, polynomials.__file__, "exec"), polynomials.__dict__)
    from mathematics_dataset.modules import modules
    from mathematics_dataset.util import composition

    # Sentences are put in the order of a set of entities, which would hash by their addresses.
    numbers = itertools.count()
    composition.Entity.__hash__ = lambda self: self.__dict__.setdefault("_number", next(numbers))
    return modules


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}__{key}" if prefix else key
        flat.update(_flatten(value, name) if isinstance(value, dict) else {name: value})
    return flat


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="folder that holds mathematics_dataset/")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--per-module", type=int, default=500)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    print(generate(arguments.package, arguments.seed, arguments.per_module, arguments.output), file=sys.stderr)
