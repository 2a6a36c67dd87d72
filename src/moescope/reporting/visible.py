"""Text that a model or a corpus made up, made safe to show: whatever would be invisible or obeyed becomes a symbol.

Token text and domain names are hostile until they have passed here: escape sequences can drive a terminal,
bidirectional controls can reorder a line, zero-width characters can hide. HTML, LaTeX and CSV escaping come on top,
where they are written.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Iterable

_NAMED = {"\n": "↵", "\t": "⇥", "\x7f": "␡"}


def visible(text: str) -> str:
    """The text with each control, format, surrogate and unassigned character replaced by a printable symbol.

    Example:
        >>> visible("a\\tb\\x1b[31m"), visible("\\u202eevil"), visible("naïve 中文")
        ('a⇥b␛[31m', '⟨U+202E⟩evil', 'naïve 中文')
    """
    return text if text.isprintable() else "".join(map(_symbol, text))


def shorten(text: str, width: int) -> str:
    """`text` made visible and cut to `width` characters, the last being ``…`` if something is missing."""
    text = visible(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def decode_pieces(pieces: Iterable[bytes]) -> list[str]:
    """The characters of each piece of a text, a character given to the piece that holds its last byte.

    Returns:
        A string a piece; empty where a piece holds only the beginning of a character. Bytes that are no UTF-8 read
        U+FFFD. Joined, they are the text.

    Example:
        >>> decode_pieces([b"caf", b"\\xc3", b"\\xa9!"])
        ['caf', '', 'é!']
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [decoder.decode(piece) for piece in pieces]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def _symbol(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    if character in _NAMED:
        return _NAMED[character]
    if character < " ":
        return chr(0x2400 + ord(character))
    return f"⟨U+{ord(character):04X}⟩"
