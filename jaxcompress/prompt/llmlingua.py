"""LLMLingua (Jiang et al. 2023): words that a decoder expects, after what was kept so far, are left out.

The compressed prefix is what the decoder has read when it judges the next segment: what was kept before is expected,
what was dropped is not. It lives in the reader's bounded state: with the default window its oldest tokens but the first
fall out, as in the authors' code beyond the model's length; with `full()` all of it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxcompress.inputs.scalars import Number, share
from jaxcompress.prompt.information import Context, Reader, TokenLosses, per_unit
from jaxcompress.prompt.surface import Word, words_of
from jaxcompress.prompt.word_scores import ScoredWords, Scorer, Scores, chosen
from jaxcompress.prompt.words import align


def llmlingua(reader: Reader, *, rate: Number = 0.5, before: str = "") -> Scorer:
    """Perplexity given the compressed prefix.

      score(word) = mean over its tokens of -log p(token | before, kept words of earlier segments, this segment so far)

    A segment is the words that fit into `reader.segment` tokens; the best share `rate` of them goes on into the prefix.

    Args:
      rate: of the prefix; give `keep` the same for the paper's compression.
      before: read first: an instruction or a question.

    Raises:
      ValueError: a rate outside (0, 1].
    """
    stays = share(rate, of="words")

    def score(text: str) -> ScoredWords:
        (start,) = _starts(reader, [before])
        return _iterate(reader, text, [start], lambda nats: nats[0], stays, "llmlingua")

    return score


def contrastive(reader: Reader, question: str, *, rate: Number = 0.5) -> Scorer:
    """LongLLMLingua's question-aware score (Jiang et al. 2024, section 4.2): what the question makes more likely.

      score(word) = mean -log p(token | prefix) - mean -log p(token | question, prefix)

    Args:
      rate: of the prefix, as in `llmlingua`.

    Raises:
      ValueError: a rate outside (0, 1], or an empty question.
    """
    stays = share(rate, of="words")
    if not question.strip():
        raise ValueError("the question is empty; without one there is nothing to contrast: use llmlingua")

    def score(text: str) -> ScoredWords:
        starts = _starts(reader, ["", question + "\n"])
        return _iterate(reader, text, starts, lambda nats: nats[0] - nats[1], stays, "contrastive")

    return score


def _starts(reader: Reader, texts: Sequence[str]) -> list[Context]:
    fresh = reader.begin()
    return [after(reader, fresh, text) for text in texts]


def after(reader: Reader, context: Context, text: str) -> Context:
    """The context after a text, too."""
    if not text:
        return context
    return reader.losses(context, reader.tokenizer.encode_with_places(text)[0][None])[1]


def _iterate(
    reader: Reader,
    text: str,
    contexts: list[Context],
    combine: Callable[[list[Scores]], Scores],
    rate: float,
    by: str,
) -> ScoredWords:
    words = words_of(text)
    ids, places = reader.tokenizer.encode_with_places(text)
    scores = np.zeros(len(words), np.float32)
    for tokens, part in _segments(words, places, reader.segment):
        mine = words[part]
        nats = []
        for context in contexts:
            losses, _ = reader.losses(context, ids[None, tokens])
            nats.append(per_unit(mine, TokenLosses(ids[tokens], places[tokens], losses[0])))
        scores[part] = combine(nats)
        if np.isposinf(nats[0]).any():  # no prediction, in all contexts alike or in the one without a question
            scores[part] = np.where(np.isposinf(nats[0]), np.inf, scores[part])
        kept = [word for word, stays in zip(mine, chosen(scores[part], _share(len(mine), rate)), strict=True) if stays]
        going_on = ids[tokens][_touching(kept, places[tokens])]
        if len(going_on):
            contexts = [reader.losses(context, going_on[None])[1] for context in contexts]
    return ScoredWords(text, words, scores, by)


def _share(words: int, rate: float) -> int:
    return int(np.floor(words * rate + 0.5))


def _segments(words: Sequence[Word], places: np.ndarray, most: int) -> list[tuple[slice, slice]]:
    """(tokens, words) of each segment: whole words, at most so many tokens; a longer word is cut, with the last part
    counted as its tokens."""
    first, last = align(np.array(words, np.int64).reshape(-1, 2), places)
    segments, begin = [], 0
    while begin < len(words):
        end = begin + 1
        while end < len(words) and last[end] - first[begin] <= most:
            end += 1
        segments.append((slice(int(first[begin]), int(last[end - 1])), slice(begin, end)))
        begin = end
    return segments


def _touching(words: Sequence[Word], places: np.ndarray) -> np.ndarray:
    """Which tokens lie in one of the words, if only in part: [T] bool."""
    touched = np.zeros(len(places), bool)
    for word in words:
        touched |= (places[:, 1] > word.start) & (places[:, 0] < word.end)
    return touched
