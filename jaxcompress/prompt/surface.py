"""The words of a text as it is written, with where they stand; no tokenizer, no language."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

# Scripts without spaces: Chinese and Japanese.
_ALONE = "\u2e80-\u2fdf\u3005-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
_RUN = rf"(?:(?![{_ALONE}])\w)+"
_JOINER, _TONES, _TAGS = "\u200d", "\U0001f3fb-\U0001f3ff", "\U000e0020-\U000e007f"
_SYMBOL = rf"(?:[\U0001f1e6-\U0001f1ff]{{2}}|\S)(?:[{_JOINER}{_TONES}{_TAGS}\ufe0f]|(?<={_JOINER})\S)*"
_PIECE = re.compile(rf"{_RUN}(?:['’\-.,:]{_RUN})*|{_SYMBOL}")


class Word(NamedTuple):
    """A word of a text: text[start:end]."""

    start: int
    end: int


def words_of(text: str) -> list[Word]:
    """The words of a text in order; nothing but white space lies between them.

    A run of letters and digits is one word, with single apostrophes, hyphens, dots, commas and colons inside it; every
    other character is a word of its own, and so is each Chinese or Japanese character. No word ends inside a character
    that is drawn as one (letters with marks, skin tones, families, flags).
    """
    words: list[Word] = []
    for found in _PIECE.finditer(text):
        start, end = found.span()
        if words and words[-1].end == start and _joins(text[start - 1], text[start]):
            words[-1] = Word(words[-1].start, end)
        else:
            words.append(Word(start, end))
    return words


def is_word(text: str) -> bool:
    """Whether there is a letter or a digit in it: not punctuation alone."""
    return any(map(str.isalnum, text))


def _joins(before: str, after: str) -> bool:
    """Whether a mark belongs to the letter before it, or goes on to the next letter of its word."""
    return _is_mark(after) or (_is_mark(before) and after.isalpha() and not re.match(f"[{_ALONE}]", after))


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"
