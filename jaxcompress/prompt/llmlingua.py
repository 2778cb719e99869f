"""LLMLingua (Jiang et al. 2023): drops words that a decoder expects after the words kept so far.

Before it judges a segment, the decoder has read the compressed prefix: what was kept of earlier segments and nothing
that was dropped. The prefix lives in the reader's bounded state. With the default window all but its first tokens fall
out in time, as in the authors' code beyond the model's length; with `Full()` all of it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxcompress.inputs.scalars import Number, share
from jaxcompress.prompt.budget import words_best_first
from jaxcompress.prompt.information import Context, Reader, TokenLosses, per_unit
from jaxcompress.prompt.word_scores import ScoredWords, Scorer, Scores
from jaxcompress.prompt.words import Spans, align, segment


def llmlingua(reader: Reader, *, word_rate: Number = 0.5, before: str = "") -> Scorer:
    """Perplexity given the compressed prefix.

      score(word) = mean over its tokens of -log p(token | before, kept words of earlier segments, this segment so far)

    A segment is the words that fit into `reader.segment` tokens. Its best words go on into the prefix.

    Args:
      word_rate: the share of a segment's words that goes on into the prefix, in (0, 1].
      before: read first: an instruction or a question.

    Raises:
      ValueError: a word_rate outside (0, 1].
    """
    stays = share(word_rate, "a word_rate", of="words")

    def score(text: str) -> ScoredWords:
        (start,) = _starts(reader, [before])
        return _iterate(reader, text, [start], lambda nats: nats[0], stays, "llmlingua")

    return score


def contrastive(reader: Reader, question: str, *, word_rate: Number = 0.5) -> Scorer:
    """LongLLMLingua's question-aware score (Jiang et al. 2024, section 4.2): what the question makes more likely.

      score(word) = mean -log p(token | prefix) - mean -log p(token | question, prefix)

    Args:
      word_rate: the share of a segment's words that goes on into the prefix, as in `llmlingua`.

    Raises:
      ValueError: a word_rate outside (0, 1], or an empty question.
    """
    stays = share(word_rate, "a word_rate", of="words")
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
    """The context after one more text."""
    if not text:
        return context
    return reader.losses(context, reader.tokenizer.encode_with_places(text)[0][None])[1]


def _iterate(
    reader: Reader,
    text: str,
    contexts: list[Context],
    combine: Callable[[list[Scores]], Scores],
    word_rate: float,
    by: str,
) -> ScoredWords:
    spans = segment(text)
    ids, places = reader.tokenizer.encode_with_places(text)
    scores = np.zeros(len(spans), np.float32)
    for tokens, part in _segments(spans, places, reader.segment):
        mine = spans[part]
        nats = []
        for context in contexts:
            losses, _ = reader.losses(context, ids[None, tokens])
            nats.append(per_unit(mine, TokenLosses(ids[tokens], places[tokens], losses[0])))
        scores[part] = combine(nats)
        if np.isposinf(nats[0]).any():  # no prediction, in all contexts alike or in the one without a question
            scores[part] = np.where(np.isposinf(nats[0]), np.inf, scores[part])
        best = words_best_first(scores[part])[: int(np.floor(len(mine) * word_rate + 0.5))]
        going_on = ids[tokens][_touching(mine[best], places[tokens])]
        if len(going_on):
            contexts = [reader.losses(context, going_on[None])[1] for context in contexts]
    return ScoredWords(text, spans, scores, by)


def _segments(spans: Spans, places: np.ndarray, most: int) -> list[tuple[slice, slice]]:
    """(tokens, words) of each segment: whole words with at most so many tokens, or one word that has more."""
    first, last = align(spans, places)
    segments, begin = [], 0
    while begin < len(spans):
        end = begin + 1
        while end < len(spans) and last[end] - first[begin] <= most:
            end += 1
        segments.append((slice(int(first[begin]), int(last[end - 1])), slice(begin, end)))
        begin = end
    return segments


def _touching(spans: Spans, places: np.ndarray) -> np.ndarray:
    """Marks the tokens that lie in one of the words, completely or in part: [T] bool."""
    touched = np.zeros(len(places), bool)
    for start, end in spans.tolist():
        touched |= (places[:, 1] > start) & (places[:, 0] < end)
    return touched
