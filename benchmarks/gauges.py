"""What every benchmark needs: the peak memory of a process, and an end in one line where a package is missing.

The peak is VmHWM of /proc: it starts anew with the program that a process runs. `ru_maxrss` of `getrusage` goes on
through fork and exec, so that a child that needs little shows the peak of its parent.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
IMPORTS = "moescope.tally"
"""The least that a call on a trace needs: what it imports before it reads anything."""


def peak_memory() -> float:
    """Most bytes that this process has held since its program started; nan on a system without /proc."""
    if not STATUS.exists():
        return float("nan")
    return int(STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024


def peak_memory_mb() -> float:
    """The same in units of 10**6 bytes, whole ones."""
    peak = peak_memory() / 1e6
    return round(peak) if peak == peak else peak


def in_a_fresh_process(code: str, *arguments: object) -> Any:
    """What the code prints last, as JSON, in a process of its own, which may import this module as `gauges`."""
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    command = [sys.executable, "-c", start + code, *map(str, arguments)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def peaks_of_calls(calls: dict[str, str], path: Path) -> dict[str, float]:
    """Peak memory in MB of a fresh process a call, on the `trace` in that path; and of one that imports alone."""
    start = "import json, sys, gauges, moescope\ntrace = moescope.open_trace(sys.argv[1])\n"
    end = "\nprint(json.dumps(gauges.peak_memory_mb()))"
    return {name: in_a_fresh_process(start + call + end, path) for name, call in {"imports": IMPORTS, **calls}.items()}


def require(*packages: str) -> None:
    """End with status 1 and a line that names the packages which are not installed, each as pip would be told it."""
    missing = [package for package in packages if importlib.util.find_spec(module(package)) is None]
    if missing:
        names = " and ".join(map(module, missing))
        sys.exit(f"error: {Path(sys.argv[0]).name} needs {names}: pip install {' '.join(missing)}")


def module(package: str) -> str:
    return package.partition("==")[0]
