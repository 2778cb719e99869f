"""Which whole contexts stay, before any word is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from jaxcompress.inputs.scalars import Number, share, whole
from jaxcompress.prompt.budget import choose_words, words_best_first
from jaxcompress.prompt.word_scores import ScoredWords


class Contexts(NamedTuple):
    """How many whole contexts stay, those that are most relevant for a question if the scorer reads one, else those
    with the highest mean score; give exactly one of the first three.

    Attributes:
      rate: the share of the contexts, in (0, 1]; rounded, at least one stays.
      count: how many.
      tokens: as many contexts, in order of score, as have at most so many tokens together; at least one.
      force: indices of contexts that stay in any case, and count.
    """

    rate: Number | None = None
    count: Number | None = None  # pyright: ignore[reportIncompatibleMethodOverride]  nobody counts its fields
    tokens: Number | None = None
    force: tuple[int, ...] = ()


def contexts_that_stay(
    scored: Sequence[ScoredWords], tokens: Sequence[int], filter: Contexts | None
) -> Bool[np.ndarray, " N"]:
    """Marks the contexts that stay; all without a filter, or if there is one context only.

    Args:
      tokens: of each context.

    Raises:
      ValueError: the filter gives none or several of rate, count and tokens, one of them is no such number, or there is
        no context of an index in `force`.
    """
    if filter is None or len(scored) < 2:
        return np.ones(len(scored), bool)
    given = [filter.rate, filter.count, filter.tokens]
    if sum(item is not None for item in given) != 1:
        raise ValueError(f"a filter of contexts needs one of rate, count and tokens, not {filter}")
    rate = None if filter.rate is None else share(filter.rate, "a filter's rate", of="contexts")
    count = None if filter.count is None else whole(filter.count, "a filter's count", least=1)
    most = None if filter.tokens is None else whole(filter.tokens, "a filter's tokens", least=1)
    if outside := [i for i in filter.force if not 0 <= i < len(scored)]:
        raise ValueError(f"there is no context {outside[0]}: there are {len(scored)}, counted from 0")
    means = np.array([_mean(one) for one in scored], np.float32)
    means[list(filter.force)] = np.inf
    if most is not None:
        sizes = np.cumsum([tokens[i] for i in words_best_first(means)])
        count = int(np.searchsorted(sizes, most, side="right"))
    elif rate is not None:
        count = int(rate * len(scored) + 0.5)
    return choose_words(means, np.ones(len(scored), np.int64), max(count or 0, 1, len(set(filter.force))))


def _mean(scored: ScoredWords) -> float:
    """The relevance of a text, else the mean of its finite scores; 0 without any."""
    if scored.relevance is not None:
        return scored.relevance
    finite = scored.scores[np.isfinite(scored.scores)]
    return float(finite.mean()) if len(finite) else 0.0
