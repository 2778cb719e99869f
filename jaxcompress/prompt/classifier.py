"""A token classifier as a scorer of words, beside those that need none."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from jaxcompress.models.encoder import Encoder
from jaxcompress.prompt.scoring import score as probabilities_of
from jaxcompress.prompt.surface import words_of
from jaxcompress.prompt.tokenizer import EncoderTokenizer
from jaxcompress.prompt.units import sentences
from jaxcompress.prompt.word_scores import Scored, Scorer
from jaxcompress.prompt.words import align, of_words


def token_classifier(encoder: Encoder, tokenizer: EncoderTokenizer, *, name: str = "classifier") -> Scorer:
    """Scores a word by the mean probability, over its subwords, that it stays.

    A text is read in rows of whole sentences, as many as the encoder's length has room for. A word that the tokenizer
    does not know has the probability of the unknown token where it stands.
    """
    room = encoder.config.max_length - 2

    def score(text: str) -> Scored:
        words = words_of(text)
        subwords = tokenizer.encode(text)
        starts = np.searchsorted(subwords.offsets[:, 1], [one.start for one in sentences(text)], side="right")
        rows = [subwords.ids[part] for part in _rows(starts, len(subwords.ids), room)]
        around = [np.concatenate([[tokenizer.opening], row, [tokenizer.closing]]).astype(np.int32) for row in rows]
        probabilities = [row[1:-1] for row in probabilities_of(encoder, around)]
        every = np.concatenate([np.zeros(0, np.float32), *probabilities])
        groups = align(np.array(words, np.int64).reshape(-1, 2), subwords.offsets)
        return Scored(text, words, of_words(every, groups), name)

    return score


def _rows(starts: Int[np.ndarray, " S"], total: int, room: int) -> list[slice]:
    """Cuts tokens where sentences start, so that each row has at most `room`; longer sentences are cut anywhere."""
    cuts = [0]
    ends = [*starts[1:].tolist(), total]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        if end - cuts[-1] > room and start > cuts[-1]:
            cuts.append(start)
        while end - cuts[-1] > room:
            cuts.append(cuts[-1] + room)
    return [slice(one, other) for one, other in zip(cuts, [*cuts[1:], total], strict=True) if other > one]
