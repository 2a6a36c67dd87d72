"""``moescope record``: run a model over a corpus and write what its routers chose."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from moescope.corpus.corpora import MAX_RECORD_BYTES
from moescope.corpus.sampling import SAMPLE_SEED
from moescope.engines.options import BATCH_TOKENS, BLOCKS, DEVICE, DEVICE_MAPS, DTYPES, WINDOW
from moescope.engines.work import has_work, work_folder
from moescope.errors import TraceError
from moescope.reporting.numbers import count
from moescope.reporting.options import layers_option_for, one_of, output_option, parse_integers
from moescope.reporting.printing import print_styled, say
from moescope.trace import open_trace
from moescope.trace.part_file import PART_TOKENS

if TYPE_CHECKING:
    from moescope.recording import Estimate, Progress

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """A size in bytes, such as 24GB, 1.5GiB or 500M."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]I?)?B?", value.strip().upper())
        if match is None:
            self.fail(f"expected a size such as 24GB, 1.5GiB or 500MB; found {value!r}.", param, ctx)
        return int(float(match[1]) * _UNITS[match[2] or ""])


def _parse_distances(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Read ``1,2,10``: whole numbers from 1; nothing for None."""
    distances = parse_integers(ctx, param, value) or ()
    if 0 in distances:
        raise click.BadParameter("the next layer is 1 layer ahead: expected numbers from 1.")
    return distances


def _parse_device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Refuse a device that torch does not know or have."""
    if value != DEVICE:
        from moescope.engines.transformers.model import find_device

        try:
            find_device(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.argument("corpus", type=click.Path(path_type=Path))
@output_option(None, "Folder of the trace.")
@layers_option_for("Layers, such as 0,15,31, counted over the whole model.  [default: all with routed experts]")
@click.option("--window", type=click.IntRange(2), default=WINDOW, help="Longest sequence the model reads.")
@click.option("--max-tokens-per-domain", type=click.IntRange(1), metavar="N", help="Sample each domain to N tokens.")
@click.option(
    "--max-documents-per-domain", type=click.IntRange(1), metavar="N", help="Sample each domain to N documents."
)
@one_of("--block", BLOCKS, "Which routed blocks, of a model that routes its attention, too.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoint brings; otherwise it is refused.")
@click.option("--sample-seed", type=int, default=SAMPLE_SEED, help="Another seed draws another sample.")
@click.option("--text-field", metavar="FIELD", help="Field that holds the text, dotted if nested.")
@click.option("--domain-field", metavar="FIELD", help="Field that holds the domain, dotted if nested.")
@click.option(
    "--max-record-bytes",
    type=_Size(),
    default=f"{MAX_RECORD_BYTES >> 20}MiB",
    metavar="SIZE",
    help="Largest record of the corpus, decompressed.",
)
@click.option("--strict", is_flag=True, help="Stop at a malformed record instead of counting it.")
@click.option("--weights", is_flag=True, help="Record the gate weights, too.")
@click.option(
    "--lookahead",
    callback=_parse_distances,
    metavar="LIST",
    help="Record, too, which experts routers would choose so many layers ahead, such as 1,2,10.",
)
@one_of("--dtype", DTYPES, "auto is the checkpoint's; another one changes some choices.")
@click.option(
    "--device", default=DEVICE, callback=_parse_device, help="auto is a GPU if there is one; or cpu, cuda, cuda:1 …"
)
@click.option(
    "--device-map",
    type=click.Choice(DEVICE_MAPS),
    help="Spread the model over all GPUs, memory and disk, instead of --device.",
)
@click.option(
    "--offload-folder",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Where --device-map keeps, meanwhile, what it puts on disk.  [default: beside the trace]",
)
@click.option("--batch-tokens", type=click.IntRange(1), default=BATCH_TOKENS, help="Most tokens of a forward pass.")
@click.option(
    "--part-tokens",
    type=click.IntRange(1),
    default=PART_TOKENS,
    help="Tokens of a part: what an interruption can cost.",
)
@click.option(
    "--stream/--no-stream",
    "stream",
    default=None,
    help="Go through the model layer by layer, or load it whole.  [default: layer by layer if it does not fit]",
)
@click.option(
    "--memory",
    type=_Size(),
    metavar="SIZE",
    help="Memory that recording may take, such as 24GB.  [default: what is free]",
)
@click.option("--force", is_flag=True, help="Replace a finished trace, or one of another recording.")
def command(output: Path, **arguments: Any) -> None:
    """Run a model over a corpus and record its routing.

    MODEL is the folder of a checkpoint that transformers can load, or its name in the local Hugging Face cache; nothing
    is downloaded. CORPUS is a file or folder of JSON lines (such as the Pile's .jsonl.zst), a JSON array, CSV, Parquet,
    Arrow or text.

    A recording that was interrupted, even by kill -9, goes on when the same command is run again.

    A model that does not fit into memory is streamed: its layers are read one at a time, each once, and the whole
    corpus passes through each. What that will take is said before it starts.

    \b
    Example:
      moescope record Mixtral-8x7B-v0.1 val.jsonl.zst -o pile.moe --max-tokens-per-domain 100000
    """
    from moescope.recording import record
    from moescope.reporting.wording import describe_size

    if arguments["device_map"] and arguments["device"] != DEVICE:
        raise click.UsageError("--device and --device-map exclude each other.")
    try:
        with _progress_bar() as (progress, announce):
            trace = record(out=output, progress=progress, announce=announce, **arguments)
    except KeyboardInterrupt:
        say(_what_is_kept(output), err=True)
        raise
    say(f"{output}: {describe_size(trace)}", err=True)


def describe(progress: Progress) -> str:
    """Tokens, speed and time left.

    Example:
        >>> from types import SimpleNamespace
        >>> describe(SimpleNamespace(tokens=65536, tokens_per_second=7921.4, seconds_left=3723.0))
        '65,536 tokens, 7,921/s, 1:02:03 left'
    """
    text = f"{count(progress.tokens, 'token')}, {progress.tokens_per_second:,.0f}/s"
    return text if progress.seconds_left is None else f"{text}, {_duration(progress.seconds_left)} left"


def describe_estimate(estimate: Estimate) -> str:
    """What a streamed recording will take.

    Example:
        >>> from types import SimpleNamespace
        >>> print(describe_estimate(SimpleNamespace(
        ...     model_bytes=93.4e9, memory_bytes=6.1e9, spool_bytes=2e9, disk_bytes=1.7e9, num_layers=32,
        ...     first_layer=0, tokens=100_000, compute_seconds=4100.0, read_seconds=195.0, seconds=4106.0)))
        streaming 100,000 tokens through 32 layers, one at a time; each is read once, 93.4 GB in all
        time: about 1:08:26 (computing 1:08:20, reading 3:15 meanwhile)
        memory: up to 6.1 GB, 2.0 GB of it for what a layer gives to the next; disk: up to 1.7 GB while it runs
    """
    start = f", going on with layer {estimate.first_layer}" if estimate.first_layer else ""
    return (
        f"streaming {count(estimate.tokens, 'token')} through {count(estimate.num_layers, 'layer')}, one at a time"
        f"{start}; each is read once, {_gigabytes(estimate.model_bytes)} in all\n"
        f"time: about {_duration(estimate.seconds)} (computing {_duration(estimate.compute_seconds)}, reading "
        f"{_duration(estimate.read_seconds)} meanwhile)\n"
        f"memory: up to {_gigabytes(estimate.memory_bytes)}, {_gigabytes(estimate.spool_bytes)} of it for what a layer "
        f"gives to the next; disk: up to {_gigabytes(estimate.disk_bytes)} while it runs"
    )


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 or not number else f"{number / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextmanager
def _progress_bar() -> Iterator[tuple[Callable[[Progress], None], Callable[[Estimate], None]]]:
    """Yields what to call after every forward pass, and before streaming; without a terminal no bar is drawn."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[numbers]}")
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None, numbers="")

        def update(progress: Progress) -> None:
            total, done = None if progress.fraction is None else 1.0, progress.fraction or 0.0
            bar.update(task, description="recording", total=total, completed=done, numbers=describe(progress))

        def announce(estimate: Estimate) -> None:
            print_styled(console, Text(describe_estimate(estimate)))

        yield update, announce


def _what_is_kept(out: Path) -> str:
    try:
        tokens = open_trace(out).num_tokens
    except TraceError:
        if has_work(out):
            return f"{work_folder(out)}: the finished layers are kept; the same command goes on from there"
        return f"{out}: nothing is recorded yet"
    return f"{out}: the first {count(tokens, 'token')} are kept; the same command goes on from there"
