"""Scorers without a model, which every method must beat: random, evenly spread, first, rare and content words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from jaxcompress.prompt.surface import is_word, spelled
from jaxcompress.prompt.units import FUNCTION_WORDS, sentences
from jaxcompress.prompt.word_scores import ScoredWords, Scorer
from jaxcompress.prompt.words import segment


def random_words(seed: int = 0) -> Scorer:
    """Scores drawn evenly; the same for the same seed and number of words."""

    def score(text: str) -> ScoredWords:
        spans = segment(text)
        return ScoredWords(text, spans, np.random.default_rng(seed).random(len(spans), np.float32), "random")

    return score


def first_words() -> Scorer:
    """The beginning of the text."""

    def score(text: str) -> ScoredWords:
        spans = segment(text)
        return ScoredWords(text, spans, -np.arange(len(spans), dtype=np.float32), "first words")

    return score


def evenly_spread() -> Scorer:
    """The kept words lie evenly over the text, however many they are.

    The scores are the van der Corput sequence of places, in base 2. For every n the best n words are within one word of
    a uniform stride; at n = total / 2^k they are exactly every 2^k-th word.
    """

    def score(text: str) -> ScoredWords:
        spans = segment(text)
        n = len(spans)
        order = np.zeros(n)
        if n:
            bits = max(1, math.ceil(math.log2(n)))
            for bit in range(bits):
                order += ((np.arange(n) >> bit) & 1) * 2.0 ** (bits - 1 - bit)
        return ScoredWords(text, spans, -order.astype(np.float32), "uniform")

    return score


def tf_idf(background: Iterable[str] | None = None) -> Scorer:
    """A word's frequency in the text times the logarithm of how few of the background's documents have it.

      score(w) = tf(w) * (log((1 + N) / (1 + df(w))) + 1)

    Words count in lower case; punctuation scores 0.

    Args:
      background: documents; the text's own sentences and lines if None.
    """
    given = None if background is None else _document_frequencies(background)

    def score(text: str) -> ScoredWords:
        words = _lower(text)
        frequencies, n = _document_frequencies(_sentences(text)) if given is None else given
        counts = Counter(words)
        idf = {word: math.log((1 + n) / (1 + frequencies[word])) + 1 for word in counts}
        scores = [counts[word] * idf[word] if is_word(word) else 0.0 for word in words]
        return ScoredWords(text, segment(text), np.array(scores, np.float32), "tf-idf")

    return score


def content_words() -> Scorer:
    """1 for a word that is not an English function word, 0 for those and for punctuation."""

    def score(text: str) -> ScoredWords:
        scores = [float(is_word(word) and word not in FUNCTION_WORDS) for word in _lower(text)]
        return ScoredWords(text, segment(text), np.array(scores, np.float32), "content words")

    return score


def relevance_to(question: str, *, reach: int = 8) -> Scorer:
    """How near a word stands to the content words of a question; needs no model.

      score(i) = max over places j that hold a word of the question of idf(j) * (1 - |i - j| / (reach + 1)), at least 0

    Words are compared in lower case. idf is over the text's own sentences: a word of the question that stands
    everywhere in the text counts little. Mix this with a scorer that does not know the question (`mixed`).

    Raises:
      ValueError: the reach is negative.
    """
    if reach < 0:
        raise ValueError(f"reach is a number of words, at least 0, not {reach}")
    asked = {word for word in _lower(question) if is_word(word) and word not in FUNCTION_WORDS}

    def score(text: str) -> ScoredWords:
        words = _lower(text)
        frequencies, n = _document_frequencies(_sentences(text))
        scores = np.zeros(len(words), np.float32)
        near = 1 - np.abs(np.arange(-reach, reach + 1)) / (reach + 1)
        for at, word in enumerate(words):
            if word in asked:
                low, high = max(at - reach, 0), min(at + reach + 1, len(words))
                here = near[low - at + reach : high - at + reach] * (math.log((1 + n) / (1 + frequencies[word])) + 1)
                scores[low:high] = np.maximum(scores[low:high], here)
        return ScoredWords(text, segment(text), scores, "question")

    return score


def _document_frequencies(documents: Iterable[str]) -> tuple[Counter[str], int]:
    frequencies: Counter[str] = Counter()
    n = 0
    for document in documents:
        n += 1
        frequencies.update(set(_lower(document)))
    return frequencies, n


def _lower(text: str) -> list[str]:
    """The words of a text in lower case."""
    return [word.lower() for word in spelled(text)]


def _sentences(text: str) -> list[str]:
    return [text[unit.start : unit.end] for unit in sentences(text)]
