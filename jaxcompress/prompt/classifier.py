"""A token classifier as a scorer of words, beside those that need none."""

from __future__ import annotations

import numpy as np

from jaxcompress.models.encoder import Encoder
from jaxcompress.prompt.chunks import chunks
from jaxcompress.prompt.scoring import score as probabilities_of
from jaxcompress.prompt.surface import words_of
from jaxcompress.prompt.tokenizer import EncoderTokenizer
from jaxcompress.prompt.word_scores import Scored, Scorer
from jaxcompress.prompt.words import align, of_words


def token_classifier(encoder: Encoder, tokenizer: EncoderTokenizer, *, name: str = "classifier") -> Scorer:
    """Scores a word by the mean probability, over its subwords, that it stays.

    A text is read in rows of whole sentences, as many as the encoder has room for (`chunks`). A word that the tokenizer
    does not know has the probability of the unknown token where it stands.
    """
    room = encoder.config.max_length - 2

    def score(text: str) -> Scored:
        words = words_of(text)
        subwords = tokenizer.encode(text)
        spans = np.array(words, np.int64).reshape(-1, 2)
        rows = [subwords.ids[start:end] for start, end in chunks(text, subwords.offsets, spans, room)]
        around = [np.concatenate([[tokenizer.opening], row, [tokenizer.closing]]).astype(np.int32) for row in rows]
        probabilities = [row[1:-1] for row in probabilities_of(encoder, around)]
        every = np.concatenate([np.zeros(0, np.float32), *probabilities])
        return Scored(text, words, of_words(every, align(spans, subwords.offsets)), name)

    return score
