import gzip
import json
import os
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from moescope.corpus import Document, open_corpus
from moescope.errors import CorpusEmpty, CorpusError, CorpusField, CorpusMalformed, CorpusNotFound

GOOD = b'{"text": "good", "meta": {"pile_set_name": "ArXiv"}}\n'
EXPECTED = (
    "hint: a corpus is a file of JSON lines (.jsonl, also as .zst or .gz), a JSON array (.json), CSV, Parquet, Arrow "
    "or text (.txt), a folder of such data files, or a folder of text files with one subfolder per domain"
)
BAD_LINES = {
    b'{"text": "x"': "not JSON (expecting ',' delimiter, character 13)",
    b"hello": "not JSON (expecting value, character 1)",
    b'{"text": "a\tb"}': "not JSON (invalid control character at, character 12)",
    b'{"text": "a\x00b"}': "not JSON (invalid control character at, character 12)",
    b'{"text": "x", "score": NaN}': "not JSON (a number that JSON lacks, such as NaN)",
    b'{"text": "x\xff"}': "not UTF-8 (byte 12)",
    b'{"text": "\xed\xa0\x80"}': "not UTF-8 (byte 11)",
    rb'{"text": "\ud800"}': "half of a surrogate pair, which text cannot contain",
    rb'{"text": "x \udc00\ud800 y"}': "half of a surrogate pair, which text cannot contain",
    b'["text"]': "not an object but a list",
    b'"text"': "not an object but a string",
    b"7": "not an object but a number",
    b"null": "not an object but null",
    b"[" * 100_000: "not JSON that can be read (nested too deeply)",
    b'{"meta": {"pile_set_name": "ArXiv"}}': "field 'text' is missing",
    b'{"text": null, "meta": {"pile_set_name": "ArXiv"}}': "field 'text' holds null, not a string",
    b'{"text": 1.5, "meta": {"pile_set_name": "ArXiv"}}': "field 'text' holds a number, not a string",
    b'{"text": ["x"], "meta": {"pile_set_name": "ArXiv"}}': "field 'text' holds a list, not a string",
    b'{"text": {"x": 1}, "meta": {"pile_set_name": "ArXiv"}}': "field 'text' holds an object, not a string",
    b'{"text": "x"}': "field 'meta.pile_set_name' is missing",
    b'{"text": "x", "meta": null}': "field 'meta.pile_set_name' is missing",
    b'{"text": "x", "meta": {"pile_set_name": null}}': (
        "field 'meta.pile_set_name' holds null, not the name of a domain"
    ),
    b'{"text": "x", "meta": {"pile_set_name": ""}}': (
        "field 'meta.pile_set_name' holds an empty string, not the name of a domain"
    ),
}


def told(action):
    """What the action returns, and the warnings it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return result, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES.items(), ids=[line[:40].decode("latin1") for line in BAD_LINES])
def test_a_malformed_line_is_told_with_its_number_and_counted(tmp_path, line, problem):
    (tmp_path / "val.jsonl").write_bytes(GOOD + line + b"\n" + GOOD)
    corpus = open_corpus(tmp_path / "val.jsonl")
    documents, warned = told(lambda: list(corpus))
    assert documents == [Document(0, "ArXiv", "good"), Document(2, "ArXiv", "good")]
    assert warned == [f"val.jsonl, line 2: {problem}; left out"]
    assert (corpus.problems.count, corpus.problems.first) == (1, [f"val.jsonl, line 2: {problem}"])

    with pytest.raises(CorpusMalformed) as raised:
        list(open_corpus(tmp_path / "val.jsonl", strict=True))
    assert raised.value.render() == (
        f"error[corpus-malformed]: val.jsonl, line 2: {problem}\n"
        "hint: without --strict this record is left out and counted"
    )


def test_every_problem_is_counted_in_each_pass_but_only_the_first_are_told_and_only_once(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(GOOD + b"?\n" * 7)
    corpus = open_corpus(tmp_path / "val.jsonl")
    first = [f"val.jsonl, line {line}: not JSON (expecting value, character 1)" for line in (2, 3, 4, 5, 6)]
    expected = [f"{problem}; left out" for problem in first] + ["2 more records could not be read; left out"]
    assert told(lambda: len(list(corpus))) == (1, expected)
    assert told(lambda: len(list(corpus))) == (1, [])
    assert (corpus.problems.count, corpus.problems.first) == (7, first)


@pytest.mark.parametrize(
    ("name", "compress", "reason"),
    [
        ("val.jsonl.zst", zstandard.compress, "the zstd stream is truncated"),
        ("val.jsonl.gz", gzip.compress, "Compressed file ended before the end-of-stream marker was reached"),
    ],
)
def test_a_compressed_file_that_is_cut_short_keeps_its_whole_lines(tmp_path, name, compress, reason):
    lines = [json.dumps({"text": os.urandom(3000).hex(), "meta": {"pile_set_name": "ArXiv"}}) for _ in range(100)]
    whole = compress("\n".join(lines).encode())
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    corpus = open_corpus(tmp_path / name)
    documents, warned = told(lambda: list(corpus))
    assert 20 < len(documents) < 60
    assert [document.text for document in documents] == [json.loads(line)["text"] for line in lines[: len(documents)]]
    problem = f"{name}, line {len(documents) + 1}: the file is damaged from here: {reason}"
    assert warned == [f"{problem}; left out"]
    with pytest.raises(CorpusMalformed) as raised:
        list(open_corpus(tmp_path / name, strict=True))
    assert str(raised.value) == problem


def test_every_cut_of_a_zstd_file_is_noticed(tmp_path):
    whole = zstandard.ZstdCompressor(write_checksum=True).compress(GOOD * 3)
    for length in range(4, len(whole)):
        (tmp_path / "val.jsonl").write_bytes(GOOD)
        (tmp_path / "cut.jsonl.zst").write_bytes(whole[:length])
        with pytest.raises((CorpusEmpty, CorpusMalformed), match="the file is damaged from here"):
            list(open_corpus(tmp_path / "cut.jsonl.zst", strict=True))


def test_damaged_compressed_data_is_told(tmp_path):
    (tmp_path / "val.jsonl.zst").write_bytes(zstandard.compress(GOOD) + b"garbage")
    corpus = open_corpus(tmp_path / "val.jsonl.zst")
    with pytest.warns(UserWarning, match="line 2: the file is damaged from here: zstd decompressor error"):
        assert len(list(corpus)) == 1


def test_a_broken_shard_does_not_stop_the_others(tmp_path):
    (tmp_path / "0.jsonl.zst").write_bytes(zstandard.compress(GOOD)[:-3])
    (tmp_path / "1.jsonl.zst").write_bytes(zstandard.compress(GOOD))
    corpus = open_corpus(tmp_path)
    with pytest.warns(UserWarning, match=r"^0\.jsonl\.zst, line 1: the file is damaged from here"):
        assert list(corpus) == [Document(1, "ArXiv", "good")]


def test_a_text_file_that_is_not_utf_8_is_left_out_never_repaired(tmp_path):
    (tmp_path / "notes" / "code").mkdir(parents=True)
    (tmp_path / "notes" / "code" / "a.txt").write_bytes(b"good")
    (tmp_path / "notes" / "code" / "b.txt").write_bytes("grüße".encode("latin1"))
    corpus = open_corpus(tmp_path / "notes")
    assert told(lambda: list(corpus)) == (
        [Document(0, "code", "good")],
        ["code/b.txt: not UTF-8 (byte 3); left out", "notes: 1 of 2 files are text and were read"],
    )


def test_bad_rows_of_parquet_are_told(tmp_path):
    texts = pa.Array.from_buffers(
        pa.string(), 4, pa.array([b"good", b"\xff\xfe", None, b"also"], pa.binary()).buffers()
    )
    pq.write_table(pa.table({"text": texts, "d": ["a", "a", "a", None]}), tmp_path / "c.parquet")
    corpus = open_corpus(tmp_path / "c.parquet", domain_field="d")
    documents, warned = told(lambda: list(corpus))
    assert documents == [Document(0, "a", "good")]
    assert warned == [
        "c.parquet, row 2: not UTF-8 (byte 1 of its string); left out",
        "c.parquet, row 3: field 'text' holds null, not a string; left out",
        "c.parquet, row 4: field 'd' holds null, not the name of a domain; left out",
    ]


def test_damaged_parquet_is_told_where_it_breaks(tmp_path):
    texts = [os.urandom(500).hex() for _ in range(128)]
    pq.write_table(
        pa.table({"text": texts, "d": ["a"] * 128}), tmp_path / "c.parquet", row_group_size=64, use_dictionary=False
    )
    data = bytearray((tmp_path / "c.parquet").read_bytes())
    column = pq.ParquetFile(tmp_path / "c.parquet").metadata.row_group(1).column(0)
    data[column.data_page_offset : column.data_page_offset + 200] = b"\xff" * 200
    (tmp_path / "c.parquet").write_bytes(data)
    corpus = open_corpus(tmp_path / "c.parquet", domain_field="d")
    with pytest.warns(UserWarning, match=r"^c\.parquet, row 65: the file cannot be read from here: .+; left out$"):
        assert [document.text for document in corpus] == texts[:64]


def rendered(path, error, **fields):
    with pytest.raises(error) as raised:
        open_corpus(path, **fields)
    return raised.value.render()


def test_a_path_that_is_nothing(tmp_path):
    path = tmp_path / "none.jsonl"
    assert rendered(path, CorpusNotFound) == (
        f"error[corpus-not-found]: {path}: there is nothing at this path\n{EXPECTED}"
    )


def test_a_path_that_is_neither_file_nor_folder(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert rendered(path, CorpusNotFound) == (
        f"error[corpus-not-found]: {path}: this is neither a file nor a folder; a corpus is read more than once\n"
        f"{EXPECTED}"
    )


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n", b"plain words", b'["text"', b""])
def test_a_file_of_unknown_format(tmp_path, content):
    path = tmp_path / "data.bin"
    path.write_bytes(content)
    assert rendered(path, CorpusNotFound) == (
        f"error[corpus-not-found]: {path}: its format is unknown (it starts with {content[:12]!r})\n{EXPECTED}"
    )


def test_parquet_in_name_only(tmp_path):
    path = tmp_path / "c.parquet"
    path.write_bytes(b"words")
    assert rendered(path, CorpusNotFound) == (
        f"error[corpus-not-found]: {path}: its name says Parquet, but its first bytes do not (expected PAR1)\n"
        f"{EXPECTED}"
    )


@pytest.mark.parametrize(
    ("files", "what"), [(["trace.json"], "a trace"), (["config.json", "model.safetensors"], "a model checkpoint")]
)
def test_a_folder_that_is_something_else(tmp_path, files, what):
    for name in files:
        (tmp_path / name).write_text("{}")
    assert rendered(tmp_path, CorpusNotFound) == (
        f"error[corpus-not-found]: {tmp_path}: this is {what}, not a corpus\n{EXPECTED}"
    )


def test_a_folder_of_two_formats(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    assert rendered(tmp_path, CorpusNotFound) == (
        f"error[corpus-not-found]: {tmp_path}: it holds both JSON lines (a.jsonl) and Parquet (b.parquet)\n"
        "hint: give one of the files, or split them"
    )


def test_a_folder_of_shards_and_folders(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(GOOD)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "00.jsonl").write_bytes(GOOD)
    assert rendered(tmp_path, CorpusNotFound) == (
        f"error[corpus-not-found]: {tmp_path}: it holds both shards (val.jsonl) and folders (train) of them, so the "
        "corpus is ambiguous\nhint: give one of the two"
    )


def test_an_empty_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / ".hidden").write_text("x")
    assert rendered(tmp_path, CorpusEmpty) == f"error[corpus-empty]: {tmp_path}: the folder holds no files\n{EXPECTED}"


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_a_record(tmp_path, content):
    (tmp_path / "c.jsonl").write_bytes(content)
    assert rendered(tmp_path / "c.jsonl", CorpusEmpty) == f"error[corpus-empty]: {tmp_path}/c.jsonl: it holds no record"


def test_a_file_of_which_no_record_can_be_read(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b"?\n" * 2000)
    assert rendered(tmp_path / "c.jsonl", CorpusEmpty) == (
        f"error[corpus-empty]: {tmp_path}/c.jsonl: none of its first 1000 records can be read; c.jsonl, line 1: not "
        "JSON (expecting value, character 1)"
    )


def test_a_text_field_that_no_record_has(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b'{"body": "x", "meta": {"id": 1, "url": null}}\n')
    assert rendered(tmp_path / "c.jsonl", CorpusField) == (
        f"error[corpus-field]: {tmp_path}/c.jsonl: its first 1000 records have no field 'text' for the text\n"
        "hint: --text-field; fields found: body, meta.id, meta.url"
    )


def test_a_domain_field_that_no_record_has(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(GOOD)
    assert rendered(tmp_path / "c.jsonl", CorpusField, domain_field="meta.set") == (
        f"error[corpus-field]: {tmp_path}/c.jsonl: its first 1000 records have no field 'meta.set' for the domain\n"
        "hint: --domain-field; fields found: text, meta.pile_set_name"
    )


def test_a_parquet_column_that_is_not_there(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "c.parquet")
    assert rendered(tmp_path / "c.parquet", CorpusField) == (
        f"error[corpus-field]: {tmp_path}/c.parquet: its first 1000 records have no field 'text' for the text\n"
        "hint: --text-field; fields found: body, n"
    )


def test_text_files_have_no_fields(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert rendered(tmp_path / "a.txt", CorpusField, domain_field="meta") == (
        f"error[corpus-field]: {tmp_path}/a.txt: its documents are text files, which have no field 'meta'\n"
        "hint: the domain of a text file is the subfolder it is in"
    )


def test_a_file_name_that_is_not_utf_8_becomes_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"d\xff")
    folder.mkdir()
    (folder / "x").write_bytes(b"good")
    (document,) = open_corpus(tmp_path)
    assert document == Document(0, "d\ufffd", "good")


def test_every_error_of_a_corpus_is_one_of_ours():
    for error in (CorpusEmpty, CorpusField, CorpusMalformed, CorpusNotFound):
        assert issubclass(error, CorpusError)
