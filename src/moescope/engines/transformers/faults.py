"""What is wrong with a checkpoint, said with the file, the field and the value: one boundary around other libraries.

transformers, tokenizers and torch raise what they like where a configuration cannot be: a KeyError of an activation, a
division by zero. All of it ends here, as an error that says which field is the likely cause.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moescope.errors import ModelDamaged, ModelNotFound, MoescopeError

CHOICES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k",
    "num_selected_experts",
)
"""Fields of configurations that say how many experts a token gets."""

WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "PEFT",
}
"""Prefixes that wrappers put before the names of tensors."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SIZES = re.compile(
    r"(^|\.)(hidden_size|intermediate_size|vocab_size|num_\w+|n_\w+|\w*_dim|\w*topk?|\w*top_k|moe_\w+)$"
)
_MOST_NAMED = 4


@contextmanager
def checkpoint_errors(folder: Path, problem: str) -> Iterator[None]:
    """Turn whatever is raised within into an error of the checkpoint.

    Args:
        folder: The checkpoint.
        problem: What fails, such as "its model cannot be built".
    Raises:
        ModelDamaged: Something was raised; fields of config.json that the message, or their value, points at are named.
        MoescopeError: It was raised within, and passes.
    """
    try:
        yield
    except MoescopeError:
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise ModelDamaged(folder, f"{problem}: {text}", _suspects(folder, text)) from error


def check_choices(config: Any, num_experts: int, path: Path | str) -> None:
    """Refuse a configuration that gives a token more experts than there are.

    ``top_k`` is not looked at: in an old config.json it may be that of sampling.

    Raises:
        ModelDamaged: It does.
    """
    for name in CHOICES:
        value = None if name == "top_k" else getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and not 0 < value <= num_experts:
            raise ModelDamaged(
                f"{path}/config.json", f"{name} is {value}, expected 1 to {num_experts}, the experts of a layer"
            )


def check_layers(config: Any, path: Path | str) -> None:
    """Refuse a configuration of a model without layers.

    Raises:
        ModelDamaged: It is one.
    """
    value = getattr(config, "num_hidden_layers", None)
    if isinstance(value, int) and value < 1:
        raise ModelDamaged(f"{path}/config.json", f"num_hidden_layers is {value}, expected at least 1")


def refuse_stand_ins(folder: Path) -> None:
    """Refuse a folder in which something stands in for a checkpoint.

    Raises:
        ModelNotFound: It holds an adapter alone.
        ModelDamaged: A file is a pointer of Git LFS.
    """
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
            hint = "`git lfs pull` in the repository fetches the file"
            raise ModelDamaged(file, "is a Git LFS pointer in place of the file", hint)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = _json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ModelNotFound(
            folder,
            f"holds an adapter of PEFT{f' for {base}' if isinstance(base, str) else ''}, and no model",
            "save the merged model (merge_and_unload), or pass the loaded one: moescope.record((model, tokenizer), …)",
        )


def refuse_wrapped(subject: object, names: Sequence[str]) -> None:
    """Refuse a checkpoint whose tensors carry the prefix of a wrapper.

    Args:
        subject: What the error calls the checkpoint.
        names: Names of tensors in it.
    Raises:
        ModelDamaged: All do; the prefix and the wrapper are named.
    """
    for prefix, wrapper in WRAPPERS.items():
        if names and all(prefix in name for name in names):
            raise ModelDamaged(
                subject,
                f"its tensors are named as {wrapper} wraps them, {prefix!r} before each: {names[0]}",
                f"save the module within the wrapper; of the files, remove {prefix!r} from the names",
            )


def _suspects(folder: Path, text: str) -> str | None:
    """The fields of config.json whose value stands in an error, or is no size, as a hint."""
    fields = dict(_scalars(_json(folder / "config.json")))
    words = set(re.findall(r"-?[\w.+|/]+", text))
    named = [name for name in fields if re.search(rf"\b{re.escape(name.split('.')[-1])}\b", text)]
    valued = [
        name
        for name, value in fields.items()
        if (isinstance(value, str) and len(value) > 2 and value in words)
        or (_SIZES.search(name) and (isinstance(value, str) or (isinstance(value, int | float) and value <= 0)))
    ]
    found = list(dict.fromkeys([*named, *valued]))[:_MOST_NAMED]
    return "config.json says " + ", ".join(f"{name} = {fields[name]!r}" for name in found) if found else None


def _scalars(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _scalars(item, f"{prefix}{name}.")
        elif isinstance(item, list):
            if len(str(item)) < 80:
                yield f"{prefix}{name}", item
        elif not isinstance(item, bool) and item is not None:
            yield f"{prefix}{name}", item


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
