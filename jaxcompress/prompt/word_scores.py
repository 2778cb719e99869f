"""Scores for the words of a text, and the words that stay: what every way of shortening a prompt has in common.

    scored = self_information(reader)(text)       # any scorer: text -> Scored
    kept = keep(scored, rate=0.5)
    kept.text, kept.labels, kept.scored.by

A scorer is a function from text to `ScoredWords`; scorers can be mixed, and a new one is a few lines. What stays is
chosen by `jaxcompress.state.select`, as everywhere: exactly so many words, higher scores first, the earlier word on a
tie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxcompress.inputs.scalars import Number, number, share, whole
from jaxcompress.prompt.budget import best_first, choose_words
from jaxcompress.prompt.joining import join
from jaxcompress.prompt.surface import Word

Scores = Float[np.ndarray, " W"]


class ScoredWords(NamedTuple):
    """The words of a text and how much each is worth keeping.

    Attributes:
      words: in order, none inside another.
      scores: [W] float32, higher = keep; +inf protects.
      by: who scored: a name for tables and reports.
    """

    text: str
    words: list[Word]
    scores: Scores
    by: str


Scorer = Callable[[str], ScoredWords]


class Kept(NamedTuple):
    """What stays of a text.

    Attributes:
      labels: [W], True: kept.
      text: the kept words (`jaxcompress.prompt.joining`); a line break over a gap stays one.
    """

    scored: ScoredWords
    labels: Bool[np.ndarray, " W"]
    text: str

    @property
    def rate(self) -> float:
        """Share of words that stay; 1 for a text without words."""
        return float(self.labels.mean()) if len(self.labels) else 1.0


def keep(
    scored: ScoredWords,
    *,
    rate: Number | None = None,
    n: Number | None = None,
    costs: Int[np.ndarray, " W"] | None = None,
) -> Kept:
    """Keeps exactly so many words, those that score highest.

    Give either `rate`, of which the nearest whole number is kept, or `n`.

    Args:
      costs: what each word costs, in tokens of whoever will read, say. Rate and n then are of these: what stays costs
        exactly n, or the most below it that any words do (`jaxcompress.prompt.budget`).

    Raises:
      ValueError: neither or both are given, the rate is not in (0, 1], n is negative, or more is protected (+inf) than
        may stay.
    """
    words = len(scored.words)
    total = words if costs is None else int(costs.sum())
    if (rate is None) == (n is None):
        raise ValueError(f"give either rate or n, not {'neither' if rate is None else 'both'}")
    asked = int(np.floor(total * share(rate, of="words") + 0.5)) if n is None else whole(n, "n, of words that stay,")
    n = min(total, asked)
    protected = np.isposinf(scored.scores)
    least = int(protected.sum() if costs is None else costs[protected].sum())
    if least > n:
        raise ValueError(f"{least} of {total} are protected, only {n} may stay: raise the rate")
    labels = chosen(scored.scores, n) if costs is None else choose_words(scored.scores, costs, n)
    spans = np.array(scored.words, np.int64).reshape(-1, 2)
    return Kept(scored, labels, join(scored.text, spans, labels, breaks=("\n",)))


def ranks(scores: Scores) -> Scores:
    """Scores as ranks in [0, 1], the worst 0, by the rule of `select`: comparable whoever scored."""
    n = len(scores)
    if n < 2:
        return np.ones(n, np.float32)
    places = np.empty(n, np.float32)
    places[best_first(scores)] = np.linspace(1, 0, n)
    return places


def mixed(*weighted: tuple[Number, Scorer]) -> Scorer:
    """Mixes scorers of the same words by the weighted mean of their ranks.

        mixed((0.7, relevance_to(question)), (0.3, self_information(reader)))     # task-aware + task-agnostic

    What one of them protects (+inf) stays protected.

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
            if other.words != first.words:
                raise ValueError(f"{first.by} and {other.by} score different words; mix scorers of the same words")
        scores = sum(w / total * ranks(one.scores) for w, one in zip(weights, all_scored, strict=True))
        protected = np.any([np.isposinf(one.scores) for one in all_scored], axis=0)
        by = " + ".join(f"{w / total:.2g} {one.by}" for w, one in zip(weights, all_scored, strict=True))
        return ScoredWords(text, first.words, np.where(protected, np.inf, scores).astype(np.float32), by)

    return score


def chosen(scores: Scores, n: int) -> Bool[np.ndarray, " W"]:
    """Marks the n best."""
    labels = np.zeros(len(scores), bool)
    labels[best_first(scores)[:n]] = True
    return labels
