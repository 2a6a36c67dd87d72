"""The structure of the package: what may import what, what is loaded when, and that a name means one thing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from synthetic import make_part, make_trace

from moescope.trace import Layer

SRC = Path(__file__).parents[1] / "src" / "moescope"

MAY_IMPORT = {
    "errors": "",
    "plugins": "",
    "mini": "",
    "corpus": "",
    "trace": "",
    "engines": "trace",
    "recording": "corpus engines trace",
    "watching": "engines recording trace",
    "importers": "corpus trace",
    "tallying": "trace",
    "measures": "plugins tallying trace",
    "simulation": "measures tallying trace",
    "reporting": "measures plugins simulation tallying trace",
    "explorer": "measures reporting tallying trace",
    "cluster": "recording tallying trace",
    "exporting": "simulation trace",
    "cli": "corpus engines exporting importers measures mini plugins recording reporting simulation tallying trace"
    " watching",
    "__main__": "cli",
}
"""By package, the packages it may import beside `errors` and itself, as the table of DESIGN.md says."""

SIMULATION_TAKES = {"moescope.measures.groups", "moescope.measures.schema", "moescope.measures.statistics"}
"""All that a simulation takes from the measures: how an interval and a result are made, not what is measured."""

ONLY_IN = {
    "matplotlib": ("reporting/figures",),
    "jinja2": ("reporting/page",),
    "torch": ("engines", "watching"),
    "transformers": ("engines", "watching"),
    "duckdb": ("exporting",),
}
"""Packages that come with an extra, and the folders that may import them."""

KNOWN_CIRCLES: list[set[str]] = []
"""Circles that are still there; nothing is added here."""

KNOWN_IMPORTS: set[tuple[str, str]] = set()
"""Imports (module, module) against the table that are still there; nothing is added here."""

SHARED_CLASS_NAMES = {"Estimate"}
"""Names that two classes still share; nothing is added here."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, by its full name."""
    names = {}
    for path in sorted(SRC.rglob("*.py")):
        parts = ("moescope", *path.relative_to(SRC).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(path: Path, *, within_functions: bool) -> set[str]:
    """Modules that a file imports, also under TYPE_CHECKING; of `from a import b`, a.b if it is a module."""

    def statements(node: ast.AST) -> Iterator[ast.stmt]:
        for child in ast.iter_child_nodes(node):
            if within_functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if isinstance(child, ast.stmt):
                    yield child
                yield from statements(child)

    imported = set()
    for statement in statements(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import):
            imported |= {name.name for name in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            assert not statement.level, f"{path}:{statement.lineno} imports relatively"
            names = {f"{statement.module}.{name.name}" for name in statement.names}
            known = names & set(modules())
            imported |= known | ({str(statement.module)} if known != names else set())
    return imported


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules each of which reaches every other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            more = graph.get(waiting.pop(), set()) - seen
            seen |= more
            waiting += more
        return seen

    reach = {module: reached(module) for module in graph}
    together = {module: frozenset(other for other in reach[module] if module in reach[other]) for module in graph}
    return [set(circle) for circle in {circle for circle in together.values() if circle}]


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Under TYPE_CHECKING neither. The root package, which loads a name when it is used, is left out."""
    graph = {
        name: imports_of(path, within_functions=False) & (set(modules()) - {"moescope"})
        for name, path in modules().items()
        if name != "moescope"
    }
    found = [circle for circle in circles(graph) if not any(circle <= known for known in KNOWN_CIRCLES)]
    assert not found, "modules that import each other: " + "; ".join(" ".join(sorted(circle)) for circle in found)


def test_packages_import_in_the_order_of_the_design() -> None:
    wrong = []
    for name, path in modules().items():
        package = name.split(".")[1] if "." in name else None
        for imported in sorted(imports_of(path, within_functions=True) & set(modules())):
            target = imported.split(".")[1] if "." in imported else None
            if package is None or target in (None, package, "errors") or (name, imported) in KNOWN_IMPORTS:
                continue
            assert package in MAY_IMPORT, f"{package} is new: add it to MAY_IMPORT and to the table of DESIGN.md"
            allowed = target in MAY_IMPORT[package].split()
            if (package, target) == ("simulation", "measures"):
                allowed = imported in SIMULATION_TAKES
            if not allowed:
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_what_comes_with_an_extra_is_imported_in_its_own_folder() -> None:
    wrong = []
    for name, path in modules().items():
        for imported in imports_of(path, within_functions=True):
            folders = ONLY_IN.get(imported.split(".")[0])
            if folders is not None and not any(path.is_relative_to(SRC / folder) for folder in folders):
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_two_classes_never_share_a_name() -> None:
    homes = defaultdict(list)
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(name)
    shared = {name: where for name, where in homes.items() if len(where) > 1 and name not in SHARED_CLASS_NAMES}
    assert not shared, shared


HEAVY = ("torch", "transformers", "matplotlib", "jinja2", "numba", "xarray", "pandas", "duckdb")


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_importing_the_package_loads_nothing_heavy() -> None:
    done = python("import sys, moescope; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not set(HEAVY) & set(done.stdout.split())


def test_the_help_of_the_command_line_loads_no_extra() -> None:
    code = "import sys; from click.testing import CliRunner; from moescope.cli import main\n"
    code += "assert CliRunner().invoke(main, ['--help']).exit_code == 0; print(*sys.modules)"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert not set(HEAVY) & set(done.stdout.split())


OF_AN_EXTRA = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "matplotlib", "jinja2", "duckdb")

NOT_WITHOUT = {"record", "report", "demo", "sql", "import"}
"""Commands that need an extra, and `import`, which needs a file of another program."""

ARGUMENTS: dict[str, list[str]] = {
    "words": ["TRACE", "--word", "w3"],
    "compare": ["TRACE", "OTHER"],
    "saturation": ["OTHER", "TRACE"],
    "explain": ["TRACE", "--permutations", "3"],
    "vocabulary": ["TRACE", "--permutations", "3"],
    "export": ["jsonl", "TRACE", "-o", "EXPORTED"],
    "placement": ["TRACE", "--devices", "4", "-o", "PLACED"],
    "parallel": ["TRACE", "--devices", "4", "--prefill", "64", "--decode", "16"],
}
"""Arguments of the commands that take other ones than a trace."""

RUN_WITHOUT = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from click.testing import CliRunner
from moescope.cli import main

wrong = {}
for name, arguments in json.loads(sys.argv[2]).items():
    result = CliRunner().invoke(main, [name, *arguments])
    if result.exit_code:
        wrong[name] = f"{result.exit_code}: {result.output} {result.exception!r}"
print(json.dumps(wrong))
"""


def test_every_measure_and_simulation_works_without_any_extra(tmp_path: Path) -> None:
    """As `pip install moescope` gives it: without [record], [report] and [sql]."""
    from moescope.cli import main

    layers = (Layer(0, 8, 2), Layer(1, 8, 2), Layer(2, 8, 2))
    for seed, name in enumerate(("trace", "other")):
        part = make_part(np.random.default_rng(0), layers, [40] * 12, domains=("A", "B"), weights=True)
        part.expert_ids[1][::7] = np.random.default_rng(seed).permuted(part.expert_ids[1][::7], axis=1)
        make_trace(tmp_path / f"{name}.moe", [part], layers)
    places = {
        "TRACE": str(tmp_path / "trace.moe"),
        "OTHER": str(tmp_path / "other.moe"),
        "EXPORTED": str(tmp_path / "t.jsonl"),
        "PLACED": str(tmp_path / "placement.json"),
    }
    commands = {}
    for name in main.list_commands(None):  # type: ignore[arg-type]
        if name not in NOT_WITHOUT:
            commands[name] = [places.get(argument, argument) for argument in ARGUMENTS.get(name, ["TRACE"])]
    assert len(commands) > 20
    done = python(RUN_WITHOUT, ",".join(OF_AN_EXTRA), json.dumps(commands))
    assert done.returncode == 0, done.stderr
    wrong = json.loads(done.stdout.splitlines()[-1])
    assert not wrong, "\n".join(f"{name}: {problem}" for name, problem in wrong.items())


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_the_block_blocks(package: str) -> None:
    code = RUN_WITHOUT.split("from click")[0] + f"import {package}"
    done = python(code, ",".join(OF_AN_EXTRA), "{}")
    assert done.returncode == 1
    assert f"No module named '{package}'" in done.stderr
