"""From a text and its compression to a label per word: kept or not (LLMLingua-2, Pan et al. 2024, section 3.2).

A teacher that is told only to remove words still reorders, inflects and invents some. So each word of the compression
is searched near the place of the one before, ahead first, then behind. Words that are not found are counted: two rates
say how far the teacher strayed, and the worst pairs are left out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

WINDOW = 400
"""Words searched ahead and behind; the paper's experiments use 400, its script 150 by default."""


class Annotation(NamedTuple):
    """Which words of a text its compression keeps, and how faithful the compression is.

    With C the words of the compression and O those of the text:

    Attributes:
      labels: one per word of O, True: kept.
      compression_rate: |C| / |O|.
      variation_rate: share of C that does not occur in O: what the teacher invented. 1 for an empty C.
      hitting_rate: |{c in C: c in O}| / |O|. Repeated words count each time, so it may exceed 1.
      matching_rate: share of O that is labelled as kept.
      alignment_gap: hitting_rate - matching_rate: words that occur in O but found no free word there.
    """

    labels: list[bool]
    compression_rate: float
    variation_rate: float
    hitting_rate: float
    matching_rate: float
    alignment_gap: float


def annotate(
    original: Sequence[str],
    compressed: Sequence[str],
    *,
    window: int = WINDOW,
    key: Callable[[str], str] = str.lower,
) -> Annotation:
    """Labels the words of a text that its compression keeps.

    Each word takes the nearest equal word within `window` of the last match that is not taken yet; of two equally near
    ones, the one ahead. A match more than half a window ahead moves the place by half a window only, so one word found
    far away does not mislead the search.

    Args:
      original, compressed: words in order. The authors' code drops commas from both and compares lemmas; see `key`.
      window: an equal word is searched at distances 0 to window - 1.
      key: words are equal if their keys are: lower case by default; `rough_lemma` or a lemmatiser of your own ignores
        inflection. All rates compare words by key.

    Raises:
      ValueError: the original has no words, or the window is less than 1.
    """
    if not original:
        raise ValueError("the original has no words, so there is nothing to label")
    if window < 1:
        raise ValueError(f"the window is at least 1, not {window}")
    free: dict[str, list[int]] = {}  # places of each word that are not taken, ascending
    for at, word in enumerate(original):
        free.setdefault(key(word), []).append(at)
    labels, place, hits = [False] * len(original), 0, 0
    for word in map(key, compressed):
        if word not in free:
            continue
        hits += 1
        found = _nearest(free[word], place, window)
        if found is None:
            continue
        at = free[word].pop(found)
        labels[at] = True
        place = place + window // 2 if at - place > window // 2 else at
    hitting, matching = hits / len(original), sum(labels) / len(original)
    return Annotation(
        labels,
        compression_rate=len(compressed) / len(original),
        variation_rate=1 - hits / len(compressed) if compressed else 1.0,
        hitting_rate=hitting,
        matching_rate=matching,
        alignment_gap=hitting - matching,
    )


def _nearest(places: list[int], to: int, window: int) -> int | None:
    """Index of the nearest place that is less than a window away; ahead on a tie."""
    ahead = bisect_left(places, to)
    near = [(abs(places[i] - to), places[i] < to, i) for i in (ahead, ahead - 1) if 0 <= i < len(places)]
    distance, _, index = min(near, default=(window, False, 0))
    return index if distance < window else None


def faithful(
    annotations: Sequence[Annotation], *, variation: float = 95.0, gap: float = 90.0, spare_perfect: bool = True
) -> list[int]:
    """The pairs that are good enough to learn from: indices, in order.

    Pairs whose variation rate is not below its percentile are left out first; of the rest, those whose alignment gap is
    not below its percentile. The percentiles are the paper's (the worst 5 % and 10 %); the authors' script has 90 and
    90.

    Args:
      variation, gap: percentiles; 100 leaves out only the very worst.
      spare_perfect: a rate of 0 is never left out. False is as in the authors' script: if most rates are 0, so is the
        percentile, and all pairs are left out.
    """
    kept = list(range(len(annotations)))
    for rate, percentile in (("variation_rate", variation), ("alignment_gap", gap)):
        if not kept:
            return kept
        values = [getattr(annotations[i], rate) for i in kept]
        worst = np.percentile(values, percentile)
        kept = [
            i for i, value in zip(kept, values, strict=True) if value < worst or (spare_perfect and value <= 0.0)
        ]  # fmt: skip
    return kept


_ENDINGS = (("ies", "y"), ("ing", ""), ("ed", ""), ("es", ""), ("s", ""), ("ly", ""))


def rough_lemma(word: str) -> str:
    """Lower case without the most common English endings: votes, voted and voting become one word.

    It uses no dictionary, and is good enough to align words that stand near the same place. Stems shorter than three
    letters stay whole.
    """
    word = word.lower()
    for ending, instead in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            stem = word[: -len(ending)] + instead
            doubled = not instead and len(stem) > 3 and stem[-1] == stem[-2] and stem[-1] not in "lsz"
            return stem[:-1] if doubled else stem.removesuffix("e")
    return word.removesuffix("e") if len(word) > 3 else word
