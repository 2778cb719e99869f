"""Scores for the words of a text, and the words that stay: what every way of shortening a prompt has in common.

    scored = self_information(reader)(text)       # any scorer: text -> Scored
    kept = keep(scored, rate=0.5)
    kept.text, kept.labels, kept.scored.by

A scorer is a function from text to `Scored`; scorers can be mixed, and a new one is a few lines. What stays is chosen
by `jaxcompress.select`, as everywhere: exactly so many words, higher scores first, the earlier word on a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from jaxcompress.prompt.surface import Word, is_word
from jaxcompress.select import keep_top, rank

Scores = Float[np.ndarray, " W"]


_CLOSING, _OPENING = frozenset(".,;:!?%)]}”’»…。、，！？\"'"), frozenset("([{“‘«\"'")


class Scored(NamedTuple):
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


Scorer = Callable[[str], Scored]


class Kept(NamedTuple):
    """What stays of a text.

    Attributes:
      labels: [W], True: kept.
      text: the kept words, with the white space they had; where words between two of them are gone, one space (or line
        break, if there was one).
    """

    scored: Scored
    labels: Bool[np.ndarray, " W"]
    text: str

    @property
    def rate(self) -> float:
        """Share of words that stay; 1 for a text without words."""
        return float(self.labels.mean()) if len(self.labels) else 1.0


def keep(scored: Scored, *, rate: float | None = None, words: int | None = None) -> Kept:
    """Keeps exactly so many words, those that score highest.

    Give either `rate`, of which the nearest whole number of words is kept, or `words`.

    Raises:
      ValueError: neither or both are given, the rate is not in (0, 1], a number of words below 0, or more words are
        protected (+inf) than may stay.
    """
    total = len(scored.words)
    if (rate is None) == (words is None):
        raise ValueError(f"give either rate or words, not {'neither' if rate is None else 'both'}")
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"a rate lies in (0, 1], {rate} does not: it is the share of words that stays")
    if words is not None and words < 0:
        raise ValueError(f"at least 0 words stay, not {words}")
    n = min(total, words if words is not None else int(np.floor(total * (rate or 0) + 0.5)))
    protected = int(np.isposinf(scored.scores).sum())
    if protected > n:
        raise ValueError(f"{protected} words of {total} are protected, only {n} may stay: raise the rate")
    if not total:
        return Kept(scored, np.zeros(0, bool), "")
    labels = chosen(scored.scores, n)
    return Kept(scored, labels, joined(scored.text, scored.words, labels))


def joined(text: str, words: Sequence[Word], labels: Sequence[bool] | Bool[np.ndarray, " W"]) -> str:
    """The text of the words that stay.

    Neighbours keep the white space between them. Over a gap it becomes one space or line break; punctuation that was
    attached to a word stays attached to whatever it meets, and two words never run together that were two.
    """
    out: list[str] = []
    before: Word | None = None
    gap = False
    for word, stays in zip(words, labels, strict=True):
        if not stays:
            gap = True
            continue
        if before is not None:
            space = "".join(filter(str.isspace, text[before.end : word.start]))
            out.append(_over_gap(text, before, word, space) if gap else space)
        out.append(text[word.start : word.end])
        before, gap = word, False
    return "".join(out)


def _over_gap(text: str, before: Word, word: Word, space: str) -> str:
    if not space:
        words = is_word(text[before.start : before.end]) and is_word(text[word.start : word.end])
        return " " if words and text[before.end - 1].isascii() else ""  # x=y without the sign is not xy
    closes = text[word.start] in _CLOSING and not text[word.start - 1].isspace()
    opens = text[before.start] in _OPENING and (before.start == 0 or not text[before.start - 1].isalnum())
    return "" if closes or opens else "\n" if "\n" in space else " "


def ranks(scores: Scores) -> Scores:
    """Scores as ranks in [0, 1], the worst 0, by the rule of `select`: comparable whoever scored."""
    n = len(scores)
    if n < 2:
        return np.ones(n, np.float32)
    better = np.asarray(_rank(*_padded(scores)))[0, 0, :n]
    return ((n - 1 - better) / (n - 1)).astype(np.float32)


def mixed(*weighted: tuple[float, Scorer]) -> Scorer:
    """Mixes scorers of the same words by the weighted mean of their ranks.

        mixed((0.7, relevance_to(question)), (0.3, self_information(reader)))     # task-aware + task-agnostic

    What one of them protects (+inf) stays protected.

    Raises:
      ValueError: nothing to mix, weights that are negative or all 0, or (when called) scorers whose words differ.
    """
    total = sum(weight for weight, _ in weighted)
    if not weighted or any(weight < 0 for weight, _ in weighted) or total <= 0:
        raise ValueError(f"weights must be positive, not {[weight for weight, _ in weighted]}")

    def score(text: str) -> Scored:
        all_scored = [scorer(text) for _, scorer in weighted]
        first = all_scored[0]
        for other in all_scored[1:]:
            if other.words != first.words:
                raise ValueError(f"{first.by} and {other.by} score different words; mix scorers of the same words")
        scores = sum(w / total * ranks(one.scores) for (w, _), one in zip(weighted, all_scored, strict=True))
        protected = np.any([np.isposinf(one.scores) for one in all_scored], axis=0)
        by = " + ".join(f"{w / total:.2g} {one.by}" for (w, _), one in zip(weighted, all_scored, strict=True))
        return Scored(text, first.words, np.where(protected, np.inf, scores).astype(np.float32), by)

    return score


_rank, _keep_top = jax.jit(rank), jax.jit(keep_top)


def chosen(scores: Scores, n: int) -> Bool[np.ndarray, " W"]:
    """Marks the n best."""
    if not len(scores):
        return np.zeros(0, bool)
    return np.asarray(_keep_top(*_padded(scores), n))[0, 0, : len(scores)]


def _padded(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Scores and positions [1, 1, N], N a power of two: what fills up is free, and few lengths are compiled."""
    fill = (0, max(16, 1 << (len(scores) - 1).bit_length()) - len(scores))
    positions = np.pad(np.arange(len(scores), dtype=np.int32), fill, constant_values=-1)
    return np.pad(scores, fill)[None, None], positions[None, None]
