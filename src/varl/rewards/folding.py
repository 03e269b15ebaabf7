"""Texts as they are compared: one spelling for what looks alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

__all__ = ["fold", "folded_words"]

_ALIKE = {
    **dict.fromkeys("‘’‚‛′‵ʹʻʼʽˈ‹›´ꞌ＇", "'"),
    **dict.fromkeys("“”„‟″‶«»ˮ〝〞〟＂", '"'),
    **dict.fromkeys("‐‑‒–—―−⁃﹘﹣－", "-"),
    **dict.fromkeys("•∙⋅‧・･", "·"),
    "…": "...",
    "⁄": "/",
    "∕": "/",
}
_TABLE = str.maketrans(_ALIKE)


def fold(text: str) -> str:
    """The text without differences of case, encoding and typography.

    Quotes, dashes and dots are the plain ones, characters of compatibility (ligatures, full width, no-break spaces)
    what they stand for, accents composed (NFKC), letters case-folded; what cannot be seen, such as soft hyphens and
    marks of direction, is left out. ASCII is only lower-cased.
    """
    if text.isascii():
        return text.lower()
    # Before NFKC too, which would take an acute accent for a blank with an accent on it.
    text = unicodedata.normalize("NFKC", text.translate(_TABLE)).casefold()
    text = "".join(c for c in text if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f")
    return unicodedata.normalize("NFKC", text).translate(_TABLE)


def folded_words(texts: Iterable[str], folded: bool = True) -> list[str]:
    """The texts' words, split at white space, folded or in lower case only.

    There are as many as before folding: a word may become empty, but never two.
    """
    words = [word for text in texts for word in (text if folded else text.lower()).split()]
    return ["".join(fold(word).split()) for word in words] if folded else words
