"""Mutated traces for every command: ``python tests/trace/mutations.py --inputs 10000``.

Each input is a small sound trace of which a file was truncated, bit-flipped, given other values, types, rows or lines,
most of them with the checksums renewed. Then one command, the next in rotation, answers: with an error of moescope's
tree, or as it answers for the sound trace, or, where `verify` finds the mutated trace sound as well, whatever that
holds. Never with another exception, and the process must stay below a limit of memory.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))

from synthetic import VOCABULARY, make_counts, make_part

from moescope.cli import main as command_line
from moescope.trace import Header, Layer, TraceWriter
from moescope.trace.columns import NOT_RECORDED
from moescope.trace.part_file import footer_digest
from moescope.trace.verifying import verify

LIMIT_BYTES = 2 << 30
JUNK: tuple[Any, ...] = (
    -1, 0, 1, 2, 7, 8, 255, 256, 65535, 65536, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308,
    None, True, False, "", "x", "0", "../../etc", "é\u0000\u202e\x1b[2J", "9" * 400, [], {}, [[]], [1, 2], {"a": 1},
)  # fmt: skip

COMMANDS: dict[str, list[str]] = {
    "info": ["TRACE"],
    "info-json": ["TRACE", "--format", "json"],
    "verify": ["TRACE"],
    "shares": ["TRACE"],
    "shares-csv": ["TRACE", "--format", "csv"],
    "repeats": ["TRACE"],
    "divergence": ["TRACE"],
    "words": ["TRACE", "--word", "w3"],
    "text": ["TRACE"],
    "locality": ["TRACE", "--layers", "0"],
    "consistency": ["TRACE"],
    "distinct": ["TRACE"],
    "balance": ["TRACE"],
    "coactivation": ["TRACE"],
    "transitions": ["TRACE"],
    "vocabulary": ["TRACE", "--permutations", "2"],
    "syntax": ["TRACE"],
    "explain": ["TRACE", "--permutations", "2"],
    "claims": ["TRACE"],
    "cache": ["TRACE"],
    "prefetch": ["TRACE"],
    "parallel": ["TRACE", "--devices", "2"],
    "compare": ["TRACE", "TRACE"],
    "sql": ["TRACE", "SELECT * FROM choices"],
    "sql-columns": ["TRACE"],
    "export-jsonl": ["TRACE", "-o", "OUT", "--force"],
    "export-vllm": ["TRACE", "-o", "OUT", "--force"],
    "export-hot-experts": ["TRACE", "-o", "OUT", "--force"],
    "export-oracle-general": ["TRACE", "-o", "OUT", "--force"],
    "placement": ["TRACE", "--devices", "2", "-o", "OUT", "--force"],
    "saturation": ["TRACE", "TRACE"],
    "repeats-exclude": ["TRACE", "--exclude", "documents:1"],
    "report": ["TRACE", "-o", "OUT", "--force"],
}
SLOW = {"report"}


def write(path: Path, layers: tuple[Layer, ...], *, dropped: float = 0.0, finish: bool = True, **kinds: bool) -> None:
    """A trace of two parts with what is asked for: weights, phases, masked, ahead, scores."""
    rng = np.random.default_rng(0)
    given = {name: bool(kinds.get("scores")) for name in ("clusters", "labels", "margins", "masses")}
    header = Header(layers, weights=bool(kinds.get("weights")), phases=bool(kinds.get("phases")), **given)
    with TraceWriter(path, header, VOCABULARY) as writer:
        for number in range(2):
            part = make_part(
                rng, layers, [9, 20, 5], first_document=3 * number, weights=header.weights, scores=header.margins,
                dropped=dropped,
            )  # fmt: skip
            if header.phases:
                part = replace(part, phase=rng.integers(0, 2, part.num_tokens))
            if kinds.get("masked"):
                part.expert_ids[layers[0].layer][3:12] = NOT_RECORDED
            if kinds.get("ahead"):
                predicted = rng.random((part.num_tokens, layers[1].num_ids)).argsort(axis=1)[:, :3]
                part = replace(part, predictions={(layers[1].layer, 1): predicted})
            writer.write(part, {"documents_read": 3 * number + 3})
        if finish:
            writer.finish({"tokens": 68, "warnings": ["odd"]})


SEEDS: dict[str, Callable[[Path], object]] = {
    "plain": lambda path: write(path, (Layer(0, 8, 2), Layer(1, 8, 2)), weights=True, phases=True),
    "wide": lambda path: write(path, (Layer(0, 300, 4, num_null_experts=1, drops=True),), dropped=0.2),
    "partial": lambda path: write(path, (Layer(0, 8, 2, partial=True), Layer(2, 8, 1)), masked=True),
    "ahead": lambda path: write(path, (Layer(0, 8, 2), Layer(1, 8, 2, lookahead=(1,), num_predicted=3)), ahead=True),
    "scored": lambda path: write(path, (Layer(0, 8, 2), Layer(1, 8, 2)), scores=True),
    "unfinished": lambda path: write(path, (Layer(0, 8, 2),), finish=False),
    "counts": lambda path: make_counts(path, {g: {0: {1: 3 + g, 5: 1}, 1: {2: 4 + g}} for g in range(4)}),
}


def flip(data: bytes, rng: random.Random) -> bytes:
    """Change some bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 64))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    """Cut the end off."""
    return data[: rng.randrange(len(data) + 1)]


def splice(data: bytes, rng: random.Random) -> bytes:
    """Repeat or leave out a piece."""
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[start:end] * rng.choice((0, 2, 3)) + data[end:]


def change_json(data: bytes, rng: random.Random) -> bytes:
    """Give a value, anywhere, another, or take it away."""
    document = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(document)
    parent, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.15:
        del parent[key]
    elif kind < 0.25 and isinstance(parent, dict):
        parent[rng.choice(("layers", "parts", "warnings", "x", "weights"))] = rng.choice(JUNK)
    elif kind < 0.3:
        return data.replace(b":", b': NaN, "y":', 1) if rng.random() < 0.5 else b'{"a":' * 100_000
    else:
        parent[key] = rng.choice(JUNK)
    return json.dumps(document).encode()


def change_table(data: bytes, rng: random.Random) -> bytes:
    """Change the values, the type, the order or the number of a column's or the table's rows."""
    file = pq.ParquetFile(pa.BufferReader(data))
    table, metadata = file.read(), file.metadata.metadata or {}
    name = rng.choice(table.column_names)
    values = table[name].to_pylist()
    row = rng.randrange(len(values)) if values else 0
    place, type = table.column_names.index(name), table.schema.field(name).type
    kind = rng.choice(("value", "value", "value", "null", "type", "rows", "order", "drop", "twice", "rename", "mark"))
    try:
        if kind == "value" and values:
            values[row] = rng.choice((*JUNK[:20], values[rng.randrange(len(values))], float("nan"), "new", b"\xff"))
            table = table.set_column(place, pa.field(name, type, nullable=False), pa.array(values, type))
        elif kind == "null" and values:
            values[row] = None
            table = table.set_column(place, name, pa.array(values, type))
        elif kind == "type":
            other = rng.choice((pa.int8(), pa.int64(), pa.float32(), pa.string(), pa.binary(), pa.bool_(), pa.uint16()))
            table = table.set_column(place, name, table[name].cast(other, safe=False))
        elif kind == "rows":
            table = table.slice(rng.randrange(len(values) + 1), rng.randrange(len(values) + 1))
        elif kind == "order":
            table = table.take(pa.array(rng.sample(range(len(values)), len(values))))
        elif kind == "drop":
            table = table.drop_columns([name])
        elif kind == "twice":
            table = table.append_column(rng.choice((name, "x")), table[name])
        elif kind == "rename":
            table = table.rename_columns([f"{n}x" if n == name else n for n in table.column_names])
        elif kind == "mark":
            note = change_json(metadata.get(b"moescope", b'{"a": 1}'), rng)
            metadata = {} if rng.random() < 0.3 else {b"moescope": note}
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        pass  # a value that the type cannot hold: the table stays as it was
    out = pa.BufferOutputStream()
    lax = [
        field.with_nullable(True) if column.null_count else field
        for field, column in zip(table.schema, table.columns, strict=True)
    ]
    table = pa.Table.from_arrays(table.columns, schema=pa.schema(lax))
    with pq.ParquetWriter(out, table.schema, store_schema=rng.random() < 0.2, write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({key: value for key, value in metadata.items() if key != b"ARROW:schema"})
    return out.getvalue().to_pybytes()


def change_list(data: bytes, rng: random.Random) -> bytes:
    """Take lines away, repeat them, put them elsewhere, or name other files."""
    lines = data.decode().splitlines(keepends=True)
    place = rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        del lines[place]
    elif kind == 1:
        lines.insert(rng.randrange(len(lines) + 1), lines[place])
    elif kind == 2:
        rng.shuffle(lines)
    elif kind == 3:
        name = rng.choice(("parts/000002.parquet", "parts/x.parquet", "/etc/passwd", "../x", "summary.json", "x"))
        lines[place] = lines[place][:66] + name + "\n"
    else:
        lines[place] = lines[place][:66] + lines[rng.randrange(len(lines))][66:]
    return "".join(lines).encode()


class Fuzzer:
    """Runs mutated traces; ``outcomes`` counts how they ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trace, self.out = folder / "t.moe", folder / "out"
        for name, make in SEEDS.items():
            make(folder / "seeds" / name)
        self.answers: dict[tuple[str, str], tuple[int, str]] = {}
        self.outcomes: collections.Counter[str] = collections.Counter()

    def answer(self, name: str) -> tuple[int, str, Any]:
        """How a command ends: exit code, what it printed and wrote, and the exception if it is not ours."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.unlink(missing_ok=True) if self.out.is_file() else None
        words = name.split("-", 1)
        places = {"TRACE": str(self.trace), "OUT": str(self.out)}
        arguments = [places.get(word, word) for word in COMMANDS[name]]
        command = [words[0], *([words[1]] if words[0] == "export" else []), *arguments]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = CliRunner().invoke(command_line, command)
        wrote = ""
        if self.out.exists():
            files = sorted(p for p in [self.out, *self.out.rglob("*")] if p.is_file())
            wrote = hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()
        strange = None if isinstance(result.exception, SystemExit | None) else result.exc_info
        told = re.sub(
            r'"bytes": \d+|[\d.,]+ MB(, [\d.]+ bytes an assignment)?', "", result.stdout
        )  # sizes, which do differ
        return result.exit_code, told + wrote, strange

    def _renew_footer(self, part: Path) -> None:
        """Put the footer of a part into the catalogue, and the checksum of that into the list."""
        file = self.trace / "summary.json"
        if file.exists():
            before = file.read_bytes()
            summary = json.loads(before)
            for entry in summary["parts"]:
                if entry["name"].endswith(part.name):
                    entry["footer"] = footer_digest(part)
            file.write_text(json.dumps(summary))
            sums = self.trace / "SHA256SUMS"
            old, new = (hashlib.sha256(content).hexdigest() for content in (before, file.read_bytes()))
            sums.write_text(sums.read_text().replace(old, new))

    def run(self, number: int) -> tuple[str, str]:
        """One mutated trace and one command: the name of the mutation, and how it ended.

        Raises:
            AssertionError: It ended in another way than is allowed.
        """
        rng = random.Random(number)
        seed = rng.choice(list(SEEDS))
        name = list(COMMANDS)[number % len(COMMANDS)]
        shutil.rmtree(self.trace, ignore_errors=True)
        shutil.copytree(self.folder / "seeds" / seed, self.trace)
        if (seed, name) not in self.answers:
            code, text, strange = self.answer(name)
            assert strange is None, f"{name} of the sound trace {seed}: {strange}"
            self.answers[seed, name] = code, text
        victim = rng.choice(sorted(p for p in self.trace.rglob("*") if p.is_file()))
        special = {".json": change_json, ".parquet": change_table}.get(victim.suffix, change_list)
        mutation = rng.choice((flip, truncate, splice, special, special, special))
        before = victim.read_bytes()
        data = mutation(before, rng)
        victim.write_bytes(data)
        renewed = victim.name != "SHA256SUMS" and rng.random() < 0.7
        if renewed:
            sums = self.trace / "SHA256SUMS"
            old, new = (hashlib.sha256(content).hexdigest() for content in (before, data))
            sums.write_text(sums.read_text().replace(old, new))
            if victim.parent.name == "parts" and rng.random() < 0.8:
                self._renew_footer(victim)
        kind = f"{seed} {name}: {mutation.__name__} of {victim.relative_to(self.trace)}, renewed: {renewed}"
        code, text, strange = self.answer(name)
        assert strange is None, f"{kind}: {''.join(traceback.format_exception(*strange))}"
        if (code, text) == self.answers[seed, name]:
            outcome = "as the sound trace"
        elif code == 1 and not text:
            outcome = "refused"
        elif not (problems := verify(self.trace)):
            outcome = "another sound trace"
        elif name in ("info", "info-json", "sql-columns") and renewed:
            outcome = "what the header or the catalogue says"  # these read no part
        else:
            outcome = "refused" if code in (1, 2) else "WRONG"
            assert code in (1, 2), f"{kind}: answered otherwise, though {problems[0]}"
        self.outcomes[outcome] += 1
        return kind, outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from gauges import peak_memory

    resource.setrlimit(resource.RLIMIT_AS, (8 * LIMIT_BYTES, 8 * LIMIT_BYTES))  # libraries reserve, and use less
    failures, start = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        for number in range(arguments.first, arguments.first + arguments.inputs):
            try:
                fuzzer.run(number)
            except Exception:
                failures += 1
                if failures <= 20:
                    print(f"input {number}:", file=sys.stderr)
                    traceback.print_exc()
            if number % 1000 == 999:
                print(f"{number + 1:,}, {failures} failures", file=sys.stderr, flush=True)
    peak = peak_memory()
    for outcome, count in sorted(fuzzer.outcomes.items()):
        print(f"{count:7,}  {outcome}")
    print(
        f"{arguments.inputs:,} mutated traces, {failures} failures, peak {peak / 1e6:,.0f} MB of "
        f"{LIMIT_BYTES / 1e6:,.0f} MB, {time.monotonic() - start:,.0f} s"
    )
    sys.exit(bool(failures or peak > LIMIT_BYTES))


if __name__ == "__main__":
    main()
