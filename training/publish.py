"""Copy one checkpoint of a training run into the package, as the model that ships.

What training set for itself is undone: the cache is switched on again, and nothing names the folder it came from.
Attention is limited to the 512 tokens of a training window: without that limit the loss of a document rises by a
fifth or more after its 512th token, with it the loss stays where it was.

Example:
    python training/publish.py --checkpoint WORK/run/checkpoints/pct-100 --output src/moescope/mini/mini-mixtral
"""

import argparse
import json
import shutil
from pathlib import Path

WEIGHTS = "model.safetensors"
TRAINING_WINDOW = 512
COPIED = ("tokenizer.json",)
LARGEST_BYTES = 32_000_000


def publish(checkpoint: Path, output: Path) -> None:
    """Write the folder; the weights are renamed into place last."""
    size = (checkpoint / WEIGHTS).stat().st_size
    if size > LARGEST_BYTES:
        raise ValueError(f"{checkpoint / WEIGHTS} has {size} bytes, more than {LARGEST_BYTES}")
    output.mkdir(parents=True, exist_ok=True)
    for name, changes, dropped in (
        ("config.json", {"use_cache": True, "sliding_window": TRAINING_WINDOW}, ()),
        ("generation_config.json", {"use_cache": True}, ()),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}, ("is_local", "local_files_only")),
    ):
        entries = json.loads((checkpoint / name).read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in entries.items() if key not in dropped}
        (output / name).write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in COPIED:
        shutil.copyfile(checkpoint / name, output / name)
    partial = output / f"{WEIGHTS}.partial"
    shutil.copyfile(checkpoint / WEIGHTS, partial)
    partial.replace(output / WEIGHTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    publish(arguments.checkpoint, arguments.output)
