"""A mutated trace is refused, or answered as the sound one; `mutations.py` does the same ten thousand times."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mutations import COMMANDS, SLOW, Fuzzer


@pytest.mark.parametrize("first", [0, 1000])
def test_no_mutation_of_a_trace_gets_past_a_command(tmp_path: Path, first: int) -> None:
    fuzzer = Fuzzer(tmp_path)
    for number in range(first, first + 2 * len(COMMANDS)):
        if list(COMMANDS)[number % len(COMMANDS)] not in SLOW:
            fuzzer.run(number)
    assert fuzzer.outcomes["refused"] > len(COMMANDS) / 2, "hardly a mutation was found"
