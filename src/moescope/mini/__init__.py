"""A small Mixture-of-Experts model and a sample corpus, included so that everything can be tried offline.

Both are data: a model folder that ``from_pretrained`` reads, and a compressed JSON-lines file in the Pile's format.
Their contents are documented beside them, in ``mini-mixtral/README.md`` and ``corpus/SOURCES.md``.
"""

from pathlib import Path

_HERE = Path(__file__).parent


def model_path() -> Path:
    """Return the folder of the mini Mixtral.

    Example:
        >>> (model_path() / "config.json").is_file()
        True
    """
    return _HERE / "mini-mixtral"


def corpus_path() -> Path:
    """Return the sample corpus: held-out documents of ten domains.

    Example:
        >>> corpus_path().name
        'sample.jsonl.zst'
    """
    return _HERE / "corpus" / "sample.jsonl.zst"
