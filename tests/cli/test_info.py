import json

import numpy as np
import pytest
from click.testing import CliRunner
from synthetic import VOCABULARY, make_part

from moescope.cli import main
from moescope.trace import Header, Layer, TraceWriter

LAYERS = (*(Layer(i, 8, 2) for i in (0, 1, 2)), Layer(5, 8, 2), Layer(6, 64, 6, num_shared_experts=2, ranked=False))


@pytest.fixture
def trace(tmp_path):
    """3 documents, of 5, 3 and 2 tokens, in a domain each."""
    corpus = {"name": "val.jsonl", "fingerprint": "0123456789abcdef", "sample": {"seed": 7}}
    header = Header(LAYERS, model={"name": "mini\x1b[31m"}, corpus=corpus)
    with TraceWriter(tmp_path / "a.moe", header, VOCABULARY) as writer:
        domains = ("ArXiv", "维基", "Git\x07hub")
        writer.write(make_part(np.random.default_rng(0), LAYERS, [5, 3, 2], domains=domains), {})
        writer.finish({"malformed": 4})
    return tmp_path / "a.moe"


def test_info_tells_what_a_trace_holds_and_hides_no_control_character(trace):
    result = CliRunner().invoke(main, ["info", str(trace)])
    assert (result.exit_code, result.stderr) == (0, "")
    head, table = result.stdout.split("\n\n")
    first, *facts = head.splitlines()
    assert first.startswith("trace         a.moe (complete, 1 part, 0.0 MB, ")
    assert facts == [
        "tokens        10 of 3 documents in 3 domains",
        "layers        0, 1, 2, 5: top-2 of 8 experts; 6: top-6 of 64 experts (2 shared, not ranked)",
        "gate weights  not recorded",
        "model         name mini␛[31m",
        "corpus        name val.jsonl, fingerprint 0123456789ab",
        "sample        seed 7",
        "summary       malformed 4",
    ]
    assert table.splitlines() == [
        "domain   documents  tokens",
        "ArXiv            1       5",
        "维基             1       3",
        "Git␇hub          1       2",
    ]


def test_info_as_json_holds_the_whole_header(trace):
    contents = json.loads(CliRunner().invoke(main, ["info", str(trace), "--format", "json"]).stdout)
    assert contents["domains"]["Git\x07hub"] == {"documents": 1, "tokens": 2}
    assert (contents["documents"], contents["tokens"], contents["assignments"]) == (3, 10, 10 * (4 * 2 + 6))
    assert contents["bytes"] == sum(file.stat().st_size for file in trace.rglob("*") if file.is_file())
    assert [layer["layer"] for layer in contents["layers"]] == [0, 1, 2, 5, 6]
    assert contents["corpus"]["fingerprint"] == "0123456789abcdef"
    assert contents["complete"] is True


def test_info_of_an_unfinished_trace_says_so(tmp_path):
    with TraceWriter(tmp_path / "a.moe", Header(LAYERS), VOCABULARY) as writer:
        writer.write(make_part(np.random.default_rng(0), LAYERS, [5]), {})
    result = CliRunner().invoke(main, ["info", str(tmp_path / "a.moe")])
    assert "a.moe (unfinished, 1 part" in result.stdout


def test_info_of_what_is_no_trace_is_an_error(tmp_path):
    result = CliRunner().invoke(main, ["info", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error[trace-not-found]: ")


def test_verify_of_a_sound_trace_is_one_line(trace):
    result = CliRunner().invoke(main, ["verify", str(trace)])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{trace}: sound, complete; 10 tokens in 1 part\n"


def test_verify_names_every_damaged_file_and_fails(trace):
    part, summary = trace / "parts" / "000000.parquet", trace / "summary.json"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    summary.write_bytes(b"{" + summary.read_bytes())
    result = CliRunner().invoke(main, ["verify", str(trace)])
    assert (result.exit_code, result.stdout) == (1, "")
    found = sorted(line.split(": ")[2].split(" fails")[0] for line in result.stderr.splitlines())
    assert found == ["parts/000000.parquet", "summary.json"]


def test_verify_of_what_is_no_trace_is_an_error(tmp_path):
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "none.moe")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error[trace-not-found]: ")
