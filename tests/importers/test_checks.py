"""What cannot be right is refused, saying where; what looks odd is imported, told of, and kept in the trace."""

from __future__ import annotations

import base64
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from foreign import bigmoeonedge, choices, gguf_bytes, jsonl, sglang_per_token

import moescope
from moescope.cli import main
from moescope.errors import (
    ImportIncomplete,
    ImportMalformed,
    ImportNotFound,
    ImportTooLarge,
    MoescopeError,
    TraceExists,
)
from moescope.trace.columns import NOT_RECORDED


def events(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps({"token_idx": 0, "layer": 0, "experts": [0, 1]} | row) + "\n" for row in rows))
    return path


def warned(format: str, files: list[Path], out: Path, **options: object) -> list[str]:
    """Import; the warnings that were told, which are also in the summary."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = moescope.import_trace(format, files, out, **options)
    told = [str(warning.message) for warning in caught]
    assert trace.summary["warnings"] == told
    return told


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"experts": [3, 3]}, "chooses an expert twice (3, 3), expected 2 different ones"),
        ({"experts": [0, 8]}, "has expert id 8, expected 0 to 7"),
        ({"experts": [0, -2]}, "expected a whole number from -1 to 65535, found '-2'"),
        ({"experts": [0, 10**30]}, "expected a whole number from -1 to 65535"),
        ({"experts": [0, 1.5]}, "expected a whole number"),
        ({"experts": [0, 1, 2]}, "has 3 experts per token, expected 2"),
        ({"experts": []}, "has 0 experts, expected 1 to 1024"),
        ({"experts": "x"}, "has 0 experts"),
        ({"layer": -1}, "layer: expected a whole number from 0 to 65535, found '-1'"),
        ({"layer": 3}, "has layer 3, but the model has 3 layers"),
        ({"token_idx": None}, "token_idx: expected a whole number"),
    ],
)
def test_a_row_that_cannot_be_right_is_refused_with_its_place(row: dict, problem: str, tmp_path: Path) -> None:
    path = events(tmp_path / "log.jsonl", [{}, row | {"token_idx": row.get("token_idx", 1)}])
    with pytest.raises(ImportMalformed) as caught:
        moescope.import_trace("jsonl", [path], tmp_path / "o.moe", num_experts=8, top_k=2, num_layers=3)
    assert problem in caught.value.problem
    assert str(path) in caught.value.subject
    assert (
        ("line 2" in caught.value.subject) or ("token 1" in caught.value.subject) or "layer 3" in caught.value.problem
    )
    assert not (tmp_path / "o.moe").exists()


def test_a_token_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportMalformed, match="token 0, layer 0: occurs twice"):
        moescope.import_trace("jsonl", [events(tmp_path / "a.jsonl", [{}, {}])], tmp_path / "o.moe")


def test_a_layer_without_rows_for_some_tokens_did_not_record_them_and_says_so(tmp_path: Path) -> None:
    path = events(tmp_path / "a.jsonl", [{}, {"layer": 1}, {"token_idx": 1}])
    told = warned("jsonl", [path], tmp_path / "o.moe", num_experts=4, ranked=True)
    assert told[1:] == ["layer 1: 1 of 2 tokens were not recorded; no measure counts them"]
    trace = moescope.open_trace(tmp_path / "o.moe")
    (part,) = trace.iter_parts()
    assert part.expert_ids[1].tolist() == [[0, 1], [NOT_RECORDED, NOT_RECORDED]]
    assert [(layer.partial, layer.drops) for layer in trace.layers] == [(False, False), (True, False)]


def test_a_gap_in_the_tokens_begins_a_sequence(tmp_path: Path) -> None:
    path = events(tmp_path / "a.jsonl", [{"token_idx": t} for t in (4, 5, 9)])
    told = warned("jsonl", [path], tmp_path / "o.moe", num_experts=4, ranked=True)
    assert "1 gaps in the numbers of tokens begin a new sequence" in told
    (part,) = moescope.open_trace(tmp_path / "o.moe").iter_parts()
    assert part.sequence.tolist() == [0, 0, 1]
    assert part.position.tolist() == [0, 1, 0]


def test_choices_out_of_the_order_of_their_weights_are_put_in_it(tmp_path: Path) -> None:
    rows = [{"weights": [0.2, 0.8]}, {"token_idx": 1, "weights": [0.9, 0.1]}]
    told = warned("jsonl", [events(tmp_path / "a.jsonl", rows)], tmp_path / "o.moe", num_experts=4)
    assert "1 (token, layer) rows were sorted by gate weight" in told
    trace = moescope.open_trace(tmp_path / "o.moe")
    (part,) = trace.iter_parts(weights=True)
    assert part.expert_ids[0].tolist() == [[1, 0], [0, 1]]
    assert part.gate_weights[0].tolist() == [[np.float32(0.8), np.float32(0.2)], [np.float32(0.9), np.float32(0.1)]]
    assert trace.layers[0].ranked


def test_weights_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("token,layer,expert,weight\n0,0,1,nan\n1,0,0,0.5\n")
    told = warned("csv", [path], tmp_path / "o.moe", num_experts=4)
    assert any("gate weights were left out" in message and "NaN or infinite" in message for message in told)
    assert not moescope.open_trace(tmp_path / "o.moe").header.weights


@pytest.mark.parametrize(
    ("logits", "words"), [([0.75, 0.25], "have logits that sum to 1"), ([-2.0, 3.0], "router logits were left out")]
)
def test_logits_are_never_taken_for_gate_weights(logits: list[float], words: str, tmp_path: Path) -> None:
    path = events(tmp_path / "a.jsonl", [{"router_logits": logits}])
    told = warned("jsonl", [path], tmp_path / "o.moe", num_experts=4)
    assert any(words in message for message in told)
    assert not moescope.open_trace(tmp_path / "o.moe").header.weights


def test_negative_gate_weights_look_like_logits(tmp_path: Path) -> None:
    path = events(tmp_path / "a.jsonl", [{"weights": [3.5, -1.0]}])
    assert "layer 0: gate weights are below 0; are they router logits?" in warned(
        "jsonl", [path], tmp_path / "o.moe", num_experts=4
    )


def test_a_choice_that_ran_no_expert_keeps_its_slot(tmp_path: Path) -> None:
    ids = np.array([[[5, -1], [-1, 3], [-1, -1], [2, 4]]])
    with pytest.warns(UserWarning, match="3 of 4 tokens have fewer than 2 experts; what is missing"):
        trace = moescope.from_arrays(tmp_path / "a.moe", ids, num_experts=8, ranked=True)
    (part,) = trace.iter_parts()
    assert part.expert_ids[0].tolist() == ids[0].tolist()


def test_arrays_tell_dropped_from_not_recorded(tmp_path: Path) -> None:
    ids = np.array([[[5, -1], [-2, -2], [-1, -1], [2, 4]]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = moescope.from_arrays(tmp_path / "a.moe", ids, num_experts=8, ranked=True)
    assert [str(warning.message).split(";")[0] for warning in caught] == [
        "layer 0: 1 of 4 tokens were not recorded",
        "layer 0: 2 of 4 tokens have fewer than 2 experts",
    ]
    (part,) = trace.iter_parts()
    assert part.expert_ids[0].tolist() == ids[0].tolist()
    assert trace.verify() == []
    assert moescope.tally(trace).data["tokens"].sum() == 3


def test_a_warm_up_of_identical_tokens_is_told_of(tmp_path: Path) -> None:
    ids = choices(np.random.default_rng(0), 4000, 8, 2)
    ids[500:2500] = [3, 4]
    with pytest.warns(UserWarning, match=r"tokens are routed exactly like the one before them.*is it a warm-up"):
        trace = moescope.from_arrays(tmp_path / "a.moe", ids[None], num_experts=8, ranked=True)
    (message,) = trace.summary["warnings"]
    assert message.startswith("2,000 tokens")
    assert "--exclude tokens:500-2499 leaves them out" in message


def test_repeats_below_a_thousand_are_not_told_of(tmp_path: Path) -> None:
    ids = np.tile([[3, 4]], (999, 1))
    ids = np.concatenate([ids, [[4, 3]], ids])
    trace = moescope.from_arrays(tmp_path / "a.moe", ids[None], num_experts=8, ranked=True)
    assert trace.summary["warnings"] == []


def test_the_number_of_experts_is_inferred_only_aloud(tmp_path: Path) -> None:
    path = events(tmp_path / "a.jsonl", [{"experts": [5, 2]}])
    told = warned("jsonl", [path], tmp_path / "o.moe")
    assert any("taken to be 6" in message and "--num-experts" in message for message in told)


def test_what_only_the_user_knows_is_asked_for_by_its_option(tmp_path: Path) -> None:
    raw = tmp_path / "a.bin"
    raw.write_bytes(np.arange(24, dtype="<i4").tobytes())
    with pytest.raises(ImportIncomplete) as caught:
        moescope.import_trace("sglang-returned", [raw], tmp_path / "o.moe", top_k=2)
    assert "--num-layers" in caught.value.hint
    counts = tmp_path / "c.csv"
    counts.write_text("layer_id,expert_id,count\n0,1,2\n")
    with pytest.raises(ImportIncomplete) as caught:
        moescope.import_trace("sglang-csv", [counts], tmp_path / "o.moe")
    assert "--top-k" in caught.value.hint
    with pytest.raises(ImportIncomplete) as caught:
        moescope.import_trace("jsonl", [_written(tmp_path / "b.jsonl", '{"routes": [1]}')], tmp_path / "o.moe")
    assert "--field expert=NAME" in caught.value.hint


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_raw_bytes_of_the_wrong_length_are_refused(tmp_path: Path) -> None:
    raw = tmp_path / "a.bin"
    raw.write_bytes(np.arange(23, dtype="<i4").tobytes())
    with pytest.raises(ImportMalformed, match="not a multiple of 4 bytes x 2 layers x 2 choices"):
        moescope.import_trace("sglang-returned", [raw], tmp_path / "o.moe", top_k=2, num_layers=2)


def _answer(path: Path, ids: np.ndarray, prompt: int, completion: int) -> Path:
    encoded = base64.b64encode(ids.astype("<i4").tobytes()).decode()
    meta = {"routed_experts": encoded, "prompt_tokens": prompt, "completion_tokens": completion}
    return _written(path, json.dumps({"meta_info": meta}))


def test_an_answer_has_a_row_less_than_tokens(tmp_path: Path) -> None:
    ids = np.stack([choices(np.random.default_rng(0), 5, 8, 2)], axis=1)
    options = {"num_layers": 1, "top_k": 2, "num_experts": 8}
    assert not any(
        "answers" in m
        for m in warned("sglang-returned", [_answer(tmp_path / "a.json", ids, 4, 2)], tmp_path / "a.moe", **options)
    )
    more = warned("sglang-returned", [_answer(tmp_path / "b.json", ids, 3, 2)], tmp_path / "b.moe", **options)
    assert "1 answers have a row for their last token as well" in more
    fewer = warned("sglang-returned", [_answer(tmp_path / "c.json", ids, 8, 2)], tmp_path / "c.moe", **options)
    assert "1 answers lack rows of their first tokens" in fewer
    (part,) = moescope.open_trace(tmp_path / "c.moe").iter_parts()
    assert part.phase.tolist() == [0, 0, 0, 0, 1]  # rows count back from the last token read
    with pytest.raises(ImportMalformed, match="has 5 rows for 4 tokens, expected 3"):
        moescope.import_trace(
            "sglang-returned", [_answer(tmp_path / "d.json", ids, 3, 1)], tmp_path / "d.moe", **options
        )


def test_zeros_are_dense_layers_or_tokens_not_recorded_only_where_programs_write_them_so(tmp_path: Path) -> None:
    ids = np.zeros((5, 3, 2), int)
    ids[:4, 1], ids[:4, 2] = choices(np.random.default_rng(0), 4, 8, 2), choices(np.random.default_rng(1), 4, 8, 2)
    options = {"num_layers": 3, "top_k": 2, "num_experts": 8}
    told = warned("sglang-returned", [_answer(tmp_path / "a.json", ids, 4, 2)], tmp_path / "a.moe", **options)
    assert any(message.startswith("layers 0 are zero everywhere") for message in told)
    assert "1 tokens are zero in every layer: their routing was not recorded" in told
    trace = moescope.open_trace(tmp_path / "a.moe")
    assert [layer.layer for layer in trace.layers] == [1, 2]
    (part,) = trace.iter_parts()
    assert part.expert_ids[1][4].tolist() == [NOT_RECORDED, NOT_RECORDED]
    ids[2, 1] = 0
    with pytest.raises(ImportMalformed, match="layer 1: has 1 rows of zeros although other layers"):
        moescope.import_trace(
            "sglang-returned", [_answer(tmp_path / "b.json", ids, 4, 2)], tmp_path / "b.moe", **options
        )
    with pytest.raises(ImportMalformed, match="chooses an expert twice"):
        moescope.from_arrays(tmp_path / "c.moe", np.zeros((1, 3, 2), int), num_experts=4)
    with pytest.raises(ImportMalformed, match="every value is zero or padding"):
        moescope.import_trace(
            "sglang-returned", [_answer(tmp_path / "d.json", np.zeros((5, 3, 2)), 4, 2)], tmp_path / "d.moe", **options
        )


def test_a_top_1_layer_of_zeros_stays_and_is_told_of(tmp_path: Path) -> None:
    ids = np.zeros((2, 6, 1), int)
    ids[1, :, 0] = [0, 1, 2, 3, 0, 1]
    with pytest.warns(UserWarning, match="layer 0: every token goes to expert 0; is it a dense layer"):
        trace = moescope.from_arrays(tmp_path / "a.moe", ids, num_experts=4, ranked=True)
    assert len(trace.layers) == 2


def test_counts_that_are_no_multiple_of_top_k_or_differ_between_layers_are_told_of(tmp_path: Path) -> None:
    path = _written(tmp_path / "a.csv", "layer_id,expert_id,count\n0,0,3\n0,1,4\n1,0,6\n")
    told = warned("sglang-csv", [path], tmp_path / "a.moe", top_k=2, num_experts=4)
    assert any("not a multiple of top-k 2" in message for message in told)
    assert any("layers count different numbers of assignments" in message for message in told)


def test_copies_of_a_pass_by_another_rank_are_left_out(tmp_path: Path) -> None:
    made = sglang_per_token(tmp_path, np.random.default_rng(0))
    copy = tmp_path / "expert_distribution_recorder_1.5_1.pt"
    copy.write_bytes(made.files[0].read_bytes())
    told = warned("sglang", [tmp_path], tmp_path / "o.moe", num_experts=6)
    assert any("copies, by another rank" in message for message in told)
    assert moescope.open_trace(tmp_path / "o.moe").num_tokens == 9


def test_physical_ids_beyond_the_map_are_refused(tmp_path: Path) -> None:
    import torch

    made = sglang_per_token(tmp_path, np.random.default_rng(0))
    content = torch.load(made.files[0], weights_only=True)
    content["records"][0]["topk_ids_of_layer"][1, 2, 0] = 8
    torch.save(content, made.files[0])
    with pytest.raises(ImportMalformed, match="physical expert -1 to 8, expected 0 to 7"):
        moescope.import_trace("sglang", made.files, tmp_path / "o.moe")


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_something_does_not_run_and_is_named(
    protocol: int, zipped: bool, tmp_path: Path
) -> None:
    target = tmp_path / "ran"
    data = pickle.dumps({"records": [_Payload(target)]}, protocol=protocol)
    path = tmp_path / "expert_distribution_recorder_1.pt"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
    else:
        path.write_bytes(data)
    with pytest.raises(ImportMalformed) as caught:
        moescope.import_trace("sglang", [path], tmp_path / "o.moe")
    assert not target.exists()
    assert ("nothing in it was run" in caught.value.problem) if zipped else ("torch.save" in caught.value.problem)
    pickle.loads(data)  # the payload is real
    assert target.exists()


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = json.dumps({"token_idx": 0, "layer": 0, "experts": [0, 1]})
    path.write_text("\ufeff\n\n\n" + row + "\r\n\n  \n" + row.replace("[0, 1]", "[]") + "\n\n")
    with pytest.raises(ImportMalformed, match=r"a\.jsonl, line 7: experts: has 0 experts"):
        moescope.import_trace("jsonl", [path], tmp_path / "o.moe")


def test_a_line_beyond_the_limit_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"[" * (2 << 20))
    with pytest.raises(ImportTooLarge, match="line 1: is longer than 1,048,576 bytes"):
        moescope.import_trace("jsonl", [path], tmp_path / "o.moe")


def test_a_gguf_that_is_no_importance_matrix_or_counts_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes({"general.type": "model"}, {}))
    with pytest.raises(ImportMalformed, match="expected 'imatrix'"):
        moescope.import_trace("imatrix", [path], tmp_path / "o.moe")
    path.write_bytes(gguf_bytes({"general.type": "imatrix"}, {"blk.0.ffn_up.weight.counts": np.ones((1, 1))}))
    with pytest.raises(ImportNotFound, match="no counts of experts"):
        moescope.import_trace("imatrix", [path], tmp_path / "o.moe")
    half = {"blk.0.ffn_up_exps.weight.counts": np.array([[1.5], [2.0]])}
    path.write_bytes(gguf_bytes({"general.type": "imatrix"}, half))
    with pytest.raises(ImportMalformed, match="numbers that are not counts"):
        moescope.import_trace("imatrix", [path], tmp_path / "o.moe")


def test_files_of_different_models_are_refused(tmp_path: Path) -> None:
    made = bigmoeonedge(tmp_path, np.random.default_rng(0))
    other = _written(tmp_path / "b.csv", made.files[0].read_text().replace("n_expert=8", "n_expert=16"))
    with pytest.raises(ImportMalformed, match="says 16 experts; an option or an earlier file says 8"):
        moescope.import_trace("bigmoeonedge", [*made.files, other], tmp_path / "o.moe")


def test_several_files_are_several_domains_unless_one_is_given(tmp_path: Path) -> None:
    paths = [events(tmp_path / name, [{}]) for name in ("law.jsonl", "code.jsonl")]
    warned("jsonl", paths, tmp_path / "a.moe", num_experts=4)
    assert moescope.open_trace(tmp_path / "a.moe").domains == ("law", "code")
    warned("jsonl", paths, tmp_path / "b.moe", num_experts=4, domain="all")
    assert moescope.open_trace(tmp_path / "b.moe").domains == ("all",)


def test_a_finished_trace_is_kept_unless_forced_and_an_unfinished_import_goes_on(tmp_path: Path) -> None:
    path = events(tmp_path / "a.jsonl", [{}])
    out = tmp_path / "o.moe"
    warned("jsonl", [path], out, num_experts=4)
    with pytest.raises(TraceExists):
        moescope.import_trace("jsonl", [path], out, num_experts=4)
    (out / "summary.json").unlink()
    sums = (out / "SHA256SUMS").read_text().splitlines(keepends=True)
    (out / "SHA256SUMS").write_text("".join(line for line in sums if "summary" not in line))
    warned("jsonl", [path], out, num_experts=4)
    assert moescope.open_trace(out).num_tokens == 1
    assert moescope.open_trace(out).verify() == []


@pytest.mark.filterwarnings("default")
def test_the_command_imports_and_tells_what_is_odd_on_stderr(tmp_path: Path) -> None:
    made = jsonl(tmp_path, np.random.default_rng(0))
    out = tmp_path / "o.moe"
    result = CliRunner().invoke(
        main, ["import", "jsonl", str(made.files[0]), "-o", str(out), "--field", "experts=experts"]
    )
    assert (result.exit_code, result.stdout) == (0, "")
    assert "warning: the number of experts is not in the file and was taken to be 8" in result.stderr
    assert result.stderr.endswith("o.moe: 5 tokens of 2 documents in 2 domains, 2 layers\n")
    shown = CliRunner().invoke(main, ["info", str(out), "--format", "json"])
    assert "--num-experts sets it" in json.loads(shown.stdout)["summary"]["warnings"][0]
    wrong = CliRunner().invoke(main, ["import", "nonsense", "x", "-o", str(out)])
    assert wrong.exit_code == 2
    assert "is none of sglang, sglang-csv" in wrong.stderr
    wrong = CliRunner().invoke(main, ["import", "jsonl", "x", "-o", str(out), "--field", "a=b"])
    assert wrong.exit_code == 2
    missing = CliRunner().invoke(main, ["import", "jsonl", str(tmp_path / "x"), "-o", str(tmp_path / "p.moe")])
    assert missing.exit_code == 1
    assert "error[import-not-found]" in missing.stderr


def test_importing_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    made = sglang_per_token(tmp_path, np.random.default_rng(0))
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); sys.modules['torch'] = None; import moescope; "
        f"trace = moescope.import_trace('sglang', [{str(made.files[0])!r}], {str(tmp_path / 'o.moe')!r}); "
        "print(trace.num_tokens)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "9\n"


def test_every_refusal_says_what_to_try_or_what_was_expected(tmp_path: Path) -> None:
    for format in ("sglang", "imatrix", "olmoe", "gpt-oss", "megatron", "moe-policylang", "bigmoeonedge", "parquet"):
        path = _written(tmp_path / "empty", "")
        with pytest.raises(MoescopeError) as caught:
            moescope.import_trace(format, [path], tmp_path / "o.moe")
        assert str(path) in caught.value.subject or "empty" in caught.value.subject


def test_a_parquet_file_that_describes_more_than_memory_is_refused_by_the_probe(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    experts = pa.ListArray.from_arrays(
        pa.array([0, 55_000_000], pa.int32()), pa.repeat(pa.scalar(1, pa.int32()), 55_000_000)
    )
    table = pa.table({"experts": experts, "layer": [0], "token_idx": [0]})
    path = tmp_path / "bomb.parquet"
    pq.write_table(table, path)
    del table, experts
    assert path.stat().st_size < 1_000_000
    with pytest.raises(ImportMalformed, match="cannot be decoded as Parquet within"):
        moescope.import_trace("parquet", [path], tmp_path / "o.moe")
