"""Which words stay, given a number of tokens and what each word costs: by text, by chunk, or over all texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxcompress.prompt import protect
from jaxcompress.prompt.budget import apportion, choose_words
from jaxcompress.prompt.word_scores import ScoredWords, Scores
from jaxcompress.prompt.words import Costs

BudgetScope = Literal["chunk", "document", "corpus"]
Mask = Bool[np.ndarray, "..."]  # [W] of one text; in a list, of different lengths


class PricedText(NamedTuple):
    """A scored text and what its words cost.

    Attributes:
      costs: [W], tokens of each word.
      tokens: of the whole text.
      forced: [W], words that have to stay.
      whole: [W], those of them that stay as repeats too.
      present: False if the whole text is dropped.
    """

    scored: ScoredWords
    costs: Costs
    tokens: int
    forced: Mask
    whole: Mask
    present: bool

    @property
    def most(self) -> int:
        """Tokens of all words that may stay."""
        return int(self.costs.sum()) if self.present else 0


class _Row(NamedTuple):
    """Words in a row, of one text or several: scores (+inf: forced), costs, whether they may stay, whether they stay as
    repeats, and where they stand: which text, and start and end there."""

    scores: Scores
    costs: Costs
    allowed: Mask
    whole: Mask
    places: Int[np.ndarray, "W 3"]

    def part(self, inside: Int[np.ndarray, " N"]) -> _Row:
        return _Row(*(values[inside] for values in self))


@dataclass(frozen=True)
class Selection:
    """Chooses words of texts by their scores; the same number of tokens gives the same words.

    Attributes:
      scope: where words compete (see `keep`).
      drop_consecutive: of equal forced words that would follow one another, the first stays.
    """

    texts: Sequence[PricedText]
    scope: BudgetScope
    drop_consecutive: bool
    _memo: dict[tuple[int, int], Mask] = field(default_factory=dict)

    @cached_property
    def forced(self) -> list[Mask]:
        """Marks the words of each text that stay whatever the number of tokens."""
        return [self._forced(one) for one in self.texts]

    @cached_property
    def least(self) -> list[int]:
        """What they cost."""
        return [int(one.costs[stays].sum()) for one, stays in zip(self.texts, self.forced, strict=True)]

    def words(self, total: int, which: range) -> list[Mask]:
        """Marks the words of some texts whose costs add up to `total`, or to the largest number below that any do."""
        if self.scope == "corpus":
            kept = self._keep(self._row(which), total)
            return np.split(kept, np.cumsum([len(self.texts[n].costs) for n in which])[:-1])
        most = np.array([self.texts[n].most for n in which], np.int64)
        least = np.array([self.least[n] for n in which], np.int64)
        return [self._of_one(n, part) for n, part in zip(which, apportion(total, most, least).tolist(), strict=True)]

    def follows_itself(self, n: int, mask: Mask) -> bool:
        """Whether a forced word of text n would follow an equal one, and must not."""
        return self.drop_consecutive and bool(_repeats(self.texts[n], mask).any())

    def _forced(self, one: PricedText) -> Mask:
        stays = one.forced & one.present
        return stays & ~_repeats(one, stays) if self.drop_consecutive else stays

    def _of_one(self, n: int, total: int) -> Mask:
        if (n, total) not in self._memo:
            row, chunks = self._row(range(n, n + 1)), self.texts[n].scored.chunks
            if self.scope == "chunk" and chunks is not None and len(chunks):
                self._memo[n, total] = self._by_chunk(row, total, chunks)
            else:
                self._memo[n, total] = self._keep(row, total)
        return self._memo[n, total]

    def _by_chunk(self, row: _Row, total: int, chunks: Int[np.ndarray, " W"]) -> Mask:
        sums = lambda values: np.bincount(chunks, values, minlength=int(chunks.max()) + 1).astype(np.int64)
        forced = np.isposinf(row.scores) & row.allowed
        least = sums(row.costs * (forced & ~self._repeated(row, forced)))
        most = sums(row.costs * row.allowed)
        members = np.split(np.argsort(chunks, kind="stable"), np.cumsum(np.bincount(chunks))[:-1])
        kept = np.zeros(len(chunks), bool)
        for inside, part in zip(members, apportion(total, most, least).tolist(), strict=True):
            kept[inside] = self._keep(row.part(inside), part)
        return kept

    def _row(self, which: range) -> _Row:
        parts = [(n, self.texts[n]) for n in which]
        scores = [np.where(one.forced & one.present, np.inf, one.scored.scores) for _, one in parts]
        places = [np.insert(one.scored.spans, 0, n, axis=1) for n, one in parts]
        return _Row(
            np.concatenate([np.zeros(0, np.float32), *scores]).astype(np.float32),
            np.concatenate([np.zeros(0, np.int64), *(one.costs for _, one in parts)]),
            np.concatenate([np.zeros(0, bool), *(np.full(len(one.costs), one.present) for _, one in parts)]),
            np.concatenate([np.zeros(0, bool), *(one.whole for _, one in parts)]),
            np.concatenate([np.zeros((0, 3), np.int64), *places]),
        )

    def _keep(self, row: _Row, n: int) -> Mask:
        if not self.drop_consecutive:
            return choose_words(row.scores, row.costs, n, row.allowed)
        allowed, forced = row.allowed.copy(), np.isposinf(row.scores)
        while True:
            # Words are only ever taken out, so this ends; with all forced words in a row it may end at once.
            if int(row.costs[forced & allowed].sum()) > n:
                allowed[self._repeated(row, forced & allowed)] = False
            kept = choose_words(row.scores, row.costs, n, allowed)
            again = self._repeated(row, kept)
            if not again.any():
                return kept
            allowed[again] = False

    def _repeated(self, row: _Row, kept: Mask) -> Mask:
        """Kept forced words whose nearest kept word before is forced, the same, and of the same text."""
        found = np.zeros(len(kept), bool)
        if not self.drop_consecutive:
            return found
        forced = kept & np.isposinf(row.scores)
        at = np.flatnonzero(kept)
        for before, here in zip(at[:-1].tolist(), at[1:].tolist(), strict=True):
            same = (
                forced[before] and forced[here] and not row.whole[here] and row.places[before, 0] == row.places[here, 0]
            )
            found[here] = same and self._spelled(row, before) == self._spelled(row, here)
        return found

    def _spelled(self, row: _Row, word: int) -> str:
        n, start, end = row.places[word].tolist()
        return self.texts[n].scored.text[start:end]


def _repeats(one: PricedText, kept: Mask) -> Mask:
    return protect.repeats(one.scored.text, one.scored.spans, kept, one.forced, one.whole)
