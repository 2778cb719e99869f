"""Words whose text has exactly so many tokens, counted in what comes out.

The tokens of a text need not be the sum of its words' tokens. So the budget of the words is corrected by what was
missed, and small words fill up what is then still missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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

    def forced(self, which: range) -> Fitted:
        """Of some texts, the words that have to stay, and how many tokens they come out as."""
        return self._measured([self.selection.forced[n] for n in which], which)

    def fit(self, total: int, which: range) -> Fitted:
        """Of some texts, words that come out as `total` tokens, or as the largest number below it that was found.

        Args:
          total: at least the tokens of what is forced of these texts (`forced`).
        """
        texts = [self.selection.texts[n] for n in which]
        least, most = sum(self.selection.least[n] for n in which), sum(one.most for one in texts)
        if most <= total and all(one.present for one in texts):
            with_words = [len(one.costs) > 0 for one in texts]
            return Fitted(
                [np.ones(len(one.costs), bool) for one in texts],
                [one.scored.text if some else "" for one, some in zip(texts, with_words, strict=True)],
                sum(one.tokens for one, some in zip(texts, with_words, strict=True) if some),
            )
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

    def _measured(self, masks: list[Mask], which: range) -> Fitted:
        texts = [self._text(n, mask) for n, mask in zip(which, masks, strict=True)]
        cost = sum(int(self.selection.texts[n].costs[mask].sum()) for n, mask in zip(which, masks, strict=True))
        return Fitted(masks, texts, self.counter.total(texts, cost))

    def _text(self, n: int, mask: Mask) -> str:
        key = n, mask.tobytes()
        if key not in self._memo:
            scored = self.selection.texts[n].scored
            self._memo[key] = join(scored.text, scored.spans, mask, self.breaks)
        return self._memo[key]
