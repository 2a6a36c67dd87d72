"""From documents to a trace: nothing lost, nothing doubled, nothing that the user did not write."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model
from tiny import assert_same, byte_level_tokenizer, columns, some_documents

import moescope
from moescope.corpus import Document
from moescope.engines.transformers.tokenizer import Tokenizer
from moescope.errors import (
    CorpusChanged,
    CorpusEmpty,
    DiskFull,
    ModelDamaged,
    NoSuchLayer,
    RouterNotFinite,
    TraceExists,
    TraceMismatch,
)
from moescope.recording import Progress, record
from moescope.trace import open_trace

Save = Callable[..., Path]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("window", [16, 100, 2048])
def test_each_document_reads_back_as_its_text(
    bos: bool, window: int, documents: list[Document], tmp_path: Path
) -> None:
    tokenizer = byte_level_tokenizer(bos=bos)
    trace = record((tiny_model("mixtral"), tokenizer), documents, tmp_path / "t.moe", window=window, part_tokens=90)
    assert trace.document_numbers.tolist() == [0, 1, 2, 4, 5, 6, 7]  # 3 is empty
    assert len(trace.parts) > 2
    for document in documents:
        if document.text:
            part = trace.document(document.number)
            assert trace.vocabulary.text(part.token_id) == document.text
            assert trace.domains[part.domain[0]] == document.domain
            assert part.position.max() < min(window, 512) - bos
            assert 0 not in part.token_id  # neither BOS nor padding nor the <s> of the text
    assert trace.summary == {
        "documents_read": 8,
        "documents_empty": 1,
        "tokens": trace.num_tokens,
        "characters": sum(len(document.text) for document in documents),
    }
    assert trace.verify() == []


def test_the_window_is_capped_at_what_the_model_was_made_for(tmp_path: Path) -> None:
    model = tiny_model("mixtral", max_position_embeddings=32)
    trace = record((model, byte_level_tokenizer()), some_documents([300]), tmp_path / "t.moe")
    assert trace.header.run["window"] == 32
    assert columns(trace)["position"].max() == 31


def test_added_tokens_count_in_the_window_and_change_the_choices(documents: list[Document], tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    plain = record((model, byte_level_tokenizer()), documents, tmp_path / "plain.moe", window=16)
    bos = record((model, byte_level_tokenizer(bos=True)), documents, tmp_path / "bos.moe", window=16)
    assert (columns(plain)["position"].max(), columns(bos)["position"].max()) == (15, 14)
    assert bos.header.tokenizer["added_ids"] == [0]
    assert not np.array_equal(columns(plain)["L3"], columns(bos)["L3"])


@pytest.mark.parametrize("batch_tokens", [1, 100, 1000])
@pytest.mark.parametrize("part_tokens", [1, 300])
def test_batches_and_parts_change_no_choice(batch_tokens: int, part_tokens: int, tmp_path: Path) -> None:
    model, tokenizer, documents = tiny_model("mixtral"), byte_level_tokenizer(bos=True), some_documents()
    one = record((model, tokenizer), documents, tmp_path / "1.moe", window=50, weights=True)
    other = record(
        (model, tokenizer), documents, tmp_path / "2.moe",
        window=50, weights=True, batch_tokens=batch_tokens, part_tokens=part_tokens,
    )  # fmt: skip
    assert_same(one, other, rtol=1e-5)


def test_some_layers_are_recorded_as_all_of_them_are(documents: list[Document], tmp_path: Path) -> None:
    model, tokenizer = tiny_model("deepseek_v3"), byte_level_tokenizer()
    every = columns(record((model, tokenizer), documents, tmp_path / "all.moe"))
    some = columns(record((model, tokenizer), documents, tmp_path / "some.moe", layers=[3, 1]))
    assert some.keys() == every.keys() - {"L2"}
    for name, values in some.items():
        np.testing.assert_array_equal(values, every[name])


def test_a_path_and_a_loaded_model_record_the_same(
    documents: list[Document], checkpoint: Save, tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model("mixtral", causal=True)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(
            json.dumps({"text": document.text, "meta": {"pile_set_name": document.domain}}) + "\n"
            for document in documents
        )
    )
    by_path = moescope.record(checkpoint(model, tokenizer), corpus, tmp_path / "path.moe", weights=True)
    by_object = moescope.record((model, tokenizer), documents, tmp_path / "object.moe", weights=True)
    assert_same(by_path, by_object)
    assert by_path.summary == {**(by_object.summary or {}), "malformed": 0}
    assert by_path.header.model["name"] == "checkpoint"
    assert str(tmp_path) not in by_path.header.to_json()


def test_quotas_are_filled_by_domain_and_documents_cut_at_them(
    documents: list[Document], tokenizer: Any, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(
            json.dumps({"text": document.text, "meta": {"pile_set_name": document.domain}}) + "\n"
            for document in documents
        )
    )
    seen: list[Progress] = []
    trace = record(
        (tiny_model("mixtral"), tokenizer), corpus, tmp_path / "t.moe", max_tokens_per_domain=37, progress=seen.append
    )
    assert sorted(np.bincount(columns(trace)["domain"]).tolist()) == [37, 37, 37]
    assert trace.header.corpus["sample"]["max_tokens_per_domain"] == 37
    assert seen[-1].fraction == pytest.approx(1, abs=0.02)


def test_hooks_are_gone_and_outputs_unchanged(documents: list[Document], tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe", causal=True)
    ids = torch.arange(30).unsqueeze(0)
    with torch.no_grad():
        before = model(ids).logits
    record((model, tokenizer), documents, tmp_path / "t.moe")
    with torch.no_grad():
        after = model(ids).logits
    assert torch.equal(before, after)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_hooks_are_gone_after_an_error_and_the_same_call_goes_on(
    error: type[BaseException], documents: list[Document], tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model("mixtral")
    whole = record((model, tokenizer), documents, tmp_path / "whole.moe", part_tokens=100)

    def fail(progress: Progress) -> None:
        if progress.tokens > 300:
            raise error

    with pytest.raises(error):
        record((model, tokenizer), documents, tmp_path / "t.moe", part_tokens=100, progress=fail)
    assert not any(module._forward_pre_hooks for module in model.modules())
    unfinished = open_trace(tmp_path / "t.moe")
    assert not unfinished.complete
    assert 0 < unfinished.num_tokens < whole.num_tokens
    seen: list[Progress] = []
    resumed = record((model, tokenizer), documents, tmp_path / "t.moe", part_tokens=100, progress=seen.append)
    assert_same(resumed, whole)
    assert resumed.summary == whole.summary
    assert seen[0].tokens > unfinished.num_tokens
    assert seen[-1].tokens == whole.num_tokens
    assert seen[-1].fraction == 1


def test_progress_rises_to_one_and_tells_the_time_left(
    documents: list[Document], tokenizer: Any, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    record((tiny_model("mixtral"), tokenizer), documents, tmp_path / "t.moe", part_tokens=100, progress=seen.append)
    fractions = [each.fraction for each in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert seen[-1].seconds_left == 0
    assert seen[0].seconds_left > 0
    assert seen[0].tokens_per_second > 0


def test_documents_that_can_be_read_only_once_have_no_total(
    documents: list[Document], tokenizer: Any, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    trace = record((tiny_model("mixtral"), tokenizer), iter(documents), tmp_path / "t.moe", progress=seen.append)
    assert trace.num_documents == 7
    assert (seen[-1].fraction, seen[-1].seconds_left) == (None, None)
    assert trace.header.corpus["fingerprint"] is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"window": 20}, "run.window"),
        ({"weights": True}, "weights"),
        ({"layers": [1]}, "layers"),
        ({"batch_tokens": 7}, "run.batch_tokens"),
        ({"corpus": some_documents([200, 200, 201])}, "corpus.fingerprint"),
        ({"model": (tiny_model("mixtral", seed=1), byte_level_tokenizer())}, "model.fingerprint"),
        ({"model": (tiny_model("mixtral"), byte_level_tokenizer(bos=True))}, "tokenizer.fingerprint"),
    ],
)
def test_another_recording_may_not_go_on_with_a_trace(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    call: dict[str, Any] = {
        "model": (tiny_model("mixtral"), byte_level_tokenizer()),
        "corpus": some_documents([200, 200, 200]),
        "out": tmp_path / "t.moe",
        "part_tokens": 50,
    }

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(**call, progress=stop)
    with pytest.raises(TraceMismatch, match=field):
        record(**call | change)
    assert record(**call).complete


def test_a_finished_trace_is_kept_unless_forced(
    documents: list[Document], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("mixtral")
    record((model, tokenizer), documents, tmp_path / "t.moe")
    with pytest.raises(TraceExists, match="is kept"):  # before anything is loaded
        record(tmp_path / "no model", tmp_path / "no corpus", tmp_path / "t.moe")
    assert record((model, tokenizer), documents[:2], tmp_path / "t.moe", force=True).num_documents == 2


def test_a_layer_that_does_not_exist_leaves_no_trace(documents: list[Document], tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(NoSuchLayer, match="there is no layer 9; the layers with routed experts are 0-3"):
        record((tiny_model("mixtral"), tokenizer), documents, tmp_path / "t.moe", layers=[9])
    assert not (tmp_path / "t.moe").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gate_weights_that_are_not_finite_name_layer_and_document(
    value: float, documents: list[Document], tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model("mixtral")
    first, second = (set(Tokenizer(tokenizer).encode(document.text).tolist()) for document in documents[:2])
    with torch.no_grad():
        model.get_input_embeddings().weight[min(second - first)] = value
    with pytest.raises(RouterNotFinite, match="in document 1, sequence 0, position") as error:
        record((model, tokenizer), documents, tmp_path / "t.moe", part_tokens=20)
    assert error.value.subject == "layer 0"
    assert open_trace(tmp_path / "t.moe").document_numbers.tolist() == [0]
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_corpus_without_a_token_is_an_error(texts: list[str], tokenizer: Any, tmp_path: Path) -> None:
    documents = [Document(number, "d", text) for number, text in enumerate(texts)]
    with pytest.raises(CorpusEmpty, match=f"none of its {len(texts)} documents has a token"):
        record((tiny_model("mixtral"), tokenizer), documents, tmp_path / "t.moe")


def test_a_corpus_that_is_changed_while_it_is_recorded_is_not_finished_and_its_parts_are_kept(tmp_path: Path) -> None:
    def line(number: int) -> str:
        return json.dumps({"text": f"the cat sat {number} " * 30, "meta": {"pile_set_name": "Github"}}) + "\n"

    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(map(line, range(40))), encoding="utf-8")
    model = tiny_model("mixtral", num_hidden_layers=1), byte_level_tokenizer()
    changed: list[bool] = []

    def change(_: Progress) -> None:
        if not changed:
            changed.append(True)
            with corpus.open("a", encoding="utf-8") as file:
                file.write(line(99))

    with pytest.raises(CorpusChanged, match=r"c.jsonl was changed while it was read"):
        record(model, corpus, tmp_path / "t.moe", part_tokens=100, window=60, progress=change)
    kept = open_trace(tmp_path / "t.moe")
    assert not kept.complete
    assert kept.num_documents >= 40


def test_documents_of_one_token_are_recorded(tokenizer: Any, tmp_path: Path) -> None:
    documents = [Document(number, "d", character) for number, character in enumerate("abc")]
    trace = record((tiny_model("mixtral"), tokenizer), documents, tmp_path / "t.moe")
    assert (trace.num_documents, trace.num_tokens) == (3, 3)


def test_a_document_of_ten_megabytes_is_recorded_whole(tmp_path: Path) -> None:
    text = "x" * 10_000_000
    tokenizer = byte_level_tokenizer()
    fewer = tokenizer.backend_tokenizer
    run = "x" * 4096  # one token, so that the tiny model has little to read
    fewer.add_tokens([run])
    model = tiny_model("mixtral", num_hidden_layers=1)
    trace = record((model, tokenizer), [Document(0, "d", text)], tmp_path / "t.moe", window=64)
    assert trace.vocabulary.text(trace.document(0).token_id) == text


def test_ids_beyond_the_model_are_said_to_be_of_another_tokenizer(
    documents: list[Document], tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ModelDamaged, match="the model knows 100 ids"):
        record((tiny_model("mixtral", vocab_size=100), tokenizer), documents, tmp_path / "t.moe")


def test_a_full_disk_keeps_the_finished_parts_and_the_same_call_goes_on(
    documents: list[Document], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moescope.trace.part_file

    model = tiny_model("mixtral")
    whole = record((model, tokenizer), documents, tmp_path / "whole.moe", part_tokens=100)
    write_part, calls = moescope.trace.part_file.write_part, 0

    def full(file: Any, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            file.write(b"half a part")
            raise OSError(errno.ENOSPC, "No space left on device")
        write_part(file, *args)

    monkeypatch.setattr(moescope.trace.part_file, "write_part", full)
    with pytest.raises(DiskFull, match="every finished part is kept"):
        record((model, tokenizer), documents, tmp_path / "t.moe", part_tokens=100)
    monkeypatch.undo()
    assert len(open_trace(tmp_path / "t.moe").parts) == 2
    assert_same(record((model, tokenizer), documents, tmp_path / "t.moe", part_tokens=100), whole)


@pytest.mark.parametrize(
    "arguments",
    [
        {"window": 0},
        {"batch_tokens": 0},
        {"part_tokens": 0},
        {"window": 1},
        {"dtype": "float32"},
        {"device": "cpu"},
        {"max_tokens_per_domain": 9},
    ],
)
def test_wrong_arguments_are_value_errors(arguments: dict[str, Any], documents: list[Document], tmp_path: Path) -> None:
    model = (tiny_model("mixtral"), byte_level_tokenizer(bos=True))
    with pytest.raises(ValueError):  # noqa: PT011
        record(model, documents, tmp_path / "t.moe", **arguments)


def test_the_header_says_what_could_change_a_choice(documents: list[Document], tokenizer: Any, tmp_path: Path) -> None:
    header = record((tiny_model("gpt_oss"), tokenizer), documents, tmp_path / "t.moe").header
    assert header.model | {"fingerprint": ""} == {
        "expert_widths": [24],
        "router": "GptOssTopKRouter",
        "name": "GptOssModel",
        "family": "gpt_oss",
        "architecture": "GptOssModel",
        "num_layers": 4,
        "hidden_size": 32,
        "dtype": "float32",
        "fingerprint": "",
    }
    assert {
        name: header.run[name] for name in ("window", "device", "attn_implementation", "experts_implementation")
    } == {
        "window": 512,
        "device": "cpu",
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    assert header.run["torch"] == torch.__version__


def test_the_function_and_its_room_have_names_of_their_own() -> None:
    import moescope.engines.transformers.model

    assert moescope.record is moescope.recording.record is record
