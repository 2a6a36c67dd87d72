"""Corpora in the forms in which people have them: read as a reader of that form reads them, or refused by name."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.corpus import Corpus, Document, open_corpus
from moescope.errors import CorpusChanged, CorpusEmpty, CorpusError, CorpusNotFound, CorpusTooLarge, MoescopeError

RECORDS = [{"text": f'text {n}\n, "{n}"', "source": ("web", "books")[n % 2]} for n in range(5)]


def as_jsonl(records: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def as_json(records: list[dict[str, str]]) -> bytes:
    return json.dumps(records, indent=1).encode()


def as_csv(records: list[dict[str, str]], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["text", "source"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def as_parquet(records: list[dict[str, str]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue()


def as_arrow(records: list[dict[str, str]], *, stream: bool = True) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(records)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


FORMS: dict[str, Callable[[list[dict[str, str]]], bytes]] = {
    "train.jsonl": as_jsonl,
    "train.json": as_json,
    "lines.json": as_jsonl,
    "array.json.gz": lambda records: gzip.compress(as_json(records)),
    "train.csv": as_csv,
    "train.csv.zst": lambda records: zstandard.compress(as_csv(records)),
    "train.tsv": lambda records: as_csv(records, "\t"),
    "train.parquet": as_parquet,
    "data-00000-of-00001.arrow": as_arrow,
    "train.feather": lambda records: as_arrow(records, stream=False),
}


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, **fields: object) -> list[Document]:
    return list(open_corpus(path, domain_field="source", strict=True, **fields))


EXPECTED = [Document(n, record["source"], record["text"]) for n, record in enumerate(RECORDS)]


@pytest.mark.parametrize("name", FORMS)
def test_a_data_file_is_read_alone_in_a_folder_and_in_a_subfolder(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / "corpus" / "train" / name, FORMS[name](RECORDS))
    assert read(file) == EXPECTED
    assert read(file.parent) == EXPECTED
    write(file.parent / "README.md", "# About\n")
    with pytest.warns(UserWarning, match=r"not read, since the corpus is its .* files: (train/)?README.md"):
        assert read(file.parent) == EXPECTED
    with pytest.warns(UserWarning, match="not read"):
        assert read(file.parent.parent) == EXPECTED


def test_what_datasets_saves_is_its_arrow_files(tmp_path: Path) -> None:
    for split in ("test", "train"):
        write(tmp_path / split / "data-00000-of-00001.arrow", as_arrow(RECORDS))
        write(tmp_path / split / "dataset_info.json", json.dumps({"features": {}, "description": "x" * 9999}))
        write(tmp_path / split / "state.json", json.dumps({"_data_files": []}))
    write(tmp_path / "dataset_dict.json", '{"splits": ["train", "test"]}')
    corpus = open_corpus(tmp_path)
    assert (corpus.format, corpus.domain_field) == ("arrow", None)
    assert [document.domain for document in corpus] == ["test"] * 5 + ["train"] * 5
    assert [document.text for document in corpus] == [record["text"] for record in RECORDS] * 2


def test_subfolders_of_shards_are_the_domains_unless_a_field_says_them(tmp_path: Path) -> None:
    for domain in ("arxiv", "c4"):
        write(tmp_path / domain / "0.jsonl.zst", zstandard.compress(as_jsonl(RECORDS[:2])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [document.domain for document in open_corpus(tmp_path)] == ["arxiv", "arxiv", "c4", "c4"]
    assert [document.domain for document in read(tmp_path)] == ["web", "books"] * 2


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.jsonl", as_jsonl(RECORDS))
    return sink.getvalue()


def tarred() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as archive:
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(as_jsonl(RECORDS))
        archive.addfile(info, io.BytesIO(as_jsonl(RECORDS)))
    return sink.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.zip", zipped(), "an archive"),
        ("a.tar.gz", tarred(), "an archive"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00\x00", "an archive, or compressed"),
        ("a.parquet", POINTER, "Git LFS pointer"),
    ],
)
def test_archives_and_pointers_are_refused_by_name(name: str, content: bytes, what: str, tmp_path: Path) -> None:
    file = write(tmp_path / "data" / name, content)
    write(tmp_path / "README.md", "About this corpus.\n" * 9)
    for path, where in ((file, "it is"), (tmp_path, f"data/{name} is")):
        with pytest.raises(CorpusNotFound) as error:
            open_corpus(path)
        assert where in str(error.value)
        assert what in str(error.value)


@pytest.mark.parametrize("content", ['{\n "features": {}\n}', '["a", "b"]', "7"])
def test_a_json_document_that_is_no_data_is_refused_alone_and_text_among_texts(content: str, tmp_path: Path) -> None:
    file = write(tmp_path / "package.json", content)
    with pytest.raises(CorpusNotFound, match="one JSON document"):
        open_corpus(file)
    write(tmp_path / "main.py", "print(1)\n" * 20)
    assert [document.text for document in open_corpus(tmp_path)] == ["print(1)\n" * 20, content]


def test_data_among_much_text_are_left_out_by_name_and_the_end_says_how_much_was_read(tmp_path: Path) -> None:
    write(tmp_path / "code" / "main.py", "print(1)\n" * 200)
    write(tmp_path / "code" / "table.csv", "a,b\n1,2\n")
    write(tmp_path / "code" / "logo.png", b"\x89PNG\r\n\x1a\n\0\0")
    corpus = open_corpus(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [document.text for document in corpus] == ["print(1)\n" * 200]
    assert [str(warning.message) for warning in caught] == [
        "code/logo.png: not UTF-8 (byte 1); left out",
        "code/table.csv: is CSV, and most of the folder is text; give it by itself; left out",
        f"{tmp_path.name}: 1 of 3 files are text and were read",
    ]


def test_a_folder_that_is_mostly_no_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "pictures")
    write(tmp_path / "a.png", b"\x89PNG\0" * 100)
    with pytest.raises(CorpusEmpty, match=r"most of it is not text: of 508 bytes in 2 files 8 are, a.png are not"):
        open_corpus(tmp_path)


def test_nul_bytes_are_no_text(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x" * 5000 + "\0")
    write(tmp_path / "b.txt", "good" * 2000)
    with pytest.warns(UserWarning, match=r"a.txt: holds NUL bytes, so it is not text|1 of 2 files"):
        assert [document.text for document in open_corpus(tmp_path)] == ["good" * 2000]


def test_links_are_followed_once_and_broken_ones_are_told(tmp_path: Path) -> None:
    write(tmp_path / "blobs" / "aa", as_jsonl(RECORDS))
    root = tmp_path / "snapshot"
    root.mkdir()
    (root / "train.jsonl").symlink_to(tmp_path / "blobs" / "aa")
    assert read(root) == EXPECTED
    (root / "again.jsonl").symlink_to(tmp_path / "blobs" / "aa")
    (root / "gone.jsonl").symlink_to(tmp_path / "nothing")
    (root / "up").symlink_to(root)
    with pytest.warns(
        UserWarning, match=r"not read, since they lead nowhere or to what is read: gone.jsonl, train.jsonl, up"
    ):
        assert read(root) == EXPECTED


def test_a_record_is_bounded_and_the_bound_can_be_raised(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.zst", zstandard.compress(as_jsonl([{"text": "x" * 10**6, "source": "web"}])))
    for name in ("a.csv", "a.txt"):
        write(tmp_path / name, as_csv([{"text": "x" * 10**6, "source": "web"}]))
    with pytest.raises(CorpusTooLarge) as error:
        read(path, max_record_bytes=10**5)
    assert "line 1: is longer than 100,000 bytes" in str(error.value)
    assert "--max-record-bytes" in str(error.value.hint)
    assert len(read(path, max_record_bytes=2 * 10**6)) == 1
    with pytest.raises(CorpusTooLarge):
        list(open_corpus(tmp_path / "a.txt", max_record_bytes=10**5))
    with pytest.raises(CorpusError, match="field larger than field limit"):
        read(tmp_path / "a.csv", max_record_bytes=10**5)


def test_a_column_that_nobody_asked_for_may_be_broken(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": ["a", "b"],
            "source": ["web", "web"],
            "seen": pa.array([2**62, 0], pa.timestamp("us")),
            "zone": pa.array([0, 1], pa.timestamp("us", tz="Nowhere/Land")),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    assert [document.text for document in read(tmp_path / "t.parquet")] == ["a", "b"]


def test_a_corpus_that_changes_while_it_is_read_is_told_apart_from_one_that_is_touched(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", as_jsonl(RECORDS))
    corpus = open_corpus(path, domain_field="source")
    corpus.check_unchanged()  # nothing was read yet
    corpus.fingerprint()
    os.utime(path, (1, 1))
    corpus.check_unchanged()
    write(path, as_jsonl(RECORDS[1:]))
    with pytest.raises(CorpusChanged, match=r"a.jsonl was changed while it was read"):
        corpus.check_unchanged()


def test_domains_that_differ_only_in_case_or_spaces_are_told(tmp_path: Path) -> None:
    records = [{"text": "x", "source": source} for source in ("ArXiv", "arxiv", "Ar  Xiv", "ar xiv")]
    corpus = open_corpus(write(tmp_path / "a.jsonl", as_jsonl(records)), domain_field="source")
    with pytest.warns(UserWarning, match="differ only in case or spaces") as caught:
        assert len({document.domain for document in corpus}) == 4
    assert [str(warning.message) for warning in caught] == [
        "a.jsonl: domains 'ArXiv' and 'arxiv' differ only in case or spaces; they are two domains of the trace",
        "a.jsonl: domains 'Ar  Xiv' and 'ar xiv' differ only in case or spaces; they are two domains of the trace",
    ]


CONTENT = st.one_of(
    st.sampled_from([make(RECORDS) for make in FORMS.values()]),
    st.sampled_from([zipped(), tarred(), POINTER, b"", b"words and words\n" * 30, b"\0" * 50, b"[", b"{", b"PAR1"]),
    st.binary(max_size=60),
)
NAMES = st.sampled_from(
    [*FORMS, "README.md", "a/b/train.jsonl", "c/train.csv", "a/x.py", "state.json", "x.zip", "noext"]
)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(NAMES, st.tuples(CONTENT, st.integers(0, 400), st.binary(max_size=3)), min_size=1, max_size=4))
def test_any_folder_is_read_or_refused_in_one_of_our_errors(tmp_path_factory, files) -> None:
    root = tmp_path_factory.mktemp("corpus")
    for name, (content, at, noise) in files.items():
        write(root / name, content[:at] + noise + content[at:] if noise else content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in (root, *(root / name for name in files)):
            try:
                corpus: Corpus = open_corpus(path)
                documents = list(corpus)
            except MoescopeError:
                continue
            assert len({document.number for document in documents}) == len(documents)
            for document in documents:
                document.text.encode()
