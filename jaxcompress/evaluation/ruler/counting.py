"""Words that occur most often: in a list of words, and in a coded text (RULER, scripts/data/synthetic/
common_words_extraction.py and freq_words_extraction.py)."""

from __future__ import annotations

import math
import random
import string

from jaxcompress.evaluation.ruler.sample import Question, Sample, Sources
from jaxcompress.evaluation.ruler.words import distinct_words

COMMON = 10
FEW_COMMON = COMMON + 1
"""The fewest words of a list: the common ones, and one that is not."""

_ALPHA = 2.0
_ZETA = math.pi**2 / 6  # of 2
_LETTERS = 6
_LONG = 4096
"""From so many tokens on, RULER repeats words more often."""

_COMMON_BEFORE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
_COMMON_ASKED = "Question: What are the 10 most common words in the above list? "
_COMMON_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
_CODED_BEFORE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. "
)
_CODED_ASKED = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? "
)
_CODED_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"


def common_words(size: int, rng: random.Random, sources: Sources) -> Sample:
    """A list in which ten words occur more often than the others, after a worked example."""
    long = sources.length >= _LONG
    example, shown = _list(40 if long else 20, 10 if long else 3, 3 if long else 1, rng)
    context, answers = _list(size, 30 if long else 6, 3 if long else 1, rng)
    before = f"{_COMMON_BEFORE}{example}\n{_COMMON_ASKED}{_COMMON_PREFIX}{_numbered(shown)}"
    return Sample(
        f"{before}\n{_COMMON_BEFORE}{context}\n", (Question(_COMMON_ASKED, _COMMON_PREFIX, tuple(answers)),)
    )  # fmt: skip


def _list(count: int, often: int, seldom: int, rng: random.Random) -> tuple[str, list[str]]:
    words = distinct_words(count, rng)
    common, others = words[:COMMON], words[COMMON:]
    listed = common * often + others * seldom
    rng.shuffle(listed)
    return _numbered(listed), common


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def frequent_words(size: int, rng: random.Random, sources: Sources) -> Sample:
    """Coded words whose frequency falls with the square of their rank; the most frequent one is dots."""
    words: set[str] = set()
    while len(words) < max(sources.length // 50, 4):
        words.add("".join(rng.choices(string.ascii_lowercase, k=_LETTERS)))
    vocabulary = rng.sample(sorted(words), len(words))
    vocabulary[0] = "..."
    counts = [int(size * rank**-_ALPHA / _ZETA) for rank in range(1, len(vocabulary) + 1)]
    drawn = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
    rng.shuffle(drawn)
    question = Question(_CODED_ASKED, _CODED_PREFIX, tuple(vocabulary[1:4]))
    return Sample(f"{_CODED_BEFORE}{' '.join(drawn)}\n", (question,))
