"""What every method must beat: random words, evenly spread words, the first words, rare words, content words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from jaxcompress.prompt.surface import is_word, words_of
from jaxcompress.prompt.units import FUNCTION_WORDS, sentences
from jaxcompress.prompt.word_scores import ScoredWords, Scorer


def random_words(seed: int = 0) -> Scorer:
    """Scores drawn evenly; the same for the same seed and number of words."""

    def score(text: str) -> ScoredWords:
        words = words_of(text)
        return ScoredWords(text, words, np.random.default_rng(seed).random(len(words), np.float32), "random")

    return score


def first_words() -> Scorer:
    """The beginning of the text."""

    def score(text: str) -> ScoredWords:
        words = words_of(text)
        return ScoredWords(text, words, -np.arange(len(words), dtype=np.float32), "first words")

    return score


def evenly_spread() -> Scorer:
    """Whatever number of words is kept, they lie evenly over the text.

    The scores are the van der Corput sequence of places, in base 2: the best n are within one word of a uniform stride
    for every n, and at n = total / 2^k they are every 2^k-th word exactly.
    """

    def score(text: str) -> ScoredWords:
        words = words_of(text)
        n = len(words)
        order = np.zeros(n)
        if n:
            bits = max(1, math.ceil(math.log2(n)))
            for bit in range(bits):
                order += ((np.arange(n) >> bit) & 1) * 2.0 ** (bits - 1 - bit)
        return ScoredWords(text, words, -order.astype(np.float32), "uniform")

    return score


def tf_idf(background: Iterable[str] | None = None) -> Scorer:
    """A word's frequency in the text times the logarithm of how few of the background's documents have it.

      score(w) = tf(w) * (log((1 + N) / (1 + df(w))) + 1)

    Words count in lower case; punctuation scores 0.

    Args:
      background: documents. Without them, the text's own sentences and lines.
    """
    given = None if background is None else _document_frequencies(background)

    def score(text: str) -> ScoredWords:
        words = words_of(text)
        spelled = [text[start:end].lower() for start, end in words]
        frequencies, n = _document_frequencies(_sentences(text)) if given is None else given
        counts = Counter(spelled)
        idf = {word: math.log((1 + n) / (1 + frequencies[word])) + 1 for word in counts}
        scores = [counts[word] * idf[word] if is_word(word) else 0.0 for word in spelled]
        return ScoredWords(text, words, np.array(scores, np.float32), "tf-idf")

    return score


def content_words() -> Scorer:
    """1 for a word that is not an English function word, 0 for those and for punctuation."""

    def score(text: str) -> ScoredWords:
        words = words_of(text)
        spelled = (text[start:end].lower() for start, end in words)
        scores = [float(is_word(word) and word not in FUNCTION_WORDS) for word in spelled]
        return ScoredWords(text, words, np.array(scores, np.float32), "content words")

    return score


def relevance_to(question: str, *, reach: int = 8) -> Scorer:
    """How near a word stands to the content words of a question: needs no model.

      score(i) = max over places j that hold a word of the question of idf(j) * (1 - |i - j| / (reach + 1)), at least 0

    Words are compared in lower case; idf is over the text's own sentences, so that a word of the question that is
    everywhere in the text says little. Mix it with a scorer that knows nothing of the question (`mixed`).

    Raises:
      ValueError: the reach is negative.
    """
    if reach < 0:
        raise ValueError(f"reach is a number of words, at least 0, not {reach}")
    asked = {question[start:end].lower() for start, end in words_of(question)}
    asked = {word for word in asked if is_word(word) and word not in FUNCTION_WORDS}

    def score(text: str) -> ScoredWords:
        words = words_of(text)
        spelled = [text[start:end].lower() for start, end in words]
        frequencies, n = _document_frequencies(_sentences(text))
        scores = np.zeros(len(words), np.float32)
        near = 1 - np.abs(np.arange(-reach, reach + 1)) / (reach + 1)
        for at, word in enumerate(spelled):
            if word in asked:
                low, high = max(at - reach, 0), min(at + reach + 1, len(words))
                here = near[low - at + reach : high - at + reach] * (math.log((1 + n) / (1 + frequencies[word])) + 1)
                scores[low:high] = np.maximum(scores[low:high], here)
        return ScoredWords(text, words, scores, "question")

    return score


def _document_frequencies(documents: Iterable[str]) -> tuple[Counter[str], int]:
    frequencies: Counter[str] = Counter()
    n = 0
    for document in documents:
        n += 1
        frequencies.update({document[start:end].lower() for start, end in words_of(document)})
    return frequencies, n


def _sentences(text: str) -> list[str]:
    return [text[unit.start : unit.end] for unit in sentences(text)]
