"""Speed and memory of the tally against SQL over the same Parquet files; everything in one run, one thread.

    python benchmarks/tally.py [--tokens 4000000] [--layers 32] [--repeats 5]

A made-up trace (popularity-skewed, sticky routing; documents of some 800 tokens, 8 domains) is written once to a
temporary folder. Measured in CPU time, interleaved, median of the repeats: `moescope.tally` with all its document
moments; DuckDB and Polars computing only the counts by domain, layer, choice and expert and the two kinds of repeats;
`np.sum` of the same ids in memory, the machine's yardstick. Memory: peak of a fresh process, for the trace, for a
quarter of it, and with the package imported and nothing done.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

for name in ("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"

import numpy as np
from gauges import peaks_of_calls, require

from moescope.tallying import tally
from moescope.trace import Header, Layer, Part, Trace, TraceWriter, Vocabulary, open_trace

DOMAINS = tuple(f"domain {n}" for n in range(8))
PART_TOKENS = 131_072
NO_TEXT = Vocabulary({})


def make_trace(path: Path, num_tokens: int, num_layers: int, vocabulary: Vocabulary = NO_TEXT) -> Trace:
    rng = np.random.default_rng(0)
    layers = tuple(Layer(layer, 8, 2) for layer in range(num_layers))
    with TraceWriter(path, Header(layers), vocabulary) as writer:
        document = 0
        for start in range(0, num_tokens, PART_TOKENS):
            count = min(PART_TOKENS, num_tokens - start)
            cuts = np.flatnonzero(rng.random(count) < 1 / 800)
            number = np.searchsorted(cuts, np.arange(count), side="left")
            first_row = np.r_[0, cuts + 1][number]
            expert_ids = {}
            for layer in layers:
                scores = rng.gumbel(size=(count, 8)).astype(np.float32) + rng.normal(0, 0.3, 8).astype(np.float32)
                stay = rng.random(count) < 0.2
                scores[1:][stay[1:]] = scores[:-1][stay[1:]]
                expert_ids[layer.layer] = np.argsort(-scores, axis=1)[:, :2]
            part = Part(
                number + document,
                (number + document) % len(DOMAINS),
                DOMAINS,
                np.zeros(count, np.uint32),
                np.arange(count) - first_row,
                rng.zipf(1.3, count) % 32_000,
                expert_ids,
            )
            writer.write(part, {})
            document += int(number[-1]) + 1
        writer.finish({"tokens": num_tokens})
    return open_trace(path)


def in_duckdb(trace: Trace) -> None:
    import duckdb

    connection = duckdb.connect()
    connection.execute("SET threads TO 1")
    files = str(trace.path / "parts" / "*.parquet")
    for layer in trace.layers:
        a, b = layer.expert_columns()
        for column in (a, b):
            connection.execute(f"SELECT domain, {column}, count(*) FROM '{files}' GROUP BY ALL").fetchall()
        connection.execute(
            f"""SELECT domain, count(*) FILTER (first), count(*) FILTER (first OR a = q OR b = p OR b = q) FROM (
                SELECT domain, {a} a, {b} b, p, q, a = p AS first FROM (
                    SELECT domain, position, {a}, {b}, lag({a}) OVER () p, lag({b}) OVER () q
                    FROM '{files}') WHERE position > 0) GROUP BY ALL"""
        ).fetchall()


def in_polars(trace: Trace) -> None:
    import polars as pl

    frame = pl.scan_parquet(trace.path / "parts" / "*.parquet")
    for layer in trace.layers:
        a, b = (pl.col(name) for name in layer.expert_columns())
        same = a == a.shift()
        shared = same | (a == b.shift()) | (b == a.shift()) | (b == b.shift())
        inside = pl.col("position") > 0
        queries = [frame.group_by("domain", column).len() for column in (a, b)]
        queries.append(
            frame.select("domain", (same & inside).alias("first"), (shared & inside).alias("any"))
            .group_by("domain")
            .sum()
        )
        pl.collect_all(queries)


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()  # CPU time: one thread each, and other processes do not count
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-sql", action="store_true")
    arguments = parser.parse_args()
    if not arguments.without_sql:
        require("duckdb", "polars")
    with tempfile.TemporaryDirectory() as folder:
        trace = make_trace(Path(folder) / "trace.moe", arguments.tokens, arguments.layers)
        quarter = make_trace(Path(folder) / "quarter.moe", arguments.tokens // 4, arguments.layers)
        num_ids = arguments.tokens * arguments.layers * 2
        size = sum(file.stat().st_size for file in trace.path.rglob("*") if file.is_file())
        ids = np.concatenate([part.expert_ids[0].ravel() for part in trace.iter_parts([0])] * 4)
        tally(quarter, threads=1)
        calls: dict[str, Callable[[], object]] = {"moescope.tally": lambda: tally(trace, threads=1)}
        if not arguments.without_sql:
            calls |= {"DuckDB": lambda: in_duckdb(trace), "Polars": lambda: in_polars(trace)}
        times: dict[str, list[float]] = {name: [] for name in (*calls, "np.sum")}
        for _ in range(arguments.repeats):
            for name, call in calls.items():
                times[name].append(seconds(call))
            times["np.sum"].append(seconds(lambda: np.sum(ids)) * num_ids / ids.size)
        rates = {name: num_ids / median(values) / 1e9 for name, values in times.items()}
        result = {
            "tokens": arguments.tokens,
            "layers": arguments.layers,
            "bytes_per_id": round(size / num_ids, 4),
            "billion_ids_per_second": {name: round(rate, 4) for name, rate in rates.items()},
            "times_as_fast_as": {
                name: round(rates["moescope.tally"] / rate, 2) for name, rate in rates.items() if name in calls
            },
            "peak_memory_mb": {
                **peaks_of_calls({"whole": "moescope.tally(trace, threads=1)"}, trace.path),
                **peaks_of_calls({"quarter": "moescope.tally(trace, threads=1)"}, quarter.path),
            },
        }
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
