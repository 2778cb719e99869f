"""Words whose text has exactly so many tokens, counted in what comes out.

The tokens of a text need not be the sum of its words' tokens. So the budget of the words is corrected by what was
missed, and small words fill up what is then still missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from jaxcompress.prompt.budget import words_best_first
from jaxcompress.prompt.counting import Counter
from jaxcompress.prompt.joining import join
from jaxcompress.prompt.selection import Mask, Selection

_CORRECTIONS = 6
_FILLERS = 24  # words tried for what is still missing after the corrections


class Fitted(NamedTuple):
    """The words that stay of some texts, what is left of each, and the tokens of it all."""

    masks: list[Mask]
    texts: list[str]
    tokens: int


@dataclass(frozen=True)
class Fitter:
    """Attributes:
    breaks: white space that stays where words around it are dropped (see `join`).
    """

    selection: Selection
    counter: Counter
    breaks: Sequence[str]
    _memo: dict[tuple[int, bytes], str] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> int:
        """Of all texts as they are, read one after the other."""
        texts = [one.scored.text for one in self.selection.texts]
        return self._as_they_are(texts, range(len(texts)))

    def forced(self, which: range) -> Fitted:
        """Of some texts, the words that have to stay, and how many tokens they come out as."""
        return self._measured([self.selection.forced[n] for n in which], which)

    def fit(self, total: int, which: range) -> Fitted:
        """Of some texts, words that come out as `total` tokens, or as the largest number below it that was found.

        Args:
          total: at least the tokens of what is forced of these texts (`forced`).
        """
        whole = self._whole(which)
        if whole.tokens <= total:
            return whole
        least = sum(self.selection.least[n] for n in which)
        most = sum(self.selection.texts[n].most for n in which)
        tried: dict[int, Fitted] = {}
        budget = max(min(total, most), least)
        for _ in range(_CORRECTIONS):
            if budget in tried:
                break
            tried[budget] = self._measured(self.selection.words(budget, which), which)
            missing = total - tried[budget].tokens
            if not missing:
                break
            budget = min(max(budget + missing, least), most)
        within = [one for one in tried.values() if one.tokens <= total]
        best = max(within, key=lambda one: one.tokens) if within else self.forced(which)
        return best if best.tokens == total else self._filled(best, total, which)

    def together(self, found: Sequence[Fitted]) -> Fitted:
        """What was found for texts by themselves, read one after the other."""
        if len(found) == 1:
            return found[0]
        masks = [mask for one in found for mask in one.masks]
        return self._measured(masks, range(len(masks)), [text for one in found for text in one.texts])

    def chosen(self, masks: list[Mask]) -> Fitted:
        """All texts with these words; one that loses none is left as it is."""
        texts = [
            self.selection.texts[n].scored.text if len(mask) and mask.all() else self._text(n, mask)
            for n, mask in enumerate(masks)
        ]
        return self._measured(masks, range(len(masks)), texts)

    def _whole(self, which: range) -> Fitted:
        """Everything of the texts that are not dropped, with the white space around their words."""
        texts = [self.selection.texts[n] for n in which]
        masks = [np.full(len(one.costs), one.present) for one in texts]
        left = [one.scored.text if mask.any() else "" for one, mask in zip(texts, masks, strict=True)]
        same = len(texts) == len(self.selection.texts) and all(mask.any() for mask in masks)
        return Fitted(masks, left, self.tokens if same else self._as_they_are(left, which))

    def _as_they_are(self, left: Sequence[str], which: range) -> int:
        """The tokens of some texts, each as it is or "" in its place."""
        there = [self.selection.texts[n] for n, text in zip(which, left, strict=True) if text]
        if len(there) < 2:  # which was counted before
            return sum(one.tokens for one in there)
        return self.counter.total(left, sum(int(one.costs.sum()) for one in there))

    def _filled(self, fitted: Fitted, total: int, which: range) -> Fitted:
        """The same with small words added, the best first, as long as tokens are missing."""
        texts = [self.selection.texts[n] for n in which]
        missing = total - fitted.tokens
        small = [
            ~mask & one.present & (one.costs <= missing) for one, mask in zip(texts, fitted.masks, strict=True)
        ]  # fmt: skip
        out = [(i, w) for i, mask in enumerate(small) for w in np.flatnonzero(mask).tolist()]
        scores = np.concatenate([one.scored.scores[mask] for one, mask in zip(texts, small, strict=True)])
        for i, w in (out[at] for at in words_best_first(scores)[:_FILLERS].tolist()):
            if fitted.tokens == total:
                break
            mask = fitted.masks[i].copy()
            mask[w] = True
            if self.selection.follows_itself(which[i], mask):
                continue
            more = self._measured([*fitted.masks[:i], mask, *fitted.masks[i + 1 :]], which)
            if fitted.tokens < more.tokens <= total:
                fitted = more
        return fitted

    def _measured(self, masks: list[Mask], which: range, texts: list[str] | None = None) -> Fitted:
        texts = [self._text(n, mask) for n, mask in zip(which, masks, strict=True)] if texts is None else texts
        cost = sum(int(self.selection.texts[n].costs[mask].sum()) for n, mask in zip(which, masks, strict=True))
        return Fitted(masks, texts, self.counter.total(texts, cost))

    def _text(self, n: int, mask: Mask) -> str:
        key = n, mask.tobytes()
        if key not in self._memo:
            scored = self.selection.texts[n].scored
            self._memo[key] = join(scored.text, scored.spans, mask, self.breaks)
        return self._memo[key]
