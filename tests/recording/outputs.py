"""Traces made in every way, and whether two sets of them are the same to the byte: for changes that may change none.

    python tests/recording/outputs.py write FOLDER
    python tests/recording/outputs.py compare BEFORE AFTER

A watched trace says when it was made; that, and the checksum of its header, is left out.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "llama4", "nllb-moe", "longcat_flash", "switch_transformers", "zaya")
STREAMED = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
OPTIONS: dict[str, Any] = {"window": 40, "part_tokens": 100, "batch_tokens": 90, "weights": True}


def write(folder: Path) -> None:
    """Write every trace into `folder`."""
    import torch

    import moescope
    from moescope import mini
    from tests.families import tiny_model
    from tests.tiny import byte_level_tokenizer, some_documents

    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    quotas: dict[str, Any] = {"max_tokens_per_domain": 700, "part_tokens": 2000}
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "weights": {"weights": True, "lookahead": (1, 2)},
        "layers": {"layers": [1, 3], "window": 64, "batch_tokens": 500},
        "half": {"dtype": "bfloat16", "weights": True},
        "streamed": {"stream": True, "weights": True, "memory": 0},
    }
    for name, options in ways.items():
        moescope.record(mini.model_path(), mini.corpus_path(), folder / f"mini-{name}", **quotas | options)
    for family in FAMILIES:
        for bos in (False, True):
            made = tiny_model(family), byte_level_tokenizer(bos=bos)
            moescope.record(made, some_documents(), folder / f"{family}-{bos}", **OPTIONS)
    for family in STREAMED:
        checkpoint = folder / "models" / family
        tiny_model(family, causal=True).save_pretrained(checkpoint)
        byte_level_tokenizer(bos=True).save_pretrained(checkpoint)
        for stream in (False, True):
            out = folder / f"{family}-checkpoint-{stream}"
            moescope.record(checkpoint, some_documents(), out, stream=stream, **OPTIONS)
    _watch(folder)


def _watch(folder: Path) -> None:
    import torch

    import moescope
    from tests.families import tiny_model
    from tests.tiny import byte_level_tokenizer

    for family in ("mixtral", "qwen3_moe", "llama4"):
        model, tokenizer = tiny_model(family, causal=True), byte_level_tokenizer(bos=True)
        torch.manual_seed(0)
        with moescope.watch(
            model, folder / f"watch-{family}", tokenizer=tokenizer, weights=True, part_tokens=50
        ) as watch:
            for length in (5, 17, 9):
                ids = torch.randint(1, 300, (3, length))
                mask = torch.ones_like(ids)
                mask[1, length // 2 :] = 0
                with watch.domain(["a", "b", "a"]):
                    model(input_ids=ids, attention_mask=mask)
            with watch.document("text"):
                for _ in range(2):
                    model(input_ids=torch.randint(1, 300, (1, 12)))
            if family != "llama4":
                model.generate(torch.randint(1, 300, (2, 6)), max_new_tokens=5, do_sample=False, pad_token_id=0)
        loads = watch.loads()
        figures = {
            name: getattr(loads, name).values.tolist() for name in ("load", "dropped", "imbalance", "entropy", "idle")
        }
        (folder / f"watch-{family}-loads.json").write_text(json.dumps(figures))


def compare(before: Path, after: Path) -> int:
    """Print what differs; return how many files do."""
    names = sorted(
        {path.relative_to(folder) for folder in (before, after) for path in folder.rglob("*") if path.is_file()}
    )
    names = [name for name in names if name.parts[0] != "models"]
    differing = 0
    for name in names:
        one, other = (_content(folder, name) for folder in (before, after))
        if one != other:
            differing += 1
            print(f"{name}: {'missing' if None in (one, other) else 'differs'}")
            if name.name == "trace.json" and one and other:
                print(*_differences("", json.loads(one), json.loads(other)), sep="\n")
    print(f"{len(names) - differing} of {len(names)} files are equal")
    return differing


def _content(folder: Path, name: Path) -> bytes | None:
    if not (folder / name).is_file():
        return None
    content = (folder / name).read_bytes()
    if name.parts[0].startswith("watch") and name.name == "trace.json":
        header = json.loads(content)
        header["run"] |= {"watch": "", "started": ""}
        return json.dumps(header).encode()
    if name.parts[0].startswith("watch") and name.name == "SHA256SUMS":
        return b"".join(line for line in content.splitlines(keepends=True) if b"trace.json" not in line)
    return content


def _differences(name: str, one: Any, other: Any) -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [line for key in keys for line in _differences(f"{name}.{key}", one.get(key), other.get(key))]
    return [] if one == other else [f"  {name}: {one!r} -> {other!r}"]


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    warnings.simplefilter("ignore")
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        sys.exit(bool(compare(Path(sys.argv[2]), Path(sys.argv[3]))))
