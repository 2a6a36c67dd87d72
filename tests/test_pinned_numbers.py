"""Every number that the measures and simulations give of a made-up trace, pinned: none changes unseen.

`pinned_numbers.json` holds, for each variable of each result, how many of its values are known, their mean, and their
mean weighted by place, which changes if two values change places. The trace is made with whole numbers, so it is the
same everywhere; what is computed of it may differ in the last digits. After a change that is meant:

    python tests/test_pinned_numbers.py --write
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from math import isclose
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner

import moescope
from moescope.cli import main
from moescope.trace import Header, Layer, Part, Trace, TraceWriter, Vocabulary, open_trace

PINNED = Path(__file__).parent / "pinned_numbers.json"
RELATIVE, ABSOLUTE = 1e-5, 1e-9
"""Roots are found to six digits, and a processor may differ in the last of what it adds."""

LAYERS = (Layer(0, 8, 2), Layer(1, 8, 2), Layer(3, 12, 3, lookahead=(1,), num_predicted=5))
DOMAINS = ("code", "prose", "talk")
PIECES = [
    b" al",
    b"pha",
    b" self",
    b"(",
    b"7",
    b".",
    b"\n",
    b"    ",
    b" The",
    b" if",
    *(b" w%d" % n for n in range(14)),
]

Digest = tuple[int, float, float]


def mixed(*values: int) -> int:
    """A whole number of 64 bits that hangs on all of the values (splitmix64)."""
    state = 0
    for value in values:
        state = (state ^ (value + 1)) * 0x9E3779B97F4A7C15 % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state ^= state >> 27
    return state


def make(path: Path, changed: int = 0) -> Trace:
    """24 documents whose tokens follow id, domain, document, layer before and token before; `changed` % anew."""
    rows: dict[str, list] = {name: [] for name in ("document", "domain", "sequence", "position", "token_id")}
    ids: dict[int, list[list[int]]] = {layer.layer: [] for layer in LAYERS}
    weights: dict[int, list[list[float]]] = {layer.layer: [] for layer in LAYERS}
    predicted: list[list[int]] = []
    for number in range(24):
        length = 30 + mixed(number, 7) % 50
        for at in range(length):
            token_id = min(mixed(number, at, 1) % 24, mixed(number, at, 2) % 24)
            salt = 1 if mixed(number, at, 3) % 100 < changed else 0
            before = 0
            for layer in LAYERS:
                scores = []
                for e in range(layer.num_experts):
                    score = mixed(token_id, e, layer.layer) % 900 + mixed(number % 3, e, layer.layer, 4) % 700
                    score += mixed(number, e, layer.layer, 5) % 500 + mixed(before, e, layer.layer, 6) % 500
                    scores.append(score + mixed(number, at, e, layer.layer, salt) % 900)
                if at and mixed(number, at, layer.layer, 8) % 100 < 25:
                    scores[ids[layer.layer][-1][0]] += 2000
                order = sorted(range(layer.num_experts), key=lambda e, scores=scores: (-scores[e], e))
                ids[layer.layer].append(order[: layer.top_k])
                first = 128 + mixed(number, at, layer.layer, 9) % 100
                rest = [(256 - first) // (layer.top_k - 1) / 256] * (layer.top_k - 1)
                weights[layer.layer].append([first / 256, *rest])
                before = order[0]
                if layer.num_predicted:
                    noisy = sorted(order[:8], key=lambda e: mixed(number, at, e, 10) % 4 + 2 * order.index(e))
                    predicted.append(noisy[: layer.num_predicted])
            for name, value in zip(rows, (number, number % 3, at // 32, at % 32, token_id), strict=True):
                rows[name].append(value)
    columns = {name: np.array(values, np.uint32) for name, values in rows.items()}
    part = Part(
        columns["document"],
        columns["domain"].astype(np.int64),
        DOMAINS,
        columns["sequence"],
        columns["position"],
        columns["token_id"],
        {layer: np.array(table) for layer, table in ids.items()},
        {layer: np.array(table, np.float32) for layer, table in weights.items()},
        predictions={(3, 1): np.array(predicted)},
    )
    header = Header(LAYERS, weights=True, model={"name": "made up"})
    with TraceWriter(path, header, Vocabulary.from_pieces(PIECES)) as writer:
        for some in (part.document < 10, part.document >= 10):
            writer.write(part.rows(some), {"documents_read": int(part.document[some].max()) + 1})
        writer.finish({"tokens": part.num_tokens})
    return open_trace(path)


def played(trace: Trace, **options: object) -> xr.Dataset:
    return moescope.cache(trace, threads=1, **options)  # type: ignore[arg-type]


def answered(trace: Trace) -> xr.Dataset:
    """The numbers behind the claims, as the command gives them."""
    done = CliRunner().invoke(main, ["claims", str(trace.path), "--word", "self", "--format", "json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return xr.Dataset({name: ("row", np.array(of, float)) for name, of in columns.items() if is_numbers(of)})


def is_numbers(values: list) -> bool:
    return any(value is not None for value in values) and all(
        value is None or isinstance(value, (int, float)) for value in values
    )


RESULTS: dict[str, Callable[[Trace, Trace], object]] = {
    "shares": lambda trace, _: moescope.shares(moescope.tally(trace)),
    "repeats": lambda trace, _: moescope.repeats(moescope.tally(trace)),
    "divergence": lambda trace, _: moescope.divergence(moescope.tally(trace)),
    "words": lambda trace, _: moescope.words(trace, ["alpha", "self"], indentation=True),
    "claims": lambda trace, _: answered(trace),
    "consistency": lambda trace, _: moescope.consistency(trace, lengths=(4, 16), threads=1),
    "explain": lambda trace, _: moescope.explain(trace, permutations=19, threads=1),
    "explain each choice": lambda trace, _: moescope.explain(trace, choice="all", permutations=9, threads=1),
    "locality": lambda trace, _: moescope.locality(trace, lags=(1, 4, 16), threads=1),
    "distinct": lambda trace, _: moescope.distinct(trace, threads=1),
    "balance": lambda trace, _: moescope.balance(trace, threads=1),
    "coactivation": lambda trace, _: moescope.coactivation(trace, threads=1),
    "transitions": lambda trace, _: moescope.transitions(trace, threads=1),
    "vocabulary": lambda trace, _: moescope.vocabulary(trace, permutations=19, top=3, tokens=[0, 3], threads=1),
    "syntax": lambda trace, _: moescope.syntax(trace, threads=1),
    "compare": lambda trace, other: moescope.compare(trace, other, threads=1),
    "saturation": lambda trace, other: moescope.saturation([other, trace], threads=1),
    "cache": lambda trace, _: played(trace),
    "cache, all layers": lambda trace, _: played(trace, policies=("lru", "belady"), budget="global", batch=3, seed=2),
    "offloading": lambda trace, _: moescope.offloading(
        played(trace, policies=("lru",)), bytes_per_expert=1e6, bandwidth=1e9, compute=1e-3
    ),
    "parallel": lambda trace, _: moescope.parallel(trace, devices=4, nodes=2, prefill=64, decode=8, threads=1),
    "prefetch": lambda trace, _: moescope.prefetch(trace, threads=1),
}


def digests(result: object, prefix: str = "") -> Iterator[tuple[str, Digest]]:
    """Of each variable of numbers of a result its name and digest; of a dataclass those of its fields."""
    if isinstance(result, (xr.Dataset, xr.DataArray)):
        dataset = result if isinstance(result, xr.Dataset) else result.to_dataset(name="values")
        for name, variable in dataset.data_vars.items():
            if variable.dtype.kind in "fiub":
                yield f"{prefix}{name}", digest(variable.values)
    elif isinstance(result, (list, tuple)):
        for item in result:
            name = getattr(item, "name", None) or getattr(item, "what", None)
            if is_dataclass(item):
                yield from digests(item, f"{prefix}{name or type(item).__name__}, ")
    elif is_dataclass(result):
        numbers = [getattr(result, field.name) for field in fields(result)]
        if known := [float(n) for n in numbers if isinstance(n, (int, float)) and not isinstance(n, bool)]:
            yield f"{prefix}numbers", digest(np.array(known))
        for field in fields(result):
            yield from digests(getattr(result, field.name), f"{prefix}{field.name}, ")


def digest(values: np.ndarray) -> Digest:
    """How many values are finite, their mean, and their mean weighted by place, from 1."""
    flat = np.asarray(values, float).ravel()
    place = np.flatnonzero(np.isfinite(flat))
    if not len(place):
        return 0, 0.0, 0.0
    return len(place), float(flat[place].mean()), float((flat[place] * (place + 1)).sum() / (place + 1).sum())


def alike(a: Digest, b: Digest) -> bool:
    return a[0] == b[0] and all(
        isclose(x, y, rel_tol=RELATIVE, abs_tol=ABSOLUTE) for x, y in zip(a[1:], b[1:], strict=True)
    )


def differences(pinned: dict[str, Digest], found: dict[str, Digest]) -> list[str]:
    """What changed, in lines; a variable that goes by another name and is the same is told as such."""
    lines = []
    new = {name: of for name, of in found.items() if name not in pinned}
    for name, before in pinned.items():
        if name in found:
            if not alike(before, found[name]):
                lines.append(f"  {name}: was {shown(before)}, is {shown(found[name])}")
        else:
            other = next((n for n, of in new.items() if alike(of, before)), None)
            lines.append(
                f"  {name}: " + (f"is now {other}, the same numbers" if other else f"is gone; was {shown(before)}")
            )
            new.pop(other or "", None)
    return lines + [f"  {name}: is new: {shown(of)}" for name, of in new.items()]


def shown(of: Digest) -> str:
    return f"{of[0]} values, mean {of[1]:.8g}, by place {of[2]:.8g}"


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Trace]:
    folder = tmp_path_factory.mktemp("pinned")
    return make(folder / "a.moe"), make(folder / "b.moe", changed=30)


@pytest.mark.parametrize("name", RESULTS)
def test_no_number_changes_unseen(name: str, traces: tuple[Trace, Trace]) -> None:
    pinned = {key: tuple(of) for key, of in json.loads(PINNED.read_text()).get(name, {}).items()}
    assert pinned, f"{name} is new: run `python {Path(__file__).name} --write`"
    lines = differences(pinned, dict(digests(RESULTS[name](*traces))))
    assert not lines, (
        f"numbers of {name} changed. If that is meant, say under Numbers in CHANGELOG.md which, by how much and why, "
        "and run `python tests/test_pinned_numbers.py --write`:\n" + "\n".join(lines)
    )


def test_a_change_is_told_from_a_new_name() -> None:
    pinned = {"a": (3, 1.0, 2.0), "b": (2, 0.5, 0.5), "c": (1, 0.0, 0.0)}
    assert differences(pinned, dict(pinned)) == []
    assert differences(pinned, {**pinned, "a": (3, 1.0 + 1e-9, 2.0)}) == []
    (changed,) = differences(pinned, {**pinned, "a": (3, 1.0001, 2.0)})
    assert changed.startswith("  a: was 3 values, mean 1,")
    assert differences(pinned, {"a": pinned["a"], "x": pinned["b"], "c": pinned["c"]}) == [
        "  b: is now x, the same numbers"
    ]
    swapped = digest(np.array([1.0, 2.0, 3.0])), digest(np.array([2.0, 1.0, 3.0]))
    assert not alike(*swapped)


def rewrite() -> None:
    with tempfile.TemporaryDirectory() as folder:
        both = make(Path(folder) / "a.moe"), make(Path(folder) / "b.moe", changed=30)
        found = {name: dict(digests(of(*both))) for name, of in RESULTS.items()}
    blocks = []
    for name, of in found.items():
        lines = ",\n".join(
            f"  {json.dumps(key)}: [{n}, {mean:.10g}, {ramp:.10g}]" for key, (n, mean, ramp) in of.items()
        )
        blocks.append(f"{json.dumps(name)}: {{\n{lines}\n}}")
    PINNED.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    rewrite()
