"""A part of a corpus: in each domain the documents with the smallest hashes, up to a quota of tokens or documents.

The hash of a document depends on the seed and its text alone, BLAKE2b of ``<seed>\\n<text>`` in UTF-8, 8 bytes. The
sample therefore does not depend on the order of the corpus, and a document that is added or removed displaces only
those at the end of its own domain. Equal texts have equal hashes and are adjacent.
"""

from __future__ import annotations

import hashlib
import warnings
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moescope.corpus.corpora import Corpus
from moescope.corpus.documents import Document
from moescope.corpus.problems import Problems
from moescope.errors import CorpusEmpty, CorpusError

SAMPLE_SEED = 0

BYTES_PER_TOKEN = 6
"""First guess of the text that a quota of tokens needs; on the high side, as too low a guess costs another pass."""


@dataclass(frozen=True)
class Sample:
    """Selected documents, ordered by domain and hash; iterated like the corpus they come from.

    Attributes:
        corpus: The corpus they come from.
        documents: The documents; the last one of a domain may have ``max_tokens``.
        max_tokens_per_domain: The quota of tokens, or None.
        max_documents_per_domain: The quota of documents, or None.
        seed: The prefix of the hashed text.
    """

    corpus: Corpus
    documents: tuple[Document, ...] = field(repr=False)
    max_tokens_per_domain: int | None
    max_documents_per_domain: int | None
    seed: int

    def __iter__(self) -> Iterator[Document]:
        """Iterate over the documents."""
        return iter(self.documents)

    @property
    def problems(self) -> Problems:
        """The records of the corpus that were left out."""
        return self.corpus.problems

    def description(self) -> dict[str, Any]:
        """What identifies the sample in a trace."""
        parameters = {
            "max_tokens_per_domain": self.max_tokens_per_domain,
            "max_documents_per_domain": self.max_documents_per_domain,
            "seed": self.seed,
        }
        return {**self.corpus.description(), "sample": parameters}


def sample(
    corpus: Corpus,
    *,
    max_tokens_per_domain: int | None = None,
    max_documents_per_domain: int | None = None,
    seed: int = SAMPLE_SEED,
    num_tokens: Callable[[str], int] | None = None,
) -> Sample:
    """Select documents of each domain, by hash, until a quota is reached.

    The corpus is read twice, and once more whenever the text held so far did not suffice. Memory: the first pass keeps
    24 bytes per document (50 while they are sorted); the second keeps the text of the candidates, in each domain
    6 bytes per token of the quota, or twice what the quota needs if that is more, and one document.

    Args:
        corpus: The corpus.
        max_tokens_per_domain: Tokens of each domain; the last document is cut there (its ``max_tokens``).
        max_documents_per_domain: Documents of each domain; those without text do not count and are left out.
        seed: Another seed draws another sample.
        num_tokens: Counts the tokens of a text, for a quota of tokens; called once per selected document.
    Raises:
        ValueError: No quota, one below 1, or a quota of tokens without ``num_tokens``.
        CorpusEmpty: The corpus holds no document with text.
        CorpusError: The corpus changed between two passes.
        CorpusMalformed: A record cannot be read and the corpus is read strictly.
    """
    quotas = [quota for quota in (max_tokens_per_domain, max_documents_per_domain) if quota is not None]
    if not quotas or min(quotas) < 1:
        raise ValueError(f"expected a quota of tokens or documents of at least 1, found {quotas or None}")
    if max_tokens_per_domain is not None and num_tokens is None:
        raise ValueError("a quota of tokens needs num_tokens to count them")

    draws = _hashed(corpus, seed, max_tokens_per_domain, max_documents_per_domain)
    if not any(len(draw.numbers) for draw in draws):
        raise CorpusEmpty(corpus.path, "it holds no document with text")
    while missing := {number for draw in draws for number in draw.candidates()}:
        texts = {document.number: document.text for document in corpus if document.number in missing}
        if len(texts) < len(missing):
            raise CorpusError(corpus.path, "it changed while being read")
        for draw in draws:
            draw.take(texts, num_tokens)
    documents = tuple(document for draw in draws for document in draw.documents)
    return Sample(corpus, documents, max_tokens_per_domain, max_documents_per_domain, seed)


@dataclass
class _Draw:
    """The documents of one domain in hash order, and how many of them, from the first, have been taken."""

    domain: str
    numbers: np.ndarray[Any, np.dtype[np.uint64]]
    ends: np.ndarray[Any, np.dtype[np.int64]]  # bytes of text up to the end of each document
    max_tokens: int | None
    max_documents: int | None
    documents: list[Document] = field(default_factory=list)
    tokens: int = 0  # of the documents, up to the quota

    def candidates(self) -> list[int]:
        """The numbers of the documents that may fill the quota; none if it is full or no document is left."""
        taken = len(self.documents)
        stop = len(self.numbers) if self.max_documents is None else self.max_documents
        if self.max_tokens is not None:
            if self.tokens >= self.max_tokens:
                return []
            text_bytes = max(self.max_tokens * BYTES_PER_TOKEN, 2 * int(self.ends[taken - 1]) if taken else 0)
            stop = min(stop, int(np.searchsorted(self.ends, text_bytes)) + 1)
        return self.numbers[taken:stop].tolist()

    def take(self, texts: dict[int, str], num_tokens: Callable[[str], int] | None) -> None:
        """Move candidates from ``texts`` to the documents until the quota is full."""
        for number in self.candidates():
            document = Document(number, self.domain, texts.pop(number))
            if self.max_tokens is not None and num_tokens is not None:
                tokens, left = num_tokens(document.text), self.max_tokens - self.tokens
                self.tokens += min(tokens, left)
                document = replace(document, max_tokens=left if tokens > left else None)
            self.documents.append(document)
            if self.tokens == self.max_tokens:
                return


def _hashed(corpus: Corpus, seed: int, max_tokens: int | None, max_documents: int | None) -> list[_Draw]:
    """Read the corpus once, and order the documents of each domain by hash, the domains by name."""
    start = hashlib.blake2b(f"{seed}\n".encode(), digest_size=8)
    columns: defaultdict[str, tuple[array[int], array[int], array[int]]] = defaultdict(
        lambda: (array("Q"), array("Q"), array("Q"))
    )
    for document in corpus:
        hashes, numbers, lengths = columns[document.domain]
        if data := document.text.encode():
            digest = start.copy()
            digest.update(data)
            hashes.append(int.from_bytes(digest.digest(), "big"))
            numbers.append(document.number)
            lengths.append(len(data))

    draws = []
    for domain, (hashes, numbers, lengths) in sorted(columns.items()):
        if not hashes:
            warnings.warn(f"{corpus.name}: domain {domain!r} holds no text", stacklevel=3)
        order = np.argsort(np.array(hashes), kind="stable")  # equal texts stay in the order of the corpus
        ends = np.cumsum(np.array(lengths)[order], dtype=np.int64)
        draws.append(_Draw(domain, np.array(numbers)[order], ends, max_tokens, max_documents))
    return draws
