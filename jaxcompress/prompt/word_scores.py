"""Scores for the words of a text, from any scorer.

    scored = self_information(reader)(text)
    kept = keep(scored, TokenizerCounter(tokenizer), rate=0.5)

A scorer is a function from a text to `ScoredWords`. Scorers can be mixed, and a new one is a few lines. What stays is
decided by `jaxcompress.prompt.keeping.keep`, whoever scored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxcompress.inputs.scalars import Number, number
from jaxcompress.prompt.budget import words_best_first
from jaxcompress.prompt.words import Spans

Scores = Float[np.ndarray, " W"]


class ScoredWords(NamedTuple):
    """The words of a text and a score for each. A scorer may take whole sentences for words.

    Attributes:
      text: the text.
      spans: [W, 2], start and end of each word in characters; in order, no word inside another.
      scores: [W] float32, higher = keep; +inf protects, -inf and NaN are the lowest.
      by: the name of the scorer, for tables and reports.
      chunks: [W], the part of the text that each word was scored in, from 0; None if the text was read as one.
      relevance: of the text for a question, in (0, 1); None from a scorer that reads no question.
    """

    text: str
    spans: Spans
    scores: Scores
    by: str
    chunks: Int[np.ndarray, " W"] | None = None
    relevance: float | None = None

    @property
    def words(self) -> list[str]:
        return [self.text[start:end] for start, end in self.spans.tolist()]


Scorer = Callable[[str], ScoredWords]


def ranks(scores: Scores) -> Scores:
    """Scores as ranks in [0, 1], the worst 0, by the rule of `jaxcompress.state.select`."""
    n = len(scores)
    if n < 2:
        return np.ones(n, np.float32)
    places = np.empty(n, np.float32)
    places[words_best_first(scores)] = np.linspace(1, 0, n)
    return places


def mixed(*weighted: tuple[Number, Scorer]) -> Scorer:
    """Mixes scorers of the same words by the weighted mean of their ranks.

        mixed((0.7, relevance_to(question)), (0.3, self_information(reader)))     # task-aware + task-agnostic

    A word that one of them protects (+inf) stays protected.

    Raises:
      ValueError: nothing to mix, weights that are negative or all 0, or (when called) scorers whose words differ.
    """
    weights = [number(weight, "a weight") for weight, _ in weighted]
    total = sum(weights)
    if min(weights, default=0.0) < 0 or total <= 0:
        raise ValueError(f"weights must be positive, not {weights}")

    def score(text: str) -> ScoredWords:
        all_scored = [scorer(text) for _, scorer in weighted]
        first = all_scored[0]
        for other in all_scored[1:]:
            if not np.array_equal(other.spans, first.spans):
                raise ValueError(f"{first.by} and {other.by} score different words; mix scorers of the same words")
        scores = sum(w / total * ranks(one.scores) for w, one in zip(weights, all_scored, strict=True))
        protected = np.any([np.isposinf(one.scores) for one in all_scored], axis=0)
        by = " + ".join(f"{w / total:.2g} {one.by}" for w, one in zip(weights, all_scored, strict=True))
        return ScoredWords(text, first.spans, np.where(protected, np.inf, scores).astype(np.float32), by)

    return score
