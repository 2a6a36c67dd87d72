"""Text to token ids and back to exact bytes.

Text is text: ``<s>`` in a corpus is three characters, never the token that starts a sequence. What the tokenizer adds
in front (BOS …) is found once; the recorder feeds it to the model at the start of every window and does not record it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import TokenizerMissing
from moescope.trace import Vocabulary

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model", "*.tiktoken")


class Tokenizer:
    """A tokenizer of transformers as the recorder uses it.

    Attributes:
        added_ids: Ids that it puts in front of a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.added_ids = self._find_added_ids()

    @classmethod
    def load(cls, folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
        """Load the tokenizer of a checkpoint; code that it brings is run only if `trust_remote_code`.

        Raises:
            TokenizerMissing: It has none, or one that cannot be loaded.
        """
        from transformers import AutoTokenizer

        if not any(True for pattern in _FILES for _ in folder.glob(pattern)):  # transformers would invent an empty one
            raise TokenizerMissing(
                folder, "has no tokenizer files", "copy tokenizer.json from the model's publisher into the folder"
            )
        try:
            return cls(
                AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
            )
        except Exception as error:  # whatever its files make two libraries raise
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            files = ", ".join(sorted({file.name for pattern in _FILES for file in folder.glob(pattern)}))
            hint = f"damaged, or of a newer version of tokenizers? Its files: {files}"
            raise TokenizerMissing(folder, f"its tokenizer cannot be loaded: {text}", hint) from error

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Token ids of a text, none added, shape (token,)."""
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # a lone surrogate reads U+FFFD
        return np.asarray(self._ids(text, add_special_tokens=False), np.uint32)

    def description(self) -> dict[str, Any]:
        """Provenance for the header of a trace: class, fingerprint, added tokens."""
        return {
            "class": type(self._tokenizer).__name__,
            "fingerprint": self._fingerprint(),
            "added_ids": list(self.added_ids),
        }

    def vocabulary(self) -> Vocabulary:
        """The exact bytes of every id."""
        tokenizer = self._tokenizer
        added = {int(token_id): str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
        decode = _piece_decoder(tokenizer)
        pieces = {}
        for token, token_id in tokenizer.get_vocab().items():
            pieces[int(token_id)] = added[token_id].encode() if token_id in added else decode(token, token_id)
        return Vocabulary(pieces)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        options = {"split_special_tokens": True, "return_attention_mask": False, "verbose": False}
        return self._tokenizer(text, add_special_tokens=add_special_tokens, **options)["input_ids"]

    def _find_added_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text; what it puts after can change no earlier choice."""
        without = self._ids("a", add_special_tokens=False)
        with_added = self._ids("a", add_special_tokens=True)
        for start in range(len(with_added) - len(without) + 1):
            if with_added[start : start + len(without)] == without:
                return tuple(with_added[:start])
        raise TokenizerMissing(
            type(self._tokenizer).__name__, "tokenizes a text differently when it adds its special tokens"
        )

    def _fingerprint(self) -> str:
        """Hash of all that decides how text becomes ids; we neither pad nor truncate with it."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            content = json.loads(backend.to_str())
            content.update(padding=None, truncation=None)
        else:
            content = [type(self._tokenizer).__name__, sorted(self._tokenizer.get_vocab().items())]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _piece_decoder(tokenizer: Any) -> Callable[[str, int], bytes]:
    """How a token of this tokenizer's vocabulary becomes bytes, by the kind of its decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        kinds = set() if backend.decoder is None else _decoder_kinds(json.loads(backend.decoder.__getstate__()))
    else:
        kinds = {"ByteFallback", "Metaspace"} if type(tokenizer).__module__.startswith("transformers") else set()
    if "ByteLevel" in kinds:
        return lambda token, _: _byte_level(token)
    if kinds & {"ByteFallback", "Metaspace", "Replace"}:
        return lambda token, _: _sentencepiece(token)
    return lambda _, token_id: str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False)).encode()


def _decoder_kinds(decoder: Any) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    kinds = {str(decoder.get("type"))}
    for child in decoder.get("decoders", ()):
        kinds |= _decoder_kinds(child)
    return kinds


def _byte_level(token: str) -> bytes:
    """Bytes of a token of a byte-level BPE, in which each byte is written as one printable character (GPT-2).

    Example:
        >>> _byte_level("Ġcaf")
        b' caf'
    """
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    """Bytes of a token of a sentencepiece vocabulary: ``▁`` is a space, ``<0xE2>`` a byte.

    Example:
        >>> _sentencepiece("▁caf"), _sentencepiece("<0xC3>")
        (b' caf', b'\\xc3')
    """
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _characters_of_bytes() -> dict[str, int]:
    """The table of GPT-2: printable Latin-1 stands for itself, the other bytes are moved up to U+0100 and on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _characters_of_bytes()
