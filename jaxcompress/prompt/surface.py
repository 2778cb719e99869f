"""Words one at a time, as they are written: a plain view of `jaxcompress.prompt.words`."""

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
    """Whether there is a letter or a digit in it: not punctuation alone."""
    return any(map(str.isalnum, text))
