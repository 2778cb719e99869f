"""A token classifier as a scorer of words, beside those that need none."""

from __future__ import annotations

from jaxcompress.prompt.compressor import Compressor
from jaxcompress.prompt.surface import Word
from jaxcompress.prompt.word_scores import ScoredWords, Scorer


def token_classifier(compressor: Compressor, *, name: str = "classifier") -> Scorer:
    """Scores a word by the mean probability, over its subwords, that it stays (LLMLingua-2)."""

    def score(text: str) -> ScoredWords:
        (found,) = compressor.score([text])
        return ScoredWords(text, [Word(start, end) for start, end in found.spans.tolist()], found.probabilities, name)

    return score


def load_compressor() -> Scorer:
    """The prompt compressor that ships with the package, as a scorer of words, to be mixed and compared with others."""
    return token_classifier(Compressor.load(dtype="float32"), name="embedded classifier")
