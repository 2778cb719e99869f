"""A token classifier as a scorer of words, beside those that need none."""

from __future__ import annotations

from jaxcompress.prompt.compressor import Compressor
from jaxcompress.prompt.surface import Word
from jaxcompress.prompt.word_scores import Scored, Scorer


def token_classifier(compressor: Compressor, *, name: str = "classifier") -> Scorer:
    """Scores a word by the mean probability, over its subwords, that it stays (LLMLingua-2)."""

    def score(text: str) -> Scored:
        (found,) = compressor.score([text])
        return Scored(text, [Word(start, end) for start, end in found.spans.tolist()], found.probabilities, name)

    return score
