"""What a program wrote comes out of the trace, value for value."""

from __future__ import annotations

import gzip
import warnings
from pathlib import Path

import numpy as np
import pytest
import zstandard
from foreign import WRITERS, Foreign, jsonl

import moescope
from moescope.importers import FORMATS
from moescope.trace import Trace


def imported(made: Foreign, out: Path, **more: object) -> Trace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return moescope.import_trace(made.format, made.files, out, **(made.options | more))


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_file_of_another_program_round_trips(writer, seed: int, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    made = writer(folder, np.random.default_rng(seed))
    trace = imported(made, tmp_path / "out.moe")
    assert trace.complete
    assert trace.verify() == []
    assert trace.header.run["importer"] == made.format
    assert len(trace.header.corpus["fingerprint"]) == 64
    assert not list(tmp_path.glob(".*")), "a folder of the import was left behind"
    if made.counts:
        found = {}
        for counts in trace.iter_counts():
            rows = zip(counts.document, counts.layer, counts.expert, counts.count, strict=True)
            found |= {(int(d), int(a), int(e)): int(n) for d, a, e, n in rows}
        assert found == made.counts
        assert [
            counts.domain_names[counts.domain[s]]
            for counts in trace.iter_counts()
            for s in counts.document_starts()[:-1]
        ] == made.domains
        return
    (part,) = trace.iter_parts(weights=trace.header.weights)
    assert sorted(part.expert_ids) == sorted(made.ids)
    for layer, expected in made.ids.items():
        found = part.expert_ids[layer].astype(np.int64)
        assert found.tolist() == expected.tolist(), f"layer {layer}"
        declared = next(a for a in trace.layers if a.layer == layer)
        assert (declared.drops, declared.partial) == (bool((expected == -1).any()), bool((expected == -2).any()))
    assert trace.header.weights == bool(made.weights)
    for layer, expected in made.weights.items():
        np.testing.assert_array_equal(part.gate_weights[layer], expected)
    assert trace.header.token_ids == (made.token_ids is not None)
    if made.token_ids is not None:
        assert part.token_id.tolist() == made.token_ids.tolist()
    lengths = [np.diff(trace.document(d).sequence_starts()).tolist() for d in range(trace.num_documents)]
    assert lengths == made.sequences
    assert trace.header.phases == (made.phases is not None)
    if made.phases is not None:
        assert part.phase.tolist() == made.phases
    assert [part.domain_names[part.domain[start]] for start in part.document_starts()[:-1]] == made.domains


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_compressed_text_reads_as_the_plain_one(packed: str, tmp_path: Path) -> None:
    made = jsonl(tmp_path, np.random.default_rng(0))
    text = made.files[0].read_bytes()
    made.files = [tmp_path / f"log.jsonl.{packed}"]
    made.files[0].write_bytes(gzip.compress(text) if packed == "gz" else zstandard.compress(text))
    trace = imported(made, tmp_path / "out.moe")
    (part,) = trace.iter_parts()
    assert part.expert_ids[2].tolist() == made.ids[2].tolist()


def test_many_documents_make_many_parts_and_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moescope.importers import events, tokens

    monkeypatch.setattr(tokens, "PART_TOKENS", 50)
    monkeypatch.setattr(events, "BUCKET_EVENTS", 300)
    rng = np.random.default_rng(5)
    expected = {d: rng.integers(0, 7, int(rng.integers(1, 40))) for d in range(40)}
    rows = [(t, d, e) for d, ids in expected.items() for t, e in enumerate(ids)]
    order = np.argsort([t for t, _, _ in rows], kind="stable")  # all documents at once, token by token
    path = tmp_path / "log.csv"
    path.write_text(
        "doc_id,token_idx,layer,expert\n" + "".join(f"{rows[i][1]},{rows[i][0]},0,{rows[i][2]}\n" for i in order)
    )
    with pytest.warns(UserWarning, match="order of a token's choices is unknown"):
        trace = moescope.import_trace("csv", [path], tmp_path / "out.moe", num_experts=7)
    assert len(trace.parts) > 10
    assert trace.verify() == []
    assert trace.num_documents == 40
    for d, ids in expected.items():
        assert trace.document(d).expert_ids[0][:, 0].tolist() == ids.tolist()


def test_arrays_round_trip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((2, 9, 16)), axis=2)[:, :, :3]
    weights = -np.sort(-rng.random((2, 9, 3)).astype(np.float32), axis=2)
    trace = moescope.from_arrays(
        tmp_path / "a.moe",
        ids,
        num_experts=16,
        layers=[1, 4],
        gate_weights=weights,
        token_ids=np.arange(9) * 7,
        documents=[3, 3, 3, 3, 8, 8, 8, 8, 8],
        sequences=[0, 0, 1, 1, 0, 0, 0, 0, 0],
        domains=["a"] * 4 + ["b"] * 5,
        phases=[0, 0, 0, 1, 0, 0, 0, 0, 1],
        model="mine",
    )
    (part,) = trace.iter_parts(weights=True)
    for at, layer in enumerate((1, 4)):
        np.testing.assert_array_equal(part.expert_ids[layer], ids[at])
        np.testing.assert_array_equal(part.gate_weights[layer], weights[at])
    assert part.sequence.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert part.position.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 4]
    assert part.phase.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert (trace.domains, trace.header.model["name"], trace.layers[0].ranked) == (("a", "b"), "mine", True)


def test_arrays_of_wrong_shapes_are_wrong_arguments(tmp_path: Path) -> None:
    ids = np.zeros((1, 4, 1), int)
    for arguments in (
        {"token_ids": [1, 2]},
        {"domains": ["a"]},
        {"documents": [0, 1, 0, 0]},
        {"phases": [0, 1, 2, 3]},
        {"layers": [1, 2]},
        {"gate_weights": np.zeros((1, 4, 2))},
    ):
        with pytest.raises(ValueError, match=r"."):
            moescope.from_arrays(tmp_path / "a.moe", ids, num_experts=2, **arguments)
        assert not (tmp_path / "a.moe").exists()


def test_every_format_has_a_writer_in_the_tests(tmp_path: Path) -> None:
    made = set()
    for writer in WRITERS:
        folder = tmp_path / writer.__name__
        folder.mkdir()
        made.add(writer(folder, np.random.default_rng(0)).format)
    assert made == set(FORMATS)
