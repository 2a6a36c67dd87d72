"""``moescope import``: make a trace of what another program recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moescope.reporting.options import exclude_option, force_option, layers_option_for, output_option
from moescope.reporting.printing import say


def _parse_fields(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    """Read ``experts=topk``."""
    from moescope.importers.named import NAMES

    fields = dict(item.split("=", 1) for item in value if "=" in item)
    if len(fields) != len(value) or (unknown := set(fields) - set(NAMES)):
        bad = value if len(fields) != len(value) else unknown
        raise click.BadParameter(f"expected WHAT=NAME, WHAT one of {', '.join(NAMES)}; found {', '.join(bad)}.")
    return fields


@click.command()
@click.argument("format", metavar="FORMAT")
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@output_option(None, "Folder of the trace.")
@click.option("--num-experts", type=click.IntRange(1, 65536), metavar="N", help="Routed experts of a layer.")
@click.option("--top-k", type=click.IntRange(1, 65536), metavar="K", help="Experts chosen a token.")
@click.option(
    "--num-layers", type=click.IntRange(1, 65536), metavar="N", help="Layers of the model, dense ones included."
)
@layers_option_for("Layers with routed experts, such as 3,4,5, counted over the whole model.")
@click.option("--domain", metavar="LABEL", help="Label of all documents.  [default: the file's, else its name]")
@click.option("--model", metavar="NAME", help="Name of the model, where the files do not say it.")
@click.option("--ranked", is_flag=True, help="Choices stand in order of gate weight, though no weights say so.")
@click.option(
    "--field",
    "fields",
    multiple=True,
    callback=_parse_fields,
    metavar="WHAT=NAME",
    help="Name of a column (jsonl, csv, parquet), such as experts=topk; may be repeated.",
)
@click.option("--restarts", is_flag=True, help="A token number below the one before it begins a document.")
@click.option(
    "--document-tokens", type=click.IntRange(1), metavar="N", help="Tokens of a document, where no column divides them."
)
@click.option("--bos", type=click.IntRange(0), metavar="ID", help="Leave out the first token of an answer if it is ID.")
@exclude_option
@force_option
def command(format: str, files: tuple[Path, ...], output: Path, **arguments: Any) -> None:
    """Make a trace of what another program recorded.

    FORMAT is one of sglang, sglang-csv, sglang-returned, vllm, imatrix, bigmoeonedge, gpt-oss, jsonl, csv, parquet,
    counts, moe-policylang, megatron, tensorrt-llm, olmoe. FILES are what the program wrote; text may be compressed with
    gzip or zstd. Nothing of a file is ever executed. What looks odd is imported, warned of, and kept in the trace.

    \b
    Examples:
      moescope import bigmoeonedge qwen.route.csv -o qwen.moe
      moescope import sglang-returned answers.jsonl -o answers.moe --num-layers 48 --top-k 8 --num-experts 128
    """
    from moescope.importers import FORMATS, import_trace
    from moescope.reporting.wording import describe_size

    if format not in FORMATS:
        raise click.BadParameter(f"{format!r} is none of {', '.join(FORMATS)}.", param_hint="FORMAT")
    trace = import_trace(format, files, output, **arguments)
    say(f"{output}: {describe_size(trace)}", err=True)
