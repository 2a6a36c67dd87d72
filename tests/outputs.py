"""Everything moescope shows of a set of traces, as files: to see whether a change of the code changes a byte.

    python tests/outputs.py traces TRACES            # once: makes the traces (the first is that of `moescope demo`)
    python tests/outputs.py write TRACES BEFORE      # with the code before the change
    python tests/outputs.py write TRACES AFTER       # with the code after it
    python tests/outputs.py compare BEFORE AFTER     # lists the files that differ; exit status 1 if there are any

Of each trace: the whole report, what every command prints in every format, the figures it draws, and every result of
the Python functions as text that holds all values, names and attributes. `--only NAME` writes one trace's.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from filecmp import cmp
from pathlib import Path

import numpy as np
import xarray as xr
from click.testing import CliRunner

import moescope
from moescope.cli import main

sys.path.insert(0, str(Path(__file__).parent))

FORMATS = ("text", "csv", "json", "latex")
FIGURES = "FIGURES"
"""Stands for a folder beside the output of a command of `COMMANDS`."""

COMMANDS = {
    "shares": "shares TRACE",
    "shares-first": "shares TRACE --choice first",
    "shares-tokens": "shares TRACE --of tokens",
    "repeats": "repeats TRACE --figures FIGURES",
    "locality": "locality TRACE --figures FIGURES",
    "locality-lags": "locality TRACE --show lags",
    "locality-runs": "locality TRACE --show runs",
    "explain": "explain TRACE --permutations 19 --figures FIGURES",
    "explain-all": "explain TRACE --permutations 19 --choice all",
    "words": "words TRACE --word self --word the --indentation",
    "vocabulary": "vocabulary TRACE --figures FIGURES",
    "vocabulary-next": "vocabulary TRACE --by next",
    "vocabulary-experts": "vocabulary TRACE --expert 0,1",
    "syntax": "syntax TRACE --figures FIGURES",
    "divergence": "divergence TRACE --figures FIGURES",
    "consistency": "consistency TRACE --figures FIGURES",
    "distinct": "distinct TRACE --figures FIGURES",
    "balance": "balance TRACE --figures FIGURES",
    "coactivation": "coactivation TRACE --figures FIGURES",
    "transitions": "transitions TRACE --figures FIGURES",
    "transitions-all": "transitions TRACE --choice all",
    "cache": "cache TRACE --expert-bytes 66e6 --bandwidth 16 --compute 30 --figures FIGURES",
    "cache-global": "cache TRACE --budget global --policies lru,hot,belady",
    "prefetch": "prefetch TRACE --figures FIGURES",
    "parallel": "parallel TRACE --devices 2 --figures FIGURES",
    "claims": "claims TRACE",
    "claims-word": "claims TRACE --word the",
    "info": "info TRACE",
    "text": "text TRACE",
    "compare": "compare TRACE TRACE --figures FIGURES",
    "compare-tokens": "compare TRACE TRACE --show tokens",
    "compare-changes": "compare TRACE TRACE --show changes",
    "compare-demo": "compare TRACE DEMO",
    "placement": "placement TRACE --devices 2 -o FIGURES/placement.json",
}

MEASURES: dict[str, Callable[[moescope.Trace], object]] = {
    "shares": lambda trace: moescope.shares(moescope.tally(trace)),
    "repeats": lambda trace: moescope.repeats(moescope.tally(trace)),
    "divergence": lambda trace: moescope.divergence(moescope.tally(trace)),
    "words": lambda trace: moescope.words(trace, ["self", "the"], indentation=True),
    "locality": lambda trace: moescope.locality(trace),
    "explain": lambda trace: moescope.explain(trace, permutations=19),
    "vocabulary": lambda trace: moescope.vocabulary(trace),
    "syntax": lambda trace: moescope.syntax(trace),
    "consistency": lambda trace: moescope.consistency(trace),
    "distinct": lambda trace: moescope.distinct(trace),
    "balance": lambda trace: moescope.balance(trace),
    "coactivation": lambda trace: moescope.coactivation(trace),
    "transitions": lambda trace: moescope.transitions(trace),
    "cache": lambda trace: moescope.cache(trace),
    "prefetch": lambda trace: moescope.prefetch(trace),
    "parallel": lambda trace: moescope.parallel(trace, devices=2),
    "compare": lambda trace: moescope.compare(trace, trace),
}


def make_traces(folder: Path) -> None:
    """The demo's trace, and made-up ones that lack something each."""
    from reporting.conftest import write_trace
    from synthetic import make_counts

    from moescope import mini

    folder.mkdir(parents=True)
    moescope.record(
        mini.model_path(), mini.corpus_path(), folder / "demo.moe", weights=True, lookahead=(1, 2), dtype="float32"
    )
    write_trace(folder / "hostile.moe", hostile=True, tokens=60)
    write_trace(folder / "wide.moe", num_experts=160, top_k=8, layers=(0, 11, 23), domains=("Code", "Prose & more"))
    write_trace(folder / "one-layer.moe", layers=(3,))
    write_trace(folder / "one-choice.moe", top_k=1, layers=(0, 5), domains=("Github", "DM Mathematics"))
    write_trace(folder / "one-document.moe", domains=("Github",), documents_per_domain=1, tokens=400)
    rng = np.random.default_rng(0)
    loads = {g: {at: {e: int(n) for e, n in enumerate(rng.integers(1, 90, 8))} for at in (0, 7)} for g in range(12)}
    make_counts(folder / "counts.moe", loads)
    ranked = write_trace(folder / "ranked.moe", layers=(0, 3, 7), tokens=80)
    part = ranked.parts[0].read(ranked.layers, tokens=True)
    moescope.from_arrays(
        folder / "unranked.moe",
        {layer: np.sort(ids, axis=1) for layer, ids in part.expert_ids.items()},
        num_experts=8,
        documents=part.document,
        domains=[ranked.domains[code] for code in part.domain],
    )


def write(traces: Path, folder: Path, only: str | None) -> None:
    """All outputs of the code that is imported."""
    warnings.simplefilter("ignore")
    for trace in sorted(traces.glob("*.moe")):
        if only is not None and trace.stem != only:
            continue
        print(trace.stem, file=sys.stderr)
        target = folder / trace.stem
        target.mkdir(parents=True)
        for name, command in COMMANDS.items():
            _run(command, target / "commands", name, trace, traces / "demo.moe")
        _call(CliRunner(), ["report", str(trace), "-o", str(target / "report")], target / "commands" / "report.txt")
        (target / "measures").mkdir()
        for name, measure in MEASURES.items():
            try:
                text = "\n".join(_described(measure(moescope.open_trace(trace))))
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            (target / "measures" / f"{name}.txt").write_text(text + "\n")


def compare(before: Path, after: Path) -> int:
    """List what differs; 1 if anything does."""
    names = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in (before, after)]
    for side, missing in (("before", names[0] - names[1]), ("after", names[1] - names[0])):
        for name in sorted(missing):
            print(f"only {side}: {name}")
    both = sorted(names[0] & names[1])
    different = [name for name in both if not cmp(before / name, after / name, shallow=False)]
    for name in different:
        print(f"differs: {name}")
    print(f"{len(both) - len(different)} of {len(names[0] | names[1])} files identical")
    return int(len(both) - len(different) < len(names[0] | names[1]))


def _run(command: str, folder: Path, name: str, trace: Path, demo: Path) -> None:
    """Run a command in every format it has."""
    runner = CliRunner()
    words = [{"TRACE": str(trace), "DEMO": str(demo)}.get(word, word) for word in command.split()]
    with_figures = [word.replace(FIGURES, str(folder / f"{name}-figures")) for word in words]
    plain = words[: words.index("--figures")] if "--figures" in words else with_figures
    formats = {"info": ("text", "json"), "text": ("text", "json"), "placement": ("",)}.get(words[0], FORMATS)
    for number, format in enumerate(formats):
        arguments = plain if number else with_figures
        options = ["--format", format] if format else []
        _call(runner, [*arguments, *options], folder / f"{name}.{format or 'out'}")


def _call(runner: CliRunner, arguments: list[str], path: Path) -> None:
    result = runner.invoke(main, arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        text = f"{type(result.exception).__name__}: {result.exception}\n"
    else:
        text = f"{result.output}exit {result.exit_code}\n"
    out = str(path.parents[1])  # the same text whatever the folder
    path.write_text(text.replace(out, "OUT"))


def _described(value: object, name: str = "") -> Iterator[str]:
    """A result as lines of text that hold all of it."""
    if isinstance(value, xr.Dataset):
        for key, variable in sorted(value.variables.items(), key=lambda item: str(item[0])):
            kind = "coordinate" if key in value.coords else "variable"
            yield f"{name}{kind} {key} {variable.dims} {variable.shape} {variable.dtype} {_json(variable.attrs)}"
            yield _json(variable.values.tolist())
        yield f"{name}attributes {_json(value.attrs)}"
    elif is_dataclass(value):
        for field in fields(value):
            yield from _described(getattr(value, field.name), f"{name}{field.name} ")
    else:
        yield f"{name}{value!r}"


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=["traces", "write", "compare"])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--only", metavar="TRACE")
    given = parser.parse_args()
    if given.job == "traces":
        make_traces(*given.folders)
    elif given.job == "write":
        write(*given.folders, given.only)
    else:
        sys.exit(compare(*given.folders))
