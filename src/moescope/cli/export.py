"""``moescope export``: a trace in a format of other programs."""

from __future__ import annotations

from pathlib import Path

import click

from moescope.reporting.options import exclude_option, force_option, layers_option, output_option, trace_argument
from moescope.reporting.printing import say


@click.command()
@click.argument("format", type=click.Choice(["vllm", "jsonl", "oracle-general", "hot-experts"]))
@trace_argument
@output_option(None, "File or folder to write.")
@layers_option
@exclude_option
@force_option
def command(
    format: str, trace: Path, output: Path, layers: tuple[int, ...] | None, exclude: tuple[str, ...], force: bool
) -> None:
    """Write a trace in a format of other programs.

    vllm: arrays of expert ids as vLLM returns them (token, layer of the model, choice), one .npy a sequence in a
    folder, or all in one file if PATH ends in .npz; layout.json says which layers are real. jsonl: a line a token and
    layer. oracle-general: requests for experts, for cache simulators. hot-experts: loads, and the experts in order of
    heat, as JSON. Prints the path.

    \b
    Example:
      moescope export vllm pile.moe -o arrays.npz
      moescope export jsonl pile.moe -o routing.jsonl --layers 0,15
    """
    from moescope.exporting import export
    from moescope.trace import open_trace

    say(export(open_trace(trace, exclude=exclude), output, format=format, layers=layers, force=force))
