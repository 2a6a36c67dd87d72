"""The gauges of the benchmarks: a process's own memory, and a missing package in one line."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))

_SPEC = importlib.util.spec_from_file_location("gauges", ROOT / "benchmarks" / "gauges.py")
assert _SPEC is not None
assert _SPEC.loader is not None
gauges = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(gauges)  # alone: the others' names, cache, record, would hide those of packages


@pytest.mark.skipif(not gauges.STATUS.exists(), reason="needs the peak memory that Linux tells")
def test_a_process_does_not_have_the_peak_of_the_one_that_started_it() -> None:
    ballast = b"\1" * 400_000_000
    assert gauges.peak_memory() > len(ballast)
    child = gauges.in_a_fresh_process("import gauges; print(gauges.peak_memory())")
    assert child < 100_000_000
    held = gauges.in_a_fresh_process(
        "import gauges; held = b'x' * int(sys.argv[1]); print(gauges.peak_memory())", 10**8
    )
    assert child + 0.9e8 < held < child + 1.2e8


def test_memory_is_measured_in_one_place() -> None:
    for path in [*BENCHMARKS, *(ROOT / "tests").rglob("*.py"), *(ROOT / "training").glob("*.py")]:
        if path.name == "gauges.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = {node.attr} if isinstance(node, ast.Attribute) else set()
            assert not names & {"ru_maxrss", "getrusage", "memory_info"}, f"{path}:{node.lineno}"


WITHOUT = """
import runpy, sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None
path = sys.argv[1]
sys.argv = [path, *sys.argv[3:]]
sys.path.insert(0, path.rpartition("/")[0])
runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("cache.py", ["libcachesim"]),
        ("tally.py", ["duckdb", "polars"]),
        ("record.py", ["torch", "transformers"]),
        ("stream.py", ["accelerate"]),
        ("watch.py", ["torch"]),
        ("prefetch.py", ["transformers"]),
    ],
)
def test_a_benchmark_names_the_package_that_it_lacks(name: str, packages: list[str]) -> None:
    command = [sys.executable, "-c", WITHOUT, str(ROOT / "benchmarks" / name), ",".join(packages)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {name} needs {' and '.join(packages)}: pip install {packages[0]}")


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_a_benchmark_asks_for_what_an_extra_or_nobody_installs_before_it_imports_it(path: Path) -> None:
    """A package that is no dependency of moescope is named in `require`, or is moescope's own."""
    of_moescope = {"numpy", "scipy", "numba", "pandas", "pyarrow", "xarray", "moescope", *sys.stdlib_module_names}
    tree = ast.parse(path.read_text())
    imported, required = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
            required |= {argument.value.partition("==")[0] for argument in node.args}
    beside = {other.stem for other in BENCHMARKS} | {"planted"}
    assert imported - of_moescope - beside - required == set()
