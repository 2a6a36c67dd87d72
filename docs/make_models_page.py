"""Write `docs/reference/models.md`, and the table of README.md, from the families that test_families.py checks.

python docs/make_models_page.py
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "models.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- families -->", "<!-- end of families -->"

HEAD = """# Supported models

All {count} families of transformers {version} that route tokens to experts. The table is generated from the test that
builds a small model of each, records it, and checks every id and weight by knock-out: an expert is silenced, and the
tokens whose output changes must be those it served (`tests/engines/test_families.py`). A family added by a newer
transformers fails that test until it is in the list. A model of your own needs a few lines: [add a
router](../how-to/add-a-router.md). Code that a checkpoint brings along runs only with `--trust-remote-code`, and is
read by the same rules.

*Arguments of the experts*: the chosen ids and gate weights with which the experts module is called. Where what ran is
read elsewhere, the table says so. Layers without routed experts are skipped and keep their index. Shared experts always
run; they are counted in the header and are never among the ids.
"""

NOTES = """
## NLLB-MoE

transformers 5.23 passes the router's mask to the experts of NLLB-MoE, which expect ids. As a result, the first choice
of every token runs expert 1 and the second runs expert 0, whichever experts the router chose, and the hidden states
that later layers read are affected accordingly. moescope records what **ran**, as always, and warns when it loads such
a model: the trace is correct for this implementation, and says nothing about the model as trained. A version that
dispatches differently is refused until its reading has been checked.

## Encoder-decoders

Layers are numbered consecutively, the encoder's first and then the decoder's. The encoder reads the document and the
decoder reads the same document, after its start token, which is not recorded; a token's row holds both. Tokens that the
tokenizer puts after a text (`</s>`) are not fed. An assignment beyond an expert's capacity is a null in the `L` column.

## Models with several towers

Only the tower that processes text is recorded. Routed blocks outside of it, which text never reaches, are listed in
`trace.json` under `model.not_recorded`. For Qwen3-Omni this is the thinker's language model, for DiffusionGemma the
encoder (its decoder denoises a random canvas), for ERNIE 4.5 VL the text experts. Gemma 4 and DiffusionGemma run a
dense block beside the experts, which is not counted as a shared expert.

## Sequences that run alone

Where a token's choices depend on everything in the batch (Doge mixes the router's logits of a batch; NLLB-MoE computes
its capacity over it), each window is a forward pass of its own, whatever `--batch-tokens` says. Switch counts capacity
by sequence: windows of equal length share a batch, without padding.
"""


def readme() -> str:
    """The text of the README with its table of families, one row per way of reading."""
    rows: dict[str, list[str]] = {}
    for line in page().splitlines():
        if match := re.fullmatch(r"\| (\w+) \| (`.*`)? \| (.*) \| .*\|", line):
            rows.setdefault(match[3].split(";")[0], []).append(match[1])
    table = ["| what is recorded | families |", "|---|---|"]
    table += [f"| {says} | {', '.join(names)} |" for says, names in sorted(rows.items(), key=lambda row: -len(row[1]))]
    text = README.read_text(encoding="utf-8")
    return text[: text.index(BEGIN)] + "\n".join([BEGIN, *table, ""]) + text[text.index(END) :]


def page() -> str:
    """The text of the page: one row per family."""
    sys.path.insert(0, str(ROOT))
    try:
        from tests.families import FAMILIES, NOT_ROUTED, installed_families
    finally:
        sys.path.remove(str(ROOT))
    folders = {family: folder for folder, family in installed_families().items()}
    rows = ["", "| family | router | recorded | notes |", "|---|---|---|---|"]
    rows += [_row(folders[family], family) for family in sorted(FAMILIES, key=folders.__getitem__)]
    left = ["", "## Not routed", ""]
    left += [f"* `{folder}`: {reason}." for folder, reason in sorted(NOT_ROUTED.items())]
    head = HEAD.format(count=len(FAMILIES), version=re.sub(r"\.\d+$", "", transformers.__version__))
    return head + "\n".join(rows) + "\n" + NOTES + "\n".join(left) + "\n"


def _row(folder: str, family: str) -> str:
    from moescope.engines.transformers.adapters import find_adapter
    from moescope.engines.transformers.routers import find_experts, find_left_out, text_tower
    from tests.families import tiny_config

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = text_tower(transformers.AutoModel.from_config(tiny_config(family)).base_model)
    experts = find_experts(model, family)
    last = experts[-1]
    parent = model.get_submodule(last.name.rpartition(".")[0])
    reading = find_adapter(last.module) or find_adapter(parent)
    left_out = find_left_out(model, experts)
    notes = []
    if last.num_shared_experts:
        notes.append("shared experts")
    if last.num_null_experts:
        notes.append("a skip expert" if family == "zaya" else "zero-compute experts")
    if getattr(model.config, "is_encoder_decoder", False):
        notes.append("encoder and decoder")
    if last.drops:
        notes.append("drops by capacity")
    if last.batching == "alone":
        notes.append("one window per batch")
    if any("attention" in name for name in left_out):
        notes.append('the attention with `block="attention"`')
    elif left_out:
        notes.append(f"not recorded: `{'`, `'.join(left_out)}`")
    if last.warning:
        notes.append("[as executed](#nllb-moe)")
    recorded = reading.says if reading else "arguments of the experts"
    return f"| {folder} | {_router(last, parent)} | {recorded} | {'; '.join(notes)} |"


def _router(experts: Any, parent: Any) -> str:
    """Class of the router that is in the block of some experts."""
    for block in (experts.module, parent):
        for name in ("router", "gate", "router_gate"):
            if (router := getattr(block, name, None)) is not None:
                kind = type(router).__name__
                return f"`{kind}`" if kind != "Linear" else f"`{type(block).__name__}`"
    return ""


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
