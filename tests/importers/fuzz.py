"""Hostile inputs for every importer: ``python tests/importers/fuzz.py --inputs 10000``.

Each input is a genuine file that was truncated, bit-flipped, spliced, given other types, shapes or huge numbers, or a
pickle that would run something. Every one must end in an error of moescope's tree or in a trace that verifies, never in
another exception, and the process must stay below a limit of memory.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from foreign import WRITERS, Foreign

import moescope
from moescope.errors import MoescopeError

LIMIT_BYTES = 2 << 30
NUMBERS = (
    -1, 0, 1, 2, 7, 8, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**30, 0.5, 1e308, -0.0,
)  # fmt: skip
JUNK: tuple[Any, ...] = (
    *NUMBERS,
    None,
    True,
    "",
    "x",
    "0",
    "nan",
    [],
    {},
    [[]],
    [[1], [2, 3]],
    {"a": 1},
    "é\u0000",
    "9" * 400,
)


class Payload:
    """Unpickled by anybody, it creates the file it was given."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.target}",))


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def flipped(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 64))):
        if out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwritten(data: bytes, rng: random.Random) -> bytes:
    """A length or number somewhere becomes huge, negative or zero."""
    out = bytearray(data)
    form = rng.choice(("<I", "<Q", "<H", "<i", "<q", "<B"))
    size = struct.calcsize(form)
    if len(out) >= size:
        at = rng.randrange(len(out) - size + 1)
        high = 2 ** (8 * size)
        value = rng.choice((0, 1, high - 1, high // 2, high // 2 - 1, rng.randrange(high)))
        out[at : at + size] = value.to_bytes(size, "little")
    return bytes(out)


def spliced(data: bytes, rng: random.Random) -> bytes:
    """A piece is doubled, moved or cut out."""
    if len(data) < 4:
        return data * 3
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    return rng.choice(
        (data[:a] + data[b:], data[:b] + data[a:b] * rng.choice((1, 3, 50)) + data[b:], data[b:] + data[:b])
    )


def renumbered(data: bytes, rng: random.Random) -> bytes:
    """In text, a number becomes another."""
    places = [m.span() for m in re.finditer(rb"-?\d+(\.\d+)?", data)]
    for _ in range(rng.choice((1, 1, 3))):
        if places:
            a, b = rng.choice(places)
            data = data[:a] + str(rng.choice(NUMBERS)).encode() + data[b:]
            places = [m.span() for m in re.finditer(rb"-?\d+(\.\d+)?", data)]
    return data


def rejson(data: bytes, rng: random.Random) -> bytes:
    """In JSON, a value becomes something of another type or shape, or a key is lost or doubled."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    try:
        whole = json.loads(data)
        lines, at, value = [data], 0, whole
    except ValueError:
        try:
            value = json.loads(lines[at])
        except ValueError:
            return flipped(data, rng)

    def change(node: Any, depth: int) -> Any:
        if depth > 6 or rng.random() < 0.25 or not isinstance(node, dict | list) or not node:
            return rng.choice(JUNK)
        if isinstance(node, dict):
            node = dict(node)
            key = rng.choice(list(node))
            if rng.random() < 0.2:
                del node[key]
            else:
                node[key] = change(node[key], depth + 1)
            return node
        node = list(node)
        at = rng.randrange(len(node))
        if rng.random() < 0.2:
            node[at : at + 1] = [node[at]] * rng.choice((0, 2, 30))
        else:
            node[at] = change(node[at], depth + 1)
        return node

    lines[at] = json.dumps(change(value, 0)).encode()
    return b"\n".join(lines)


def nested(data: bytes, rng: random.Random) -> bytes:
    """Brackets beyond every depth."""
    return rng.choice((b"[", b'{"a":', b"[[], ", b'{"experts":[')) * rng.choice((10, 1000, 200_000)) + data


def retorched(data: bytes, rng: random.Random) -> bytes:
    """The description within a zip of torch.save is mutated, or becomes a program."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {m.filename: archive.read(m) for m in archive.infolist()}
    except zipfile.BadZipFile:
        return flipped(data, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members.items():
            if name.endswith("data.pkl"):
                content = rng.choice((flipped, overwritten, spliced, truncated, poisoned))(content, rng)
            elif rng.random() < 0.1:
                content = rng.choice((flipped, truncated, spliced, overwritten))(content, rng)
            archive.writestr(name, content)
    return out.getvalue()


def poisoned(data: bytes, rng: random.Random) -> bytes:
    """A pickle that would create a file, in several protocols and disguises."""
    target = os.environ["MOESCOPE_FUZZ_TARGET"]
    payload = Payload(target)
    value = rng.choice((payload, {"records": [payload]}, {"logical_count": payload, "records": []}))
    bomb = b"\x80\x02" + rng.choice((b"]", b"}", b"(")) * 100_000 + b"r\xff\xff\xff\x7f."
    by_name = b"cos\nsystem\n(S'touch " + target.encode() + b"'\ntR."
    built = b"cbuiltins\neval\n(S'1'\ntR."
    return rng.choice((pickle.dumps(value, protocol=rng.choice((0, 1, 2, 3, 4, 5))), bomb, by_name, built))


def shuffled_words(data: bytes, rng: random.Random) -> bytes:
    """In a table, a column's name, a separator or a cell changes."""
    words = re.split(rb"([,\n\s])", data)
    for _ in range(rng.choice((1, 2, 5))):
        at, other = rng.randrange(len(words)), rng.randrange(len(words))
        words[at] = rng.choice((words[other], b"", b'"', b"\xff", b"nan", b"1e999", b"-", b"9" * 30))
    return b"".join(words)


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    truncated, flipped, overwritten, spliced, renumbered, rejson, nested, retorched, poisoned, shuffled_words,
)  # fmt: skip


class Fuzzer:
    """Genuine files of all formats, and the mutations of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target = folder / "payload-ran"
        os.environ["MOESCOPE_FUZZ_TARGET"] = str(self.target)
        self.seeds: list[tuple[str, Foreign]] = []
        for writer in WRITERS:
            inside = folder / writer.__name__
            inside.mkdir()
            self.seeds.append((writer.__name__, writer(inside, np.random.default_rng(0))))
        self.outcomes: collections.Counter[str] = collections.Counter()

    def run(self, number: int) -> tuple[str, str]:
        """One hostile input: the name of its kind, and how it ended.

        Raises:
            AssertionError: It ended in another way than an error of ours or a trace that verifies.
        """
        rng = random.Random(number)
        name, made = self.seeds[number % len(self.seeds)]
        source = self.folder / name
        hostile, out = self.folder / "hostile", self.folder / "out.moe"
        shutil.rmtree(hostile, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(source, hostile)
        victim = rng.choice(sorted(p for p in hostile.iterdir() if p.is_file()))
        useful = [m for m in MUTATIONS if m not in (retorched,) or victim.suffix == ".pt"]
        mutation = rng.choice(useful if victim.suffix != ".pt" else (*useful, retorched, retorched, retorched))
        data = mutation(victim.read_bytes(), rng)
        if rng.random() < 0.2:
            data = rng.choice(MUTATIONS[:4])(data, rng)
        victim.write_bytes(data)
        files = [hostile / path.relative_to(source) if path != source else hostile for path in made.files]
        options = dict(made.options)
        if rng.random() < 0.15:
            options["num_experts"] = rng.choice((1, 2, 8, 256, 65536))
        if rng.random() < 0.1:
            options.pop("num_experts", None)
        kind = f"{made.format} {mutation.__name__}"
        problems, text = [], ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.simplefilter("ignore", UserWarning)
                trace = moescope.import_trace(made.format, files, out, **options)
                problems = trace.verify()
            outcome = "trace"
        except MoescopeError as error:
            outcome, text = error.code, error.render()
        assert not problems, f"{kind}: the trace does not verify: {problems[0]}"
        assert outcome == "trace" or outcome.startswith("import"), f"{kind}: {text}"
        assert len(text) < 2000, f"{kind}: an error of {len(text)} characters"
        assert outcome == "trace" or not (out / "summary.json").exists(), f"{kind}: an error and a trace"
        assert not self.target.exists(), f"{kind}: the payload ran"
        self.outcomes[f"{made.format}: {outcome}"] += 1
        return kind, outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from gauges import peak_memory

    resource.setrlimit(resource.RLIMIT_AS, (4 * LIMIT_BYTES, 4 * LIMIT_BYTES))  # libraries reserve, and use less
    failures = 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        slowest = (0.0, "")
        for number in range(arguments.first, arguments.first + arguments.inputs):
            began = time.monotonic()
            try:
                kind, _ = fuzzer.run(number)
                slowest = max(slowest, (time.monotonic() - began, f"{number} {kind}"))
            except Exception:
                failures += 1
                if failures <= 10:
                    print(f"input {number}:", file=sys.stderr)
                    traceback.print_exc()
            if number % 1000 == 999:
                print(f"{number + 1:,}, {failures} failures", file=sys.stderr, flush=True)
    peak = peak_memory()
    for outcome, count in sorted(fuzzer.outcomes.items()):
        print(f"{count:7,}  {outcome}")
    print(
        f"{arguments.inputs:,} inputs, {failures} failures, peak {peak / 1e6:,.0f} MB of {LIMIT_BYTES / 1e6:,.0f} MB, "
        f"{time.monotonic() - start:,.0f} s, slowest {slowest[0]:.1f} s ({slowest[1]})"
    )
    sys.exit(bool(failures or peak > LIMIT_BYTES))


if __name__ == "__main__":
    main()
