"""The sample corpus: what a first user's figures rest on."""

import hashlib
import json
import re
from collections import Counter

import pytest
import zstandard

from moescope.mini import corpus_path, model_path

DOMAINS = {
    "Biomedical",
    "DM Mathematics",
    "Gutenberg",
    "LaTeX",
    "Metamath",
    "Multiple choice",
    "Python",
    "SQLite docs",
    "Speeches",
    "Wikipedia (en)",
}


@pytest.fixture(scope="module")
def lines():
    packed = corpus_path().read_bytes()
    text = zstandard.ZstdDecompressor().decompressobj().decompress(packed).decode("utf-8", errors="strict")
    assert text.endswith("\n")
    return text.removesuffix("\n").split("\n")


@pytest.fixture(scope="module")
def documents(lines):
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def sources():
    return (corpus_path().parent / "SOURCES.md").read_text(encoding="utf-8")


def test_every_line_is_a_document_in_the_piles_format(documents):
    for document in documents:
        assert document.keys() == {"text", "meta"}
        assert document["meta"].keys() == {"pile_set_name", "source", "name"}
        assert document["text"].strip()
        assert "\ufffd" not in document["text"]


def test_there_are_ten_domains_of_at_least_forty_documents(documents):
    counted = Counter(document["meta"]["pile_set_name"] for document in documents)
    assert counted.keys() == DOMAINS
    assert min(counted.values()) >= 40


def test_each_domain_has_about_forty_thousand_tokens(documents):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    tokens = Counter()
    encoded = tokenizer.encode_batch([document["text"] for document in documents])
    for document, ids in zip(documents, encoded, strict=True):
        tokens[document["meta"]["pile_set_name"]] += len(ids)
    assert all(39_000 <= count <= 42_000 for count in tokens.values()), tokens


def test_the_tokenizer_gives_every_document_back(documents):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    for document in documents:
        ids = tokenizer.encode(document["text"]).ids
        assert ids[0] == tokenizer.token_to_id("<|bos|>")
        assert tokenizer.decode(ids, skip_special_tokens=True) == document["text"]


def test_no_document_fills_the_models_context(documents):
    assert max(len(document["text"]) for document in documents) <= 2_600


def test_no_text_occurs_twice(documents):
    hashes = {hashlib.sha256(document["text"].encode("utf-8")).digest() for document in documents}
    assert len(hashes) == len(documents)


def test_the_first_documents_are_of_the_kinds_that_mixtrals_figure_8_shows(documents):
    mathematics, choice, python = (document["text"] for document in documents[:3])
    assert re.match(r"Question: .*\nAnswer: \S", mathematics)
    assert re.match(r"Question: .*\n\(A\) .*\n\(B\) .*\n\(C\) .*\n\(D\) .*\nAnswer: \([A-D]\) ", choice)
    assert python.startswith("class ")
    assert "\n        self." in python


def test_the_right_answer_of_every_question_is_among_its_options(documents):
    asked = 0
    for document in documents:
        if document["meta"]["pile_set_name"] == "Multiple choice":
            for question in document["text"].split("\n\nQuestion: "):
                *_, options, answer = re.split(r"\n(?=\(A\) |Answer: )", question)
                assert answer.removeprefix("Answer: ") in options.split("\n")
                asked += 1
    assert asked > 200


def test_the_table_of_sources_counts_the_documents_that_are_there(documents, sources):
    written = dict(re.findall(r"^\| ([A-Z][^|]*?) \| (\d+) \|", sources, re.MULTILINE))
    counted = Counter(document["meta"]["pile_set_name"] for document in documents)
    assert {domain: int(count) for domain, count in written.items()} == counted
    assert f"{len(documents)} documents" in sources


def test_each_package_that_a_document_names_is_in_the_table_of_sources(documents, sources):
    for source in {document["meta"]["source"] for document in documents} - {"python-stdlib"}:
        assert f"`{source}`" in sources


def test_each_licence_that_the_table_names_lies_beside_it_and_no_other(sources):
    folder = corpus_path().parent
    named = set(re.findall(r"\((licenses/[^)]+)\)", sources))
    assert named == {f"licenses/{path.name}" for path in (folder / "licenses").iterdir()}
