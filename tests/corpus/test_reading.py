import gzip
import hashlib
import json
import re
import tempfile
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.corpus import Document, open_corpus

PILE = [
    {"text": "E = mc²", "meta": {"pile_set_name": "ArXiv"}},
    {"text": "", "meta": {"pile_set_name": "Github"}},
    {"text": "a\x00b\r\n", "meta": {"pile_set_name": "ArXiv"}},
]
DOCUMENTS = [Document(0, "ArXiv", "E = mc²"), Document(1, "Github", ""), Document(2, "ArXiv", "a\x00b\r\n")]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def skippable(data):
    return b"\x50\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


def zstd_long(data):
    """As ``zstd --long=30`` writes a stream, which a decompressor at its defaults refuses."""
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(data) + stream.flush()


COMPRESSIONS = {
    "val.jsonl": lambda data: data,
    "val.jsonl.zst": zstandard.compress,
    "val.jsonl.gz": gzip.compress,
    "val.json.gz": gzip.compress,
    "val.ndjson": lambda data: data,
    "no-suffix": lambda data: data,
    "no-suffix-zst": zstandard.compress,
    "zstd-although-not-in-the-name.jsonl": zstandard.compress,
    "two-frames.jsonl.zst": lambda data: zstandard.compress(data[:50]) + zstandard.compress(data[50:]),
    "skippable-frame.jsonl.zst": lambda data: skippable(b"seek") + zstandard.compress(data) + skippable(b"table"),
    "two-members.jsonl.gz": lambda data: gzip.compress(data[:50]) + gzip.compress(data[50:]),
    "long-window.jsonl.zst": zstd_long,
}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_the_pile_is_known_by_its_fields_however_it_is_compressed(tmp_path, name):
    (tmp_path / name).write_bytes(COMPRESSIONS[name](lines(PILE)))
    corpus = open_corpus(tmp_path / name)
    assert (corpus.format, corpus.text_field, corpus.domain_field) == ("pile", "text", "meta.pile_set_name")
    assert list(corpus) == DOCUMENTS
    assert list(corpus) == DOCUMENTS
    assert corpus.problems.count == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.removesuffix(b"\n"),
        lambda data: data + b" \t\r\n\n",
        lambda data: data.replace(b"{", b" { ").replace(b"}", b" } "),
    ],
    ids=["byte order mark", "CRLF", "no last newline", "blank lines at the end", "spaces"],
)
def test_what_json_lines_allow_changes_nothing(tmp_path, change):
    (tmp_path / "val.jsonl").write_bytes(change(lines(PILE)))
    corpus = open_corpus(tmp_path / "val.jsonl", strict=True)
    assert list(corpus) == DOCUMENTS


def test_a_blank_line_counts_as_a_line(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(b"\n" + lines(PILE[:1]) + b"\n" + lines(PILE[1:2]))
    assert [document.number for document in open_corpus(tmp_path / "val.jsonl", strict=True)] == [1, 3]


def test_fields_are_chosen_by_name_or_by_path(tmp_path):
    record = {"content": {"body": "x"}, "meta": {"source": {"name": "web"}}, "a.b": "flat", "label": 3}
    (tmp_path / "c.jsonl").write_bytes(lines([record]))

    def read(text_field, domain_field):
        return list(open_corpus(tmp_path / "c.jsonl", text_field=text_field, domain_field=domain_field, strict=True))

    assert read("content.body", "meta.source.name") == [Document(0, "web", "x")]
    assert read("a.b", "label") == [Document(0, "3", "flat")]


def test_without_a_domain_there_is_one_named_after_the_file_and_a_warning(tmp_path):
    (tmp_path / "my.notes.jsonl.gz").write_bytes(gzip.compress(lines([{"text": "x", "source": {"url": "y"}}])))
    message = (
        "my.notes.jsonl.gz: its first 1000 records have no field 'meta.pile_set_name', so all documents are in one "
        "domain, 'my.notes'; --domain-field selects another field (fields found: text, source.url)"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        corpus = open_corpus(tmp_path / "my.notes.jsonl.gz")
    assert (corpus.format, corpus.domain_field) == ("jsonl", None)
    assert list(corpus) == [Document(0, "my.notes", "x")]


def test_the_first_record_need_not_have_every_field(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(lines([{"id": 1}, *PILE]))
    corpus = open_corpus(tmp_path / "val.jsonl")
    assert corpus.format == "pile"
    with pytest.warns(UserWarning, match="line 1: field 'text' is missing"):
        assert [document.number for document in corpus] == [1, 2, 3]


def test_shards_of_a_folder_are_read_by_name_and_numbered_through(tmp_path):
    (tmp_path / "01.jsonl").write_bytes(lines(PILE[:1]))
    (tmp_path / "00.jsonl.zst").write_bytes(zstandard.compress(lines(PILE[1:]) + b"not JSON\n"))
    (tmp_path / ".hidden.jsonl").write_bytes(b"?")
    (tmp_path / "README.md").write_text("about")
    with pytest.warns(UserWarning, match=r": not read, since the corpus is its JSON lines files: README\.md$"):
        corpus = open_corpus(tmp_path)
    with pytest.warns(UserWarning, match=r"^00\.jsonl\.zst, line 3: not JSON"):
        documents = list(corpus)
    assert documents == [Document(0, "Github", ""), Document(1, "ArXiv", "a\x00b\r\n"), Document(3, "ArXiv", "E = mc²")]
    assert corpus.description()["num_files"] == 2


@pytest.mark.parametrize("name", ["val.parquet", "without-suffix"])
def test_parquet_is_read_with_its_structs(tmp_path, name):
    pq.write_table(pa.Table.from_pylist([{"id": i, **record} for i, record in enumerate(PILE)]), tmp_path / name)
    corpus = open_corpus(tmp_path / name)
    assert (corpus.format, corpus.domain_field) == ("parquet", "meta.pile_set_name")
    assert list(corpus) == list(corpus) == DOCUMENTS


def test_parquet_columns_may_be_large_encoded_flat_and_in_many_batches(tmp_path):
    texts = [str(i) * i for i in range(300)]
    domains = [f"d{i % 7}" for i in range(300)]
    table = pa.table(
        {
            "text": pa.array(texts, pa.large_string()),
            "meta.source": pa.array(domains).dictionary_encode(),
            "vector": pa.array([[1.0, 2.0]] * 300),
        }
    )
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=70)
    corpus = open_corpus(tmp_path / "c.parquet", domain_field="meta.source", strict=True)
    assert list(corpus) == [Document(i, d, t) for i, (d, t) in enumerate(zip(domains, texts, strict=True))]


def test_parquet_shards_are_one_corpus(tmp_path):
    for number, record in enumerate(PILE):
        pq.write_table(pa.Table.from_pylist([record]), tmp_path / f"{number}.parquet")
    assert list(open_corpus(tmp_path)) == DOCUMENTS


def test_in_a_folder_of_text_the_subfolders_are_the_domains(tmp_path):
    root = tmp_path / "notes"
    for name, text in {
        "code/b.py": "b",
        "code/deep/er/a.py": "a",
        "code/.git/config": "hidden",
        ".cache/x": "hidden",
        "code/.x": "hidden",
        "essays/1": "\ufeffone",
        "essays/2.md": "",
        "loose.txt": "\r\nloose\x01",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    corpus = open_corpus(root, strict=True)
    assert corpus.format == "folder"
    assert list(corpus) == [
        Document(0, "code", "b"),
        Document(1, "code", "a"),
        Document(2, "essays", "one"),
        Document(3, "essays", ""),
        Document(4, "notes", "\r\nloose\x01"),
    ]


def test_a_folder_may_be_named_by_a_dot(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert list(open_corpus(".")) == [Document(0, tmp_path.name, "x")]
    monkeypatch.chdir(tmp_path / "b")
    assert open_corpus("..").description()["name"] == tmp_path.name


def test_a_text_file_is_one_document_even_if_it_looks_like_json(tmp_path):
    (tmp_path / "a.b.txt").write_text('{"text": "x"}')
    corpus = open_corpus(tmp_path / "a.b.txt")
    assert corpus.format == "text"
    assert list(corpus) == [Document(0, "a.b", '{"text": "x"}')]


def test_a_document_of_ten_megabytes_is_a_document(tmp_path):
    text = "naïve \U0001f600 " * 1_000_000
    (tmp_path / "big.jsonl.zst").write_bytes(
        zstandard.compress(lines([{"text": text, "meta": {"pile_set_name": "Big"}}, *PILE]))
    )
    assert [document.text for document in open_corpus(tmp_path / "big.jsonl.zst")] == [text, *(r["text"] for r in PILE)]


def test_the_fingerprint_of_a_file_is_its_sha256_whatever_its_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(PILE))
    (tmp_path / "b.jsonl").write_bytes(lines(PILE))
    expected = hashlib.sha256(lines(PILE)).hexdigest()
    assert (
        open_corpus(tmp_path / "a.jsonl").fingerprint() == open_corpus(tmp_path / "b.jsonl").fingerprint() == expected
    )


def test_the_fingerprint_of_a_folder_covers_contents_and_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    (tmp_path / "a" / "y").write_text("2")
    listing = "".join(f"{hashlib.sha256(text).hexdigest()}  a/{name}\n" for name, text in [("x", b"1"), ("y", b"2")])
    assert open_corpus(tmp_path).fingerprint() == hashlib.sha256(listing.encode()).hexdigest()
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "z")
    assert open_corpus(tmp_path).fingerprint() != hashlib.sha256(listing.encode()).hexdigest()


def test_the_description_is_json_and_names_no_folder_above(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(lines(PILE))
    description = open_corpus(tmp_path / "val.jsonl").description()
    assert json.loads(json.dumps(description)) == description
    assert description == {
        "name": "val.jsonl",
        "format": "pile",
        "text_field": "text",
        "domain_field": "meta.pile_set_name",
        "num_files": 1,
        "fingerprint": hashlib.sha256(lines(PILE)).hexdigest(),
        "sample": None,
    }


def test_two_passes_at_the_same_time_do_not_mix_their_documents(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(lines(PILE))
    corpus = open_corpus(tmp_path / "val.jsonl")
    assert list(zip(corpus, corpus, strict=True)) == [(document, document) for document in DOCUMENTS]


texts = st.lists(st.text(), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(texts, st.booleans(), st.sampled_from([lambda data: data, zstandard.compress, gzip.compress]))
def test_json_lines_give_back_any_text(texts, escaped, compress):
    data = "".join(json.dumps({"text": text, "d": "x"}, ensure_ascii=escaped) + "\n" for text in texts).encode()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "c.jsonl").write_bytes(compress(data))
        corpus = open_corpus(Path(folder) / "c.jsonl", domain_field="d", strict=True)
        assert [document.text for document in corpus] == texts


@settings(deadline=None, max_examples=40)
@given(texts)
def test_parquet_gives_back_any_text(texts):
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table({"text": texts, "d": ["x"] * len(texts)}), Path(folder) / "c.parquet")
        corpus = open_corpus(Path(folder) / "c.parquet", domain_field="d", strict=True)
        assert [document.text for document in corpus] == texts


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text().map(lambda text: f"{text.replace(chr(0), '')}a"), min_size=1, max_size=5))
def test_text_files_give_back_any_text_but_for_a_byte_order_mark(texts):
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(texts):
            (Path(folder) / f"{number}").write_bytes(text.encode())
        corpus = open_corpus(folder, strict=True)
        assert [document.text for document in corpus] == [text.removeprefix("\ufeff") for text in texts]


halves = st.text(st.characters(min_codepoint=0xD7F0, max_codepoint=0xE010, categories=["Cs", "Lo", "Co"]), max_size=4)


@settings(deadline=None)
@given(halves)
def test_a_text_is_read_exactly_if_it_can_be_written(text):
    line = json.dumps({"text": text, "d": "x"})
    meant = json.loads(line)["text"]  # two halves that meet are a character
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(folder) / "c.jsonl").write_text('{"text": "", "d": "x"}\n' + line)
        found = [document.text for document in open_corpus(Path(folder) / "c.jsonl", domain_field="d")][1:]
    try:
        meant.encode()
    except UnicodeEncodeError:
        assert found == []
    else:
        assert found == [meant]


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60), st.data())
def test_no_line_breaks_the_reader_and_every_line_is_accounted_for(noise, data):
    line = json.dumps({"text": "aé\U0001f600\\", "d": "x", "n": [1.5, None, {"k": "v"}]}, ensure_ascii=False).encode()
    start = data.draw(st.integers(0, len(line)))
    end = data.draw(st.integers(start, len(line)))
    content = b'{"text": "", "d": "x"}\n' + line[:start] + noise + line[end:]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(folder) / "c.jsonl").write_bytes(content)
        corpus = open_corpus(Path(folder) / "c.jsonl", domain_field="d")
        found = list(corpus)
    for document in found:
        document.text.encode()
    given_lines = content.split(b"\n")
    assert len(found) + corpus.problems.count == sum(bool(line.strip()) for line in given_lines)
    assert all(json.loads(given_lines[document.number].decode())["text"] == document.text for document in found)
