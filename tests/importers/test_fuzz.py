"""Hostile inputs end in a clear error or a sound trace; `fuzz.py` does the same ten thousand times."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
from fuzz import MUTATIONS, Fuzzer


@pytest.mark.parametrize("first", [0, 100_000, 200_000])
def test_hostile_inputs_end_in_an_error_of_ours_or_a_sound_trace(first: int, tmp_path: Path) -> None:
    fuzzer = Fuzzer(tmp_path)
    ends = collections.Counter(fuzzer.run(first + number)[1] for number in range(110))
    assert ends["import-malformed"] > 30, ends
    assert ends["trace"] > 3, "no mutation left a file readable: the fuzzer tests nothing deep"
    assert len(MUTATIONS) == 10
