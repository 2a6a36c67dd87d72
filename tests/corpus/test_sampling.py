import hashlib
import json
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.corpus import Document, open_corpus, sample
from moescope.errors import CorpusEmpty, CorpusError, CorpusMalformed

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
records = st.lists(
    st.tuples(st.sampled_from("ABC"), st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)),
    min_size=1,
    max_size=30,
)


def num_tokens(text):
    return len(text.split())


def write(path, records):
    path.write_text("".join(json.dumps({"text": text, "d": domain}) + "\n" for domain, text in records))
    return open_corpus(path, domain_field="d")


def draw(records, **quotas):
    """The chosen (domain, text, max_tokens), of a corpus that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # domains without text
        corpus = write(Path(folder) / "c.jsonl", records)
        chosen = sample(corpus, num_tokens=num_tokens, **quotas)
        assert all(records[document.number] == (document.domain, document.text) for document in chosen)
        return [(document.domain, document.text, document.max_tokens) for document in chosen]


def slow_draw(records, max_tokens=None, max_documents=None, seed=0):
    """The same by the definition, a document at a time."""
    chosen = []
    for domain in sorted({domain for domain, _ in records}):
        texts = [text for other, text in records if other == domain and text]
        texts.sort(key=lambda text: hashlib.blake2b(f"{seed}\n{text}".encode(), digest_size=8).digest())
        tokens = 0
        for text in texts[:max_documents]:
            if max_tokens is not None and tokens >= max_tokens:
                break
            left = None if max_tokens is None else max_tokens - tokens
            chosen.append((domain, text, left if left is not None and num_tokens(text) > left else None))
            tokens += num_tokens(text)
    return chosen


@settings(deadline=None)
@given(
    records.filter(lambda records: any(text for _, text in records)),
    st.none() | st.integers(1, 40),
    st.none() | st.integers(1, 5),
    st.integers(0, 3),
)
def test_a_sample_is_what_its_definition_says(records, max_tokens, max_documents, seed):
    if max_tokens is None and max_documents is None:
        max_documents = 2
    found = draw(records, max_tokens_per_domain=max_tokens, max_documents_per_domain=max_documents, seed=seed)
    assert found == slow_draw(records, max_tokens, max_documents, seed)


@settings(deadline=None)
@given(records.filter(lambda records: any(text for _, text in records)), st.integers(1, 12), st.randoms())
def test_the_order_of_the_corpus_does_not_matter(records, max_tokens, random):
    shuffled = random.sample(records, len(records))
    assert draw(records, max_tokens_per_domain=max_tokens) == draw(shuffled, max_tokens_per_domain=max_tokens)


@settings(deadline=None)
@given(records.filter(lambda records: any(text for _, text in records)), st.integers(1, 12))
def test_no_domain_gets_more_than_its_quota_and_none_less_than_it_could(records, max_tokens):
    tokens, available = Counter(), Counter()
    for domain, text, cut in draw(records, max_tokens_per_domain=max_tokens):
        tokens[domain] += num_tokens(text) if cut is None else cut
    for domain, text in records:
        available[domain] += num_tokens(text)
    assert tokens == Counter({domain: min(n, max_tokens) for domain, n in available.items()})


@settings(deadline=None)
@given(records.filter(lambda records: any(text for _, text in records)), records, st.integers(1, 5))
def test_documents_that_are_added_displace_only_the_last_ones(records, added, max_documents):
    before = draw(records, max_documents_per_domain=max_documents)
    after = draw(records + added, max_documents_per_domain=max_documents)
    for domain in "ABC":
        kept = [text for other, text, _ in after if other == domain and (domain, text) not in added]
        of_before = [text for other, text, _ in before if other == domain and (domain, text) not in added]
        assert kept == of_before[: len(kept)]


def test_another_seed_draws_another_sample():
    records = [("A", f"text {i}") for i in range(100)]
    samples = [draw(records, max_documents_per_domain=5, seed=seed) for seed in (0, 1, 0)]
    assert samples[0] == samples[2] != samples[1]


def test_a_sample_is_not_the_first_documents():
    records = [("A", f"text {i}") for i in range(1000)]
    numbers = [records.index((domain, text)) for domain, text, _ in draw(records, max_documents_per_domain=100)]
    assert 350 < sum(numbers) / 100 < 650  # 500 expected, 27 its standard error


@pytest.mark.parametrize("spaces", [1, 100, 10_000])
def test_a_guess_of_the_text_needed_that_is_too_low_costs_passes_but_no_tokens(tmp_path, spaces):
    records = [("A", f"{i}" + " " * spaces) for i in range(60)] + [("B", "b " * 500)]
    corpus = write(tmp_path / "c.jsonl", records)
    counted = []
    chosen = sample(corpus, max_tokens_per_domain=40, num_tokens=lambda text: counted.append(text) or num_tokens(text))
    assert [document.domain for document in chosen] == ["A"] * 40 + ["B"]
    assert [document.max_tokens for document in chosen] == [None] * 40 + [40]
    assert sorted(counted) == sorted(document.text for document in chosen)


def test_of_equal_documents_the_first_are_taken(tmp_path):
    corpus = write(tmp_path / "c.jsonl", [("A", "x")] * 1000)
    assert [document.number for document in sample(corpus, max_documents_per_domain=5)] == [0, 1, 2, 3, 4]


def test_tokens_are_not_counted_for_a_quota_of_documents(tmp_path):
    corpus = write(tmp_path / "c.jsonl", [("A", "x"), ("A", "y"), ("A", "z")])
    assert len(list(sample(corpus, max_documents_per_domain=2))) == 2


def test_a_domain_without_text_is_warned_of(tmp_path):
    corpus = write(tmp_path / "c.jsonl", [("A", "x"), ("B", ""), ("B", "")])
    with pytest.warns(UserWarning, match=r"^c\.jsonl: domain 'B' holds no text$"):
        chosen = sample(corpus, max_documents_per_domain=2)
    assert list(chosen) == [Document(0, "A", "x")]


def test_a_corpus_without_text_is_an_error(tmp_path):
    corpus = write(tmp_path / "c.jsonl", [("A", "")])
    with (
        pytest.warns(UserWarning, match="domain 'A' holds no text"),
        pytest.raises(CorpusEmpty, match=r"c\.jsonl: it holds no document with text$"),
    ):
        sample(corpus, max_documents_per_domain=2)


def test_a_sample_tells_whence_and_how_it_was_drawn(tmp_path):
    corpus = write(tmp_path / "c.jsonl", [("A", "x y"), ("B", "z")])
    chosen = sample(corpus, max_tokens_per_domain=1, seed=5, num_tokens=num_tokens)
    assert chosen.description() == corpus.description() | {
        "sample": {"max_tokens_per_domain": 1, "max_documents_per_domain": None, "seed": 5}
    }
    assert chosen.corpus is corpus
    assert list(chosen) == list(chosen) == [Document(0, "A", "x y", max_tokens=1), Document(1, "B", "z")]


def test_malformed_records_are_counted_once_and_strict_reading_stops(tmp_path):
    corpus = write(tmp_path / "c.jsonl", [("A", "x")])
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write("?\n")
    with pytest.warns(UserWarning, match="line 2") as warned:
        chosen = sample(corpus, max_documents_per_domain=1)
    assert (len(warned), chosen.problems.count) == (1, 1)
    with pytest.raises(CorpusMalformed):
        sample(open_corpus(tmp_path / "c.jsonl", domain_field="d", strict=True), max_documents_per_domain=1)


def test_a_corpus_that_changes_while_it_is_read_is_an_error(tmp_path):
    corpus = write(tmp_path / "c.jsonl", [("A", " " * 500 + "x"), ("A", " " * 500 + "y")])

    def count(text):
        write(tmp_path / "c.jsonl", [("A", "x")])
        return 1

    with pytest.raises(CorpusError, match=r"c\.jsonl: it changed while being read$"):
        sample(corpus, max_tokens_per_domain=2, num_tokens=count)


@pytest.mark.parametrize("quotas", [{}, {"max_documents_per_domain": 0}, {"max_tokens_per_domain": -1}])
def test_a_quota_of_at_least_one_must_be_given(tmp_path, quotas):
    corpus = write(tmp_path / "c.jsonl", [("A", "x")])
    with pytest.raises(ValueError, match="expected a quota of tokens or documents of at least 1"):
        sample(corpus, num_tokens=num_tokens, **quotas)


def test_a_quota_of_tokens_needs_something_that_counts_them(tmp_path):
    corpus = write(tmp_path / "c.jsonl", [("A", "x")])
    with pytest.raises(ValueError, match="needs num_tokens"):
        sample(corpus, max_tokens_per_domain=1)
