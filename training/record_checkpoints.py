"""Record how each kept checkpoint of the mini model routes the same part of the sample corpus.

    python training/record_checkpoints.py --checkpoints WORK/run/checkpoints --output training/checkpoint-traces

One trace a checkpoint, `pct-001.moe` to `pct-100.moe`, ids only: 5,500 tokens of each domain, the same documents in
each (a sample by hash with seed 0), in float32, so that saturation can be computed without the models.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import moescope
from moescope.mini import corpus_path

TOKENS_A_DOMAIN = 5_500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder that holds pct-001 to pct-100")
    parser.add_argument("--output", type=Path, required=True, help="folder for the traces")
    arguments = parser.parse_args()
    folders = sorted(arguments.checkpoints.glob("pct-[0-9][0-9][0-9]"))
    if not folders:
        parser.error(f"{arguments.checkpoints} holds no folder named pct-001, pct-002 ...")
    for folder in folders:
        trace = moescope.record(
            folder,
            corpus_path(),
            arguments.output / f"{folder.name}.moe",
            max_tokens_per_domain=TOKENS_A_DOMAIN,
            dtype="float32",
            part_tokens=2**20,
            force=True,
        )
        size = sum(file.stat().st_size for file in trace.path.rglob("*") if file.is_file())
        print(f"{trace.path}: {trace.num_tokens} tokens of {len(trace.domains)} domains, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
