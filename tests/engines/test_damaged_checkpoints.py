"""Checkpoints that cannot be are refused with the file, the field and the value, whatever other libraries raise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model
from safetensors.torch import load_file, save_file
from tiny import byte_level_tokenizer

from moescope.errors import ModelDamaged, ModelError, ModelNotFound, TokenizerMissing
from moescope.recording import record

CORPUS = '{"text": "the cat sat on the mat", "meta": {"pile_set_name": "Github"}}\n'
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

FIELDS: dict[str, tuple[Any, str]] = {
    "num_experts_per_tok": ([2], "num_experts_per_tok = [2]"),
    "num_local_experts": (-8, "num_local_experts = -8"),
    "hidden_size": ("64", "hidden_size = '64'"),
    "hidden_act": ("nope", "hidden_act = 'nope'"),
    "rope_parameters": ({"rope_type": "nope", "rope_theta": 1e4}, "rope_parameters.rope_type = 'nope'"),
    "dtype": ("float17", "dtype = 'float17'"),
    "attn_implementation": ("nope", 'attn_implementation="nope"'),
    "num_attention_heads": (0, "num_attention_heads = 0"),
    "vocab_size": (-5, "vocab_size = -5"),
    "num_hidden_layers": (-2, "num_hidden_layers is -2, expected at least 1"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("mixtral", num_hidden_layers=2).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def changed(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the checkpoint with other fields of config.json."""

    def change(**fields: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(checkpoint, folder)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")
        return folder

    return change


def refused(folder: Path, error: type[ModelError], **options: Any) -> str:
    corpus = folder.parent / "c.jsonl"
    corpus.write_text(CORPUS, encoding="utf-8")
    with pytest.raises(error) as raised:
        record(folder, corpus, folder.parent / "t.moe", **options)
    assert not (folder.parent / "t.moe" / "trace.json").exists()
    return raised.value.render()


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_cannot_be_is_named_with_its_value(field: str, changed: Callable[..., Path]) -> None:
    value, said = FIELDS[field]
    assert said in refused(changed(**{field: value}), ModelDamaged)


def test_more_experts_a_token_than_there_are(changed: Callable[..., Path]) -> None:
    folder = changed(num_experts_per_tok=99)
    for stream in (None, True):
        assert "config.json: num_experts_per_tok is 99, expected 1 to 8" in refused(folder, ModelDamaged, stream=stream)


def test_the_top_k_of_sampling_in_an_old_config_is_no_number_of_experts(changed: Callable[..., Path]) -> None:
    folder = changed(top_k=50)
    (folder.parent / "c.jsonl").write_text(CORPUS, encoding="utf-8")
    assert record(folder, folder.parent / "c.jsonl", folder.parent / "t.moe").num_tokens


@pytest.mark.parametrize("content", ["{", '{"version": "9.9", "model": {"type": "Nope"}}', "[]"])
def test_a_tokenizer_that_cannot_be_parsed_is_named(content: str, changed: Callable[..., Path]) -> None:
    folder = changed()
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    assert "Its files: tokenizer.json" in refused(folder, TokenizerMissing)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_named(name: str, changed: Callable[..., Path]) -> None:
    folder = changed()
    (folder / name).write_text(POINTER, encoding="utf-8")
    assert f"{name}: is a Git LFS pointer in place of the file" in refused(folder, ModelDamaged)


def test_an_adapter_alone_is_no_model(changed: Callable[..., Path]) -> None:
    folder = changed()
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}', encoding="utf-8")
    assert "holds an adapter of PEFT for org/base, and no model" in refused(folder, ModelNotFound)


@pytest.mark.parametrize("stream", [None, True])
@pytest.mark.parametrize(
    ("prefix", "wrapper"), [("module.", "DistributedDataParallel"), ("_orig_mod.", "torch.compile")]
)
def test_the_prefix_of_a_wrapper_is_named(
    prefix: str, wrapper: str, stream: bool | None, changed: Callable[..., Path]
) -> None:
    folder = changed()
    tensors = load_file(folder / "model.safetensors")
    save_file({prefix + name: t for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    said = refused(folder, ModelDamaged, stream=stream)
    assert f"named as {wrapper} wraps them, {prefix!r} before each" in said
