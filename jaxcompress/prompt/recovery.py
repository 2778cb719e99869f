"""What of a text can still be recovered from its compression, counted without a model.

Content words and numbers are counted. A content word is recovered if the compression has it, in the same or another
form: at least once (`kinds`), or for each mention (`mentions`). A number is recovered if all its digits are there, in
order and unbroken.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from jaxcompress.prompt.annotation import rough_lemma
from jaxcompress.prompt.surface import is_word, words_of
from jaxcompress.prompt.units import FUNCTION_WORDS

_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")


@dataclass(frozen=True)
class Recovery:
    """Shares of the original that the compression still has, in [0, 1]; 1 if the original has none of that kind.

    Attributes:
      kinds: share of the different content words.
      mentions: share of the content words, each mention counted.
      numbers: share of the numbers, each occurrence counted.
      missing: content words that are lost completely, most frequent first, at most ten.
      missing_numbers: lost numbers, likewise.
    """

    kinds: float
    mentions: float
    numbers: float
    missing: tuple[str, ...]
    missing_numbers: tuple[str, ...]

    def __str__(self) -> str:
        words = f"{self.kinds:.0%} of the content words, {self.mentions:.0%} of their mentions"
        lost = ", ".join((*self.missing, *self.missing_numbers))
        return f"{words}, {self.numbers:.0%} of the numbers" + (f"; lost: {lost}" if lost else "")


def recovery(original: str, compressed: str) -> Recovery:
    """Compares a text with its compression."""
    before, spelled = _content(original)
    after, _ = _content(compressed)
    numbers, left = Counter(_NUMBER.findall(original)), Counter(_NUMBER.findall(compressed))
    lost = Counter({word: n for word, n in before.items() if not after[word]})
    return Recovery(
        kinds=_share(sum(1 for word in before if after[word]), len(before)),
        mentions=_share(sum((before & after).values()), sum(before.values())),
        numbers=_share(sum((numbers & left).values()), sum(numbers.values())),
        missing=tuple(spelled[word] for word, _ in lost.most_common(10)),
        missing_numbers=tuple(number for number, _ in (numbers - left).most_common(10)),
    )


def _content(text: str) -> tuple[Counter[str], dict[str, str]]:
    """How often each content word occurs, all its forms together, and one form of each as it is written."""
    counts: Counter[str] = Counter()
    spelled: dict[str, str] = {}
    for start, end in words_of(text):
        word = text[start:end]
        if is_word(word) and not _NUMBER.fullmatch(word) and word.lower() not in FUNCTION_WORDS:
            lemma = rough_lemma(word)
            counts[lemma] += 1
            spelled.setdefault(lemma, word)
    return counts, spelled


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
