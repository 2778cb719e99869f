"""Words as Python values, one at a time, where `jaxcompress.prompt.words` has arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxcompress.prompt.words import segment


class Word(NamedTuple):
    """A word of a text, or a larger unit: text[start:end]."""

    start: int
    end: int


def words_of(text: str) -> list[Word]:
    """The words of a text in order (`segment`)."""
    return [Word(start, end) for start, end in segment(text).tolist()]


def spelled(text: str, words: Sequence[Word] | None = None) -> list[str]:
    """The words of a text as strings."""
    return [text[start:end] for start, end in (words_of(text) if words is None else words)]


def is_word(text: str) -> bool:
    """Whether a text has a letter or a digit: not punctuation alone."""
    return any(map(str.isalnum, text))
