"""Logs in the shapes that loggers write: header lines, counters that restart, a file a layer, counts, cut answers."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from synthetic import make_part, make_trace

import moescope
from moescope.cli import main
from moescope.errors import ForeignTraceError, ImportMalformed
from moescope.importers.documents import CountedDocument
from moescope.trace import Layer, Trace

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(order of a token|number of experts|no column|answers lack).*:UserWarning"
)


def row(token: int, experts: list[int], layer: int = 0, **others: Any) -> dict[str, Any]:
    return {"token_idx": token, "layer": layer, "topk_ids": experts, "topk_weights": [0.6, 0.4], **others}


def log(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def warnings_of(trace: Trace) -> str:
    return "\n".join((trace.summary or {}).get("warnings", []))


def test_header_lines_of_another_type_say_what_the_model_is(tmp_path: Path) -> None:
    header = {"type": "meta", "model_id": "org/some-moe", "layers_logged": [0], "top_k": 2, "num_experts": 8}
    routes = [row(token, [token, 5], type="route", req_id="r1") for token in range(4)]
    end = {"type": "done", "tokens": 4}
    path = log(tmp_path / "log.jsonl", {"type": "started", "pid": 7}, header, *routes, end)
    with pytest.warns(UserWarning, match="lines of another type than the first of routing were left out"):
        trace = moescope.import_trace("jsonl", path, tmp_path / "t.moe")
    (layer,) = trace.layers
    assert (trace.header.model["name"], layer.num_experts, layer.top_k) == ("org/some-moe", 8, 2)
    assert (trace.num_tokens, trace.num_documents) == (4, 1)


def test_a_counter_that_restarts_is_refused_with_the_flag_that_divides_documents_there(tmp_path: Path) -> None:
    routes = [row(token, [token, 5], layer, req_id="r1") for _ in range(2) for layer in (0, 3) for token in range(3)]
    path = log(tmp_path / "log.jsonl", *routes)
    refused = CliRunner().invoke(main, ["import", "jsonl", str(path), "-o", str(tmp_path / "t.moe")])
    assert refused.exit_code == 1
    assert "--restarts begins one there" in refused.stderr
    trace = moescope.import_trace("jsonl", path, tmp_path / "t.moe", num_experts=8, restarts=True)
    assert (trace.num_documents, trace.num_tokens, len(trace.layers)) == (2, 6, 2)
    assert trace.document_tokens.tolist() == [3, 3]


def test_documents_of_so_many_tokens(tmp_path: Path) -> None:
    path = log(tmp_path / "log.jsonl", *(row(token, [token % 4, 5]) for token in range(10)))
    trace = moescope.import_trace("jsonl", path, tmp_path / "t.moe", num_experts=8, document_tokens=4)
    assert trace.document_tokens.tolist() == [4, 4, 2]
    (part,) = trace.iter_parts()
    assert part.position.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_files_of_a_layer_each_are_one_recording(tmp_path: Path) -> None:
    for layer in (0, 4):
        routes = [row(token, [(token + layer) % 5, 5], layer, doc_id=f"p{n}") for n in range(2) for token in range(6)]
        log(tmp_path / "run" / f"layer{layer}.jsonl", *routes)
    files = sorted((tmp_path / "run").iterdir())
    trace = moescope.import_trace("jsonl", files, tmp_path / "t.moe", num_experts=8)
    assert (trace.num_tokens, trace.num_documents, trace.domains) == (12, 2, ("run",))
    assert [layer.layer for layer in trace.layers] == [0, 4]
    (part,) = trace.iter_parts()
    assert part.expert_ids[4][:, 0].tolist() == [(token + 4) % 5 for token in range(6)] * 2


def test_the_layout_of_flame_moe_has_the_layer_in_the_name_and_a_row_a_token(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "iter_0540"
    folder.mkdir()
    ids = {layer: np.argsort(rng.random((7, 64)), axis=1)[:, :6].astype(np.int16) for layer in (2, 3, 4)}
    for layer, chosen in ids.items():
        scores = np.sort(rng.random((7, 6)).astype(np.float16))[:, ::-1]
        table = {
            "scores": pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), 6),
            "indices": pa.FixedSizeListArray.from_arrays(pa.array(chosen.ravel()), 6),
        }
        pq.write_table(pa.table(table), folder / f"layer_{layer:02d}.parquet")
    with pytest.warns(UserWarning, match="rows were taken to be tokens in order"):
        trace = moescope.import_trace("parquet", folder, tmp_path / "t.moe", num_experts=64, document_tokens=4)
    assert [layer.layer for layer in trace.layers] == [2, 3, 4]
    assert (trace.document_tokens.tolist(), trace.domains, trace.header.weights) == ([4, 3], ("iter_0540",), True)
    (part,) = trace.iter_parts(weights=True)
    for layer, chosen in ids.items():
        np.testing.assert_array_equal(part.expert_ids[layer], chosen)


def test_lists_written_as_text_are_lists(tmp_path: Path) -> None:
    path = log(tmp_path / "log.jsonl", *(row(t, [t, 5]) | {"topk_ids": f"[{t}, 5]"} for t in range(3)))
    (part,) = moescope.import_trace("jsonl", path, tmp_path / "t.moe", num_experts=8).iter_parts()
    assert part.expert_ids[0].tolist() == [[0, 5], [1, 5], [2, 5]]


def test_a_cluster_a_document_is_kept(tmp_path: Path) -> None:
    routes = [row(t, [t, 5], doc_id=n, cluster=f"book {n // 2}") for n in range(4) for t in range(2)]
    (part,) = moescope.import_trace("jsonl", log(tmp_path / "l.jsonl", *routes), tmp_path / "t.moe").iter_parts()
    assert part.cluster is not None
    assert [part.cluster.names[code] for code in part.cluster.codes[::2]] == ["book 0", "book 0", "book 1", "book 1"]


COUNTS = {0: [3, 0, 1, 0], 2: [0, 2, 2, 0]}


@pytest.mark.parametrize("kind", ["rows", "counted", "lists", "chosen", "parquet"])
def test_counts_without_tokens_are_a_trace_of_counts(kind: str, tmp_path: Path) -> None:
    """Rows of llama.cpp's moe-trace, one an assignment; with a column of counts; and a list a layer."""
    path = tmp_path / "moe_trace.csv"
    if kind == "lists":
        log(path, *({"layer": layer, "counts": counts} for layer, counts in COUNTS.items()))
    elif kind == "chosen":
        rows = [
            (layer, expert) for layer, counts in COUNTS.items() for expert, n in enumerate(counts) for _ in range(n)
        ]
        lines = "".join(json.dumps({"layer": layer, "topk_ids": [expert]}) + "\n" for layer, expert in rows)
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        cells = [(layer, expert, n) for layer, counts in COUNTS.items() for expert, n in enumerate(counts)]
        pq.write_table(pa.table(dict(zip(("layer", "expert", "hits"), zip(*cells, strict=True), strict=True))), path)
    else:
        cells = [(layer, expert, n) for layer, counts in COUNTS.items() for expert, n in enumerate(counts) if n]
        lines = ["layer,expert"] + [f"{layer},{expert}" for layer, expert, n in cells for _ in range(n)]
        if kind == "counted":
            lines = ["layer,expert,count"] + [f"{layer},{expert},{n}" for layer, expert, n in cells]
        path.write_text("\n".join(lines), encoding="utf-8")
    fields = {"count": "hits"} if kind == "parquet" else None
    trace = moescope.import_trace("counts", path, tmp_path / "t.moe", num_experts=4, top_k=1, fields=fields)
    assert trace.header.counts_only
    share = moescope.shares(trace).isel(domain=0, choice=0)["share"]
    for layer, counts in COUNTS.items():
        assert share.sel(layer=layer).values.tolist() == [count / 4 for count in counts]


def test_rows_without_a_token_are_refused_with_the_format_that_counts_them(tmp_path: Path) -> None:
    path = tmp_path / "moe_trace.csv"
    path.write_text("layer,expert\n0,1\n0,2\n", encoding="utf-8")
    with pytest.raises(ForeignTraceError) as error:
        moescope.import_trace("csv", path, tmp_path / "t.moe")
    assert "moescope import counts" in str(error.value.hint)


ROUTES = np.random.default_rng(3).integers(0, 4, (9, 2, 1)) + np.array([0])


def answer(kind: str, start: int) -> dict[str, Any]:
    """An answer of 10 tokens whose first rows are left out, as each server says it."""
    rows = np.ascontiguousarray(ROUTES[start:], "<i4")
    raw = base64.b64encode(rows.tobytes()).decode()
    tokens = {"prompt_token_ids": list(range(6)), "domain": "math", "cluster": "c1"}
    choice: dict[str, Any] = {"token_ids": list(range(6, 10))}
    if kind == "sglang":
        choice["sgl_ext"] = {"routed_experts": raw, "routed_experts_start_len": start}
    elif kind == "dynamo":
        wrapped = {"data": raw, "shape": list(rows.shape), "dtype": "int32", "start": start}
        return {"nvext": {"routed_experts": wrapped}, "choices": [choice], **tokens}
    elif kind == "base85":
        data = base64.b85encode(rows.astype(np.uint8).tobytes()).decode()
        shape = [len(rows), 2, 1]
        return {"routed_experts": {"data": data, "shape": shape, "dtype": "uint8"}, "choices": [{}]}
    else:
        choice["routed_experts"] = rows.tolist()
    return {"choices": [choice], **tokens}


@pytest.mark.parametrize("kind", ["sglang", "dynamo", "unsaid"])
def test_answers_whose_first_rows_are_left_out_have_the_right_positions(kind: str, tmp_path: Path) -> None:
    path = log(tmp_path / "answers.jsonl", answer(kind, 0), answer(kind, 4))
    trace = moescope.import_trace("sglang-returned", path, tmp_path / "t.moe", num_experts=4, top_k=1, num_layers=2)
    (part,) = trace.iter_parts()
    assert part.position.tolist() == [*range(9), *range(4, 9)]
    assert part.token_id.tolist() == [*range(9), *range(4, 9)]
    for layer in (0, 1):
        np.testing.assert_array_equal(part.expert_ids[layer], np.concatenate([ROUTES, ROUTES[4:]])[:, layer])
    assert trace.domains == ("math",)
    assert part.cluster is not None
    assert trace.verify() == []
    whole = moescope.import_trace(
        "sglang-returned", log(tmp_path / "w.jsonl", answer(kind, 0), answer(kind, 0)), tmp_path / "w.moe",
        num_experts=4, top_k=1, num_layers=2,
    )  # fmt: skip
    agreement = moescope.compare(trace, whole)
    assert agreement.matching.tokens == 14
    assert float(agreement.agreement["agreement"].min()) == 1


def test_rows_beyond_the_answer_are_refused(tmp_path: Path) -> None:
    one = answer("sglang", 4)
    one["choices"][0]["sgl_ext"]["routed_experts_start_len"] = 6
    with pytest.raises(ImportMalformed, match="5 rows from token 6 on for 10 tokens"):
        moescope.import_trace(
            "sglang-returned", log(tmp_path / "a.jsonl", one), tmp_path / "t.moe", num_layers=2, top_k=1
        )


def test_base85_of_dynamos_first_versions_is_read(tmp_path: Path) -> None:
    path = log(tmp_path / "a.jsonl", answer("base85", 0))
    (part,) = moescope.import_trace("vllm", path, tmp_path / "t.moe", num_experts=4).iter_parts()
    np.testing.assert_array_equal(part.expert_ids[1][:, 0], ROUTES[:, 1, 0])


def test_what_many_layers_have_in_common_is_one_warning(tmp_path: Path) -> None:
    routes = [row(t, [t % 4, 5], layer, doc_id=0) for layer in range(26) for t in range(6) if layer < 24 or t % 2]
    with pytest.warns(UserWarning, match="not recorded"):
        trace = moescope.import_trace("jsonl", log(tmp_path / "l.jsonl", *routes), tmp_path / "t.moe", num_experts=8)
    assert [line for line in warnings_of(trace).splitlines() if "not recorded" in line] == [
        "layers 24-25: 3 of 6 tokens were not recorded; no measure counts them"
    ]


def test_counted_documents_say_where_they_come_from(tmp_path: Path) -> None:
    path = log(tmp_path / "l.jsonl", *({"layer": 0, "counts": [1, 2], "doc_id": n, "domain": "a"} for n in range(3)))
    trace = moescope.import_trace("counts", path, tmp_path / "t.moe", top_k=1)
    assert (trace.num_documents, trace.domains) == (3, ("a",))
    assert CountedDocument.__doc__
    again = log(tmp_path / "m.jsonl", *[{"layer": 0, "counts": [1, 2]}] * 2)
    with pytest.raises(ImportMalformed, match="counts layer 0 of a document again"):
        moescope.import_trace("counts", again, tmp_path / "u.moe", top_k=1)


def test_a_servers_answers_match_a_recording_of_the_same_corpus_token_for_token(tmp_path: Path) -> None:
    """Answers made of what a recording chose, with a row for the BOS that was fed, and an answer token."""
    rng = np.random.default_rng(0)
    layers = (Layer(0, 8, 2), Layer(1, 8, 2))
    part = make_part(rng, layers, [30, 7, 41], window=64, domains=("code", "prose"))
    ours = make_trace(tmp_path / "ours.moe", [part], layers)
    answers = []
    for number in range(3):
        rows = part.rows(part.document == number)
        routes = np.stack([rows.expert_ids[layer] for layer in (0, 1)], axis=1)
        fed = np.concatenate([[[[0, 1], [2, 3]]], routes]).tolist()
        choice = {"routed_experts": fed, "token_ids": [7]}
        tokens = [49, *rows.token_id.tolist()]
        answers.append({"choices": [choice], "prompt_token_ids": tokens, "domain": ("code", "prose")[number % 2]})
    path = log(tmp_path / "answers.jsonl", *answers)
    theirs = moescope.import_trace("vllm", path, tmp_path / "t.moe", num_experts=8, bos=49)
    compared = moescope.compare(theirs, ours)
    assert (compared.matching.tokens, theirs.num_tokens, ours.num_tokens) == (78, 78, 78)
    assert float(compared.agreement["agreement"].sel(kind="set").min()) == 1
    silent = log(tmp_path / "s.jsonl", {"choices": [{"routed_experts": fed}]})
    with pytest.raises(ForeignTraceError, match="has no token ids, so --bos cannot find the first one"):
        moescope.import_trace("vllm", silent, tmp_path / "s.moe", num_experts=8, bos=49)
    with_bos = moescope.import_trace("vllm", path, tmp_path / "b.moe", num_experts=8)
    assert (with_bos.num_tokens, moescope.compare(with_bos, ours).matching.tokens) == (81, 0)


def test_rows_of_counts_that_differ_in_kind_are_refused(tmp_path: Path) -> None:
    path = log(tmp_path / "l.jsonl", {"layer": 0, "counts": [1, 2]}, {"layer": 1, "expert": 0, "counts": 3})
    with pytest.raises(ImportMalformed, match="a list in some rows and a number in others"):
        moescope.import_trace("counts", path, tmp_path / "t.moe", top_k=1)


def test_lines_without_routing_are_refused_by_what_the_first_lacks(tmp_path: Path) -> None:
    path = log(tmp_path / "l.jsonl", *[{"type": "started", "layer": 0}] * 3)
    with pytest.raises(ForeignTraceError, match=r"line 1: has no column for expert"):
        moescope.import_trace("jsonl", path, tmp_path / "t.moe")
